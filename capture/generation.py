"""Completions by a running engine, with interventions, kept in the lake; a probe may score them as they are written."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd

from millpond.capture.engine import CaptureEngine, GenerateRequest
from millpond.capture.interrupts import held_back
from millpond.capture.plan import CapturePlan
from millpond.store.capture_spec import CaptureJob, CaptureWish, RequestArgs
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.generation import SCORES, GenerationJob, Sampling, has_completions, write_completions
from millpond.store.lake import open_lake
from millpond.store.objects import open_storage

_READ = "score"


def capture_like(job: GenerationJob, hook: str) -> CaptureJob:
    """A capture of the same model, prompts and interventions, by whose plan a generation is checked."""
    kept: dict[str, Any] = {"hooks": (hook,)}
    if job.read is not None:
        kept = {"reads": (job.read.model_copy(update={"name": _READ}),)}
    return CaptureJob.model_validate(
        {
            "model": job.model,
            "capture": {**kept, "positions": "last", "max_new_tokens": job.sampling.max_tokens},
            "prompts": job.prompts,
            "destination": {"lake": job.lake, "run": "generation"},
            "intervene": job.intervene,
        }
    )


def run_generation(
    plan: CapturePlan,
    sampling: Sampling,
    engine: CaptureEngine,
    job_id: str,
    beat: Callable[[int], None] = lambda done: None,
) -> int:
    """Complete the plan's prompts and keep the completions under the job's id; returns how many there are.

    A job that was done before, by a worker that was killed before it could say so, is not done again.

    Raises:
        CaptureFailed: the engine or the lake failed.
        InvalidInput: the probe that is to read along has several outputs.
    """
    storage = open_storage(plan.job.destination.lake)
    count = len(plan.prompts.ids) * sampling.n
    if has_completions(storage, job_id):
        return count
    rows: list[dict[str, object]] = []
    with held_back() as check, _scratch(plan, job_id) as run:

        def between_steps() -> None:
            check()
            beat(len(rows))

        for request, text, tokens in engine.generate(_requests(plan, sampling, job_id, run), between_steps):
            asked = {"prompt": request.prompt, "sample": request.sample, "prompt_tokens": request.token_ids}
            rows.append(asked | {"text": text, "tokens": len(tokens)})
        table = pd.DataFrame(rows).sort_values(["prompt", "sample"], ignore_index=True)
        if run is not None:
            engine.commit()
            table = _with_scores(table, plan, run)
        write_completions(storage, job_id, table)
    return count


@contextmanager
def _scratch(plan: CapturePlan, job_id: str) -> Iterator[str | None]:
    """A run for the probe's scores while the job is worked on, and no longer; None without a probe.

    What a killed worker left of an earlier attempt goes too: it is of other completions.
    """
    if not plan.reads:
        yield None
        return
    (read,) = plan.reads
    if read.width != 1:
        raise InvalidInput(f"read.artifact: probe {read.artifact!r} has {read.width} outputs; give one of one output")
    lake, begin = open_lake(plan.job.destination.lake), f"generation-{job_id}-"
    for left in [name for name in lake if name.startswith(begin)]:
        lake.delete(left)
    name = begin + secrets.token_hex(4)
    lake.create_run(name, hooks=(), d_model=plan.model.d_model, dtype=plan.model.dtype, reads=plan.reads)
    try:
        yield name
    finally:
        lake.delete(name)


def _with_scores(table: pd.DataFrame, plan: CapturePlan, name: str) -> pd.DataFrame:
    """The completions with `SCORES`: of the rows that each one's tokens were drawn from, as many as it has tokens."""
    run = open_lake(plan.job.destination.lake)[name]
    scores = run.reads[_READ]["scores"].to_numpy()[:, 0].astype(np.float64)
    prompts = run.prompts
    counts = dict(zip(prompts["id"], prompts["n_rows"].astype(int), strict=True))
    begins = dict(zip(prompts["id"], np.cumsum(prompts["n_rows"]) - prompts["n_rows"], strict=True))
    found = []
    for row in table.itertuples():
        one = f"{row.prompt}:{row.sample}"
        if counts.get(one) != row.tokens:
            raise CaptureFailed(
                f"completion {one} of {row.tokens} tokens has {counts.get(one, 0)} scores; run it again"
            )
        own = scores[int(begins[one]) : int(begins[one]) + counts[one]]
        found.append((own.mean(), own.max(), own[-1]))
    return table.assign(**dict(zip(SCORES, np.array(found).T, strict=True)))


def _requests(plan: CapturePlan, sampling: Sampling, job_id: str, run: str | None) -> Iterator[GenerateRequest]:
    (target,) = plan.targets
    for prompt, token_ids in enumerate(plan.prompts.token_ids):
        for sample in range(sampling.n):
            # one seed a completion: what is drawn depends neither on the batch nor on the order
            number = prompt * sampling.n + sample
            seed = None if sampling.seed is None else (sampling.seed * 1_000_003 + number) % (1 << 63)
            asked = RequestArgs(intervene=plan.job.intervene)
            if run is not None:
                wish = CaptureWish(
                    id=f"{job_id}:{prompt}:{sample}", prompt=f"{prompt}:{sample}", run=run,
                    first_position=len(token_ids) - 1,
                )  # fmt: skip
                asked = RequestArgs(capture=wish, intervene=plan.job.intervene)
            yield GenerateRequest(job_id, prompt, sample, token_ids, asked, sampling, seed, target.adapter)
