"""A released result, laid out for a page: numbers, charts, tables and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from millpond.hub.pages.charts import bar_chart, line_chart
from millpond.hub.shapes import Counts, fields_of
from millpond.store.result import Result

_X_LABELS: Mapping[str, str] = {"probe-sweep": "hook, in the order asked", "group-means": "group, in order"}


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; NaN where there is none."""

    name: str
    value: float
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True)
class Figure:
    """A chart, and its numbers for whoever cannot see it."""

    title: str
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Table:
    """A table of numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Layout:
    """What a page shows of a result."""

    title: str
    numbers: list[Estimate] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: list[tuple[str, int]] = field(default_factory=list)


def lay_out(result: Result) -> Layout:
    """The layout of a result as it was released."""
    page = Layout(result.kind.replace("-", " ").capitalize())
    counts = {one.name for one in fields_of(result.kind) if isinstance(one, Counts)}
    arrays: dict[str, Any] = {}
    for name, value in result.values.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif name in counts:
            page.counts.append((name, int(value)))
        else:
            page.numbers.append(Estimate(name, float(value), *result.intervals.get(name, ())))
    if result.kind == "histogram" and "counts" in arrays:
        _histogram(page, arrays.pop("counts"), float(result.values["low"]), float(result.values["high"]))
    if result.kind == "curve" and "y" in arrays:
        _lines(page, "y", arrays, x=arrays.pop("x"), x_label="x")
        del arrays["y"]
    if result.kind == "latent" and "contexts" in arrays:
        rows = np.column_stack([arrays.pop("contexts"), arrays.pop("activations")])
        page.tables.append(Table("Top contexts", ("Prompt", "Position", "Activation"), rows.tolist()))
    for name in [name for name in arrays if not name.endswith(("_low", "_high"))]:
        if arrays[name].ndim == 2 and name in counts:
            table = arrays[name]
            columns = ("Class", *map(str, range(table.shape[1])))
            page.tables.append(Table(name.capitalize(), columns, [[i, *row] for i, row in enumerate(table.tolist())]))
        elif name in ("direction", "mean"):
            shape = " × ".join(f"{length:,}" for length in arrays[name].shape)
            page.notes.append(f"{name.capitalize()}: {shape} coordinates; the client has them as an array.")
        elif arrays[name].ndim == 1:
            _lines(page, name, arrays, x_label=_X_LABELS.get(result.kind, "number"))
    return page


def _lines(page: Layout, name: str, arrays: Mapping[str, Any], *, x: Any = None, x_label: str) -> None:
    y = arrays[name]
    bounds = [arrays.get(f"{name}_{side}") for side in ("low", "high")]
    title = name.replace("_", " ").capitalize()
    svg = line_chart(y, x=x, low=bounds[0], high=bounds[1], title=title, x_label=x_label, y_label=title)
    columns, values = [x_label.capitalize(), title], [np.arange(len(y)) if x is None else x, y]
    if bounds[0] is not None and bounds[1] is not None:
        columns, values = [*columns, "From", "To"], [*values, *bounds]
    page.figures.append(Figure(title, svg, columns, np.column_stack(values).tolist()))


def _histogram(page: Layout, counts: Any, low: float, high: float) -> None:
    edges = np.linspace(low, high, len(counts) + 1)
    svg = bar_chart(counts, low=low, high=high, title="Histogram", x_label="value", y_label="rows")
    rows = np.column_stack([edges[:-1], edges[1:], counts]).tolist()
    page.figures.append(Figure("Histogram", svg, ("From", "To", "Rows"), rows))
