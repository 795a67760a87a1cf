"""What users give as labels, brought to one value a prompt or one value a row of a view."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput
from millpond.store.rows import RowPlan

if TYPE_CHECKING:
    import xarray as xr

    LabelInput = (
        pd.DataFrame | pd.Series[Any] | Mapping[str, Any] | NDArray[Any] | xr.DataArray | str | os.PathLike[str]
    )

By = Literal["prompt", "token"]


@dataclass(frozen=True)
class LabelValues:
    """One value a prompt of the view, or one a row, in the view's order."""

    by: By
    values: NDArray[Any]


class _Input:
    """What all the forms need to know of the view."""

    def __init__(self, plan: RowPlan, prompts: pd.DataFrame, name: str) -> None:
        self.plan, self.name = plan, name
        self.ids = pd.Index(prompts["id"].to_numpy().astype(str)[plan.chosen])
        self.numbers = np.flatnonzero(plan.chosen)

    def error(self, what: str) -> InvalidInput:
        return InvalidInput(f"label {self.name!r} of run {self.plan.spec.name!r}: {what}")

    def places(self, ids: Any) -> NDArray[np.int64]:
        """Which of the view's prompts each of `ids` is; every prompt once."""
        given = pd.Index(np.asarray(ids).astype(str))
        if given.has_duplicates:
            raise self.error(f"prompt {given[given.duplicated()][0]!r} is given more than once; give each prompt once")
        unknown = given.difference(self.ids, sort=False)
        if len(unknown):
            raise self.error(f"prompt {unknown[0]!r} is not in this view; leave it out or check the ids")
        missing = self.ids.difference(given, sort=False)
        if len(missing):
            raise self.error(
                f"prompt {missing[0]!r} has no value ({len(missing)} such prompts); give every prompt one, or add the "
                "label to a view of those that have one"
            )
        return np.asarray(self.ids.get_indexer(given), np.int64)

    def by_prompt(self, places: NDArray[np.int64], given: Any) -> LabelValues:
        values = np.empty(len(places), np.asarray(given).dtype)
        values[places] = np.asarray(given)
        return LabelValues("prompt", self.checked(values))

    def checked(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of a data type that labels may have, none missing."""
        bad = pd.isna(values)
        if bad.any():
            raise self.error(f"value number {int(np.flatnonzero(bad)[0])} is missing; give every prompt or row a value")
        if values.dtype == object:
            kinds = {type(value) for value in values}
            if kinds == {str}:
                return values.astype(str)
            raise self.error(f"it mixes {', '.join(sorted(kind.__name__ for kind in kinds))}; give values of one type")
        if values.dtype.kind not in "biufU":
            raise self.error(f"data type {values.dtype} cannot be a label; use booleans, integers, floats or text")
        return values

    def rows_checked(self) -> None:
        if self.plan.marks is not None:
            raise self.error("this view holds single rows; add labels by token to a view of whole prompts")

    def from_lists(self, places: NDArray[np.int64], lists: Any) -> LabelValues:
        """From one value a token of each prompt, from position 0."""
        self.rows_checked()
        of_place = dict(zip(places.tolist(), lists, strict=True))
        place_of = {int(number): place for place, number in enumerate(self.numbers)}
        out: list[NDArray[Any]] = []
        for block in self.plan.blocks():
            piece = self.plan.piece(block)
            if not piece.count:
                continue
            prompts, positions = piece.prompts(), self.plan.read("position", block)
            for rows in np.split(np.arange(len(prompts)), np.flatnonzero(np.diff(prompts)) + 1):
                place = place_of[int(prompts[rows[0]])]
                values = np.asarray(of_place[place])
                last = int(positions[rows].max())
                if values.ndim != 1 or last >= len(values):
                    raise self.error(
                        f"prompt {self.ids[place]!r} has values of shape {values.shape}, but rows up to position {last}; "
                        "give one value a token"
                    )
                out.append(values[positions[rows]])
        return LabelValues("token", self.checked_rows(np.concatenate(out) if out else np.zeros(0, bool)))

    def checked_rows(self, values: NDArray[Any]) -> NDArray[Any]:
        values = self.checked(values)
        if values.dtype.kind == "U":
            raise self.error("token labels cannot be text; use booleans, integers or floats")
        return values

    def from_positions(self, frame: pd.DataFrame, column: str) -> LabelValues:
        """From a table of (id, position, value) that covers every row of the view."""
        self.rows_checked()
        place = self.ids.get_indexer(pd.Index(frame["id"].astype(str)))
        if (place < 0).any():
            unknown = frame["id"].iloc[int(np.flatnonzero(place < 0)[0])]
            raise self.error(f"prompt {unknown!r} is not in this view; leave it out or check the ids")
        given = self.numbers[place].astype(np.int64) << 32 | frame["position"].to_numpy(np.int64)
        order = np.argsort(given, kind="stable")
        given = given[order]
        if (given[1:] == given[:-1]).any():
            twice = frame.iloc[int(order[1:][given[1:] == given[:-1]][0])]
            raise self.error(f"position {twice['position']} of prompt {twice['id']!r} is given more than once")
        values = frame[column].to_numpy()[order]
        out = []
        for block in self.plan.blocks():
            piece = self.plan.piece(block)
            if piece.count:
                wanted = piece.prompts().astype(np.int64) << 32 | self.plan.read("position", block).astype(np.int64)
                at = np.minimum(np.searchsorted(given, wanted), max(len(given) - 1, 0))
                absent = wanted != given[at] if len(given) else np.ones(len(wanted), bool)
                if absent.any():
                    row = int(wanted[absent][0])
                    prompt = self.ids[int(np.searchsorted(self.numbers, row >> 32))]
                    raise self.error(
                        f"position {row & 0xFFFFFFFF} of prompt {prompt!r} has no value; give every row one"
                    )
                out.append(values[at])
        return LabelValues("token", self.checked_rows(np.concatenate(out) if out else np.zeros(0, bool)))


def label_values(
    plan: RowPlan, prompts: pd.DataFrame, name: str, values: Any, *, column: str, by: str | None
) -> LabelValues:
    """What `Labels.add` takes, as one value a prompt or a row of the view.

    Raises:
        InvalidInput: a prompt or row is unknown, given twice or missing, or the values cannot be labels.
    """
    given = _Input(plan, prompts, name)
    if by not in (None, "prompt", "token"):
        raise given.error(f"by={by!r} is not known; give 'prompt' or 'token'")
    if isinstance(values, str | os.PathLike):
        values = _read_table(given, Path(values))
    if isinstance(values, pd.DataFrame):
        return _from_frame(given, values, column)
    if isinstance(values, pd.Series):
        if pd.api.types.is_integer_dtype(values.index.dtype):
            unknown = np.setdiff1d(values.index.to_numpy(), given.numbers)
            if len(unknown):
                raise given.error(
                    f"prompt number {unknown[0]} is not in this view; index by id or by run.prompts.index"
                )
            ids = given.ids[np.searchsorted(given.numbers, values.index.to_numpy())]
        else:
            ids = values.index
        return given.by_prompt(given.places(ids), values.to_numpy())
    if isinstance(values, Mapping):
        places = given.places(list(values))
        first = next(iter(values.values()), 0)
        if np.ndim(first):
            return given.from_lists(places, values.values())
        return given.by_prompt(places, pd.Series(list(values.values())).to_numpy())
    return _from_array(given, values, by)


def _read_table(given: _Input, path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise given.error(f"{str(path)!r} cannot be read as Parquet ({why}); check the path") from error


def _from_frame(given: _Input, frame: pd.DataFrame, column: str) -> LabelValues:
    for wanted in ("id", column):
        if wanted not in frame:
            raise given.error(f"the table has no column {wanted!r}; it has {', '.join(map(str, frame.columns))}")
    if "position" in frame:
        return given.from_positions(frame, column)
    places = given.places(frame["id"])
    if len(frame) and np.ndim(frame[column].iloc[0]):
        return given.from_lists(places, frame[column])
    return given.by_prompt(places, frame[column].to_numpy())


def _from_array(given: _Input, values: Any, by: str | None) -> LabelValues:
    array = pd.Series(values).to_numpy() if isinstance(values, list | tuple) else np.asarray(values)
    n_prompts, n_rows = len(given.ids), given.plan.n_rows
    if array.ndim != 1:
        raise given.error(f"an array of shape {array.shape} is no label; give one value a prompt or a row")
    if by is None and n_prompts == n_rows == len(array):
        raise given.error(f"{len(array)} values could be by prompt or by row; say which with by=")
    if len(array) == n_prompts and by != "token":
        return LabelValues("prompt", given.checked(array))
    if len(array) == n_rows and by != "prompt":
        given.rows_checked()
        return LabelValues("token", given.checked_rows(array))
    raise given.error(f"got {len(array)} values; this view has {n_prompts} prompts and {n_rows} rows")
