"""What jobs have come to: results with their evidence, kept in the vault until somebody pays for them.

Answers are written in the transaction that ends their job, so that a kill leaves a job without answers or with all.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from millpond.hub.kinds.base import Answer
from millpond.hub.release import Question
from millpond.hub.rules import Evidence, Rule, Verdict
from millpond.hub.shapes import TEXTS, fields_of
from millpond.hub.tables import ANSWERS, REVIEWS
from millpond.store.errors import InvalidInput, NotHeld, NotPermitted
from millpond.store.result import Result

Decision = Literal["waiting", "approved", "denied"]


@dataclass(frozen=True)
class Kept:
    """An answer as it waits in the vault."""

    job: str
    number: int
    question: Question
    models: tuple[str, ...]
    """Whose budgets it is charged to."""
    result: Result
    evidence: Evidence
    verdict: Verdict
    """Of the rules that look at no earlier release."""


@dataclass(frozen=True)
class Review:
    """An answer that waits for a reviewer, or what one decided."""

    job: str
    number: int
    project: str
    user: str
    """Who asked for the job."""
    rules: tuple[Rule, ...]
    state: Decision
    asked: float
    """Seconds since 1970."""
    by: str | None = None
    decided: float | None = None


class Answers:
    """The answers in the hub's database."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._reader = engine.execution_options(write=False)

    def keep(self, connection: sa.Connection, kept: Sequence[Kept], *, user: str) -> None:
        """Write a job's answers, in the transaction that ends it; those to be reviewed join the queue."""
        for one in kept:
            connection.execute(ANSWERS.insert().values(_row(one)))
            if one.verdict.outcome == "review":
                self._ask(connection, one, user)

    def find(self, job: str, number: int) -> Kept:
        """An answer of a finished job.

        Raises:
            NotHeld: there is none of that number.
        """
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(ANSWERS).where(ANSWERS.c.job == job, ANSWERS.c.number == number)).first()
        if row is None:
            raise NotHeld(f"job {job} has no answer {number}")
        return _kept(row)

    def of(self, job: str) -> tuple[Kept, ...]:
        """The answers of a job, in order."""
        query = sa.select(ANSWERS).where(ANSWERS.c.job == job).order_by(ANSWERS.c.number)
        with self._reader.connect() as connection:
            return tuple(_kept(row) for row in connection.execute(query))

    def review(self, job: str, number: int) -> Review | None:
        """Where an answer stands with the reviewers; None if it never had to."""
        query = sa.select(REVIEWS).where(REVIEWS.c.job == job, REVIEWS.c.number == number)
        with self._reader.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else _review(row)

    def reviews(self, project: str | None = None, state: Decision | None = None) -> tuple[Review, ...]:
        """The review queue, oldest first: of a project, of a state, or all."""
        query = sa.select(REVIEWS).order_by(REVIEWS.c.asked, REVIEWS.c.job, REVIEWS.c.number)
        for column, value in ((REVIEWS.c.project, project), (REVIEWS.c.state, state)):
            query = query if value is None else query.where(column == value)
        with self._reader.connect() as connection:
            return tuple(_review(row) for row in connection.execute(query))

    def of_job(self, job: str) -> tuple[Review, ...]:
        """The reviews of a job's answers."""
        query = sa.select(REVIEWS).where(REVIEWS.c.job == job)
        with self._reader.connect() as connection:
            return tuple(_review(row) for row in connection.execute(query))

    def ask(self, kept: Kept, user: str) -> None:
        """Put an answer into the review queue, unless it is there."""
        with self.engine.begin() as connection:
            here = sa.select(REVIEWS.c.job).where(REVIEWS.c.job == kept.job, REVIEWS.c.number == kept.number)
            if connection.execute(here).first() is None:
                self._ask(connection, kept, user)

    def decide(self, job: str, number: int, decision: Literal["approved", "denied"], *, by: str) -> Review:
        """Let an answer pass, or hold it back for good.

        The caller has made sure that `by` is a reviewer of the project in a browser's session.

        Raises:
            NotHeld: nothing of that number waits.
            NotPermitted: `by` asked for the job.
        """
        with self.engine.begin() as connection:
            here = (REVIEWS.c.job == job, REVIEWS.c.number == number)
            row = connection.execute(sa.select(REVIEWS).where(*here).with_for_update()).first()
            if row is None or row.state != "waiting":
                raise NotHeld(f"answer {number} of job {job} does not wait for a review")
            if row.user == by:
                raise NotPermitted(f"{by!r} asked for job {job}; somebody else must review it")
            connection.execute(REVIEWS.update().where(*here).values(state=decision, by=by, decided=time.time()))
            row = connection.execute(sa.select(REVIEWS).where(*here)).one()
        return _review(row)

    def _ask(self, connection: sa.Connection, kept: Kept, user: str) -> None:
        rules = json.dumps([rule.value for rule in kept.verdict.rules])
        row = {"job": kept.job, "number": kept.number, "project": kept.question.project, "user": user, "rules": rules}
        connection.execute(REVIEWS.insert().values(row | {"state": "waiting", "asked": time.time()}))


def releasable(result: Result) -> Result:
    """`result` with nothing but what its kind may send.

    Raises:
        InvalidInput: its kind may not leave.
    """
    if result.kind == TEXTS:
        return Result(TEXTS, {"coded": result.values["coded"]}, {}, {"rows": result.evidence["rows"]})
    named = [field.name for field in fields_of(result.kind)]
    sent = {f"{name}{end}" for name in named for end in ("", "_low", "_high", "_se")}
    return Result(
        result.kind,
        {name: value for name, value in result.values.items() if name in sent},
        {name: value for name, value in result.intervals.items() if name in named},
        {name: value for name, value in result.evidence.items() if name in named},
    )


def pack_result(result: Result) -> bytes:
    """`result` without its provenance, exactly, as JSON."""
    values = {name: _pack_value(value) for name, value in result.values.items()}
    intervals = {name: [float(low), float(high)] for name, (low, high) in result.intervals.items()}
    evidence = {name: int(value) for name, value in result.evidence.items()}
    return json.dumps([result.kind, values, intervals, evidence]).encode()


def unpack_result(data: bytes) -> Result:
    """What `pack_result` packed."""
    kind, values, intervals, evidence = json.loads(data)
    return Result(
        kind,
        {name: _unpack_value(value) for name, value in values.items()},
        {name: (low, high) for name, (low, high) in intervals.items()},
        evidence,
    )


def pack_evidence(evidence: Evidence) -> bytes:
    """`evidence` as JSON."""
    values = {field.name: getattr(evidence, field.name) for field in fields(evidence)}
    return json.dumps(values | {"cohorts": [sorted(cohort.items()) for cohort in evidence.cohorts]}).encode()


def unpack_evidence(data: bytes) -> Evidence:
    """What `pack_evidence` packed."""
    values: dict[str, Any] = json.loads(data)
    values |= {name: tuple(values[name]) for name in ("class_rows", "class_prompts")}
    return Evidence(**values | {"cohorts": tuple(dict(cohort) for cohort in values["cohorts"])})


def kept_answers(
    job: str,
    answers: Sequence[Answer],
    *,
    project: str,
    run: str,
    specification: Mapping[str, Any],
    models: tuple[str, ...],
    verdicts: Sequence[Verdict],
) -> tuple[Kept, ...]:
    """A job's answers as they are kept; the question of each is the job's with its number."""
    return tuple(
        Kept(
            job,
            number,
            Question(project, run, {**specification, "answer": number}),
            models,
            releasable(one.result),
            one.evidence,
            verdict,
        )
        for number, (one, verdict) in enumerate(zip(answers, verdicts, strict=True))
    )


def _pack_value(value: Any) -> Any:
    if isinstance(value, str):
        raise InvalidInput("a text is no value that may leave")
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return {"dtype": data.dtype.str, "shape": data.shape, "data": base64.b64encode(data.tobytes()).decode()}
    return value.item() if isinstance(value, np.generic) else value


def _unpack_value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    data = np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"]))
    return data.reshape(value["shape"]).copy()


def _row(kept: Kept) -> dict[str, Any]:
    return {
        "job": kept.job, "number": kept.number, "project": kept.question.project, "run": kept.question.run,
        "specification": json.dumps(kept.question.specification), "models": json.dumps(kept.models),
        "result": pack_result(kept.result), "evidence": pack_evidence(kept.evidence),
        "outcome": kept.verdict.outcome, "rules": json.dumps([rule.value for rule in kept.verdict.rules]),
    }  # fmt: skip


def _kept(row: sa.Row[Any]) -> Kept:
    return Kept(
        row.job,
        row.number,
        Question(row.project, row.run, json.loads(row.specification)),
        tuple(json.loads(row.models)),
        unpack_result(bytes(row.result)),
        unpack_evidence(bytes(row.evidence)),
        Verdict(row.outcome, _rules(row.rules)),
    )


def _review(row: sa.Row[Any]) -> Review:
    return Review(
        row.job, row.number, row.project, row.user, _rules(row.rules), row.state, row.asked, row.by, row.decided
    )


def _rules(text: str) -> tuple[Rule, ...]:
    return tuple(Rule(value) for value in json.loads(text))
