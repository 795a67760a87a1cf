"""What a run holds at one moment: its visible parts, as columns, and its prompts, read when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import LakeCorrupt
from millpond.store.manifest import Manifest, Part, RunSpec, decode_record, read_record
from millpond.store.objects import Storage
from millpond.store.prompts import COLUMNS, decode_prompt_table, read_prompt_table
from millpond.store.versions import (
    PageRecord,
    Segments,
    VersionRecord,
    latest_version,
    page_columns,
    prompt_keys,
    read_page_file,
    read_version,
)

_Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Stored:
    """Rows that became visible together, as readers need them."""

    path: str
    """Folder below the run's."""
    rows: int
    prompts: int


class Parts(Sequence[Stored]):
    """The parts of a run, kept as columns: a run may have very many."""

    def __init__(self, paths: NDArray[np.str_], rows: NDArray[np.int64], prompts: NDArray[np.int64]) -> None:
        self.paths = paths
        self.rows = rows
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Stored:  # type: ignore[override]
        return Stored(str(self.paths[number]), int(self.rows[number]), int(self.prompts[number]))

    def __iter__(self) -> Iterator[Stored]:
        for path, rows, prompts in zip(self.paths.tolist(), self.rows.tolist(), self.prompts.tolist(), strict=True):
            yield Stored(path, rows, prompts)

    @classmethod
    def of(cls, parts: Sequence[Part | Stored]) -> Parts:
        """The columns of some parts."""
        return cls(
            np.array([part.path for part in parts], np.str_),
            np.array([part.rows for part in parts], np.int64),
            np.array([part.prompts for part in parts], np.int64),
        )


@dataclass(frozen=True)
class Tail:
    """Commits that no version holds yet, in order, with their prompts."""

    parts: tuple[Part, ...]
    prompts: pd.DataFrame
    """Of all of them, with the boolean `visible`."""


class Snapshot:
    """A run at one moment; nothing that happens later changes what it says.

    Its files stay readable for the grace period of garbage collection after they were superseded.
    """

    def __init__(
        self, run: Storage, spec: RunSpec, version: VersionRecord, tail: Tail, manifest: Manifest | None = None
    ) -> None:
        self.run = run
        self.spec = spec
        self.version = version
        """Of an open run; number 0 before the first compaction, and for a sealed run."""
        self.tail = tail
        self.manifest = manifest
        self._files: dict[tuple[str, str], bytes] = {}
        self.parts, dropped, counts = self._columns()
        self.dropped_parts = dropped
        """Which parts retention took away; they still count in the numbers of rows and prompts."""
        self.n_rows = np.concatenate([count[0] for count in counts]) if counts else np.empty(0, np.int64)
        """Rows of each prompt, as they were committed."""
        self.visible = np.concatenate([count[1] for count in counts]) if counts else np.empty(0, bool)
        """Which prompts are; the others were committed a second time, or dropped."""
        self.dropped = np.concatenate([count[2] for count in counts]) if counts else np.empty(0, bool)
        """Which prompts were visible until retention took their rows away; their ids stay taken."""
        if (int(self.parts.rows.sum()), int(self.parts.prompts.sum())) != (int(self.n_rows.sum()), len(self.n_rows)):
            raise LakeCorrupt(
                f"run {spec.name!r}: the prompt tables count {len(self.n_rows)} prompts and {int(self.n_rows.sum())} rows, "
                f"their commits {int(self.parts.prompts.sum())} and {int(self.parts.rows.sum())}; "
                "restore them or delete the run"
            )

    def _page(self, page: PageRecord, suffix: str) -> bytes:
        if (page.path, suffix) not in self._files:
            self._files[page.path, suffix] = read_page_file(self.run, page, suffix)
        return self._files[page.path, suffix]

    def _columns(self) -> tuple[Parts, _Marks, list[tuple[NDArray[np.int64], _Marks, _Marks]]]:
        if self.manifest is not None:
            table = self._sealed_prompts
            all_of = np.ones(len(table), bool)
            return (
                Parts.of([self.manifest.data]),
                np.zeros(1, bool),
                [(table["n_rows"].to_numpy(np.int64), all_of, ~all_of)],
            )
        paths, rows, prompts, dropped, counts = [], [], [], [], []
        for page in self.version.pages:
            table = page_columns(self._page(page, ".segments.parquet"), ["id", "rows", "prompts", "dropped"])
            ids = table["id"].to_numpy().astype(np.str_)
            paths.append(np.char.add("segments/", ids))
            rows.append(table["rows"].to_numpy())
            prompts.append(table["prompts"].to_numpy())
            dropped.append(table["dropped"].to_numpy().astype(bool))
            prompt = page_columns(self._page(page, ".prompts.parquet"), ["n_rows", "visible", "dropped"])
            visible, gone = (prompt[name].to_numpy().astype(bool) for name in ("visible", "dropped"))
            counts.append((prompt["n_rows"].to_numpy(), visible, gone))
        tail = Parts.of(self.tail.parts)
        if len(tail):
            table = self.tail.prompts
            counts.append(
                (table["n_rows"].to_numpy(np.int64), table["visible"].to_numpy(bool), np.zeros(len(table), bool))
            )
        columns = [[*paths, tail.paths], [*rows, tail.rows], [*prompts, tail.prompts]]
        marks = np.concatenate([*dropped, np.zeros(len(tail), bool)])
        return Parts(*(np.concatenate(column) for column in columns)), marks, counts

    @cached_property
    def _sealed_prompts(self) -> pd.DataFrame:
        assert self.manifest is not None
        return read_prompt_table(self.run / self.manifest.data.path)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a committed prompt, also those that are not visible; the index is its number."""
        if self.manifest is not None:
            return self._sealed_prompts
        pages = [
            page_columns(self._page(page, ".prompts.parquet"), list(COLUMNS)).to_pandas() for page in self.version.pages
        ]
        tables = [*pages, *([self.tail.prompts[list(COLUMNS)]] if len(self.tail.parts) else [])]
        if not tables:
            return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in COLUMNS.items()})
        whole: pd.DataFrame = pd.concat(tables, ignore_index=True)
        return whole

    def records(self) -> Iterator[Part]:
        """Every part with its checksums, also those that were dropped."""
        if self.manifest is not None:
            yield self.manifest.data
            return
        for page in self.version.pages:
            segments = Segments(page_columns(self._page(page, ".segments.parquet")))
            yield from (segments.part(row) for row in range(len(segments)))
        yield from self.tail.parts


def load_snapshot(run: Storage, number: int | None = None, *, tail: bool = True) -> Snapshot:
    """The run in `run` as it is now, or its version `number`, which holds what was compacted until then.

    Without the `tail`, an open run's latest version alone.

    Raises:
        FileNotFoundError: there is no run, or no such version any more.
        LakeCorrupt: a document or table is damaged or missing.
    """
    spec = read_record(run, "run.json", RunSpec)
    if number is not None:
        return Snapshot(run, spec, read_version(run, number), _no_tail())
    manifest = _sealed(run, spec)
    if manifest is None:
        try:
            snapshot = _load_open(run, spec) if tail else Snapshot(run, spec, latest_version(run, spec.id), _no_tail())
        except (LakeCorrupt, FileNotFoundError):
            manifest = _sealed(run, spec)
            if manifest is None:
                raise
        else:
            manifest = _sealed(run, spec)
            if manifest is None:
                return snapshot
    # sealed: what an open run is read from may be collected at any time
    return Snapshot(run, spec, VersionRecord(run=spec.id, number=0), _no_tail(), manifest)


def _sealed(run: Storage, spec: RunSpec) -> Manifest | None:
    try:
        manifest = read_record(run, "manifest.json", Manifest)
    except FileNotFoundError:
        return None
    if manifest.run != spec:
        raise LakeCorrupt(f"run {spec.name!r}: run.json and manifest.json disagree; restore run.json or delete the run")
    return manifest


def _no_tail() -> Tail:
    return Tail((), pd.DataFrame())


def _load_open(run: Storage, spec: RunSpec) -> Snapshot:
    while True:
        # commits first, the version second: a commit that vanishes in between is in the version
        commits = sorted((entry for entry in run.list("commits") if entry.size), key=lambda entry: entry.path)
        snapshot = Snapshot(run, spec, latest_version(run, spec.id), _no_tail())
        held = held_ids(snapshot)
        parts = read_commits(run, [entry.path for entry in commits if commit_id(entry.path) not in held])
        if parts is None:
            continue  # one was compacted after the version had been read
        if not parts:
            return snapshot
        return Snapshot(run, spec, snapshot.version, fold(run, snapshot, parts))


def commit_id(path: str) -> str:
    """The segment that a commit record names; version 1 wrote a number in front of it."""
    return path.rpartition("/")[2].removesuffix(".json").rpartition("-")[2]


def held_ids(snapshot: Snapshot) -> set[str]:
    """The ids of all segments that a snapshot holds, or held before they were dropped."""
    return {path.rpartition("/")[2] for path in snapshot.parts.paths.tolist()}


def read_commits(run: Storage, paths: Sequence[str]) -> list[Part] | None:
    """Commit records; None if one of them is gone."""
    documents = run.get_many(paths)
    if any(document is None for document in documents):
        return None
    return [
        decode_record(document, Part, f"{run.url}/{path}")
        for document, path in zip(documents, paths, strict=True)
        if document
    ]


def fold(run: Storage, before: Snapshot, parts: Sequence[Part]) -> Tail:
    """Put `parts` after what `before` holds: a prompt that was there already is not visible a second time.

    Raises:
        LakeCorrupt: a segment's prompt table is missing or contradicts its commit.
    """
    tables = []
    names = [f"{part.path}/prompts.parquet" for part in parts]
    for part, name, data in zip(parts, names, run.get_many(names), strict=True):
        where = f"{run.url}/{name}"
        if data is None:
            raise LakeCorrupt(f"{where} is missing; restore it or delete the run")
        table = decode_prompt_table(data, where)
        if (len(table), int(table["n_rows"].sum())) != (part.prompts, part.rows):
            raise LakeCorrupt(
                f"run {before.spec.name!r}: the prompt table of {part.path} counts {len(table)} prompts and "
                f"{int(table['n_rows'].sum())} rows, its commit {part.prompts} and {part.rows}; restore it or delete the run"
            )
        tables.append(table[list(COLUMNS)])
    prompts = pd.concat(tables, ignore_index=True)
    return Tail(tuple(parts), prompts.assign(visible=~(prompts["id"].duplicated() | _seen(before, prompts["id"]))))


def _seen(before: Snapshot, ids: pd.Series[str]) -> NDArray[np.bool_]:
    """Which of `ids` are in the pages of `before`: looked up by hash, then by name."""
    keys = prompt_keys(ids)
    seen = np.zeros(len(ids), bool)
    for page in before.version.pages:
        known = np.frombuffer(before._page(page, ".keys"), "<u8")
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        hits = np.flatnonzero(known[place] == keys) if len(known) else np.empty(0, np.int64)
        if len(hits):
            names = page_columns(before._page(page, ".prompts.parquet"), ["id"])["id"]
            seen[hits] |= ids.iloc[hits].isin(set(names.to_pylist())).to_numpy()
    return seen
