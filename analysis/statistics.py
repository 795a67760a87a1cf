"""Statistics of a run's hooks, computed where the rows are; each is one shared pass over all hooks unless it says more.

Every function returns a `Result` whose arrays have one entry a hook, in the order of `provenance["hooks"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.aligned import BLOCK_BYTES
from millpond.analysis.gram import Covariance, UpperGram, covariance_of, first_mean, gram_bytes
from millpond.analysis.passes import AlignedRows, Pass, join, run_pass, run_passes
from millpond.analysis.tiles import Rows, decoded, tiles
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.store.run import Run

Vector = NDArray[np.float64]
Hooks = str | Iterable[str]

_UNTOLD = np.errstate(over="ignore", invalid="ignore")
"""What overflows is found in the sums, and refused by name."""
_SUMS = ("n", "sum", "squares", "norms")


def describe(run: Run, hooks: Hooks, *, progress: bool = True) -> Result:
    """Mean, variance and largest magnitude of each dimension (hooks, d_model), and mean and largest norm of the rows.

    `massive` (hooks, d_model) marks massive dimensions: magnitudes above 100 and above 1,000 times the root mean
    square of the median dimension (after Sun et al. 2024, https://arxiv.org/abs/2402.17762). What was gathered
    while the run was written costs no read.

    Raises:
        HookNotCaptured: the run does not hold a hook.
        InvalidInput: the run has no rows, or a value is NaN or infinite.
    """
    names = _names(run, hooks)
    kept = {name: found for name in names if (found := _kept(run, name)) is not None}
    todo = [name for name in names if name not in kept]
    rows = [AlignedRows(run[name], stored=True) for name in todo]
    shifts = run_passes([Pass(one.head(4096), first_mean) for one in rows], progress=False) if rows else []
    passes = [Pass(one, _moments, shift, _merge_moments) for one, shift in zip(rows, shifts, strict=True)]
    sums = run_passes(passes, description="statistics", progress=progress) if passes else []
    for name, shift, found in zip(todo, shifts, sums, strict=True):
        _check_finite(found["squares"], run, name)
        n, mean = found["n"], found["sum"] / found["n"]
        kept[name] = {
            "mean": shift + mean, "variance": np.maximum(found["squares"] / n - mean**2, 0.0), "max_abs": found["max_abs"],
            "mean_norm": found["norms"] / n, "max_norm": found["max_norm"],
        }  # fmt: skip
    values = {key: np.stack([kept[name][key] for name in names]) for key in kept[names[0]]}
    typical = np.median(np.sqrt(values["variance"] + values["mean"] ** 2), axis=1, keepdims=True)
    values["massive"] = (values["max_abs"] > 100) & (values["max_abs"] > 1000 * typical)
    return _result("statistics", run, names, values, read=len(todo) * run.n_rows)


def covariance(run: Run, hook: str, *, progress: bool = True) -> Result:
    """Mean (d_model,) and covariance (d_model, d_model) of one hook's rows; rows less one in the denominator.

    Raises:
        MemoryTooSmall: a worker cannot hold the matrix.
    """
    (name,) = _one(run, hook)
    rows = AlignedRows(run[name], stored=True)
    shift = run_pass(Pass(rows.head(4096), first_mean), progress=False)
    one = Pass(rows, Covariance, shift, accumulate=True, result_bytes=gram_bytes(run.d_model, 8))
    n, mean, matrix = covariance_of(run_pass(one, description="covariance", progress=progress))
    _check_finite(matrix, run, name)
    return _result("covariance", run, (name,), {"mean": shift + mean, "covariance": matrix}, read=n)


def layer_similarity(run: Run, hooks: Hooks, *, progress: bool = True) -> Result:
    """Mean cosine similarity between hooks at the same token, (hooks, hooks)."""
    names = _names(run, hooks)
    rows = _together(run, names)
    n, cosines = run_pass(Pass(rows, _cosines, None), description="cosine similarity", progress=progress)
    _check_finite(cosines, run, ", ".join(names))
    return _result("layer-similarity", run, names, {"cosine": cosines / n}, read=n * len(names))


def cka(run: Run, hooks: Hooks, *, progress: bool = True) -> Result:
    """Linear centred kernel alignment between hooks, (hooks, hooks), over all rows (Kornblith et al. 2019, eq. 4-5).

    Memory: the Gram matrix of all hooks side by side, (hooks * d_model)^2 / 2 float64 for each thread.

    Raises:
        MemoryTooSmall: a worker cannot hold it; give fewer hooks.
    """
    names = _names(run, hooks)
    rows = _together(run, names)
    shift = run_pass(Pass(rows.head(4096), _first_means), progress=False)
    d = run.d_model
    one = Pass(rows, _SideBySide, shift, accumulate=True, result_bytes=gram_bytes(d * len(names), 8))
    n, _, matrix = covariance_of(run_pass(one, description="CKA", progress=progress))
    _check_finite(matrix, run, ", ".join(names))
    shared = (matrix.reshape(len(names), d, len(names), d) ** 2).sum(axis=(1, 3))
    scale = np.sqrt(np.diag(shared))
    if not scale.all():
        raise InvalidInput(
            f"hook {names[int(scale.argmin())]} of run {run.name!r} is constant; CKA is not defined for it"
        )
    return _result("cka", run, names, {"cka": shared / np.outer(scale, scale)}, read=n * len(names))


def kmeans(
    run: Run, hook: str, k: int, *, max_iter: int = 50, tol: float = 1e-4, seed: int = 0, progress: bool = True
) -> Result:
    """Lloyd's k-means of one hook's rows: `centroids` (k, d_model), `counts` (k,), `inertia`, `n_iter`.

    Starts are k-means++ (Arthur and Vassilvitskii, 2007) on a sample of rows; each iteration is a pass. Ends when
    the inertia falls by less than the fraction `tol`. A cluster that loses all rows keeps its centroid.

    Raises:
        InvalidInput: `k` is not from 1 to the number of rows.
    """
    (name,) = _one(run, hook)
    if not 1 <= k <= run.n_rows:
        raise InvalidInput(f"k is {k}; give 1 to {run.n_rows:,}, the rows of run {run.name!r}")
    rows = AlignedRows(run[name], range(run.n_rows), stored=True)
    sample_rows = min(run.n_rows, max(4096, 32 * k))
    chosen = np.sort(np.random.default_rng(seed).choice(run.n_rows, sample_rows, replace=False))
    sample = np.concatenate(run_pass(Pass(rows, _take, chosen, join), description="k-means start", progress=progress))
    _check_finite(sample, run, name)
    centroids = _plus_plus(sample.astype(np.float64), k, np.random.default_rng([seed, 1]))
    inertia, n_iter = np.inf, 0
    counts: NDArray[Any] = np.zeros(k, np.int64)
    while n_iter < max_iter:
        n_iter += 1
        todo = Pass(rows, _assign, centroids, result_bytes=2 * centroids.nbytes)
        total, counts, found = run_pass(todo, description=f"k-means pass {n_iter}", progress=progress)
        _check_finite(total, run, name)
        centroids = np.where(counts[:, None] > 0, centroids + total / np.maximum(counts, 1)[:, None], centroids)
        done = inertia - found <= tol * found
        inertia = found
        if done:
            break
    values = {"centroids": centroids, "counts": counts, "inertia": inertia, "n_iter": n_iter}
    return _result("k-means", run, (name,), values, read=n_iter * run.n_rows, k=k, seed=seed)


def _names(run: Run, hooks: Hooks) -> tuple[str, ...]:
    if not run.n_rows:
        raise InvalidInput(f"run {run.name!r} has 0 rows; statistics need at least one")
    return run.match(hooks)


def _one(run: Run, hook: str) -> tuple[str, ...]:
    names = _names(run, hook)
    if len(names) != 1:
        raise InvalidInput(f"hook {hook!r} names {len(names)} hook points; name one")
    return names


def _kept(run: Run, name: str) -> dict[str, Any] | None:
    """What was gathered at ingest, if it is about all rows of this view."""
    try:
        kept = run.stats[name]
    except InvalidInput:  # a view of some rows, or a run that was written without
        return None
    if kept.count != run.n_rows:
        return None
    return {key: getattr(kept, key) for key in ("mean", "variance", "max_abs", "mean_norm", "max_norm")}


def _together(run: Run, names: Sequence[str]) -> AlignedRows:
    return AlignedRows(*(run[name] for name in names), block_bytes=max(1, BLOCK_BYTES // len(names)), stored=True)


def _check_finite(values: NDArray[Any], run: Run, name: str) -> None:
    if not np.isfinite(values).all():
        raise InvalidInput(
            f"{name} of run {run.name!r} holds NaN, infinity, or values so large (from about 1e17) that float32 does not hold "
            "sums of their squares; millpond verify says where the first two are, run.stats[hook].max_abs which dimensions are "
            "that large"
        )


def _result(kind: str, run: Run, names: Sequence[str], values: dict[str, Any], *, read: int, **more: Any) -> Result:
    from importlib.metadata import version

    evidence = {"rows": run.n_rows, "prompts": len(run.prompts)}
    about = {
        "run": run.name,
        "run_id": run.plan.spec.id,
        "hooks": list(names),
        "rows_read": read,
        "millpond": version("millpond"),
    }
    return Result(kind, values, evidence=evidence, provenance=about | more)


@_UNTOLD
def _moments(shift: Vector, x: Rows) -> dict[str, Any]:
    sums: dict[str, Any] = {
        "n": len(x), "sum": np.zeros(len(shift)), "squares": np.zeros(len(shift)), "norms": 0.0,
        "max_norm": 0.0, "max_abs": np.zeros(len(shift)),
    }  # fmt: skip
    low = None
    for _, tile in tiles(x):
        low = shift.astype(tile.dtype) if low is None else low
        norms = np.sqrt(np.einsum("ij,ij->i", tile, tile, dtype=np.float64))
        sums["norms"] += float(norms.sum())
        sums["max_norm"] = max(sums["max_norm"], float(norms.max()))
        np.maximum(sums["max_abs"], np.maximum(tile.max(axis=0), -tile.min(axis=0)), out=sums["max_abs"])
        tile -= low
        sums["sum"] += tile.sum(axis=0, dtype=np.float64)
        sums["squares"] += np.einsum("ij,ij->j", tile, tile)
    return sums


def _merge_moments(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = {name: left[name] + right[name] for name in _SUMS}
    return merged | {name: np.maximum(left[name], right[name]) for name in ("max_norm", "max_abs")}


def _cosines(state: None, *hooks: Rows) -> tuple[int, Vector]:
    total = np.zeros((len(hooks), len(hooks)))
    for together in zip(*(tiles(x, rows=64) for x in hooks), strict=True):
        units = [_units(tile) for _, tile in together]
        for i, left in enumerate(units):
            for j in range(i, len(units)):
                total[i, j] += float(np.vdot(left, units[j]))
    return len(hooks[0]), np.triu(total) + np.triu(total, 1).T


def _units(tile: NDArray[Any]) -> NDArray[Any]:
    norms = np.sqrt(np.einsum("ij,ij->i", tile, tile, dtype=np.float64))[:, None]
    units: NDArray[Any] = tile / np.maximum(norms, 1e-30).astype(tile.dtype)
    return units


def _first_means(state: None, *hooks: Rows) -> Vector:
    return np.concatenate([first_mean(None, x) for x in hooks])


class _SideBySide:
    """`gram.Covariance` of the rows of several hooks next to each other."""

    def __init__(self, shift: Vector) -> None:
        self.shift, self.n, self.total = shift, 0, np.zeros(len(shift))
        self.gram = UpperGram(len(shift))

    def update(self, *hooks: Rows) -> None:
        """Take in a block of every hook."""
        self.n += len(hooks[0])
        for start in range(0, len(hooks[0]), 2048):
            rows = np.concatenate([decoded(x[start : start + 2048]) for x in hooks], axis=1)
            rows -= self.shift.astype(rows.dtype)
            self.total += rows.sum(axis=0, dtype=np.float64)
            self.gram.update(rows)

    def result(self) -> tuple[int, Vector, tuple[NDArray[Any], ...]]:
        """Rows, sum, and tile rows of the Gram matrix."""
        return self.n, self.total, self.gram.result()


def _take(chosen: NDArray[Any], x: Rows, numbers: NDArray[Any]) -> list[NDArray[Any]]:
    mine = chosen[(chosen >= numbers[0]) & (chosen <= numbers[-1])] - numbers[0]
    return [decoded(x)[mine]]


def _plus_plus(sample: Vector, k: int, rng: np.random.Generator) -> Vector:
    chosen = [sample[int(rng.integers(len(sample)))]]
    nearest = np.full(len(sample), np.inf)
    while len(chosen) < k:
        nearest = np.minimum(nearest, np.square(sample - chosen[-1]).sum(axis=1))
        far = nearest.sum()
        chosen.append(sample[int(rng.choice(len(sample), p=nearest / far if far > 0 else None))])
    return np.stack(chosen)


@_UNTOLD
def _assign(centroids: Vector, x: Rows, numbers: NDArray[Any]) -> tuple[Vector, NDArray[np.int64], float]:
    """Sum of rows less their centroid, rows, and squared distances, by nearest centroid."""
    k = len(centroids)
    total, counts, inertia = np.zeros(centroids.shape), np.zeros(k, np.int64), 0.0
    center = centroids.mean(axis=0)  # distances are small differences of large products otherwise
    around = centroids - center
    half = np.square(around).sum(axis=1) / 2
    for _, tile in tiles(x, center, rows=1024):
        closeness = tile @ around.T.astype(tile.dtype) - half.astype(tile.dtype)
        if not np.isfinite(closeness).all():  # of which the largest would be none
            return np.full(centroids.shape, np.nan), counts, np.nan
        nearest = closeness.argmax(axis=1)
        tile -= around.astype(tile.dtype)[nearest]
        inertia += float(np.einsum("ij,ij->", tile, tile, dtype=np.float64))
        one_hot = (nearest[:, None] == np.arange(k)).astype(tile.dtype)
        total += one_hot.T @ tile
        counts += one_hot.sum(axis=0).astype(np.int64)
    return total, counts, inertia
