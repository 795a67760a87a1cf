"""One tree of objects, on a disk, in S3 or in memory: what every reader and writer of a lake stands on.

A path is relative, with '/' between its segments; a segment that begins with a dot is never listed. Objects are
replaced whole or not at all, and what a call has returned from is seen by every later call of anybody.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, UnsafeStore

Buffer = Any
"""Bytes, a memoryview, or an array of one contiguous dimension of uint8."""

PARALLEL_REQUESTS = 8
"""Requests that one reader or writer has under way at once."""


class Entry(NamedTuple):
    """One object in a listing."""

    path: str
    size: int
    modified: float
    """Seconds since 1970 by the store's own clock."""


class StreamWriter(ABC):
    """An object being written piece by piece; it appears whole when the context ends, and not at all after an error."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Add `data`; the caller may change its memory afterwards."""

    @abstractmethod
    def finish(self) -> None:
        """Make the object appear, durably."""

    @abstractmethod
    def abandon(self) -> None:
        """Drop what was written. Calling it after `finish` does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


class Storage(ABC):
    """The objects under one URL. Handles are cheap, can be pickled, and may be shared by threads.

    Every method raises FileNotFoundError for an object that is not there, where it needs one, and
    `StorageFailed` when the store cannot be reached, refuses or is full, after its own retries.
    """

    url: str

    @abstractmethod
    def __truediv__(self, path: str) -> Storage:
        """The objects below `path`."""

    @property
    @abstractmethod
    def parent(self) -> Storage:
        """The objects of the folder that this one is in."""

    @property
    def name(self) -> str:
        """The last segment of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def volume(self) -> str:
        """What the store is, whatever the prefix: a bucket of an endpoint, a file system."""
        return self.url

    @abstractmethod
    def get(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def get_range(self, path: str, start: int, length: int) -> Buffer:
        """Bytes `start` to `start + length` of the object; fewer where it ends before."""

    @abstractmethod
    def get_tail(self, path: str, length: int) -> Buffer:
        """The last `length` bytes of the object, or all of a shorter one."""

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[Buffer]:
        """Several ranges of one object, in the order given; ranges close to each other are read at once."""
        return [self.get_range(path, start, length) for start, length in zip(starts, lengths, strict=True)]

    def read_into(self, path: str, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes from `start` on; returns how many there were."""
        data = memoryview(self.get_range(path, start, len(target)))
        target[: len(data)] = data
        return len(data)

    def read_to_rows(self, path: str, start: int, out: NDArray[np.uint8], place: NDArray[np.int64]) -> int:
        """Fill the rows of contiguous `out`, (n, bytes), that `place` names, one after the other, with the bytes from `start` on.

        Returns how many there were.
        """
        data = np.empty((len(place), out.shape[1]), np.uint8)
        count = self.read_into(path, start, data.reshape(-1).data)
        whole = -(-count // max(out.shape[1], 1))
        out[place[:whole]] = data[:whole]
        return count

    @abstractmethod
    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write the object, replacing one of that name at once. `durable`: it outlives a power failure."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write the object durably unless there is one of that name; False if there is. Of many racing, one wins.

        After a reply that was lost the answer is worked out from what is stored, so `data` should be unique.
        """

    @abstractmethod
    def stream_writer(self, path: str, memory: int = 64 << 20) -> StreamWriter:
        """Writes a large object piece by piece, with about `memory` bytes in flight at most."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object below the folder `prefix`; names in one folder ascend."""

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """What is being written below the folder `prefix`, or was when a writer died, as far as the store shows it."""
        return iter(())

    @abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """The names of the folders right below the folder `prefix`, ascending."""

    @abstractmethod
    def head(self, path: str) -> Entry:
        """Size and time of one object."""

    def exists(self, path: str) -> bool:
        """Whether there is an object of that name."""
        try:
            self.head(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def delete(self, paths: str | Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`; not atomic, and may be done again."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Make `target` the same object as `source`, without moving its bytes through this process.

        On a disk it is a hard link, so neither may be changed in place afterwards. Durable.
        """

    def sweep(self, prefix: str, before: float) -> None:  # noqa: B027 - memory has no such leftovers
        """Remove what killed writes left in the folder `prefix` before that time; nothing of it was ever listed."""

    def now(self) -> float:
        """The store's own clock, in seconds since 1970, to compare with `Entry.modified`."""
        path = f".clock-{uuid.uuid4().hex}"
        self.put(path, b"", durable=False)
        try:
            return self.head(path).modified
        finally:
            self.delete(path)

    def get_many(self, paths: Sequence[str]) -> Sequence[bytes | None]:
        """Whole objects, several at once; None for one that is not there."""

        def get(path: str) -> bytes | None:
            try:
                return self.get(path)
            except FileNotFoundError:
                return None

        if len(paths) < 2:
            return [get(path) for path in paths]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(get, paths))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __dask_tokenize__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url!r}>"


def open_storage(url: str | os.PathLike[str], **options: Any) -> Storage:
    """The objects under `url`: a folder's path, `file://`, `s3://bucket/prefix` or `memory://name`.

    Args:
        url: nothing is read or written by opening it.
        options: for S3, under the names of s3fs or obstore; see `S3Storage`. Others take none.

    Raises:
        InvalidInput: the URL or an option is not known.
    """
    text = os.fspath(url)
    scheme, mark, rest = text.partition("://")
    if not mark:
        path = Path(text)  # links stay links, but where '..' leads only the file system knows
        scheme, rest = "file", str(path.resolve() if ".." in path.parts else path.absolute())
    if scheme in ("s3", "s3a"):
        from millpond.store.s3 import S3Storage

        return S3Storage.open(rest, options)
    if options:
        raise InvalidInput(f"storage option {next(iter(options))!r} means nothing for {text!r}; leave it out")
    if ".." in rest.split("/"):
        raise InvalidInput(f"{text!r} holds '..'; name the folder itself")
    if scheme == "file":
        from millpond.store.posix import LocalStorage

        return LocalStorage(Path(rest))
    if scheme == "memory":
        return MemoryStorage(rest.strip("/"))
    raise InvalidInput(f"{text!r} has an unknown scheme; use a path, file://, s3://bucket/prefix or memory://name")


def as_storage(where: Storage | str | os.PathLike[str]) -> Storage:
    """`where` itself, or the storage at that path or URL."""
    return where if isinstance(where, Storage) else open_storage(where)


def check_conditional_create(storage: Storage, racers: int = 4) -> None:
    """Check that of several who create one object exactly one wins, as the commit protocol needs.

    Raises:
        UnsafeStore: the store lets more than one win.
    """
    for attempt in range(2):
        path = f".probe-{uuid.uuid4().hex}"
        try:
            with ThreadPoolExecutor(racers) as pool:
                wins = sum(pool.map(lambda number, path=path: storage.create(path, b"%d" % number), range(racers)))
            later = storage.create(path, b"later")
        finally:
            storage.delete(path)
        if wins != 1 or later:
            how = f"{wins} of {racers} racing creates" if wins != 1 else "a create over an existing object"
            raise UnsafeStore(
                f"{storage.url} accepted {how} (attempt {attempt + 1}); it ignores conditional writes (If-None-Match), so "
                "writers could overwrite each other: use AWS S3, Ceph 16 or later, SeaweedFS, MinIO or a local disk"
            )


def check_once(storage: Storage) -> None:
    """`check_conditional_create`, once in this process for each store."""
    if storage.volume not in _checked():
        check_conditional_create(storage)
        _checked().add(storage.volume)


@cache
def _checked() -> set[str]:
    return set()


class MemoryStorage(Storage):
    """Objects in this process, shared by all handles of one name; gone when it ends. For tests and trials."""

    def __init__(self, path: str) -> None:
        self.url = f"memory://{path}"
        self._root = path
        self._objects, self._lock = _memory()

    @property
    def volume(self) -> str:  # noqa: D102
        return "memory://"

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}".strip("/")

    def __truediv__(self, path: str) -> MemoryStorage:
        return MemoryStorage(self._key(path))

    @property
    def parent(self) -> MemoryStorage:  # noqa: D102
        return MemoryStorage(self._root.rpartition("/")[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryStorage, (self._root,)

    def _held(self, path: str) -> tuple[bytes, float]:
        try:
            return self._objects[self._key(path)]
        except KeyError:
            raise FileNotFoundError(f"{self.url}/{path} is missing") from None

    def get(self, path: str) -> bytes:  # noqa: D102
        return self._held(path)[0]

    def get_range(self, path: str, start: int, length: int) -> Buffer:  # noqa: D102
        return memoryview(self.get(path))[start : start + length]

    def get_tail(self, path: str, length: int) -> Buffer:  # noqa: D102
        return memoryview(self.get(path))[-length:]

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:  # noqa: D102
        self._objects[self._key(path)] = (bytes(data), time.time())

    def create(self, path: str, data: bytes) -> bool:  # noqa: D102
        with self._lock:
            if self._key(path) in self._objects:
                return False
            self.put(path, data)
            return True

    def stream_writer(self, path: str, memory: int = 0) -> StreamWriter:  # noqa: D102
        return _MemoryWriter(self, path)

    def list(self, prefix: str = "") -> Iterator[Entry]:  # noqa: D102
        start = f"{self._key(prefix)}/".lstrip("/")
        base = len(f"{self._root}/".lstrip("/"))
        for key, (data, modified) in sorted(self._objects.copy().items()):
            if key.startswith(start) and not is_hidden(key[base:]):
                yield Entry(key[base:], len(data), modified)

    def folders(self, prefix: str = "") -> Sequence[str]:  # noqa: D102
        skip = len(f"{prefix}/") if prefix else 0
        return sorted({e.path[skip:].split("/")[0] for e in self.list(prefix) if "/" in e.path[skip:]})

    def head(self, path: str) -> Entry:  # noqa: D102
        data, modified = self._held(path)
        return Entry(path, len(data), modified)

    def delete(self, paths: str | Sequence[str]) -> None:  # noqa: D102
        for path in [paths] if isinstance(paths, str) else paths:
            self._objects.pop(self._key(path), None)

    def delete_tree(self, prefix: str) -> None:  # noqa: D102
        self.delete([entry.path for entry in self.list(prefix)])

    def copy(self, source: str, target: str) -> None:  # noqa: D102
        self.put(target, self.get(source))


@cache
def _memory() -> tuple[dict[str, tuple[bytes, float]], threading.Lock]:
    return {}, threading.Lock()


class _MemoryWriter(StreamWriter):
    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path, self._pieces = storage, path, [b""]

    def write(self, data: Buffer) -> None:
        self._pieces.append(bytes(data))

    def finish(self) -> None:
        self._storage.put(self._path, b"".join(self._pieces))

    def abandon(self) -> None:
        self._pieces.clear()


def is_hidden(path: str) -> bool:
    """Whether a segment of `path` begins with a dot."""
    return path.startswith(".") or "/." in path
