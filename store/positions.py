"""Which token positions of a request are wanted: the vocabulary that jobs, requests and workers share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def _said_once(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One message for all that it may be, where pydantic has one for each."""
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError(
            "give 'all', 'prompt', 'generated', 'last' or a list of positions, such as [0, -1] for the prompt's first and last token"
        ) from error


Positions = Annotated[
    Literal["all", "prompt", "generated", "last"] | Annotated[tuple[int, ...], Field(min_length=1)],
    WrapValidator(_said_once),
]
"""`last` is the last prompt token; numbers count from 0, negative ones from the end of the prompt."""


class PositionFilter(BaseModel):
    """A choice of token positions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    positions: Positions = "all"
    """Which tokens; a list counts from 0, and from the end of the prompt where negative."""
    first_position: int = Field(default=0, ge=0)
    """Positions before this one are left out; 1 leaves out the beginning-of-sequence token."""
    end_position: int | None = Field(default=None, ge=1)
    """This position and those after it are left out."""
    every: int = Field(default=1, ge=1)
    """Keep `first_position` and every so-manieth position after it."""
    token_ids: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Keep only positions whose token is one of these."""

    def select(
        self, n_prompt: int, start: int, stop: int, tokens: NDArray[np.int32] | None = None
    ) -> NDArray[np.int32]:
        """The wanted positions from `start` to before `stop`, ascending, of a request with `n_prompt` prompt tokens.

        Args:
            n_prompt: number of prompt tokens.
            start: first position looked at.
            stop: one after the last.
            tokens: the request's token ids from position 0, (at least `stop`,), negative where they are not known yet;
                `token_ids` leaves out no position whose token is not known.
        """
        low, high = max(start, self.first_position), stop
        if self.end_position is not None:
            high = min(high, self.end_position)
        if isinstance(self.positions, tuple):
            absolute = {p + n_prompt if p < 0 else p for p in self.positions}
            chosen = np.array(sorted(p for p in absolute if low <= p < high), np.int32)
        else:
            if self.positions == "prompt":
                high = min(high, n_prompt)
            elif self.positions == "generated":
                low = max(low, n_prompt)
            elif self.positions == "last":
                low, high = max(low, n_prompt - 1), min(high, n_prompt)
            chosen = np.arange(low, max(low, high), dtype=np.int32)
        if self.every > 1:
            chosen = chosen[(chosen - self.first_position) % self.every == 0]
        if self.token_ids is not None and tokens is not None:
            chosen = chosen[(tokens[chosen] < 0) | np.isin(tokens[chosen], self.token_ids)]
        return chosen

    def misses(self, n_prompt: int, n_tokens: int, tokens: NDArray[np.int32] | None = None) -> bool:
        """Whether a request of `n_tokens` computed tokens, as `select` takes them, lacks a position or has none that is chosen."""
        return self.out_of_reach(n_prompt, n_tokens) is not None or not len(self.select(n_prompt, 0, n_tokens, tokens))

    def out_of_reach(self, n_prompt: int, n_tokens: int) -> int | None:
        """A position asked for by number that a request of `n_tokens` computed tokens does not have."""
        if isinstance(self.positions, tuple):
            for position in self.positions:
                if not 0 <= (position + n_prompt if position < 0 else position) < n_tokens:
                    return position
        return None
