"""What work will cost before it is done: upper bounds in bytes, exact for everything but text and time."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millpond.hub.body import BudgetLeft, Handles, JobStatus, Quote, encode
from millpond.hub.policy import Charges, Disclosure
from millpond.hub.shapes import Context, result_bytes
from millpond.hub.slots import slots_in
from millpond.store.errors import InvalidInput

_CONTEXT = Context(Disclosure(), restricted=True)
_STATUS = len(encode(JobStatus("queued"), _CONTEXT))
_SUBMIT = (encode(Quote(0), _CONTEXT), encode(Handles((b"\0" * 8,)), _CONTEXT))
_LEFT = len(encode(BudgetLeft(0, 0, 0), _CONTEXT))
_END_MARK = 2
"""Bytes that the end of a coded text costs at most."""


class _Item(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    what: str
    """In your words."""
    times: int = Field(default=1, ge=1)
    """Jobs of this kind."""

    @abstractmethod
    def cost(self, charges: Charges) -> int:
        """Bytes of all."""


class _JobItem(_Item, ABC):
    seconds: float = Field(default=60, ge=0)
    """That one takes: its status is watched all the time."""

    @abstractmethod
    def answers(self, charges: Charges) -> int:
        """Bytes of the answers of one job."""

    def cost(self, charges: Charges) -> int:
        """The quote, the job's handle, its status in each slot, its answers."""
        job = sum(len(body) + charges.response_bytes for body in _SUBMIT)
        job += _STATUS * slots_in(self.seconds, charges)
        return self.times * (job + self.answers(charges))


class ResultItem(_JobItem):
    """Jobs that answer with results."""

    kind: Literal["result"]
    result: str
    """A kind of result, such as `probe-sweep`."""
    shapes: dict[str, tuple[int, ...]] = {}
    """Lengths of its arrays."""
    each: int = Field(default=1, ge=1)
    """Results of a job, such as latents looked at."""

    def answers(self, charges: Charges) -> int:
        """See the base class."""
        return self.each * (result_bytes(self.result, self.shapes) + charges.response_bytes)


class TextItem(_JobItem):
    """Jobs that answer with completions; usually they are coded in a fraction of these bytes."""

    kind: Literal["text"]
    completions: int = Field(ge=1)
    """Of a job, in one answer."""
    bytes: int = Field(ge=1)
    """The most that one may have; longer ones are cut."""

    def answers(self, charges: Charges) -> int:
        """See the base class."""
        return 1 + 6 + self.completions * (self.bytes + -(-self.bytes // 128) + _END_MARK) + charges.response_bytes


class NotebookItem(_Item):
    """An open notebook, whose status line shows the budget, fetched once an hour."""

    kind: Literal["notebook"]
    hours: int = Field(ge=1)

    def cost(self, charges: Charges) -> int:
        """See the base class."""
        return self.times * self.hours * (_LEFT + charges.response_bytes)


Item = Annotated[ResultItem | TextItem | NotebookItem, Field(discriminator="kind")]


class Plan(BaseModel):
    """A plan file: items of work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: tuple[Item, ...]


@dataclass(frozen=True)
class Priced:
    """An item and the most that it can cost."""

    what: str
    times: int
    bytes: int


def read_plan(path: Path) -> Plan:
    """The plan in the TOML file `path`, a list of `[[items]]`.

    Raises:
        InvalidInput: it cannot be read or has an unknown field.
    """
    try:
        return Plan.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the plan {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"plan {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def price(plan: Plan, charges: Charges) -> list[Priced]:
    """The most that each item of `plan` can cost."""
    return [Priced(item.what, item.times, item.cost(charges)) for item in plan.items]
