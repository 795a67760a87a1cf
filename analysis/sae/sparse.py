"""The few entries of a (rows, d_sae) matrix that are not 0, and the products that need nothing else.

Selection compares the wide product of the encoder, in bfloat16 if the machine multiplies it in hardware;
the survivors' values are computed again in float32, so ties of bfloat16 decide nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nn
from numpy.typing import NDArray
from torch import Tensor

_CACHED_ROWS, _CACHED_COLUMNS = 8192, 64


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
        places = marked(mask)
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


def entries(flat: Tensor, centred: Columns, w_enc: Columns, b_enc: Tensor) -> Active:
    """The entries with these ascending flat indices, their pre-activations computed in float32."""
    d_sae = len(w_enc)
    starts = torch.arange(len(centred) + 1, device=flat.device) * d_sae
    crow = torch.searchsorted(flat, starts)
    col = flat - torch.repeat_interleave(starts[:-1], crow.diff())
    values = sampled(crow, col, centred, w_enc)
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


def above(pre: Tensor, limits: Tensor, scratch: Scratch) -> Tensor:
    """Flat indices, ascending, of the entries above the limit of their latent, (d_sae,), which is not negative."""
    limits = limits.to(pre.dtype)
    if pre.is_cuda:
        return marked(pre > limits)
    if pre.dtype == torch.bfloat16:  # not negative floats sort like their bits, and negative ones have the sign bit set
        pre, limits = pre.view(torch.int16), limits.view(torch.int16)
    mask = scratch.like("mask", tuple(pre.shape), torch.bool, pre.device)
    np.greater(pre.numpy(), limits.numpy(), out=mask.numpy())
    return marked(mask)


def marked(mask: Tensor) -> Tensor:
    """Flat indices of the marked places; on a CPU by bytes of eight, eight times as fast as Tensor.nonzero if they are few."""
    if mask.is_cuda:
        return mask.view(-1).nonzero().view(-1)
    packed = np.packbits(mask.numpy().reshape(-1))
    some = np.flatnonzero(packed.view(np.bool_))  # NumPy skips what is 0 in the bytes of truth values only
    found = np.flatnonzero(np.unpackbits(packed[some]).view(np.bool_))
    return torch.from_numpy((some[found >> 3] << 3) + (found & 7))


def largest_of_rows(pre: Tensor, count: int, scratch: Scratch) -> Tensor:
    """Flat indices, ascending, of at least the `count` largest entries of each row, of those above 0."""
    d_sae = pre.shape[1]
    if pre.is_cuda:
        cut = pre.topk(count, dim=1).values[:, -1:]
        return marked((pre >= cut) & (pre > 0))
    array = pre.view(torch.int16).numpy() if pre.dtype == torch.bfloat16 else pre.numpy()
    # among negative bfloat16 values the order of the bits is reversed, but those are left out anyway
    lowest = np.partition(array, d_sae - count, axis=1)[:, d_sae - count, None]
    smallest = array.dtype.type(1) if array.dtype == np.int16 else np.nextafter(np.float32(0), np.float32(1))
    mask = scratch.like("mask", tuple(pre.shape), torch.bool, pre.device)
    np.greater_equal(array, np.maximum(lowest, smallest), out=mask.numpy())
    return marked(mask)


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


def order_by_latent(col: Tensor, d_sae: int) -> Tensor:
    """Places of the entries in ascending order of their latents, those of a latent as they lie."""
    if not col.is_cuda and d_sae <= 1 << 16:
        return torch.from_numpy(np.argsort(col.numpy().astype(np.uint16), kind="stable"))  # a radix sort
    return torch.sort(col.to(torch.int32), stable=True)[1]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
