"""Probes beside scikit-learn, many labels beside one, and the headline on more rows than memory holds.

`python benchmarks/probes.py [--quick]` prints tables and a last line of JSON. Both sides of a comparison get the same
standardised float32 rows in memory and the same objective, run in turns in one process with one thread in BLAS, and
are measured in CPU seconds of the whole process. The optimum that objectives are compared with is that of
scikit-learn's `newton-cholesky` in float64. The headline is described in `probes_headline.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from probes_headline import headline
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from millpond.analysis import LogisticProbe
from millpond.analysis.probes.targets import Design, Problem, Targets

WIDTH = 1024
N_LABELS = 256
MASSIVE = {1: (300.0, 60.0), 5: (-200.0, 40.0)}
"""Mean and standard deviation of the massive dimensions, of which residual streams have a few."""

Rows = NDArray[np.float32]


class Source:
    """Rows with a power-law spectrum turned against the axes and massive dimensions; labels of logistic models."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        turn, _ = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))
        self.mix = (np.arange(1, WIDTH + 1)[:, None] ** -0.5 * 3 * turn).astype(np.float32)
        self.mean, self.scale = np.zeros(WIDTH), np.sqrt((self.mix.astype(np.float64) ** 2).sum(axis=0))
        for place, (mean, scale) in MASSIVE.items():
            self.mean[place], self.scale[place] = mean, scale
        self.directions = (1.6 / np.sqrt(WIDTH) * rng.standard_normal((WIDTH, N_LABELS))).astype(np.float32)

    def rows(self, n: int) -> tuple[Rows, NDArray[np.uint8]]:
        """Standardised rows (n, WIDTH) and labels (n, N_LABELS)."""
        x = self.rng.standard_normal((n, WIDTH), dtype=np.float32) @ self.mix
        for place, (mean, scale) in MASSIVE.items():
            x[:, place] = mean + scale * self.rng.standard_normal(n, dtype=np.float32)
        x -= self.mean.astype(np.float32)
        x /= self.scale.astype(np.float32)
        logits = x @ self.directions
        return x, (self.rng.random(logits.shape, dtype=np.float32) < 1 / (1 + np.exp(-logits))).astype(np.uint8)


def cpu(action: Callable[[], Any]) -> tuple[Any, float]:
    """What `action` returns, and its CPU seconds."""
    start = time.process_time()
    found = action()
    return found, time.process_time() - start


def objective(x: Rows, y: NDArray[np.uint8], coef: NDArray[Any], intercept: float) -> float:
    """scikit-learn's objective with C = 1, in float64."""
    z = np.concatenate([part.astype(np.float64) @ coef for part in np.array_split(x, 64)]) + intercept
    return float((np.logaddexp(0, z) - z * y).sum() + 0.5 * coef @ coef)


def against_sklearn(
    x: Rows, y: NDArray[np.uint8], test: Rows, truth: NDArray[np.uint8], rounds: int
) -> dict[str, float]:
    """One binary probe beside scikit-learn's default solver, and both beside the optimum."""
    probe, peer = LogisticProbe(progress=False), LogisticRegression(solver="lbfgs", max_iter=5000)
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        for name, model in (("millpond", probe), ("scikit-learn lbfgs", peer)):
            _, took = cpu(lambda model=model: model.fit(x, y))
            seconds[name] = min(took, seconds.get(name, np.inf))
    exact = LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=100)
    _, seconds["scikit-learn newton-cholesky, float64"] = cpu(lambda: exact.fit(x.astype(np.float64), y))
    models = dict(zip(seconds, (probe, peer, exact), strict=True))
    best = objective(x, y, exact.coef_[0], exact.intercept_[0])
    print(f"{'':38}{'CPU s':>8}{'passes':>8}{'objective over the optimum':>28}{'AUROC':>10}")
    gaps, aurocs = {}, {}
    for name, model in models.items():
        gaps[name] = objective(x, y, model.coef_[0].astype(np.float64), float(model.intercept_[0])) / best - 1
        aurocs[name] = float(roc_auc_score(truth, test @ model.coef_[0].astype(np.float32)))
        print(f"{name:38}{seconds[name]:8.2f}{int(model.n_iter_[0]):8}{gaps[name]:28.1e}{aurocs[name]:10.6f}")
    return {
        "cpu_speedup_vs_sklearn": round(seconds["scikit-learn lbfgs"] / seconds["millpond"], 2),
        "objective_gap": gaps["millpond"],
        "auroc_gap": abs(aurocs["millpond"] - aurocs["scikit-learn newton-cholesky, float64"]),
    }


def many_labels(x: Rows, y: NDArray[np.uint8], rounds: int) -> dict[str, float]:
    """All labels in shared passes beside one label."""
    probe = LogisticProbe(progress=False)
    seconds: dict[int, float] = {}
    for _ in range(rounds):
        for count in (1, N_LABELS):
            targets = Targets.of([*y[:, :count].T], [2] * count, [None] * count)
            problems = [Problem(label, 1.0) for label in range(count)]
            [found], took = cpu(lambda t=targets, p=problems: probe.solve([Design("x", x, t)], p))
            assert all(one.converged for one in found)
            seconds[count] = min(took, seconds.get(count, np.inf))
    for count, took in seconds.items():
        print(f"{count:4} labels: {took:.2f} CPU s, {took / count:.3f} a label")
    return {"cost_256_labels": round(seconds[N_LABELS] / seconds[1], 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="50,000 rows in place of 200,000, and 1 GB in place of 20")
    quick = parser.parse_args().quick
    n, rounds = (50_000, 1) if quick else (200_000, 2)
    record: dict[str, float] = {}
    with threadpool_limits(1):
        source = Source(np.random.default_rng(0))
        x, y = source.rows(n)
        test, truth = source.rows(50_000)
        LogisticProbe(progress=False).fit(x[:2000], y[:2000, 0])  # imports
        print(f"{n:,} x {WIDTH} float32 standardised rows, best of {rounds}")
        record |= against_sklearn(x, y[:, 0], test, truth[:, 0], rounds)
        record |= many_labels(x, y, rounds)
    del x, y, test, truth
    record |= headline(quick=quick)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
