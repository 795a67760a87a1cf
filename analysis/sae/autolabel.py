"""Which few latents say a label: k-sparse probing.

Gurnee et al. (2023, "Finding neurons in a haystack", arXiv 2305.01610) choose k units and fit a logistic
probe on them alone. Here units are chosen by their correlation with the label over the training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.analysis.sae import blocks
from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.latents import Survey, survey
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis.sae.estimator import Sae


def auto_labels(
    sae: Sae,
    train: Any,
    train_labels: Mapping[str, Any],
    test: Any,
    test_labels: Mapping[str, Any],
    *,
    ks: Sequence[int] = (1, 5, 20),
    found: Survey | None = None,
    max_rows: int = 100_000,
    progress: bool = True,
) -> pd.DataFrame:
    """For each label the F1, on test rows, of the best latent and of probes on the k best.

    k = 1: the latent and threshold of the best F1 on the training rows. Larger k: logistic regression on the
    k latents that correlate most. Labels are "above 0"; thresholds come from the training rows. Probes see
    at most `max_rows` rows of each part, evenly spaced.

    Args:
        sae: a trained autoencoder or transcoder.
        train: rows to choose and fit on, such as `train[hook]`.
        train_labels: columns aligned with them, by name.
        test: rows to score on.
        test_labels: the same columns of those.
        ks: numbers of latents.
        found: `survey` of the training rows with the same labels, if it was made.
        max_rows: see above.
        progress: show bars.

    Returns:
        columns label, k, f1, train_f1, positive (share of the test rows), latents (numbers, best first).
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if list(train_labels) != list(test_labels) or not train_labels:
        raise InvalidInput(
            f"labels are {list(train_labels)} and {list(test_labels)}; give the same ones for both parts"
        )
    names = tuple(train_labels)
    if found is None or found.labels != names:
        found = survey(sae, train, train_labels, n=1, progress=progress)
    most = min(max(ks), sae.d_sae)
    strength = np.nan_to_num(np.abs(found.correlation))
    ranked = np.argsort(-strength, axis=0, kind="stable")[:most]  # (most, labels)
    single = found.f1.argmax(axis=0)
    used = np.unique(np.concatenate([ranked.ravel(), single]))
    parts = []
    for rows, labels in ((train, train_labels), (test, test_labels)):
        step = max(1, -(-int(np.shape(rows)[0]) // max_rows))
        acts = _activations(sae._weights(), rows[::step], used, progress)
        truth = {name: np.asarray(_memory(values))[::step] > 0 for name, values in labels.items()}
        parts.append((acts, truth))
    (acts, truth), (test_acts, test_truth) = parts
    lines = []
    for number, name in enumerate(names):
        if truth[name].all() or not truth[name].any():
            raise InvalidInput(f"label {name!r} has one class only in the training rows; take more rows")
        for k in ks:
            if k == 1:
                latents = np.array([single[number]])
                at = int(np.searchsorted(used, latents[0]))
                scores, test_scores, cut = acts[:, at], test_acts[:, at], float(found.cut[latents[0], number])
                cut = max(cut, float(np.nextafter(np.float32(0), np.float32(1))))
            else:
                latents = ranked[: min(k, most), number]
                at_all = np.searchsorted(used, latents)
                scaler = StandardScaler().fit(acts[:, at_all])
                probe = LogisticRegression(max_iter=500).fit(scaler.transform(acts[:, at_all]), truth[name])
                scores = probe.decision_function(scaler.transform(acts[:, at_all]))
                test_scores = probe.decision_function(scaler.transform(test_acts[:, at_all]))
                cut = _best_cut(scores, truth[name])
            lines.append(
                {
                    "label": name, "k": int(k), "f1": _f1(test_scores >= cut, test_truth[name]),
                    "train_f1": _f1(scores >= cut, truth[name]), "positive": float(test_truth[name].mean()),
                    "latents": latents.tolist(),
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def _activations(weights: SaeWeights, rows: Any, latents: NDArray[np.int64], progress: bool) -> NDArray[np.float32]:
    one = Pass(AlignedRows(rows), _chosen, (weights, latents), join)
    return np.concatenate(run_pass(one, description="probing latents", progress=progress))


def _chosen(state: tuple[SaeWeights, NDArray[np.int64]], x: NDArray[Any]) -> list[NDArray[np.float32]]:
    weights, latents = state
    return [blocks.encode(weights, x[part])[:, latents] for part in blocks.slices(weights, len(x))]


def _memory(values: Any) -> Any:
    return values.compute() if hasattr(values, "compute") else values


def _f1(said: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    hits = int((said & truth).sum())
    return 2 * hits / max(1, int(said.sum()) + int(truth.sum()))


def _best_cut(scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """The score from which on saying yes gives the best F1."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are said yes to together
    return float(scores[order[np.argmax(np.where(last, f1, -1))]])
