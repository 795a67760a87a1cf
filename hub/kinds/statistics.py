"""`statistics`: what the activations of a hook are like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from millpond.hub.kinds.base import Facts, Hook, Job, Needed, Outcome, Progress, RowSet
from millpond.hub.shapes import result_bytes

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class StatisticsJob(Job):
    """`mean` and `sd` of all coordinates, and `norm`, the rows' mean Euclidean norm: each with its interval by prompts."""

    kind: Literal["statistics"]
    rows: RowSet
    hook: Hook

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The run."""
        yield "run", self.rows.run

    def answers(self) -> int:
        """One."""
        return 1

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.rows.run, (self.hook,))
        return result_bytes("summary", {})

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class. A summary is sums by prompt, so its intervals treat a prompt's rows as one draw."""
        from millpond.hub.evidence import measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import rows_of
        from millpond.hub.summaries import summarise

        part = rows_of(vault, self.rows)
        result = summarise(part.view, self.hook)
        progress(0.4)
        return Outcome((Answer(result, measure((part,), hooks=(self.hook,))),))
