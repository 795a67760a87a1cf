"""Probes for every hook, label and strength of a run, fitted in shared passes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.controls import random_directions, shuffle_labels
from millpond.analysis.evaluation import Judged, check_every_class, count_groups, judge, result_of
from millpond.analysis.label_sources import check_parts, named_sources, part_groups, part_labels
from millpond.analysis.metrics import METRICS, Task, group_codes
from millpond.analysis.probes import inputs
from millpond.analysis.probes.base import LinearProbe, check_folds, cross_validate, evidence_of
from millpond.analysis.probes.targets import Design, Problem, Targets
from millpond.analysis.remote import stays
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from millpond.analysis.label_sources import LabelSource as LabelSource
    from millpond.analysis.label_sources import Part
    from millpond.analysis.probes.linear import Linear

Key = tuple[str, str, float]

CONTROLS = ("shuffled", "random direction")


@dataclass(frozen=True)
class Sweep:
    """Fitted probes and how well each does on the test part."""

    rows: tuple[dict[str, Any], ...]
    """One record a probe; see `table`."""
    probes: Mapping[Key, LinearProbe]
    """Fitted probes by (hook, label, strength)."""
    controls: Mapping[Key, LinearProbe]
    """Probes fitted to the shuffled labels, by the same keys."""
    results: Mapping[Key, Result]
    """Evaluations of `probes`, by the same keys."""
    provenance: Mapping[str, Any]
    main: Mapping[str, str] = field(default_factory=dict)
    """The metric by which probes of each label are compared: AUROC or R2."""

    def table(self) -> pd.DataFrame:
        """One row a probe: hook, layer, label, C, control, metrics with `_low` and `_high`, counts, convergence.

        `random_direction` is the main metric of a random direction, `selectivity` that of the probe minus that of
        its shuffled control (Hewitt and Liang, 2019), `cv_loss` the loss on left-out training prompts.
        """
        import pandas as pd

        return pd.DataFrame(list(self.rows)).astype({"layer": "Int64"})

    def best(self, label: str | None = None) -> LinearProbe:
        """The best probe, of `label` if given; its `evaluation_` is a Result with intervals.

        With `cv` it is chosen on left-out training prompts, so that its test score is honest; without, it has the
        highest test score, which is a maximum over many probes and so slightly too high.
        """
        rows = [row for row in self.rows if not row["control"] and label in (None, row["label"])]
        if not rows:
            raise InvalidInput(f"label {label!r} is not in this sweep, which has {', '.join(self.labels)}")
        if "cv_loss" in rows[0]:
            top = min(rows, key=lambda row: float(row["cv_loss"]))
        else:
            top = max(rows, key=lambda row: float(row[self.main[row["label"]]]))
        if not self.probes:
            raise stays("the probes of this sweep are", f"fit the one you want: the best is of {top['hook']}")
        return self.probes[self._key(top)]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order given."""
        return tuple(dict.fromkeys(row["label"] for row in self.rows))

    def _key(self, row: Mapping[str, Any]) -> Key:
        return row["hook"], row["label"], row.get(self.provenance["strength"], 0.0)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Test AUROC (or R2) by layer with 95 % bands: one line a label at its best strength of each hook.

        Dashed: its shuffled control; dotted: a random direction.
        """
        from millpond.store.figures import new_figure

        if ax is None:
            ax = new_figure().subplots()
        table = self.table()
        hooks = list(dict.fromkeys(table["hook"]))
        layers = [layer_of(hook) for hook in hooks]
        by_layer = None not in layers and len(set(layers)) == len(layers)
        places: dict[str, Any] = dict(zip(hooks, layers if by_layer else range(len(hooks)), strict=True))
        for number, label in enumerate(self.labels):
            metric, color = self.main[label], f"C{number % 10}"
            for control in (False, True):
                part = table[(table["label"] == label) & (table["control"] == control)]
                if part.empty:
                    continue
                part = part.loc[part.groupby("hook", sort=False)[metric].idxmax()]
                x = part["hook"].map(places).to_numpy()
                if control:
                    ax.plot(x, part[metric], color=color, linestyle="--", label=f"{label} (shuffled)")
                    continue
                ax.plot(x, part[metric], color=color, marker="o", label=label)
                if f"{metric}_low" in part:
                    low, high = part[f"{metric}_low"], part[f"{metric}_high"]
                    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                if "random_direction" in part:
                    ax.plot(
                        x, part["random_direction"], color=color, linestyle=":", label=f"{label} (random direction)"
                    )
        ax.set_xticks(list(places.values()), [str(place) for place in places.values()] if by_layer else hooks)
        if not by_layer:
            ax.tick_params("x", rotation=45)
        ax.set_xlabel("layer" if by_layer else "hook")
        names = {"auroc": "AUROC", "r2": "R2"}
        ax.set_ylabel(f"{' or '.join(names[name] for name in dict.fromkeys(self.main.values()))} on the test part")
        ax.legend()
        return ax.get_figure()  # type: ignore[return-value]

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.jsonl` (one line a probe) and `table.json` (the same, with provenance) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in self.rows]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        table = {"rows": list(self.rows), "provenance": dict(self.provenance)}
        (folder / "table.json").write_text(json.dumps(table, indent=1, default=str) + "\n")
        return folder

    def __repr__(self) -> str:
        hooks = len({row["hook"] for row in self.rows})
        probes = sum(not row["control"] for row in self.rows)
        return f"<Sweep: {probes} probes, {hooks} hooks, labels {', '.join(self.labels)}>"

    def _repr_html_(self) -> str:
        table = self.table()
        mains = [name for main in dict.fromkeys(self.main.values()) for name in (main, f"{main}_low", f"{main}_high")]
        wanted = [
            "hook", "label", self.provenance["strength"], "control", *mains, "selectivity", "random_direction",
            "accuracy", "log_loss", "cv_loss", "n_test", "prompts_test",
        ]  # fmt: skip
        columns = [name for name in wanted if name in table]
        return table[columns].to_html(index=False, float_format="{:.4f}".format, border=0)


@dataclass(frozen=True)
class _Column:
    """One label of the training and test rows, as it is or shuffled."""

    label: str
    control: bool
    classes: NDArray[Any] | None
    class_weight: tuple[float, ...] | None
    train: NDArray[Any]
    test: NDArray[Any]
    evidence: dict[str, int]

    def task(self, probe: LinearProbe, n_groups: int) -> Task:
        if self.classes is None:
            return Task("regression", 2, False, n_groups, float(self.test.mean()))
        kind = "binary" if len(self.classes) == 2 else "multiclass"
        return Task(kind, len(self.classes), probe.probabilistic, n_groups)  # type: ignore[arg-type]


def run_sweep(
    probe: LinearProbe,
    train: Part,
    test: Part,
    hooks: str | Sequence[str],
    labels: Any,
    strengths: float | Sequence[float] | None = None,
    *,
    cv: int | None = None,
    controls: Sequence[str] = CONTROLS,
    groups: str | None = None,
    seed: int = 0,
    n_bootstrap: int = 1000,
    fpr: float = 0.01,
) -> Sweep:
    """Fit `probe`'s model for every hook, label and strength on `train`, and evaluate each on `test`.

    All problems share each pass over the training rows, and all problems of a hook one pass over its
    test rows. Labels are held in memory (one byte a row and label), scores never.

    Args:
        probe: gives the parameters, and the strengths (C, alpha, shrinkage) where none are given.
        train: the part to fit on, a run or a view of its tokens.
        test: the part to evaluate on; intervals resample its prompts.
        hooks: names or globs.
        labels: names of labels of the runs, or a mapping from a name of your own to such a name, to
            a function of a run, as in `{"inside": lambda run: run.labels["bracket_depth"] > 0}`, or to
            values by prompt id (a mapping or a pandas Series).
        strengths: one or several values.
        cv: folds of the training part, whole groups together, for `cv_loss`; `best` then goes by it.
        controls: `shuffled` adds for each hook, label and strength a probe of the same label with its values
            permuted over the rows of each part (over prompts, if it is constant in each), whose AUROC is 0.5
            unless rows leak between the parts; `random direction` scores one for each hook and label.
        groups: column of `run.prompts` to keep together in place of prompts: parts must not share its
            values, and intervals and folds go by it.
        seed: of the controls, the folds and the intervals.
        n_bootstrap: resamples behind the intervals.
        fpr: false-positive rate at which recalls are taken.

    Raises:
        InvalidInput: a label does not suit the probe.
        OneClass, MissingLabels, UnknownPrompts: a label lacks a class or a value, or names other prompts.
        OverlappingGroups: the parts share prompts or groups.
        HookNotCaptured: a run does not hold a hook.
        RunOpen: a run may still grow.
    """
    probe.check_parameters()
    names = train.match(hooks)
    for name in names:
        test.match(name)
    values = probe.strengths(strengths)
    if odd := [name for name in controls if name not in CONTROLS]:
        raise InvalidInput(f"controls holds {odd[0]!r}; choose from {', '.join(CONTROLS)}")
    check_parts(train, test, groups)
    train_groups, test_groups = part_groups(train, groups), part_groups(test, groups)
    prompts = [inputs.to_memory(part.tokens["prompt"]) for part in (train, test)]
    columns = []
    for label, source in named_sources(labels).items():
        column = _column(probe, label, source, train, test, prompts[0])
        columns.append(column)
        if "shuffled" in controls:
            columns.append(_shuffled(column, prompts, seed))
    folds = None if cv is None else inputs.assign_folds(train_groups, len(train), cv, seed)
    if folds is not None:
        for column in columns:
            if column.classes is not None:
                check_folds(column.train, folds, len(column.classes), f"label {column.label!r}")
    targets = Targets.of(
        [column.train for column in columns],
        [1 if column.classes is None else len(column.classes) for column in columns],
        [column.class_weight for column in columns],
        None,
        folds,
    )
    problems = [Problem(number, value) for number in range(len(columns)) for value in values]
    real = [problem for problem in problems if not columns[problem.label].control]
    left_out = [Problem(p.label, p.strength, fold) for p in real for fold in range(targets.n_folds) if cv is not None]
    designs = [Design(name, train[name], targets) for name in names]
    solved = probe.solve(designs, problems + left_out)
    asked = [number for number, column in enumerate(columns) if not column.control]
    chance: list[list[Linear]] = [[] for _ in designs]
    if "random direction" in controls:
        chance = random_directions(designs, [found[0].shift for found in solved], asked, seed, progress=probe.progress)
    code, n_groups = group_codes(test_groups, len(test))
    tasks = [column.task(probe, n_groups) for column in columns]
    tested = [column.test for column in columns]
    rows: list[dict[str, Any]] = []
    fitted: dict[bool, dict[Key, LinearProbe]] = {False: {}, True: {}}
    results: dict[Key, Result] = {}
    train_prompts = np.unique(prompts[0])
    for design, found, random in zip(designs, solved, chance, strict=True):
        loss = cross_validate(probe, design, left_out, found[len(problems) :]) if left_out else None
        judged = [Judged(one, p.label, tasks[p.label]) for p, one in zip(problems, found, strict=False)]
        judged += [Judged(one, number, tasks[number]) for number, one in zip(asked, random, strict=False)]
        source = inputs.source_of(design.X)
        evaluations = judge(
            test[design.name], judged, tested, code,
            n_bootstrap=n_bootstrap, seed=seed, fpr=fpr, progress=probe.progress,
        )  # fmt: skip
        by_label = dict(zip(asked, evaluations[len(problems) :], strict=False))
        shuffled = {
            (columns[p.label].label, p.strength): evaluation
            for p, evaluation in zip(problems, evaluations, strict=False)
            if columns[p.label].control
        }
        for number, (problem, linear) in enumerate(zip(problems, found, strict=False)):
            column, evaluation = columns[problem.label], evaluations[number]
            key = (design.name, column.label, problem.strength)
            one = _fitted(probe, problem.strength, linear, column, source, train_prompts)
            fitted[column.control][key] = one
            metrics = METRICS[tasks[problem.label].kind]
            count_groups(evaluation.evidence, prompts[1], groups is not None)
            row: dict[str, Any] = {"hook": design.name, "layer": layer_of(design.name), "label": column.label}
            if probe.strength is not None:
                row[probe.strength] = problem.strength
            row["control"] = column.control
            for metric in (name for name in metrics if name in evaluation.values):
                row[metric] = evaluation.values[metric]
                if metric in evaluation.intervals:
                    row[f"{metric}_low"], row[f"{metric}_high"] = evaluation.intervals[metric]
            extra: dict[str, float] = {}
            if not column.control:
                if problem.label in by_label:
                    extra["random_direction"] = by_label[problem.label].values[metrics[0]]
                if (column.label, problem.strength) in shuffled:
                    control = shuffled[column.label, problem.strength].values[metrics[0]]
                    extra |= {"shuffled": control, "selectivity": evaluation.values[metrics[0]] - control}
                if loss is not None:
                    first = real.index(problem) * targets.n_folds
                    extra["cv_loss"] = float(loss[first : first + targets.n_folds].mean())
                evaluation.values.update(extra)
                settings = {
                    "evaluated_on": inputs.source_of(test[design.name]), "label": column.label,
                    "n_bootstrap": n_bootstrap, "seed": seed, "fpr": fpr, "groups": groups or "prompt", "cv": cv,
                }  # fmt: skip
                results[key] = one.evaluation_ = result_of(one, evaluation, settings)
            rows.append(row | extra | _counts(column, evaluation.evidence, one))
    provenance = probe.provenance() | {
        "run": train.name, "test_run": test.name, "seed": seed, "strength": probe.strength, "cv": cv,
    }  # fmt: skip
    main = {column.label: METRICS[task.kind][0] for column, task in zip(columns, tasks, strict=True)}
    return Sweep(tuple(rows), fitted[False], fitted[True], results, provenance, main)


def _column(probe: LinearProbe, label: str, source: Any, train: Part, test: Part, prompts: NDArray[Any]) -> _Column:
    y, truth = part_labels((train, test), label, source)
    name = f"label {label!r} of the training part"
    classes, column, weight = probe.encode(y, name, None)
    if classes is None:
        target = truth.astype(np.float64)
    else:
        target = inputs.codes_of(truth, classes, f"label {label!r} of the test part")
        check_every_class(target, classes, f"label {label!r}")
    return _Column(label, False, classes, weight, column, target, evidence_of(column, classes, prompts, None))


def _shuffled(column: _Column, prompts: Sequence[NDArray[Any]], seed: int) -> _Column:
    train, test = (
        shuffle_labels(values, of_part, f"{column.label} {what}", seed)
        for values, of_part, what in zip((column.train, column.test), prompts, ("train", "test"), strict=True)
    )
    return _Column(column.label, True, column.classes, column.class_weight, train, test, column.evidence)


def _fitted(
    like: LinearProbe, strength: float, linear: Linear, column: _Column, source: dict[str, Any], prompts: NDArray[Any]
) -> LinearProbe:
    given = {} if like.strength is None else {like.strength: strength}
    one = type(like)(**(like.get_params() | given))
    one.trained_on_ = source | {"label": column.label} | ({"control": True} if column.control else {})
    one.train_prompts_ = prompts
    return one.take(linear, column.classes, column.evidence, strength)


def _counts(column: _Column, test: Mapping[str, int], one: LinearProbe) -> dict[str, Any]:
    counts: dict[str, Any] = {"n_train": len(column.train), "n_test": len(column.test)}
    if column.classes is not None and len(column.classes) == 2:
        counts |= {"positives_train": column.evidence["positives"], "positives_test": test["positives"]}
    if "groups" in test:
        counts["groups_test"] = test["groups"]
    return counts | {
        "prompts_train": column.evidence["prompts"], "prompts_test": test["prompts"],
        "residual_dof": one.evidence_["residual_dof"], "n_iter": int(one.n_iter_[0]), "converged": one.converged_,
    }  # fmt: skip


def layer_of(hook: str) -> int | None:
    """The layer in a hook's name; None if it has none."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    return int(match.group(1)) if match else None
