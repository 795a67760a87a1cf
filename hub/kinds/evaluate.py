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
    RowSet,
    evaluation_bytes,
)
from millpond.hub.shapes import result_bytes

if TYPE_CHECKING:
    pass


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
        return max(evaluation_bytes(), result_bytes("sae-evaluation", {}))
