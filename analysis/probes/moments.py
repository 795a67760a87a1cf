"""The first pass of every probe: sums by class, and a Gram matrix, a sketch of one, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import Pass, run_passes
from millpond.analysis.probes.targets import Design, Layout
from millpond.store.errors import InvalidInput

Vector = NDArray[np.float64]
Gram = Literal["none", "sample", "exact"]

GRAM_ROWS = 32_768
"""A sampled Gram matrix is taken from about this many rows (or 8 a dimension), evenly spread."""
EXACT_SIZE = 1 << 25
"""Rows times width up to which float32 rows are computed in float64: it costs little and matters most."""
FULL_RANK = 2048
"""Above this width a sampled Gram matrix is a sketch of rank `SKETCH_RANK`."""
SKETCH_RANK = 512
_SLICE_BYTES = 2 << 20
"""Rows are worked on in slices of about this size, which stay in a core's cache."""
_MIN_ROWS = 128
_SHIFT_RATIO = 8.0
"""Rows are shifted by their mean if in some dimension it exceeds this many standard deviations."""


def first_looks(designs: Sequence[Design], fit_intercept: bool) -> list[dict[str, Any]]:
    """For each design the state that its passes share: `shift`, whether to compute in float64, and the layout."""
    looks = [Pass(design.targets.align(design.X).head(4096), _look) for design in designs]
    states = []
    for design, (mean, deviation) in zip(designs, run_passes(looks, progress=False), strict=True):
        far = bool((np.abs(mean) > _SHIFT_RATIO * deviation).any())
        size = int(design.X.shape[0]) * len(mean)
        exact = size <= EXACT_SIZE
        shift = mean if fit_intercept and (far or exact) else np.zeros_like(mean)
        states.append({"shift": shift, "exact": exact, "layout": design.targets.layout})
    return states


def take_moments(
    designs: Sequence[Design], states: Sequence[dict[str, Any]], gram: Gram, *, progress: bool
) -> list[dict[str, Any]]:
    """One shared pass over all designs; see `moments` for what each returns.

    Raises:
        InvalidInput: a row holds NaN or an infinity.
    """
    todo = []
    for design, state in zip(designs, states, strict=True):
        width, n = len(state["shift"]), int(design.X.shape[0])
        more: dict[str, Any] = {"gram": gram, "stride": 1}
        if gram == "sample":
            more["stride"] = max(1, n // max(8 * width, GRAM_ROWS))
            if width > FULL_RANK:
                more["probe"] = np.random.default_rng(0).standard_normal((width, SKETCH_RANK))
        todo.append(Pass(design.targets.align(design.X), moments, state | more))
    found = run_passes(todo, description="probe statistics", progress=progress)
    for design, sums in zip(designs, found, strict=True):
        if sums["bad"]:
            raise InvalidInput(
                f"{design.name}: {sums['bad']:,} of {int(sums['rows'].sum()):,} rows hold NaN or infinity; "
                "leave those rows out"
            )
    return found


def moments(state: dict[str, Any], x: NDArray[Any], *blocks: NDArray[Any]) -> dict[str, Any]:
    """Weighted sums over a block, by fold (F) and by column of `Layout.indicators` (1 + M).

    `sums` (F, d, 1 + M) of x times indicators, `totals` and `squares` (F, 1 + M) of the indicators,
    `variance` (d,) of x squared, `rows` (F,); and of every `stride`-th row `gram_n`, `gram_sum` (d,) and
    `gram` (d, d), or for a sketch (d, rank). An exact `gram` is (variants, F, d, d), one variant for each
    label that has class weights.
    """
    layout: Layout = state["layout"]
    columns, weights, folds = layout.unpack(blocks)
    d, n_folds, m = x.shape[1], layout.n_folds, int(layout.starts[-1])
    mode, stride = state["gram"], state["stride"]
    out: dict[str, Any] = {
        "bad": 0, "rows": np.zeros(n_folds, np.int64), "sums": np.zeros((n_folds, d, m)),
        "totals": np.zeros((n_folds, m)), "squares": np.zeros((n_folds, m)), "variance": np.zeros(d),
    }  # fmt: skip
    out |= _empty_gram(state, d)
    for where in slices(x, wide=True, least=stride):
        part = shifted(x[where], state)
        total = part.sum(axis=0)
        if not np.isfinite(total).all():
            out["bad"] += int((~np.isfinite(part).all(axis=1)).sum())
            out["rows"][0] += len(part)
            continue
        target = layout.indicators(columns[where], part.dtype)
        heavy = target if weights is None else target * weights[where, None].astype(part.dtype)
        for fold in range(n_folds):
            kept = heavy if folds is None else heavy * (folds[where] == fold)[:, None].astype(part.dtype)
            out["rows"][fold] += len(part) if folds is None else int((folds[where] == fold).sum())
            out["sums"][fold] += part.T @ kept
            out["totals"][fold] += kept.sum(axis=0, dtype=np.float64)
            out["squares"][fold] += np.einsum("ij,ij->j", kept, target, dtype=np.float64)
        scale = None if weights is None else weights[where]
        out["variance"] += (
            np.einsum("ij,ij->j", part, part) if scale is None
            else np.einsum("ij,ij,i->j", part, part, scale.astype(part.dtype))
        )  # fmt: skip
        if mode == "sample":
            _add_sample(out, part[::stride], None if scale is None else scale[::stride], state.get("probe"))
        elif mode == "exact":
            _add_exact(out["gram"], part, scale, None if folds is None else folds[where], columns[where], layout)
    return out


def slices(x: NDArray[Any], *, wide: bool = False, least: int = 1) -> list[slice]:
    """Cuts a block into slices that stay in cache, larger ones for products of matrices."""
    row_bytes = 4 * max(1, x.shape[1])
    rows = max(_MIN_ROWS, (8 if wide else 1) * _SLICE_BYTES // row_bytes)
    rows = -(-rows // least) * least
    return [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)]


def shifted(x: NDArray[Any], state: dict[str, Any]) -> NDArray[Any]:
    """`x - shift`, in float64 if that is asked for or `x` is so wide."""
    narrow = x.dtype in (np.float32, np.float16) and not state["exact"]
    dtype = np.float32 if narrow else np.float64
    shift = state["shift"]
    if x.dtype == dtype and not shift.any():
        return x
    return np.asarray(np.subtract(x, shift.astype(dtype), dtype=dtype))


def _look(state: None, x: NDArray[Any], *_: NDArray[Any]) -> tuple[Vector, Vector]:
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return np.where(np.isfinite(mean), mean, 0.0), np.where(np.isfinite(deviation), deviation, 0.0)


def _empty_gram(state: dict[str, Any], d: int) -> dict[str, Any]:
    if state["gram"] == "none":
        return {}
    if state["gram"] == "exact":
        layout: Layout = state["layout"]
        return {"gram": np.zeros((len(variants(layout)), layout.n_folds, d, d))}
    width = state["probe"].shape[1] if "probe" in state else d
    return {"gram": np.zeros((d, width)), "gram_sum": np.zeros(d), "gram_n": 0.0}


def variants(layout: Layout) -> list[int]:
    """The labels that need an exact Gram matrix of their own; -1 is the one of all labels without class weights."""
    own = [label for label, given in enumerate(layout.class_weights) if given is not None]
    return own if len(own) == len(layout.n_classes) else [-1, *own]


def _add_sample(out: dict[str, Any], part: NDArray[Any], scale: Vector | None, probe: Vector | None) -> None:
    out["gram_n"] += float(len(part)) if scale is None else float(scale.sum())
    heavy = part if scale is None else part * np.sqrt(scale)[:, None].astype(part.dtype)
    out["gram_sum"] += part.sum(axis=0, dtype=np.float64) if scale is None else part.T @ scale.astype(part.dtype)
    out["gram"] += heavy.T @ (heavy if probe is None else heavy @ probe.astype(part.dtype))


def _add_exact(
    gram: Vector,
    part: NDArray[Any],
    scale: Vector | None,
    folds: NDArray[np.uint8] | None,
    columns: NDArray[Any],
    layout: Layout,
) -> None:
    for variant, label in enumerate(variants(layout)):
        row = np.ones(len(part)) if scale is None else scale
        if label >= 0:
            row = row * layout.weight_of(label)[columns[:, label]]
        plain = scale is None and label < 0
        heavy = part if plain else part * np.sqrt(row)[:, None].astype(part.dtype)
        for fold in range(layout.n_folds):
            some = heavy if folds is None else heavy[folds == fold]
            gram[variant, fold] += some.T @ some
