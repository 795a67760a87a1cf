"""The `millpond` command. Each subcommand is a frozen dataclass: its fields are the flags, their docstrings the help."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from millpond.store.commands import COMMANDS, one_line
from millpond.store.errors import InvalidInput, MillpondError


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
    **COMMANDS,
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
        code: int = command.run()
    except InvalidInput as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
        return 2
    except MillpondError as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
