"""The `millpond` command. Each subcommand is a frozen dataclass: its fields are the flags, their docstrings the help."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from millpond.analysis.jobs import ProbeJob, read_probe_job
from millpond.store.errors import InvalidInput, LakeCorrupt, MillpondError


class _Command(Protocol):
    def run(self) -> int: ...


@dataclass(frozen=True)
class Capture:
    """Capture the activations of a file of prompts into a new run, as a TOML file says."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file; docs/capture.md describes it."""
    dry_run: bool = False
    """Check everything and print tokens, bytes and an estimate of the time; write nothing."""
    resume: bool = False
    """Go on with the open run that an interrupted capture of the same job left."""

    def run(self) -> int:
        """Run the job."""
        from millpond.capture.job import run_capture
        from millpond.capture.plan import plan_capture
        from millpond.store.capture_spec import read_job
        from millpond.store.reprs import human_bytes

        plan = plan_capture(read_job(self.job), resume=self.resume)
        print(plan.summary(), flush=True)
        if self.dry_run:
            return 0
        done = run_capture(plan, resume=self.resume)
        print(
            f"run {done.run_name!r} is sealed: {done.rows:,} rows asked = {done.rows:,} stored, of {done.prompts:,} prompts; "
            f"{human_bytes(done.bytes)} in {done.seconds:.1f} s, {done.tokens_per_second:,.0f} tokens/s "
            f"(engine start {done.startup_seconds:.0f} s)"
        )
        return 0


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


@dataclass(frozen=True)
class Ls:
    """List the runs of a lake."""

    lake: Annotated[Path, tyro.conf.Positional]
    """Folder of the lake."""

    def run(self) -> int:
        """Print one line a run."""
        import millpond
        from millpond.store.reprs import human_bytes

        lake = millpond.open(self.lake)
        readable = True
        for name in lake.runs():
            try:
                run = lake[name]
            except LakeCorrupt as error:
                print(f"{name:32} {_one_line(error)}")
                readable = False
                continue
            print(
                f"{name:32} {run.state:7} {len(run.prompts):>9,} prompts {run.n_rows:>13,} rows "
                f"{len(run.hooks):>3} hooks {human_bytes(run.nbytes):>10}"
            )
        return 0 if readable else 1


@dataclass(frozen=True)
class Show:
    """Show what a run holds and where it came from."""

    lake: Annotated[Path, tyro.conf.Positional]
    """Folder of the lake."""
    name: Annotated[str, tyro.conf.Positional]
    """The run."""

    def run(self) -> int:
        """Print the run's facts and provenance."""
        import json

        import millpond

        run = millpond.open(self.lake)[self.name]
        print(run)
        print("  provenance:")
        for line in json.dumps(run.provenance, indent=2).splitlines()[1:-1]:
            print("  " + line)
        return 0


@dataclass(frozen=True)
class Verify:
    """Check every byte, count and value of a lake's runs against their manifests."""

    lake: Annotated[Path, tyro.conf.Positional]
    """Folder of the lake."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The runs; all of them by default."""

    def run(self) -> int:
        """Print one line a run and one a problem; 1 if there is any."""
        import millpond
        from millpond.store.reprs import human_bytes
        from millpond.store.verify import verify_run

        lake = millpond.open(self.lake)
        whole = True
        for name in self.names or lake.runs():
            try:
                found = verify_run(lake[name], progress=sys.stderr.isatty())
            except LakeCorrupt as error:
                print(f"{name}: {_one_line(error)}")
                whole = False
                continue
            verdict = "whole" if found.ok else f"{len(found.problems)} problems"
            print(
                f"{name}: {verdict}; {found.rows:,} rows, {found.prompts:,} prompts, "
                f"{found.files} files, {human_bytes(found.bytes)} checked"
            )
            for problem in found.problems:
                print(f"  {problem}")
            whole = whole and found.ok
        return 0 if whole else 1


@dataclass(frozen=True)
class Rm:
    """Remove a run and everything in it."""

    lake: Annotated[Path, tyro.conf.Positional]
    """Folder of the lake."""
    name: Annotated[str, tyro.conf.Positional]
    """The run."""

    def run(self) -> int:
        """Remove the run."""
        import millpond

        millpond.open(self.lake).delete(self.name)
        print(f"removed run {self.name!r}")
        return 0


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


_COMMANDS: dict[str, Callable[..., _Command]] = {
    "capture": Capture,
    "probe": Probe,
    "ls": Ls,
    "show": Show,
    "verify": Verify,
    "rm": Rm,
    "demo": Demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failed run, 2 for input that cannot be used, 130 when interrupted."""
    if arguments is None:
        arguments = sys.argv[1:]
    if list(arguments) == ["--version"]:
        import millpond

        print(f"millpond {millpond.__version__}")
        return 0
    command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="millpond", args=arguments, description="Activations of language models, next to the GPUs."
    )
    try:
        if isinstance(command, Probe) and command.job is not None:  # once more, with the file's settings as defaults
            command = replace(command, settings=read_probe_job(command.job))
            command = tyro.cli(Probe, prog="millpond probe", args=arguments[1:], default=command)
        code: int = command.run()
    except InvalidInput as error:
        print(f"millpond: {_one_line(error)}", file=sys.stderr)
        return 2
    except MillpondError as error:
        print(f"millpond: {_one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            "millpond: interrupted; an open run keeps what was committed (millpond capture --resume)", file=sys.stderr
        )
        return 130
    return code


def _one_line(error: MillpondError) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
