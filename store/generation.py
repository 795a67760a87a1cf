"""Completions: what workers are asked to generate and to judge, and where they keep what the models wrote.

A job's completions are one Parquet file of the lake, `generations/JOB/completions.parquet`, what a judge chose of each another,
`judged.parquet` beside it. Neither leaves by itself.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from millpond.store.capture_spec import ModelSection, PromptsSection
from millpond.store.errors import LakeCorrupt
from millpond.store.interventions import Intervention
from millpond.store.reads import ReadProbe

if TYPE_CHECKING:
    import pandas as pd

    from millpond.store.objects import Storage

MOST_TOKENS = 4096
MOST_SAMPLES = 64
COLUMNS = ("prompt", "sample", "text", "tokens", "prompt_tokens")
"""`prompt` counts the prompts from 0, `sample` a prompt's completions; `tokens` is how many were generated;
`prompt_tokens` are the prompt's token ids. Where a probe read along, `SCORES` follow."""
SCORES = ("score_mean", "score_max", "score_last")
"""Of the probe's scores at the rows that a completion's tokens were drawn from: the prompt's last, and the generated ones
but the last."""
JUDGED = ("prompt", "sample", "choice")
"""`choice` is the number of the answer that the judge found likeliest."""
MOST_CHOICES = 16
_PLACES = re.compile(r"(\{prompt\}|\{completion\})")


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
    read: ReadProbe | None = None
    """A probe of one output whose scores are kept of each completion."""


class Question(BaseModel):
    """A question about one completion, and the answers that a judge chooses from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str = Field(min_length=1, max_length=20_000)
    """What the judge reads: `{completion}` and, if it is there, `{prompt}` stand for the texts; other braces for themselves.
    The answer follows it directly."""
    choices: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=2, max_length=MOST_CHOICES)
    ]
    """Answers as they follow the template, such as " yes". Told apart by their first tokens."""

    @model_validator(mode="after")
    def _asks(self) -> Question:
        if "{completion}" not in self.template:
            raise ValueError("the template has no {completion}, so the judge would not see what it judges")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same; give choices that differ")
        return self

    def ask(self, prompt: str, completion: str) -> str:
        """What the judge reads of one completion. A text that holds `{prompt}` is not filled in again."""
        texts = {"{prompt}": prompt, "{completion}": completion}
        return "".join(texts.get(part, part) for part in _PLACES.split(self.template))

    @property
    def end(self) -> str:
        """The template's text after the last place."""
        return _PLACES.split(self.template)[-1]


class JudgeJob(Question):
    """A worker's job: choose an answer about every completion of the job."""

    model: ModelSection
    prompts: PromptsSection
    lake: str


def write_completions(lake: Storage, job: str, table: pd.DataFrame) -> bool:
    """Keep the completions of a job; False if an earlier attempt at the job kept its own, which then count."""
    return _write(lake, _path(job), table[[*COLUMNS, *(name for name in SCORES if name in table)]])


def has_completions(lake: Storage, job: str) -> bool:
    """Whether an attempt at the job got so far."""
    return lake.exists(_path(job))


def read_completions(lake: Storage, job: str) -> pd.DataFrame:
    """The completions of a job, by prompt and sample.

    Raises:
        LakeCorrupt: there are none, or they are not whole.
    """
    return _read(lake, _path(job), COLUMNS, f"the completions of job {job!r}")


def write_judged(lake: Storage, job: str, table: pd.DataFrame) -> bool:
    """Keep what the judge chose of a job's completions; False if an earlier attempt kept its own, which then counts."""
    return _write(lake, _judged(job), table[list(JUDGED)])


def has_judged(lake: Storage, job: str) -> bool:
    """Whether an attempt at the job got so far."""
    return lake.exists(_judged(job))


def read_judged(lake: Storage, job: str) -> pd.DataFrame:
    """What the judge chose of a job's completions, by prompt and sample.

    Raises:
        LakeCorrupt: there is nothing, or it is not whole.
    """
    return _read(lake, _judged(job), JUDGED, f"what was judged of job {job!r}")


def _write(lake: Storage, path: str, table: pd.DataFrame) -> bool:
    data = io.BytesIO()
    table.to_parquet(data, index=False)
    return lake.create(path, data.getvalue())


def _read(lake: Storage, path: str, columns: tuple[str, ...], what: str) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_parquet(io.BytesIO(lake.get(path)))
        kept = [*columns, *(name for name in SCORES if name in table)]
        return table[kept].sort_values(["prompt", "sample"], ignore_index=True)
    except (OSError, ValueError, KeyError) as error:
        raise LakeCorrupt(f"{what} cannot be read: {error}; run the job again") from error


def _path(job: str) -> str:
    return f"generations/{job}/completions.parquet"


def _judged(job: str) -> str:
    return f"generations/{job}/judged.parquet"
