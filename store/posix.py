"""A lake in a folder: plain POSIX files at the speed of the disk."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import StorageFailed
from millpond.store.objects import Buffer, Entry, Storage, StreamWriter
from millpond.store.system_calls import begin_writeback, read_to_rows

WRITEBACK_BYTES = 16 << 20
"""The disk is told to begin with a file's bytes whenever it has so many more."""

_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or ask for a larger quota",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "name a place that you may write",
    errno.EIO: "look at the disk (dmesg), and restore the file from a copy",
}


def sync_folder(folder: Path) -> None:
    """Make renames and creations inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStorage(Storage):
    """Files below a folder, of a file system with atomic renames and hard links.

    An object is written under a hidden name, synced, and then renamed (`put`, `stream_writer`) or linked
    (`create`, which the kernel refuses if the name exists). Durable writes sync the file and its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def __truediv__(self, path: str) -> LocalStorage:
        return LocalStorage(self.path / path)

    @property
    def parent(self) -> LocalStorage:  # noqa: D102
        return LocalStorage(self.path.parent)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.path,)

    @property
    def volume(self) -> str:  # noqa: D102
        folder = self.path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return f"file:{folder.stat().st_dev}"

    def get(self, path: str) -> bytes:  # noqa: D102
        with named_errors(self.path / path):
            return (self.path / path).read_bytes()

    def get_range(self, path: str, start: int, length: int) -> Buffer:  # noqa: D102
        with named_errors(self.path / path), (self.path / path).open("rb", buffering=0) as handle:
            return os.pread(handle.fileno(), length, start)

    def get_tail(self, path: str, length: int) -> Buffer:  # noqa: D102
        with named_errors(self.path / path), (self.path / path).open("rb", buffering=0) as handle:
            start = max(os.fstat(handle.fileno()).st_size - length, 0)
            return os.pread(handle.fileno(), length, start)

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[Buffer]:  # noqa: D102
        with named_errors(self.path / path), (self.path / path).open("rb", buffering=0) as handle:
            return [os.pread(handle.fileno(), length, start) for start, length in zip(starts, lengths, strict=True)]

    def read_into(self, path: str, start: int, target: memoryview) -> int:  # noqa: D102
        file = self.path / path
        with named_errors(file):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(target) and (count := os.preadv(descriptor, [target[done:]], start + done)):
                    done += count
                return done
            finally:
                os.close(descriptor)

    def read_to_rows(self, path: str, start: int, out: NDArray[np.uint8], place: NDArray[np.int64]) -> int:  # noqa: D102
        file = self.path / path
        with named_errors(file):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return read_to_rows(descriptor, start, out, place)
            finally:
                os.close(descriptor)

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:  # noqa: D102
        target = self.path / path
        with named_errors(target, writing=True), self._written(target, data, durable) as temporary:
            temporary.replace(target)
            if durable:
                sync_folder(target.parent)

    def create(self, path: str, data: bytes) -> bool:  # noqa: D102
        target = self.path / path
        with named_errors(target, writing=True), self._written(target, data, durable=True) as temporary:
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
            sync_folder(target.parent)
            return True

    @contextmanager
    def _written(self, target: Path, data: bytes, durable: bool) -> Iterator[Path]:
        _make_folder(target.parent)
        temporary = _hidden(target)
        try:
            with temporary.open("xb", buffering=0) as handle:
                _write_all(handle.fileno(), data)
                if durable:
                    os.fsync(handle.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def stream_writer(self, path: str, memory: int = 0) -> StreamWriter:  # noqa: D102
        with named_errors(self.path / path, writing=True):
            return _FileWriter(self.path / path)

    def list(self, prefix: str = "") -> Iterator[Entry]:  # noqa: D102
        return self._files(prefix, hidden=False)

    def unfinished(self, prefix: str) -> Iterator[Entry]:  # noqa: D102
        return self._files(prefix, hidden=True)

    def _files(self, prefix: str, *, hidden: bool) -> Iterator[Entry]:
        """The files in folders that are not hidden, which are themselves hidden or not."""
        folders = [self.path / prefix if prefix else self.path]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise StorageFailed(f"{folder} cannot be read: {error.strerror}") from error
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name[0] != ".":
                        folders.append(Path(entry.path))
                    continue
                if (entry.name[0] == ".") != hidden:
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Entry(os.path.relpath(entry.path, self.path), status.st_size, status.st_mtime)

    def folders(self, prefix: str = "") -> Sequence[str]:  # noqa: D102
        folder = self.path / prefix if prefix else self.path
        with suppress(FileNotFoundError, NotADirectoryError), named_errors(folder), os.scandir(folder) as found:
            return sorted(entry.name for entry in found if entry.name[0] != "." and entry.is_dir())
        return []

    def head(self, path: str) -> Entry:  # noqa: D102
        with named_errors(self.path / path):
            status = (self.path / path).stat()
            return Entry(path, status.st_size, status.st_mtime)

    def delete(self, paths: str | Sequence[str]) -> None:  # noqa: D102
        for path in [paths] if isinstance(paths, str) else paths:
            with named_errors(self.path / path):
                (self.path / path).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:  # noqa: D102
        folder = self.path / prefix if prefix else self.path
        grave = folder.with_name(f".deleted-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError), named_errors(folder):
            folder.rename(grave)
            sync_folder(folder.parent)
            shutil.rmtree(grave)
        for left in folder.parent.glob(".deleted-*"):  # of a deletion that was killed
            shutil.rmtree(left, ignore_errors=True)

    def copy(self, source: str, target: str) -> None:  # noqa: D102
        with named_errors(self.path / source):
            _make_folder((self.path / target).parent)
            (self.path / target).hardlink_to(self.path / source)
            sync_folder((self.path / target).parent)

    def sweep(self, prefix: str, before: float) -> None:  # noqa: D102
        for left in (self.path / prefix).glob(".*"):
            with suppress(FileNotFoundError), named_errors(left):
                if left.stat().st_mtime < before:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


class _FileWriter(StreamWriter):
    def __init__(self, path: Path) -> None:
        _make_folder(path.parent)
        self._path = path
        self._temporary = _hidden(path)
        self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._written = self._begun = 0

    def write(self, data: Buffer) -> None:
        with named_errors(self._path, writing=True):
            _write_all(self._descriptor, data)
        self._written += memoryview(data).nbytes
        if self._written - self._begun >= WRITEBACK_BYTES:
            begin_writeback(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written

    def finish(self) -> None:
        with named_errors(self._path, writing=True):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._temporary.rename(self._path)
            sync_folder(self._path.parent)

    def abandon(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._temporary.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
        sync_folder(folder.parent)


@contextmanager
def named_errors(path: Path, *, writing: bool = False) -> Iterator[None]:
    """Raises what the operating system refuses as `StorageFailed`, with the path."""
    try:
        yield
    except StorageFailed:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        if not writing:
            raise FileNotFoundError(f"{path} is missing") from None
        raise StorageFailed(
            error.errno, f"{error.strerror}; its folder cannot be made or was removed", str(path)
        ) from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "free space or check the permissions")
        raise StorageFailed(error.errno, f"{error.strerror}; {remedy}", str(path)) from error
