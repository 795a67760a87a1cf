"""A lake: runs under one URL."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from millpond.store.capture_spec import first_problem
from millpond.store.codecs import check_codec
from millpond.store.commits import FILLING, GRACE_SECONDS, check_open, close_run, reopen_run
from millpond.store.dtypes import check_dtype
from millpond.store.errors import InvalidInput, LakeCorrupt, RunExists, RunNotFound, StorageFailed
from millpond.store.files import decode_document, encode_document
from millpond.store.hooks import hook_sort_key, parse_hook
from millpond.store.manifest import (
    FORMAT_VERSION,
    READ_VERSIONS,
    RunSpec,
    check_run_name,
    encode_record,
    is_run_name,
    read_record,
)
from millpond.store.objects import PARALLEL_REQUESTS, Storage, check_once, open_storage
from millpond.store.posix import LocalStorage
from millpond.store.reads import ReadSpec

if TYPE_CHECKING:
    import xarray as xr

    from millpond.store.collect import Collected
    from millpond.store.run import Run

log = logging.getLogger(__name__)

_MARKER = "millpond.json"
_NAMED = 20
"""Runs that an error lists."""


def open_lake(url: str | os.PathLike[str], *, create: bool = False, **storage_options: Any) -> Lake:
    """Open the lake at `url`: a folder, `file://`, `s3://bucket/prefix` or `memory://name`.

    Args:
        url: where its objects are.
        create: make the lake if nothing is there.
        storage_options: for S3, as s3fs takes them (`key`, `secret`, `endpoint_url`, `profile`, ...); by default
            the environment (AWS_*) and the files in ~/.aws decide.

    Raises:
        InvalidInput: there is no lake, or it cannot be made.
    """
    storage = open_storage(url, **storage_options)
    text = os.fspath(url)
    try:
        try:
            _check_marker(storage)
        except FileNotFoundError:
            if not create:
                raise InvalidInput(
                    f"{text!r} is not a lake (it has no {_MARKER}); capture into it first or check the path"
                ) from None
            if any(True for _ in storage.list()):
                raise InvalidInput(f"{text!r} is neither a lake nor empty; name an empty or new folder") from None
            storage.create(_MARKER, encode_document({"format": "millpond-lake", "version": FORMAT_VERSION}))
            _check_marker(storage)
    except StorageFailed as error:
        raise InvalidInput(f"lake {text!r} cannot be used: {error}; name a place that you may write") from error
    return Lake(storage)


def _check_marker(storage: Storage) -> None:
    found = decode_document(storage.get(_MARKER), f"{storage.url}/{_MARKER}")
    if found.get("format") != "millpond-lake" or found.get("version") not in READ_VERSIONS:
        raise InvalidInput(
            f"{storage.url}/{_MARKER} says format {found.get('format')!r} version {found.get('version')!r}; "
            f"this Millpond reads 'millpond-lake' versions 1 to {FORMAT_VERSION}: upgrade Millpond"
        )


class Lake(Mapping[str, "Run"]):
    """The runs at one URL: `lake["name"]` opens one."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def url(self) -> str:
        """Where the lake is: a path, or a URL."""
        return self.storage.url

    @property
    def folder(self) -> Path:
        """The lake's folder.

        Raises:
            InvalidInput: the lake is not on a local disk.
        """
        if not isinstance(self.storage, LocalStorage):
            raise InvalidInput(f"lake {self.url!r} is not in a local folder; use its storage")
        return self.storage.path

    def runs(self) -> list[str]:
        """The names of all runs, open and sealed."""
        deleted = {entry.path.rpartition("/")[2].removesuffix(".json") for entry in self.storage.list("deleted")}
        names = [name for name in self.storage.folders("runs") if name not in deleted]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            held = list(pool.map(lambda name: self.storage.exists(f"runs/{name}/run.json"), names))
        return [name for name, there in zip(names, held, strict=True) if there]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs())

    def __len__(self) -> int:
        return len(self.runs())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._holds(name)

    def __getitem__(self, name: str) -> Run:
        from millpond.store.run import open_run

        self._check_held(name)
        return open_run(self.run_storage(name), lake=self)

    def _check_held(self, name: str) -> None:
        if not self._holds(name):
            held = self.runs()
            more = f" and {len(held) - _NAMED:,} more" if len(held) > _NAMED else ""
            raise RunNotFound(
                f"run {name!r} is not in the lake {self.url!r}, which holds {', '.join(held[:_NAMED]) or 'no runs'}{more}; "
                "name one of its runs or capture into a new one"
            )

    def _holds(self, name: str) -> bool:
        return (
            is_run_name(name)
            and self.storage.exists(f"runs/{name}/run.json")
            and not self.storage.exists(f"deleted/{name}.json")
        )

    def spec(self, name: str) -> RunSpec:
        """What was fixed when the run called `name` was created; opens nothing else of it.

        Raises:
            RunNotFound: the lake has no run of that name.
        """
        self._check_held(name)
        return read_record(self.run_storage(name), "run.json", RunSpec)

    def run_storage(self, name: str) -> Storage:
        """The objects of the run called `name`, whether or not it exists."""
        return self.storage / f"runs/{check_run_name(name)}"

    def run_folder(self, name: str) -> Path:
        """The folder of the run called `name`, whether or not it exists.

        Raises:
            InvalidInput: the lake is not on a local disk.
        """
        return self.folder / "runs" / check_run_name(name)

    def check_new(self, name: str) -> None:
        """Check that a run called `name` could be created.

        Raises:
            RunExists: the lake has one, or one that was deleted and can still be restored.
            InvalidInput: the name is not allowed, or the lake cannot be written.
            UnsafeStore: the store cannot keep writers apart.
        """
        run = self.run_storage(name)
        if self.storage.exists(f"deleted/{name}.json"):
            raise RunExists(
                f"run {name!r} was deleted from the lake {self.url!r} and waits for its grace period to end; choose another "
                f"name, or end it with: millpond rm {self.url} {name} --grace 0"
            )
        if run.exists("run.json"):
            raise RunExists(
                f"run {name!r} exists in the lake {self.url!r}; choose another name, "
                f"or remove it with: millpond rm {self.url} {name}"
            )
        try:
            check_once(self.storage)
        except StorageFailed as error:
            raise InvalidInput(
                f"lake {self.url!r} cannot be written: {error}; name a place that you may write"
            ) from error

    def create_run(
        self,
        name: str,
        *,
        hooks: tuple[str, ...],
        d_model: int,
        dtype: str,
        provenance: Mapping[str, Any] | None = None,
        chunk_rows: int = 512,
        shard_rows: int = 32_768,
        codec: str = "none",
        reads: Sequence[ReadSpec] = (),
        filling: bool = False,
    ) -> RunSpec:
        """Create an open, empty run of `hooks`, of `reads` or of both.

        `codec` compresses the activations: `none` (a local disk is faster than any codec), `lz4` (for ingest over a
        network) or `zstd` (for archives). A run that the caller is `filling` by itself takes no rows of writers.

        Raises:
            RunExists: the lake has a run of that name.
            InvalidInput: an argument cannot be used.
        """
        self.check_new(name)
        if not hooks and not reads:
            raise InvalidInput("hooks is empty; name at least one hook point, or something to read")
        names = [read.name for read in reads]
        if len(set(names)) < len(names):
            raise InvalidInput(f"reads have the names {', '.join(names)}; give each its own")
        for field, value in {"d_model": d_model, "chunk_rows": chunk_rows, "shard_rows": shard_rows}.items():
            if value < 1:
                raise InvalidInput(f"{field} is {value}; give 1 or more")
        if shard_rows % chunk_rows:
            raise InvalidInput(f"shard_rows {shard_rows} is not a multiple of chunk_rows {chunk_rows}")
        spec = RunSpec.model_validate(
            {
                "id": uuid.uuid4().hex,
                "name": name,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "hooks": tuple(sorted({str(parse_hook(hook)) for hook in hooks}, key=hook_sort_key)),
                "d_model": d_model,
                "dtype": check_dtype(dtype),
                "chunk_rows": chunk_rows,
                "shard_rows": shard_rows,
                "codec": check_codec(codec),
                "provenance": dict(provenance or {}),
                "reads": tuple(reads),
            }
        )
        try:
            document = encode_record(spec)
        except (ValueError, PydanticSerializationError) as error:
            raise InvalidInput(f"provenance of run {name!r} cannot be written as JSON: {error}") from error
        run = self.run_storage(name)
        closed = close_run(run, FILLING) if filling else None
        if not run.create("run.json", document):
            if closed is not None:
                run.delete(closed)
            raise RunExists(f"run {name!r} was just created by somebody else in {self.url!r}; choose another name")
        log.info("created", extra={"run": name, "hooks": len(spec.hooks), "d_model": d_model})
        return spec

    def retain(self, name: str, consumed_by: Sequence[str] | None, *, grace_s: float = GRACE_SECONDS) -> None:
        """Say which rows of an open run need not be kept: those that were used, or none.

        Args:
            name: the run's.
            consumed_by: names under which the run is followed (`Run.follow`); the rows that all of them have used are
                dropped, by the followers and by `collect`. None keeps all rows that are left.
            grace_s: how long those who opened the run before may go on reading dropped rows.

        Raises:
            InvalidInput: the run is sealed, or an argument cannot be used.
        """
        from millpond.store.retention import Retention, write_retention

        if consumed_by is None:
            write_retention(self.run_storage(name), None)
            return
        check_open(self.run_storage(name), self.spec(name))
        try:
            retention = Retention(consumed_by=tuple(consumed_by), grace_s=grace_s)
        except ValidationError as error:
            raise InvalidInput(f"retention of run {name!r}: {first_problem(error)}") from error
        write_retention(self.run_storage(name), retention)

    def delete(self, name: str, *, grace_s: float = 0) -> None:
        """Hide a run from everybody who opens it later, and remove it at once, or leave that to `collect`.

        With a grace period, those who have it open go on reading, and `restore` brings it back.

        Args:
            name: the run's.
            grace_s: 0 removes its objects now, also of a run that was deleted before and waits; otherwise `collect` does,
                when so many seconds have passed.
        """
        if grace_s <= 0 and is_run_name(name) and self.storage.exists(f"deleted/{name}.json"):
            self._remove(name)
            return
        self._check_held(name)
        close_run(self.run_storage(name), "deleted")
        # an empty document takes no room: a full disk must not keep what is to be removed
        self.storage.put(f"deleted/{name}.json", encode_document({"grace_s": grace_s}) if grace_s > 0 else b"")
        log.info("deleted", extra={"run": name, "grace_s": grace_s})
        if grace_s <= 0:
            self._remove(name)

    def restore(self, name: str) -> None:
        """Bring back a run that was deleted with a grace period.

        Raises:
            RunNotFound: there is no such run any more.
        """
        check_run_name(name)
        if not self.storage.exists(f"deleted/{name}.json") or not self.storage.exists(f"runs/{name}/run.json"):
            raise RunNotFound(
                f"run {name!r} of the lake {self.url!r} cannot be restored; it was not deleted, or is gone"
            )
        reopen_run(self.run_storage(name), "deleted")
        self.storage.delete(f"deleted/{name}.json")
        log.info("restored", extra={"run": name})

    def collect(self, *, grace_s: float = GRACE_SECONDS, dry_run: bool = False) -> dict[str, Collected]:
        """Collect the garbage of every run, and remove deleted runs whose own grace period has passed.

        Returns what was removed, or would be, by the name of the run. A run that cannot be read is left as it is, and
        its `problem` says why: it must not keep the others' garbage.
        """
        from millpond.store.collect import Collected, collect_run

        found = {}
        for name in self.runs():
            try:
                found[name] = collect_run(self.run_storage(name), grace_s=grace_s, dry_run=dry_run)
            except LakeCorrupt as error:
                found[name] = Collected(problem=error)
        for entry in list(self.storage.list("deleted")):
            name = entry.path.rpartition("/")[2].removesuffix(".json")
            document = self.storage.get(entry.path)
            wanted = decode_document(document, f"{self.url}/{entry.path}")["grace_s"] if document else 0
            if entry.modified <= self.storage.now() - min(wanted, grace_s):
                left = list(self.storage.list(f"runs/{name}"))
                found[name] = Collected([f"runs/{name}"], sum(one.size for one in left))
                if not dry_run:
                    self._remove(name)
        return found

    def _remove(self, name: str) -> None:
        """The last step is the one that frees the name, so an interrupted removal is done again by `collect`."""
        self.storage.delete_tree(f"runs/{name}")
        self.storage.delete(f"deleted/{name}.json")
        log.info("removed", extra={"run": name})

    def to_datatree(self, runs: Iterable[str] | None = None) -> xr.DataTree:
        """Runs as the branches of a tree of lazy Datasets (`Run.to_xarray`), by default all."""
        import xarray as xr

        return xr.DataTree.from_dict({name: self[name].to_xarray() for name in (self.runs() if runs is None else runs)})

    def __repr__(self) -> str:
        runs = self.runs()
        more = ", ..." if len(runs) > _NAMED else ""
        named = f": {', '.join(runs[:_NAMED])}{more}" if runs else ""
        return f"<Lake {self.url!r}, {len(runs)} {'run' if len(runs) == 1 else 'runs'}{named}>"

    def _repr_html_(self) -> str:
        from millpond.store.reprs import lake_html

        return lake_html(self)
