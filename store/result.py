"""What every method that computes numbers returns: values with their evidence and provenance."""

from __future__ import annotations

import html
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = float | int | str | NDArray[Any]
_SHOWN = 8
"""Values of an array that are shown one by one."""


@dataclass(frozen=True)
class Result:
    """Named values, the intervals around them, how much data stands behind them, and where they came from."""

    kind: str
    """What was computed, such as `probe-evaluation`."""
    values: Mapping[str, Value]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of some of `values`, by the same names."""
    evidence: Mapping[str, int] = field(default_factory=dict)
    """Counts: rows, distinct prompts, rows of each class."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Run, hook, estimator, its parameters and seed, versions."""

    def __getitem__(self, name: str) -> Value:
        if name not in self.values:
            raise KeyError(f"{name!r} is no value of this {self.kind}; it has {', '.join(self.values)}")
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def keys(self) -> KeysView[str]:
        """The names of the values, so that `dict(result)` holds them."""
        return self.values.keys()

    def plot(self) -> Figure:
        """Values with their intervals; beside them the reliability curve, or the losses of a path, where there is one.

        Raises:
            InvalidInput: there is nothing to draw.
        """
        from millpond.store.figures import new_figure

        drawn = [name for name in self.values if name in self.intervals]
        curve, path = self.values.get("reliability"), self.values.get("loss_se")
        panels = bool(drawn) + (curve is not None) + (path is not None)
        if not panels:
            raise InvalidInput(f"a Result of kind {self.kind!r} without intervals has nothing to draw")
        figure = new_figure(1.2 + 3.8 * panels, 3.6)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if drawn:
            _draw_intervals(axes.pop(0), [(name, float(self.values[name]), *self.intervals[name]) for name in drawn])
        if isinstance(curve, np.ndarray):
            _draw_reliability(axes.pop(0), curve)
        if isinstance(path, np.ndarray):
            name = next(iter(self.values))
            ax = axes.pop(0)
            ax.errorbar(self.values[name], self.values["loss"], path, marker="o", capsize=3)
            ax.set(xscale="log", xlabel=name, ylabel="loss on left-out prompts")
        figure.suptitle(self.kind)
        return figure

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, value in self.values.items():
            text = _array(value) if isinstance(value, np.ndarray) else _number(value)
            if name in self.intervals:
                low, high = self.intervals[name]
                text += f" [{_number(low)}, {_number(high)}]"
            rows.append((name, text))
        return rows

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={text}" for name, text in self._rows())
        evidence = ", ".join(f"{name}={count:,}" for name, count in self.evidence.items())
        return f"<Result {self.kind}: {values}" + (f" | {evidence}>" if evidence else ">")

    def _repr_html_(self) -> str:
        rows = self._rows() + [(name, f"{count:,}") for name, count in self.evidence.items()]
        cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        return f"<table><caption>{html.escape(self.kind)}</caption>{cells}</table>"


def _draw_intervals(ax: Any, rows: list[tuple[str, float, float, float]]) -> None:
    for place, (_, value, low, high) in enumerate(rows):
        ax.plot([low, high], [place, place], color="C0", linewidth=2, alpha=0.5)
        ax.plot([value], [place], color="C0", marker="o")
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("value, 95 % interval")


def _draw_reliability(ax: Any, curve: NDArray[Any]) -> None:
    kept = curve[:, 2] > 0
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    ax.plot(curve[kept, 0], curve[kept, 1], marker="o")
    ax.set(xlabel="mean predicted probability", ylabel="fraction that is so", xlim=(0, 1), ylim=(0, 1))


def _array(values: NDArray[Any]) -> str:
    if values.size > _SHOWN or values.dtype.kind not in "biufU":
        return f"array{values.shape}"
    if values.ndim:
        return "[" + ", ".join(map(_array, values)) + "]"
    return _number(values.item())


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
