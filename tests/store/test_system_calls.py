import ctypes
import os

import numpy as np

from millpond.store import system_calls
from millpond.store.system_calls import read_to_rows


def test_a_read_that_stops_anywhere_goes_on_there(tmp_path, monkeypatch):
    """The kernel may return after any number of bytes; it rarely does, so one is put in its place that always does."""
    content = np.random.default_rng(0).bytes(11 * 7)
    (tmp_path / "a").write_bytes(content)
    steps = []

    def stopping(descriptor, targets, count, offset):
        address, length = np.ctypeslib.as_array((ctypes.c_uint64 * 2).from_address(targets)).tolist()
        data = os.pread(descriptor, min(length, 1 + len(steps) % 9), offset)
        ctypes.memmove(address, data, len(data))
        steps.append(len(data))
        return len(data)

    monkeypatch.setattr(system_calls, "_call", lambda *_: stopping)
    out = np.zeros((12, 7), np.uint8)
    place = np.random.default_rng(1).permutation(12)
    with (tmp_path / "a").open("rb") as file:
        assert read_to_rows(file.fileno(), 0, out, place) == 77  # of 84, for which the file is too short
    assert b"".join(bytes(out[row]) for row in place) == content + bytes(7)
    assert 0 < min(steps[:-1]) < max(steps) == 7
