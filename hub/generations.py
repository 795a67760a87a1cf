"""Generations: a client's job as the workers know it, and the answers that come of what the model wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.hub.captures import checked_weights, intervention, prompts_file
from millpond.hub.cohort import distinct_prompts, shares
from millpond.hub.evidence import is_plain
from millpond.hub.kinds.base import Answer, Progress
from millpond.hub.kinds.generate import Contains, GenerateJob, Judge, OverThreshold, Regex
from millpond.hub.kinds.steps import WORK
from millpond.hub.probing import fitted_to
from millpond.hub.rates import matches, mean, rate
from millpond.hub.rules import Evidence
from millpond.hub.shapes import TEXTS
from millpond.hub.textcode import encode
from millpond.hub.textmodel import TextModel
from millpond.hub.vault import Vault
from millpond.store.errors import InvalidInput
from millpond.store.generation import GenerationJob, JudgeJob, read_completions, read_judged
from millpond.store.interventions import Patch, SpliceSae
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.hub.gateway import Gateway
    from millpond.hub.settings import Weights


def submit_generation(gateway: Gateway, vault: Vault, job: GenerateJob, user: str, models: Sequence[str]) -> str:
    """Queue a generation for the workers of its model; returns the job's id.

    Raises:
        InvalidInput: the project may not use such a model or adapter, or texts are asked for and there is no dictionary.
    """
    weights = checked_weights(gateway, vault, job.model, job.adapter)
    if job.texts and gateway.dictionary is None:
        raise InvalidInput("texts: the settings have no dictionary, so no text leaves; ask for rates")
    judge, model = job.score if isinstance(job.score, Judge) else None, job.judging_model()
    judging = None if judge is None or model is None else checked_weights(gateway, vault, model, judge.adapter)
    path, _ = prompts_file(gateway, vault, job.prompts)
    given: dict[str, Any] = {"prompts": {"path": path}, "lake": gateway.settings.lake}
    works: dict[str, GenerationJob | JudgeJob] = {
        "generate": GenerationJob.model_validate(
            {
                **given,
                "model": _model(weights, job.adapter),
                "sampling": job.sampling,
                "intervene": [intervention(vault, one) for one in job.interventions],
                "read": _read(vault, job.score) if isinstance(job.score, OverThreshold) else None,
            }
        )
    }
    if judge is not None and judging is not None:
        asked = {"template": judge.template, "choices": judge.choices}
        works["judge"] = JudgeJob.model_validate({**given, **asked, "model": _model(judging, judge.adapter)})
    spec = {
        "job": job.model_dump(mode="json"), "pins": vault.pin(job), "models": list(models),
        WORK: {kind: work.model_dump(mode="json", exclude_unset=True) for kind, work in works.items()},
    }  # fmt: skip
    first = works["generate"].model.base
    return gateway.queue.submit(job.kind, spec, model=first, project=vault.project, user=user)


def _model(weights: Weights, adapter: str | None) -> dict[str, Any]:
    return {"path": weights.path, "adapter": None if adapter is None else weights.adapters[adapter]}


def _read(vault: Vault, score: OverThreshold) -> dict[str, Any]:
    artifact = vault.load(score.probe)
    hook = score.hook or artifact.config.get("hook")
    if hook is None:
        raise InvalidInput("score.hook: the probe does not say where it was trained; name the hook that it reads")
    return {"artifact": artifact.name, "hook": hook}


def answers_of(job: GenerateJob, vault: Vault, progress: Progress) -> tuple[Answer, ...]:
    """The rates and the coded texts of what a worker has written."""
    table = read_completions(vault.lake.storage, vault.job)
    prompt, texts = table["prompt"].to_numpy(np.int64), table["text"].tolist()
    first = table.drop_duplicates("prompt")
    # near-duplicate prompts are one: their completions say the same thing twice
    clusters = distinct_prompts([np.asarray(ids) for ids in first["prompt_tokens"]])[prompt]
    progress(0.3)
    groups = _groups(job, vault, prompt)
    evidence = _evidence(job, vault, clusters, groups)
    found: list[Answer] = []
    if job.score is not None:
        kind, columns, scores = _scored(job.score, vault, table)
        parts = (np.ones(len(prompt), bool), *groups)
        values = _by_part("rates", rate, columns, parts, clusters)
        if scores is not None:
            values |= _by_part("scores", mean, [scores], parts, clusters)
        counts = {"rows": len(prompt), "prompts": len(np.unique(clusters))}
        found.append(Answer(Result(kind, values, {}, counts), evidence))
        progress(0.5)
    if job.texts:
        if vault.dictionary is None:
            raise InvalidInput("the settings have no dictionary any more, so no text can be coded")
        cut = [text.encode()[: job.text_bytes].decode(errors="ignore") for text in texts]
        coded = np.frombuffer(encode(cut, TextModel(vault.dictionary.read_bytes()), job.text_bytes), np.uint8)
        found.append(Answer(Result(TEXTS, {"coded": coded}, {}, {"rows": len(cut)}), evidence))
    return tuple(found)


def _scored(
    score: Regex | Contains | OverThreshold | Judge, vault: Vault, table: pd.DataFrame
) -> tuple[str, list[NDArray[np.bool_]], NDArray[np.float64] | None]:
    """The kind of result, which completions match (a judge's choices one after the other), and their scores if a probe gave any."""
    if isinstance(score, OverThreshold):
        scores = table[f"score_{score.of}"].to_numpy(np.float64)
        return "probe-rates", [scores > score.threshold], scores
    if isinstance(score, Judge):
        chosen = read_judged(vault.lake.storage, vault.job)["choice"].to_numpy(np.int64)
        return "rates", [chosen == choice for choice in range(len(score.choices))], None
    how = {"regex": score.regex} if isinstance(score, Regex) else {"contains": score.contains}
    return "rates", [matches(table["text"].tolist(), **how)], None


def _by_part(
    name: str,
    measure: Callable[[NDArray[Any], NDArray[Any]], tuple[float, float, float]],
    columns: Sequence[NDArray[Any]],
    parts: Sequence[NDArray[np.bool_]],
    prompts: NDArray[np.int64],
) -> dict[str, NDArray[np.float64]]:
    """What is measured of each column overall and in each group, with its bounds."""
    found = np.array([measure(column[part], prompts[part]) for column in columns for part in parts])
    return {f"{name}{end}": found[:, number] for number, end in enumerate(("", "_low", "_high"))}


def _groups(job: GenerateJob, vault: Vault, prompt: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Which completions are of each group, in the order of the groups' names."""
    if job.by is None or not isinstance(job.prompts, str):
        return []
    names = vault.prompt_column(job.prompts, job.by)
    of_completion = np.array(names, object)[prompt]
    return [of_completion == name for name in sorted(set(names))]


def _shows_others(job: GenerateJob, vault: Vault) -> bool:
    """Whether an artifact in use was fitted to restricted prompts or to an intervened run, which its scores and effects show."""
    artifacts = [vault.load(handle) for kind, handle in job.needs() if kind == "artifact"]
    return any(not is_plain(part) for artifact in artifacts for part in fitted_to(vault, artifact))


def _evidence(
    job: GenerateJob, vault: Vault, clusters: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]]
) -> Evidence:
    top, two = shares(clusters)
    return Evidence(
        prompts_are="own",  # they were sent by the project's own members
        rows=len(clusters),
        prompts=len(np.unique(clusters)),
        class_rows=tuple(int(one.sum()) for one in groups),
        class_prompts=tuple(len(np.unique(clusters[one])) for one in groups),
        top_prompt_share=top,
        top_two_share=two,
        custom=_shows_others(job, vault),
        intervened=bool(job.interventions),
        # a patch brings in rows of another run, a spliced autoencoder replaces what is computed
        matched=not any(isinstance(one, Patch | SpliceSae) for one in job.interventions),
    )
