"""The one door for outgoing bodies: quantise, encode, charge, and only then hand over the bytes to send.

Every handler of the gateway answers with what `Door.send`, `Door.status` or `Door.release` returns, and with nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from millpond.hub.body import (
    Body,
    Closed,
    ErrorCode,
    Failure,
    JobStatus,
    ReleasedResult,
    Texts,
    TrainingCurve,
    Withheld,
    encode,
)
from millpond.hub.ledger import Ledger, Payer, Sent, Writer
from millpond.hub.rules import Earlier, Evidence, Verdict, judge
from millpond.hub.shapes import TEXTS, Context
from millpond.hub.slots import slot_end_ms, slot_of
from millpond.store.errors import InvalidInput
from millpond.store.result import Result


@dataclass(frozen=True)
class Question:
    """What was asked, as far as the answer depends on it: the same question in a project gets the same bytes."""

    project: str
    run: str
    """The run's handle, for the differencing rules."""
    specification: Mapping[str, Any]
    """The job's, validated, with the hashes of all data and artifacts that it reads."""

    @property
    def key(self) -> str:
        """Its key in the ledger."""
        text = json.dumps([self.run, self.specification], sort_keys=True, separators=(",", ":"))
        return f"question:{self.project}:{hashlib.sha256(text.encode()).hexdigest()}"


def body_of(result: Result) -> ReleasedResult | Texts:
    """What sends a result."""
    return (
        Texts(np.asarray(result.values["coded"], np.uint8).tobytes())
        if result.kind == TEXTS
        else ReleasedResult(result)
    )


@dataclass
class Door:
    """Quantises, encodes and charges by the ledger's policy."""

    ledger: Ledger
    _plain: Context = field(init=False)

    def __post_init__(self) -> None:
        self._plain = Context(self.ledger.policy.disclosure, restricted=True)

    def send(self, body: Body, payer: Payer, *, restricted: bool = True) -> Sent:
        """The bytes of `body`, charged at their length and the fixed amount; or the notice that a budget is spent.

        What cannot be encoded is answered with an error, charged too.
        """
        with self.ledger.writing() as writer:
            return self._charge(writer, body, payer, restricted=restricted)

    def admit(self, quote: int, payer: Payer) -> Sent | None:
        """None if a job that costs at most `quote` bytes fits `payer`'s budgets now; else the error to send.

        Called before a job is taken: a quote depends on shapes alone, so this refusal closes no budget.
        """
        room = quote + self.ledger.notice_bytes
        if all(balance.left is None or balance.left >= room for balance in self.ledger.balances(payer)):
            return None
        return self.send(Failure(ErrorCode.OVER_BUDGET), payer)

    def again(self, question: Question, payer: Payer) -> Sent | None:
        """The bytes that answered `question` in this project before, for the fixed amount only; None if it is new."""
        with self.ledger.writing() as writer:
            known = writer.known(question.key)
            return None if known is None else self._repeat(writer, known, payer)

    def release(
        self, question: Question, result: Result, evidence: Evidence, payer: Payer, *, approved: bool = False
    ) -> tuple[Verdict, Sent]:
        """Judge `result` and send it, or the rules that hold it back.

        A reviewer who has `approved` it answers the rules that ask for one. Those that refuse hold as before: what has been
        released since it was asked may single somebody out together with it.

        Judging, charging and noting what was shown are one transaction: of two releases that together would single
        somebody out, one is refused.
        """
        restricted = evidence.prompts_are == "restricted"
        with self.ledger.writing() as writer:
            known = writer.known(question.key)
            if known is not None:
                return Verdict("pass"), self._repeat(writer, known, payer)
            earlier = [_unpack(data) for data in writer.earlier(question.run)] if restricted else []
            verdict = judge(result, evidence, earlier, self.ledger.policy.disclosure)
            if verdict.outcome == "refuse" or (verdict.outcome == "review" and not approved):
                return verdict, self._charge(writer, Withheld(verdict), payer)
            shown = (question.run, _pack(evidence)) if restricted else None
            return verdict, self._charge(
                writer, body_of(result), payer, restricted=restricted, key=question.key, shown=shown
            )

    def status(self, job: str, state_at: Callable[[int], JobStatus], elapsed_ms: int, payer: Payer) -> Sent:
        """The state of `job` as it was at the end of the last slot, charged once a slot however often it is asked for.

        `state_at` gives the state so many ms after submission. When it is final, later slots cost nothing.
        """
        slot = slot_of(elapsed_ms, self.ledger.policy.charges)
        if slot == 0:
            return Sent(encode(JobStatus("queued"), self._plain), 0, 0)
        at_end = state_at(slot_end_ms(slot, self.ledger.policy.charges))
        key = f"final:{job}" if at_end.final else f"slot:{job}:{slot}"
        known = self.ledger.known(key)
        if known is not None:
            return known
        with self.ledger.writing() as writer:
            body = encode(at_end, self._plain)
            sent = writer.known(key) or writer.charge(payer, len(body), what="JobStatus", body=body, key=key)
            return sent or self._closed()

    def curve(self, job: str, curve_at: Callable[[int], TrainingCurve], elapsed_ms: int, payer: Payer) -> Sent:
        """The training curve of `job` as it was at the end of the last slot: charged as a body, once a slot."""
        charges = self.ledger.policy.charges
        slot = slot_of(elapsed_ms, charges)
        key = f"curve:{job}:{slot}"
        known = self.ledger.known(key)
        if known is not None:
            return known
        with self.ledger.writing() as writer:
            body = encode(curve_at(slot_end_ms(slot, charges)), self._plain)
            count = len(body) + charges.response_bytes
            sent = writer.known(key) or writer.charge(payer, count, what="TrainingCurve", body=body, key=key)
            return sent or self._closed()

    def _charge(
        self,
        writer: Writer,
        body: Body,
        payer: Payer,
        *,
        restricted: bool = True,
        key: str | None = None,
        shown: tuple[str, bytes] | None = None,
    ) -> Sent:
        try:
            data = encode(body, Context(self.ledger.policy.disclosure, restricted))
        except InvalidInput:
            body, key, shown = Failure(ErrorCode.JOB_FAILED), None, None
            data = encode(body, self._plain)
        count = len(data) + self.ledger.policy.charges.response_bytes
        sent = writer.charge(payer, count, what=type(body).__name__, body=data, key=key, shown=shown)
        return sent or self._closed()

    def _repeat(self, writer: Writer, known: Sent, payer: Payer) -> Sent:
        fixed = self.ledger.policy.charges.response_bytes
        return writer.charge(payer, fixed, what="Repeat", body=known.body) or self._closed()

    def _closed(self) -> Sent:
        """What everybody is told who asks of a closed budget; the ledger has charged for the first notice."""
        return Sent(encode(Closed(), self._plain), 0, 0)


def _pack(evidence: Evidence) -> bytes:
    cohorts = [sorted(cohort.items()) for cohort in evidence.cohorts]
    return json.dumps([evidence.label_set, cohorts], separators=(",", ":")).encode()


def _unpack(data: bytes) -> Earlier:
    label_set, cohorts = json.loads(data)
    return Earlier(tuple(dict(cohort) for cohort in cohorts), label_set)
