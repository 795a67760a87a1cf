"""Runs checked expressions as passes: several expressions share each read of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis import expressions as ex
from millpond.analysis.aligned import BLOCK_BYTES
from millpond.analysis.passes import AlignedRows, Pass, run_pass
from millpond.analysis.tiles import decoded, tiles
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.store.run import Run

Vector = NDArray[np.float64]

MAX_GROUPS = 1000
_BINS = 4096
_ROUNDS = 3
"""Histograms of 4,096 bins a round: after the extremes, two narrow every quantile to 2^-24 of the range."""


def execute(expression: ex.Expression, run: Run, *, progress: bool = True) -> Result:
    """The value of one expression; see `execute_all`."""
    return execute_all([expression], run, progress=progress)[0]


def execute_all(expressions: Sequence[ex.Expression], run: Run, *, progress: bool = True) -> list[Result]:
    """The values of expressions over one run; they share each pass over the rows.

    Means, variances, correlations and top rows take one pass, histograms without limits two, quantiles three; a
    `by` another over its label alone. Values of groups are stacked along the first axis, in the order of
    `provenance["groups"]`; `rows` and `prompts_by_group` (distinct prompts) say what stands behind each.

    Raises:
        InvalidInput: an expression does not fit the run (see `check_expression`), has more than `MAX_GROUPS`
            groups, or gives NaN or an infinity.
    """
    for expression in expressions:
        ex.check_expression(expression, run)
    groups = {
        label: _groups(run, label, progress) for label in dict.fromkeys(e.reduce.by for e in expressions if e.reduce.by)
    }
    work = [_Work(e.reduce, groups.get(e.reduce.by or "")) for e in expressions]
    names, rows = rows_for(expressions, run)
    while active := [one for one in work if not one.finished]:
        one = Pass(
            rows,
            _map,
            (names, [part.task() for part in active]),
            _merge_all,
            result_bytes=sum(p.size() for p in active),
        )
        sums = run_pass(one, description="expression", progress=progress)
        for part, found in zip(active, sums, strict=True):
            part.take(found)
    return [_result(one, expression, run) for one, expression in zip(work, expressions, strict=True)]


def rows_for(expressions: Sequence[ex.Expression], run: Run) -> tuple[list[tuple[str, str]], AlignedRows]:
    """What a pass over the columns of checked expressions reads, and the arrays' keys for `column_values`."""
    hooks = list(dict.fromkeys(hook for e in expressions for hook in e.hooks))
    labels = list(dict.fromkeys(label for e in expressions for label in e.labels))
    coordinates = run.tokens
    arrays = [run[hook] for hook in hooks] + [run.labels[label] for label in labels]
    rows = AlignedRows(
        *arrays, coordinates["prompt"], coordinates["position"],
        block_bytes=max(1, BLOCK_BYTES // max(1, len(hooks))), stored=True,
    )  # fmt: skip
    names = [
        *(("hook", hook) for hook in hooks),
        *(("label", label) for label in labels),
        ("", "prompt"),
        ("", "position"),
    ]
    return names, rows


@dataclass
class _Work:
    """One reduction between its passes."""

    reduction: Any
    groups: NDArray[Any] | None
    finished: bool = False
    low: Vector | None = None
    high: Vector | None = None
    below: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    rows: NDArray[Any] | None = None
    prompts: list[NDArray[Any]] = field(default_factory=list)
    round: int = 0

    def task(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction, "groups": self.groups, "low": self.low, "high": self.high, "round": self.round
        }  # fmt: skip

    def size(self) -> int:
        groups = 1 if self.groups is None else len(self.groups)
        per = {"histogram": 8 * ex.MAX_BINS, "quantiles": 8 * _BINS * 99, "top": 40 * ex.MAX_TOP}
        return groups * per.get(self.reduction.op, 0)

    def take(self, found: dict[str, Any]) -> None:
        """Use what a pass gave; sets `finished`."""
        bad = int(found["sum_bad"])
        if bad:
            raise InvalidInput(f"{self.reduction.op}: {bad:,} values are NaN or infinite; look for divisions by 0")
        op = self.reduction.op
        if self.rows is None:
            self.rows, self.prompts = found["sum_n"], found["set_prompts"]
        if op in ("mean", "variance", "correlation"):
            self._moments(found)
        elif op == "top":
            self.values = {name: found["top"][name] for name in ("value", "prompt", "position")}
            self.finished = True
        elif "min" in found:
            self._limits(found)
        elif op == "histogram":
            low, high = (
                (self.reduction.low, self.reduction.high)
                if self.low is None or self.high is None
                else (self.low[0], self.high[0])
            )
            self.values = {"counts": found["sum_counts"], "edges": np.linspace(low, high, self.reduction.bins + 1)}
            self.finished = True
        else:
            self._narrow(found["sum_counts"])
        self.round += 1

    def _moments(self, found: dict[str, Any]) -> None:
        n = np.maximum(found["sum_n"], 1)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = found["mean"]
            if self.reduction.op == "mean":
                self.values = {"mean": mean}
            elif self.reduction.op == "variance":
                self.values = {"variance": found["moment"] / n}
            else:
                left, right, both = found["moment"][:, 0], found["moment"][:, 1], found["cross"]
                self.values = {"correlation": np.where(left * right > 0, both / np.sqrt(left * right), np.nan)}
        self.finished = True

    def _limits(self, found: dict[str, Any]) -> None:
        low, high = found["min"], found["max"]
        if self.reduction.op == "histogram":
            least, most = float(low.min()), float(high.max())
            if least == most:
                least, most = least - 0.5, most + 0.5
            self.low, self.high = np.array([least]), np.array([most])
            return
        q = len(self.reduction.q)
        self.low, self.high = np.repeat(low[:, None], q, 1), np.repeat(high[:, None], q, 1)
        self.below = np.zeros(self.low.shape)

    def _narrow(self, counts: NDArray[Any]) -> None:
        """`counts` (groups, q, bins + 1): rows at or below `low`, then in each bin (edge, edge]."""
        assert self.low is not None
        assert self.high is not None
        assert self.rows is not None
        wanted = np.maximum(np.ceil(np.asarray(self.reduction.q)[None] * self.rows[:, None] - 1e-9), 1)
        at_most = np.cumsum(counts, axis=2)
        place = (at_most < wanted[:, :, None]).sum(axis=2)  # 0: at or below low
        place = np.minimum(place, _BINS)
        step = (self.high - self.low) / _BINS
        high = np.where(place == 0, self.low, self.low + place * step)
        self.low = np.where(place == 0, self.low, self.low + (place - 1) * step)
        self.high = high
        if self.round == _ROUNDS - 1:
            self.values = {"quantiles": self.high}
            self.finished = True


def _groups(run: Run, label: str, progress: bool) -> NDArray[Any]:
    found: NDArray[Any] = run_pass(Pass(AlignedRows(run.labels[label]), _distinct, None, _union), progress=progress)
    if len(found) > MAX_GROUPS:
        raise InvalidInput(
            f"label {label!r} has {len(found):,} values, the limit of groups is {MAX_GROUPS:,}; bin it first"
        )
    return found


def _distinct(state: None, values: NDArray[Any]) -> NDArray[Any]:
    return np.unique(values)[: MAX_GROUPS + 1]


def _union(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    return np.union1d(left, right)[: MAX_GROUPS + 1]


def _map(state: tuple[list[tuple[str, str]], list[dict[str, Any]]], *arrays: Any) -> list[dict[str, Any]]:
    names, tasks = state
    known = dict(zip(names, arrays, strict=True))
    return [_map_one(task, known) for task in tasks]


def _map_one(task: dict[str, Any], known: dict[tuple[str, str], Any]) -> dict[str, Any]:
    reduction, groups = task["reduction"], task["groups"]
    prompts = known["", "prompt"]
    values = column_values(reduction.of, known)
    if reduction.op == "correlation":
        values = np.concatenate([values, column_values(reduction.other, known)], axis=1)
    code = np.zeros(len(values), np.intp) if groups is None else np.searchsorted(groups, known["label", reduction.by])
    count = 1 if groups is None else len(groups)
    finite = np.isfinite(values)
    out: dict[str, Any] = {
        "sum_bad": int(finite.size - finite.sum()),
        "sum_n": np.bincount(code, minlength=count),
    }
    if task["round"] == 0:
        out["set_prompts"] = [np.unique(prompts[code == group]) for group in range(count)]
    if out["sum_bad"]:
        return out  # ends the expression
    if reduction.op in ("mean", "variance", "correlation"):
        return out | _moments(values, code, count, reduction.op == "correlation")
    column = values[:, 0]
    if reduction.op == "top":
        order = np.lexsort((known["", "position"], prompts, -column))[: reduction.n]
        top = {"value": column[order], "prompt": prompts[order], "position": known["", "position"][order]}
        return out | {"top": top | {"n": reduction.n}}
    if task["low"] is None and not (reduction.op == "histogram" and reduction.low is not None):
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, code, column)
        np.maximum.at(high, code, column)
        return out | {"min": low, "max": high}
    if reduction.op == "histogram":
        low, high = (reduction.low, reduction.high) if task["low"] is None else (task["low"][0], task["high"][0])
        counts = [np.histogram(column[code == g], bins=reduction.bins, range=(low, high))[0] for g in range(count)]
        return out | {"sum_counts": np.stack(counts)}
    return out | {"sum_counts": _fine_counts(column, code, task["low"], task["high"])}


def _moments(values: Vector, code: NDArray[Any], count: int, cross: bool) -> dict[str, Any]:
    """Count, mean and sum of squares about it for each group (Chan, Golub and LeVeque, 1979)."""
    n = np.bincount(code, minlength=count)
    mean, moment = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    both = np.zeros(count)
    for group in np.flatnonzero(n):
        mine = values[code == group] if count > 1 else values
        mean[group] = mine.mean(axis=0)
        away = mine - mean[group]
        moment[group] = np.square(away).sum(axis=0)
        if cross:
            both[group] = away[:, 0] @ away[:, 1]
    return {"weight": n.astype(np.float64), "mean": mean, "moment": moment, "cross": both}


def _fine_counts(column: Vector, code: NDArray[Any], low: Vector, high: Vector) -> NDArray[np.int64]:
    counts = np.zeros((*low.shape, _BINS + 1), np.int64)
    for group, q in np.ndindex(low.shape):
        mine = column[code == group]
        start, stop = low[group, q], high[group, q]
        counts[group, q, 0] = (mine <= start).sum()
        inside = mine[(mine > start) & (mine <= stop)]
        if len(inside):
            place = np.ceil((inside - start) / ((stop - start) / _BINS)).astype(np.int64)
            counts[group, q, 1:] = np.bincount(np.clip(place, 1, _BINS) - 1, minlength=_BINS)
    return counts


def _merge_all(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_merge(a, b) for a, b in zip(left, right, strict=True)]


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    if left["sum_bad"] or right["sum_bad"]:
        return {"sum_bad": left["sum_bad"] + right["sum_bad"]}
    out: dict[str, Any] = {name: left[name] + right[name] for name in left if name.startswith("sum_")}
    if "set_prompts" in left:
        out["set_prompts"] = [np.union1d(a, b) for a, b in zip(left["set_prompts"], right["set_prompts"], strict=True)]
    if "min" in left:
        out |= {"min": np.minimum(left["min"], right["min"]), "max": np.maximum(left["max"], right["max"])}
    if "moment" in left:
        total = left["weight"] + right["weight"]
        share = right["weight"] / np.maximum(total, 1)
        away = right["mean"] - left["mean"]
        pull = left["weight"] * share
        out |= {
            "weight": total,
            "mean": left["mean"] + away * share[:, None],
            "moment": left["moment"] + right["moment"] + np.square(away) * pull[:, None],
            "cross": left["cross"] + right["cross"] + (away[:, 0] * away[:, -1]) * pull,
        }
    if "top" in left:
        both = {
            name: np.concatenate([left["top"][name], right["top"][name]]) for name in ("value", "prompt", "position")
        }
        order = np.lexsort((both["position"], both["prompt"], -both["value"]))[: left["top"]["n"]]
        out["top"] = {name: values[order] for name, values in both.items()} | {"n": left["top"]["n"]}
    return out


def column_values(node: Any, known: dict[tuple[str, str], Any]) -> Vector:
    """Values (rows, width) of a column for one block, float64."""
    if isinstance(node, ex.Project):
        directions = np.asarray(node.directions, np.float64)
        shift = None if node.shift is None else np.asarray(node.shift, np.float64)
        if isinstance(node.of, ex.Activations):
            parts = [tile @ directions.T.astype(tile.dtype) for _, tile in tiles(known["hook", node.of.hook], shift)]
            return np.concatenate(parts).astype(np.float64)
        inner = column_values(node.of, known)
        return np.asarray((inner if shift is None else inner - shift) @ directions.T)
    if isinstance(node, ex.Activations):
        return decoded(known["hook", node.hook]).astype(np.float64)
    if isinstance(node, ex.Norm):
        if isinstance(node.of, ex.Activations):
            squares = [np.einsum("ij,ij->i", t, t, dtype=np.float64) for _, t in tiles(known["hook", node.of.hook])]
            return np.asarray(np.sqrt(np.concatenate(squares))[:, None])
        return np.asarray(np.linalg.norm(column_values(node.of, known), axis=1, keepdims=True))
    if isinstance(node, ex.Arithmetic | ex.Compare):
        left, right = column_values(node.left, known), column_values(node.right, known)
        with np.errstate(all="ignore"):  # what is not finite is counted and refused
            return np.asarray(_OPERATIONS[node.op](left, right), np.float64)
    if isinstance(node, ex.Constant):
        return np.full((len(known["", "prompt"]), 1), node.value)
    key = ("label", node.name) if isinstance(node, ex.Label) else ("", "position")
    return np.asarray(known[key], np.float64)[:, None]


_OPERATIONS: dict[str, Any] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide,
    "less": np.less, "greater": np.greater, "equal": np.equal,
}  # fmt: skip


def _result(work: _Work, expression: ex.Expression, run: Run) -> Result:
    from importlib.metadata import version

    assert work.rows is not None
    values: dict[str, Any] = dict(work.values)
    if isinstance(work.reduction, ex.Top):
        ids = run.prompts["id"]
        values = {
            "value": values["value"], "position": values["position"],
            "prompt": np.array([str(ids.loc[int(number)]) for number in values["prompt"]]),
        }  # fmt: skip
    elif work.groups is None:
        values = {name: value if name == "edges" else value[0] for name, value in values.items()}
    provenance: dict[str, Any] = {
        "run": run.name, "run_id": run.plan.spec.id, "expression": expression.to_wire(), "millpond": version("millpond")
    }  # fmt: skip
    if work.groups is not None:
        provenance["groups"] = work.groups.tolist()
        values |= {"rows": work.rows, "prompts_by_group": np.array([len(one) for one in work.prompts])}
    evidence = {"rows": int(work.rows.sum()), "prompts": len(np.unique(np.concatenate(work.prompts)))}
    return Result(f"expression-{work.reduction.op}", values, evidence=evidence, provenance=provenance)
