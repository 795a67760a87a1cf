"""Completions by a running engine, with interventions, kept in the lake."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from millpond.capture.engine import CaptureEngine, GenerateRequest
from millpond.capture.interrupts import held_back
from millpond.capture.plan import CapturePlan
from millpond.store.capture_spec import CaptureJob, RequestArgs
from millpond.store.generation import GenerationJob, Sampling, has_completions, write_completions
from millpond.store.objects import open_storage


def capture_like(job: GenerationJob, hook: str) -> CaptureJob:
    """A capture of the same model, prompts and interventions, by whose plan a generation is checked."""
    return CaptureJob.model_validate(
        {
            "model": job.model,
            "capture": {"hooks": (hook,), "positions": "last", "max_new_tokens": job.sampling.max_tokens},
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
        CaptureFailed: the engine failed.
    """
    storage = open_storage(plan.job.destination.lake)
    count = len(plan.prompts.ids) * sampling.n
    if has_completions(storage, job_id):
        return count
    rows: list[dict[str, object]] = []
    with held_back() as check:

        def between_steps() -> None:
            check()
            beat(len(rows))

        for request, text, tokens in engine.generate(_requests(plan, sampling, job_id), between_steps):
            asked = {"prompt": request.prompt, "sample": request.sample, "prompt_tokens": request.token_ids}
            rows.append(asked | {"text": text, "tokens": tokens})
        write_completions(storage, job_id, pd.DataFrame(rows).sort_values(["prompt", "sample"]))
    return count


def _requests(plan: CapturePlan, sampling: Sampling, job_id: str) -> Iterator[GenerateRequest]:
    asked = RequestArgs(intervene=plan.job.intervene)
    (target,) = plan.targets
    for prompt, token_ids in enumerate(plan.prompts.token_ids):
        for sample in range(sampling.n):
            # one seed a completion: what is drawn depends neither on the batch nor on the order
            number = prompt * sampling.n + sample
            seed = None if sampling.seed is None else (sampling.seed * 1_000_003 + number) % (1 << 63)
            yield GenerateRequest(job_id, prompt, sample, token_ids, asked, sampling, seed, target.adapter)
