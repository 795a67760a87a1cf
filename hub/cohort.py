"""The evidence that the release rules judge, measured from rows by trusted code in the vault."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.hub.rules import Cohort
from millpond.store.errors import InvalidInput

_SHINGLE, _HASHES, _BANDS = 3, 64, 16
_SIMILAR = 0.5
"""Fraction of equal MinHash values, an estimate of the Jaccard similarity, from which two prompts count as one."""


def distinct_prompts(tokens: Sequence[NDArray[Any] | Sequence[int]]) -> NDArray[np.int64]:
    """A cluster number for each prompt: near-duplicates, by MinHash of token triples (Broder, 1997), share one.

    Candidates share one of 16 bands of 4 hashes; similar in half of their triples, they are joined, and what is joined
    to a third with it. Prompts that share no triple stay apart, so padding with fresh text defeats this count; rows
    that are equal nevertheless are caught by the variance of the cohort.
    """
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 1 << 61, _HASHES, dtype=np.uint64) | np.uint64(1)
    terms = rng.integers(0, 1 << 61, _HASHES, dtype=np.uint64)
    parent = np.arange(len(tokens))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    signatures = np.empty((len(tokens), _HASHES), np.uint64)
    bands: dict[tuple[int, bytes], list[int]] = {}
    width = _HASHES // _BANDS
    for number, ids in enumerate(tokens):
        padded = np.concatenate([np.asarray(ids, np.int64) + 2, np.ones(_SHINGLE - 1, np.int64)]).astype(np.uint64)
        shingles = np.zeros(len(padded) - _SHINGLE + 1, np.uint64)
        for offset in range(_SHINGLE):
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + padded[offset : offset + len(shingles)]
        shingles ^= shingles >> np.uint64(29)
        mixed = np.unique(shingles)[:, None] * factors + terms if len(shingles) else terms[None, :]
        signatures[number] = (mixed ^ (mixed >> np.uint64(32))).min(axis=0)
        for band in range(_BANDS):
            key = (band, signatures[number, band * width : (band + 1) * width].tobytes())
            seen = bands.setdefault(key, [])
            for other in seen:
                if root(other) != root(number) and (signatures[other] == signatures[number]).mean() >= _SIMILAR:
                    parent[root(number)] = root(other)
            if len(seen) < 8:  # enough to meet a cluster; a crowded band is one cluster
                seen.append(number)
    return np.array([root(node) for node in range(len(tokens))], np.int64)


def cohort(clusters: NDArray[Any], rows: NDArray[Any]) -> Cohort:
    """The cohort of the row numbers `rows`, whose distinct prompts are `clusters`."""
    clusters, rows = np.asarray(clusters), np.asarray(rows)
    order = np.lexsort((rows, clusters))
    clusters, rows = clusters[order], rows[order].astype("<i8")
    starts = np.flatnonzero(np.diff(clusters, prepend=clusters[0] - 1)) if len(clusters) else np.empty(0, int)
    parts = np.split(rows, starts[1:])
    return {
        int(clusters[start]): int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=8).digest(), "big")
        for start, part in zip(starts, parts, strict=True)
    }


def shares(clusters: NDArray[Any]) -> tuple[float, float]:
    """The share of rows that the largest distinct prompt holds, and the two largest."""
    counts = np.sort(np.unique(clusters, return_counts=True)[1])[::-1]
    if not len(counts):
        raise InvalidInput("the cohort has no rows")
    return float(counts[0] / counts.sum()), float(counts[:2].sum() / counts.sum())


def variance_ratio(rows_TD: NDArray[Any], run_variance: float) -> float:
    """Total variance of the rows over that of the run at the same hook (both summed over coordinates)."""
    if not run_variance > 0:
        return 0.0
    wide = np.asarray(rows_TD, np.float64)
    return float(wide.var(axis=0).sum() / run_variance)


def identical_share(rows_TD: NDArray[Any]) -> float:
    """The largest share of rows that agree to about three digits in the norm of their difference.

    Rows are compared after rounding to a thousandth of the largest coordinate.
    """
    unit = float(np.abs(np.asarray(rows_TD, np.float32)).max()) / 1000 or 1.0
    return largest_share(row_keys(rows_TD, unit))


def row_keys(rows_TD: NDArray[Any], unit: float) -> NDArray[np.uint64]:
    """A number for each row, equal where rows are after rounding to `unit`."""
    coarse = np.rint(np.asarray(rows_TD, np.float32) / np.float32(unit)).astype(np.int64).astype(np.uint64)
    factors = np.random.default_rng(0).integers(1, 1 << 63, coarse.shape[1], dtype=np.uint64) | np.uint64(1)
    keys: NDArray[np.uint64] = coarse @ factors
    return keys ^ (keys >> np.uint64(29))


def largest_share(keys: NDArray[np.uint64]) -> float:
    """The largest share of equal numbers."""
    return float(np.unique(keys, return_counts=True)[1].max() / len(keys))
