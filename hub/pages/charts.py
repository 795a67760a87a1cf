"""Charts as SVG, drawn on the server from numbers that were charged for. No script, no style attributes, no fonts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
_TICKS = 5


@dataclass(frozen=True)
class _Scale:
    """A range of values on a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """A few round values, or whole ones only."""
        rough = (self.high - self.low) / _TICKS
        if whole:
            rough = max(rough, 1.0)
        power = 10.0 ** np.floor(np.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = np.ceil(self.low / step - 1e-9)
        count = int(np.floor(self.high / step + 1e-9) - first) + 1
        return [float((first + number) * step) for number in range(count)]


def line_chart(
    y: ArrayLike,
    *,
    x: ArrayLike | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    title: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """A curve, with a band between `low` and `high`; NaN leaves a gap. Without `x`, points are numbered from 0."""
    ys = np.asarray(y, np.float64)
    xs = np.arange(len(ys), dtype=np.float64) if x is None else np.asarray(x, np.float64)
    lows, highs = (ys if side is None else np.asarray(side, np.float64) for side in (low, high))
    kept = np.isfinite(xs) & np.isfinite(ys)
    if not kept.any():
        return Markup()
    with np.errstate(invalid="ignore"):
        bottom = np.where(np.isfinite(lows), np.minimum(lows, ys), ys)
        top = np.where(np.isfinite(highs), np.maximum(highs, ys), ys)
    across = _across(float(xs[kept].min()), float(xs[kept].max()))
    up = _up(float(bottom[kept].min()), float(top[kept].max()))
    parts = []
    for run in _runs(kept):
        if low is not None and high is not None and len(run) > 1:
            edge = [(across(xs[i]), up(top[i])) for i in run] + [(across(xs[i]), up(bottom[i])) for i in run[::-1]]
            parts.append(f'<polygon class="band" points="{_points(edge)}"/>')
        parts.append(f'<polyline class="curve" points="{_points([(across(xs[i]), up(ys[i])) for i in run])}"/>')
        if len(ys) <= 200:
            parts += [f'<circle class="dot" cx="{across(xs[i]):.1f}" cy="{up(ys[i]):.1f}" r="3"/>' for i in run]
    return _chart(parts, across, up, title, x_label, y_label, whole=x is None)


def bar_chart(
    counts: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    low: float = 0.0,
    high: float | None = None,
    cap: float | None = None,
    title: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """Bars: of a histogram between `low` and `high`, or of `names`; a line at `cap`."""
    values = np.nan_to_num(np.asarray(counts, np.float64))
    if not len(values):
        return Markup()
    across = _across(low, float(len(values)) if high is None or not high > low else high)
    up = _up(0.0, max(float(values.max()), cap or 0.0) or 1.0, floor=True)
    width = (across.high - across.low) / len(values)
    parts = []
    for number, value in enumerate(values):
        begin, end = across(across.low + number * width), across(across.low + (number + 1) * width)
        parts.append(
            f'<rect class="bar" x="{begin + 1:.1f}" y="{up(value):.1f}" width="{max(end - begin - 2, 0.5):.1f}" '
            f'height="{up(0.0) - up(value):.1f}"/>'
        )
    if cap is not None:
        parts.append(f'<line class="cap" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(cap):.1f}" y2="{up(cap):.1f}"/>')
    return _chart(parts, across, up, title, x_label, y_label, names)


def number(value: float) -> str:
    """A number as the pages write it."""
    return "–" if np.isnan(value) else f"{value:.4g}"


def _across(low: float, high: float) -> _Scale:
    return _Scale(low, high if high > low else low + 1, _LEFT, _WIDTH - _RIGHT)


def _up(low: float, high: float, *, floor: bool = False) -> _Scale:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return _Scale(low if floor else low - room, high + room, _HEIGHT - _BOTTOM, _TOP)


def _runs(kept: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    places = np.flatnonzero(kept)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _chart(
    parts: Sequence[str],
    across: _Scale,
    up: _Scale,
    title: str,
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
    *,
    whole: bool = False,
) -> Markup:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    grid = []
    for tick in up.ticks():
        y = f"{up(tick):.1f}"
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        grid.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{number(tick)}</text>')
    places = (
        [(across(tick), number(tick)) for tick in across.ticks(whole=whole)]
        if names is None
        else [(across(i + 0.5), name) for i, name in enumerate(names)]
    )
    for x, text in places:
        grid.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(f"{x:.1f}", floor + 16, text))
    axes = f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{floor}H{right}"/>'
    return Markup(
        '<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">{}{}{}'
        '<text x="{}" y="{}" text-anchor="middle">{}</text>'
        '<text x="14" y="{}" text-anchor="middle" transform="rotate(-90 14 {})">{}</text></svg>'
    ).format(
        title, _WIDTH, _HEIGHT, Markup("".join(grid)), Markup("".join(parts)), Markup(axes),  # noqa: S704
        (_LEFT + right) // 2, _HEIGHT - 6, x_label, (_TOP + floor) // 2, (_TOP + floor) // 2, y_label,
    )  # fmt: skip
