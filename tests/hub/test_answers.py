"""Answers as they wait in the vault, and who may let them pass, on both databases."""

from __future__ import annotations

import numpy as np
import pytest
import sqlalchemy as sa

from millpond.hub.answers import Answers, kept_answers
from millpond.hub.database import open_database
from millpond.hub.kinds import Answer
from millpond.hub.queue import SqlQueue
from millpond.hub.rules import Evidence, Rule, Verdict
from millpond.hub.states import state_at
from millpond.store.errors import InvalidInput, NotHeld, NotPermitted
from millpond.store.result import Result


@pytest.fixture
def hub(database):
    engine = open_database(database)
    queue, answers = SqlQueue(engine), Answers(engine)
    job = queue.submit("probe", {}, project="one", user="ada")
    yield queue, answers, queue.claim("w", {"probe"}, 60), job
    engine.dispose()


def outcome(job, *verdicts):
    evidence = Evidence("restricted", 300, 60, class_rows=(1, 2), cohorts=({3: 1 << 63, 5: 7},), label_set="ab")
    values = {"direction": np.array([0.1, -2.0], np.float32), "bias": float("nan"), "secret": "text"}
    result = Result("direction", values, {}, {"rows": 300, "train_rows": 9}, {"run": "r"})
    found = [Answer(result, evidence) for _ in verdicts]
    return kept_answers(
        job, found, project="one", run="r", specification={"x": 1}, models=("m",), verdicts=verdicts
    )  # fmt: skip


def test_answers_and_the_end_of_their_job_are_one_transaction(hub):
    queue, answers, claimed, job = hub
    kept = outcome(job, Verdict("pass"), Verdict("review", (Rule.INTERVENED,)))

    def half(connection):
        answers.keep(connection, kept, user="ada")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        queue.finish(claimed, {"answers": 2}, also=half)
    assert (queue.get(job).state, answers.of(job), answers.reviews()) == ("claimed", (), ())
    queue.finish(claimed, {"answers": 2}, also=lambda connection: answers.keep(connection, kept, user="ada"))
    first, second = answers.of(job)
    assert set(first.result.values) == {"direction", "bias"}  # no text, nothing that the kind does not have
    assert first.result["direction"].dtype == np.float32
    assert np.array_equal(first.result["direction"], np.array([0.1, -2.0], np.float32))
    assert np.isnan(first.result["bias"])
    assert first.result.evidence == {"rows": 300}
    assert first.evidence == kept[0].evidence
    assert first.question.key != second.question.key
    assert first.question.key == kept[0].question.key
    with pytest.raises(sa.exc.DatabaseError), answers.engine.begin() as connection:
        answers.keep(connection, kept, user="ada")
    with pytest.raises(NotHeld):
        answers.find(job, 2)
    with pytest.raises(InvalidInput, match="may not leave"):
        kept_answers(
            job, [Answer(Result("activations", {}), kept[0].evidence)], project="one", run="r", specification={},
            models=("m",), verdicts=[Verdict("pass")],
        )  # fmt: skip


def test_a_review_is_decided_once_and_by_somebody_else(hub):
    queue, answers, claimed, job = hub
    kept = outcome(job, Verdict("review", (Rule.INTERVENED,)), Verdict("pass"))
    queue.finish(claimed, {"answers": 2}, also=lambda connection: answers.keep(connection, kept, user="ada"))

    def state():
        return state_at(queue.get(job), queue.history(job), answers.of_job(job), 1_000_000).state

    assert state() == "in_review"
    (waiting,) = answers.reviews("one", "waiting")
    assert (waiting.job, waiting.number, waiting.rules, waiting.user) == (job, 0, (Rule.INTERVENED,), "ada")
    assert answers.reviews("two") == ()
    with pytest.raises(NotPermitted):
        answers.decide(job, 0, "approved", by="ada")
    for number in (1, 7):
        with pytest.raises(NotHeld):
            answers.decide(job, number, "approved", by="rex")
    decided = answers.decide(job, 0, "denied", by="rex")
    assert (decided.state, decided.by) == ("denied", "rex")
    with pytest.raises(NotHeld):
        answers.decide(job, 0, "approved", by="rex")
    assert state() == "done"  # the other answer may leave
    answers.ask(answers.find(job, 1), "ada")
    answers.ask(answers.find(job, 1), "ada")
    assert state() == "in_review"
    answers.decide(job, 1, "denied", by="rex")
    assert state() == "refused"
