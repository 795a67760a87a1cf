"""Which token positions of a request are wanted: the vocabulary that jobs, requests and workers share."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Positions = Literal["all", "prompt", "generated", "last"] | Annotated[tuple[int, ...], Field(min_length=1)]
"""`last` is the last prompt token; numbers count from 0, negative ones from the end of the prompt."""


class PositionFilter(BaseModel):
    """A choice of token positions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positions: Positions = "all"
    first_position: int = Field(default=0, ge=0)
    """Positions before this one are left out; 1 leaves out the beginning-of-sequence token."""

    def select(self, n_prompt: int, start: int, stop: int) -> NDArray[np.int32]:
        """The wanted positions from `start` to before `stop`, ascending, of a request with `n_prompt` prompt tokens."""
        low, high = max(start, self.first_position), stop
        if isinstance(self.positions, tuple):
            absolute = {p + n_prompt if p < 0 else p for p in self.positions}
            return np.array(sorted(p for p in absolute if low <= p < high), np.int32)
        if self.positions == "prompt":
            high = min(high, n_prompt)
        elif self.positions == "generated":
            low = max(low, n_prompt)
        elif self.positions == "last":
            low, high = max(low, n_prompt - 1), min(high, n_prompt)
        return np.arange(low, max(low, high), dtype=np.int32)

    def out_of_reach(self, n_prompt: int, n_tokens: int) -> int | None:
        """A position asked for by number that a request of `n_tokens` computed tokens does not have."""
        if isinstance(self.positions, tuple):
            for position in self.positions:
                if not 0 <= (position + n_prompt if position < 0 else position) < n_tokens:
                    return position
        return None
