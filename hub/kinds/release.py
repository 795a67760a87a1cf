"""`release`: let a probe's direction leave, at 6 bits a coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from millpond.hub.kinds.base import Facts, Handle, Job, Needed, Outcome, Progress
from millpond.hub.shapes import result_bytes
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class ReleaseJob(Job):
    """The direction of a probe, with the evidence that it was kept with. Autoencoders stay in the vault."""

    kind: Literal["release"]
    artifact: Handle

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The artifact."""
        yield "artifact", self.artifact

    def answers(self) -> int:
        """One."""
        return 1

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        found = facts.artifact(self.artifact)
        if found["kind"] != "probe":
            raise InvalidInput(f"an artifact of kind {found['kind']} may not leave; use it in jobs by its handle")
        return result_bytes("direction", {"direction": tuple(found["shape"])})

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class. The rows that the probe was fitted to are measured anew."""
        import numpy as np

        from millpond.hub.evidence import measure
        from millpond.hub.kinds import parse_job
        from millpond.hub.kinds.base import Answer
        from millpond.hub.kinds.probe import ProbeJob
        from millpond.hub.probing import part_of
        from millpond.store.result import Result

        artifact = vault.load(self.artifact)
        made_by = parse_job(artifact.config["job"])
        assert isinstance(made_by, ProbeJob)
        fitted = vault.at(artifact.config["pins"])
        part, y = part_of(fitted, made_by.train, made_by.label)
        progress(0.2)
        arrays = artifact.arrays()
        coef, intercept = np.asarray(arrays["coef"], np.float64), np.asarray(arrays["intercept"], np.float64)
        values: dict[str, object] = {"direction": coef[0] if len(coef) == 1 else coef}
        if len(coef) == 1 and not part.restricted:  # it has no standard error, which a number needs there
            values["bias"] = float(intercept[0])
        counts = {"rows": len(part.view), "prompts": len(part.view.prompts)}
        if part.codes is not None and int(part.codes.max()) == 1:
            counts |= {"positives": int(part.codes.sum()), "negatives": int((part.codes == 0).sum())}
        seen = measure(
            (part,), hooks=(made_by.hook,), target="label", labels=(y.values,), parameters=coef.size + len(coef)
        )
        return Outcome((Answer(Result("direction", values, {}, counts), seen),))  # type: ignore[arg-type]
