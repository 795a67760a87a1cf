"""Evaluating fitted probes: one pass over the test rows tallies every probe of a hook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.metrics import Evaluation, Tally, Task, check_scores, group_codes, merge_all
from millpond.analysis.passes import AlignedRows, InMemory, Pass, run_pass
from millpond.analysis.probes import inputs
from millpond.analysis.probes.linear import Linear, scores, stack
from millpond.analysis.tiles import Rows
from millpond.store.errors import InvalidInput, OneClass, OverlappingGroups
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray
    from millpond.analysis.probes.base import LinearProbe

TALLY_BYTES = 1 << 30
"""Probes are evaluated together as long as their tallies are smaller than this; more take another pass."""


@dataclass(frozen=True)
class Judged:
    """A fitted probe and the column of the test labels that it is compared with."""

    linear: Linear
    column: int
    task: Task


def evaluate_probe(
    probe: LinearProbe,
    X: RowArray,
    y: RowArray,
    groups: RowArray | None,
    *,
    n_bootstrap: int,
    seed: int,
    fpr: float,
    allow_overlap: bool,
) -> Result:
    """See `LinearProbe.evaluate`."""
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(probe)
    name = inputs.name_of(y, "y")
    inputs.check_sealed(X)
    X, labels = probe._check(X, y, reset=False)
    n_rows = int(X.shape[0])
    if labels.shape != (n_rows,):
        raise InvalidInput(f"X has {n_rows:,} rows and {name} {len(labels):,}; give one label a row")
    if not allow_overlap:
        check_overlap(probe, X)
    found = inputs.groups_of(X, groups)
    code, n_groups = group_codes(found, n_rows)
    regression = probe.kind == "regression"
    target = labels.astype(np.float64) if regression else inputs.codes_of(labels, probe.classes_, name)
    n_classes = 2 if regression else len(probe.classes_)
    if not regression:
        check_every_class(target, probe.classes_, name)
    center = float(target.mean()) if regression else 0.0
    task = Task(probe.kind, n_classes, probe.probabilistic, n_groups, center)
    [evaluation] = judge(
        X, [Judged(probe._linear, 0, task)], [target], code,
        n_bootstrap=n_bootstrap, seed=seed, fpr=fpr, progress=probe.progress,
    )  # fmt: skip
    source = inputs.source_of(X)
    settings = {"evaluated_on": source, "label": name, "n_bootstrap": n_bootstrap, "seed": seed, "fpr": fpr}
    count_groups(evaluation.evidence, inputs.groups_of(X, None), groups is not None)
    return result_of(probe, evaluation, settings)


def result_of(probe: LinearProbe, found: Evaluation, settings: dict[str, Any]) -> Result:
    """The evaluation with the evidence behind the fit and where both come from."""
    evidence = dict(found.evidence)
    if probe.kind == "multiclass":
        for number, value in enumerate(probe.classes_):
            evidence[f"class_{value}"] = evidence.pop(f"class_{number}")
    evidence |= {f"train_{name}": probe.evidence_[name] for name in ("rows", "prompts") if name in probe.evidence_}
    evidence["residual_dof"] = probe.evidence_["residual_dof"]
    provenance = probe.provenance() | {"trained_on": probe.trained_on_} | settings
    return Result("probe-evaluation", found.values, found.intervals, evidence, provenance)


def count_groups(evidence: dict[str, int], prompts: NDArray[Any] | None, grouped: bool) -> None:
    """Put right what a tally calls prompts: the groups that it was given, where prompts are known or were not given."""
    counted = evidence.pop("prompts")
    if grouped:
        evidence["groups"] = counted
    if prompts is not None:
        evidence["prompts"] = len(np.unique(prompts))


def check_overlap(probe: LinearProbe, X: Any) -> None:
    """Raises OverlappingGroups if the probe was fitted to prompts of `X`'s run that `X` holds, too."""
    seen, source = getattr(probe, "train_prompts_", None), inputs.source_of(X)
    prompts = getattr(X, "coords", {}).get("prompt")
    same = source and all(source.get(name) == probe.trained_on_.get(name) for name in ("run", "run_id"))
    if seen is None or prompts is None or not same:
        return
    shared = np.intersect1d(seen, inputs.to_memory(prompts))
    if len(shared):
        raise OverlappingGroups(
            f"the probe was fitted to {len(shared):,} of the prompts to evaluate on (the first is number {shared[0]}); "
            "use run.split, or allow_overlap=True to see its fit"
        )


def check_every_class(codes: NDArray[Any], classes: NDArray[Any], name: str) -> None:
    """Raises OneClass if the rows to evaluate lack a class."""
    rows = np.bincount(codes, minlength=len(classes))
    if (rows == 0).any():
        held = classes[rows > 0]
        if len(held) == 1:
            what = f"is {held[0]} in all {len(codes):,} rows"
        else:
            what = f"holds no row of class {classes[rows == 0][0]} in {len(codes):,} rows"
        raise OneClass(f"{name} {what} of the test part; take a larger test part or another seed for run.split")


def judge(
    X: Any,
    probes: Sequence[Judged],
    columns: Sequence[NDArray[Any]],
    groups: NDArray[Any],
    *,
    n_bootstrap: int,
    seed: int,
    fpr: float,
    progress: bool,
) -> list[Evaluation]:
    """Evaluate probes of one hook on its rows `X`, all in one pass if their tallies fit in `TALLY_BYTES`.

    Args:
        X: the rows of the hook.
        probes: fitted probes, of equal shift.
        columns: label columns (rows,) that `Judged.column` counts.
        groups: group code of each row.
        n_bootstrap: resamples behind the intervals.
        seed: of the resamples.
        fpr: false-positive rate at which recalls are taken.
        progress: show a bar.
    """
    held = [InMemory(np.ascontiguousarray(column)) for column in columns]
    of_group = InMemory(groups.astype(np.int32))
    tasks = [replace(one.task, share=len(probes)) for one in probes]
    size = max(1, TALLY_BYTES // max(task.nbytes for task in tasks))
    out = []
    for start in range(0, len(probes), size):
        some = probes[start : start + size]
        wanted = sorted({one.column for one in some})
        jobs = [
            (wanted.index(one.column), len(one.linear.coef), task)
            for one, task in zip(some, tasks[start : start + size], strict=True)
        ]
        exact = any(one.task.kind == "regression" for one in some)
        state = (stack([one.linear for one in some], exact=exact), jobs)
        rows = AlignedRows(X, of_group, *(held[number] for number in wanted), stored=True)
        tallies = run_pass(Pass(rows, _tally, state, merge_all), description="evaluation", progress=progress)
        out += [tally.finish(n_bootstrap=n_bootstrap, seed=seed, fpr=fpr) for tally in tallies]
    return out


def _tally(state: Any, x: Rows, group: NDArray[Any], *columns: NDArray[Any]) -> list[Tally]:
    linear, jobs = state
    z = scores(linear, x)
    check_scores(z)
    tallies, start = [], 0
    for column, width, task in jobs:
        tallies.append(Tally.of(task, z[:, start : start + width], columns[column], group))
        start += width
    return tallies
