"""Measures, on the very rows that a result is about, what the release rules judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, InMemory, Pass, run_pass
from millpond.analysis.tiles import Rows, decoded
from millpond.hub.cohort import cohort, distinct_prompts, largest_share, row_keys, shares
from millpond.hub.projects import Held
from millpond.hub.rules import Cohort, Evidence
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.store.run import Run

TOKEN_HOOKS = ("blocks.0.hook_resid_pre",)
"""Hooks whose rows are a function of the token (and its position)."""
MAX_CLASSES = 1000


@dataclass(frozen=True)
class Part:
    """Rows that a result is about."""

    held: Held
    whole: Run
    """The run that they are of."""
    view: Run
    codes: NDArray[np.int64] | None = None
    """Class or group of each row, if the result says something about each."""

    @property
    def restricted(self) -> bool:
        """Whether somebody else's prompts stand behind them; so too if nobody said whose they are."""
        return self.held.detail.get("prompts") != "own"


def class_codes(values: NDArray[Any]) -> NDArray[np.int64] | None:
    """Class of each row; None for numbers that are no classes."""
    found, codes = np.unique(values, return_inverse=True)
    if len(found) > MAX_CLASSES or (values.dtype.kind == "f" and not np.all(found == np.rint(found))):
        return None
    return codes.astype(np.int64)


def group_codes(values: NDArray[Any]) -> NDArray[np.int64]:
    """Group of each row, whatever the values are: each group is shown, so each is measured.

    Raises:
        InvalidInput: there are too many to measure.
    """
    found, codes = np.unique(values, return_inverse=True)
    if len(found) > MAX_CLASSES:
        raise InvalidInput(f"the label has {len(found):,} values; group by one of at most {MAX_CLASSES:,}")
    return codes.astype(np.int64)


def measure(
    parts: Sequence[Part],
    *,
    hooks: Sequence[str] = (),
    target: Literal["none", "label", "activation"] = "none",
    labels: Sequence[NDArray[Any]] = (),
    parameters: int = 0,
    custom: bool = False,
    behind: Sequence[Part] = (),
) -> Evidence:
    """The evidence of a result about `parts`.

    Args:
        parts: the rows; of several parts, such as those of fit and test, the weakest counts.
        hooks: whose activations the result shows; their spread is measured, in two passes.
        target: where what was predicted comes from.
        labels: values used, one array a part.
        parameters: fitted ones.
        custom: a client's graph computed the values.
        behind: rows that an artifact in use was fitted to: what it says of other rows shows these too. Of plain ones no
            rule asks more; they may be very many, so they are not looked at.

    Raises:
        InvalidInput: restricted prompts of several runs, whose cohorts cannot be compared.
    """
    every = (*parts, *behind)
    of_others = {part.whole.plan.spec.id: part.whole for part in every if part.restricted}
    if len(of_others) > 1:
        raise InvalidInput("restricted prompts of several runs are shown together; use one run")
    restricted = bool(of_others)
    clusters = {name: _clusters(run) for name, run in of_others.items()}
    shown = [*parts, *(part for part in behind if part.whole.plan.spec.id in of_others)]
    seen = [_look(part, clusters.get(part.whole.plan.spec.id)) for part in shown]
    found = Evidence(
        prompts_are="restricted" if restricted else "own",
        rows=min(one.rows for one in seen),
        prompts=min(one.prompts for one in seen),
        target=target,
        class_rows=tuple(count for one in seen for count in one.class_rows),
        class_prompts=tuple(count for one in seen for count in one.class_prompts),
        parameters=parameters,
        top_prompt_share=max(one.top for one in seen),
        top_two_share=max(one.two for one in seen),
        intervened=any(_intervened(part) for part in every),
        custom=custom,
        # a glob may name the hook too, so what it selects is looked at
        token_only=any(name in TOKEN_HOOKS for part in parts for hook in hooks for name in part.whole.match(hook)),
        cohorts=tuple(one for part in seen for one in part.cohorts) if restricted else (),
        label_set=_digest(labels) if labels else None,
    )
    spreads = [spread(part, hook) for part in parts for hook in hooks]
    if spreads:
        ratio, share = min(one[0] for one in spreads), max(one[1] for one in spreads)
        # what is fitted to numbers is linear in them: one far-out number makes it one row
        share = max(
            [share, *(_pull(values) for part, values in zip(parts, labels, strict=False) if part.codes is None)]
        )
        found = replace(found, variance_ratio=ratio, identical_share=share)
    return found


def is_plain(part: Part) -> bool:
    """Whether the prompts are the project's own and no intervention is in the run's history."""
    return not part.restricted and not _intervened(part)


def spread(part: Part, hook: str) -> tuple[float, float]:
    """Least variance of the whole and each class over the run's at `hook`, and the largest share of equal rows of any."""
    codes = np.zeros(len(part.view), np.int64) if part.codes is None else part.codes
    run_mean, run_variance = _run_moments(part.whole, hook)
    peak = run_pass(Pass(AlignedRows(part.view[hook], stored=True), _peak, combine=max), progress=False)
    state = (int(codes.max()) + 1, run_mean, peak / 1000 or 1.0)
    rows = AlignedRows(part.view[hook], InMemory(codes), stored=True)
    size = state[0] * len(run_mean) * 8
    n, total, square, keys = run_pass(Pass(rows, _moments, state, _join, result_bytes=size), progress=False)
    groups = [(n.sum(), total.sum(axis=0), square.sum())]
    groups += [(n[code], total[code], square[code]) for code in range(len(n)) if n[code]] if len(n) > 1 else []
    ratios = [
        float((squares / count - np.square(sums / count).sum()) / run_variance) if run_variance > 0 else 0.0
        for count, sums, squares in groups
    ]
    order = np.concatenate(keys)
    equal = [largest_share(order)] + [largest_share(order[codes == code]) for code in range(len(n)) if n[code]]
    return min(ratios), max(equal)


@dataclass(frozen=True)
class _Seen:
    rows: int
    prompts: int
    class_rows: tuple[int, ...]
    class_prompts: tuple[int, ...]
    top: float
    two: float
    cohorts: tuple[Cohort, ...]


def _look(part: Part, clusters: NDArray[np.int64] | None) -> _Seen:
    tokens = part.view.tokens
    prompts = tokens["prompt"].values.astype(np.int64)
    if not len(prompts):
        raise InvalidInput("the cohort has no rows")
    of_row = prompts if clusters is None else clusters[prompts]
    top, two = shares(of_row)
    groups = [] if part.codes is None else [part.codes == code for code in np.unique(part.codes)]
    cohorts: tuple[Cohort, ...] = ()
    if clusters is not None:
        rows = (prompts << 32) | tokens["position"].values.astype(np.int64)
        every = [np.ones(len(rows), bool), *groups]
        cohorts = tuple(cohort(of_row[chosen], rows[chosen]) for chosen in every)
    return _Seen(
        len(prompts),
        len(np.unique(of_row)),
        tuple(int(chosen.sum()) for chosen in groups),
        tuple(len(np.unique(of_row[chosen])) for chosen in groups),
        top,
        two,
        cohorts,
    )


_CLUSTERS: dict[str, NDArray[np.int64]] = {}
_MOST_CLUSTERS = 16


def _clusters(run: Run) -> NDArray[np.int64]:
    """The near-duplicate cluster of each prompt number of a sealed run, kept for the process."""
    key = run.plan.spec.id
    if key not in _CLUSTERS:
        while len(_CLUSTERS) >= _MOST_CLUSTERS:
            del _CLUSTERS[next(iter(_CLUSTERS))]
        tokens = run.tokens
        prompts, ids = tokens["prompt"].values.astype(np.int64), tokens["token_id"].values
        order = np.argsort(prompts, kind="stable")
        edges = np.flatnonzero(np.diff(prompts[order], prepend=-1))
        pieces = np.split(ids[order], edges[1:])
        found = np.full(int(run.prompt_table.index.max()) + 1, -1, np.int64)
        found[prompts[order][edges]] = distinct_prompts(pieces)
        _CLUSTERS[key] = found
    return _CLUSTERS[key]


def _intervened(part: Part) -> bool:
    """Whether the run's declaration, or that of a run that it was taken from, has an intervention."""
    todo: list[Any] = [dict(part.whole.provenance)]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if any(one.get(name) for name in ("interventions", "intervene")):
                return True
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return False


def _digest(labels: Sequence[NDArray[Any]]) -> str:
    total = hashlib.sha256()
    for values in labels:
        plain = values.astype("U") if values.dtype.kind not in "biuf" else values.astype(np.float64)
        total.update(np.ascontiguousarray(plain).tobytes())
    return total.hexdigest()


def _pull(values: NDArray[Any]) -> float:
    """The largest share of a row in the squared distance of numbers from their mean."""
    if values.dtype.kind not in "biuf":
        return 0.0
    away = np.square(values.astype(np.float64) - values.mean(dtype=np.float64))
    return float(away.max() / away.sum()) if away.sum() > 0 else 1.0


def _run_moments(run: Run, hook: str) -> tuple[NDArray[np.float64], float]:
    """Mean (d_model,) and total variance of a run's rows; kept since it was written, or one pass."""
    from millpond.analysis.statistics import describe

    found = describe(run, hook, progress=False)
    return np.asarray(found["mean"])[0], float(np.asarray(found["variance"]).sum())


def _peak(_: None, x: Rows) -> float:
    return float(np.abs(decoded(x)).max())


def _moments(
    state: tuple[int, NDArray[np.float64], float], x: Rows, codes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], list[NDArray[np.uint64]]]:
    classes, shift, unit = state
    rows = decoded(x)
    centred = rows.astype(np.float64) - shift
    n = np.bincount(codes, minlength=classes)
    total = np.zeros((classes, centred.shape[1]))
    if classes == 1:
        total[0] = centred.sum(axis=0)
    else:
        np.add.at(total, codes, centred)
    square = np.bincount(codes, weights=np.square(centred).sum(axis=1), minlength=classes)
    return n.astype(np.int64), total, np.asarray(square, np.float64), [row_keys(rows, unit)]


def _join(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
