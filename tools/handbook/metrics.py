"""The reference of every metric, from the tables that the code writes them by."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.capture.metrics import HELP as CAPTURE
from millpond.hub.metrics import HELP as HUB
from millpond.store.metrics import HELP as STORE

_INTRO = """# Metrics

Prometheus' text format, from three sources. Numbers of rows, jobs and bytes depend on what people do with a model's internals: they are
for the vault's own monitoring, and leave the vault through the egress meter or not at all.

| source | where |
|---|---|
| capture | `millpond serve`: the server's `/metrics`, beside vLLM's own |
| capture | `millpond worker --metrics FOLDER`, `millpond capture --metrics FOLDER`, or `MILLPOND_METRICS=FOLDER` in the \
environment of any engine: `FOLDER/millpond_capture_PID.prom`, renewed every 2 seconds, for node_exporter's textfile collector |
| lake | `millpond metrics LAKE > FOLDER/lake.prom`, from a timer |
| jobs, gate and budgets | `millpond metrics LAKE --config gateway.toml` |

`/metrics` of an engine is as open as its API: keep both inside the vault's network, as the NetworkPolicies of `examples/deploy` do.

Those of capture have the labels `pid` and `rank`, of the engine's process (of a pipeline, the first stage writes for all), and `run`
where it says "of a run". A counter begins at 0 with its process.
"""


def metrics_page() -> str:
    """Every metric, by its source."""
    parts = [_INTRO]
    for title, table in (("Capture", CAPTURE), ("Lake", STORE), ("Jobs, gate and budgets", HUB)):
        parts.append(f"## {title}\n\n{_table(table)}")
    return "\n".join(parts)


def _table(help_texts: Mapping[str, str]) -> str:
    rows = ["| metric | type | |", "|---|---|---|"]
    for name, text in help_texts.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        rows.append(f"| `{name}` | {kind} | {text} |")
    return "\n".join(rows) + "\n"
