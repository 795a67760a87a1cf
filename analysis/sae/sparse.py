"""The few entries of a (rows, d_sae) matrix that are not 0, and the products that need nothing else.

Selection compares the wide product of the encoder, in bfloat16 if the machine multiplies it in hardware;
the survivors' values are computed again in float32, so ties of bfloat16 decide nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.analysis.sae import kernels

_CACHED_ROWS, _CACHED_COLUMNS, _CACHED_BYTES = 8192, kernels.LANES, 1 << 20
_MARKED_ROWS = 128


@dataclass(frozen=True)
class Active:
    """Entries of a (rows, d_sae) matrix, row by row and by latent within a row (CSR)."""

    crow: Tensor
    """Start of each row among the entries, (rows + 1,), int64."""
    col: Tensor
    """Latent of each entry, int32."""
    values: Tensor
    """Its pre-activation, float32."""

    @property
    def row(self) -> Tensor:
        """Row of each entry."""
        return torch.repeat_interleave(torch.arange(len(self.crow) - 1, device=self.col.device), self.crow.diff())

    def keep(self, mask: Tensor) -> Active:
        """The entries that `mask` marks."""
        if mask.is_cuda:
            places = mask.nonzero().view(-1)
            crow = torch.searchsorted(places, self.crow)
            return Active(crow, self.col.index_select(0, places), self.values.index_select(0, places))
        count = int(mask.count_nonzero())
        new = Active(torch.empty_like(self.crow), self.col.new_empty(count), self.values.new_empty(count))
        kernels.kept(mask.numpy(), *self.arrays, new.arrays)
        return new

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The three as NumPy arrays that share their memory."""
        return self.crow.numpy(), self.col.numpy(), self.values.numpy()


def column_blocks(matrix: Tensor) -> list[slice]:
    """How to cut a matrix whose rows are gathered at random, on a CPU in blocks of columns.

    Such a gather is bound by where the matrix lies: a block of 64 columns of up to 8,192 rows fits in a
    core's second-level cache, the whole matrix does not. On one core of a Xeon, 131,072 rows of a
    (4096, 512) matrix are summed three times as fast.
    """
    rows, width = matrix.shape
    size = width if matrix.is_cuda or rows > _CACHED_ROWS else _CACHED_COLUMNS
    return [slice(first, min(first + size, width)) for first in range(0, width, size)]


def add_sampled(values: Tensor, crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the entries of `left @ right.T` at the places of a CSR pattern to `values`, on a CPU by tiles of `right` in cache."""
    if values.is_cuda:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            size = (len(left), len(right))
            pattern = torch.sparse_csr_tensor(crow.int(), col, torch.zeros_like(values), size, check_invariants=False)
        values += torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
        return
    starts, latents, one, other = (tensor.numpy() for tensor in (crow, col, left, right))
    tile = max(1, _CACHED_BYTES // (4 * right.shape[1]))
    _in_threads(
        crow, lambda first, last: kernels.add_sampled(first, last, starts, latents, one, other, tile, values.numpy())
    )


def _in_threads(starts: Tensor, work: Callable[[int, int], None]) -> None:
    """Call `work` for ranges of a pattern's rows, one a thread, with about as many entries each."""
    count, rows = torch.get_num_threads(), len(starts) - 1
    if count == 1:
        work(0, rows)
        return
    shares = torch.arange(1, count) * int(starts[-1]) // count
    ends = [0, *torch.searchsorted(starts, shares).clamp(max=rows).tolist(), rows]
    list(_threads(count).map(work, ends[:-1], ends[1:]))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="sae-entries")


def decode(offsets: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """For each row of a CSR pattern, the rows of `table` that it names, summed with `values` as weights.

    `offsets` are the rows' starts, int32 like `col`.
    """
    # as torch.nn.functional.embedding_bag calls it, which spends as long on its arguments as on a small block
    summed: Tensor = torch.embedding_bag(table, col, offsets, False, 0, False, values)[0]
    return summed


def by_latent(crow: Tensor, col: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of a CSR pattern: start of each latent among its entries, their rows, and their places in the pattern."""
    if col.is_cuda:
        starts = torch.zeros(d_sae + 1, dtype=torch.long, device=col.device)
        torch.cumsum(torch.bincount(col, minlength=d_sae), 0, out=starts[1:])
        order = torch.sort(col, stable=True)[1]
        row = torch.repeat_interleave(torch.arange(len(crow) - 1, device=col.device), crow.diff())
        return starts, row.index_select(0, order).int(), order.int()
    starts = torch.empty(d_sae + 1, dtype=torch.long)
    row, order = torch.empty_like(col), torch.empty_like(col)
    kernels.transposed(*(tensor.numpy() for tensor in (crow, col, starts, row, order)))
    return starts, row, order


def slopes_and_gradient(
    starts: Tensor, row: Tensor, codes: Tensor, part: Tensor, table: Tensor, slopes: Tensor, out: Tensor
) -> None:
    """What a block of columns of the error, `part`, says of the decoder's same columns, `table`, and of the codes.

    Entries are sorted by latent, as `by_latent` gives them, and so are `codes` and `slopes`. Dot products of the rows of
    `part` and `table` are added to `slopes`; sums of rows of `part`, weighted with `codes`, are written to `out`, (d_sae, columns).
    """
    if part.is_cuda:
        add_sampled(slopes, starts, row, table, part)
        out.copy_(decode(starts[:-1].int(), row, codes, part))
        return
    pattern = [tensor.numpy() for tensor in (starts, row, codes)]
    for start in range(0, part.shape[1], kernels.LANES):  # more than one where `column_blocks` cuts nothing
        here = slice(start, start + kernels.LANES)
        block = [part[:, here].contiguous(), table[:, here].contiguous(), slopes, out[:, here]]

        def work(first: int, last: int, block: list[Tensor] = block) -> None:
            kernels.by_latent(first, last, *pattern, *(tensor.numpy() for tensor in block))

        _in_threads(starts, work)


class Scratch:
    """Memory that is used again by every batch: fresh pages cost as much as what is written to them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, which the next call of the same name may overwrite."""
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != device:
            held = self._held[name] = torch.empty(shape, dtype=dtype, device=device)
        return held


Pattern = tuple[Tensor, Tensor]
"""`crow` and `col` of entries whose values are still to be computed."""


def above(pre: Tensor, limits: Tensor) -> Pattern:
    """The entries above the limit of their latent, (d_sae,), which is not negative."""
    limits = limits.to(pre.dtype)
    if pre.is_cuda:
        return _pattern(pre > limits)
    # not negative floats sort like their bits, and negative ones have the sign bit set
    ordered, cut = (_bits(pre), _bits(limits)) if pre.dtype == torch.bfloat16 else (pre.numpy(), limits.numpy())
    return _above(((part, np.zeros(len(part), cut.dtype)) for part in _slices(ordered)), cut)


def largest_of_rows(pre: Tensor, count: int) -> Pattern:
    """At least the `count` largest entries of each row, of those above 0."""
    d_sae = pre.shape[1]
    if pre.is_cuda:
        cut = pre.topk(count, dim=1).values[:, -1:]
        return _pattern((pre >= cut) & (pre > 0))
    # among negative bfloat16 values the order of the bits is reversed, but those are left out anyway
    ordered = _bits(pre) if pre.dtype == torch.bfloat16 else pre.numpy()
    place = d_sae - count

    def limit(part: NDArray[Any]) -> NDArray[Any]:
        cut = np.partition(part, place, axis=1)[:, place]
        if cut.dtype == np.int16:  # those above what is just below the cut are those at it
            return np.asarray(np.maximum(cut, 1) - 1)
        return np.asarray(np.maximum(np.nextafter(cut, np.float32(-1)), 0))

    return _above(((part, limit(part)) for part in _slices(ordered)), np.zeros(d_sae, ordered.dtype))


def _bits(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.view(torch.int16).numpy())


def _slices(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Of so many rows that what is made of them stays in the cache."""
    return (array[start : start + _MARKED_ROWS] for start in range(0, len(array), _MARKED_ROWS))


def _pattern(mask: Tensor) -> Pattern:
    row, col = mask.nonzero(as_tuple=True)
    return torch.searchsorted(row, torch.arange(len(mask) + 1, device=row.device)), col.int()


def _above(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], of_columns: NDArray[Any]) -> Pattern:
    """The entries of successive rows above the limits of their row, given with them, and of their column."""
    crow, col, total = [], [], 0
    found = np.empty(_MARKED_ROWS * len(of_columns), np.int32)
    for part, of_rows in parts:
        starts = np.empty(len(part), np.int64)
        stop = kernels.above(part, of_rows, of_columns, total, starts, found)
        crow.append(starts)
        col.append(found[: stop - total].copy())
        total = stop
    return torch.from_numpy(np.concatenate([*crow, [total]])), torch.from_numpy(np.concatenate(col))


def trim_rows(active: Active, k: int) -> Active:
    """The `k` largest entries of each row; of equal ones at the cut those of the first latents."""
    counts = active.crow.diff()
    width = int(counts.max()) if len(counts) else 0
    if width <= k:
        return active
    row = active.row
    padded = torch.full((len(counts), width), -torch.inf, device=row.device)
    padded[row, torch.arange(len(row), device=row.device) - active.crow[row]] = active.values
    cut = padded.topk(k, dim=1).values[:, -1][row]
    return _trim(active, cut, torch.full_like(counts, k), row, active.crow[:-1])


def trim_batch(active: Active, wanted: int) -> tuple[Active, float]:
    """The `wanted` largest entries, and the smallest of them; of equal ones at the cut the first."""
    surplus = len(active.values) - wanted
    if surplus <= 0:
        return active, float(active.values.min()) if len(active.values) else 0.0
    cut = smallest(active.values, surplus + 1)
    zeros = torch.zeros(1, dtype=torch.long, device=cut.device)
    limit = torch.full_like(zeros, wanted)
    return _trim(active, cut, limit, None, zeros), float(cut)


def smallest(values: Tensor, number: int) -> Tensor:
    """The value at a place, counted from 1, in ascending order: a scalar."""
    if values.is_cuda:
        found: Tensor = values.kthvalue(number).values
        return found
    return torch.tensor(np.partition(values.numpy(), number - 1)[number - 1])  # several times as fast


def _trim(active: Active, cut: Tensor, limit: Tensor, segment: Tensor | None, starts: Tensor) -> Active:
    """Entries above `cut`, and of those equal to it the first of each segment until `limit` is reached."""
    keep = active.values >= cut
    if int(keep.sum()) <= int(limit.sum()) and segment is None:
        return active.keep(keep)
    of = torch.zeros_like(active.col, dtype=torch.long) if segment is None else segment
    ties = active.values == cut
    greater = keep & ~ties
    room = limit - torch.bincount(of[greater], minlength=len(limit))
    before = torch.zeros(len(ties) + 1, dtype=torch.long, device=ties.device)
    torch.cumsum(ties, 0, out=before[1:])
    rank = before[:-1] - before[starts][of]
    return active.keep(greater | (ties & (rank < room[of])))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
