"""`millpond gateway`, `executor`, `token`, `release` and `project`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro

from millpond.store.errors import InvalidInput


@dataclass(frozen=True)
class Gateway:
    """Serve the gateway."""

    config: Path
    """The settings, a TOML file; docs/gateway.md describes it."""

    def run(self) -> int:
        """Serve until interrupted."""
        from millpond.hub.gateway import serve
        from millpond.hub.settings import read_settings
        from millpond.store.logs import log_to

        log_to()
        serve(read_settings(self.config))
        return 0


@dataclass(frozen=True)
class Executor:
    """Run the gateway's jobs next to the data."""

    config: Path
    """The gateway's settings."""
    until_empty: bool = False
    """End when no job waits."""

    def run(self) -> int:
        """Take jobs until interrupted."""
        from millpond.hub.foreman import run_executor
        from millpond.hub.settings import read_settings
        from millpond.store.logs import log_to

        log_to()
        return run_executor(
            read_settings(self.config), until_empty=self.until_empty, told=lambda text: print(text, flush=True)
        )


@dataclass(frozen=True)
class TokenNew:
    """Make a token: it is printed once, and its hash is added to the token file."""

    user: Annotated[str, tyro.conf.Positional]
    """Whose."""
    scope: tuple[Literal["read", "run", "review", "admin"], ...] = ("read", "run")
    """What it may do."""
    tokens: Path = Path("tokens.toml")
    """The token file; made if it is missing."""
    expires: str = ""
    """Until when, such as 2027-01-31 or 2027-01-31T12:00+00:00; UTC where no zone is given."""
    login: bool = False
    """A token for the log-in form of browsers, and for nothing else; reviewing needs one."""

    def run(self) -> int:
        """Print the token."""
        from millpond.hub.auth import new_token

        try:
            until = datetime.fromisoformat(self.expires) if self.expires else None
        except ValueError as error:
            raise InvalidInput(f"--expires is {self.expires!r}; give a date such as 2027-01-31") from error
        print(new_token(self.tokens, self.user, self.scope, expires=until, login=self.login))
        return 0


@dataclass(frozen=True)
class ReleaseVerify:
    """Run a finished job again, and compare what it gives with the bytes that were released."""

    job: Annotated[str, tyro.conf.Positional]
    """The job's handle, 16 hexadecimal digits."""
    config: Path
    """The gateway's settings."""

    def run(self) -> int:
        """Print a line an answer; 1 if one was not reproduced."""
        from millpond.hub.executor import verify_release
        from millpond.hub.settings import read_settings

        found = verify_release(read_settings(self.config), self.job)
        texts = {"same": "the released bytes, again", "kept": "not released; what is kept, again", "differs": "DIFFERS"}
        for number, what in found:
            print(f"answer {number}: {texts[what]}")
        if not found:
            print("the job has no answers")
        return int(any(what == "differs" for _, what in found))


@dataclass(frozen=True)
class ProjectNew:
    """Make a project."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the project."""
    config: Path
    """The gateway's settings."""
    models: tuple[str, ...]
    """Models of the policy file that it may use."""
    owner: str
    """User who owns it."""

    def run(self) -> int:
        """Write it to the database."""
        from millpond.hub.executor import Workshop
        from millpond.hub.settings import read_settings

        workshop = Workshop(read_settings(self.config))
        for model in self.models:
            workshop.policy.model(model)
        workshop.projects.create(self.name, models=self.models, by=self.owner)
        return 0


@dataclass(frozen=True)
class ProjectRole:
    """Give a user a role in a project, as an administrator."""

    project: Annotated[str, tyro.conf.Positional]
    """The project."""
    user: Annotated[str, tyro.conf.Positional]
    """The user."""
    role: Annotated[Literal["reader", "researcher", "reviewer", "owner", "none"], tyro.conf.Positional]
    """The role; none takes it away."""
    config: Path
    """The gateway's settings."""

    def run(self) -> int:
        """Write it to the database."""
        from millpond.hub.executor import Workshop
        from millpond.hub.settings import read_settings

        projects = Workshop(read_settings(self.config)).projects
        projects.set_role(self.project, self.user, None if self.role == "none" else self.role, by=self.user, admin=True)
        return 0


@dataclass(frozen=True)
class ProjectHold:
    """Let a project use a run of the lake."""

    project: Annotated[str, tyro.conf.Positional]
    """The project."""
    run_name: Annotated[str, tyro.conf.arg(name="run"), tyro.conf.Positional]
    """The run's name in the lake."""
    config: Path
    """The gateway's settings."""
    model: str
    """Of the policy file: whose activations these are."""
    name: str = ""
    """What the project calls the run; by default its name in the lake."""
    prompts: Literal["restricted", "own"] = "restricted"
    """Whether the prompts are the project's own; if not, rules protect those whose they are."""

    def run(self) -> int:
        """Print the run's handle."""
        from millpond.hub.executor import Workshop
        from millpond.hub.settings import read_settings

        workshop = Workshop(read_settings(self.config))
        workshop.policy.model(self.model)
        name = workshop.lake[self.run_name].name
        detail = {"prompts": self.prompts}
        held = workshop.projects.hold(self.project, "run", self.name or name, name, model=self.model, detail=detail)
        print(held.handle.hex())
        return 0
