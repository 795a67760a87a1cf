"""Two calls of the system as rows need them: Python lacks the one, and makes an object for every row in the other."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_TARGETS = 1024
"""Linux's IOV_MAX."""
_SYNC_FILE_RANGE_WRITE = 2
"""Of `linux/fs.h`."""


def begin_writeback(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with bytes of a file, which `fsync` would otherwise only begin with when it is called.

    Nothing depends on it: where the system or the file system cannot do it, `fsync` does all, and it names bad disks.
    """
    begin = _call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if begin is not None:
        begin(descriptor, start, length, _SYNC_FILE_RANGE_WRITE)


def read_to_rows(descriptor: int, start: int, out: NDArray[np.uint8], place: NDArray[np.int64]) -> int:
    """Read a file from byte `start` on into the rows of contiguous `out`, (n, bytes), that `place` names, one after the other.

    Returns:
        The bytes read; fewer than those rows hold only at the end of the file.

    Raises:
        IndexError: `out` has no such row.
        OSError: the system refuses.
    """
    if not len(place):
        return 0
    if place.min() < 0 or place.max() >= len(out) or not (out.flags.c_contiguous and out.flags.writeable):
        raise IndexError(f"rows {place.min()} to {place.max()} of {len(out)} cannot be written")
    read = _call("preadv", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    size = out.shape[1]
    targets = np.empty((len(place), 2), np.uintp)  # as `struct iovec`: address, length
    targets[:, 0] = place
    targets[:, 0] *= np.uintp(size)
    targets[:, 0] += np.uintp(out.ctypes.data)
    targets[:, 1] = size
    done, wanted = 0, len(place) * size
    while done < wanted:
        row, inside = divmod(done, size)
        some = targets[row : row + _MOST_TARGETS]
        if inside:  # the system stopped in the middle of a row
            some = some + np.array([[inside, -inside]] + [[0, 0]] * (len(some) - 1)).astype(np.uintp)
        count = read(descriptor, some.ctypes.data, len(some), start + done)
        if count < 0 and ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if not count:
            break
        done += max(count, 0)
    return done


@cache
def _call(name: str, *arguments: Any) -> Any:
    """A function of the C library that lets other threads run meanwhile; None where there is none."""
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if found is not None:
        found.argtypes, found.restype = arguments, ctypes.c_ssize_t
    return found
