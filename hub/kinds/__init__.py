"""The kinds of job: a model of the wire, a quote, and what runs it, one file each. To add one, write it and name it here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from millpond.hub.kinds.base import Answer, Facts, Job, Made, Outcome, RowSet, Split
from millpond.hub.kinds.capture import CaptureJob
from millpond.hub.kinds.evaluate import EvaluateJob
from millpond.hub.kinds.expression import ExpressionJob
from millpond.hub.kinds.generate import GenerateJob
from millpond.hub.kinds.graph import GraphJob
from millpond.hub.kinds.latents import LatentsJob
from millpond.hub.kinds.probe import ProbeJob
from millpond.hub.kinds.release import ReleaseJob
from millpond.hub.kinds.sae_cross_entropy import SaeCrossEntropyJob
from millpond.hub.kinds.sae_train import SaeTrainJob
from millpond.hub.kinds.statistics import StatisticsJob
from millpond.hub.kinds.sweep import SweepJob
from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput

__all__ = ["KINDS", "Answer", "AnyJob", "Facts", "Job", "Made", "Outcome", "RowSet", "Split", "parse_job"]

AnyJob = Annotated[
    ProbeJob
    | EvaluateJob
    | SweepJob
    | ReleaseJob
    | ExpressionJob
    | StatisticsJob
    | SaeTrainJob
    | LatentsJob
    | GraphJob
    | CaptureJob
    | GenerateJob
    | SaeCrossEntropyJob,
    Field(discriminator="kind"),
]
ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyJob)
KINDS: dict[str, type[Job]] = {
    model.model_fields["kind"].annotation.__args__[0]: model  # type: ignore[union-attr]
    for model in (
        ProbeJob, EvaluateJob, SweepJob, ReleaseJob, ExpressionJob,
        StatisticsJob, SaeTrainJob, LatentsJob, GraphJob, CaptureJob, GenerateJob,
        SaeCrossEntropyJob,
    )
}  # fmt: skip


def parse_job(value: Any) -> Job:
    """The job that parsed JSON describes.

    Raises:
        InvalidInput: it is none; the message names the field. It quotes the input, so it stays in the vault.
    """
    try:
        job: Job = ADAPTER.validate_python(value, strict=False)
    except ValidationError as error:
        raise InvalidInput(f"job: {first_problem(error)}"[:500]) from error
    return job
