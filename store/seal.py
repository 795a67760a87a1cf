"""Sealing: an open run's segments become one Zarr group that never changes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.files import locked, remove_tree, sync_folder, write_json
from millpond.store.labels import check_label_name, write_token_label
from millpond.store.manifest import ArrayChecksums, Manifest, Part
from millpond.store.prompts import COLUMNS, write_prompt_table
from millpond.store.rows import RowPlan
from millpond.store.run import Run, open_run
from millpond.store.segment import array_attributes
from millpond.store.shards import ArrayWriter, read_rows, write_group


def seal_run(
    folder: Path,
    *,
    prompts: pd.DataFrame | None = None,
    prompt_labels: tuple[str, ...] = (),
    token_labels: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    token_label_dtypes: Mapping[str, str] | None = None,
    expected_rows: int | None = None,
) -> Run:
    """Merge the committed segments of the open run in `folder` into one group and write its manifest.

    Readers see the run change from open to sealed at once, when the manifest appears; until then the
    segments stay, so an interrupted sealing is simply done again. Nothing can be committed meanwhile.
    Labels that were added to the open run are dropped.

    Args:
        folder: the run's.
        prompts: metadata and prompt labels, one row a prompt, found by its column `id`.
        prompt_labels: which of those columns are labels.
        token_labels: name to prompt id to one value a token.
        token_label_dtypes: stored data type of each token label.
        expected_rows: what the capture asked for.

    Raises:
        CaptureFailed: the rows are not as many as `expected_rows`, or a prompt was captured twice.
        InvalidInput: `prompts` or the labels do not fit the captured prompts, or the run is sealed without these labels.
    """
    with locked(folder / "run.json"):
        _seal(folder, prompts, prompt_labels, token_labels or {}, token_label_dtypes or {}, expected_rows)
        remove_tree(folder / "segments")
        remove_tree(folder / "commits")
    return open_run(folder)


def _seal(
    folder: Path,
    prompts: pd.DataFrame | None,
    prompt_labels: tuple[str, ...],
    token_labels: Mapping[str, Mapping[str, NDArray[Any]]],
    token_label_dtypes: Mapping[str, str],
    expected_rows: int | None,
) -> None:
    run = open_run(folder)
    if expected_rows is not None and run.n_rows != expected_rows:
        raise CaptureFailed(f"run {run.name!r} holds {run.n_rows} rows, but {expected_rows} were asked for")
    if run.manifest is not None:
        unknown = [name for name in (*prompt_labels, *token_labels) if name not in run.labels]
        if unknown:
            raise InvalidInput(f"run {run.name!r} is sealed without the label {unknown[0]!r}; add it to the sealed run")
        return
    twice = run.prompts["id"].duplicated()
    if twice.any():
        raise CaptureFailed(
            f"run {run.name!r} holds prompt {run.prompts['id'][twice].iloc[0]!r} more than once; delete it and capture again"
        )
    table = _with_metadata(run.prompts, prompts)
    _check_labels(table, prompt_labels, token_labels, token_label_dtypes)
    remove_leftovers(folder)
    data_folder = folder / f"data-{uuid.uuid4().hex}"
    part = _merge(run.plan, data_folder, table)
    plan = RowPlan(folder, run.plan.spec, (part,), run.plan.offsets, run.plan.chosen)
    for name, values in token_labels.items():
        by_number = {number: values[str(prompt_id)] for number, prompt_id in enumerate(table["id"])}
        write_token_label(plan, name, by_number, token_label_dtypes[name])
    manifest = Manifest(
        run=run.plan.spec,
        sealed=datetime.now(UTC).isoformat(timespec="seconds"),
        data=part,
        prompt_labels=prompt_labels,
        counts={
            "rows": part.rows,
            "prompts": part.prompts,
            "rows_asked": part.rows if expected_rows is None else expected_rows,
            "tokens": int(table["n_tokens"].sum()),
        },
    )
    sync_folder(folder)
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted sealing of the open run in `folder` left; nothing of it was ever visible."""
    for data in folder.glob("data-*"):
        remove_tree(data)
    remove_tree(folder / "labels")


def _with_metadata(table: pd.DataFrame, metadata: pd.DataFrame | None) -> pd.DataFrame:
    if metadata is None:
        return table
    if "id" not in metadata:
        raise InvalidInput(f"prompts has no column 'id'; it has {', '.join(map(str, metadata.columns))}")
    twice = metadata["id"].duplicated()
    if twice.any():
        raise InvalidInput(f"prompts has id {metadata['id'][twice].iloc[0]!r} more than once; give one row a prompt")
    clash = sorted(set(metadata.columns) & (set(COLUMNS) - {"id"}))
    if clash:
        raise InvalidInput(f"prompt column {clash[0]!r} is one of Millpond's own ({', '.join(COLUMNS)}); rename it")
    missing = ~table["id"].isin(metadata["id"])
    if missing.any():
        raise InvalidInput(
            f"prompt {table['id'][missing].iloc[0]!r} was captured but has no metadata; give every prompt"
        )
    return table.merge(metadata, on="id", how="left", validate="one_to_one", sort=False)


def _check_labels(
    table: pd.DataFrame,
    prompt_labels: tuple[str, ...],
    token_labels: Mapping[str, Mapping[str, NDArray[Any]]],
    token_label_dtypes: Mapping[str, str],
) -> None:
    """Check what can be checked before rows are copied."""
    for name in prompt_labels:
        check_label_name(name)
        if name not in table or name in COLUMNS:
            raise InvalidInput(f"prompt label {name!r} is no column of prompts; add it or leave the label out")
        empty = table[name].isna()
        if empty.any():
            raise InvalidInput(
                f"prompt label {name!r} has no value for prompt {table['id'][empty].iloc[0]!r}; give every prompt one"
            )
    for name, values in token_labels.items():
        check_label_name(name)
        if name in prompt_labels:
            raise InvalidInput(f"label {name!r} is given by prompt and by token; rename one")
        if name not in token_label_dtypes:
            raise InvalidInput(f"token label {name!r} has no data type; give it in token_label_dtypes")
        missing = [prompt_id for prompt_id in table["id"] if str(prompt_id) not in values]
        if missing:
            raise InvalidInput(
                f"token label {name!r} has no values for prompt {missing[0]!r}; give every prompt its own"
            )


def _merge(plan: RowPlan, data_folder: Path, table: pd.DataFrame) -> Part:
    """Copy every part's rows into `data_folder`, one array after the other."""
    arrays = {}
    for name, array in plan.spec.arrays().items():
        writer = ArrayWriter(data_folder / name, array, array_attributes(plan.spec, name))
        try:
            for block in plan.blocks():
                if name == "prompt":
                    rows: NDArray[Any] = plan.prompt_numbers(block).astype(np.int32)
                else:
                    source = plan.folder / plan.parts[block.part].path / name
                    rows = read_rows(source, array, block.start, block.stop)
                writer.append(rows)
            arrays[name] = ArrayChecksums.of(writer.finish())
        finally:
            writer.close()
    prompt_table = write_prompt_table(data_folder, table)
    write_group(data_folder, arrays, {"millpond:run": plan.spec.name})
    return Part(
        path=data_folder.name,
        rows=sum(part.rows for part in plan.parts),
        prompts=len(table),
        arrays=arrays,
        prompt_table=prompt_table,
    )
