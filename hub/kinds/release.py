"""`release`: let a probe's direction leave, at 6 bits a coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from millpond.hub.kinds.base import Facts, Handle, Job, Needed
from millpond.hub.shapes import result_bytes
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    pass


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
