"""Pipeline stages: each keeps the rows of its own layers, and the first writes them all into one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest

Confirmed = CapturedRequest | CaptureFailed


def gather_stages(group: Any, mine: Mapping[str, Confirmed]) -> dict[str, Confirmed]:
    """What the stages of a pipeline have of confirmed requests, made whole; only the first stage gets any.

    Every stage must call this at the same place in its order of work.

    Args:
        group: vLLM's pipeline group, with `world_size`, `rank_in_group`, `ranks` and `cpu_group`.
        mine: this stage's part, by capture id.
    """
    if group.world_size == 1:
        return dict(mine)
    import torch.distributed

    first = group.rank_in_group == 0
    parts: list[Any] | None = [None] * group.world_size if first else None
    torch.distributed.gather_object(dict(mine), parts, dst=group.ranks[0], group=group.cpu_group)
    return join_stages(parts) if parts is not None else {}


def join_stages(parts: Sequence[Mapping[str, Confirmed]]) -> dict[str, Confirmed]:
    """One request for each capture id, with the hooks and reads of all stages; failed where it failed in any."""
    joined: dict[str, Confirmed] = {}
    for capture_id in parts[0]:
        known = [part[capture_id] for part in parts if capture_id in part]
        failed = next((part for part in known if isinstance(part, CaptureFailed)), None)
        whole = [part for part in known if isinstance(part, CapturedRequest)]
        if failed is not None:
            joined[capture_id] = failed
        elif len(known) < len(parts):
            joined[capture_id] = CaptureFailed(f"request {capture_id!r} never reached every pipeline stage")
        elif any(
            not np.array_equal(part.positions, whole[0].positions)
            or not np.array_equal(part.token_ids, whole[0].token_ids)
            for part in whole
        ):
            joined[capture_id] = CaptureFailed(f"request {capture_id!r}: pipeline stages kept different positions")
        else:
            activations = {hook: rows for part in whole for hook, rows in part.activations.items()}
            reads = {name: values for part in whole for name, values in part.reads.items()}
            joined[capture_id] = replace(whole[0], activations=activations, reads=reads)
    return joined
