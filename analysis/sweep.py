"""Probes for every hook, label and C of a run, fitted in shared passes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.metrics import METRICS, evaluate_scores
from millpond.analysis.passes import AlignedRows, InMemory, Pass, join, run_pass
from millpond.analysis.probes.descent import Problem
from millpond.analysis.probes.logistic import (
    LogisticProbe,
    binary,
    check_parameters,
    score_block,
    to_memory,
    two_classes,
)
from millpond.analysis.probes.solver import Design, Solution, solve
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from millpond.store.run import Run

LabelSource = Callable[["Run"], Any]
"""Takes a run and returns one value a row, such as `lambda run: run.labels["bracket_depth"] > 0`."""

Key = tuple[str, str, float]


@dataclass(frozen=True)
class Sweep:
    """Fitted probes and how well each does on the test part."""

    rows: tuple[dict[str, Any], ...]
    """One record a probe; see `table`."""
    probes: Mapping[Key, LogisticProbe]
    """Fitted probes by (hook, label, C)."""
    controls: Mapping[Key, LogisticProbe]
    """Probes fitted to the shuffled labels, by the same keys."""
    provenance: Mapping[str, Any]

    def table(self) -> pd.DataFrame:
        """One row a probe: hook, layer, label, C, control, metrics with `_low` and `_high`, counts, convergence."""
        import pandas as pd

        frame = pd.DataFrame(list(self.rows))
        return frame.astype({"layer": "Int64"})

    def best(self, label: str | None = None) -> LogisticProbe:
        """The probe with the highest test AUROC, of `label` if given.

        Its test score is a maximum over many probes, so slightly too high.
        """
        rows = [row for row in self.rows if not row["control"] and label in (None, row["label"])]
        if not rows:
            raise InvalidInput(f"label {label!r} is not in this sweep, which has {', '.join(self.labels)}")
        top = max(rows, key=lambda row: float(row["auroc"]))
        return self.probes[top["hook"], top["label"], top["C"]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order given."""
        return tuple(dict.fromkeys(row["label"] for row in self.rows))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Test AUROC by layer: one line a label at its best C of each hook, its shuffled control dashed."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        table = self.table()
        hooks = list(dict.fromkeys(table["hook"]))
        layers = [_layer(hook) for hook in hooks]
        by_layer = None not in layers and len(set(layers)) == len(layers)
        places: dict[str, Any] = dict(zip(hooks, layers if by_layer else range(len(hooks)), strict=True))
        for number, label in enumerate(self.labels):
            for control in (False, True):
                part = table[(table["label"] == label) & (table["control"] == control)]
                if part.empty:
                    continue
                part = part.loc[part.groupby("hook", sort=False)["auroc"].idxmax()]
                x, color = part["hook"].map(places).to_numpy(), f"C{number % 10}"
                if control:
                    ax.plot(x, part["auroc"], color=color, linestyle="--", label=f"{label} (shuffled)")
                else:
                    ax.plot(x, part["auroc"], color=color, marker="o", label=label)
                    low, high = part["auroc_low"], part["auroc_high"]
                    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ax.set_xticks(list(places.values()), [str(place) for place in places.values()] if by_layer else hooks)
        if not by_layer:
            ax.tick_params("x", rotation=45)
        ax.set_xlabel("layer" if by_layer else "hook")
        ax.set_ylabel("AUROC on the test part")
        ax.legend()
        return ax

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.jsonl` (one line a probe) and `table.json` (the same, with provenance) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in self.rows]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        table = {"rows": list(self.rows), "provenance": dict(self.provenance)}
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        return folder

    def __repr__(self) -> str:
        hooks = len({row["hook"] for row in self.rows})
        return f"<Sweep: {len(self.probes)} probes, {hooks} hooks, labels {', '.join(self.labels)}>"

    def _repr_html_(self) -> str:
        columns = [
            "hook",
            "label",
            "C",
            "control",
            "auroc",
            "auroc_low",
            "auroc_high",
            "accuracy",
            "log_loss",
            "n_test",
        ]
        return self.table()[columns].to_html(index=False, float_format="{:.4f}".format, border=0)


@dataclass(frozen=True)
class _Column:
    """One 0/1 label of the training and test rows, as it is or shuffled."""

    label: str
    control: bool
    classes: NDArray[Any]
    train: NDArray[np.uint8]
    test: NDArray[np.bool_]


def run_sweep(
    probe: LogisticProbe,
    train: Run,
    test: Run,
    hooks: str | Sequence[str],
    labels: str | Sequence[str] | Mapping[str, str | LabelSource],
    C: float | Sequence[float] | None = None,
    *,
    control: bool = True,
    seed: int = 0,
) -> Sweep:
    """Fit `probe`'s model for every hook, label and C on `train`, and evaluate each on `test`.

    All problems share each pass over the training rows, and all problems of a hook one pass over its
    test rows. Labels are held in memory (one byte a row each), and one hook's test scores at a time.

    Args:
        probe: gives the parameters, and C where `C` is not given.
        train: the part to fit on.
        test: the part to evaluate on; intervals resample its prompts.
        hooks: names or globs.
        labels: names of labels of the runs, or a mapping from a name of your own to such a name or to
            a function of a run, as in `{"inside": lambda run: run.labels["bracket_depth"] > 0}`.
        C: one or several values.
        control: add for each hook, label and C a probe of the same label with its values permuted over
            the rows of each part. Its AUROC is 0.5 unless rows leak between the parts.
        seed: of the permutations and the intervals.

    Raises:
        InvalidInput: a label is not binary or does not have both classes in both parts.
        HookNotCaptured: a run does not hold a hook.
    """
    check_parameters(probe)
    names = train.match(hooks)
    strengths = [float(value) for value in ([probe.C] if C is None else np.atleast_1d(np.asarray(C)))]
    if not all(value > 0 for value in strengths):
        raise InvalidInput(f"C is {C}; give numbers above 0")
    columns = []
    for name, source in _sources(labels).items():
        column = _column(name, source, train, test)
        columns += [column, _shuffled(column, seed)] if control else [column]
    targets = InMemory(np.stack([column.train for column in columns], axis=1))
    problems = [Problem(number, value) for number in range(len(columns)) for value in strengths]
    designs = [Design(name, AlignedRows(train[name], targets), problems) for name in names]
    solved = solve(
        designs, fit_intercept=probe.fit_intercept, tol=probe.tol, max_iter=probe.max_iter, progress=probe.progress
    )
    prompts = to_memory(test[names[0]].coords["prompt"])
    rows: list[dict[str, Any]] = []
    probes: dict[Key, LogisticProbe] = {}
    controls: dict[Key, LogisticProbe] = {}
    for name, solutions in zip(names, solved, strict=True):
        scores = _test_scores(test, name, solutions, probe.progress)
        for number, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
            column = columns[problem.label]
            trained_on = {"run": train.name, "hook": name, "label": column.label}
            fitted = _probe(probe, problem.C, solution, column, trained_on)
            (controls if column.control else probes)[name, column.label, problem.C] = fitted
            found = evaluate_scores(scores[:, number], column.test, prompts, seed=seed)
            row: dict[str, Any] = {
                "hook": name, "layer": _layer(name), "label": column.label, "C": problem.C, "control": column.control
            }  # fmt: skip
            for metric in METRICS:
                row[metric] = found.values[metric]
                row[f"{metric}_low"], row[f"{metric}_high"] = found.intervals[metric]
            row |= {
                "n_train": len(column.train), "positives_train": int(column.train.sum()),
                "n_test": len(column.test), "positives_test": int(column.test.sum()),
                "prompts_test": found.evidence["prompts"], "n_iter": solution.n_iter, "converged": solution.converged,
            }  # fmt: skip
            rows.append(row)
    provenance = {"estimator": "LogisticProbe", "parameters": probe.get_params(), "run": train.name, "seed": seed}
    return Sweep(tuple(rows), probes, controls, provenance)


def _sources(labels: str | Sequence[str] | Mapping[str, str | LabelSource]) -> dict[str, str | LabelSource]:
    if isinstance(labels, str):
        return {labels: labels}
    sources: dict[str, str | LabelSource] = {}
    sources.update(labels if isinstance(labels, Mapping) else {name: name for name in labels})
    if not sources:
        raise InvalidInput("labels is empty; name at least one label")
    return sources


def _column(name: str, source: str | LabelSource, train: Run, test: Run) -> _Column:
    values = []
    for run in (train, test):
        found = to_memory(source(run) if callable(source) else run.labels[source])
        if found.shape != (len(run),):
            raise InvalidInput(
                f"label {name!r} has shape {found.shape}; give one value for each of the {len(run):,} rows"
            )
        values.append(found)
    classes, codes = two_classes(values[0], f"label {name!r} of the training part")
    truth = binary(values[1], classes, f"label {name!r} of the test part")
    if truth.all() or not truth.any():
        raise InvalidInput(
            f"label {name!r} is {classes[int(truth[0])]} in all {len(truth):,} rows of the test part; "
            "take a larger test part or another seed for run.split"
        )
    return _Column(name, False, classes, codes, truth)


def _shuffled(column: _Column, seed: int) -> _Column:
    rng = np.random.default_rng([seed, zlib.crc32(column.label.encode())])
    return _Column(column.label, True, column.classes, rng.permutation(column.train), rng.permutation(column.test))


def _test_scores(test: Run, hook: str, solutions: Sequence[Solution], progress: bool) -> NDArray[Any]:
    """Log-odds (rows, problems) of the test rows."""
    state = (
        solutions[0].shift,
        np.stack([solution.coef for solution in solutions], axis=1),
        np.array([solution.intercept_shifted for solution in solutions]),
    )
    one = Pass(AlignedRows(test[hook]), score_block, state, join)
    parts = run_pass(one, description="test scores", progress=progress)
    return np.concatenate(parts)


def _probe(
    like: LogisticProbe, C: float, solution: Solution, column: _Column, trained_on: dict[str, Any]
) -> LogisticProbe:
    fitted = LogisticProbe(**(like.get_params() | {"C": C}))
    trained_on |= {"control": True} if column.control else {}
    return fitted.take_solution(solution, column.classes, trained_on)


def _layer(hook: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", hook)
    return int(match.group(1)) if match else None
