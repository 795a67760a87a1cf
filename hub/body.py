"""Every body that the gateway sends, as a closed set of types, each with one canonical encoding.

The first byte is the type. No body holds text that a user chose, except a run's own declared names.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from enum import Enum

import numpy as np

from millpond.hub.bits import BitReader, BitWriter
from millpond.hub.projection import RunView
from millpond.hub.rules import Rule, Verdict
from millpond.hub.shapes import Context, read_result, write_result
from millpond.hub.views import AuditView, EvidenceView, ReviewQueue
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

API = 2
"""The version of the interface, requests and bodies, which both sides compare when they meet."""
HANDLE_BYTES = 8


class ErrorCode(Enum):
    """Everything that an error may say."""

    BAD_REQUEST = 1
    NOT_FOUND = 2
    NOT_ALLOWED = 3
    TOO_LARGE = 4
    TOO_MANY = 5
    JOB_FAILED = 6
    BAD_GRAPH = 7
    BAD_RUN = 8
    NOT_REPRODUCED = 9
    UNAVAILABLE = 10
    VERSION = 11
    OVER_BUDGET = 12
    TIME_LIMIT = 13
    DISK_QUOTA = 14


JOB_STATES = ("queued", "running", "done", "failed", "refused", "in_review", "cancelled")
PROGRESS_STEPS = 16
_STATUSES = [(state, step) for state in JOB_STATES for step in (range(PROGRESS_STEPS) if state == "running" else (0,))]


@dataclass(frozen=True)
class JobStatus:
    """A job's state and sixteenths of its work: one of 22 values, so one byte."""

    state: str
    progress: int = 0

    @property
    def final(self) -> bool:
        """Whether it cannot change any more."""
        return self.state in ("done", "failed", "refused", "cancelled")


@dataclass(frozen=True)
class TrainingCurve:
    """The FVU of a training in each sixteenth of its work that has begun, in steps of a 200th: always 16 bytes."""

    codes: tuple[int, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The figures; 1.27 stands for all that are larger."""
        return tuple(code / _CURVE_STEPS for code in self.codes)


_CURVE_STEPS, _CURVE_MOST, _CURVE_NONE = 200, 254, 255


def curve_code(value: float) -> int:
    """How a `TrainingCurve` says `value`."""
    return min(_CURVE_MOST, max(0, round(value * _CURVE_STEPS))) if math.isfinite(value) else _CURVE_MOST


@dataclass(frozen=True)
class ReleasedResult:
    """A result that the gate let pass."""

    result: Result


@dataclass(frozen=True)
class Withheld:
    """A result that the gate refused or sent to review."""

    verdict: Verdict


@dataclass(frozen=True)
class Failure:
    """An error."""

    code: ErrorCode


@dataclass(frozen=True)
class Closed:
    """A budget is spent: always the same bytes."""


@dataclass(frozen=True)
class Quote:
    """The most bytes that a job can cost."""

    bytes: int


UNCAPPED = (1 << 48) - 1
"""What `BudgetLeft` says of a week without a cap."""


@dataclass(frozen=True, repr=False)
class BudgetLeft:
    """Bytes left for the user's week, the project and the model's lifetime, the latter two in steps of a 64th."""

    user_week: int
    project_64ths: int
    lifetime_64ths: int

    def __repr__(self) -> str:
        if self.user_week == UNCAPPED:
            return "<BudgetLeft: no cap>"
        return (
            f"<BudgetLeft: {self.user_week:,} bytes of the week, {self.project_64ths}/64 of the project's, "
            f"{self.lifetime_64ths}/64 of the model's>"
        )


@dataclass(frozen=True)
class Handles:
    """Random names of jobs, runs or artifacts."""

    values: tuple[bytes, ...]


@dataclass(frozen=True)
class Texts:
    """Completions, coded together by `textcode.encode`."""

    coded: bytes


Body = (
    ReleasedResult | Withheld | Failure | Closed | Quote | BudgetLeft | Handles | Texts | JobStatus | RunView
    | EvidenceView | ReviewQueue | AuditView | TrainingCurve
)  # fmt: skip
_TAGS: tuple[type[Body], ...] = (
    ReleasedResult, Withheld, Failure, Closed, Quote, BudgetLeft, Handles, Texts, JobStatus, RunView,
    EvidenceView, ReviewQueue, AuditView, TrainingCurve,
)  # fmt: skip


def encode(body: Body, context: Context) -> bytes:
    """The bytes of `body`, its numbers quantised as `context` says.

    Raises:
        InvalidInput: it holds something that may not leave.
    """
    out = BitWriter()
    match body:
        case ReleasedResult(result):
            write_result(out, result, context)
        case Withheld(verdict):
            out.write(int(verdict.outcome == "refuse"), 1)
            out.write(np.array([int(rule in verdict.rules) for rule in Rule]), 1)
        case Failure(code):
            out.write(code.value, 8)
        case Closed():
            pass
        case Quote(count):
            out.write(count, 48)
        case BudgetLeft(user_week, project, lifetime):
            out.write(user_week, 48)
            out.write(np.array([project, lifetime]), 8)
        case Handles(values):
            return _tag(body) + b"".join(_check_handle(value) for value in values)
        case Texts(coded):
            return _tag(body) + coded
        case JobStatus(state, progress):
            if (state, progress) not in _STATUSES:
                raise InvalidInput(f"job state {state!r} with progress {progress} does not exist")
            out.write(_STATUSES.index((state, progress)), 8)
        case TrainingCurve(codes):
            if len(codes) > PROGRESS_STEPS or any(not 0 <= code <= _CURVE_MOST for code in codes):
                raise InvalidInput(f"a training curve has {len(codes)} points, or one beyond {_CURVE_MOST}")
            out.write(np.array([*codes, *[_CURVE_NONE] * (PROGRESS_STEPS - len(codes))]), 8)
        case RunView() | EvidenceView() | ReviewQueue() | AuditView():
            return _tag(body) + json.dumps(asdict(body), sort_keys=True, separators=(",", ":")).encode()
    return _tag(body) + out.done()


def decode(data: bytes) -> Body:
    """The body that `encode` gave `data` for.

    Raises:
        InvalidInput: it gave `data` for none.
    """
    tag, rest = data[0] if data else 255, data[1:]
    if tag >= len(_TAGS):
        raise InvalidInput(f"the body begins with {data[:1]!r}, which no type has; upgrade the client")
    kind = _TAGS[tag]
    if kind is Handles:
        return Handles(tuple(_check_handle(rest[i : i + HANDLE_BYTES]) for i in range(0, len(rest), HANDLE_BYTES)))
    if kind is Texts:
        return Texts(rest)
    if kind is RunView or kind is EvidenceView or kind is ReviewQueue or kind is AuditView:
        return kind.parse(rest)
    bits = BitReader(rest)
    body: Body
    if kind is ReleasedResult:
        body = ReleasedResult(read_result(bits))
    elif kind is Withheld:
        refused = bits.one(1)
        marks = bits.read(1, len(Rule))
        rules = tuple(rule for rule, mark in zip(Rule, marks, strict=True) if mark)
        body = Withheld(Verdict("refuse" if refused else "review", rules))
    elif kind is Failure:
        body = Failure(_member(bits.one(8)))
    elif kind is Closed:
        body = Closed()
    elif kind is TrainingCurve:
        body = TrainingCurve(tuple(int(code) for code in bits.read(8, PROGRESS_STEPS) if code != _CURVE_NONE))
    elif kind is Quote:
        body = Quote(bits.one(48))
    elif kind is BudgetLeft:
        body = BudgetLeft(bits.one(48), bits.one(8), bits.one(8))
    else:
        code = bits.one(8)
        if code >= len(_STATUSES):
            raise InvalidInput(f"job status {code} does not exist")
        body = JobStatus(*_STATUSES[code])
    bits.check_end()
    return body


def _tag(body: Body) -> bytes:
    return bytes([_TAGS.index(type(body))])


def _member(code: int) -> ErrorCode:
    try:
        return ErrorCode(code)
    except ValueError as error:
        raise InvalidInput(f"error code {code} does not exist; upgrade the client") from error


def _check_handle(value: bytes) -> bytes:
    if len(value) != HANDLE_BYTES:
        raise InvalidInput(f"a handle has {len(value)} bytes; it must have {HANDLE_BYTES}")
    return value
