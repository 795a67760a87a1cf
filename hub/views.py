"""What reviewers and administrators are shown beside results: bodies of their own, charged as everything is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millpond.hub.rules import Evidence, Rule, Verdict
from millpond.store.errors import InvalidInput

_DIGITS = 3


@dataclass(frozen=True)
class EvidenceView:
    """What a reviewer sees of an answer before its values: why it waits, and what trusted code measured beside it."""

    rules: tuple[int, ...]
    """Numbers of `Rule`."""
    prompts_are: str
    rows: int
    prompts: int
    target: str
    class_rows: tuple[int, ...]
    class_prompts: tuple[int, ...]
    parameters: int
    top_prompt_share: float
    """Shares and ratios have three digits."""
    top_two_share: float
    variance_ratio: float | None
    identical_share: float | None
    intervened: bool
    custom: bool
    token_only: bool

    @classmethod
    def of(cls, evidence: Evidence, verdict: Verdict) -> EvidenceView:
        """The view of `evidence`; cohorts, which are hashes of rows, are not in it."""
        return cls(
            rules=tuple(rule.value for rule in verdict.rules),
            prompts_are=evidence.prompts_are,
            rows=evidence.rows,
            prompts=evidence.prompts,
            target=evidence.target,
            class_rows=evidence.class_rows,
            class_prompts=evidence.class_prompts,
            parameters=evidence.parameters,
            top_prompt_share=_rounded(evidence.top_prompt_share) or 0.0,
            top_two_share=_rounded(evidence.top_two_share) or 0.0,
            variance_ratio=_rounded(evidence.variance_ratio),
            identical_share=_rounded(evidence.identical_share),
            intervened=evidence.intervened,
            custom=evidence.custom,
            token_only=evidence.token_only,
        )

    @classmethod
    def parse(cls, data: bytes) -> EvidenceView:
        """The view in canonical JSON; raises InvalidInput."""
        found = _parse(data)
        try:
            return cls(**found | {name: tuple(found[name]) for name in ("rules", "class_rows", "class_prompts")})
        except (TypeError, KeyError) as error:
            raise InvalidInput(f"the body is no evidence: {error}") from error

    def why(self) -> tuple[Rule, ...]:
        """The rules."""
        return tuple(map(Rule, self.rules))


@dataclass(frozen=True)
class ReviewQueue:
    """The answers of a project that wait for a reviewer, oldest first."""

    waiting: tuple[tuple[str, int], ...]
    """Job, and the answer's number."""

    @classmethod
    def parse(cls, data: bytes) -> ReviewQueue:
        """The view in canonical JSON; raises InvalidInput."""
        try:
            return cls(tuple((str(job), int(number)) for job, number in _parse(data)["waiting"]))
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidInput(f"the body is no review queue: {error}") from error


@dataclass(frozen=True)
class AuditEntry:
    """One entry of the ledger."""

    seq: int
    at: str
    kind: str
    who: str
    what: str
    bytes: int
    accounts: tuple[str, ...]

    @classmethod
    def of(cls, seq: int, at: str, kind: str, detail: str) -> AuditEntry:
        """The entry with this row of the ledger."""
        found = json.loads(detail)
        who = found.get("user") or found.get("by") or ""
        accounts = found.get("accounts") or ([found["account"]] if "account" in found else [])
        what = found.get("what") or (f"{found['percent']} %" if "percent" in found else "")
        count = found.get("bytes", found.get("spent", 0))
        return cls(seq, at, kind, ", ".join(who) if isinstance(who, list) else who, what, count, tuple(accounts))


@dataclass(frozen=True)
class AuditView:
    """A page of the ledger, newest first."""

    last: int
    """Number of the newest entry."""
    entries: tuple[AuditEntry, ...]

    @classmethod
    def parse(cls, data: bytes) -> AuditView:
        """The view in canonical JSON; raises InvalidInput."""
        found = _parse(data)
        try:
            entries = (AuditEntry(**one | {"accounts": tuple(one["accounts"])}) for one in found["entries"])
            return cls(found["last"], tuple(entries))
        except (TypeError, KeyError) as error:
            raise InvalidInput(f"the body is no page of the ledger: {error}") from error


def audit_view(last: int, rows: Sequence[Any]) -> AuditView:
    """The view of rows `(seq, at, kind, detail)` of the ledger."""
    return AuditView(last, tuple(AuditEntry.of(*row) for row in rows))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise InvalidInput(f"the body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput("the body is no JSON object")
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
