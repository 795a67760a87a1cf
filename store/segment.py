"""Writing a run: whole requests go into segments, and a commit makes a segment visible at once."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.files import locked, remove_tree, sync_folder, write_json
from millpond.store.manifest import ArrayChecksums, Part, RunSpec
from millpond.store.prompts import write_prompt_table
from millpond.store.shards import ArrayWriter, write_group


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


class SegmentWriter:
    """One segment being filled by one writer; nothing of it is visible before `commit`."""

    def __init__(self, run_folder: Path, spec: RunSpec) -> None:
        self.run_folder = run_folder
        self.spec = spec
        self.id = uuid.uuid4().hex
        self.folder = run_folder / "segments" / self.id
        if (run_folder / "manifest.json").exists():
            raise InvalidInput(f"run {spec.name!r} is sealed and cannot grow; capture into a new run")
        self.folder.parent.mkdir(exist_ok=True)
        self.folder.mkdir()
        self.rows = 0
        self._failed = False
        self._prompts: list[dict[str, Any]] = []
        self._arrays = {
            name: ArrayWriter(self.folder / name, array, array_attributes(spec, name))
            for name, array in spec.arrays().items()
        }

    def append(self, request: CapturedRequest) -> None:
        """Add all rows of one request.

        Raises:
            InvalidInput: the request does not hold what the run needs; nothing was added.
            CaptureFailed: a write into this segment failed before.
        """
        self._check(request)
        index = {
            "prompt": np.full(len(request.positions), len(self._prompts), np.int32),
            "position": request.positions.astype(np.int32),
            "token_id": request.token_ids[request.positions].astype(np.int32),
        }
        with self._or_failed():
            for name, writer in self._arrays.items():
                writer.append(index[name] if name in index else request.activations[name])
        self.rows += len(request.positions)
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
        arrays = {name: ArrayChecksums.of(writer.finish()) for name, writer in self._arrays.items()}
        prompt_table = write_prompt_table(self.folder, pd.DataFrame(self._prompts))
        write_group(self.folder, arrays, {"millpond:run": self.spec.name})
        sync_folder(self.folder.parent)
        part = Part(
            path=f"segments/{self.id}",
            rows=self.rows,
            prompts=len(self._prompts),
            arrays=arrays,
            prompt_table=prompt_table,
        )
        commits = self.run_folder / "commits"
        with locked(self.run_folder / "run.json"):  # commits get their numbers one by one, and none while sealing
            if (self.run_folder / "manifest.json").exists():
                raise CaptureFailed(
                    f"run {self.spec.name!r} was sealed before {self.rows} rows were committed; capture them into a new run"
                )
            commits.mkdir(exist_ok=True)
            sync_folder(self.run_folder)
            number = len(list(commits.glob("[!.]*.json")))
            write_json(commits / f"{number:08d}-{self.id}.json", part.model_dump(mode="json"))
        return part

    def _check(self, request: CapturedRequest) -> None:
        what = f"request {request.id!r} of run {self.spec.name!r}"
        positions, tokens = request.positions, len(request.token_ids)
        if len(positions) and not (positions[0] >= 0 and positions[-1] < tokens and (np.diff(positions) > 0).all()):
            raise InvalidInput(f"{what} has positions {positions.tolist()}; they must ascend from 0 to below {tokens}")
        if set(request.activations) != set(self.spec.hooks):
            odd = sorted(set(request.activations) ^ set(self.spec.hooks))
            raise InvalidInput(f"{what} lacks or adds {', '.join(odd)}; give exactly the run's hooks")
        stored = self.spec.activation_array
        expected = (np.dtype(stored.dtype), (len(positions), self.spec.d_model))
        for hook, rows in request.activations.items():
            if (rows.dtype, rows.shape) != expected:
                raise InvalidInput(
                    f"{what} has {rows.dtype} rows of shape {rows.shape} for {hook}; give {expected[0]} of shape {expected[1]}"
                )

    @contextmanager
    def _or_failed(self) -> Iterator[None]:
        """Refuses to go on after a write that failed midway: the arrays no longer agree."""
        if self._failed:
            raise CaptureFailed(
                f"run {self.spec.name!r}: a write into this segment failed before; discard it and capture its requests again"
            )
        self._failed = True
        yield
        self._failed = False

    def discard(self) -> None:
        """Remove the segment; to be called instead of `commit`."""
        for writer in self._arrays.values():
            writer.close()
        remove_tree(self.folder)


class RunWriter:
    """Appends captured requests to an open run, committing a segment whenever it has `segment_rows` rows."""

    def __init__(self, run_folder: Path, spec: RunSpec, segment_rows: int | None = None) -> None:
        self.run_folder = run_folder
        self.spec = spec
        self.segment_rows = segment_rows or spec.shard_rows
        self.committed_rows = 0
        self.committed_prompts = 0
        self._segment: SegmentWriter | None = None

    def append(self, request: CapturedRequest) -> None:
        """Add one request; it is durable after the next commit."""
        if self._segment is None:
            self._segment = SegmentWriter(self.run_folder, self.spec)
        self._segment.append(request)
        if self._segment.rows >= self.segment_rows:
            self.commit()

    def commit(self) -> None:
        """Make everything appended so far visible and durable."""
        if self._segment is None:
            return
        part = self._segment.commit()
        self.committed_rows += part.rows
        self.committed_prompts += part.prompts
        self._segment = None

    def discard(self) -> None:
        """Drop what was appended since the last commit."""
        if self._segment is not None:
            self._segment.discard()
            self._segment = None


def array_attributes(spec: RunSpec, name: str) -> dict[str, Any]:
    """The Zarr attributes of the array `name` of a run."""
    if name not in spec.hooks:
        return {}
    from millpond.store.hooks import parse_hook

    return {
        "millpond:dtype": spec.dtype,
        "millpond:hook": name,
        "millpond:hidden_state": parse_hook(name).hidden_state,
    }
