"""Sealing: an open run's segments become one Zarr group that never changes."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.commits import check_filled, closing
from millpond.store.errors import CaptureFailed, InvalidInput, StorageFailed
from millpond.store.label_files import remove_row_labels
from millpond.store.labels import check_label_name, write_token_label
from millpond.store.manifest import Manifest, encode_record
from millpond.store.merge import Merge
from millpond.store.objects import Storage, as_storage, check_once
from millpond.store.prompts import COLUMNS
from millpond.store.rows import RowPlan
from millpond.store.run import Run, open_run
from millpond.store.snapshot import Parts

log = logging.getLogger(__name__)


def seal_run(
    where: Storage | str | os.PathLike[str],
    *,
    prompts: pd.DataFrame | None = None,
    prompt_labels: tuple[str, ...] = (),
    token_labels: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    token_label_dtypes: Mapping[str, str] | None = None,
    expected_rows: int | None = None,
) -> Run:
    """Merge the committed segments of the open run at `where` into one group and write its manifest.

    Segments of whole shards keep their bytes: they are linked on a disk and copied by the store in S3. The rows of
    the others are packed behind them. Readers see the run change from open to sealed at once, when the manifest
    appears; until then an interrupted sealing is simply done again. Nothing can be committed meanwhile, nor after
    an interruption. What the open run was read from stays until garbage collection.
    Labels that were added to the open run stay.

    Args:
        where: the run's folder or URL.
        prompts: metadata and prompt labels, one row a prompt, found by its column `id`.
        prompt_labels: which of those columns are labels.
        token_labels: name to prompt id to one value a token.
        token_label_dtypes: stored data type of each token label.
        expected_rows: what the capture asked for; rows that retention dropped count.

    Raises:
        CaptureFailed: the rows are not as many as `expected_rows`.
        InvalidInput: `prompts` or the labels do not fit the captured prompts, the run is sealed without these labels, or it
            is a copy or an import that was not finished.
    """
    storage = as_storage(where)
    token_labels = token_labels or {}
    run = open_run(storage)
    if run.manifest is not None:
        unknown = [name for name in (*prompt_labels, *token_labels) if name not in run.labels]
        if unknown:
            raise InvalidInput(f"run {run.name!r} is sealed without the label {unknown[0]!r}; add it to the sealed run")
        return _checked(run, expected_rows)
    check_filled(storage, run.name)
    check_once(storage)
    with closing(storage, "sealing"):
        run = _checked(open_run(storage), expected_rows)  # writers are kept out: now it holds all that will ever be
        if run.manifest is None:
            _seal(run, prompts, prompt_labels, token_labels, token_label_dtypes or {}, expected_rows)
    return open_run(storage)


def _checked(run: Run, expected_rows: int | None) -> Run:
    rows = run.n_rows + run.n_dropped_rows
    if expected_rows is not None and rows != expected_rows:
        raise CaptureFailed(f"run {run.name!r} holds {rows} rows, but {expected_rows} were asked for")
    return run


def _seal(
    run: Run,
    prompts: pd.DataFrame | None,
    prompt_labels: tuple[str, ...],
    token_labels: Mapping[str, Mapping[str, NDArray[Any]]],
    token_label_dtypes: Mapping[str, str],
    expected_rows: int | None,
) -> None:
    storage = run.plan.folder
    merge = Merge(run.snapshot)
    table = _with_metadata(run.snapshot.prompts.iloc[merge.order].reset_index(drop=True), prompts)
    _check_labels(table, prompt_labels, token_labels, token_label_dtypes)
    remove_row_labels(storage)
    data = f"data-{uuid.uuid4().hex}"
    try:
        part = merge.write(storage, data, table)
        offsets = np.concatenate([[0], np.cumsum(table["n_rows"].to_numpy(np.int64))]).astype(np.int64)
        plan = RowPlan(storage, run.plan.spec, Parts.of([part]), offsets, np.ones(len(table), bool))
        for name, values in token_labels.items():
            by_number = {number: values[str(prompt_id)] for number, prompt_id in enumerate(table["id"])}
            write_token_label(plan, name, by_number, token_label_dtypes[name])
    except BaseException:  # a full disk gets its room back; once the manifest may be there, nothing is removed
        with suppress(StorageFailed):
            storage.delete_tree(data)
        raise
    manifest = Manifest(
        run=run.plan.spec,
        sealed=datetime.now(UTC).isoformat(timespec="seconds"),
        data=part,
        prompt_labels=prompt_labels,
        counts={
            "rows": part.rows,
            "prompts": part.prompts,
            "rows_asked": part.rows + run.n_dropped_rows,
            **({"rows_dropped": run.n_dropped_rows} if run.n_dropped_rows else {}),
            "tokens": int(table["n_tokens"].sum()),
        },
    )
    if storage.create("manifest.json", encode_record(manifest)):  # if somebody else was faster, the run is sealed too
        log.info("sealed", extra={"run": run.name, "rows": part.rows, "prompts": part.prompts})


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
