"""What every method that computes numbers returns: values with their evidence and provenance."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = float | int | str | NDArray[Any]


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
        return self.values[name]

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, value in self.values.items():
            text = f"array{value.shape}" if isinstance(value, np.ndarray) else _number(value)
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


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
