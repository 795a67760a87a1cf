"""Completions: what a worker is asked to generate, and where it keeps what the model wrote.

They are one Parquet file of the lake, `generations/JOB/completions.parquet`, and never leave by themselves.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from millpond.store.capture_spec import ModelSection, PromptsSection
from millpond.store.errors import LakeCorrupt
from millpond.store.interventions import Intervention

if TYPE_CHECKING:
    import pandas as pd

    from millpond.store.objects import Storage

MOST_TOKENS = 4096
MOST_SAMPLES = 64
COLUMNS = ("prompt", "sample", "text", "tokens", "prompt_tokens")
"""`prompt` counts the prompts from 0, `sample` a prompt's completions; `tokens` is how many were generated;
`prompt_tokens` are the prompt's token ids."""


class Sampling(BaseModel):
    """How completions are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    max_tokens: int = Field(ge=1, le=MOST_TOKENS)
    """Tokens of one completion, at most."""
    temperature: float = Field(default=0.0, ge=0, le=10)
    """0 takes the most likely token."""
    seed: int | None = Field(default=None, ge=0, lt=1 << 32)
    """Each completion's own is made from it; none draws afresh."""
    n: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Completions a prompt."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=16)] = ()
    """Texts that end a completion; they are not part of it."""


class GenerationJob(BaseModel):
    """A worker's job: complete every prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSection
    prompts: PromptsSection
    lake: str
    sampling: Sampling
    intervene: tuple[Intervention, ...] = ()


def write_completions(lake: Storage, job: str, table: pd.DataFrame) -> bool:
    """Keep the completions of a job; False if an earlier attempt at the job kept its own, which then count."""
    data = io.BytesIO()
    table[list(COLUMNS)].to_parquet(data, index=False)
    return lake.create(_path(job), data.getvalue())


def has_completions(lake: Storage, job: str) -> bool:
    """Whether an attempt at the job got so far."""
    return lake.exists(_path(job))


def read_completions(lake: Storage, job: str) -> pd.DataFrame:
    """The completions of a job, by prompt and sample.

    Raises:
        LakeCorrupt: there are none, or they are not whole.
    """
    import pandas as pd

    try:
        table = pd.read_parquet(io.BytesIO(lake.get(_path(job))))
        return table[list(COLUMNS)].sort_values(["prompt", "sample"], ignore_index=True)
    except (OSError, ValueError, KeyError) as error:
        raise LakeCorrupt(f"the completions of job {job!r} cannot be read: {error}; run the job again") from error


def _path(job: str) -> str:
    return f"generations/{job}/completions.parquet"
