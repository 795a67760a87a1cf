"""`millpond probe`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from millpond.analysis.jobs import ProbeJob


@dataclass(frozen=True)
class Probe:
    """Fit probes for hooks and labels of a run on a Dask cluster; a killed job is resumed by giving it again."""

    job: Annotated[Path | None, tyro.conf.Positional] = None
    """A TOML file with the settings below; those given as flags come before the file's."""
    settings: Annotated[ProbeJob, tyro.conf.OmitArgPrefixes] = field(default_factory=ProbeJob)
    """What to fit, and where."""

    def run(self) -> int:
        """Run the job."""
        from millpond.analysis.jobs import run_probe_job

        done = run_probe_job(self.settings, progress=sys.stderr.isatty())
        again = f", {done.resumed} hooks from before" if done.resumed else ""
        print(f"{len(done.rows)} probes, controls included{again}; results are in {done.folder}")
        return 0
