"""The token ids of a run's prompts, as a model takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.store.run import Run


def prompts_of(run: Run, bos: int | None = None, limit: int | None = None) -> list[list[int]]:
    """Token ids of the first `limit` prompts of a run; `bos` stands in front where capture left position 0 out.

    Raises:
        InvalidInput: the run does not hold all positions of a prompt.
    """
    tokens = run.tokens.compute()
    numbers, positions, ids = (tokens[name].to_numpy() for name in ("prompt", "position", "token_id"))
    found = []
    for number in run.prompts.index[:limit]:
        low, high = np.searchsorted(numbers, [number, number + 1])
        here, first = ids[low:high].tolist(), int(positions[low]) if high > low else 0
        if first == 1 and bos is not None:
            here, first = [bos, *here], 0
        if first != 0 or not np.array_equal(np.diff(positions[low:high]), np.ones(max(0, high - low - 1))):
            raise InvalidInput(
                f"prompt {number} of run {run.name!r} lacks positions; capture positions = 'all', or give bos if only 0 is"
            )
        found.append(here)
    return found
