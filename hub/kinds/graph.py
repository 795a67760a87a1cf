"""`graph`: train and measure a client's own torch module, sent as a checked graph of allow-listed operators."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from millpond.hub.kinds.base import Facts, Hook, Job, LabelName, Needed, Outcome, Progress, RowSet, sae_evaluation_bytes
from millpond.hub.shapes import result_bytes

if TYPE_CHECKING:
    from millpond.hub.vault import Vault

MAX_GRAPH = 1 << 20
MAX_VALUES = 48 << 20


class GraphJob(Job):
    """What trusted metrics say of the graph's outputs.

    `sae-evaluation` of `reconstruction` and `codes`, then `probe-evaluation` of `scores`, then `group-means` of
    `statistic`, which goes to review.
    """

    kind: Literal["graph"]
    graph: Annotated[str, Field(max_length=MAX_GRAPH)]
    """As `hub.trace.trace` writes it."""
    values: Annotated[str, Field(max_length=MAX_VALUES)]
    """Its parameters' values, base64."""
    hook: Hook
    label: LabelName | None = None
    rows: RowSet
    test: RowSet | None = None
    """Measured on these; by default on `rows`."""
    learning_rate: float | None = Field(default=None, gt=0, lt=1e3)
    """Adam's, for one pass over `rows`; nothing is trained without it."""
    batch_rows: int = Field(default=1024, ge=2, le=4096)

    @field_validator("values")
    @classmethod
    def _base64(cls, given: str) -> str:
        try:
            base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("values are not base64") from None
        return given

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The runs."""
        yield "run", self.rows.run
        if self.test:
            yield "run", self.test.run

    def answers(self) -> int:
        """One for each metric that its outputs have."""
        import json

        try:
            roles = set(json.loads(self.graph)["outputs"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return 0
        found = bool(roles & {"reconstruction", "codes"}) + ("statistic" in roles)
        return found + ("scores" in roles and self.label is not None)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class; the graph is checked for it."""
        facts.hooks(self.rows.run, (self.hook,))
        size = facts.statistic(self.graph, facts.d_model(self.rows.run))
        measured = max(sae_evaluation_bytes(), result_bytes("probe-evaluation", {}))
        return self.answers() * measured + result_bytes("group-means", {"means": (size,)})

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import measure
        from millpond.hub.graph_jobs import load_graph, measure_graph, train_graph
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import part_of, rows_of
        from millpond.hub.running import batches

        train, y = part_of(vault, self.rows, self.label) if self.label else (rows_of(vault, self.rows), None)
        module = load_graph(self.graph, base64.b64decode(self.values), train.view.d_model)
        if self.learning_rate is not None:
            train_graph(module, batches(train.view, self.hook, y, self.batch_rows), learning_rate=self.learning_rate)
        progress(0.5)
        test, truth = train, y
        if self.test is not None:
            test, truth = part_of(vault, self.test, self.label) if self.label else (rows_of(vault, self.test), None)
        results = measure_graph(module, lambda: batches(test.view, self.hook, truth, self.batch_rows))
        progress(0.8)
        parts = (test,) if test is train or self.learning_rate is None else (test, train)
        labels = () if y is None or truth is None else (y.values, truth.values)
        trained = [value.numel() for value in module.parameters() if value.requires_grad]
        fitted = sum(trained) if self.learning_rate is not None else 0
        found = []
        for result in results:
            custom = result.kind == "group-means"
            seen = measure(
                parts,
                hooks=(self.hook,) if custom else (),
                target="label" if labels else "none",
                labels=labels,
                parameters=fitted,
                custom=custom,
            )
            found.append(Answer(result, seen))
        return Outcome(tuple(found))
