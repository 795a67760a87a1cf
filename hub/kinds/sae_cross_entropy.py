"""`sae_cross_entropy`: what a model's loss becomes when a hook is replaced by an autoencoder's reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Handle, Hook, Job, Needed, Outcome, Progress, RowSet
from millpond.hub.kinds.capture import Prompt
from millpond.hub.shapes import result_bytes
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class SaeCrossEntropyJob(Job):
    """Cross-entropy of prompts as the model is, with the hook reconstructed, and with it set to 0; and the share recovered."""

    kind: Literal["sae_cross_entropy"]
    runs_on = "worker"
    artifact: Handle
    """An autoencoder of one hook."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Its name in the policy file; by default the autoencoder's own."""
    adapter: str | None = Field(default=None, max_length=200)
    """Name of an adapter that the installation has for the model."""
    prompts: Handle | RowSet | Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=100_000)]
    """A handle that sending prompts gave, rows of a run whose prompts are taken whole, or the prompts."""
    hook: Hook | None = None
    """Where it is spliced in; by default where it was trained."""
    first_position: int = Field(default=1, ge=0, lt=1 << 20)
    """Positions before it are left alone, and what follows them does not count. Of a run, its first row's counts instead."""
    bos: int | None = Field(default=None, ge=0, lt=1 << 31)
    """Token id in front of each prompt of a run that was captured without position 0."""

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The artifact, and the prompts or the run."""
        yield "artifact", self.artifact
        if isinstance(self.prompts, RowSet):
            yield "run", self.prompts.run
        elif isinstance(self.prompts, str):
            yield "prompts", self.prompts

    def answers(self) -> int:
        """One."""
        return 1

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        if (kind := facts.artifact(self.artifact)["kind"]) != "sae":
            raise InvalidInput(f"artifact: it is a {kind}; give an autoencoder")
        return result_bytes("sae-cross-entropy", {})

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class. A worker has measured the losses; here they are summed up."""
        from millpond.hub.losses import answer_of

        return Outcome((answer_of(self, vault, progress),))
