"""What each latent responds to: one streaming pass over the rows for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, add, run_pass
from millpond.analysis.sae import blocks
from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.evaluation import nearest
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis.sae.estimator import Sae
    from millpond.store.run import Run

Decode = Callable[[Sequence[int]], str]
"""Text of some token ids."""
Ints = NDArray[np.int64]

RARE, COMMON = 0.0005, 0.05
"""Latents that fire on a smaller or larger fraction of the rows are not shown: too few contexts, or no single meaning."""
BINS = 24
"""Half octaves of activation, about the median activation of the first rows."""


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


@dataclass(frozen=True, repr=False)
class Survey:
    """What one pass found about every latent."""

    rows: int
    frequency: NDArray[np.float64]
    """Fraction of the rows that activate each latent, (d_sae,)."""
    mean: NDArray[np.float64]
    """Mean activation over all rows."""
    edges: NDArray[np.float64]
    """Edges of the bins of `histogram`, (BINS + 1,)."""
    histogram: Ints
    """Rows whose activation is in each bin, (d_sae, BINS)."""
    top: pd.DataFrame
    """The strongest rows: latent, rank, row, value, and the rows' coordinates."""
    labels: tuple[str, ...]
    correlation: NDArray[np.float64]
    """Pearson's, of activations with each label, (d_sae, labels); NaN for a latent that never fired."""
    mean_difference: NDArray[np.float64]
    """Mean activation where the label is above 0, less the mean elsewhere, (d_sae, labels)."""
    f1: NDArray[np.float64]
    """Best F1 of "the activation is at least t" for "the label is above 0", over the bins' edges t, (d_sae, labels)."""
    cut: NDArray[np.float64]
    """That t."""

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self.labels)}" if self.labels else ""
        dead = int((self.frequency == 0).sum())
        return f"<Survey of {len(self.frequency):,} latents over {self.rows:,} rows: {dead:,} never fired{labels}>"

    def table(self, weights: SaeWeights | None = None, neighbours: int = 3) -> pd.DataFrame:
        """One row a latent: frequency, mean, maximum, the best label, and with `weights` the nearest decoder rows."""
        import pandas as pd

        peak = self.top.groupby("latent")["value"].max()
        frame = pd.DataFrame({"frequency": self.frequency, "mean": self.mean})
        frame.index.name = "latent"
        frame["max"] = peak.reindex(frame.index).fillna(0.0)
        if self.labels:
            best = self.f1.argmax(axis=1)
            at = np.arange(len(best))
            frame["label"] = np.array(self.labels, dtype=object)[best]
            frame["f1"], frame["correlation"] = self.f1[at, best], self.correlation[at, best]
        if weights is not None and weights.d_sae > 1:
            which, how = nearest(weights, neighbours)
            frame["nearest"] = [row.tolist() for row in which]
            frame["similarity"] = how[:, 0]
        return frame


def survey(
    sae: Sae,
    rows: Any,
    labels: Mapping[str, Any] | None = None,
    *,
    n: int = 10,
    one_a_prompt: bool = True,
    progress: bool = True,
) -> Survey:
    """Look at every latent in one pass over `rows`.

    Args:
        sae: a trained autoencoder or transcoder.
        rows: its input, such as `run[hook]`; a crosscoder's is a list of its hooks' arrays.
        labels: columns aligned by row, numbers or booleans, such as `{"in_string": run.labels["in_string"]}`.
        n: strongest rows to keep of each latent.
        one_a_prompt: keep one row of each prompt, its strongest.
        progress: show a bar.

    A worker holds `d_sae * BINS * (1 + labels) * 8` bytes of counts and `d_sae * n` rows.
    """
    import pandas as pd

    weights = sae._weights()
    arrays = list(rows) if isinstance(rows, list | tuple) else [rows]
    named = dict(labels or {})
    columns = [_numbers(name, values) for name, values in named.items()]
    n_rows = int(np.shape(arrays[0])[0])
    prompts = _coordinate(arrays[0], "prompt") if one_a_prompt else None
    given = AlignedRows(*arrays, range(n_rows), range(n_rows) if prompts is None else prompts, *columns)
    unit = _unit(weights, AlignedRows(*arrays), len(arrays))
    edges = unit * 2.0 ** ((np.arange(BINS + 1) - BINS / 2) / 2)
    state = _State(weights, len(arrays), edges, n)
    found: _Found = run_pass(Pass(given, _survey_block, state, _Join(n)), description="latents", progress=progress)
    sums, count = found.sums, n_rows
    mean, square = sums["value"] / count, sums["square"] / count
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    label_mean, label_square = sums["label"] / count, sums["label_square"] / count
    label_deviation = np.sqrt(np.maximum(label_square - label_mean**2, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = sums["product"] / count - mean[:, None] * label_mean
        correlation = covariance / (deviation[:, None] * label_deviation)
        where = sums["where_positive"] / sums["positive"]
        elsewhere = (sums["value"][:, None] - sums["where_positive"]) / (count - sums["positive"])
    f1, cut = _best_f1(sums["histogram"], sums["positive_histogram"], sums["positive"], edges)
    best = found.best
    rank = np.arange(len(best.latent)) - np.searchsorted(best.latent, best.latent)
    top = pd.DataFrame({"latent": best.latent, "rank": rank, "row": best.row, "value": best.value})
    _add_coordinates(top, arrays[0])
    return Survey(
        count, sums["fired"] / count, mean, edges, sums["histogram"], top, tuple(named), correlation,
        where - elsewhere, f1, cut,
    )  # fmt: skip


def top_rows(
    weights: SaeWeights, X: Any, latents: Iterable[int] | None, n: int, *, progress: bool = True
) -> pd.DataFrame:
    """See `Sae.top_rows`."""
    import pandas as pd

    chosen = np.arange(weights.d_sae) if latents is None else np.unique(np.fromiter(latents, np.int64))
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= weights.d_sae:
        raise InvalidInput(f"latents are {chosen[:5]}...; give numbers from 0 to {weights.d_sae - 1}")
    wanted = np.zeros(weights.d_sae, bool)
    wanted[chosen] = True
    given = AlignedRows(X, range(len(X)))
    best: _Best = run_pass(
        Pass(given, _top_block, (weights, wanted, n), _JoinBest(n)), description="SAE", progress=progress
    )
    rank = np.arange(len(best.latent)) - np.searchsorted(best.latent, best.latent)
    table = pd.DataFrame({"latent": best.latent, "rank": rank, "row": best.row, "value": best.value})
    _add_coordinates(table, X)
    return table


def strongest_latents(
    sae: Sae,
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
    candidates = np.flatnonzero((frequency >= RARE) & (frequency <= COMMON))
    if not len(candidates):
        return ()
    top = survey(sae, run[hook], n=contexts, progress=sae.progress).top
    top = top[top["latent"].isin(candidates)]
    peaks = top[top["rank"] == 0].sort_values("value", ascending=False)
    chosen = peaks["latent"].to_numpy()[: 2 * latents]
    sizes = top.groupby("latent").size()
    full = [number for number in chosen if sizes[number] == contexts]
    order = (full + [number for number in chosen if number not in set(full)])[:latents]
    shown = contexts_of(top[top["latent"].isin(order)], run, decode, before=before, after=after)
    return tuple(LatentCard(int(number), float(frequency[number]), shown[number]) for number in order)


def contexts_of(
    top: pd.DataFrame, run: Run, decode: Decode, *, before: int = 12, after: int = 6
) -> dict[int, tuple[Context, ...]]:
    """The text around the rows of `Survey.top`, by latent, strongest first.

    Reads the token ids of the run once.
    """
    tokens = run.tokens.compute()
    prompts, ids = tokens["prompt"].to_numpy(), tokens["token_id"].to_numpy()
    names = run.prompts["id"]

    def context(row: Any) -> Context:
        at = int(row.row)
        around = np.arange(max(0, at - before), min(len(ids), at + after + 1))
        around = around[prompts[around] == row.prompt]
        left, right = ids[around[around < at]], ids[around[around > at]]
        name = str(names.loc[row.prompt])
        return Context(decode(left.tolist()), decode([int(ids[at])]), decode(right.tolist()), float(row.value), name)

    groups = top.groupby("latent", sort=False)
    return {int(str(number)): tuple(context(row) for row in part.itertuples()) for number, part in groups}


@dataclass(frozen=True)
class _State:
    weights: SaeWeights
    n_inputs: int
    edges: NDArray[np.float64]
    n: int


@dataclass
class _Best:
    """Strongest rows, by latent and then strongest first."""

    latent: Ints
    row: Ints
    value: NDArray[np.float32]
    group: Ints
    """Rows of one group (a prompt) count once a latent."""

    def keep(self, n: int) -> _Best:
        """The `n` best of each latent, of each group the best; of equal ones the earlier row."""
        order = np.lexsort((self.row, -self.value, self.latent))
        latent, group = self.latent[order], self.group[order]
        pairs = np.lexsort((np.arange(len(order)), group, latent))
        first = np.ones(len(order), bool)
        first[1:] = (latent[pairs][1:] != latent[pairs][:-1]) | (group[pairs][1:] != group[pairs][:-1])
        order = order[np.sort(pairs[first])]
        latent = self.latent[order]
        order = order[np.arange(len(order)) - np.searchsorted(latent, latent) < n]
        return _Best(self.latent[order], self.row[order], self.value[order], self.group[order])

    def with_(self, other: _Best) -> _Best:
        """Both, unsorted."""
        return _Best(
            np.concatenate([self.latent, other.latent]),
            np.concatenate([self.row, other.row]),
            np.concatenate([self.value, other.value]),
            np.concatenate([self.group, other.group]),
        )


def _no_rows() -> _Best:
    return _Best(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))


@dataclass
class _Found:
    sums: dict[str, Any]
    best: _Best


class _Join:
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, left: _Found, right: _Found) -> _Found:
        return _Found(add(left.sums, right.sums), left.best.with_(right.best).keep(self.n))


class _JoinBest:
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, left: _Best, right: _Best) -> _Best:
        return left.with_(right).keep(self.n)


def _survey_block(state: _State, *given: NDArray[Any]) -> _Found:
    weights, d_sae = state.weights, state.weights.d_sae
    x = blocks.side_by_side(given[: state.n_inputs])
    numbers, groups, *columns = given[state.n_inputs :]
    labels = np.stack(columns, axis=1).astype(np.float64) if columns else np.zeros((len(x), 0))
    positive = labels > 0
    n_labels = labels.shape[1]
    sums: dict[str, Any] = {
        "fired": np.zeros(d_sae, np.int64), "value": np.zeros(d_sae), "square": np.zeros(d_sae),
        "histogram": np.zeros((d_sae, BINS), np.int64),
        "positive_histogram": np.zeros((n_labels, d_sae, BINS), np.int64),
        "product": np.zeros((d_sae, n_labels)), "where_positive": np.zeros((d_sae, n_labels)),
        "label": labels.sum(axis=0), "label_square": np.square(labels).sum(axis=0),
        "positive": positive.sum(axis=0),
    }  # fmt: skip
    best = _no_rows()
    for part in blocks.slices(weights, len(x)):
        latents = blocks.encode(weights, x[part])
        row, latent = np.nonzero(latents)
        value = latents[row, latent]
        sums["fired"] += np.bincount(latent, minlength=d_sae)
        sums["value"] += np.bincount(latent, value, d_sae)
        sums["square"] += np.bincount(latent, value.astype(np.float64) ** 2, d_sae)
        bins = np.clip(np.searchsorted(state.edges, value, "right") - 1, 0, BINS - 1)
        cell = latent * BINS + bins
        sums["histogram"] += np.bincount(cell, minlength=d_sae * BINS).reshape(d_sae, BINS)
        for number in range(n_labels):
            on = positive[part][row, number]
            sums["positive_histogram"][number] += np.bincount(cell[on], minlength=d_sae * BINS).reshape(d_sae, BINS)
            sums["where_positive"][:, number] += np.bincount(latent[on], value[on], d_sae)
            sums["product"][:, number] += np.bincount(latent, value * labels[part][row, number], d_sae)
        here = _Best(latent, numbers[part][row].astype(np.int64), value, groups[part][row].astype(np.int64))
        best = best.with_(here).keep(state.n)
    return _Found(sums, best)


def _top_block(state: tuple[SaeWeights, NDArray[np.bool_], int], x: NDArray[Any], numbers: NDArray[Any]) -> _Best:
    weights, wanted, n = state
    best = _no_rows()
    for part in blocks.slices(weights, len(x)):
        latents = blocks.encode(weights, x[part])
        row, latent = np.nonzero(latents * wanted)
        rows = numbers[part][row].astype(np.int64)
        best = best.with_(_Best(latent, rows, latents[row, latent], rows)).keep(n)
    return best


def _best_f1(
    histogram: Ints, positive_histogram: Ints, positive: Ints, edges: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Best F1 and its threshold of each latent and label, (d_sae, labels) each."""
    above = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1]
    hits = np.cumsum(positive_histogram[:, :, ::-1], axis=2)[:, :, ::-1]
    f1 = 2 * hits / np.maximum(above + positive[:, None, None], 1)
    at = f1.argmax(axis=2)
    cut = np.concatenate([[0.0], edges[1:-1]])[at]  # the lowest bin holds everything above 0
    return np.take_along_axis(f1, at[:, :, None], 2)[:, :, 0].T, cut.T


def _unit(weights: SaeWeights, rows: AlignedRows, n_inputs: int) -> float:
    """A typical activation: the median of those of some rows at the start."""
    found = run_pass(Pass(rows.head(256), _values, (weights, n_inputs)), progress=False)
    return float(np.median(found)) if len(found) else 1.0


def _values(state: tuple[SaeWeights, int], *x: NDArray[Any]) -> NDArray[np.float32]:
    weights, n_inputs = state
    latents = blocks.encode(weights, blocks.side_by_side(x[:n_inputs])[:256])
    return latents[latents > 0]


def _numbers(name: str, values: Any) -> Any:
    dtype = getattr(values, "dtype", None)
    values = values if dtype is not None else np.asarray(values)
    if np.dtype(values.dtype).kind not in "biuf":
        raise InvalidInput(f"label {name!r} has data type {values.dtype}; give numbers or booleans")
    return values


def _coordinate(array: Any, name: str) -> Any:
    coordinate = getattr(array, "coords", {}).get(name)
    return None if coordinate is None or coordinate.dims != ("row",) else coordinate


def _add_coordinates(table: pd.DataFrame, array: Any) -> None:
    for name, coordinate in getattr(array, "coords", {}).items():
        if coordinate.dims == ("row",):
            table[name] = np.asarray(coordinate.compute())[table["row"]]
