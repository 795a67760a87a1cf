"""What a pass computes of logistic losses at given weights: sums over the rows of one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.probes.moments import gram_rows, parts
from millpond.analysis.probes.targets import Layout, Problem
from millpond.analysis.tiles import Rows

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Which score columns belong to which problem: binary ones first, one each, then one a class."""

    layout: Layout
    binary: tuple[Problem, ...]
    multinomial: tuple[Problem, ...]

    def row_weights(
        self, problems: tuple[Problem, ...], codes: NDArray[Any], weights: Vector | None, folds: Any, dtype: Any
    ) -> NDArray[Any] | None:
        """Weight of each row in each problem, (rows, problems); None if all are 1."""
        out = None if weights is None else np.repeat(weights[:, None].astype(dtype), len(problems), axis=1)
        if any(self.layout.class_weights[problem.label] is not None for problem in problems):
            out = np.ones((len(codes), len(problems)), dtype) if out is None else out
            for i, problem in enumerate(problems):
                out[:, i] *= self.layout.weight_of(problem.label).astype(dtype)[codes[:, problem.label]]
        left_out = np.array([problem.fold for problem in problems])
        if folds is not None and (left_out >= 0).any():
            kept = (folds[:, None].astype(np.int64) != left_out).astype(dtype)
            out = kept if out is None else out * kept
        return out


def gradients(state: dict[str, Any], x: Rows, *blocks: NDArray[Any]) -> dict[str, Any]:
    """Loss of each problem; gradient by weights (d, P) and intercepts (P,), and second derivative by scores."""
    where_of: Columns = state["columns"]
    weights_DP, intercepts = state["weights"], state["intercepts"]
    codes, sample, folds = where_of.layout.unpack(blocks)
    n_binary, multinomial = len(where_of.binary), where_of.multinomial
    labels, every = np.array([problem.label for problem in where_of.binary], np.int64), np.arange(n_binary)
    sums: dict[str, Any] = {
        "gradient": np.zeros(weights_DP.T.shape), "residual": np.zeros(weights_DP.shape[1]),
        "loss": np.zeros(n_binary), "curvature": np.zeros(n_binary),
        "multinomial": tuple(_nothing(where_of.layout.n_classes[p.label]) for p in multinomial),
    }  # fmt: skip
    low = None
    for where, part in parts(x, state, weights_DP.shape[1]):
        if low is None:
            low = weights_DP.astype(part.dtype), intercepts.astype(part.dtype)
        z = part @ low[0]
        z += low[1]
        extra = (None if sample is None else sample[where], None if folds is None else folds[where], part.dtype)
        if n_binary:
            rows = where_of.row_weights(where_of.binary, codes[where], *extra)
            some = codes[where] if n_binary == codes.shape[1] and (labels == every).all() else codes[where][:, labels]
            _binary(z[:, :n_binary], some.astype(part.dtype), rows, sums)
        start = n_binary
        for number, problem in enumerate(multinomial):
            k = where_of.layout.n_classes[problem.label]
            rows = where_of.row_weights((problem,), codes[where], *extra)
            _multinomial(z[:, start : start + k], codes[where, problem.label], rows, sums["multinomial"][number])
            start += k
        sums["residual"] += np.ones(len(z), z.dtype) @ z
        sums["gradient"] += z.T @ part
    sums["gradient"] = sums["gradient"].T
    return sums


def hessians(state: dict[str, Any], x: Rows, *blocks: NDArray[Any]) -> tuple[Vector, Vector, Vector]:
    """For each binary problem: sums of q x x', q x and q over a sample of the rows, where q = weight p (1 - p)."""
    where_of: Columns = state["columns"]
    stride, mean = state["stride"], state["mean"]
    weights_DP, intercepts = state["weights"], state["intercepts"]
    centered = state | {"shift": state["shift"] + mean}
    codes, sample, folds = where_of.layout.unpack(blocks)
    d, count = weights_DP.shape
    outer, first, total = np.zeros((count, d, d)), np.zeros((count, d)), np.zeros(count)
    x, codes = x[::stride], codes[::stride]
    sample = None if sample is None else sample[::stride]
    folds = None if folds is None else folds[::stride]
    for some, part in parts(x, centered, size=gram_rows(d)):
        z = part @ weights_DP.astype(part.dtype)
        z += (intercepts + mean @ weights_DP).astype(part.dtype)
        small = np.exp(-np.abs(z))
        q = small / (1 + small) ** 2
        rows = where_of.row_weights(
            where_of.binary, codes[some], None if sample is None else sample[some],
            None if folds is None else folds[some], part.dtype,
        )  # fmt: skip
        q = q if rows is None else q * rows
        for i in range(count):
            outer[i] += part.T @ (part * q[:, i, None])
        first += (q.T @ part).astype(np.float64)
        total += q.sum(axis=0, dtype=np.float64)
    return outer, first, total


def _binary(z: NDArray[Any], target: NDArray[Any], rows: NDArray[Any] | None, sums: dict[str, Any]) -> None:
    """Adds losses and curvatures, and turns `z` into weighted residuals."""
    ones = np.ones(len(z), z.dtype)
    small = np.abs(z)
    np.negative(small, out=small)
    np.exp(small, out=small)
    part = small + 1
    loss = np.log1p(small) if z.dtype == np.float64 else np.log(part)
    np.reciprocal(part, out=part)
    positive = z >= 0
    loss += np.maximum(z, 0)
    loss -= z * target
    small *= part  # the smaller of p and 1 - p; `part` is the larger
    np.copyto(z, small)
    np.copyto(z, part, where=positive)
    small *= part
    z -= target
    if rows is not None:
        loss *= rows
        small *= rows
        z *= rows
    sums["loss"] += ones @ loss
    sums["curvature"] += ones @ small


def _nothing(k: int) -> dict[str, Any]:
    return {"loss": np.zeros(1), "curvature": np.zeros((k, k))}


def _multinomial(z: NDArray[Any], code: NDArray[Any], rows: NDArray[Any] | None, sums: dict[str, Any]) -> None:
    """Adds loss and curvature of one softmax, and turns `z` into weighted residuals."""
    numbers = np.arange(len(z))
    z -= z.max(axis=1, keepdims=True)
    chosen = z[numbers, code]
    np.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    loss = np.log(total[:, 0]) - chosen
    z /= total
    heavy = z if rows is None else z * rows
    sums["loss"] += (loss if rows is None else loss * rows[:, 0]).sum(dtype=np.float64)
    sums["curvature"] += np.diag(heavy.sum(axis=0, dtype=np.float64)) - z.T @ heavy
    z[numbers, code] -= 1
    if rows is not None:
        z *= rows
