"""`sae_train`: train a sparse autoencoder, which stays in the vault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from millpond.hub.kinds.base import Facts, Hook, Job, Needed, RowSet
from millpond.hub.kinds.estimators import SaeEstimator
from millpond.hub.shapes import result_bytes

if TYPE_CHECKING:
    pass


class SaeTrainJob(Job):
    """Train on `tokens` rows of one hook; measured on a test part if there is one."""

    kind: Literal["sae_train"]
    estimator: SaeEstimator
    hooks: Annotated[tuple[Hook, ...], Field(min_length=1, max_length=1)]
    rows: RowSet
    tokens: int = Field(ge=1, le=10_000_000_000)
    test: RowSet | None = None

    def needs(self) -> Iterator[tuple[Needed, str]]:
        """The runs."""
        yield "run", self.rows.run
        if self.test:
            yield "run", self.test.run

    def answers(self) -> int:
        """The evaluation, if there is a test part."""
        return int(self.test is not None)

    def answer_bytes(self, facts: Facts) -> int:
        """See the base class."""
        facts.hooks(self.rows.run, self.hooks)
        return self.answers() * result_bytes("sae-evaluation", {})
