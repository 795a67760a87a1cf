"""Proof that a run is whole: counts, checksums, finiteness."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from millpond.store.dtypes import decode
from millpond.store.files import read_json
from millpond.store.manifest import Part
from millpond.store.rows import RowPlan
from millpond.store.run import Run
from millpond.store.shards import ArraySpec, file_crc32c, read_rows


@dataclass
class Verification:
    """What `verify_run` found."""

    run: str
    rows: int = 0
    prompts: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """One line each; empty when the run is whole."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_run(run: Run, *, progress: bool = False) -> Verification:
    """Check every byte of `run` against its manifest, its counts against each other, and every value for finiteness."""
    found = Verification(run.name, run.n_rows, len(run.prompts))
    plan = run.plan
    arrays = [(part, name) for part in plan.parts for name in part.arrays]
    labels = [] if run.manifest is None else run.labels.token_labels
    for part, name in tqdm(arrays, desc=f"verify {run.name}", unit="array", disable=not progress):
        record = part.arrays[name]
        _check_shards(found, plan.folder / part.path / name, plan.spec.arrays()[name], record.rows, record.shards)
        if record.rows != part.rows:
            found.problems.append(f"{part.path}/{name}: {record.rows} rows, but its part has {part.rows}")
    for part in plan.parts:
        _check_prompt_table(found, plan.folder / part.path / "prompts.parquet", part)
    for name in labels:
        folder = plan.folder / "labels" / name / "1"
        record = read_json(folder / "label.json")
        shards = tuple((int(size), int(crc)) for size, crc in record["shards"])
        _check_shards(found, folder, plan.spec.row_array(record["dtype"]), record["rows"], shards)
        if record["rows"] != run.n_rows:
            found.problems.append(f"labels/{name}: {record['rows']} values, but the run has {run.n_rows} rows")
    if not found.problems:
        _check_rows(found, run)
    if run.manifest is not None and run.manifest.counts.get("rows_asked", run.n_rows) != run.n_rows:
        found.problems.append(
            f"manifest: {run.manifest.counts['rows_asked']} rows were asked for, {run.n_rows} are stored"
        )
    return found


def _check_shards(
    found: Verification, folder: Path, spec: ArraySpec, rows: int, shards: tuple[tuple[int, int], ...]
) -> None:
    if len(shards) != -(-rows // spec.shard_rows):
        found.problems.append(
            f"{folder.name}: {len(shards)} shards recorded for {rows} rows of {spec.shard_rows} a shard"
        )
    try:
        metadata = read_json(folder / "zarr.json")
        if metadata["shape"][0] != rows:
            found.problems.append(f"{folder.name}: zarr.json says {metadata['shape'][0]} rows, the manifest {rows}")
    except FileNotFoundError:
        found.problems.append(f"{folder / 'zarr.json'} is missing")
    for number, (size, crc) in enumerate(shards):
        path = spec.shard_path(folder, number)
        _check_file(found, path, size, crc)


def _check_file(found: Verification, path: Path, size: int, crc: int) -> None:
    found.files += 1
    found.bytes += size
    if not path.is_file():
        found.problems.append(f"{path} is missing")
    elif path.stat().st_size != size:
        found.problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {size}")
    elif file_crc32c(path) != crc:
        found.problems.append(f"{path} does not have the checksum of the manifest")


def _check_prompt_table(found: Verification, path: Path, part: Part) -> None:
    _check_file(found, path, *part.prompt_table)


def _check_rows(found: Verification, run: Run) -> None:
    """Positions, tokens and values of whole prompts; needs readable arrays."""
    plan = run.plan
    ids = run.prompts["id"]
    if ids.duplicated().any():
        found.problems.append(f"prompt {ids[ids.duplicated()].iloc[0]!r} is stored more than once")
    previous = (-1, -1)
    for block in plan.blocks():
        prompt = _stored_prompts(plan, block)
        if not np.array_equal(prompt, plan.prompt_numbers(block)):
            found.problems.append(f"rows {block.first}..: the stored prompt numbers are not those of the prompt table")
        position = plan.read("position", block)
        before = np.concatenate([[previous[1]], position[:-1]])
        same = np.concatenate([[previous[0]], prompt[:-1]]) == prompt
        if (position[same] <= before[same]).any():
            found.problems.append(f"rows {block.first}..: positions of a prompt do not ascend")
        tokens = run.prompts["n_tokens"].to_numpy()[prompt]
        if ((position < 0) | (position >= tokens)).any():
            found.problems.append(f"rows {block.first}..: a position lies outside its prompt")
        for hook in run.hooks:
            folder = plan.folder / plan.parts[block.part].path / hook
            stored = read_rows(folder, plan.spec.activation_array, block.start, block.stop)
            bad = ~np.isfinite(decode(stored, run.dtype)).all(axis=1)
            if bad.any():
                row = block.first + int(np.flatnonzero(bad)[0])
                found.problems.append(f"{hook}: row {row} is not finite ({int(bad.sum())} such rows in its block)")
        previous = (int(prompt[-1]), int(position[-1]))


def _stored_prompts(plan: RowPlan, block: Any) -> NDArray[np.int64]:
    """Prompt numbers of a block as stored, counted in the whole run."""
    part = plan.parts[block.part]
    before = sum(earlier.prompts for earlier in plan.parts[: block.part])
    stored = read_rows(plan.folder / part.path / "prompt", plan.spec.row_array("int32"), block.start, block.stop)
    return stored.astype(np.int64) + before
