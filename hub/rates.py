"""Shares of completions that match, and means of their scores, with intervals that count prompts, not completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.hub.quantise import Z95
from millpond.store.errors import InvalidInput

_MOST_MEMORY = 8 << 20


@lru_cache(maxsize=16)
def compiled(pattern: str) -> Any:
    """The expression as RE2 runs it, without backtracking: a client's own expression cannot hang the vault.

    Raises:
        InvalidInput: it is none, or needs what RE2 does not have (such as lookahead) or too much memory.
    """
    import re2

    options = re2.Options()
    options.max_mem = _MOST_MEMORY
    options.log_errors = False
    try:
        return re2.compile(pattern, options=options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise InvalidInput(f"regex: {reason}; give an expression in the syntax of RE2") from error


def matches(texts: Sequence[str], *, regex: str | None = None, contains: Sequence[str] = ()) -> NDArray[np.bool_]:
    """Which texts hold a match of the expression, or one of the texts `contains`."""
    if regex is not None:
        found = compiled(regex)
        return np.array([found.search(text) is not None for text in texts], bool)
    return np.array([any(one in text for one in contains) for text in texts], bool)


def rate(matched: NDArray[np.bool_], prompts: NDArray[Any]) -> tuple[float, float, float]:
    """The share of matches and its 95 % interval.

    Wilson's (1927) with the effective number of completions: p(1-p) over the variance of a ratio estimator whose units are
    prompts (Kish, 1965). At 0 and 1, where that variance says nothing, it is the number of prompts.

    Args:
        matched: of each completion.
        prompts: whose it is; near-duplicates have one number.
    """
    p, variance, count = _ratio(matched, np.ones(len(matched)), prompts)
    n, effective = float(len(matched)), float(count)
    if 0 < p < 1 and count > 1:
        effective = min(n, p * (1 - p) / variance) if variance > 0 else n
    z2 = Z95**2 / effective
    middle = (p + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * float(np.sqrt(p * (1 - p) / effective + z2 / (4 * effective)))
    return p, max(0.0, middle - half), min(1.0, middle + half)


def mean(scores: NDArray[np.float64], prompts: NDArray[Any]) -> tuple[float, float, float]:
    """The mean of scores and its 95 % interval, NaN to NaN where one prompt leaves none; arguments as for `rate`."""
    return ratio(scores, np.ones(len(scores)), prompts)


def ratio(over: NDArray[np.float64], under: NDArray[np.float64], prompts: NDArray[Any]) -> tuple[float, float, float]:
    """The ratio of two sums and its 95 % interval, as a ratio estimator whose units are prompts (Kish, 1965).

    NaN where the lower sum is 0; the interval is NaN to NaN where one prompt leaves none.

    Args:
        over: of each item.
        under: of each item.
        prompts: whose it is; near-duplicates have one number.
    """
    if not under.sum():
        return (float(np.nan),) * 3
    value, variance, count = _ratio(over, under, prompts)
    half = Z95 * float(np.sqrt(variance)) if count > 1 else np.nan
    return value, value - half, value + half


def _ratio(over: NDArray[Any], under: NDArray[Any], prompts: NDArray[Any]) -> tuple[float, float, int]:
    """The ratio of two sums, its variance where the units are prompts, and how many prompts there are."""
    _, of = np.unique(prompts, return_inverse=True)
    sums, sizes = np.bincount(of, weights=over), np.bincount(of, weights=under)
    count, n = len(sizes), float(under.sum())
    found = float(over.sum() / n)
    variance = float(np.square(sums - found * sizes).sum()) / n**2 * (count / (count - 1) if count > 1 else np.nan)
    return found, variance, count
