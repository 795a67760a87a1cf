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
from millpond.store.files import remove_tree, write_json
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
    segments stay, so an interrupted sealing is simply done again.

    Args:
        folder: the run's.
        prompts: metadata and prompt labels, one row a prompt, found by its column `id`.
        prompt_labels: which of those columns are labels.
        token_labels: name to prompt id to one value a token.
        token_label_dtypes: stored data type of each token label.
        expected_rows: what the capture asked for.

    Raises:
        CaptureFailed: the rows are not as many as `expected_rows`.
        InvalidInput: `prompts` lacks a captured prompt or brings a column of ours.
    """
    run = open_run(folder)
    if run.manifest is not None:
        return run
    if expected_rows is not None and run.n_rows != expected_rows:
        raise CaptureFailed(f"run {run.name!r} holds {run.n_rows} rows, but {expected_rows} were asked for")
    table = _with_metadata(run.prompts, prompts)
    remove_leftovers(folder)
    data_folder = folder / f"data-{uuid.uuid4().hex}"
    part = _merge(run.plan, data_folder, table)
    plan = RowPlan(folder, run.plan.spec, (part,), run.plan.offsets, run.plan.chosen)
    for name, values in (token_labels or {}).items():
        check_label_name(name)
        by_number = {number: values[str(prompt_id)] for number, prompt_id in enumerate(table["id"])}
        write_token_label(plan, name, by_number, (token_label_dtypes or {})[name])
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
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    remove_tree(folder / "segments")
    remove_tree(folder / "commits")
    return open_run(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted sealing of the open run in `folder` left; nothing of it was ever visible."""
    for data in folder.glob("data-*"):
        remove_tree(data)
    remove_tree(folder / "labels")


def _with_metadata(table: pd.DataFrame, metadata: pd.DataFrame | None) -> pd.DataFrame:
    if metadata is None:
        return table
    clash = sorted(set(metadata.columns) & (set(COLUMNS) - {"id"}))
    if clash:
        raise InvalidInput(f"prompt column {clash[0]!r} is one of Millpond's own ({', '.join(COLUMNS)}); rename it")
    missing = ~table["id"].isin(metadata["id"])
    if missing.any():
        raise InvalidInput(
            f"prompt {table['id'][missing].iloc[0]!r} was captured but has no metadata; give every prompt"
        )
    return table.merge(metadata, on="id", how="left", validate="one_to_one", sort=False)


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
