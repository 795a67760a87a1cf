"""The few entries of a (rows, d_sae) matrix that are not 0, and the products that need nothing else.

Selection compares the wide product of the encoder, in bfloat16 if the machine multiplies it in hardware;
the survivors' values are computed again in float32, so ties of bfloat16 decide nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nn
from numpy.typing import NDArray
from torch import Tensor

_CACHED_ROWS, _CACHED_COLUMNS, _CACHED_BYTES = 8192, 64, 1 << 20
_MARKED_ROWS = 128


@dataclass(frozen=True)
class Active:
    """Entries of a (rows, d_sae) matrix, row by row and by latent within a row (CSR)."""

    crow: Tensor
    """Start of each row among the entries, (rows + 1,)."""
    col: Tensor
    """Latent of each entry."""
    values: Tensor
    """Its pre-activation, float32."""

    @property
    def row(self) -> Tensor:
        """Row of each entry."""
        return torch.repeat_interleave(torch.arange(len(self.crow) - 1, device=self.col.device), self.crow.diff())

    def keep(self, mask: Tensor) -> Active:
        """The entries that `mask` marks."""
        places = mask.nonzero().view(-1) if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
        crow = torch.searchsorted(places, self.crow)
        return Active(crow, self.col.index_select(0, places), self.values.index_select(0, places))


class Columns:
    """A matrix whose rows are gathered at random, on a CPU in blocks of columns.

    Such a gather is bound by where the matrix lies: a block of 64 columns of up to 8,192 rows fits in a
    core's second-level cache, the whole matrix does not. On one core of a Xeon, 131,072 rows of a
    (4096, 512) matrix are summed three times as fast.
    """

    def __init__(self, whole: Tensor) -> None:
        self._whole: Tensor | None = whole
        self.parts = [whole]
        if not whole.is_cuda and len(whole) <= _CACHED_ROWS and whole.shape[1] > _CACHED_COLUMNS:
            self.parts = [part.contiguous() for part in torch.split(whole, _CACHED_COLUMNS, dim=1)]

    @classmethod
    def of(cls, parts: list[Tensor]) -> Columns:
        """The matrix with these blocks of columns."""
        made = cls.__new__(cls)
        made.parts, made._whole = parts, parts[0] if len(parts) == 1 else None
        return made

    @property
    def whole(self) -> Tensor:
        """The matrix."""
        if self._whole is None:
            self._whole = torch.cat(self.parts, dim=1)
        return self._whole

    def __len__(self) -> int:
        return len(self.parts[0])


def sampled(crow: Tensor, col: Tensor, left: Columns, right: Columns) -> Tensor:
    """The entries of `left @ right.T` at the places of a CSR pattern."""
    zeros = torch.zeros(len(col), device=col.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # 32-bit indices: MKL would convert others in each product
        pattern = torch.sparse_csr_tensor(crow.int(), col.int(), zeros, (len(left), len(right)), check_invariants=False)
    blocked = len(left.parts) == len(right.parts)
    pairs = zip(left.parts, right.parts, strict=True) if blocked else [(left.whole, right.whole)]
    total: Tensor | None = None
    for one, other in pairs:
        values: Tensor = torch.sparse.sampled_addmm(pattern, one, other.T, beta=0.0).values()
        total = values if total is None else total.add_(values)
    assert total is not None
    return total


def decode(crow: Tensor, col: Tensor, values: Tensor, table: Columns) -> Columns:
    """For each row of a CSR pattern, the rows of `table` that it names, summed with `values` as weights."""
    return Columns.of(
        [nn.embedding_bag(col, part, crow[:-1], per_sample_weights=values, mode="sum") for part in table.parts]
    )


def products(row: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The entries of `left @ right.T` at these places, by tiles of `right` that stay in a core's cache.

    They are the gradients that an embedding bag has by the weights of its samples.
    """
    size = len(right) if right.is_cuda else max(1, _CACHED_BYTES // (4 * right.shape[1]), -(-len(right) // 256))
    tile = torch.div(col, size, rounding_mode="floor")
    order = order_by(tile, -(-len(right) // size))
    row, col, counts = row.index_select(0, order), col.index_select(0, order), torch.bincount(tile)
    found, first = torch.empty(len(col), device=col.device), 0
    for number, count in enumerate(counts.tolist()):
        here = slice(first, first + count)
        first, start = here.stop, number * size
        if count:
            found[here] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                left, right[start : start + size], col[here] - start, col[:0], row[here], 0
            )
    values = torch.empty_like(found)
    values[order] = found
    return values


def entries(flat: Tensor, centred: Tensor, w_enc: Tensor, b_enc: Tensor) -> Active:
    """The entries with these ascending flat indices, their pre-activations computed in float32."""
    d_sae = len(w_enc)
    starts = torch.arange(len(centred) + 1, device=flat.device) * d_sae
    crow = torch.searchsorted(flat, starts)
    row = torch.repeat_interleave(torch.arange(len(centred), device=flat.device), crow.diff())
    col = flat - row * d_sae
    values = products(row, col, centred, w_enc)
    values += b_enc.index_select(0, col)
    return Active(crow, col, values)


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


def above(pre: Tensor, limits: Tensor) -> Tensor:
    """Flat indices, ascending, of the entries above the limit of their latent, (d_sae,), which is not negative."""
    limits = limits.to(pre.dtype)
    if pre.is_cuda:
        return (pre > limits).view(-1).nonzero().view(-1)
    # not negative floats sort like their bits, and negative ones have the sign bit set
    ordered, cut = (_bits(pre), _bits(limits)) if pre.dtype == torch.bfloat16 else (pre.numpy(), limits.numpy())
    return _marked(part > cut for part in _slices(ordered))


def largest_of_rows(pre: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of at least the `count` largest entries of each row, of those above 0."""
    d_sae = pre.shape[1]
    if pre.is_cuda:
        cut = pre.topk(count, dim=1).values[:, -1:]
        return ((pre >= cut) & (pre > 0)).view(-1).nonzero().view(-1)
    # among negative bfloat16 values the order of the bits is reversed, but those are left out anyway
    ordered = _bits(pre) if pre.dtype == torch.bfloat16 else pre.numpy()
    smallest = ordered.dtype.type(1) if ordered.dtype == np.int16 else np.nextafter(np.float32(0), np.float32(1))
    place = d_sae - count
    return _marked(
        part >= np.maximum(np.partition(part, place, axis=1)[:, place, None], smallest) for part in _slices(ordered)
    )


def _bits(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.view(torch.int16).numpy())


def _slices(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Of so many rows that what is made of them stays in the cache, and their entries fill whole bytes of bits."""
    return (array[start : start + _MARKED_ROWS] for start in range(0, len(array), _MARKED_ROWS))


def _marked(masks: Iterable[NDArray[np.bool_]]) -> Tensor:
    """Flat indices of the marked places of masks that follow each other; eight times as fast as Tensor.nonzero for a few."""
    packed = np.concatenate([np.packbits(mask.reshape(-1)) for mask in masks])
    some = np.flatnonzero(packed.view(np.bool_))  # NumPy skips zeros in the bytes of truth values only
    found = np.flatnonzero(np.unpackbits(packed[some]).view(np.bool_))
    return torch.from_numpy((some[found >> 3] << 3) + (found & 7))


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
    if active.values.is_cuda:
        cut = active.values.kthvalue(surplus + 1).values
    else:  # ten times as fast
        cut = torch.tensor(np.partition(active.values.numpy(), surplus)[surplus])
    zeros = torch.zeros(1, dtype=torch.long, device=cut.device)
    limit = torch.full_like(zeros, wanted)
    return _trim(active, cut, limit, None, zeros), float(cut)


def _trim(active: Active, cut: Tensor, limit: Tensor, segment: Tensor | None, starts: Tensor) -> Active:
    """Entries above `cut`, and of those equal to it the first of each segment until `limit` is reached."""
    keep = active.values >= cut
    if int(keep.sum()) <= int(limit.sum()) and segment is None:
        return active.keep(keep)
    of = torch.zeros_like(active.col) if segment is None else segment
    ties = active.values == cut
    greater = keep & ~ties
    room = limit - torch.bincount(of[greater], minlength=len(limit))
    before = torch.zeros(len(ties) + 1, dtype=torch.long, device=ties.device)
    torch.cumsum(ties, 0, out=before[1:])
    rank = before[:-1] - before[starts][of]
    return active.keep(greater | (ties & (rank < room[of])))


def order_by(keys: Tensor, n_keys: int) -> Tensor:
    """Places of the keys, which are below `n_keys`, in ascending order; of equal ones as they lie."""
    if not keys.is_cuda and n_keys <= 1 << 16:  # a radix sort
        return torch.from_numpy(
            np.argsort(keys.numpy().astype(np.uint8 if n_keys <= 1 << 8 else np.uint16), kind="stable")
        )
    return torch.sort(keys.to(torch.int32), stable=True)[1]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
