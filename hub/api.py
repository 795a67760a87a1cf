"""The HTTP interface, /api/v1: every route with its scope, and what it answers. Docs: docs/gateway.md."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millpond.hub.body import API, UNCAPPED, BudgetLeft, Handles, Quote
from millpond.hub.captures import registered, removed_if_refused, send_prompts, submit_capture
from millpond.hub.generations import submit_generation
from millpond.hub.kinds import ADAPTER, Job, parse_job
from millpond.hub.kinds.capture import CaptureJob, Name, Prompt
from millpond.hub.kinds.generate import GenerateJob
from millpond.hub.kinds.sae_cross_entropy import SaeCrossEntropyJob
from millpond.hub.logins import LOGINS
from millpond.hub.losses import submit_losses
from millpond.hub.policy import SCOPES
from millpond.hub.projection import project_run
from millpond.hub.queue import ProjectJob
from millpond.hub.serving import Call, Endpoint, Fixed, NotThere, Reply
from millpond.hub.textmodel import VERSION
from millpond.hub.vault import label_mark, visible_labels
from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput
from millpond.store.labels import check_label_name

Wish = TypeVar("Wish", bound=BaseModel)
_HEX = re.compile(r"[0-9a-f]{16}")


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobWish(_Wish):
    """A job to price or to do."""

    job: dict[str, Any]


class SentPrompt(Prompt):
    """A prompt; further fields are kept as columns."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Scalar | None]


class PromptsWish(_Wish):
    """Prompts to keep under a name."""

    name: Name
    prompts: tuple[SentPrompt, ...] = Field(min_length=1, max_length=200_000)


Scalar = bool | int | float | Annotated[str, Field(max_length=200)]
"""A label's value. Text takes as much memory for every row as the longest does."""


class LabelsWish(_Wish):
    """Labels for a run's prompts, or for their tokens in order."""

    name: str = Field(min_length=1, max_length=100)
    by: Literal["prompt", "token"]
    values: dict[str, Scalar | list[Scalar]] = Field(min_length=1)


class DecisionWish(_Wish):
    """A reviewer's decision."""

    decision: Literal["approved", "denied"]


def read_version(call: Call) -> Reply:
    """What both sides compare when they connect: constants of the installation."""
    given = call.gateway.dictionary
    digest = None if given is None else hashlib.sha256(given).hexdigest()
    return _fixed(
        {"version": version("millpond"), "api": API, "dictionary_sha256": digest, "text_model": VERSION},
    )


def read_openapi(_: Call) -> Reply:
    """What there is here, as OpenAPI."""
    return _fixed(openapi())


def read_projects(call: Call) -> Reply:
    """The projects that the user is a member of: declared data, uncharged."""
    return _fixed({"projects": list(call.gateway.projects.of(call.who.user))})


def list_runs(call: Call) -> Reply:
    """Handles of the project's runs."""
    project = call.params["project"]
    call.gateway.enter(call.who, project, "read")
    for job in call.gateway.queue.jobs(project=project, state="finished", kind="capture"):
        registered(call.gateway, job)
    return _handles(call, [held.handle for held in call.gateway.projects.held(project, "run")])


def read_run(call: Call) -> Reply:
    """A run's typed projection."""
    project, handle = call.params["project"], _handle(call.params["handle"])
    vault = call.gateway.enter(call.who, project, "read")
    held, run = vault.run_held(handle), vault.run(handle)
    view = project_run(run, handle=held.handle, name=held.name, model=held.model)
    labels = tuple(sorted(visible_labels(run, project)))
    return call.gateway.send(replace(view, labels=labels), call.who, project, (held.model,))


def add_prompts(call: Call) -> Reply:
    """Keep prompts, to be named in captures."""
    project, wish = call.params["project"], _wish(PromptsWish, call.body)
    call.gateway.enter(call.who, project, "run")
    rows = [one.model_dump(mode="json") for one in wish.prompts]
    with call.gateway.uploads.taking(project, call.who.user, call.size):
        held = send_prompts(call.gateway, project, wish.name, rows)
    return _handles(call, [held.handle])


def add_labels(call: Call) -> Reply:
    """Add a label to a run, for this project alone."""
    project, handle = call.params["project"], _handle(call.params["handle"])
    wish = _wish(LabelsWish, call.body)
    vault = call.gateway.enter(call.who, project, "run")
    check_label_name(wish.name)
    lists = [isinstance(value, list) for value in wish.values.values()]
    if any(lists) != (wish.by == "token") or any(lists) != all(lists):
        raise InvalidInput("values: give one for each prompt, or a list of one a token for each")
    run = vault.run(handle)
    with call.gateway.uploads.taking(project, call.who.user, call.size):
        run.labels.add(label_mark(project) + wish.name, dict(wish.values), source=f"project {project}")
    return _handles(call, [])


def quote_job(call: Call) -> Reply:
    """The most bytes that a job's answers can cost."""
    job, quoted = _priced(call)
    return call.gateway.send(Quote(quoted), call.who, call.params["project"], _models(call, job))


def submit_job(call: Call) -> Reply:
    """Take a job, if its quote fits the budgets."""
    gateway, project = call.gateway, call.params["project"]
    job, quoted = _priced(call)
    models = _models(call, job)
    refused = gateway.door.admit(quoted, gateway.payer(call.who, project, models))
    if refused is not None:
        return refused
    vault = gateway.enter(call.who, project, "run")
    with gateway.uploads.taking(project, call.who.user, call.size), removed_if_refused(gateway, vault.written):
        if isinstance(job, CaptureJob):
            found = submit_capture(gateway, vault, job, call.who.user)
        elif isinstance(job, GenerateJob):
            found = submit_generation(gateway, vault, job, call.who.user, models)
        elif isinstance(job, SaeCrossEntropyJob):
            found = submit_losses(gateway, vault, job, call.who.user, models)
        else:
            spec = {"job": job.model_dump(mode="json"), "pins": vault.pin(job), "models": list(models)}
            found = gateway.queue.submit(job.kind, spec, project=project, user=call.who.user)
    return _handles(call, [bytes.fromhex(found)])


def list_jobs(call: Call) -> Reply:
    """Handles of the user's jobs in the project, oldest first."""
    project = call.params["project"]
    call.gateway.enter(call.who, project, "read")
    jobs = call.gateway.queue.jobs(project=project, user=call.who.user)
    return _handles(call, [bytes.fromhex(job.id) for job in jobs])


def read_job(call: Call) -> Reply:
    """A job's state at the end of the last slot."""
    return call.gateway.status(call.who, _job(call, "read"))


def read_curve(call: Call) -> Reply:
    """How a job's training does, at the end of the last slot."""
    return call.gateway.curve(call.who, _job(call, "read"))


def cancel_job(call: Call) -> Reply:
    """Stop a job; the answer is its state at the end of the last slot."""
    job = _job(call, "run")
    return call.gateway.status(call.who, call.gateway.queue.cancel(job.id))


def read_answer(call: Call) -> Reply:
    """An answer of a job, released or withheld."""
    number = call.params["number"]
    if not number.isdecimal() or len(number) > 6:
        raise NotThere("no such answer")
    return call.gateway.answer(call.who, _job(call, "read"), int(number))


def read_made(call: Call) -> Reply:
    """Handles of what a job has made."""
    gateway, job = call.gateway, _job(call, "read")
    if gateway.seen(job).state in ("queued", "running"):
        return _handles(call, [])
    made = (job.result or {}).get("made", [])
    found = [gateway.projects.named(job.project, kind, name) for kind, name in made]
    if job.kind == "capture":
        found = [held for held in (registered(gateway, job),) if held is not None]
    return _handles(call, [held.handle for held in found])


def read_budget(call: Call) -> Reply:
    """What is left for the user's week, the project and the models' lifetimes; of several models the least."""
    gateway, project = call.gateway, call.params["project"]
    gateway.enter(call.who, project, "read")
    balances = gateway.ledger.balances(gateway.payer(call.who, project))
    week, in_project, lifetime = (
        [balance for balance in balances if balance.account.scope == scope] for scope in SCOPES
    )
    left = [balance.left for balance in week if balance.left is not None]
    shares = [
        min([64, *(64 * (one.left or 0) // one.cap for one in some if one.cap)]) for some in (in_project, lifetime)
    ]
    return gateway.send(BudgetLeft(min([UNCAPPED, *left]), *shares), call.who, project)


def list_reviews(call: Call) -> Reply:
    """Handles of the project's jobs that wait for a reviewer."""
    project = call.params["project"]
    call.gateway.enter(call.who, project, "review")
    jobs = dict.fromkeys(review.job for review in call.gateway.answers.reviews(project, "waiting"))
    return _handles(call, [bytes.fromhex(job) for job in jobs])


def decide_review(call: Call) -> Reply:
    """Approve or deny an answer: in a browser's session, and never one's own."""
    wish = _wish(DecisionWish, call.body)
    job, number = _handle(call.params["job"]), call.params["number"]
    if not number.isdecimal() or len(number) > 6:
        raise NotThere("no such answer")
    call.gateway.decide(call.who, call.params["project"], job, int(number), wish.decision)
    return _handles(call, [])


_P = "/api/v1/p/{project}"


def _about(wish: type[BaseModel] | None = None) -> Mapping[str, Any]:
    return {} if wish is None else {"body": wish}


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/version", "public", read_version),
    Endpoint("GET", "/api/v1/openapi.json", "public", read_openapi),
    Endpoint("GET", "/api/v1/projects", "read", read_projects),
    Endpoint("GET", f"{_P}/runs", "read", list_runs),
    Endpoint("GET", f"{_P}/runs/{{handle}}", "read", read_run),
    Endpoint("POST", f"{_P}/runs/{{handle}}/labels", "run", add_labels, "bulk", about=_about(LabelsWish)),
    Endpoint("POST", f"{_P}/prompts", "run", add_prompts, "bulk", about=_about(PromptsWish)),
    Endpoint("POST", f"{_P}/quote", "run", quote_job, "bulk", about=_about(JobWish)),
    Endpoint("POST", f"{_P}/jobs", "run", submit_job, "bulk", about=_about(JobWish)),
    Endpoint("GET", f"{_P}/jobs", "read", list_jobs),
    Endpoint("GET", f"{_P}/jobs/{{job}}", "read", read_job),
    Endpoint("DELETE", f"{_P}/jobs/{{job}}", "run", cancel_job),
    Endpoint("GET", f"{_P}/jobs/{{job}}/curve", "read", read_curve),
    Endpoint("GET", f"{_P}/jobs/{{job}}/answers/{{number}}", "read", read_answer),
    Endpoint("GET", f"{_P}/jobs/{{job}}/made", "read", read_made),
    Endpoint("GET", f"{_P}/budget", "read", read_budget),
    Endpoint("GET", f"{_P}/reviews", "review", list_reviews),
    Endpoint(
        "POST", f"{_P}/reviews/{{job}}/{{number}}", "review", decide_review, "json", about=_about(DecisionWish)
    ),
    *LOGINS,
)  # fmt: skip


def _priced(call: Call) -> tuple[Job, int]:
    vault = call.gateway.enter(call.who, call.params["project"], "run")
    job = parse_job(_wish(JobWish, call.body).job)
    for kind, handle in job.needs():
        vault.held(kind, handle)
    vault.pin(job)
    vault.check_columns(job)
    return job, job.quote(vault, call.gateway.policy.charges)


def _models(call: Call, job: Job) -> tuple[str, ...]:
    vault = call.gateway.enter(call.who, call.params["project"], "run")
    return (job.model,) if isinstance(job, CaptureJob) else vault.models(job)


def _job(call: Call, right: Literal["read", "run"]) -> ProjectJob:
    project = call.params["project"]
    call.gateway.enter(call.who, project, right)
    return call.gateway.job(project, _handle(call.params["job"]))


def _handles(call: Call, values: list[bytes]) -> Reply:
    return call.gateway.send(Handles(tuple(values)), call.who, call.params["project"])


def _handle(text: str) -> str:
    if not _HEX.fullmatch(text):
        raise NotThere("no such handle")
    return text


def _wish(kind: type[Wish], value: Any) -> Wish:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InvalidInput(first_problem(error)[:500]) from error


def _fixed(value: Any) -> Fixed:
    return Fixed(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@cache
def openapi() -> dict[str, Any]:
    """The description of every endpoint under /api."""
    parts = ADAPTER.json_schema(ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = parts.pop("$defs", {})
    schemas["Job"] = parts
    patterns = {"handle": "^[0-9a-f]{16}$", "job": "^[0-9a-f]{16}$", "number": "^[0-9]{1,6}$"}
    octets = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    paths: dict[str, Any] = {}
    for one in ENDPOINTS:
        if not one.path.startswith("/api/"):
            continue
        answers = {"description": "a body of the closed set"} | ({} if one.scope == "public" else {"content": octets})
        described: dict[str, Any] = {
            "summary": (one.handler.__doc__ or "").partition("\n")[0],
            "operationId": one.handler.__name__,
            "security": [] if one.scope == "public" else [{"token": []}],
            "x-scope": one.scope,
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"} | _pattern(patterns, name)}
                for name in re.findall(r"\{(\w+)\}", one.path)
            ],
            "responses": {"200": answers, "default": answers},
        }
        if wish := one.about.get("body"):
            found = wish.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= found.pop("$defs", {})
            if wish is JobWish:
                found["properties"]["job"] = {"$ref": "#/components/schemas/Job"}
            described["requestBody"] = {"required": True, "content": {"application/json": {"schema": found}}}
        paths.setdefault(one.path, {})[one.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "Millpond gateway", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _pattern(patterns: Mapping[str, str], name: str) -> dict[str, str]:
    return {"pattern": patterns[name]} if name in patterns else {}
