"""`millpond up` and `millpond doctor`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.workspace.up_config import UpConfig


@dataclass(frozen=True)
class Up:
    """Start everything on this machine: lake, gateway, executor, egress meter, JupyterHub and its notebooks. Needs root."""

    config: Annotated[Path | None, tyro.conf.Positional] = None
    """What to start; docs/workspace.md describes it. Not given with --demo."""
    demo: bool = False
    """Start with the example's model, two users, a run and notebooks, in `--state`."""
    state: Path = Path("millpond-demo")
    """Folder of the demo."""
    tokens: int = 100_000
    """Tokens of the demo's run."""
    worker: bool = True
    """Of the demo: start a capture worker too; it takes about 1.5 GB."""
    listen: str = ""
    """HOST:PORT of the demo in place of 127.0.0.1:8000."""

    def run(self) -> int:
        """Run until interrupted."""
        import asyncio

        from millpond.hub.workspace.up import run_up

        asyncio.run(run_up(self._read(), demo_tokens=self.tokens if self.demo else 0))
        return 0

    def _read(self) -> UpConfig:
        if self.demo:
            from millpond.hub.demo import find_example
            from millpond.hub.workspace.up import demo_config

            if self.config is not None:
                raise InvalidInput("give either a configuration file or --demo")
            return demo_config(self.state.resolve(), find_example(None), self.listen, worker=self.worker)
        from millpond.hub.workspace.up_config import read_up_config

        path = self.config or Path("lake.toml")
        if not path.exists():
            raise InvalidInput(f"{path} is not there; write one (docs/workspace.md), or try: millpond up --demo")
        return read_up_config(path)


@dataclass(frozen=True)
class Doctor:
    """Say what this machine lacks, or what of an installation does not answer from here, and what to do about it.

    Without flags, or with a file: what `millpond up` needs. With flags: what an installation on several hosts needs; give
    on each host what it uses.
    """

    config: Annotated[Path | None, tyro.conf.Positional] = None
    """As for `millpond up`; without it the defaults."""
    gateway: Path | None = None
    """The gateway's settings: looks at lake, clock, database, policy, certificates and cluster."""
    lake: str | None = None
    """Folder or URL of a lake: looks at it, its clock and its cluster."""
    queue: str | None = None
    """A capture worker's queue, with its token in MILLPOND_WORKER_TOKEN; looks at vLLM and GPUs too."""
    model: Path | None = None
    """Folder of a model that is captured here; looks at vLLM and GPUs too."""
    meter: str | None = None
    """Address at which notebooks and clients find the gateway: https://HOST:PORT of the egress meter."""
    cluster: bool = True
    """Look at the lake's cluster too; capture workers' hosts need not reach it."""

    def run(self) -> int:
        """Print one line a check; 1 if one fails."""
        from millpond.hub.doctor import Subject, examine

        subject = Subject(self.gateway, self.lake, self.queue, self.model, self.meter)
        looks = subject != Subject()
        subject = replace(subject, cluster=self.cluster)
        bad = False
        if self.config is not None or not looks:
            bad = self._machine()
        if looks:
            for finding in examine(subject):
                print(finding, flush=True)  # noqa: T201
                bad = bad or not finding.ok
        return int(bad)

    def _machine(self) -> bool:
        """What `millpond up` needs; whether anything is missing."""
        from millpond.hub.workspace.doctor import diagnose
        from millpond.hub.workspace.settings import Workspace
        from millpond.hub.workspace.up import settings_of
        from millpond.hub.workspace.up_config import read_up_config

        settings = (
            settings_of(read_up_config(self.config)) if self.config else Workspace(state=Path("/var/lib/millpond"))
        )
        found = diagnose(settings, running=settings.helper_socket.exists())
        for name, problems in found.items():
            print(f"{'ok  ' if not problems else 'FAIL'} {name}{': ' if problems else ''}{'; '.join(problems)}")  # noqa: T201
        return any(found.values())
