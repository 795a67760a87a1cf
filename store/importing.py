"""Runs from activations that other tools stored: SAELens caches, safetensors folders and NumPy arrays."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput
from millpond.store.hooks import parse_hook
from millpond.store.prompts import COLUMNS
from millpond.store.sealed import write_sealed
from millpond.store.tensor_files import open_arrow, open_numpy, open_safetensors

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.run import Run

log = logging.getLogger(__name__)

Format = Literal["saelens", "safetensors", "numpy"]
RowsAre = Literal["prompts", "tokens"]
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENS = ("token_ids", "tokens", "input_ids")
UNKNOWN_TOKEN = -1
"""Token id of rows whose source has none."""


@dataclass(frozen=True)
class _Piece:
    """Some prompts of a source: arrays (prompts, positions, d_model), and their token ids if it has them."""

    activations: Mapping[str, NDArray[Any]]
    token_ids: NDArray[Any] | None


class _Source:
    """A file or folder of one of the formats; its files are opened anew for each array that is read."""

    def __init__(self, path: Path, form: Format, hooks: Mapping[str, str], rows_are: RowsAre | None) -> None:
        self.path, self.form, self.names, self.rows_are = path, form, dict(hooks), rows_are
        suffixes = {"saelens": (".arrow",), "safetensors": (".safetensors",), "numpy": (".npy", ".npz")}[form]
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes)
        self.files = [file for file in found if not file.name.startswith(".")]
        if not self.files or any(file.suffix not in suffixes for file in self.files):
            raise InvalidInput(f"{str(path)!r} holds no {' or '.join(suffixes)} file; check the path and the format")

    def _tables(self) -> Iterator[tuple[Path, dict[str, tuple[str, NDArray[Any]]]]]:
        if self.form == "numpy" and all(file.suffix == ".npy" for file in self.files):
            merged: dict[str, tuple[str, NDArray[Any]]] = {}  # one array a file, all of the same rows
            for file in self.files:
                merged |= open_numpy(file)
            yield self.path, merged
            return
        for file in self.files:
            if self.form == "saelens":
                for table in open_arrow(file):
                    yield file, table
            else:
                yield file, open_safetensors(file) if self.form == "safetensors" else open_numpy(file)

    def pieces(self) -> Iterator[tuple[str, _Piece]]:
        """The stored data type and the arrays of each piece, in order."""
        for file, table in self._tables():
            chosen = {}
            kinds = set()
            for name, (kind, values) in table.items():
                hook = self.names.get(name) or _hook(name)
                if hook is None:
                    continue
                if kind not in _DTYPES:
                    raise InvalidInput(f"{file}: {name} has data type {values.dtype}; activations are F32, F16 or BF16")
                kinds.add(_DTYPES[kind])
                chosen[hook] = self._shaped(file, name, values)
            if not chosen or len(kinds) > 1:
                why = "mixes data types" if kinds else "names no hook point"
                raise InvalidInput(
                    f"{file} {why}: it holds {', '.join(sorted(table)) or 'nothing'}; name the hooks, as in "
                    "--hooks acts blocks.12.hook_resid_post"
                )
            shapes = {values.shape[:2] for values in chosen.values()}
            if len(shapes) > 1:
                raise InvalidInput(f"{file}: the hooks have different rows, {sorted(shapes)}; split the file")
            tokens = next((table[name][1] for name in _TOKENS if name in table), None)
            (shape,) = shapes
            if tokens is not None:
                tokens = np.asarray(tokens)
                if tokens.size != shape[0] * shape[1] or tokens.dtype.kind not in "iu":
                    raise InvalidInput(f"{file}: token ids of shape {tokens.shape} do not fit rows of shape {shape}")
                tokens = tokens.reshape(shape)
            yield kinds.pop(), _Piece(chosen, tokens)

    def _shaped(self, file: Path, name: str, values: NDArray[Any]) -> NDArray[Any]:
        if values.ndim == 3:
            return values
        if values.ndim != 2:
            raise InvalidInput(
                f"{file}: {name} has shape {values.shape}; give (rows, d_model) or (prompts, positions, d_model)"
            )
        if self.rows_are is None:
            raise InvalidInput(
                f"{file}: {name} has shape {values.shape}, which does not say what a prompt is; give --rows-are prompts "
                "(each row is another prompt's) or tokens (the rows of a file are one prompt's)"
            )
        return values[:, None] if self.rows_are == "prompts" else values[None]


def _hook(name: str) -> str | None:
    try:
        return str(parse_hook(name))
    except InvalidInput:
        return None


def import_run(
    lake: Lake,
    name: str,
    path: str | os.PathLike[str],
    form: Format,
    *,
    hooks: Mapping[str, str] | None = None,
    rows_are: RowsAre | None = None,
    prompts: pd.DataFrame | None = None,
    model: str = "",
    chunk_rows: int = 512,
    shard_rows: int = 32_768,
) -> Run:
    """Copy stored activations into a new, sealed run, bit by bit.

    Args:
        lake: where it goes.
        name: of the run.
        path: a file, or a folder whose files are read in the order of their names.
        form: `saelens` (the Arrow files that its cache runner saves), `safetensors` or `numpy`.
        hooks: array name in the files to hook point, for those that are not called like one.
        rows_are: what the rows of two-dimensional arrays are.
        prompts: ids (column `id`) and metadata of the prompts, in order; by default they are numbered.
        model: its name, kept in the provenance.
        chunk_rows: of the run.
        shard_rows: of the run.

    Raises:
        InvalidInput: the files are not of that format, contradict each other, or hold values that are not finite.
    """
    wanted = {array: str(parse_hook(hook)) for array, hook in (hooks or {}).items()}
    source = _Source(Path(path), form, wanted, rows_are)
    kinds: set[str] = set()
    names: set[tuple[str, ...]] = set()
    widths: set[int] = set()
    sizes: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    for kind, piece in source.pieces():
        kinds.add(kind)
        names.add(tuple(sorted(piece.activations)))
        widths |= {values.shape[2] for values in piece.activations.values()}
        n_prompts, length = next(iter(piece.activations.values())).shape[:2]
        sizes += [length] * n_prompts
        unknown = np.full((n_prompts, length), UNKNOWN_TOKEN, np.int32)
        tokens.append((unknown if piece.token_ids is None else piece.token_ids.astype(np.int32)).reshape(-1))
    facts: dict[str, set[Any]] = {"hooks": names, "data types": kinds, "d_model": widths}
    for what, found in facts.items():
        if len(found) != 1:
            raise InvalidInput(f"{str(path)!r}: its files have different {what}: {sorted(found)}; import them apart")
    table = _prompt_table(np.array(sizes), np.concatenate(tokens), prompts)
    (width,), (kind,), (found_hooks,) = widths, kinds, names

    def blocks(array: str) -> Iterator[NDArray[Any]]:
        if array == "token_id":
            yield np.concatenate(tokens)
        elif array == "position":
            yield from (np.arange(size, dtype=np.int32) for size in sizes)
        else:
            for _, piece in source.pieces():
                values = piece.activations[array]
                rows = max((64 << 20) // max(values.shape[1] * values.shape[2] * values.itemsize, 1), 1)
                for start in range(0, len(values), rows):
                    yield np.ascontiguousarray(values[start : start + rows]).reshape(-1, values.shape[2])

    origin = {"format": form, "path": str(path), "files": len(source.files), **_settings(Path(path))}
    made = write_sealed(
        lake,
        name,
        like={
            "hooks": found_hooks,
            "d_model": width,
            "dtype": kind,
            "chunk_rows": chunk_rows,
            "shard_rows": shard_rows,
            "provenance": {"model": model, "imported_from": origin},
        },
        table=table,
        blocks=blocks,
    )
    log.info("imported", extra={"run": name, "rows": made.n_rows, "format": form, "path": str(path)})
    return made


def _prompt_table(sizes: NDArray[np.int64], tokens: NDArray[np.int32], prompts: pd.DataFrame | None) -> pd.DataFrame:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    digests = [
        hashlib.sha256(tokens[first:last].astype("<i4").tobytes()).hexdigest() for first, last in pairwise(starts)
    ]
    ids = [str(number) for number in range(len(sizes))]
    if prompts is not None:
        if "id" not in prompts or len(prompts) != len(sizes):
            raise InvalidInput(
                f"prompts has {len(prompts)} rows and columns {list(prompts)}; give {len(sizes)} with an id"
            )
        ids = prompts["id"].astype(str).tolist()
        if len(set(ids)) != len(ids):
            raise InvalidInput("prompts has an id more than once; give each prompt its own")
    table = pd.DataFrame({"id": ids, "sha256": digests, "n_prompt_tokens": sizes, "n_tokens": sizes, "n_rows": sizes})
    if prompts is None:
        return table
    clash = sorted(set(prompts.columns) & (set(COLUMNS) - {"id"}))
    if clash:
        raise InvalidInput(f"prompt column {clash[0]!r} is one of Millpond's own; rename it")
    return table.assign(**{str(column): prompts[column].to_numpy() for column in prompts.columns if column != "id"})


def _settings(path: Path) -> dict[str, Any]:
    """What SAELens wrote about its cache beside it."""
    for name in ("cache_activations_runner_cfg.json", "cfg.json"):
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            try:
                return {"settings": json.loads(file.read_text())}
            except ValueError as error:
                raise InvalidInput(f"{file} is not JSON ({error}); repair or remove it") from error
    return {}
