"""Rows of a view as files of other tools, for use inside the vault: safetensors, Parquet or NumPy."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode
from millpond.store.errors import InvalidInput
from millpond.store.posix import named_errors, sync_folder
from millpond.store.tensor_files import write_safetensors

if TYPE_CHECKING:
    from millpond.store.run import Run

log = logging.getLogger(__name__)

Form = Literal["safetensors", "parquet", "numpy"]
_KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def export_run(
    view: Run, path: str | os.PathLike[str], form: Form, *, hooks: tuple[str, ...] | None = None
) -> list[Path]:
    """Write the rows of a view, with their reads, prompts, positions, token ids and labels, into the new folder `path`.

    safetensors: `rows-00000.safetensors` and so on, a shard of rows each, every hook in the run's data type. Parquet:
    the same, hooks as lists of float32. NumPy: one `.npy` for each hook (bfloat16 as float32), array of a read and column.
    `prompts.parquet` and `run.json` lie beside them. Returns the files.

    The folder appears when everything is in it; until then it is called `path` with `.millpond-partial` behind.

    Raises:
        InvalidInput: the folder exists and is not empty, or a label does not cover the rows.
        StorageFailed: the disk is full, or the folder cannot be written; nothing is left.
    """
    folder = Path(path).resolve()  # the name of what is written, also for "." and for a link
    if form not in ("safetensors", "parquet", "numpy"):
        raise InvalidInput(f"form is {form!r}; give safetensors, parquet or numpy")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{str(path)!r} exists and is not empty; name a new folder")
    if folder.is_mount():
        raise InvalidInput(f"{str(path)!r} is a mount; name a new folder in it")
    hooks = view.hooks if hooks is None else hooks
    columns = _columns(view)
    about = {"run": view.name, "id": view.plan.spec.id, "rows": view.n_rows, "dtype": view.dtype}
    write = {"safetensors": _safetensors, "parquet": _parquet, "numpy": _numpy}[form]
    with named_errors(folder, writing=True), _appearing_whole(folder) as partial:
        view.prompts.rename_axis("prompt").reset_index().to_parquet(partial / "prompts.parquet", index=False)
        (partial / "run.json").write_text(json.dumps({**about, "provenance": dict(view.provenance)}, indent=1))
        names = ["prompts.parquet", "run.json", *(file.name for file in write(view, partial, hooks, columns))]
    log.info("exported", extra={"run": view.name, "rows": view.n_rows, "format": form, "path": str(folder)})
    return [Path(path) / name for name in names]


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` at the end; what an export that was killed left there is removed."""
    partial = folder.with_name(f"{folder.name}.millpond-partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"another export is writing {str(partial)!r}; name another folder") from None
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _columns(view: Run) -> dict[str, Any]:
    """The lazy columns of one value a row, and those of the reads, some of which have several."""
    tokens = view.tokens
    columns = {str(name): tokens[name].data for name in ("prompt", "position", "token_id")}
    columns |= {f"{read}.{name}": values.data for read in view.reads for name, values in view.reads[read].items()}
    return columns | {f"label_{name}": label.data for name, label in view.labels.items()}


def _pieces(view: Run, hooks: tuple[str, ...], columns: Mapping[str, Any]) -> Iterator[dict[str, NDArray[Any]]]:
    """Hooks as stored, and the columns, block by block."""
    plan = view.plan
    for number, span in enumerate(plan.spans):
        rows = {
            hook: np.concatenate([piece.read(hook, plan.spec.activation_array) for piece in span]) for hook in hooks
        }
        yield rows | {name: np.asarray(data.blocks[number]) for name, data in columns.items()}


def _safetensors(view: Run, folder: Path, hooks: tuple[str, ...], columns: Mapping[str, Any]) -> list[Path]:
    files = []
    names = {
        "uint16": "U16",
        "uint32": "U32",
        "int32": "I32",
        "int64": "I64",
        "bool": "BOOL",
        "float32": "F32",
        "float64": "F64",
    }
    for number, piece in enumerate(_pieces(view, hooks, columns)):
        tensors = {hook: (_KINDS[view.dtype], piece[hook]) for hook in hooks}
        tensors |= {  # safetensors holds no text; prompts.parquet has such labels
            name: (names[values.dtype.name], values)
            for name, values in piece.items()
            if name not in hooks and values.dtype.name in names
        }
        files.append(folder / f"rows-{number:05d}.safetensors")
        write_safetensors(files[-1], tensors, {"run": view.name, "millpond:dtype": view.dtype})
    return files


def _parquet(view: Run, folder: Path, hooks: tuple[str, ...], columns: Mapping[str, Any]) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for number, piece in enumerate(_pieces(view, hooks, columns)):
        found: dict[str, Any] = {}
        for name, values in piece.items():
            rows = decode(values, view.dtype) if name in hooks else values
            flat = pa.array(rows.reshape(-1))
            found[name] = flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
        files.append(folder / f"rows-{number:05d}.parquet")
        pq.write_table(pa.table(found), files[-1])
    return files


def _numpy(view: Run, folder: Path, hooks: tuple[str, ...], columns: Mapping[str, Any]) -> list[Path]:
    dtype = "float32" if view.dtype == "bfloat16" else view.dtype
    files = []
    for hook in hooks:
        files.append(folder / f"{hook}.npy")
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (view.n_rows, view.d_model)}
        with files[-1].open("xb") as out:  # never mapped: a full disk would end the process with SIGBUS
            np.lib.format.write_array_header_1_0(out, header)  # type: ignore[no-untyped-call]
            for piece in (piece for span in view.plan.spans for piece in span):
                rows = piece.read(hook, view.plan.spec.activation_array)
                out.write(np.ascontiguousarray(decode(rows, view.dtype) if dtype == "float32" else rows).data)
    for name, data in columns.items():
        files.append(folder / f"{name}.npy")
        np.save(files[-1], np.asarray(data), allow_pickle=False)
    return files
