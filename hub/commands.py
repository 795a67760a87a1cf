"""`millpond jobs`, `metrics` and `demo`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from millpond.store.commands import Metrics as MetricsOfLake

if TYPE_CHECKING:
    from millpond.store.queue import QueuedJob


@dataclass(frozen=True)
class Jobs:
    """List the jobs of a queue."""

    queue: Annotated[str, tyro.conf.Positional]
    """Folder of the queue, or the URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""

    def run(self) -> int:
        """Print one line a job."""
        for job in self._jobs():
            about = job.error or _json(job.result or job.progress)
            if job.state == "queued" and job.model:
                about = f"waits for a worker of {job.model}"
            print(f"{job.id} {job.kind:8} {job.state:8} attempt {job.attempts} {job.worker or '':24} {about}")
        return 0

    def _jobs(self) -> Sequence[QueuedJob]:
        if "://" not in self.queue:
            from millpond.store.queue import FolderQueue

            return FolderQueue(self.queue).jobs()
        from millpond.hub.database import open_database
        from millpond.hub.queue import SqlQueue

        return SqlQueue(open_database(self.queue, create=False)).jobs()


@dataclass(frozen=True)
class Metrics(MetricsOfLake):
    """Print a lake's state in Prometheus' text format, for node_exporter's textfile collector."""

    config: Path | None = None
    """The gateway's settings: also print the state of jobs, reviews, ledger and budgets."""

    def run(self) -> int:
        """Print the metrics."""
        code = super().run()
        if self.config is not None:
            from millpond.hub.database import open_database
            from millpond.hub.metrics import hub_metrics
            from millpond.hub.policy import read_policy
            from millpond.hub.settings import read_settings

            settings = read_settings(self.config)
            engine = open_database(settings.database)
            print(hub_metrics(engine, read_policy(settings.policy)), end="")
            engine.dispose()
        return code


@dataclass(frozen=True)
class Demo:
    """The main job on real input: capture the example model, sweep probes, train an SAE, write a report."""

    out: Path = Path("demo")
    """Folder of the demo's lake, results and report."""
    tokens: int = 200_000
    """Tokens to capture."""
    sae_tokens: int = 2_000_000
    """Rows to train the autoencoder on, with repetition."""

    def run(self) -> int:
        """Run the demo and print the report's path."""
        from millpond.hub.demo import DemoConfig, run_demo

        run_demo(DemoConfig(out=self.out, tokens=self.tokens, sae_tokens=self.sae_tokens))
        return 0


def _json(value: dict[str, object]) -> str:
    return json.dumps(value) if value else ""
