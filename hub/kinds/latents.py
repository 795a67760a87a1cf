"""`latents`: look at chosen latents of an autoencoder of the project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Handle, Hook, Job, Needed, Outcome, Progress, RowSet
from millpond.hub.shapes import result_bytes
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.vault import Vault

HISTOGRAM_BINS = 24
"""As `analysis.sae.latents.BINS`."""


class LatentsJob(Job):
    """Density, activations and the strongest places of each latent, as references to the client's prompts."""

    kind: Literal["latents"]
    artifact: Handle
    hook: Hook
    rows: RowSet
    latents: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 20)], ...], Field(min_length=1, max_length=512)]
    contexts: int = Field(default=10, ge=1, le=100)

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The run and the autoencoder."""
        yield "run", self.rows.run
        yield "artifact", self.artifact

    def answers(self) -> int:
        """One a latent."""
        return len(self.latents)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.rows.run, (self.hook,))
        found = facts.artifact(self.artifact)
        if found["kind"] != "sae":
            raise InvalidInput(f"the artifact is a {found['kind']}; give the handle of an autoencoder")
        n = self.contexts
        shapes: dict[str, tuple[int, ...]] = {"histogram": (HISTOGRAM_BINS,), "contexts": (n,), "activations": (n,)}
        return len(self.latents) * result_bytes("latent", shapes)

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import fitted_to, latent_results, load_sae, rows_of

        part = rows_of(vault, self.rows)
        artifact = vault.load(self.artifact)
        sae = load_sae(artifact)
        results = latent_results(sae, part.view, self.hook, self.latents, self.contexts)
        progress(0.7)
        seen = measure((part,), hooks=(self.hook,), behind=fitted_to(vault, artifact))
        return Outcome(tuple(Answer(result, seen) for result in results))
