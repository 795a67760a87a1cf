"""Summaries and expressions as results that may leave, with intervals that treat a prompt's rows as one draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis import expressions as ex
from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.analysis.reductions import column_values, execute, rows_for
from millpond.analysis.tiles import Rows, decoded
from millpond.hub.quantise import Z95
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.store.run import Run

Floats = NDArray[np.float64]


def summarise(view: Run, hook: str) -> Result:
    """`mean` and `sd` over all coordinates of the rows, and `norm`, their mean Euclidean norm."""
    rows = AlignedRows(view[hook], view.tokens["prompt"], stored=True)
    pieces = run_pass(Pass(rows, _row_sums, None, join), description="statistics", progress=False)
    n, (mean, square, norm) = _by_prompt(pieces)
    total = n.sum()
    centre, spread = mean.sum() / total, square.sum() / total
    sd = float(np.sqrt(max(spread - centre**2, 0.0)))
    # influence of a prompt on each figure, by linearisation
    away = mean - n * centre
    influence = {
        "mean": away,
        "sd": ((square - n * spread) - 2 * centre * away) / (2 * sd) if sd else np.zeros_like(n),
        "norm": norm - n * norm.sum() / total,
    }
    values = {"mean": float(centre), "sd": sd, "norm": float(norm.sum() / total)}
    intervals = {name: _interval(values[name], influence[name], total) for name in values}
    known = {name: bounds for name, bounds in intervals.items() if bounds is not None}
    return Result("summary", values, known, {"rows": int(total), "prompts": len(n)})


def answer_expression(expression: ex.Expression, view: Run) -> Result:
    """The value of an expression as one of the kinds that may leave; see `kinds.expression`."""
    reduce = expression.reduce
    found = execute(expression, view, progress=False)
    counts = {name: found.evidence[name] for name in ("rows", "prompts")}
    width = ex.width_of(reduce.of, view)
    if isinstance(reduce, ex.Mean | ex.Variance):
        values = np.asarray(found[reduce.op], np.float64)
        if width > 1:
            return Result("mean", {"mean": values.reshape(-1, width) if reduce.by else values}, {}, counts)
        means: dict[str, Any] = {"means": values.reshape(-1)}
        if isinstance(reduce, ex.Mean) and (bounds := _mean_bounds(expression, view, means["means"])) is not None:
            means["means_low"], means["means_high"] = bounds
        return Result("group-means", means, {}, counts)
    if isinstance(reduce, ex.Quantiles):
        return Result("group-means", {"means": np.asarray(found["quantiles"], np.float64).reshape(-1)}, {}, counts)
    if isinstance(reduce, ex.Histogram):
        edges = np.asarray(found["edges"], np.float64)
        shown: dict[str, Any] = {"counts": np.asarray(found["counts"]).reshape(-1).astype(np.int64)}
        if reduce.low is None:  # limits that the client gave are not sent back
            shown |= {"low": float(edges[0]), "high": float(edges[-1])}
        return Result("histogram", shown, {}, counts)
    if isinstance(reduce, ex.Correlation):
        r, n = float(np.asarray(found["correlation"]).reshape(-1)[0]), counts["prompts"]
        bounds = np.tanh(np.arctanh(np.clip(r, -0.999999, 0.999999)) + np.array([-1, 1]) * Z95 / np.sqrt(max(n - 3, 1)))
        return Result("summary", {"similarity": r}, {"similarity": (float(bounds[0]), float(bounds[1]))}, counts)
    return _places(found, view, reduce.n, counts)


def mixes(node: Any) -> bool:
    """Whether labels or positions weigh activations somewhere under `node`: a weight can single out a row."""
    below = ex.columns_of(node)
    if isinstance(node, ex.Arithmetic | ex.Compare):
        below = [node.left, *ex.columns_of(node.left), node.right, *ex.columns_of(node.right)]
        reads = any(isinstance(one, ex.Activations) for one in below)
        if reads and any(isinstance(one, ex.Label | ex.Position) for one in below):
            return True
    return any(mixes(one) for one in below if isinstance(one, ex.Arithmetic | ex.Compare))


def crosses(reduce: Any) -> bool:
    """Whether activations are correlated with labels or positions, which weigh them: a mark on one row shows that row."""
    sides = [[one, *ex.columns_of(one)] for one in (reduce.of, getattr(reduce, "other", None)) if one is not None]
    reads = [any(isinstance(one, ex.Activations) for one in side) for side in sides]
    weighs = [any(isinstance(one, ex.Label | ex.Position) for one in side) for side in sides]
    return len(sides) == 2 and any(reads) and any(weighs)


def _places(found: Result, view: Run, n: int, counts: dict[str, int]) -> Result:
    """The strongest rows: prompt numbers in the order of `run.prompts`, positions and values."""
    from millpond.hub.probing import _filled

    ids = {str(name): number for number, name in zip(view.prompt_table.index, view.prompt_table["id"], strict=True)}
    prompts = np.array([ids[str(one)] for one in np.asarray(found["prompt"])], np.int64)
    places = np.stack([prompts, np.asarray(found["position"], np.int64)], axis=1)
    strongest = np.asarray(found["value"], np.float64)
    values: dict[str, Any] = {
        "contexts": _filled(places, n), "activations": _filled(strongest[:, None], n)[:, 0],
        "maximum": float(strongest[0]),
    }  # fmt: skip
    return Result("latent", values, {}, counts)


def _mean_bounds(expression: ex.Expression, view: Run, means: Floats) -> tuple[Floats, Floats] | None:
    """95 % intervals of the mean of one value a row, for each group; None if one has fewer than two prompts."""
    reduce = expression.reduce
    names, rows = rows_for([expression], view)
    groups = None if reduce.by is None else np.unique(view.labels[reduce.by].values)
    pieces = run_pass(Pass(rows, _values, (names, reduce, groups), join), description="intervals", progress=False)
    code = np.concatenate([piece[0] for piece in pieces])
    low, high = np.empty(len(means)), np.empty(len(means))
    for group in range(len(means)):
        chosen = [tuple(part[piece[0] == group] for part in piece[1:]) for piece in pieces]
        n, (total,) = _by_prompt(chosen) if (code == group).any() else (np.zeros(0), (np.zeros(0),))
        bounds = _interval(float(means[group]), total - n * means[group], n.sum())
        if bounds is None:
            return None
        low[group], high[group] = bounds
    return low, high


def _interval(value: float, influence: Floats, rows: float) -> tuple[float, float] | None:
    prompts = len(influence)
    if prompts < 2:
        return None
    error = np.sqrt(prompts / (prompts - 1) * np.square(influence).sum()) / rows
    return value - Z95 * float(error), value + Z95 * float(error)


def _by_prompt(pieces: Any) -> tuple[Floats, tuple[Floats, ...]]:
    """Rows and sums of each prompt, from blocks of (prompt, values...)."""
    prompts = np.concatenate([piece[0] for piece in pieces])
    _, code = np.unique(prompts, return_inverse=True)
    sums = [np.concatenate([piece[at] for piece in pieces]) for at in range(1, len(pieces[0]))]
    counts = np.bincount(code).astype(np.float64)
    return counts, tuple(np.asarray(np.bincount(code, weights=one), np.float64) for one in sums)


def _row_sums(_: None, x: Rows, prompt: NDArray[Any]) -> list[tuple[NDArray[Any], ...]]:
    rows = decoded(x).astype(np.float64)
    if not np.isfinite(rows).all():
        raise InvalidInput("a value is NaN or infinite; leave those rows out")
    return [(prompt, rows.mean(axis=1), np.square(rows).mean(axis=1), np.linalg.norm(rows, axis=1))]


def _values(state: Any, *arrays: Any) -> list[tuple[NDArray[Any], ...]]:
    names, reduce, groups = state
    known = dict(zip(names, arrays, strict=True))
    values = column_values(reduce.of, known)[:, 0]
    prompt = np.asarray(known["", "prompt"])
    code = np.zeros(len(prompt), np.int64)
    if groups is not None:
        code = np.searchsorted(groups, np.asarray(known["label", reduce.by]))
    return [(code, prompt, values)]
