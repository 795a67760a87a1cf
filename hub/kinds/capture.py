"""`capture`: run prompts through a model and keep activations as a new run of the project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Handle, Hook, Job, Needed, Outcome, Progress, Wire
from millpond.store.errors import InvalidInput
from millpond.store.interventions import Ablate, Add, Clamp, Patch, SpliceSae
from millpond.store.positions import PositionFilter

if TYPE_CHECKING:
    from millpond.hub.vault import Vault

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class Prompt(Wire):
    """One prompt."""

    id: str = Field(min_length=1, max_length=200)
    text: str = Field(min_length=1, max_length=1 << 20)


Edits = Annotated[
    tuple[Annotated[Add | Ablate | Clamp | Patch | SpliceSae, Field(discriminator="op")], ...],
    Field(max_length=64),
]
"""Interventions. Vectors and autoencoders are named by the handles of the project's artifacts, patches' runs by theirs."""


def needs_of(prompts: object, edits: Edits) -> Iterator[tuple[Needed, str]]:
    """The prompts, artifacts and runs that a job of a model names."""
    if isinstance(prompts, str):
        yield "prompts", prompts
    for one in edits:
        if isinstance(one, Patch):
            yield "run", one.run
        elif isinstance(one, SpliceSae):
            yield "artifact", one.artifact
        elif isinstance(one.vector, str):
            yield "artifact", one.vector


class CaptureJob(Job):
    """A capture. It has no answer: what it makes is a run, whose handle is given when it is done."""

    kind: Literal["capture"]
    runs_on = "worker"
    model: str = Field(min_length=1, max_length=200)
    """Its name in the policy file."""
    adapter: str | None = Field(default=None, max_length=200)
    """Name of an adapter that the installation has for the model."""
    name: Name
    """Of the new run in the project."""
    prompts: Handle | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=100_000)]
    """A handle that sending prompts gave, or the prompts."""
    hooks: Annotated[tuple[Hook, ...], Field(min_length=1, max_length=512)]
    positions: PositionFilter = PositionFilter()
    max_new_tokens: int = Field(default=0, ge=0, le=65_536)
    interventions: Edits = ()

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """Prompts, artifacts and runs that it names."""
        return needs_of(self.prompts, self.interventions)

    def answers(self) -> int:
        """None."""
        return 0

    def answer_bytes(self, facts: Facts) -> int:
        """Nothing."""
        return 0

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """Raises InvalidInput: it is done by a capture worker, to whom the gateway hands it."""
        raise InvalidInput("a capture is done by a capture worker; start millpond worker")
