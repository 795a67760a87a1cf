"""A lake's state in Prometheus' text format, worked out anew whenever it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from millpond.store.errors import MillpondError

if TYPE_CHECKING:
    from millpond.store.lake import Lake

Sample = tuple[str, str, float]
"""Name, labels with their braces or nothing, value."""

HELP = {
    "millpond_run_rows": "Visible rows of a run.",
    "millpond_run_prompts": "Visible prompts of a run.",
    "millpond_run_dropped_rows": "Rows of a run that retention took away.",
    "millpond_run_parts": "Segments that a run's rows lie in; 1 after sealing.",
    "millpond_run_activation_bytes": "Uncompressed bytes of a run's activations.",
    "millpond_run_sealed": "1 if the run is sealed.",
    "millpond_run_unreadable": "1 if the run cannot be opened.",
    "millpond_lake_bytes": "Bytes of all objects of all runs.",
    "millpond_lake_quota_bytes": "Most bytes that the lake may have.",
    "millpond_lake_deleted_runs": "Removed runs that can still be restored.",
}


def metrics(lake: Lake) -> str:
    """The lake's metrics in the text exposition format 0.0.4."""
    from millpond.store.configuration import read_configuration, used_bytes

    samples: list[Sample] = []
    for name in lake.runs():
        label = f'{{run="{name}"}}'  # run names need no escaping
        try:
            run = lake[name]
        except MillpondError:
            samples.append(("millpond_run_unreadable", label, 1))
            continue
        samples += [
            ("millpond_run_unreadable", label, 0),
            ("millpond_run_rows", label, run.n_rows),
            ("millpond_run_prompts", label, int(run.plan.chosen.sum())),
            ("millpond_run_dropped_rows", label, run.n_dropped_rows),
            ("millpond_run_parts", label, int((~run.snapshot.dropped_parts).sum())),
            ("millpond_run_activation_bytes", label, run.nbytes),
            ("millpond_run_sealed", label, run.state == "sealed"),
        ]
    samples.append(("millpond_lake_bytes", "", used_bytes(lake)))
    quota = read_configuration(lake).quota_bytes
    if quota is not None:
        samples.append(("millpond_lake_quota_bytes", "", quota))
    samples.append(("millpond_lake_deleted_runs", "", sum(1 for _ in lake.storage.list("deleted"))))
    return exposition(HELP, samples)


def exposition(help_texts: Mapping[str, str], samples: Iterable[Sample]) -> str:
    """The samples in the text exposition format 0.0.4, in the order of `help_texts`; `..._total` are counters.

    Raises:
        KeyError: a sample has no text, and so no entry in the handbook.
    """
    lines = []
    held = list(samples)
    if strange := {name for name, _, _ in held} - set(help_texts):
        raise KeyError(f"{min(strange)} has no help text")
    for name, text in help_texts.items():
        of_name = [sample for sample in held if sample[0] == name]
        if of_name:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
            lines += [
                f"{name}{label} {value:g}\n" if value < 1e6 else f"{name}{label} {int(value)}\n"
                for _, label, value in of_name
            ]
    return "".join(lines)
