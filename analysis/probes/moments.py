"""The first pass of every probe: sums by class, and a Gram matrix of all rows, of a sample, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.gram import UpperGram, gram_bytes
from millpond.analysis.passes import Pass, run_passes
from millpond.analysis.probes.targets import Design, Layout
from millpond.analysis.tiles import Rows, decoded, tile_rows, tiles
from millpond.store.errors import InvalidInput

Vector = NDArray[np.float64]
Gram = Literal["none", "sample", "exact"]

GRAM_ROWS = 32_768
"""A sampled Gram matrix is taken from about this many rows (or 8 a dimension), evenly spread."""
EXACT_SIZE = 1 << 25
"""Rows times width up to which float32 rows are computed in float64: it costs little and matters most."""
FULL_RANK = 2048
"""Above this width a sampled Gram matrix is coarse: bfloat16 products of `WIDE_ROWS` rows a dimension."""
WIDE_ROWS = 16
METRIC_BYTES = 1 << 30
"""Hooks are fitted together while the matrices that this process holds for them are smaller than this."""
_SHIFT_RATIO = 8.0
"""A dimension whose mean exceeds this many standard deviations is shifted by it, so that it does not cancel."""
_FEW_COLUMNS = 8
_SCORES = 1 << 17
_COARSE_SCRATCH_ROWS = 2048


def first_looks(designs: Sequence[Design], fit_intercept: bool) -> list[dict[str, Any]]:
    """For each design the state that its passes share: `shift`, whether to compute in float64, and the layout."""
    looks = [Pass(design.rows.head(4096), _look) for design in designs]
    states = []
    for design, (mean, deviation) in zip(designs, run_passes(looks, progress=False), strict=True):
        exact = design.rows.n_rows * len(mean) <= EXACT_SIZE
        far = np.abs(mean) > _SHIFT_RATIO * deviation
        shift = np.where((far | exact) & fit_intercept, mean, 0.0)
        states.append({"shift": shift, "exact": exact, "layout": design.targets.layout})
    return states


def take_moments(
    designs: Sequence[Design], states: Sequence[dict[str, Any]], gram: Gram, *, progress: bool
) -> list[dict[str, Any]]:
    """One shared pass over all designs; see `Moments` for what each returns.

    Raises:
        InvalidInput: a row holds NaN or an infinity.
        MemoryTooSmall: the rows are too wide for the Gram matrices.
    """
    todo = []
    for design, state in zip(designs, states, strict=True):
        d = len(state["shift"])
        wide = gram == "sample" and d > FULL_RANK
        wanted = WIDE_ROWS * d if wide else max(8 * d, GRAM_ROWS)
        stride = max(1, design.rows.n_rows // wanted)
        more = {"gram": gram, "wide": wide, "stride": stride}
        layout: Layout = state["layout"]
        held = {"none": 0, "sample": gram_bytes(d, 4) if wide else 8 * d * d}.get(gram)
        if held is None:
            held = 8 * d * d * layout.n_folds * len(variants(layout))
        size = held + 8 * d * layout.n_folds * int(layout.starts[-1])
        scratch = 6 * d * _COARSE_SCRATCH_ROWS if wide else 8 * d * d * (gram != "none")
        todo.append(Pass(design.rows, Moments, state | more, result_bytes=size, accumulate=True, scratch_bytes=scratch))
    found = run_passes(todo, description="probe statistics", progress=progress)
    for design, sums in zip(designs, found, strict=True):
        if sums["bad"]:
            raise InvalidInput(
                f"{design.name}: {sums['bad']:,} of {int(sums['rows'].sum()):,} rows hold NaN or infinity; "
                "leave those rows out"
            )
    return found


def batches(designs: Sequence[Design], gram: Gram) -> Iterator[Sequence[Design]]:
    """Designs whose Gram matrices fit in `METRIC_BYTES` together, at least one at a time.

    Designs share no rows, so that passes over some of them at a time read no byte more.
    """
    some: list[Design] = []
    held = 0
    for design in designs:
        d, layout = int(design.X.shape[1]), design.targets.layout
        size = {"none": 0, "sample": 2 * 8 * d * d}.get(gram, 2 * 8 * d * d * layout.n_folds * len(variants(layout)))
        if some and held + size > METRIC_BYTES:
            yield some
            some, held = [], 0
        some.append(design)
        held += size
    yield some


class Moments:
    """Weighted sums, by fold (F) and by column of `Layout.indicators` (1 + M), over blocks of rows and targets.

    `sums` (F, d, 1 + M) of x times indicators, `totals` (F, 1 + M) of the indicators, `variance` (d,) of x squared,
    `rows` (F,). `gram` is of every `stride`-th row (d, d), with `gram_n` and `gram_sum` (d,), or the upper tiles of
    one if rows are wide; or an exact one (variants, F, d, d), with a variant for each label that has class weights.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.layout = state, state["layout"]
        layout: Layout = self.layout
        d, n_folds, m = len(state["shift"]), layout.n_folds, int(layout.starts[-1])
        self.out: dict[str, Any] = {
            "bad": 0, "rows": np.zeros(n_folds, np.int64), "sums": np.zeros((n_folds, d, m)),
            "totals": np.zeros((n_folds, m)), "variance": np.zeros(d),
        }  # fmt: skip
        self.precise = state["exact"] or layout.weighted or min(layout.n_classes) < 2
        self.coarse = UpperGram(d, coarse=True) if state["wide"] else None
        if state["gram"] == "exact":
            self.out["gram"] = np.zeros((len(variants(layout)), n_folds, d, d))
        elif state["gram"] == "sample":
            self.out |= {"gram_n": 0.0, "gram_sum": np.zeros(d)}
            if self.coarse is None:
                self.out["gram"] = np.zeros((d, d))

    def update(self, x: Rows, *blocks: NDArray[Any]) -> None:
        """Take in a block."""
        state, mode = self.state, self.state["gram"]
        columns, weights, folds = self.layout.unpack(blocks)
        size = gram_rows(x.shape[1]) if mode == "exact" else None
        for where, part in parts(x, state, int(self.layout.starts[-1]), size):
            scale = None if weights is None else weights[where]
            fold = None if folds is None else folds[where]
            if self._add_sums(part, columns[where], scale, fold) and mode == "exact":
                _add_exact(self.out["gram"], part, scale, fold, columns[where], self.layout)
        if mode == "sample":
            stride = state["stride"]
            sampled = None if weights is None else weights[::stride]
            for where, part in parts(x[::stride], state, size=gram_rows(x.shape[1])):
                self._add_sample(part, None if sampled is None else sampled[where])

    def _add_sums(self, part: NDArray[Any], columns: NDArray[Any], scale: Vector | None, folds: Any) -> bool:
        """Add sums by class; False if a row is not finite."""
        out = self.out
        target = self.layout.indicators(columns, part.dtype)
        heavy = target if scale is None else target * scale[:, None].astype(part.dtype)
        ones = np.ones(len(part), part.dtype) if scale is None else scale.astype(part.dtype)
        square = np.einsum("ij,ij,i->j", part, part, ones) if scale is not None else np.einsum("ij,ij->j", part, part)
        if not np.isfinite(square).all() and (bad := int((~np.isfinite(part).all(axis=1)).sum())):
            out["bad"] += bad
            out["rows"][0] += len(part)
            return False
        out["variance"] += square
        for fold in range(self.layout.n_folds):
            kept = heavy if folds is None else heavy * (folds == fold)[:, None].astype(part.dtype)
            out["rows"][fold] += len(part) if folds is None else int((folds == fold).sum())
            out["sums"][fold] += (kept.T @ part).T
            out["totals"][fold] += kept.sum(axis=0, dtype=np.float64) if self.precise else _sum(kept)
        return True

    def _add_sample(self, part: NDArray[Any], scale: Vector | None) -> None:
        out = self.out
        out["gram_n"] += float(len(part)) if scale is None else float(scale.sum())
        heavy = part if scale is None else part * np.sqrt(scale)[:, None].astype(part.dtype)
        out["gram_sum"] += part.sum(axis=0, dtype=np.float64) if scale is None else part.T @ scale.astype(part.dtype)
        if self.coarse is None:
            out["gram"] += heavy.T @ heavy
        else:
            self.coarse.update(heavy)

    def result(self) -> dict[str, Any]:
        """Everything, by name."""
        if self.coarse is not None:
            self.out["gram"] = self.coarse.result()
        return self.out


def parts(
    x: Rows, state: dict[str, Any], columns: int = 1, size: int | None = None
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """`x - shift`, some rows at a time, for products with `columns` columns; float64 if that is asked for.

    A part may be overwritten by the next one.
    """
    rows = size or tile_rows(x.shape[1])
    if size is None and columns > _FEW_COLUMNS:  # many scores: they, too, should stay in the cache
        rows = max(rows, min(gram_rows(x.shape[1]), _SCORES // columns, 1024))
    shift = state["shift"]
    if not state["exact"]:
        yield from tiles(x, shift if shift.any() else None, rows=rows)
        return
    for start in range(0, len(x), rows):
        where = slice(start, min(start + rows, len(x)))
        yield where, np.subtract(decoded(x[where]), shift, dtype=np.float64)


def _sum(counts: NDArray[Any]) -> NDArray[Any]:
    """Column sums of 0 and 1, exact in float32."""
    return np.asarray(np.ones(len(counts), counts.dtype) @ counts)


def gram_rows(width: int) -> int:
    """Rows of a part for products of matrices, which want more than fit in the cache."""
    return max(1024, min(8192, (16 << 20) // (4 * max(width, 1))))


def _look(state: None, x: Rows, *_: NDArray[Any]) -> tuple[Vector, Vector]:
    rows = decoded(x)
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    return np.where(np.isfinite(mean), mean, 0.0), np.where(np.isfinite(deviation), deviation, 0.0)


def variants(layout: Layout) -> list[int]:
    """The labels that need an exact Gram matrix of their own; -1 is the one of all labels without class weights."""
    own = [label for label, given in enumerate(layout.class_weights) if given is not None]
    return own if len(own) == len(layout.n_classes) else [-1, *own]


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
