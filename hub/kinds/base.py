"""What every kind of job shares: the wire model, what a quote depends on, and what a run of it gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from millpond.hub.policy import Charges
from millpond.hub.rules import Evidence
from millpond.hub.shapes import result_bytes
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.hub.vault import Vault

Handle = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""A random name that the gateway gave, in hexadecimal digits."""
Hook = Annotated[str, Field(min_length=1, max_length=120)]
LabelName = Annotated[str, Field(min_length=1, max_length=120)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Progress = Callable[[float], None]
"""Told the share of the work that is done."""
Needed = Literal["run", "artifact", "prompts"]


class Wire(BaseModel):
    """A model of the wire: unknown fields are refused, NaN and infinity too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Split(Wire):
    """A split by prompt, as `run.split` makes it."""

    test: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of the prompts, or of the groups, in the test part."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    by: str | None = Field(default=None, max_length=120)
    """Column of the prompts whose groups are kept together."""


class RowSet(Wire):
    """Rows of a run: all, those of a condition, or a part of a split of them. The condition comes before the split."""

    run: Handle
    where: str | None = Field(default=None, max_length=4096)
    """A condition on labels and prompt columns, as `run.select` takes it."""
    split: Split | None = None
    part: Literal["train", "test"] | None = None
    """Which part of `split`."""


class Facts(Protocol):
    """What a quote may depend on: declared facts, never what activations are."""

    def d_model(self, run: str) -> int:
        """Width of the rows of the run of that handle."""
        ...

    def hooks(self, run: str, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The run's hooks that names or globs select."""
        ...

    def groups(self, run: str, label: str) -> int:
        """Different values of a label of the run."""
        ...

    def width(self, run: str, column: Any) -> int:
        """Values a row of an expression's column."""
        ...

    def artifact(self, artifact: str) -> Mapping[str, Any]:
        """What the artifact of that handle was kept with: `kind` and `shape`."""
        ...

    def prompts(self, prompts: str, by: str | None) -> tuple[int, int]:
        """How many prompts that handle stands for, and of how many groups of their column `by`."""
        ...

    def statistic(self, graph: str, d_model: int) -> int:
        """Check a graph in every way; the most values that its output `statistic` may have, 0 if it has none."""
        ...


@dataclass(frozen=True)
class Answer:
    """A result, with what the rules judge."""

    result: Result
    evidence: Evidence


@dataclass(frozen=True)
class Made:
    """Something that stays in the vault under a handle of the project."""

    kind: Literal["run", "artifact"]
    name: str
    """As the project calls it."""
    target: str
    """Its name in the lake."""
    model: str
    """Of the policy file: what it was made from."""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a job has come to."""

    answers: tuple[Answer, ...] = ()
    made: tuple[Made, ...] = ()


class Job(Wire):
    """A declared job. Subclasses have a `kind` and say what they cost and how they are run; one that does not cannot be made."""

    kind: str
    runs_on: ClassVar[Literal["executor", "worker"]] = "executor"
    """Who takes it: an executor, or first a capture worker."""

    @abstractmethod
    def needs(self) -> Iterator[tuple[Needed, str]]:
        """Kind and handle of everything that it reads."""

    def row_sets(self) -> Iterator[RowSet]:
        """The rows that it reads."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, RowSet):
                yield value

    def labels_read(self) -> Iterator[tuple[str, str]]:
        """Run handle and label of every label that it reads, but for those in conditions."""
        one, several = getattr(self, "label", None), getattr(self, "labels", ())
        for rows in self.row_sets():
            for name in (*(() if one is None else (one,)), *several):
                yield rows.run, name

    @abstractmethod
    def answers(self) -> int:
        """How many answers it has."""

    @abstractmethod
    def answer_bytes(self, facts: Facts) -> int:
        """Bytes of its answers together, at most.

        Raises:
            InvalidInput: it cannot be done, as far as declared facts say.
        """

    def quote(self, facts: Facts, charges: Charges) -> int:
        """Bytes that its answers can cost, each fetched once."""
        return self.answer_bytes(facts) + self.answers() * charges.response_bytes

    @abstractmethod
    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """Do it, in the vault. Run again from the same data, it gives the same.

        Raises:
            MillpondError: it cannot be done; clients are told only that.
        """


FIRING_BINS = 14
"""Intervals of `analysis.sae.evaluation.FREQUENCY_EDGES`."""


def sae_evaluation_bytes() -> int:
    """Bytes of an autoencoder's evaluation."""
    return result_bytes("sae-evaluation", {"frequency_histogram": (FIRING_BINS,)})


def evaluation_bytes() -> int:
    """Bytes of a probe's evaluation, of classes or of numbers."""
    return max(result_bytes("probe-evaluation", {}), result_bytes("regression-evaluation", {}))
