"""`generate`: let a model write, and answer with how often what it wrote matches; or, after a review, with the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from millpond.hub.kinds.base import Facts, Finite, Handle, Hook, Job, Needed, Outcome, Progress, Wire
from millpond.hub.kinds.capture import Edits, Prompt, needs_of
from millpond.hub.shapes import result_bytes
from millpond.hub.textcode import MAX_TEXT, most_bytes
from millpond.store.errors import InvalidInput
from millpond.store.generation import Question, Sampling

if TYPE_CHECKING:
    from millpond.hub.vault import Vault

MOST_COMPLETIONS = 200_000
MOST_GROUPS = 1000


class Regex(Wire):
    """A completion matches if the expression is found in it."""

    regex: str = Field(min_length=1, max_length=1000)
    """In the syntax of RE2, whose time is linear in the text whatever the expression."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, given: str) -> str:
        from millpond.hub.rates import compiled

        compiled(given)
        return given


class Contains(Wire):
    """A completion matches if it contains one of the texts, in the same case."""

    contains: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...], Field(min_length=1, max_length=100)
    ]


class OverThreshold(Wire):
    """A completion matches if what a probe of the project makes of it is over a threshold.

    The probe scores the row that each of its tokens was drawn from, as the model runs: the prompt's last one, and those of
    the generated tokens but the last.
    """

    probe: Handle
    """One of two classes, or of a number."""
    hook: Hook | None = None
    """Where it reads; by default where it was trained."""
    of: Literal["mean", "max", "last"] = "mean"
    """What is made of the scores of a completion's rows."""
    threshold: Finite = 0.0


class Judge(Question):
    """A model of the vault answers a question about each completion; the answer is the share of each of its choices."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Its name in the policy file; by default the job's own model."""
    adapter: str | None = Field(default=None, max_length=200)
    """Name of an adapter that the installation has for it. The job's interventions and adapter are not the judge's."""


def _way(score: Any) -> str | None:
    """By which of its fields a score is told: no other would say what is wrong with it."""
    given = score if isinstance(score, Mapping) else dir(score)
    return next((name for name in ("regex", "contains", "probe", "template") if name in given), None)


Score = Annotated[
    Annotated[Regex, Tag("regex")]
    | Annotated[Contains, Tag("contains")]
    | Annotated[OverThreshold, Tag("probe")]
    | Annotated[Judge, Tag("template")],
    Discriminator(
        _way, custom_error_type="score", custom_error_message="a score has one of regex, contains, probe and template"
    ),
]


class GenerateJob(Job):
    """Completions of prompts. They stay in the vault; what leaves are rates, and texts only if a reviewer lets them."""

    kind: Literal["generate"]
    runs_on = "worker"
    model: str = Field(min_length=1, max_length=200)
    """Its name in the policy file."""
    adapter: str | None = Field(default=None, max_length=200)
    """Name of an adapter that the installation has for the model."""
    prompts: Handle | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=100_000)]
    """A handle that sending prompts gave, or the prompts."""
    interventions: Edits = ()
    sampling: Sampling
    score: Score | None = None
    """What counts as a match; the answer is the share of completions that match, with a probe also the mean score."""
    by: str | None = Field(default=None, max_length=120)
    """Column of the prompts that were sent: rates of its groups, in the order of their names, follow the overall one."""
    texts: bool = False
    """Also ask for the texts. A reviewer decides, always."""
    text_bytes: int = Field(default=256, ge=1, le=65_536)
    """UTF-8 bytes of a completion that are sent; longer ones are cut."""

    @model_validator(mode="after")
    def _asks_something(self) -> GenerateJob:
        if self.score is None and not self.texts:
            raise ValueError("neither score nor texts is given, so there is nothing to answer; give one")
        if self.by is not None and (self.score is None or not isinstance(self.prompts, str)):
            raise ValueError("by needs a score, and prompts that were sent with their columns; name them by handle")
        return self

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """Prompts, artifacts and runs that it names."""
        yield from needs_of(self.prompts, self.interventions)
        if isinstance(self.score, OverThreshold):
            yield "artifact", self.score.probe

    def judging_model(self) -> str | None:
        """The policy's name of the model that judges; None without a judge."""
        return (self.score.model or self.model) if isinstance(self.score, Judge) else None

    def answers(self) -> int:
        """Rates, then texts, as asked."""
        return (self.score is not None) + self.texts

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        if isinstance(self.prompts, str):
            prompts, groups = facts.prompts(self.prompts, self.by)
        else:
            prompts, groups = len(self.prompts), 0
        count = prompts * self.sampling.n
        if count > MOST_COMPLETIONS or groups > MOST_GROUPS:
            raise InvalidInput(
                f"{count:,} completions of {groups:,} groups are asked for; at most {MOST_COMPLETIONS:,} of "
                f"{MOST_GROUPS:,} are possible: send fewer prompts, or lower sampling.n"
            )
        found = 0
        if isinstance(self.score, OverThreshold):
            probe = facts.artifact(self.score.probe)
            if probe["kind"] != "probe" or probe["shape"][0] != 1:
                raise InvalidInput(
                    f"score.probe: the artifact is a {probe['kind']} of shape {tuple(probe['shape'])}; give a probe of two "
                    "classes, or of a number"
                )
            found += result_bytes("probe-rates", {"rates": (1 + groups,), "scores": (1 + groups,)})
        elif self.score is not None:
            choices = len(self.score.choices) if isinstance(self.score, Judge) else 1
            found += result_bytes("rates", {"rates": (choices * (1 + groups),)})
        if self.texts:
            if count * self.text_bytes > MAX_TEXT:
                raise InvalidInput(
                    f"{count:,} texts of {self.text_bytes:,} bytes are over {MAX_TEXT:,}; lower text_bytes, or ask in parts"
                )
            found += 1 + most_bytes([bytes(self.text_bytes)] * count)
        return found

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class. A worker has written the completions; here they are scored and coded."""
        from millpond.hub.generations import answers_of

        return Outcome(answers_of(self, vault, progress))
