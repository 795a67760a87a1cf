"""Losses under a splice: what workers are asked to measure of an autoencoder in a running model, and where they keep it.

A job's losses are one Parquet file of the lake, `losses/JOB.parquet`, a row a prompt. They do not leave by themselves.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from millpond.store.capture_spec import ModelSection, PromptsSection
from millpond.store.errors import LakeCorrupt

if TYPE_CHECKING:
    import pandas as pd

    from millpond.store.objects import Storage

SPLICES = ("clean", "sae", "zero")
"""What is done to the hook: nothing; replaced by the reconstruction; replaced by 0."""
COLUMNS = ("prompt", "tokens", *SPLICES, "prompt_tokens")
"""`prompt` counts the prompts from 0, `tokens` is how many were predicted, the splices' columns are the summed losses of these
in nats, `prompt_tokens` the prompt's token ids."""


class StoredRows(BaseModel):
    """Rows of a run, whose prompts are run again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    where: str | None = None
    """A condition, as `Run.select` takes it."""
    test: float | None = None
    """Fraction of the test part, where a part of a split is meant."""
    seed: int = 0
    by: str | None = None
    part: str = "test"
    fewest: int = 0
    """Prompts without which the job must fail, as `TooFewPrompts`."""
    bos: int | None = None
    """Token id in front of each prompt, where the run was captured without position 0."""


class LossJob(BaseModel):
    """A worker's job: the losses of every prompt as the model is, with a hook reconstructed, and with it set to 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSection
    lake: str
    prompts: PromptsSection | None = None
    rows: StoredRows | None = None
    """In place of `prompts`; then the first position is that of the run's first row."""
    artifact: str
    """Name of the autoencoder."""
    hook: str
    first_position: int = Field(default=1, ge=0)
    """Positions before it are left alone, and what follows them is not counted."""

    @model_validator(mode="after")
    def _one_source(self) -> LossJob:
        if (self.prompts is None) == (self.rows is None):
            raise ValueError("give prompts or rows, and not both")
        return self


def write_losses(lake: Storage, job: str, table: pd.DataFrame) -> bool:
    """Keep the losses of a job; False if an earlier attempt at the job kept its own, which then count."""
    data = io.BytesIO()
    table[list(COLUMNS)].to_parquet(data, index=False)
    return lake.create(_path(job), data.getvalue())


def has_losses(lake: Storage, job: str) -> bool:
    """Whether an attempt at the job got so far."""
    return lake.exists(_path(job))


def read_losses(lake: Storage, job: str) -> pd.DataFrame:
    """The losses of a job, by prompt.

    Raises:
        LakeCorrupt: there are none, or they are not whole.
    """
    import pandas as pd

    try:
        table = pd.read_parquet(io.BytesIO(lake.get(_path(job))))
        return table[list(COLUMNS)].sort_values("prompt", ignore_index=True)
    except (OSError, ValueError, KeyError) as error:
        raise LakeCorrupt(f"the losses of job {job!r} cannot be read: {error}; run the job again") from error


def _path(job: str) -> str:
    return f"losses/{job}.parquet"
