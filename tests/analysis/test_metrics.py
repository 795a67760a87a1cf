import numpy as np
import pytest
from sklearn import metrics as reference

from millpond.analysis.metrics import auroc, evaluate_scores
from millpond.store.errors import InvalidInput


def sample(n=600, groups=40, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    truth = rng.random(n) < 0.3
    scores = 1.5 * truth + rng.standard_normal(groups)[group] + rng.standard_normal(n) - 1
    return (np.round(scores) if ties else scores).astype(np.float32), truth, group


@pytest.mark.parametrize("ties", [False, True])
def test_values_equal_scikit_learns(ties):
    scores, truth, group = sample(ties=ties)
    found = evaluate_scores(scores, truth, group, n_bootstrap=0)
    called = scores > 0
    probability = 1 / (1 + np.exp(-scores.astype(np.float64)))
    assert found.values == {
        "auroc": pytest.approx(reference.roc_auc_score(truth, scores), abs=1e-12),
        "accuracy": pytest.approx(reference.accuracy_score(truth, called), abs=1e-12),
        "balanced_accuracy": pytest.approx(reference.balanced_accuracy_score(truth, called), abs=1e-12),
        "f1": pytest.approx(reference.f1_score(truth, called), abs=1e-12),
        "log_loss": pytest.approx(reference.log_loss(truth, probability), abs=1e-9),
    }
    assert found.evidence == {"rows": 600, "positives": truth.sum(), "negatives": (~truth).sum(), "prompts": 40}


def test_auroc_is_exact_with_more_scores_than_bins():
    scores, truth, group = sample(n=30_000)
    found = evaluate_scores(scores, truth, group, n_bootstrap=2)
    assert found.values["auroc"] == pytest.approx(reference.roc_auc_score(truth, scores), abs=1e-12)


@pytest.mark.parametrize("n", [600, 9000])
def test_intervals_are_those_of_resampling_whole_groups(n):
    """Against a plain loop that draws groups and recomputes scikit-learn's metrics."""
    scores, truth, group = sample(n=n)
    found = evaluate_scores(scores, truth, group, n_bootstrap=2000)
    rng = np.random.default_rng(7)
    rows = [np.flatnonzero(group == g) for g in range(40)]
    drawn = [np.concatenate([rows[g] for g in rng.integers(0, 40, 40)]) for _ in range(400)]
    for name, metric in [
        ("auroc", lambda i: reference.roc_auc_score(truth[i], scores[i])),
        ("f1", lambda i: reference.f1_score(truth[i], scores[i] > 0)),
    ]:
        low, high = np.percentile([metric(i) for i in drawn], [2.5, 97.5])
        assert found.intervals[name] == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_intervals_by_group_are_wider_than_by_row_when_groups_differ():
    scores, truth, group = sample(n=4000)

    def width(groups):
        low, high = evaluate_scores(scores, truth, groups).intervals["accuracy"]
        return high - low

    assert width(group) > 1.5 * width(None)


def test_constant_scores():
    truth = np.array([True, False, False, True, False])
    found = evaluate_scores(np.zeros(5), truth, n_bootstrap=100)
    assert found.values["auroc"] == 0.5
    assert found.intervals["auroc"] == (0.5, 0.5)
    assert found.values["log_loss"] == pytest.approx(np.log(2))
    assert found.values["f1"] == 0
    assert auroc(np.ones(5), truth) == 0.5


def test_same_seed_same_intervals():
    scores, truth, group = sample()
    first, second, other = (evaluate_scores(scores, truth, group, seed=seed).intervals for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "words"),
    [
        (np.zeros(3), np.zeros(2), None, "shape"),
        (np.array([0, np.nan]), np.array([0, 1]), None, "1 of 2 scores"),
        (np.zeros(3), np.ones(3), None, "all 3 rows to evaluate have the label True"),
        (np.zeros(2), np.array([0, 1]), np.zeros(3), "groups have shape"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(scores, labels, groups, words):
    with pytest.raises(InvalidInput, match=words):
        evaluate_scores(scores, labels, groups)
