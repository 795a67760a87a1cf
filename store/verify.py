"""Proof that a run is whole: counts, checksums, finiteness."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from millpond.store.commits import is_unfilled
from millpond.store.dtypes import decode
from millpond.store.errors import LakeCorrupt, StorageFailed
from millpond.store.files import decode_document
from millpond.store.label_files import LABEL_FILE, read_label, row_label_array
from millpond.store.manifest import Part
from millpond.store.objects import Storage
from millpond.store.reads import ReadSpec
from millpond.store.rows import Block, RowPlan
from millpond.store.run import Run, open_run
from millpond.store.segment import array_attributes
from millpond.store.shards import ArraySpec, group_metadata, object_crc32c, read_rows
from millpond.store.stats import unpack_statistics
from millpond.store.versions import page_columns, prompt_keys, read_page_file

log = logging.getLogger(__name__)


@dataclass
class Verification:
    """What `verify_run` found."""

    run: str
    rows: int = 0
    prompts: int = 0
    files: int = 0
    bytes: int = 0
    dropped_rows: int = 0
    """Taken away by retention: nothing of them is left but their prompts' ids."""
    problems: list[str] = field(default_factory=list)
    """One line each; empty when the run is whole."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_run(run: Run, *, progress: bool = False) -> Verification:
    """Check every byte of `run` against its manifest, its counts against each other, and every value for finiteness."""
    if run.plan.marks is not None or not run.plan.chosen.all():
        run = open_run(run.plan.folder)  # a view is verified with the whole run that it belongs to
    found = Verification(run.name, run.n_rows, len(run.prompts), dropped_rows=run.n_dropped_rows)
    plan = run.plan
    expected = plan.spec.arrays()
    dropped = run.snapshot.dropped_parts
    parts = [part for part, gone in zip(run.snapshot.records(), dropped, strict=True) if not gone]
    for part in tqdm(parts, desc=f"verify {run.name}", unit="part", disable=not progress):
        for name in sorted(set(part.arrays) ^ set(expected)):
            found.problems.append(f"{part.path}: {name} is not both an array of the run and recorded")
        for name in [name for name in part.arrays if name in expected]:
            record = part.arrays[name]
            folder, attributes = plan.folder / part.path / name, array_attributes(plan.spec, name)
            _check_array(found, folder, expected[name], record.rows, record.shards, attributes)
            if record.rows != part.rows:
                found.problems.append(f"{part.path}/{name}: {record.rows} rows, but its part has {part.rows}")
        _check_part(found, run, part)
    _check_tombstones(found, run)
    _check_labels(found, run)
    if is_unfilled(plan.folder):
        found.problems.append("a copy or an import that is being written, or was interrupted; it has no rows yet")
    if not found.problems:
        _check_rows(found, run)
    if run.manifest is not None:
        stored = {
            "rows": run.n_rows,
            "prompts": len(run.prompts),
            "rows_asked": run.n_rows + run.n_dropped_rows,
            "tokens": int(run.prompts["n_tokens"].sum()),
        }
        for name, count in run.manifest.counts.items():
            if count != stored.get(name, count):
                found.problems.append(f"manifest.json: {name} is {count}, but {stored[name]} are stored")
    level = logging.INFO if found.ok else logging.ERROR
    log.log(level, "verified", extra={"run": run.name, "rows": found.rows, "problems": len(found.problems)})
    return found


def _check_array(
    found: Verification,
    folder: Storage,
    spec: ArraySpec,
    rows: int,
    shards: tuple[tuple[int, int], ...],
    attributes: dict[str, Any],
) -> None:
    if len(shards) != spec.n_shards(rows):
        found.problems.append(
            f"{folder.name}: {len(shards)} shards recorded for {rows} rows of {spec.shard_rows} a shard"
        )
    _check_json(found, folder, "zarr.json", spec.metadata(rows, attributes))
    for number, (size, crc) in enumerate(shards):
        _check_object(found, folder, spec.shard_path(number), size, crc)


def _check_json(found: Verification, folder: Storage, path: str, expected: Any) -> None:
    found.files += 1
    where = f"{folder.url}/{path}"
    try:
        data = folder.get(path)
        found.bytes += len(data)
        if decode_document(data, where) != expected:
            found.problems.append(f"{where} is not what the manifest implies")
    except FileNotFoundError:
        found.problems.append(f"{where} is missing")
    except LakeCorrupt as error:
        found.problems.append(str(error))


def _check_object(found: Verification, folder: Storage, path: str, size: int, crc: int) -> None:
    found.files += 1
    found.bytes += size
    where = f"{folder.url}/{path}"
    try:
        stored = folder.head(path).size
        if stored != size:
            found.problems.append(f"{where} has {stored} bytes, the manifest says {size}")
        elif object_crc32c(folder, path) != (size, crc):
            found.problems.append(f"{where} does not have the checksum of the manifest")
    except FileNotFoundError:
        found.problems.append(f"{where} is missing")
    except StorageFailed as error:
        if error.errno is None:  # the whole store, not one file of a disk
            raise
        found.problems.append(str(error))


def _check_part(found: Verification, run: Run, part: Part) -> None:
    """The files of a part that belong to no array."""
    spec, folder = run.plan.spec, run.plan.folder / part.path
    _check_object(found, folder, "prompts.parquet", *part.prompt_table)
    if part.statistics is not None:
        _check_object(found, folder, "statistics.safetensors", *part.statistics)
        try:
            gathered = unpack_statistics(folder.get("statistics.safetensors"))
        except (FileNotFoundError, LakeCorrupt):
            return  # named above
        for hook, statistics in gathered.items():
            if statistics.count != part.rows:
                found.problems.append(f"{part.path}: statistics of {hook} count {statistics.count} of {part.rows} rows")
    arrays = {name: array.metadata(part.rows, array_attributes(spec, name)) for name, array in spec.arrays().items()}
    _check_json(found, folder, "zarr.json", group_metadata(arrays, {"millpond:run": spec.name}))


def _check_tombstones(found: Verification, run: Run) -> None:
    """That every id of an open run's pages is found by its hash, so that none becomes visible twice, nor again."""
    for page in run.snapshot.version.pages:
        found.files += len(page.files)
        found.bytes += sum(size for size, _ in page.files.values())
        data = {suffix: read_page_file(run.plan.folder, page, suffix) for suffix in page.files}
        prompts = page_columns(data[".prompts.parquet"]).to_pandas()
        keys = np.sort(prompt_keys(prompts["id"])).astype("<u8").tobytes()
        if keys != data[".keys"]:
            found.problems.append(f"{page.path}.keys does not have the keys of its prompts")
        segments = page_columns(data[".segments.parquet"])
        owner = np.repeat(segments["dropped"].to_numpy().astype(bool), segments["prompts"].to_numpy())
        if (prompts["visible"].to_numpy(bool) & owner).any() or (prompts["dropped"].to_numpy(bool) & ~owner).any():
            found.problems.append(f"{page.path}: its segments and its prompts disagree about what was dropped")


def _check_labels(found: Verification, run: Run) -> None:
    """Every version of every label that readers see."""
    plan = run.plan
    for entry in list(plan.folder.list("labels")):
        name, version, *rest = entry.path.split("/")[1:]
        if rest != [LABEL_FILE] or not version.isdigit():
            continue
        home = plan.folder / f"labels/{name}"
        try:
            label = read_label(home, version)
            if label.table is not None:
                _check_object(found, home, label.data, *label.table)
                continue
        except LakeCorrupt as error:
            found.problems.append(str(error))
            continue
        if run.manifest is None:
            continue  # of a sealing that was interrupted
        array, folder = plan.spec.row_array(label.dtype), row_label_array(home, version, label)
        _check_array(found, folder, array, label.rows, label.shards, {"millpond:label": name})
        if label.rows != run.n_rows:
            found.problems.append(f"labels/{name}: {label.rows} values, but the run has {run.n_rows} rows")


def _check_rows(found: Verification, run: Run) -> None:
    """Positions, tokens and values of whole prompts; needs readable arrays."""
    plan = run.plan
    expected = plan.spec.arrays()
    ids = run.prompts["id"]
    if ids.duplicated().any():
        found.problems.append(f"prompt {ids[ids.duplicated()].iloc[0]!r} is stored more than once")
    previous = (-1, -1)
    for block in plan.blocks():
        if run.snapshot.dropped_parts[block.part]:
            continue
        prompt = _stored_prompts(plan, block)
        numbers = plan.prompt_numbers(block).astype(np.int64)
        if not np.array_equal(prompt, numbers):
            prompt = numbers
            found.problems.append(f"rows {block.first}..: the stored prompt numbers are not those of the prompt table")
        folder = plan.folder / plan.parts[block.part].path
        position = read_rows(folder / "position", expected["position"], block.start, block.stop)
        before = np.concatenate([[previous[1]], position[:-1]])
        same = np.concatenate([[previous[0]], prompt[:-1]]) == prompt
        if (position[same] <= before[same]).any():
            found.problems.append(f"rows {block.first}..: positions of a prompt do not ascend")
        tokens = run.snapshot.prompts["n_tokens"].to_numpy()[prompt]
        if ((position < 0) | (position >= tokens)).any():
            found.problems.append(f"rows {block.first}..: a position lies outside its prompt")
        for hook in run.hooks:
            stored = read_rows(folder / hook, plan.spec.activation_array, block.start, block.stop)
            bad = ~np.isfinite(decode(stored, run.dtype)).all(axis=1)
            if bad.any():
                row = block.first + int(np.flatnonzero(bad)[0])
                found.problems.append(f"{hook}: row {row} is not finite ({int(bad.sum())} such rows in its block)")
        for read in plan.spec.reads:
            _check_read(found, plan, read, block)
        previous = (int(prompt[-1]), int(position[-1]))


def _check_read(found: Verification, plan: RowPlan, read: ReadSpec, block: Block) -> None:
    """Finite values, and indices of latents that the SAE has."""
    for name, array in read.arrays(plan.spec.dtype, plan.spec.chunk_rows, plan.spec.shard_rows).items():
        stored = read_rows(plan.folder / plan.parts[block.part].path / name, array, block.start, block.stop)
        if name in read.float_arrays:
            values = decode(stored, read.array_dtype(name, plan.spec.dtype) or array.dtype)
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                found.problems.append(f"{name}: row {block.first + int(np.flatnonzero(bad)[0])} is not finite")
        elif read.d_sae is not None and stored.size and int(stored.max()) >= read.d_sae + (array.columns is None):
            found.problems.append(f"{name}: {int(stored.max())} is beyond the SAE's {read.d_sae} latents")


def _stored_prompts(plan: RowPlan, block: Any) -> NDArray[np.int64]:
    """Prompt numbers of a block as stored, counted in the whole run."""
    part = plan.parts[block.part]
    before = int(plan.parts.prompts[: block.part].sum())
    stored = read_rows(plan.folder / part.path / "prompt", plan.spec.row_array("int32"), block.start, block.stop)
    return stored.astype(np.int64) + before
