"""Captures for capture workers: a client's job as the workers know it, and the run that comes of it.

A worker is told nothing of whom a job is for. The run's name in the lake is the project's mark and the client's name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from millpond.hub.kinds.capture import CaptureJob, Prompt
from millpond.hub.projects import Held
from millpond.hub.queue import ProjectJob
from millpond.hub.settings import Weights
from millpond.hub.tables import JOBS
from millpond.hub.vault import Vault, label_mark
from millpond.store import capture_spec
from millpond.store.artifacts import load_artifact
from millpond.store.errors import InvalidInput, NotHeld
from millpond.store.interventions import Patch, SpliceSae

if TYPE_CHECKING:
    from millpond.hub.gateway import Gateway

_RESERVED = ("id", "text", "token_ids")


def send_prompts(gateway: Gateway, project: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Held:
    """Keep prompts under a name of the project.

    Raises:
        InvalidInput: two have the same id, the name is taken, or they do not have the same fields.
    """
    if len({row["id"] for row in rows}) < len(rows):
        raise InvalidInput("two prompts have the same id; give ids that differ")
    fields = list(rows[0])
    if any(list(row) != fields for row in rows):
        raise InvalidInput("the prompts have different fields; give each the same")
    target = _write(gateway, rows)
    columns = [field for field in fields if field not in _RESERVED]
    with removed_if_refused(gateway, [target]):
        return gateway.projects.hold(
            project, "prompts", name, target, model="", detail={"prompts": len(rows), "columns": columns}
        )


def submit_capture(gateway: Gateway, vault: Vault, job: CaptureJob, user: str) -> str:
    """Queue a capture for the workers of its model; returns the job's id.

    Raises:
        InvalidInput: the installation has no such model or adapter, the project may not use it, or the name is taken.
    """
    weights = checked_weights(gateway, vault, job.model, job.adapter)
    for kind, handle in job.needs():
        # the run is charged to the model that it is captured from: what of another's went in would leave unpaid
        if kind != "prompts" and vault.held(kind, handle).model != job.model:
            raise InvalidInput(f"an intervention names a {kind} of another model than {job.model!r}")
    if any(held.name == job.name for held in gateway.projects.held(vault.project, "run")):
        raise InvalidInput(f"the project has a run {job.name!r}; choose another name")
    target = label_mark(vault.project) + job.name
    path, columns = prompts_file(gateway, vault, job.prompts)
    spec = capture_spec.CaptureJob.model_validate(
        {
            "model": {
                "path": weights.path,
                "adapter": None if job.adapter is None else weights.adapters[job.adapter],
            },
            "capture": {
                "hooks": job.hooks, "max_new_tokens": job.max_new_tokens, **job.positions.model_dump(mode="json")
            },
            "prompts": {"path": path, "metadata": columns},
            "destination": {"lake": gateway.settings.lake, "run": target},
            "intervene": [intervention(vault, one) for one in job.interventions],
        }
    )  # fmt: skip
    wanted = spec.model_dump(mode="json", exclude_unset=True)
    return gateway.queue.submit(
        "capture",
        wanted,
        model=spec.model.base,
        project=vault.project,
        user=user,
        check=lambda inside: _check_new(inside, vault, target),
    )


def _check_new(connection: sa.Connection, vault: Vault, target: str) -> None:
    """Raises InvalidInput if another capture of the project fills the run `target`, or has filled it."""
    alive = (
        JOBS.c.project == vault.project,
        JOBS.c.kind == "capture",
        JOBS.c.state.in_(("queued", "claimed", "finished")),
    )
    for spec in connection.scalars(sa.select(JOBS.c.spec).where(*alive)):
        if json.loads(spec)["destination"]["run"] == target:
            name = target.removeprefix(label_mark(vault.project))
            raise InvalidInput(f"a capture of the project fills a run {name!r} already; choose another name")


def checked_weights(gateway: Gateway, vault: Vault, model: str, adapter: str | None) -> Weights:
    """Where workers find the model that a job names.

    Raises:
        InvalidInput: the installation has no such model or adapter, or the project may not use it.
    """
    weights = gateway.settings.models.get(model)
    if weights is None or model not in gateway.projects.models(vault.project):
        raise InvalidInput(f"model {model!r} is none that this project can run")
    if adapter is not None and adapter not in weights.adapters:
        raise InvalidInput(f"model {model!r} has no adapter {adapter!r}")
    return weights


def prompts_file(gateway: Gateway, vault: Vault, prompts: str | Sequence[Prompt]) -> tuple[str, tuple[str, ...]]:
    """The file of a job's prompts, and their further columns.

    Raises:
        InvalidInput: two of them have the same id.
    """
    if isinstance(prompts, str):
        held = vault.held("prompts", prompts)
        return held.target, tuple(held.detail["columns"])
    rows = [one.model_dump() for one in prompts]
    if len({row["id"] for row in rows}) < len(rows):
        raise InvalidInput("two prompts have the same id; give ids that differ")
    target = _write(gateway, rows)
    vault.written.append(target)
    return target, ()


@contextmanager
def removed_if_refused(gateway: Gateway, written: Sequence[str]) -> Iterator[None]:
    """Delete what was written for something that is refused after all: nobody would count it, and nobody could name it."""
    try:
        yield
    except BaseException:
        gateway.lake.storage.delete([one.removeprefix(f"{gateway.lake.url}/") for one in written])
        raise


def registered(gateway: Gateway, job: ProjectJob) -> Held | None:
    """The project's run of a finished capture, held from the first time that somebody asks; None while it is open.

    The workers need not know of projects, and asking twice, or at once, holds it once.
    """
    spec = capture_spec.CaptureJob.model_validate(job.spec)
    target = spec.destination.run
    name = target.removeprefix(label_mark(job.project))
    try:
        return gateway.projects.named(job.project, "run", name)
    except NotHeld:
        pass
    if job.state != "finished" or target not in gateway.lake:
        return None
    model = _model_of(gateway, job.project, spec)
    if model is None:
        raise InvalidInput(f"the settings no longer have the model in {spec.model.path!r}")
    # whose prompts they are decides which rules hold: these were sent by the project's own members
    detail = {"prompts": "own", "job": job.id}
    try:
        return gateway.projects.hold(job.project, "run", name, target, model=model, detail=detail)
    except InvalidInput:
        return gateway.projects.named(job.project, "run", name)


def _model_of(gateway: Gateway, project: str, spec: capture_spec.CaptureJob) -> str | None:
    """The policy's name of the captured model; of several with the same weights a capped one, which pays."""
    adapter, allowed = spec.model.adapter, gateway.projects.models(project)
    found = [
        name
        for name, one in gateway.settings.models.items()
        if one.path == spec.model.path and (adapter is None or adapter in one.adapters.values())
    ]
    capped = [name for name in found if name in gateway.policy.models and not gateway.policy.models[name].public]
    mine = [name for name in capped if name in allowed] or [name for name in found if name in allowed]
    return next(iter([*mine, *capped, *found]), None)


def _write(gateway: Gateway, rows: Sequence[Mapping[str, Any]]) -> str:
    """Keep prompts in the lake, which the workers reach wherever they are; returns the path or URL."""
    path = f"prompts/{secrets.token_hex(16)}.jsonl"
    gateway.lake.storage.put(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return f"{gateway.lake.url}/{path}"


def intervention(vault: Vault, one: Any) -> dict[str, Any]:
    """The intervention over the lake's names."""
    values: dict[str, Any] = one.model_dump(mode="json", exclude_unset=True) | {"op": one.op}
    if isinstance(one, Patch):
        values["run"] = vault.run(one.run).name
    elif isinstance(one, SpliceSae):
        values["artifact"] = vault.held("artifact", one.artifact).target
    elif isinstance(one.vector, str):
        values["vector"] = _direction(vault, one.vector)
    return values


def _direction(vault: Vault, handle: str) -> str | list[float]:
    """What workers take: the name of a vector, or the numbers of a probe's direction.

    Raises:
        InvalidInput: the artifact is no direction.
    """
    artifact = load_artifact(vault.lake, vault.held("artifact", handle).target)
    if artifact.kind == "vector":
        return artifact.name
    coef = artifact.arrays().get("coef")
    if artifact.kind != "probe" or coef is None or len(coef) != 1:
        raise InvalidInput(f"the artifact is a {artifact.kind}; give a vector, or a probe of two classes")
    return [float(value) for value in coef[0]]
