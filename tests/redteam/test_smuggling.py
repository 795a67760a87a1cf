"""Bits hidden in what a released number does not need, in timing, and in what is asked; and spending to the byte."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from millpond.hub.body import Closed, ErrorCode, Failure, JobStatus, ReleasedResult, decode
from millpond.hub.ledger import Payer
from millpond.hub.projection import new_handle
from millpond.hub.release import Question
from millpond.hub.rules import Evidence
from millpond.hub.slots import slot_end_ms, slot_of, slots_in
from millpond.store.result import Result

from .conftest import ADA, ask

OWN = Evidence(prompts_are="own", rows=1000, prompts=1000, target="label")
MESSAGE = b"stolen weights"


def accomplice(bits, value=0.8731):
    """A value with a message in its low digits, as code in the vault with a grudge would make it."""
    number = int.from_bytes(struct.pack(">d", value), "big") & ~((1 << 24) - 1)
    return struct.unpack(">d", (number | bits).to_bytes(8, "big"))[0]


def low_bits(value):
    return int.from_bytes(struct.pack(">d", value), "big") & ((1 << 24) - 1)


def sent(door, number, result, evidence=OWN):
    verdict, answer = door.release(ask(number), result, evidence, ADA)
    assert verdict.outcome == "pass"
    return answer.body


def test_low_digits_carry_nothing(door):
    words = [int.from_bytes(MESSAGE[i : i + 3].ljust(3), "big") for i in range(0, len(MESSAGE), 3)]
    values = [accomplice(word) for word in words]
    assert b"".join(low_bits(value).to_bytes(3, "big") for value in values).rstrip() == MESSAGE  # ungated, all of it
    bodies = {sent(door, i, Result("summary", {"mean": value})) for i, value in enumerate(values)}
    assert len(bodies) == 1


def test_nan_payloads_signs_of_zero_names_and_order_carry_nothing(door):
    nans = [struct.unpack(">d", struct.pack(">Q", 0x7FF8 << 48 | word))[0] for word in (1, 0xC0FFEE, 0xDEAD)]
    assert [int.from_bytes(struct.pack(">d", nan), "big") & 0xFFFFFF for nan in nans] == [1, 0xC0FFEE, 0xDEAD]
    assert len({sent(door, i, Result("summary", {"mean": nan})) for i, nan in enumerate(nans)}) == 1
    assert (
        len({sent(door, 10 + i, Result("summary", {"mean": zero})) for i, zero in enumerate((0.0, -0.0, 1e-300))}) == 1
    )
    fields = {"l0": 3.0, "fvu": 0.5, "mse": 1.0, "cosine": 0.9}
    orders = [
        dict(sorted(fields.items(), key=key)) for key in (None, lambda item: -item[1], lambda item: item[0][::-1])
    ]
    assert len({sent(door, 20 + i, Result("sae-evaluation", order)) for i, order in enumerate(orders)}) == 1
    for name in ("mean_of_" + MESSAGE.hex(), "MEAN", ""):
        _, answer = door.release(ask(name), Result("summary", {name: 1.0}), OWN, ADA)
        assert decode(answer.body) == Failure(ErrorCode.JOB_FAILED)
    for text in ("stolen", MESSAGE.decode()):  # values that are text
        _, answer = door.release(ask(text), Result("summary", {"mean": text}), OWN, ADA)
        assert decode(answer.body) == Failure(ErrorCode.JOB_FAILED)
        assert answer.charged == len(answer.body) + 16


def test_provenance_and_unlisted_evidence_stay(door):
    plain = Result("summary", {"mean": 1.0}, {}, {"rows": 100}, {"run": "r"})
    loud = Result("summary", {"mean": 1.0}, {}, {"rows": 100, "secret": 42}, {"run": MESSAGE.decode(), "seed": 42})
    assert sent(door, 1, plain) == sent(door, 2, loud)


def poll(door, job, finished_ms, every_ms=7, until_ms=3000):
    """What a client sees of a job that ends at `finished_ms`, asking all the time, and what that cost."""
    seen, cost = [], 0
    for now in range(0, until_ms, every_ms):
        answer = door.status(job, lambda at: JobStatus("done" if at >= finished_ms else "running"), now, ADA)
        seen.append((now, answer.body))
        cost += answer.charged
    return seen, cost


def test_timing_within_a_slot_carries_nothing_and_polling_costs_nothing_extra(door):
    early, cost = poll(door, "a", 1010)
    late, _ = poll(door, "b", 1090)
    assert early == late
    other, _ = poll(door, "c", 1110)
    assert other != early
    slots = slot_of(1100, door.ledger.policy.charges)
    assert cost == 2 * slots  # two bytes a slot: the type and the state
    _, again = poll(door, "a", 1010, every_ms=1)
    assert again == 0
    assert cost <= 2 * slots_in(1.01, door.ledger.policy.charges)


def test_slots_grow_so_that_a_long_job_is_cheap_and_its_end_is_seen_soon(door):
    charges = door.ledger.policy.charges
    assert [slot_end_ms(n, charges) for n in range(4)] == [0, 100, 200, 300]
    for seconds in (1, 60, 3600, 86_400):
        number = slot_of(seconds * 1000, charges)
        following = slot_end_ms(number + 1, charges)
        assert slot_end_ms(number, charges) <= seconds * 1000 < following
        assert following - seconds * 1000 <= max(100, seconds * 1000 / 31)  # at most 3.2 % late
    assert slots_in(7200, charges) < 300


def test_an_answer_kept_for_one_project_is_new_to_another(door):
    spec, result = {"kind": "statistics"}, Result("summary", {"mean": 1.5})
    answers = []
    for project in ("one", "one", "two"):
        payer = Payer("ada", project, ("m",))
        answers.append(door.release(Question(project, "run", spec), result, OWN, payer)[1])
    assert len({answer.body for answer in answers}) == 1
    assert [answer.charged for answer in answers] == [16 + len(answers[0].body), 16, 16 + len(answers[0].body)]
    # asked again, other values (another seed, another moment) give the same bytes: nothing to average
    again = door.release(
        Question("one", "run", spec), replace(result, values={"mean": 9.0}), OWN, Payer("bob", "one", ("m",))
    )[1]
    assert again.body == answers[0].body


def test_handles_say_nothing_of_what_they_name():
    assert len({new_handle() for _ in range(1000)}) == 1000


def test_many_tiny_queries_never_add_up_to_more_than_the_cap(door):
    payer = Payer("eve", "drip", ("m",))
    door.ledger.propose_cap("user_week:m", 5_000, by="operator")
    out, number, answer = 0, 0, None
    while answer is None or answer.charged:
        number += 1
        question = Question("drip", "run", {"number": number})
        answer = door.release(question, Result("summary", {"mean": float(number)}), OWN, payer)[1]
        out += answer.charged
    assert decode(answer.body) == Closed()
    week = door.ledger.balances(payer)[0]
    assert week.spent == out + 17  # and the notice, once
    assert 5_000 - 40 < week.spent <= 5_000
    for _ in range(50):  # the notice again and again: constant, so free
        assert door.send(Failure(ErrorCode.NOT_FOUND), payer).body == answer.body
    assert door.ledger.balances(payer)[0].spent == week.spent
    assert door.ledger.verify().charged == week.spent


def test_a_closed_budget_does_not_tell_how_long_the_answer_would_have_been(door):
    """Ungated, asking for one answer after another whether it still fits is a free bit each."""
    payer = Payer("eve", "drip", ("m",))
    door.ledger.propose_cap("user_week:m", 400, by="operator")
    long = Result("mean", {"mean": np.random.default_rng(0).standard_normal(500)})
    wide = replace(OWN, variance_ratio=1.0, identical_share=0.0)
    answers = [
        door.release(Question("drip", "run", {"n": n}), result, wide, payer)[1]
        for n, result in enumerate([long, Result("summary", {"mean": 1.0}), long, Result("summary", {"mean": 2.0})])
    ]
    assert {decode(answer.body) for answer in answers} == {Closed()}
    assert [answer.charged for answer in answers] == [0, 0, 0, 0]
    assert door.ledger.balances(payer)[0].spent == 17


def test_a_job_too_dear_is_refused_by_its_quote_and_closes_nothing(door):
    payer = Payer("bob", "drip", ("m",))
    assert door.admit(1_000_000 - 17, payer) is None
    refused = door.admit(1_000_000 - 16, payer)
    assert decode(refused.body) == Failure(ErrorCode.OVER_BUDGET)
    assert refused.charged == 16 + 2
    assert door.admit(1_000_000 - 17 - 18, payer) is None


@pytest.mark.parametrize("kind", ["mean", "summary"])
def test_two_vaults_with_other_weights_answer_alike_but_for_the_charged_payload(door, kind):
    """Non-interference: lengths, charges and everything but the numbers are a function of the question."""
    wide = replace(OWN, variance_ratio=1.0, identical_share=0.0)
    bodies = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        value = rng.standard_normal(64) * 10.0**seed if kind == "mean" else float(rng.standard_normal())
        bodies.append(sent(door, seed, Result(kind, {"mean": value}), wide))
    assert len(bodies[0]) == len(bodies[1])
    assert bodies[0][:2] == bodies[1][:2]  # the type and the kind
    assert bodies[0] != bodies[1]
    assert isinstance(decode(bodies[0]), ReleasedResult)
