"""Generations: a client's job as the workers know it, and the answers that come of what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millpond.hub.captures import checked_weights, intervention, prompts_file
from millpond.hub.cohort import distinct_prompts, shares
from millpond.hub.kinds.base import Answer, Progress
from millpond.hub.kinds.generate import WORK, GenerateJob, Regex
from millpond.hub.rates import matches, rate
from millpond.hub.rules import Evidence
from millpond.hub.shapes import TEXTS
from millpond.hub.textcode import encode
from millpond.hub.textmodel import TextModel
from millpond.hub.vault import Vault
from millpond.store.errors import InvalidInput
from millpond.store.generation import GenerationJob, read_completions
from millpond.store.interventions import Patch, SpliceSae
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.hub.gateway import Gateway


def submit_generation(gateway: Gateway, vault: Vault, job: GenerateJob, user: str, models: Sequence[str]) -> str:
    """Queue a generation for the workers of its model; returns the job's id.

    Raises:
        InvalidInput: the project may not use such a model or adapter, or texts are asked for and there is no dictionary.
    """
    weights = checked_weights(gateway, vault, job.model, job.adapter)
    if job.texts and gateway.dictionary is None:
        raise InvalidInput("texts: the settings have no dictionary, so no text leaves; ask for rates")
    path, _ = prompts_file(gateway, vault, job.prompts)
    work = GenerationJob.model_validate(
        {
            "model": {
                "path": weights.path,
                "adapter": None if job.adapter is None else weights.adapters[job.adapter],
            },
            "prompts": {"path": path},
            "lake": gateway.settings.lake,
            "sampling": job.sampling,
            "intervene": [intervention(vault, one) for one in job.interventions],
        }
    )
    spec = {
        "job": job.model_dump(mode="json"), "pins": vault.pin(job), "models": list(models),
        WORK: work.model_dump(mode="json", exclude_unset=True),
    }  # fmt: skip
    return gateway.queue.submit(job.kind, spec, project=vault.project, user=user)


def answers_of(job: GenerateJob, vault: Vault, progress: Progress) -> tuple[Answer, ...]:
    """The rates and the coded texts of what a worker has written."""
    table = read_completions(vault.lake.storage, vault.job)
    prompt, texts = table["prompt"].to_numpy(np.int64), table["text"].tolist()
    first = table.drop_duplicates("prompt")
    # near-duplicate prompts are one: their completions say the same thing twice
    clusters = distinct_prompts([np.asarray(ids) for ids in first["prompt_tokens"]])[prompt]
    progress(0.3)
    groups = _groups(job, vault, prompt)
    evidence = _evidence(job, clusters, groups)
    found: list[Answer] = []
    if job.score is not None:
        how = {"regex": job.score.regex} if isinstance(job.score, Regex) else {"contains": job.score.contains}
        matched = matches(texts, **how)
        parts = [rate(matched[one], clusters[one]) for one in (np.ones(len(prompt), bool), *groups)]
        p, low, high = map(np.array, zip(*parts, strict=True))
        counts = {"rows": len(prompt), "prompts": len(np.unique(clusters))}
        result = Result("rates", {"rates": p, "rates_low": low, "rates_high": high}, {}, counts)
        found.append(Answer(result, evidence))
        progress(0.5)
    if job.texts:
        if vault.dictionary is None:
            raise InvalidInput("the settings have no dictionary any more, so no text can be coded")
        cut = [text.encode()[: job.text_bytes].decode(errors="ignore") for text in texts]
        coded = np.frombuffer(encode(cut, TextModel(vault.dictionary.read_bytes())), np.uint8)
        found.append(Answer(Result(TEXTS, {"coded": coded}, {}, {"rows": len(cut)}), evidence))
    return tuple(found)


def _groups(job: GenerateJob, vault: Vault, prompt: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Which completions are of each group, in the order of the groups' names."""
    if job.by is None or not isinstance(job.prompts, str):
        return []
    names = vault.prompt_column(job.prompts, job.by)
    of_completion = np.array(names, object)[prompt]
    return [of_completion == name for name in sorted(set(names))]


def _evidence(job: GenerateJob, clusters: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]]) -> Evidence:
    top, two = shares(clusters)
    return Evidence(
        prompts_are="own",  # they were sent by the project's own members
        rows=len(clusters),
        prompts=len(np.unique(clusters)),
        class_rows=tuple(int(one.sum()) for one in groups),
        class_prompts=tuple(len(np.unique(clusters[one])) for one in groups),
        top_prompt_share=top,
        top_two_share=two,
        intervened=bool(job.interventions),
        # a patch brings in rows of another run, a spliced autoencoder replaces what is computed
        matched=not any(isinstance(one, Patch | SpliceSae) for one in job.interventions),
    )
