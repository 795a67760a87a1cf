"""A sweep of rows that are elsewhere: asked for as a job, put together from what is released of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis.label_sources import named_sources
from millpond.analysis.sweep import Sweep, layer_of
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.analysis.probes.base import LinearProbe
    from millpond.analysis.remote import Backend


def hand_over_sweep(
    backend: Backend,
    probe: LinearProbe,
    train: Any,
    test: Any,
    hooks: str | Sequence[str],
    labels: Any,
    *,
    control: bool,
) -> Sweep:
    """The sweep of rows that are elsewhere; its probes and their controls stay there.

    Raises:
        InvalidInput: a label is no name of the run's.
    """
    probe.check_parameters()
    names, sources = train.match(hooks), named_sources(labels)
    if odd := [name for name, source in sources.items() if source != name]:
        raise InvalidInput(f"label {odd[0]!r} is made from values; add it with run.labels.add and give its name")
    wanted = {"estimator": probe.specification(), "hooks": names, "labels": tuple(sources)}
    parts = wanted | {"train": train, "test": test, "control": control}

    def finish(results: Sequence[Result], made: Sequence[Any]) -> Sweep:
        rows = [
            row
            for label, result in zip(sources, results, strict=True)
            for row in _sent_rows(probe, names, label, result, control)
        ]
        kept = {
            (row["hook"], row["label"], float(row.get(probe.strength or "", 0.0))): _sent_result(row)
            for row in rows
            if not row["control"]
        }
        facts = {"run": train.name, "test_run": test.name, "seed": 0, "strength": probe.strength, "cv": None}
        return Sweep(tuple(rows), {}, {}, kept, probe.provenance() | facts, dict.fromkeys(sources, "auroc"))

    return backend.submit("sweep", parts, finish, progress=probe.progress).result()


def _sent_rows(
    probe: LinearProbe, names: Sequence[str], label: str, result: Result, control: bool
) -> list[dict[str, Any]]:
    """Records of one label's answer: for each hook its strengths, and then the same of the controls."""
    strengths = probe.strengths()
    arrays = {name: np.asarray(value) for name, value in result.values.items() if isinstance(value, np.ndarray)}
    places = [(again, name, value) for again in range(1 + control) for name in names for value in strengths]
    if any(array.shape != (len(places),) for array in arrays.values()) or "auroc" not in arrays:
        raise InvalidInput(f"the answer has {[a.shape for a in arrays.values()]} values for {len(places)} probes")
    counts = {f"{what}_test": int(result.values[what]) for what in ("rows", "prompts") if what in result.values}
    rows = []
    for at, (again, name, value) in enumerate(places):
        row: dict[str, Any] = {"hook": name, "layer": layer_of(name), "label": label}
        if probe.strength is not None:
            row[probe.strength] = value
        row["control"] = bool(again)
        row |= {metric: float(array[at]) for metric, array in arrays.items()}
        if control and not again:
            shuffled = float(arrays["auroc"][at + len(places) // 2])
            row |= {"shuffled": shuffled, "selectivity": row["auroc"] - shuffled}
        rows.append(row | {"n_test" if key == "rows_test" else key: count for key, count in counts.items()})
    return rows


def _sent_result(row: Mapping[str, Any]) -> Result:
    metrics = [name for name in row if f"{name}_low" in row]
    intervals = {name: (row[f"{name}_low"], row[f"{name}_high"]) for name in metrics}
    counts = {name: row[f"{key}_test"] for name, key in (("rows", "n"), ("prompts", "prompts")) if f"{key}_test" in row}
    where = {"trained_on": {"hook": row["hook"], "label": row["label"]}}
    return Result("probe-evaluation", {name: row[name] for name in metrics}, intervals, counts, where)
