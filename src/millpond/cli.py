"""The `millpond` command. Each subcommand is a frozen dataclass: its fields are the flags, their docstrings the help."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import tyro

from millpond.analysis.commands import Probe
from millpond.analysis.jobs import read_probe_job
from millpond.capture.commands import Capture, Seal, Serve, Submit, Verify, Worker
from millpond.hub.commands import Demo, Jobs, Metrics
from millpond.hub.gateway_commands import (
    Executor,
    Gateway,
    ProjectHold,
    ProjectNew,
    ProjectRole,
    ReleaseVerify,
    TokenNew,
)
from millpond.hub.ledger_commands import (
    BudgetApprove,
    BudgetPlan,
    BudgetRaise,
    BudgetShow,
    LedgerAlerts,
    LedgerVerify,
)
from millpond.hub.queue_commands import QueueServe, QueueToken
from millpond.hub.sae_commands import SaeCommand
from millpond.hub.workspace.commands import Doctor, Up
from millpond.store.commands import COMMANDS, one_line
from millpond.store.errors import InvalidInput, MillpondError

_DESCRIPTION = """Activations of language models, next to the GPUs.

Also: millpond ledger (verify, alerts), budget (plan, show, raise, approve), queue (serve, token), token (new),
project (new, role, hold) and release (verify)."""


class _Command(Protocol):
    def run(self) -> int: ...


_GROUPS: dict[str, dict[str, Callable[..., _Command]]] = {
    "ledger": {"verify": LedgerVerify, "alerts": LedgerAlerts},
    "budget": {"plan": BudgetPlan, "show": BudgetShow, "raise": BudgetRaise, "approve": BudgetApprove},
    "queue": {"serve": QueueServe, "token": QueueToken},
    "token": {"new": TokenNew},
    "release": {"verify": ReleaseVerify},
    "project": {"new": ProjectNew, "role": ProjectRole, "hold": ProjectHold},
}
"""Commands of two words; the first has no meaning alone."""

_COMMANDS: dict[str, Callable[..., _Command]] = {
    "capture": Capture,
    "serve": Serve,
    "worker": Worker,
    "submit": Submit,
    "jobs": Jobs,
    "probe": Probe,
    "seal": Seal,
    **COMMANDS,
    "verify": Verify,
    "metrics": Metrics,
    "demo": Demo,
    "up": Up,
    "doctor": Doctor,
    "gateway": Gateway,
    "executor": Executor,
    "sae": SaeCommand,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failed run, 2 for input that cannot be used, 130 when interrupted."""
    if arguments is None:
        arguments = sys.argv[1:]
    if list(arguments) == ["--version"]:
        import millpond

        print(f"millpond {millpond.__version__}")
        return 0
    group = arguments[0] if arguments and arguments[0] in _GROUPS else None
    command = tyro.extras.subcommand_cli_from_dict(
        _GROUPS[group] if group else _COMMANDS,
        prog=f"millpond {group}" if group else "millpond",
        args=arguments[1:] if group else arguments,
        description=_DESCRIPTION,
    )
    try:
        if isinstance(command, Probe) and command.job is not None:  # once more, with the file's settings as defaults
            command = replace(command, settings=read_probe_job(command.job))
            command = tyro.cli(Probe, prog="millpond probe", args=arguments[1:], default=command)
        code: int = command.run()
    except InvalidInput as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
        return 2
    except MillpondError as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "millpond":
            raise
        print(
            f"millpond: this command needs {error.name!r}, which is not installed: pip install 'millpond[{_extra(command, group)}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            "millpond: interrupted; what was committed is kept, the same command with --resume goes on", file=sys.stderr
        )
        return 130
    return code


def _extra(command: object, group: str | None) -> str:
    """The extra of the distribution that holds what a command needs."""
    home = type(command).__module__.split(".")
    if group is not None or "hub" in home:
        return "workspace" if "workspace" in home else "hub"
    return "analysis" if "analysis" in home else "capture"


if __name__ == "__main__":
    sys.exit(main())
