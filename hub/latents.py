"""The strongest latents of an autoencoder, each with the text around the rows that activate it most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis import BatchTopKSae
    from millpond.store.run import Run

Decode = Callable[[Sequence[int]], str]
"""Text of some token ids."""

RARE, COMMON = 0.0005, 0.05
"""Latents that fire on a smaller or larger fraction of the rows are not shown: too few contexts, or no single meaning."""
_CANDIDATES = 8
"""Rows looked at for each context shown, since several strong rows may come from one prompt."""


@dataclass(frozen=True)
class Context:
    """Text around one row that activates a latent."""

    before: str
    token: str
    """The text of the activating row's own token."""
    after: str
    value: float
    prompt_id: str


@dataclass(frozen=True)
class LatentCard:
    """One latent and where it fires most."""

    latent: int
    frequency: float
    """Fraction of the rows that activate it."""
    contexts: tuple[Context, ...]
    """Strongest first, each from another prompt."""


def strongest_latents(
    sae: BatchTopKSae,
    run: Run,
    hook: str,
    frequency: NDArray[np.float64],
    decode: Decode,
    *,
    latents: int = 12,
    contexts: int = 6,
    before: int = 12,
    after: int = 6,
) -> tuple[LatentCard, ...]:
    """The latents with the highest activation among those that fire on `RARE` to `COMMON` of the rows.

    Latents that fire in fewer than `contexts` prompts are passed over, though the strongest stay if
    there are no others.

    Args:
        sae: a fitted autoencoder of `hook`.
        run: the rows to look at.
        hook: the hook point of `sae`.
        frequency: of each latent over those rows, (d_sae,).
        decode: text of token ids.
        latents: how many to return, if there are so many.
        contexts: how many of each.
        before: tokens of the prompt shown before the activating one.
        after: tokens shown after it.
    """
    rows = run[hook]
    candidates = np.flatnonzero((frequency >= RARE) & (frequency <= COMMON))
    if not len(candidates):
        return ()
    peaks = sae.top_rows(rows, candidates, n=1).sort_values("value", ascending=False)
    chosen = peaks["latent"].to_numpy()[: 2 * latents]
    table = sae.top_rows(rows, chosen, n=contexts * _CANDIDATES).drop_duplicates(["latent", "prompt"])
    found = {number: part.head(contexts) for number, part in table.groupby("latent", sort=False)}
    full = [number for number in chosen if len(found[number]) == contexts]
    order = (full + [number for number in chosen if number not in set(full)])[:latents]
    tokens = run.tokens.compute()
    prompts, ids = tokens["prompt"].to_numpy(), tokens["token_id"].to_numpy()

    def context(row: Any) -> Context:
        at = int(row.row)
        around = np.arange(max(0, at - before), min(len(ids), at + after + 1))
        around = around[prompts[around] == row.prompt]
        left, right = ids[around[around < at]], ids[around[around > at]]
        name = str(run.prompts["id"].loc[row.prompt])
        return Context(decode(left.tolist()), decode([int(ids[at])]), decode(right.tolist()), float(row.value), name)

    def card(number: int) -> LatentCard:
        part: pd.DataFrame = found[number]
        shown = tuple(context(row) for row in part.itertuples())
        return LatentCard(int(number), float(frequency[number]), shown)

    return tuple(card(number) for number in order)
