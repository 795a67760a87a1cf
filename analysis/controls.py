"""Controls that a probe has to beat: the same probe on shuffled labels, and a random direction."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import Pass, run_passes
from millpond.analysis.probes.linear import Linear
from millpond.analysis.probes.moments import parts
from millpond.analysis.probes.targets import Design, Layout
from millpond.analysis.tiles import Rows, decoded

Vector = NDArray[np.float64]


def shuffle_labels(column: NDArray[Any], prompts: NDArray[Any], name: str, seed: int) -> NDArray[Any]:
    """The column with its values permuted: over rows, or over prompts if all rows of a prompt have one value."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    _, first, code = np.unique(prompts, return_index=True, return_inverse=True)
    of_prompt = column[first]
    if len(first) < len(column) and (of_prompt[code] == column).all():
        return np.asarray(rng.permutation(of_prompt)[code])
    return np.asarray(rng.permutation(column))


def random_directions(
    designs: Sequence[Design], shifts: Sequence[Vector], labels: Sequence[int], seed: int, *, progress: bool
) -> list[list[Linear]]:
    """For each design and label the scores that one random direction gives, in one shared pass.

    The direction is Gaussian in activations divided by their standard deviations (of the first rows).
    Scores are oriented by the class means of the training rows, or for numbers regressed on them.
    """
    looks = [Pass(design.rows.head(4096), _deviation) for design in designs]
    todo, directions = [], []
    for design, shift, deviation in zip(designs, shifts, run_passes(looks, progress=False), strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(design.name.encode())])
        direction = rng.standard_normal(len(shift)) / np.where(deviation > 0, deviation, 1.0)
        directions.append(direction / np.linalg.norm(direction))
        state = {"shift": shift, "exact": False, "layout": design.targets.layout, "direction": directions[-1]}
        todo.append(Pass(design.rows, _project, state))
    found = run_passes(todo, description="random directions", progress=progress)
    return [
        [_oriented(direction, shift, sums, design.targets.layout, label) for label in labels]
        for design, shift, direction, sums in zip(designs, shifts, directions, found, strict=True)
    ]


def _deviation(state: None, x: Rows, *_: NDArray[Any]) -> Vector:
    return np.asarray(decoded(x).std(axis=0, dtype=np.float64))


def _project(state: dict[str, Any], x: Rows, *blocks: NDArray[Any]) -> tuple[Vector, Vector, float]:
    """Sums of the indicators of all labels, of them times the projection, and of the projection squared."""
    layout: Layout = state["layout"]
    columns, _, _ = layout.unpack(blocks)
    z = np.empty(len(x))
    for where, part in parts(x, state):
        z[where] = part @ state["direction"].astype(part.dtype)
    indicators = layout.indicators(columns, np.float64)
    return indicators.sum(axis=0), z @ indicators, float(z @ z)


def _oriented(
    direction: Vector, shift: Vector, sums: tuple[Vector, Vector, float], layout: Layout, label: int
) -> Linear:
    counts, projected, square = sums
    totals, of_class = layout.by_class(counts, label), layout.by_class(projected, label)
    n, total = float(counts[0]), float(projected[0])
    if layout.n_classes[label] == 1:
        spread = square - total**2 / n
        slope = (of_class[0] - total * totals[0] / n) / spread if spread > 0 else 0.0
        return Linear.of_shifted((slope * direction)[None], (totals - slope * total) / n, shift)
    means = of_class / totals
    signs = np.sign(means - means.mean())
    if len(means) == 2:
        middle = np.array([-signs[1] * means.mean()])
        return Linear.of_shifted(signs[1] * direction[None], middle, shift)
    return Linear.of_shifted(np.outer(signs, direction), -signs * means.mean(), shift)
