"""How label columns are stored: an array of a sealed run's rows, or a table of prompts, each version once and for all."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from millpond.store.errors import LakeCorrupt
from millpond.store.manifest import ArrayChecksums, LabelRecord, encode_record, read_record
from millpond.store.objects import Storage
from millpond.store.shards import ArraySpec, ArrayWriter

LABEL_FILE = "label.json"


@dataclass(frozen=True)
class LabelTable:
    """A label's values by prompt."""

    ids: NDArray[np.str_]
    offsets: NDArray[np.int64]
    """First value of each prompt, for labels by token."""
    values: NDArray[Any]


def read_label(home: Storage, version: int | str) -> LabelRecord:
    """The record of one version of the label in `home`, which is `labels/<name>` of a run."""
    return read_record(home, f"{version}/{LABEL_FILE}", LabelRecord)


def row_label_array(home: Storage, version: int | str, record: LabelRecord) -> Storage:
    """The Zarr array of a label that has one value a row; format 1 kept it beside the record."""
    return home / (record.data or str(version))


@lru_cache(maxsize=16)
def label_table(home: Storage, record: LabelRecord) -> LabelTable:
    """The table of a label that is stored as one; the last few are kept in memory.

    Raises:
        LakeCorrupt: it is missing or not as it was written.
    """
    where = f"{home.url}/{record.data}"
    try:
        data = home.get(record.data)
    except FileNotFoundError:
        raise LakeCorrupt(f"{where} is missing; restore it or add the label again") from None
    if record.table != (len(data), int(google_crc32c.value(data))):
        raise LakeCorrupt(f"{where} does not have its checksum; restore it or add the label again")
    table = pq.read_table(io.BytesIO(data))
    ids = table["id"].to_numpy().astype(str)
    if record.by == "prompt":
        values = table["value"].to_numpy()
        values = values.astype(str if record.dtype == "str" else record.dtype)
        return LabelTable(ids, np.arange(len(ids)), values)
    lists = table["values"].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], lists.type)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy(zero_copy_only=False).astype(record.dtype)
    return LabelTable(ids, offsets[:-1], values)


def write_row_label(run: Storage, name: str, array: ArraySpec, blocks: Iterable[NDArray[Any]], source: str = "") -> int:
    """Store a label of a sealed run, one value a row, as a Zarr array beside its activations; returns the version."""
    data, home = f"data-{uuid.uuid4().hex}", run / f"labels/{name}"
    writer = ArrayWriter(home / data, array, {"millpond:label": name})
    try:
        for block in blocks:
            writer.append(block)
        checksums = ArrayChecksums.of(writer.finish())
    except BaseException:
        writer.close()
        home.delete_tree(data)
        raise
    about = {"dtype": array.dtype, "by": "token", "data": data, "created": _now(), "source": source}
    record = LabelRecord.model_validate({**checksums.model_dump(), **about})
    return _publish(home, record)


def write_prompt_table_label(
    run: Storage, name: str, ids: NDArray[np.str_], values: NDArray[Any], source: str = ""
) -> int:
    """Store one value a prompt; returns the version."""
    dtype = {"b": "bool", "i": "int64", "u": "int64", "f": "float32"}.get(values.dtype.kind, "str")
    column = pa.array(values.astype(object) if dtype == "str" else values.astype(dtype))
    table = pa.table({"id": pa.array(ids.astype(object), pa.string()), "value": column})
    return _write_table(run, name, table, {"rows": len(ids), "dtype": dtype, "by": "prompt", "source": source})


def write_token_table_label(
    run: Storage,
    name: str,
    ids: NDArray[np.str_],
    values: NDArray[Any],
    counts: NDArray[np.int64],
    source: str = "",
) -> int:
    """Store one value a row of the prompts `ids`, which have `counts` rows; returns the version."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
    table = pa.table({"id": pa.array(ids.astype(object), pa.string()), "values": lists})
    about = {"rows": len(values), "dtype": values.dtype.name, "by": "token", "source": source}
    return _write_table(run, name, table, about)


def _write_table(run: Storage, name: str, table: pa.Table, about: dict[str, Any]) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    content = buffer.getvalue()
    home = run / f"labels/{name}"
    stored = {
        "shards": (),
        "data": f"data-{uuid.uuid4().hex}.parquet",
        "table": (len(content), int(google_crc32c.value(content))),
        "created": _now(),
    }
    record = LabelRecord.model_validate({**about, **stored})
    home.put(record.data, content)
    return _publish(home, record)


def _publish(home: Storage, record: LabelRecord) -> int:
    """Show stored values under the next version; who loses a race takes the one after."""
    while True:
        taken = [int(version) for version in home.folders() if version.isdigit()]
        version = max(taken, default=0) + 1
        if home.create(f"{version}/{LABEL_FILE}", encode_record(record)):
            return version


def remove_row_labels(run: Storage) -> None:
    """Remove the labels that an interrupted sealing left in an open run; those added by users are tables, and stay."""
    for entry in list(run.list("labels")):
        name, version, *rest = entry.path.split("/")[1:]
        if rest == [LABEL_FILE] and version.isdigit():
            home = run / f"labels/{name}"
            record = read_label(home, version)
            if record.table is None:
                home.delete(f"{version}/{LABEL_FILE}")
                home.delete_tree(record.data or version)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
