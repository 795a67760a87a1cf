"""Label columns of a run: named, versioned additions, by prompt or by token, that never rewrite activations."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, LabelNotFound, LakeCorrupt
from millpond.store.label_files import (
    LABEL_FILE,
    label_table,
    read_label,
    row_label_array,
    write_prompt_table_label,
    write_row_label,
    write_token_table_label,
)
from millpond.store.lazy import Reader, Span, block_array, coordinates
from millpond.store.manifest import INDEX_ARRAYS, LabelRecord
from millpond.store.objects import Storage
from millpond.store.rows import Piece, RowPlan
from millpond.store.shards import ArraySpec, read_rows

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from millpond.store.label_input import LabelInput

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII)
_STORED_DTYPES = {"b": "bool", "i": "int64", "u": "int64", "f": "float32"}


def check_label_name(name: str) -> str:
    """`name`, if a label column may be called so.

    Raises:
        InvalidInput: otherwise.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"label name {name!r} is not allowed; use 1 to 128 letters, digits and '_', starting with a letter"
        )
    return name


def label_dtype(name: str, dtype: np.dtype[Any]) -> str:
    """The data type in which a token label of NumPy type `dtype` is stored.

    Raises:
        InvalidInput: labels of that type cannot be stored.
    """
    if dtype.kind not in _STORED_DTYPES:
        raise InvalidInput(f"token label {name!r} has data type {dtype}; use booleans, integers or floats")
    return _STORED_DTYPES[dtype.kind]


def write_token_label(plan: RowPlan, name: str, values: Mapping[int, NDArray[Any]], dtype: str) -> int:
    """Store a token label of a whole run: `values[prompt number]` holds one value a token, from position 0.

    Returns the label's new version.

    Raises:
        InvalidInput: a prompt has too few values for its rows, or of another type.
    """
    check_label_name(name)

    def blocks() -> Iterator[NDArray[Any]]:
        for block in plan.blocks():
            prompts = plan.piece(block).prompts()
            if not len(prompts):
                continue
            positions = plan.read("position", block)
            out = np.empty(len(prompts), dtype)
            edges = np.flatnonzero(np.diff(prompts)) + 1
            for rows in np.split(np.arange(len(prompts)), edges):
                of_prompt = values[int(prompts[rows[0]])]
                if not np.can_cast(of_prompt.dtype, dtype, "same_kind"):
                    raise InvalidInput(
                        f"label {name!r} of prompt number {int(prompts[rows[0]])} has data type {of_prompt.dtype}, "
                        f"which {dtype} cannot hold; give {dtype} values"
                    )
                last = int(positions[rows].max())
                if last >= len(of_prompt):
                    raise InvalidInput(
                        f"label {name!r} has {len(of_prompt)} values for prompt number {int(prompts[rows[0]])}, "
                        f"whose rows reach position {last}; give one value a token"
                    )
                out[rows] = of_prompt[positions[rows]]
            yield out

    if not any(path.startswith("segments/") for path in plan.parts.paths[:1].tolist()):
        return write_row_label(plan.folder, name, plan.spec.row_array(dtype), blocks())
    from millpond.store.run import open_run  # the rows of an open run will move: its labels are kept by prompt

    ids = open_run(plan.folder).prompt_table["id"].to_numpy().astype(str)[: len(plan.chosen)][plan.chosen]
    found = np.concatenate([np.zeros(0, dtype), *blocks()])
    return write_token_table_label(plan.folder, name, ids, found, np.diff(plan.offsets)[plan.chosen])


class _ReadRowLabel(Reader):
    """A label stored as an array of the sealed run's rows."""

    def __init__(self, folder: Storage, array: ArraySpec) -> None:
        self.folder, self.array = folder, array

    def read(self, piece: Piece) -> NDArray[Any]:
        return piece.chosen(read_rows(self.folder, self.array, piece.first, piece.first + piece.stop - piece.start))


class _ReadPromptLabel(Reader):
    """A value a prompt; `values[i]` is that of prompt number `base + i`."""

    def __init__(self, values: NDArray[Any], base: int = 0) -> None:
        self.values, self.base = values, base

    def for_span(self, span: Span) -> _ReadPromptLabel:
        low, high = _prompt_range(span)
        return _ReadPromptLabel(self.values[low - self.base : high - self.base], low)

    def read(self, piece: Piece) -> NDArray[Any]:
        labels: NDArray[Any] = self.values[piece.prompts() - self.base]
        return labels


class _ReadTokenTable(Reader):
    """A label stored as a table of prompts; `place[i]` is the row there of prompt number `base + i`."""

    def __init__(self, home: Storage, record: LabelRecord, place: NDArray[np.int64], base: int = 0) -> None:
        self.home, self.record, self.place, self.base = home, record, place, base

    def for_span(self, span: Span) -> _ReadTokenTable:
        low, high = _prompt_range(span)
        return _ReadTokenTable(self.home, self.record, self.place[low - self.base : high - self.base], low)

    def read(self, piece: Piece) -> NDArray[Any]:
        table = label_table(self.home, self.record)
        rows = piece.chosen(np.arange(piece.first, piece.first + piece.stop - piece.start))
        number = np.searchsorted(piece.bounds, rows, "right") - 1
        place = self.place[piece.first_prompt - self.base + number]
        labels: NDArray[Any] = table.values[table.offsets[place] + rows - piece.bounds[number]]
        return labels


def _prompt_range(span: Span) -> tuple[int, int]:
    return span.pieces[0].first_prompt, max(piece.first_prompt + len(piece.bounds) for piece in span.pieces)


class Labels(Mapping[str, "xr.DataArray"]):
    """The labels of a view by name, each lazy and with one value a row.

    `labels["mood"]` is the latest version, `labels["mood@1"]` the first; version 0 of a label by prompt is
    the one that came with the capture.
    """

    def __init__(self, plan: RowPlan, prompts: pd.DataFrame, captured: tuple[str, ...], sealed: bool) -> None:
        self._plan = plan
        self._prompts = prompts
        self._captured = captured
        self._sealed = sealed

    @cached_property
    def _records(self) -> dict[str, dict[int, tuple[Storage, LabelRecord]]]:
        """Name to version to the record and where the label is; of an open run, those that its growth cannot invalidate."""
        folder = self._plan.folder
        found: dict[str, dict[int, tuple[Storage, LabelRecord]]] = {}
        for entry in folder.list("labels"):
            name, version, *rest = entry.path.split("/")[1:]
            if rest == [LABEL_FILE] and version.isdigit():
                home = folder / f"labels/{name}"
                record = read_label(home, version)
                if record.table is not None or self._sealed:
                    found.setdefault(name, {})[int(version)] = (home, record)
        return found

    @property
    def token_labels(self) -> tuple[str, ...]:
        """Names of the labels whose latest version has a value a token."""
        return tuple(sorted(name for name in self._records if self._find(name)[1].by == "token"))

    @property
    def prompt_labels(self) -> tuple[str, ...]:
        """Names of the labels whose latest version has a value a prompt."""
        added = sorted(name for name in self._records if self._find(name)[1].by == "prompt")
        return tuple(dict.fromkeys([*(name for name in self._captured if name not in self.token_labels), *added]))

    @property
    def known(self) -> tuple[str, ...]:
        """The names that are known without reading: those captured, and all once any label was looked for."""
        return tuple(self) if self.looked_for else tuple(self._captured)

    @property
    def looked_for(self) -> bool:
        """Whether the labels that were added have been listed."""
        return "_records" in self.__dict__

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a label, ascending.

        Raises:
            LabelNotFound: there is none of that name.
        """
        found = ((0,) if name in self._captured else ()) + tuple(sorted(self._records.get(name, {})))
        if not found:
            raise self._missing(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter((*self.token_labels, *self.prompt_labels))

    def __len__(self) -> int:
        return len(self.token_labels) + len(self.prompt_labels)

    def _missing(self, name: str) -> LabelNotFound:
        run, held = self._plan.spec.name, ", ".join(self) or "none"
        remedy = "name one of these"
        if name in self._prompts:
            remedy += f", or make a label of that column: run.labels.add({name!r}, run.prompts[['id', {name!r}]])"
        return LabelNotFound(f"label {name!r} is not in run {run!r}, which has {held}; {remedy}")

    def _find(self, key: str) -> tuple[Storage, LabelRecord]:
        name, _, version = key.partition("@")
        versions = self._records.get(name, {})
        if not versions or (version and not version.isdigit()):
            raise self._missing(key)
        number = self._number(key)
        if number not in versions:
            raise LabelNotFound(
                f"label {name!r} has no version {number} in run {self._plan.spec.name!r}; it has "
                f"{', '.join(map(str, self.versions(name)))}"
            )
        return versions[number]

    def _number(self, key: str) -> int:
        name, _, version = key.partition("@")
        return int(version) if version else max(self._records[name])

    def _is_captured(self, key: str) -> bool:
        name, _, version = key.partition("@")
        return name in self._captured and (version == "0" or (not version and name not in self._records))

    def _places(self, name: str, home: Storage, record: LabelRecord) -> NDArray[np.int64]:
        """Row of each prompt of the whole run in a label's table; -1 for prompts that are not in the view."""
        import pandas as pd

        table = label_table(home, record)
        place = pd.Index(table.ids).get_indexer(pd.Index(self._prompts["id"].astype(str)))
        missing = self._plan.chosen & (place < 0) & (np.diff(self._plan.offsets) > 0)
        if missing.any():
            first = self._prompts["id"].iloc[int(np.flatnonzero(missing)[0])]
            raise InvalidInput(
                f"label {name!r} has no value for prompt {first!r} ({int(missing.sum())} such prompts in this view of run "
                f"{self._plan.spec.name!r}); add a version for all of them, or select the prompts that it covers: "
                f"run.select(run.labels.covers({name!r}))"
            )
        return np.asarray(place, np.int64)

    def covers(self, name: str) -> NDArray[np.bool_]:
        """Which of the view's prompts the label has values for, as `run.select` takes them."""
        chosen = self._plan.chosen
        if self._is_captured(name):
            return np.ones(int(chosen.sum()), bool)
        home, record = self._find(name)
        if record.table is None:
            return np.ones(int(chosen.sum()), bool)
        return np.asarray(self._prompts["id"][chosen].astype(str).isin(label_table(home, record).ids))

    def by_prompt(self, name: str) -> NDArray[Any] | None:
        """Values for each prompt of the whole run; None if this is no label by prompt. Unread prompts have any value."""
        if self._is_captured(name):
            values = self._prompts[name.partition("@")[0]].to_numpy()
            return values if values.dtype.kind in "biufU" else values.astype(str)
        if name.partition("@")[0] not in self._records:
            return None
        home, record = self._find(name)
        if record.by != "prompt":
            return None
        place = self._places(name, home, record)
        values = label_table(home, record).values
        return values[place] if len(values) else np.zeros(len(place), values.dtype)

    def by_row(self, name: str) -> Reader | None:
        """What reads a label by token; None if this is none."""
        if self._is_captured(name) or name.partition("@")[0] not in self._records:
            return None
        home, record = self._find(name)
        if record.by != "token":
            return None
        if record.table is not None:
            return _ReadTokenTable(home, record, self._places(name, home, record))
        plan = self._plan
        if record.rows != plan.offsets[-1]:
            raise LakeCorrupt(
                f"label {name!r} has {record.rows} values, but run {plan.spec.name!r} has {plan.offsets[-1]} rows; "
                "restore it, or add it again"
            )
        return _ReadRowLabel(row_label_array(home, self._number(name), record), plan.spec.row_array(record.dtype))

    def __getitem__(self, name: str) -> xr.DataArray:
        import xarray as xr

        values = self.by_prompt(name)
        if values is not None:
            reader: Reader = _ReadPromptLabel(values)
            dtype = values.dtype
        else:
            by_row = self.by_row(name)
            if by_row is None:
                raise self._missing(name)
            reader = by_row
            dtype = np.dtype(self._find(name)[1].dtype)
        data = block_array(self._plan, reader, self._identity(name), dtype)
        return xr.DataArray(data, dims=("row",), coords=coordinates(self._plan), name=name)

    def _identity(self, name: str) -> str:
        """Names the version in Dask's keys: the latest one of today may not be that of tomorrow."""
        if self._is_captured(name):
            return f"label-{name}"
        return f"label-{name.partition('@')[0]}-{self._number(name)}-{self._find(name)[1].data}"

    def add(
        self,
        name: str,
        values: LabelInput,
        *,
        column: str | None = None,
        by: str | None = None,
        source: str = "",
    ) -> int:
        """Add a label for every prompt of this view, as a new version; activations are not touched.

        A label outlives the sealing of an open run. Prompts captured later, and those outside this view,
        have no value (`covers`).

        Args:
            name: of the label.
            values: by prompt, or by token, as one of

                - a DataFrame, or the path of a Parquet file, with a column `id`, the values in `column`, and for labels
                  by token either a column `position` or a list of one value a token in each cell;
                - a Series whose index is the prompts' ids or numbers;
                - a mapping from id to a value, or to an array of one value a token from position 0;
                - an array of one value a prompt (the order of `run.prompts`) or a row (that of `run.tokens`).
            column: in a table; by default `name`.
            by: `prompt` or `token`, where an array could be either.
            source: where the values come from, kept with them.

        Returns the version.

        Raises:
            InvalidInput: a prompt is unknown, given twice or missing, or a value is.
            QuotaExceeded: the lake's configuration does not allow so many bytes.
        """
        from millpond.store.configuration import check_quota
        from millpond.store.label_input import label_values
        from millpond.store.lake import Lake

        check_label_name(name)
        if name in INDEX_ARRAYS:
            raise InvalidInput(f"label name {name!r} is that of a row coordinate; choose another name")
        plan = self._plan
        found = label_values(plan, self._prompts, name, values, column=column or name, by=by)
        check_quota(Lake(plan.folder.parent.parent), {plan.folder.name: found.values.nbytes})
        ids = self._prompts["id"].to_numpy().astype(str)[plan.chosen]
        if found.by == "prompt":
            version = write_prompt_table_label(plan.folder, name, ids, found.values, source)
        elif self._sealed and plan.chosen.all():
            array = plan.spec.row_array(label_dtype(name, found.values.dtype))
            blocks = (found.values[b.first : b.first + b.stop - b.start].astype(array.dtype) for b in plan.blocks())
            version = write_row_label(plan.folder, name, array, blocks, source)
        else:
            dtype = label_dtype(name, found.values.dtype)
            counts = np.diff(plan.offsets)[plan.chosen]
            version = write_token_table_label(plan.folder, name, ids, found.values.astype(dtype), counts, source)
        self.__dict__.pop("_records", None)
        log.info("labelled", extra={"run": plan.spec.name, "label": name, "version": version})
        return version

    def __repr__(self) -> str:
        return f"<Labels by token: {', '.join(self.token_labels) or 'none'}; by prompt: {', '.join(self.prompt_labels) or 'none'}>"
