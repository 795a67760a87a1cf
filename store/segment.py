"""Writing a run: whole requests go into segments, and a commit makes a segment visible at once."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.commits import check_open, check_wanted, commit, new_segment_id
from millpond.store.compaction import compact
from millpond.store.configuration import Allowance
from millpond.store.dtypes import decode
from millpond.store.errors import CaptureFailed, InvalidInput, MillpondError, StorageFailed
from millpond.store.lake import Lake
from millpond.store.manifest import ArrayChecksums, Part, RunSpec
from millpond.store.objects import PARALLEL_REQUESTS, Storage, as_storage, check_once
from millpond.store.packing import ShardPacker
from millpond.store.planes import Scratch
from millpond.store.prompts import write_prompt_table
from millpond.store.shards import ArrayWriter, write_group
from millpond.store.stats import HookStatistics, pack_statistics

log = logging.getLogger(__name__)

WRITER_SHARDS = 3
"""A writer holds at most as many bytes as so many shards of one hook have."""


@dataclass(frozen=True)
class CapturedRequest:
    """Every row that was asked of one request."""

    id: str
    """The prompt's id, unique within the run."""
    token_ids: NDArray[np.int32]
    """Prompt and generated tokens, (n_tokens,)."""
    n_prompt_tokens: int
    positions: NDArray[np.int32]
    """Token positions of the rows, ascending, (n_rows,)."""
    activations: dict[str, NDArray[Any]]
    """Hook to rows as stored (bfloat16 as uint16 bits), each (n_rows, d_model)."""
    reads: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Name of each array of the run's reads to its values, (n_rows,) or (n_rows, width)."""

    @property
    def nbytes(self) -> int:
        """Bytes of the activations and reads."""
        return sum(rows.nbytes for rows in (*self.activations.values(), *self.reads.values()))


class SegmentWriter:
    """One segment being filled by one writer; nothing of it is visible before `commit`."""

    def __init__(self, run: Storage, spec: RunSpec, *, nonfinite: str = "refuse", statistics: bool = True) -> None:
        check_open(run, spec)
        self.run = run
        self.spec = spec
        self.nonfinite = nonfinite
        self.id = new_segment_id()
        self.folder = run / f"segments/{self.id}"
        self.rows = 0
        self._failed = False
        hooks = spec.hooks if statistics and nonfinite == "refuse" else ()
        scratch = Scratch()
        self._statistics = {hook: HookStatistics(spec.d_model, int(self.id, 16), scratch) for hook in hooks}
        self._prompts: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        """Of the requests that were added."""
        arrays = spec.arrays()
        memory = WRITER_SHARDS * spec.activation_array.row_bytes * spec.shard_rows // len(arrays)
        self._arrays = {
            name: ArrayWriter(self.folder / name, array, array_attributes(spec, name), memory)
            for name, array in arrays.items()
        }

    def append(self, request: CapturedRequest) -> None:
        """Add all rows of one request.

        Raises:
            InvalidInput: the request does not hold what the run needs; nothing was added.
            CaptureFailed: a write into this segment failed before.
        """
        self.check(request)
        self.add(request)

    def add(self, request: CapturedRequest) -> None:
        """Add a request that `check` found good."""
        index = {
            "prompt": np.full(len(request.positions), len(self._prompts), np.int32),
            "position": request.positions.astype(np.int32),
            "token_id": request.token_ids[request.positions].astype(np.int32),
        }
        values = {**index, **request.activations, **request.reads}
        with self._or_failed():
            for name, writer in self._arrays.items():
                if name in self._statistics:  # first, while a core's cache takes the rows in
                    self._statistics[name].update(values[name])
                writer.append(values[name])
        self.rows += len(request.positions)
        self.ids.add(request.id)
        self._prompts.append(
            {
                "id": request.id,
                "sha256": hashlib.sha256(
                    request.token_ids[: request.n_prompt_tokens].astype("<i4").tobytes()
                ).hexdigest(),
                "n_prompt_tokens": request.n_prompt_tokens,
                "n_tokens": len(request.token_ids),
                "n_rows": len(request.positions),
            }
        )

    def commit(self) -> Part:
        """Make every row of the segment visible, durably and at once.

        Raises:
            CaptureFailed: a write into this segment failed before, or the run was sealed meanwhile.
        """
        with self._or_failed():
            return self._commit()

    def _commit(self) -> Part:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            finished = [(name, pool.submit(writer.finish)) for name, writer in self._arrays.items()]
            prompts = pool.submit(write_prompt_table, self.folder, pd.DataFrame(self._prompts))
            group = pool.submit(write_group, self.folder, self._metadata(), {"millpond:run": self.spec.name})
            statistics = write_statistics(self.folder, self._statistics)
            arrays = {name: ArrayChecksums.of(result.result()) for name, result in finished}
            group.result()
            part = Part(
                path=f"segments/{self.id}",
                rows=self.rows,
                prompts=len(self._prompts),
                arrays=arrays,
                prompt_table=prompts.result(),
                statistics=statistics,
            )
        commit(self.run, self.spec, self.id, part)
        return part

    def _metadata(self) -> dict[str, dict[str, Any]]:
        return {
            name: array.metadata(self.rows, array_attributes(self.spec, name))
            for name, array in self.spec.arrays().items()
        }

    def check(self, request: CapturedRequest) -> None:
        """Check that the segment can take a request.

        Raises:
            InvalidInput: it does not hold what the run needs.
            CaptureFailed: a write into this segment failed before.
        """
        self._refuse_failed()
        what = f"request {request.id!r} of run {self.spec.name!r}"
        positions, tokens = request.positions, len(request.token_ids)
        if len(positions) and not (positions[0] >= 0 and positions[-1] < tokens and (np.diff(positions) > 0).all()):
            raise InvalidInput(f"{what} has positions {positions.tolist()}; they must ascend from 0 to below {tokens}")
        if set(request.activations) != set(self.spec.hooks):
            odd = sorted(set(request.activations) ^ set(self.spec.hooks))
            raise InvalidInput(f"{what} lacks or adds {', '.join(odd)}; give exactly the run's hooks")
        arrays = self.spec.read_arrays()
        if set(request.reads) != set(arrays):
            odd = sorted(set(request.reads) ^ set(arrays))
            raise InvalidInput(f"{what} lacks or adds {', '.join(odd)}; give exactly the arrays of the run's reads")
        for name, array in arrays.items():
            given, wanted = request.reads[name], (len(positions), *(() if array.columns is None else (array.columns,)))
            if (given.dtype, given.shape) != (np.dtype(array.dtype), wanted):
                raise InvalidInput(
                    f"{what} has {given.dtype} values of shape {given.shape} for {name}; give {array.dtype} of shape {wanted}"
                )
        floats = [name for read in self.spec.reads for name in read.float_arrays]
        for name in floats if self.nonfinite == "refuse" else ():
            if not all_finite(request.reads[name]):
                raise InvalidInput(
                    f"{what} holds an infinity or NaN in {name}; use a data type of larger range, or nonfinite='allow' to "
                    "keep it"
                )
        stored = self.spec.activation_array
        expected = (np.dtype(stored.dtype), (len(positions), self.spec.d_model))
        if request.id in self.ids:
            raise InvalidInput(f"{what} was appended before; give each request an id of its own")
        if not request.id or any("\ud800" <= letter <= "\udfff" for letter in request.id):
            raise InvalidInput(f"{what} has an id that is empty, or holds half of a surrogate pair; give it another")
        for hook, rows in request.activations.items():
            if (rows.dtype, rows.shape) != expected:
                raise InvalidInput(
                    f"{what} has {rows.dtype} rows of shape {rows.shape} for {hook}; give {expected[0]} of shape {expected[1]}"
                )
            if self.nonfinite == "refuse" and not all_finite(rows):
                bad = ~np.isfinite(decode(rows, self.spec.dtype)).all(axis=1)
                raise InvalidInput(
                    f"{what} holds an infinity or NaN in {int(bad.sum())} rows of {hook}, first at position "
                    f"{int(positions[bad][0])}; use a data type of larger range, or nonfinite='allow' to keep them"
                )

    @contextmanager
    def _or_failed(self) -> Iterator[None]:
        """Refuses to go on after a write that failed midway: the arrays no longer agree."""
        self._refuse_failed()
        self._failed = True
        try:
            yield
        except StorageFailed as error:
            if error.errno is not None:  # of a disk: its folder may have been removed
                check_wanted(self.run, self.spec, self.id)
            raise
        self._failed = False

    def _refuse_failed(self) -> None:
        if self._failed:
            raise CaptureFailed(
                f"run {self.spec.name!r}: a write into this segment failed before; discard it and capture its requests again"
            )

    def discard(self) -> None:
        """Remove the segment; to be called instead of `commit`."""
        for writer in self._arrays.values():
            writer.close()
        self.run.delete_tree(f"segments/{self.id}")


class RunWriter:
    """Appends captured requests to an open run, committing a segment whenever it has `segment_rows` rows.

    Any number of writers, in any number of processes, may write to one run. A request whose id was committed
    before, by this writer or another, does not become visible a second time: the first one stays.
    Memory is at most that of `WRITER_SHARDS` shards of one hook, but 11 MiB a hook for S3.
    """

    def __init__(
        self,
        run: Storage | str | os.PathLike[str],
        spec: RunSpec,
        segment_rows: int | None = None,
        *,
        nonfinite: Literal["refuse", "allow"] = "refuse",
        statistics: bool = True,
        compact_every: int = 32,
    ) -> None:
        """Open a run for writing.

        Args:
            run: its folder or URL.
            spec: its specification, as `Lake.create_run` returned it or `run.spec` holds it.
            segment_rows: by default one shard.
            nonfinite: what to do about a request with an infinity or NaN.
            statistics: whether to gather them (never where infinities are allowed), which costs about 0.2 CPU seconds a GB of
                bfloat16 where numba is installed, and 1 elsewhere.
            compact_every: commits of this writer after which it folds the run's commits into a new manifest
                version, in the background; 0 leaves that to others.

        Raises:
            UnsafeStore: the store cannot keep writers apart.
        """
        if nonfinite not in ("refuse", "allow"):
            raise InvalidInput(f"nonfinite is {nonfinite!r}; give 'refuse' or 'allow'")
        self.run = as_storage(run)
        check_once(self.run)
        self.spec = spec
        self.segment_rows = segment_rows or spec.shard_rows
        whole = self.segment_rows % spec.shard_rows == 0
        self._allowance = Allowance(Lake(self.run.parent.parent), self.run.name)
        self._row_bytes = spec.row_bytes()
        self._packer = ShardPacker[CapturedRequest](self.segment_rows, spec.shard_rows // 4 if whole else 0)
        self.nonfinite = nonfinite
        self.statistics = statistics
        self.compact_every = compact_every
        self.committed_rows = 0
        self.committed_prompts = 0
        self.just_committed: set[str] = set()
        """Ids of the requests that the last `append` or `commit` committed, though it failed afterwards."""
        self._commits = 0
        self._segment: SegmentWriter | None = None
        self._compaction: threading.Thread | None = None

    def append(self, request: CapturedRequest) -> None:
        """Add one request; it is durable after the next `commit`, or earlier.

        Whenever a segment is full it is committed; requests that wait to fill the next one exactly are not in it.

        Raises:
            InvalidInput: the request does not hold what the run needs, or its id was appended before.
            QuotaExceeded: the lake's configuration does not allow it; nothing was added, and what was appended before
                can still be committed.
            CaptureFailed: a write failed; discard what was not committed and capture it again.
        """
        self.just_committed = set()
        opened = self._open_segment()
        opened.check(request)
        waiting = sum(rows for rows, _ in self._packer.waiting)
        rows = opened.rows + waiting + len(request.positions)
        self._allowance.check(rows * self._row_bytes, f"segments/{opened.id}")
        if any(request.id == held.id for _, held in self._packer.waiting):
            raise InvalidInput(
                f"request {request.id!r} of run {self.spec.name!r} was appended before; give it another id"
            )
        queue = [request]
        while queue:
            one = queue.pop(0)
            segment = self._open_segment()
            ready, full = self._packer.add(segment.rows, len(one.positions), one)
            for request in ready:
                segment.add(request)
            if full:
                queue = self._packer.flush() + queue
                self._commit_segment()

    def _open_segment(self) -> SegmentWriter:
        if self._segment is None:
            self._segment = SegmentWriter(self.run, self.spec, nonfinite=self.nonfinite, statistics=self.statistics)
        return self._segment

    def commit(self) -> None:
        """Make everything appended so far visible and durable."""
        self.just_committed = set()
        if self._segment is None:
            return
        for request in self._packer.flush():
            self._segment.add(request)
        self._commit_segment()

    def _commit_segment(self) -> None:
        assert self._segment is not None
        part = self._segment.commit()
        self._allowance.add(sum(size for array in part.arrays.values() for size, _ in array.shards))
        self.committed_rows += part.rows
        self.committed_prompts += part.prompts
        self.just_committed |= self._segment.ids
        self._segment = None
        self._commits += 1
        if self.compact_every and self._commits % self.compact_every == 0:
            self._compact()

    def _compact(self) -> None:
        if self._compaction is None or not self._compaction.is_alive():
            self._compaction = threading.Thread(target=_compact, args=(self.run,), name="millpond-compact", daemon=True)
            self._compaction.start()

    def discard(self) -> None:
        """Drop what was appended since the last commit."""
        self._packer.flush()
        if self._segment is not None:
            self._segment.discard()
            self._segment = None


def _compact(run: Storage) -> None:
    try:
        compact(run)
    except MillpondError as error:  # every commit stands without it, and the next compaction tries again
        log.warning("run %s was not compacted: %s", run.name, error)


def write_statistics(folder: Storage, statistics: Mapping[str, HookStatistics]) -> tuple[int, int] | None:
    """Write `statistics.safetensors` into `folder`, if there are any; returns its size in bytes and its crc32c."""
    if not statistics:
        return None
    data = pack_statistics(statistics)
    folder.put("statistics.safetensors", data)
    return len(data), int(google_crc32c.value(data))


_LARGEST_FINITE = {
    np.dtype("uint16"): ("<i2", "<u2", 0x7F7F, 0xFF7F),
    np.dtype("float16"): ("<i2", "<u2", 0x7BFF, 0xFBFF),
    np.dtype("float32"): ("<i4", "<u4", 0x7F7FFFFF, 0xFF7FFFFF),
}


def all_finite(rows: NDArray[Any]) -> bool:
    """Whether stored activations hold no infinity and no NaN (bfloat16 as its bits).

    As signed integers the bits of positive values ascend up to infinity and NaN; as unsigned ones those of
    negative values do. So two maxima decide, without a copy.
    """
    signed, unsigned, positive, negative = _LARGEST_FINITE[rows.dtype]
    return not rows.size or bool(rows.view(signed).max() <= positive and rows.view(unsigned).max() <= negative)


def array_attributes(spec: RunSpec, name: str) -> dict[str, Any]:
    """The Zarr attributes of the array `name` of a run."""
    for read in spec.reads:
        if name in read.arrays(spec.dtype, spec.chunk_rows, spec.shard_rows):
            return read.attributes(name, spec.dtype)
    if name not in spec.hooks:
        return {}
    from millpond.store.hooks import parse_hook

    return {
        "millpond:dtype": spec.dtype,
        "millpond:hook": name,
        "millpond:hidden_state": parse_hook(name).hidden_state,
    }
