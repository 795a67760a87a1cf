"""`evaluate`: measure a probe or an autoencoder of the project on rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from millpond.hub.kinds.base import (
    Facts,
    Handle,
    Hook,
    Job,
    LabelName,
    Needed,
    Outcome,
    Progress,
    RowSet,
    evaluation_bytes,
    sae_evaluation_bytes,
)

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class EvaluateJob(Job):
    """Metrics of an artifact: of a probe against a label, of an autoencoder without one."""

    kind: Literal["evaluate"]
    artifact: Handle
    hook: Hook
    label: LabelName | None = None
    rows: RowSet

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The run and the artifact."""
        yield "run", self.rows.run
        yield "artifact", self.artifact

    def answers(self) -> int:
        """One."""
        return 1

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.rows.run, (self.hook,))
        return max(evaluation_bytes(), sae_evaluation_bytes())

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import evaluation, fitted_to, load_probe, load_sae, part_of, rows_of, sae_evaluation
        from millpond.store.errors import InvalidInput

        artifact = vault.load(self.artifact)
        if artifact.kind == "sae":
            part = rows_of(vault, self.rows)
            result = sae_evaluation(load_sae(artifact).evaluate(part.view[self.hook]), part)
            return Outcome((Answer(result, measure((part,), behind=fitted_to(vault, artifact))),))
        if artifact.kind != "probe" or self.label is None:
            raise InvalidInput(f"a {artifact.kind} is evaluated against a label; name one")
        part, truth = part_of(vault, self.rows, self.label)
        probe = load_probe(artifact)
        result = evaluation(probe.evaluate(part.view[self.hook], truth))
        progress(0.8)
        coef = artifact.arrays()["coef"]
        seen = measure(
            (part,), target="label", labels=(truth.values,), parameters=coef.size + len(coef),
            behind=fitted_to(vault, artifact),
        )  # fmt: skip
        return Outcome((Answer(result, seen),))
