"""The pages of runs, jobs and answers, and the form that submits a job."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millpond.hub.body import (
    JOB_STATES,
    PROGRESS_STEPS,
    Handles,
    JobStatus,
    Quote,
    ReleasedResult,
    Texts,
    TrainingCurve,
    Withheld,
)
from millpond.hub.kinds import KINDS, parse_job
from millpond.hub.pages.results import lay_out
from millpond.hub.pages.view import Refused, View, problem_text
from millpond.hub.projection import RunView
from millpond.hub.rules import REMEDIES
from millpond.hub.serving import Fixed, Redirect, parse_json
from millpond.hub.vault import label_mark
from millpond.store.errors import InvalidInput

STATES = " ".join(
    f"{state}:{step}" if state == "running" else state
    for state in JOB_STATES
    for step in (range(PROGRESS_STEPS) if state == "running" else (0,))
)
"""Every status by its code, for the script that follows a job."""


@dataclass(frozen=True)
class Declared:
    """What a member declared by submitting a job. Its state is not in it: that is charged."""

    id: str
    kind: str
    user: str
    submitted: float
    spec: Mapping[str, Any]
    answers: int
    """How many it has when it is done."""


def home(view: View) -> Fixed:
    """The user's projects: declared, so nothing is charged."""
    projects = view.gateway.projects
    rows = [
        {"name": name, "role": projects.role(name, view.user), "models": projects.models(name)}
        for name in projects.of(view.user)
    ]
    return view.show("home.html", projects=rows)


def runs(view: View) -> Fixed:
    """The project's runs, each charged as its description is."""
    handles = view.ask("GET", "/p/{project}/runs")
    assert isinstance(handles, Handles)
    chosen, pages = view.page_of(handles.values)
    found = [view.ask("GET", "/p/{project}/runs/{handle}", handle=handle.hex()) for handle in chosen]
    return view.show("runs.html", here="Runs", runs=[run for run in found if isinstance(run, RunView)], **pages)


def form(view: View) -> Fixed:
    """The empty form."""
    view.enter("run")
    return _form(view, {})


def submit(view: View) -> Fixed | Redirect:
    """What the form sends: a capture, a job as JSON, or the question what that would cost."""
    view.enter("run")
    given: dict[str, str] = view.call.body
    prompts: list[dict[str, Any]] = []
    try:
        if given.get("do") == "capture":
            prompts = _prompts(given.get("prompts", ""))
            wish = _capture(given, prompts)
        else:
            wish = parse_json(given.get("job", "").encode())
        job = parse_job(wish).model_dump(mode="json", exclude_unset=True)
    except InvalidInput as error:  # says nothing but what was given: nothing was looked up yet
        return _form(view, given, problem=str(error), code=400)
    try:
        if prompts:  # sent first, so that their metadata is kept
            name = f"{job['name']}-prompts-{secrets.token_hex(4)}"[-80:]
            handles = view.ask("POST", "/p/{project}/prompts", {"name": name, "prompts": prompts})
            assert isinstance(handles, Handles)
            job["prompts"] = handles.values[0].hex()
        if given.get("do") == "quote":
            answer = view.ask("POST", "/p/{project}/quote", {"job": job})
            assert isinstance(answer, Quote)
            return _form(view, given, quote=answer.bytes)
        made = view.ask("POST", "/p/{project}/jobs", {"job": job})
    except (Refused, InvalidInput) as error:
        return _form(view, given, problem=problem_text(view.refused(error)), code=400)
    assert isinstance(made, Handles)
    return Redirect(view.path("jobs", made.values[0].hex()))


def jobs(view: View) -> Fixed:
    """The user's jobs in the project, newest first, with their states as of the last slot."""
    handles = view.ask("GET", "/p/{project}/jobs")
    assert isinstance(handles, Handles)
    found = sorted((declared(view, handle.hex()) for handle in handles.values), key=lambda job: -job.submitted)
    chosen, pages = view.page_of(found)
    rows = [
        {"id": job.id, "kind": job.kind, "submitted": job.submitted, "status": _status(view, job.id)} for job in chosen
    ]
    return view.show("jobs.html", here="Jobs", jobs=rows, **pages)


def job(view: View) -> Fixed:
    """One job: its state, what it was asked, and links to what it came to."""
    job_id = view.call.params["job"]
    status = _status(view, job_id)
    found = declared(view, job_id)
    ended = status.state in ("done", "in_review", "refused")
    made = view.ask("GET", "/p/{project}/jobs/{job}/made") if status.state == "done" else Handles(())
    assert isinstance(made, Handles)
    trains = found.kind == "sae_train" and status.state != "queued"
    curve = view.ask("GET", "/p/{project}/jobs/{job}/curve") if trains else TrainingCurve(())
    assert isinstance(curve, TrainingCurve)
    return view.show(
        "job.html",
        trains=found.kind == "sae_train",
        points=" ".join(f"{20 * place + 10},{254 - code}" for place, code in enumerate(curve.codes)),
        reached=curve.values,
        here="Jobs",
        job=found,
        status=status,
        moving=status.state in ("queued", "running"),
        states=STATES,
        answers=found.answers if ended else 0,
        made=made.values,
        may_run=view.gateway.projects.may(view.project, view.user, "run"),
    )


def answer(view: View) -> Fixed:
    """One answer: the released numbers as charts and tables, or the rules that hold it back."""
    job_id, number = view.call.params["job"], view.call.params["number"]
    body = view.ask("GET", "/p/{project}/jobs/{job}/answers/{number}")
    shown: dict[str, Any] = {"result": None, "rules": None, "outcome": "", "coded": 0}
    if isinstance(body, ReleasedResult):
        shown["result"] = lay_out(body.result)
    elif isinstance(body, Withheld):
        shown |= {"rules": [(rule.name.lower(), REMEDIES[rule]) for rule in body.verdict.rules]}
        shown["outcome"] = body.verdict.outcome
    elif isinstance(body, Texts):
        shown["coded"] = len(body.coded)
    return view.show("answer.html", here="Jobs", job=declared(view, job_id), number=number, **shown)


def cancel(view: View) -> Redirect:
    """Cancel a job."""
    view.ask("DELETE", "/p/{project}/jobs/{job}")
    return Redirect(view.path("jobs", view.call.params["job"]))


def _form(view: View, given: dict[str, str], *, problem: str = "", quote: int | None = None, code: int = 200) -> Fixed:
    fields = ("name", "model", "hooks", "positions", "max_new_tokens", "prompts", "job")
    return view.show(
        "submit.html",
        code=code,
        here="Submit",
        given={name: given.get(name, "") for name in fields},
        models=view.gateway.projects.models(view.project),
        kinds=sorted(KINDS),
        problem=problem,
        quote=quote,
    )


def _capture(given: Mapping[str, str], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The capture that the form describes."""
    tokens = given.get("max_new_tokens", "0")
    if not tokens.isdecimal() or len(tokens) > 9:
        raise InvalidInput(f"max_new_tokens is {tokens!r}; give a number")
    return {
        "kind": "capture",
        "model": given.get("model", ""),
        "name": given.get("name", ""),
        "prompts": [{"id": prompt["id"], "text": prompt["text"]} for prompt in prompts],
        "hooks": given.get("hooks", "").split(),
        "positions": {"positions": given.get("positions", "all")},
        "max_new_tokens": int(tokens),
    }


def _prompts(text: str) -> list[dict[str, Any]]:
    prompts = [_prompt(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not prompts:
        raise InvalidInput("there are no prompts; give one JSON object a line")
    return prompts


def _prompt(number: int, line: str) -> dict[str, Any]:
    try:
        prompt = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"line {number} of the prompts is no JSON: {error}") from error
    if not isinstance(prompt, dict) or not all(isinstance(prompt.get(name), str) for name in ("id", "text")):
        raise InvalidInput(
            f'line {number} of the prompts is no object with "id" and "text"; write {{"id": "a", "text": "..."}}'
        )
    return prompt


def _status(view: View, job_id: str) -> JobStatus:
    status = view.ask("GET", "/p/{project}/jobs/{job}", job=job_id)
    assert isinstance(status, JobStatus)
    return status


def declared(view: View, job_id: str) -> Declared:
    """What was declared of a job of the project."""
    job = view.gateway.job(view.project, job_id)
    if job.kind == "capture":  # kept as the workers know it, with the vault's own paths
        run = str(job.spec["destination"]["run"]).removeprefix(label_mark(view.project))
        return Declared(
            job.id, job.kind, job.user, job.submitted, {"kind": "capture", "name": run} | job.spec["capture"], 0
        )
    spec = job.spec["job"]
    return Declared(job.id, spec["kind"], job.user, job.submitted, spec, parse_job(spec).answers())
