"""Batches of rows for a client's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from millpond.hub.graph_jobs import Batch
    from millpond.store.run import Run


def batches(view: Run, hook: str, labels: Any, rows: int) -> Iterator[Batch]:
    """The rows in their order, `rows` at a time; a last batch of one row is left out, for no graph takes it."""
    activations = view[hook]
    prompts = view.tokens["prompt"].values.astype(np.int64)
    values = None if labels is None else np.asarray(labels.values, np.float32)
    for start in range(0, len(view), rows):
        part = slice(start, start + rows)
        block = np.asarray(activations[part].values, np.float32)
        if len(block) > 1:
            yield block, None if values is None else values[part], prompts[part]
