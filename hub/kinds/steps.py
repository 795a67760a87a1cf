"""Jobs in steps: what one is called in the queue while workers do their parts, and when an executor goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millpond.store.capture_spec import ModelSection

WORK = "work"
"""Where such a job's specification holds the workers' parts, by what the job is called in the queue while one does its own."""
CHAINS = (("generate", "judge", "generated"), ("sae_cross_entropy", "measured"))
"""The names in order, the last one for executors."""
LAST = frozenset(chain[-1] for chain in CHAINS)


def next_step(kind: str, work: Mapping[str, Any]) -> tuple[str, str]:
    """What a job is called in the queue when a worker has done the part `kind` of its `work`, and the base model it needs then."""
    chain = next(chain for chain in CHAINS if kind in chain)
    later = chain[chain.index(kind) + 1 :]
    step = next((one for one in later if one in work), chain[-1])
    return step, ModelSection.model_validate(work[step]["model"]).base if step in work else ""
