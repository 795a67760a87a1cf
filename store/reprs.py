"""How lakes and runs show themselves: text and HTML, without reading an activation."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

from millpond.store.errors import MillpondError
from millpond.store.hooks import summarize_hooks

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.reads import ReadSpec
    from millpond.store.run import Run

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """`count` bytes in decimal units, such as 1.5 GB."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {UNITS[unit]}"


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What a reader wants to know of a run, in order; reads nothing.

    Labels that were added are among the facts once `run.labels` was looked at.
    """
    facts = [
        ("state", run.state),
        ("model", str(run.provenance.get("model", "unknown"))),
        ("hooks", f"{summarize_hooks(run.hooks)} ({len(run.hooks)})"),
        *([("reads", ", ".join(map(read_text, run.plan.spec.reads)))] if run.plan.spec.reads else []),
        ("rows", f"{run.n_rows:,} of {run.d_model} x {run.dtype}, {human_bytes(run.nbytes)}"),
        ("prompts", _prompts(run)),
    ]
    if run.n_dropped_rows:
        facts.append(("dropped", f"{run.n_dropped_rows:,} rows that were used and not kept"))
    labels = run.labels.known
    more = () if run.labels.looked_for else ("see run.labels",)
    if labels or more:
        facts.append(("labels", "; ".join([", ".join(labels), *more] if labels else more)))
    return facts


def read_text(read: ReadSpec) -> str:
    """One read in a few words."""
    what = "scores" if read.read == "probe" else f"of {read.d_sae:,} latents"
    return f"{read.name} ({read.width} {what}, at {read.hook})"


def _prompts(run: Run) -> str:
    whole = int(run.snapshot.visible.sum())
    part = "" if len(run.prompts) == whole else f", a part of the run's {whole:,}"
    return f"{len(run.prompts):,}{part}"


def run_text(run: Run) -> str:
    """The text repr of a run."""
    lines = [f"<Run {run.name!r}>", *(f"  {name + ':':9}{value}" for name, value in run_facts(run))]
    return "\n".join(lines)


def run_html(run: Run) -> str:
    """The HTML repr of a run."""
    return html_table(f"Run {run.name}", run_facts(run))


def lake_html(lake: Lake) -> str:
    """The HTML repr of a lake: a line a run."""
    rows = []
    for name in lake.runs():
        try:
            rows.append((name, "; ".join(value for _, value in run_facts(lake[name]))))
        except MillpondError as error:  # one broken run must not hide the others
            rows.append((name, str(error)))
    return html_table(f"Lake {lake.url}", rows or [("", "no runs")])


def html_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """An HTML table of names and values."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption style='text-align:left'><b>{html.escape(caption)}</b></caption>{cells}</table>"
