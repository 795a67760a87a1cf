"""Losses under a splice: a client's job as the workers know it, and the answer that comes of what they measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from millpond.hub.captures import checked_weights, prompts_file
from millpond.hub.cohort import distinct_prompts, shares
from millpond.hub.evidence import is_plain, measure
from millpond.hub.kinds.base import Answer, Progress, RowSet
from millpond.hub.kinds.sae_cross_entropy import SaeCrossEntropyJob
from millpond.hub.kinds.steps import WORK
from millpond.hub.probing import fitted_to, rows_of
from millpond.hub.rates import ratio
from millpond.hub.rules import Evidence
from millpond.hub.vault import Vault
from millpond.store.errors import InvalidInput
from millpond.store.hooks import parse_hook
from millpond.store.losses import LossJob, read_losses
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.hub.gateway import Gateway


def submit_losses(gateway: Gateway, vault: Vault, job: SaeCrossEntropyJob, user: str, models: Sequence[str]) -> str:
    """Queue a measurement for the workers of its model; returns the job's id.

    Raises:
        InvalidInput: the project may not use such a model or adapter, or the artifact does not say its hook.
    """
    artifact = vault.load(job.artifact)
    hook = job.hook or (artifact.config.get("metadata") or {}).get("hook_name")
    if not hook:
        raise InvalidInput("hook: the autoencoder does not say where it was trained; name the hook")
    hook = str(parse_hook(hook))
    weights = checked_weights(gateway, vault, vault.model_of(job), job.adapter)
    asked: dict[str, Any] = {}
    pins = vault.pin(job)
    if isinstance(job.prompts, RowSet):
        asked["rows"] = vault.at(pins).stored_rows(job.prompts) | {"bos": job.bos}
    else:
        asked["prompts"] = {"path": prompts_file(gateway, vault, job.prompts)[0]}
    adapter = None if job.adapter is None else weights.adapters[job.adapter]
    work = LossJob.model_validate(
        {
            **asked,
            "model": {"path": weights.path, "adapter": adapter},
            "lake": gateway.settings.lake,
            "artifact": artifact.name,
            "hook": hook,
            "first_position": job.first_position,
        }
    )
    spec = {
        "job": job.model_dump(mode="json"), "pins": pins, "models": list(models),
        WORK: {job.kind: work.model_dump(mode="json", exclude_unset=True)},
    }  # fmt: skip
    return gateway.queue.submit(job.kind, spec, model=work.model.base, project=vault.project, user=user)


def answer_of(job: SaeCrossEntropyJob, vault: Vault, progress: Progress) -> Answer:
    """What a worker has measured, summed up."""
    table = read_losses(vault.lake.storage, vault.job)
    # near-duplicate prompts are one: their losses say the same thing twice
    clusters = distinct_prompts([np.asarray(ids) for ids in table["prompt_tokens"]])
    progress(0.5)
    return Answer(summary(table, clusters), _evidence(job, vault, table, clusters))


def summary(table: pd.DataFrame, clusters: Any) -> Result:
    """Means over tokens, and the share of the loss that is recovered, with intervals that count prompts.

    Args:
        table: as `store.losses` has it.
        clusters: number of each prompt, the same for near-duplicates.
    """
    clean, sae, zero, tokens = (table[name].to_numpy(np.float64) for name in ("clean", "sae", "zero", "tokens"))
    parts = {
        "ce_clean": (clean, tokens), "ce_sae": (sae, tokens), "ce_zero": (zero, tokens),
        "ce_recovered": (zero - sae, zero - clean),
    }  # fmt: skip
    found = {name: ratio(over, under, clusters) for name, (over, under) in parts.items()}
    return Result(
        "sae-cross-entropy",
        {name: value for name, (value, _, _) in found.items()},
        {name: (low, high) for name, (_, low, high) in found.items()},
        {"tokens": int(tokens.sum()), "prompts": len(np.unique(clusters))},
    )


def _evidence(job: SaeCrossEntropyJob, vault: Vault, table: pd.DataFrame, clusters: Any) -> Evidence:
    artifact = vault.load(job.artifact)
    behind = fitted_to(vault, artifact)
    # what no job of the vault trained may be any function of the residual stream; and what was fitted to rows of
    # restricted prompts or of an intervened run shows these
    custom = not behind or not all(map(is_plain, behind))
    top, two = shares(np.repeat(clusters, table["tokens"]))
    rows, prompts = int(table["tokens"].sum()), len(np.unique(clusters))
    if isinstance(job.prompts, RowSet):
        found = measure((rows_of(vault, job.prompts),), behind=behind, custom=custom)
        return replace(
            found,
            rows=min(found.rows, rows),
            prompts=min(found.prompts, prompts),
            top_prompt_share=max(found.top_prompt_share, top),
            top_two_share=max(found.top_two_share, two),
        )
    return Evidence("own", rows=rows, prompts=prompts, top_prompt_share=top, top_two_share=two, custom=custom)
