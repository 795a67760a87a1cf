"""`probe`: fit one probe, keep it in the vault, and measure it on a test part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from millpond.hub.kinds.base import Facts, Hook, Job, LabelName, Needed, Outcome, Progress, RowSet, evaluation_bytes
from millpond.hub.kinds.estimators import ProbeEstimator

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class ProbeJob(Job):
    """Fit a probe; its artifact stays in the vault, its evaluation is the answer."""

    kind: Literal["probe"]
    estimator: ProbeEstimator
    hook: Hook
    label: LabelName
    train: RowSet
    test: RowSet | None = None

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The runs."""
        yield "run", self.train.run
        if self.test:
            yield "run", self.test.run

    def answers(self) -> int:
        """The evaluation, if there is a test part."""
        return int(self.test is not None)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.train.run, (self.hook,))
        return self.answers() * evaluation_bytes()

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import build, evaluation, keep_probe, part_of

        train, y = part_of(vault, self.train, self.label)
        probe = build(self.estimator)
        probe.fit(train.view[self.hook], y)
        progress(0.6)
        made = (keep_probe(vault, probe, self),)
        if self.test is None:
            return Outcome((), made)
        test, truth = part_of(vault, self.test, self.label)
        result = evaluation(probe.evaluate(test.view[self.hook], truth))
        progress(0.9)
        parameters = (train.view.d_model + 1) * max(1, len(getattr(probe, "classes_", ())) - 1)
        labels = (y.values, truth.values)
        seen = measure((test, train), target="label", labels=labels, parameters=parameters)
        return Outcome((Answer(result, seen),), made)
