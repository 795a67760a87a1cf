"""`sweep`: probes over hooks and labels, in shared passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Hook, Job, LabelName, Needed, Outcome, Progress, RowSet
from millpond.hub.kinds.estimators import ProbeEstimator
from millpond.hub.shapes import MAX_LENGTH, fields_of, result_bytes
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class SweepJob(Job):
    """A probe for every hook, label and strength.

    A label's answer has arrays of one value a probe: hooks in the run's order, within one its strengths as given;
    with `control`, then the same again of the probes for the shuffled label.
    """

    kind: Literal["sweep"]
    estimator: ProbeEstimator
    hooks: Annotated[tuple[Hook, ...], Field(min_length=1, max_length=512)]
    labels: Annotated[tuple[LabelName, ...], Field(min_length=1, max_length=64)]
    train: RowSet
    test: RowSet
    control: bool = True

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The runs."""
        yield "run", self.train.run
        yield "run", self.test.run

    def answers(self) -> int:
        """One a label."""
        return len(self.labels)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        hooks = len(facts.hooks(self.train.run, self.hooks))
        length = hooks * self.estimator.strengths * (1 + self.control)
        if length > MAX_LENGTH:
            raise InvalidInput(f"a sweep of {length:,} probes a label is too long; the limit is {MAX_LENGTH:,}")
        shapes = {field.name: (length,) for field in fields_of("probe-sweep")}
        return len(self.labels) * result_bytes("probe-sweep", shapes)

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import build, part_of, sweep_result

        sources = {name: vault.label(self.train.run, name) for name in self.labels}
        parts = {name: (part_of(vault, self.test, name), part_of(vault, self.train, name)) for name in self.labels}
        (test, _), (train, _) = next(iter(parts.values()))
        controls = ("shuffled",) if self.control else ()
        swept = build(self.estimator).sweep(train.view, test.view, self.hooks, sources, controls=controls)
        progress(0.9)
        answers = []
        for name, ((test, truth), (train, y)) in parts.items():
            rows = [row for row in swept.rows if row["label"] == name]
            classes = 1 if train.codes is None else int(train.codes.max()) + 1
            parameters = (train.view.d_model + 1) * max(1, classes - 1)
            labels = (y.values, truth.values)
            seen = measure((test, train), target="label", labels=labels, parameters=parameters)
            answers.append(Answer(sweep_result(rows, test), seen))
        return Outcome(tuple(answers))
