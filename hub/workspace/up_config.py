"""`lake.toml`: what `millpond up` starts. Everything but the lake and its models has a default."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from millpond.hub.workspace.settings import Authentication, Tls, WorkspaceLimits, is_user
from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class UpModel(_Section):
    """`[models.NAME]`."""

    path: Path | None = None
    """Folder of the weights; with it a capture worker can serve the model."""
    worker: bool = False
    """Start a capture worker for it."""
    engine: dict[str, Any] = {}
    """Further vLLM arguments of the worker."""


class UpProject(_Section):
    """`[projects.NAME]`, made when it is missing."""

    models: tuple[str, ...]
    """Of those below `[models]`, which the project may use."""
    owner: str
    """A user."""
    members: dict[str, Literal["reader", "researcher", "reviewer", "owner"]] = {}
    """User to role."""
    runs: dict[str, str] = {}
    """Name for clients to run in the lake."""
    prompts: Literal["own", "restricted"] = "restricted"
    """Whose prompts the runs hold: `own` relaxes the disclosure floors."""

    @field_validator("owner")
    @classmethod
    def _user(cls, name: str) -> str:
        if not is_user(name):
            raise ValueError(f"{name!r} cannot be a user's name; use small letters, digits and single hyphens")
        return name


class UpMeter(_Section):
    """`[meter]`."""

    cap: int = Field(default=1 << 30, ge=1 << 16)
    """Bytes that may ever leave the vault, by the meter's own ledger; nothing can raise it but an operator who edits this."""
    rate: int = Field(default=10_000_000, ge=1 << 10)
    """Bytes that may leave a second."""


class UpWorkspace(_Section):
    """`[workspace]`."""

    origin: str = "http://localhost:8000"
    """Address of the hub in browsers; every user and the gateway get an origin of their own below it."""
    listen: str = "127.0.0.1:8000"
    """HOST:PORT of the proxy."""
    gateway: str = "127.0.0.1:8911"
    """HOST:PORT of the egress meter, before the gateway."""
    run: Path = Path("/run/millpond")
    """Sockets; short, since a socket's path has at most 107 bytes."""
    tls: Tls | None = None
    database: str = ""
    """URL of the hub's database; a SQLite file in the state folder when empty."""
    first_uid: int = 50_000
    """The hub's; those of the other parts and of the users follow."""
    limits: WorkspaceLimits = WorkspaceLimits()
    authentication: Authentication = Authentication()


class UpConfig(_Section):
    """The whole file. Relative paths are relative to its folder."""

    lake: str
    """Folder of the lake, made if it is missing; the vault's programs run as the user who owns it."""
    state: Path = Path("/var/lib/millpond")
    """What must outlast a restart: homes, databases, ledgers, logs."""
    policy: Path | None = None
    """The release policy; it declares every model."""
    dictionary: Path | None = None
    """Public text that completions are coded with once a reviewer lets them leave; by default of Python's standard library."""
    workers: int = Field(default=1, ge=0)
    """Dask workers of the executor."""
    models: dict[str, UpModel] = {}
    """By their names in the policy file."""
    projects: dict[str, UpProject] = {}
    """By name."""
    meter: UpMeter = UpMeter()
    workspace: UpWorkspace = UpWorkspace()


def read_up_config(path: Path) -> UpConfig:
    """The settings in `path`; raises InvalidInput that names the field."""
    try:
        config = UpConfig.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}; docs/workspace.md has an example") from error
    except ValidationError as error:
        raise InvalidInput(f"{path}: {first_problem(error)}") from error
    if config.policy is None:
        raise InvalidInput(
            f"{path}: policy is missing; name the file that declares each model's bytes (docs/policy.toml)"
        )
    if "://" in config.lake:
        raise InvalidInput(
            f"{path}: lake is {config.lake}; the embedded vault has no network. Run gateway, executor and workers on hosts of "
            "their own for a lake in S3 (docs/workspace.md)"
        )
    folder = path.resolve().parent
    models = {
        name: model if model.path is None else model.model_copy(update={"path": folder / model.path})
        for name, model in config.models.items()
    }
    return config.model_copy(
        update={
            "lake": str(folder / config.lake),
            "state": folder / config.state,
            "policy": folder / config.policy,
            "dictionary": None if config.dictionary is None else folder / config.dictionary,
            "models": models,
        }
    )


def toml(values: dict[str, Any]) -> str:
    """Top-level values and one level of tables, as TOML; strings, numbers and lists of them are JSON's."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
