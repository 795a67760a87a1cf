"""`expression`: a lazy expression over the rows of a run, reduced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from millpond.analysis import expressions as ex
from millpond.hub.kinds.base import Facts, Job, Needed, Outcome, Progress, RowSet
from millpond.hub.shapes import result_bytes

if TYPE_CHECKING:
    from millpond.hub.vault import Vault


class ExpressionJob(Job):
    """One reduction.

    Means and variances of one value a row are answered with `group-means`, one number a group; of more with `mean`, a
    vector a group; histograms with `histogram`, quantiles with `group-means`, correlations with `summary` (its
    `similarity`), the strongest rows with `latent`.
    """

    kind: Literal["expression"]
    rows: RowSet
    expression: ex.Expression
    """Its `run` is the handle of `rows`' run."""

    @model_validator(mode="after")
    def _same_run(self) -> ExpressionJob:
        reduce = self.expression.reduce
        if self.expression.run != self.rows.run:
            raise ValueError("the expression's run must be the handle of the rows' run")
        if reduce.by is not None and not isinstance(reduce, ex.Mean | ex.Variance):
            raise ValueError(f"{reduce.op} takes no groups in a job; ask for each group with where")
        if len(ex.columns_of(reduce)) > ex.MAX_NODES:
            raise ValueError(f"an expression has at most {ex.MAX_NODES} operations; split it")
        return self

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The run."""
        yield "run", self.rows.run

    def labels_read(self) -> Iterator[tuple[str, str]]:
        """See the base class."""
        for name in self.expression.labels:
            yield self.rows.run, name

    def answers(self) -> int:
        """One."""
        return 1

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        run, reduce = self.rows.run, self.expression.reduce
        for hook in self.expression.hooks:
            facts.hooks(run, (hook,))
        width = facts.width(run, reduce.of)
        groups = facts.groups(run, reduce.by) if reduce.by else 1
        if isinstance(reduce, ex.Mean | ex.Variance):
            if width > 1:
                return result_bytes("mean", {"mean": (groups, width)})
            return result_bytes("group-means", {"means": (groups,)})
        if isinstance(reduce, ex.Quantiles):
            return result_bytes("group-means", {"means": (len(reduce.q),)})
        if isinstance(reduce, ex.Histogram):
            return result_bytes("histogram", {"counts": (reduce.bins,)})
        if isinstance(reduce, ex.Top):
            return result_bytes("latent", {"histogram": (0,), "contexts": (reduce.n,), "activations": (reduce.n,)})
        return result_bytes("summary", {})

    def run(self, vault: Vault, progress: Progress) -> Outcome:
        """See the base class."""
        from millpond.hub.evidence import Part, group_codes, measure
        from millpond.hub.kinds.base import Answer
        from millpond.hub.probing import rows_of
        from millpond.hub.summaries import answer_expression, crosses, mixes

        part = rows_of(vault, self.rows)
        expression = vault.expression(self.expression)
        result = answer_expression(expression, part.view)
        progress(0.5)
        by = expression.reduce.by
        if by is not None:
            part = Part(part.held, part.whole, part.view, group_codes(part.view.labels[by].values))
        labels = tuple(part.view.labels[name].values for name in expression.labels)
        seen = measure(
            (part,), hooks=expression.hooks, labels=labels, target="label" if labels else "none",
            custom=mixes(expression.reduce) or (part.restricted and crosses(expression.reduce)),
        )  # fmt: skip
        return Outcome((Answer(result, seen),))
