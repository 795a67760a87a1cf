"""The few entries of a (rows, d_sae) matrix that are not 0, and the products that need nothing else.

Selection compares the wide product of the encoder, in bfloat16 if the machine multiplies it in hardware;
the survivors' values are computed again in float32, so ties of bfloat16 decide nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor


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
        before = torch.zeros(len(mask) + 1, dtype=torch.long, device=mask.device)
        torch.cumsum(mask, 0, out=before[1:])
        return Active(before[self.crow], self.col[mask], self.values[mask])


def sampled(crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The entries of `left @ right.T` at the places of a CSR pattern."""
    size = (len(left), len(right))
    zeros = torch.zeros(len(col), device=left.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(crow, col, zeros, size, check_invariants=False)
    values: Tensor = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
    return values


def decode(crow: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """For each row of a CSR pattern, the rows of `table` that it names, summed with `values` as weights."""
    return nn.embedding_bag(col, table, crow[:-1], per_sample_weights=values, mode="sum")


def entries(flat: Tensor, centred: Tensor, w_enc: Tensor, b_enc: Tensor) -> Active:
    """The entries with these ascending flat indices, their pre-activations computed in float32."""
    n, d_sae = len(centred), len(w_enc)
    row = torch.div(flat, d_sae, rounding_mode="floor")
    col = flat - row * d_sae
    crow = torch.zeros(n + 1, dtype=torch.long, device=flat.device)
    crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
    values = sampled(crow, col, centred, w_enc)
    values += b_enc[col]
    return Active(crow, col, values)


def above(pre: Tensor, floor: float) -> Tensor:
    """Flat indices of the entries above `floor`, which is not negative, ascending."""
    if pre.is_cuda:
        return (pre.view(-1) > floor).nonzero().view(-1)
    if pre.dtype == torch.bfloat16:
        # not negative floats sort like their bits, and negative ones have the sign bit set; NumPy finds them
        # four times faster than Tensor.nonzero
        bits = int(torch.tensor(floor).bfloat16().view(torch.int16))
        return torch.from_numpy(np.flatnonzero(pre.view(torch.int16).numpy().reshape(-1) > bits))
    return torch.from_numpy(np.flatnonzero(pre.numpy().reshape(-1) > np.float32(floor)))


def largest_of_rows(pre: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of at least the `count` largest entries of each row, of those above 0."""
    d_sae = pre.shape[1]
    if pre.is_cuda:
        cut = pre.topk(count, dim=1).values[:, -1:]
        return ((pre >= cut) & (pre > 0)).view(-1).nonzero().view(-1)
    array = pre.view(torch.int16).numpy() if pre.dtype == torch.bfloat16 else pre.numpy()
    # among negative bfloat16 values the order of the bits is reversed, but those are left out anyway
    lowest = np.partition(array, d_sae - count, axis=1)[:, d_sae - count, None]
    smallest = array.dtype.type(1) if array.dtype == np.int16 else np.nextafter(np.float32(0), np.float32(1))
    return torch.from_numpy(np.flatnonzero(array >= np.maximum(lowest, smallest)))


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
    cut = active.values.kthvalue(surplus + 1).values
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


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
