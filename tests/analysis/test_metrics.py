import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from millpond.analysis.metrics import METRICS, Tally, Task, auroc, evaluate_scores
from millpond.analysis.ranks import RankTable
from millpond.store.errors import InvalidInput, OneClass


def binned_calibration_error(probability, hit):
    """Weighted mean over ten bins of |mean probability - fraction of hits|, in a plain loop."""
    total = 0.0
    for low in range(10):
        inside = (probability >= low / 10) & ((probability < (low + 1) / 10) | (low == 9))
        if inside.any():
            total += abs(probability[inside].mean() - hit[inside].mean()) * inside.mean()
    return total


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
    fpr, tpr, _ = reference.roc_curve(truth, scores)
    expected = {
        "auroc": reference.roc_auc_score(truth, scores),
        "accuracy": reference.accuracy_score(truth, called),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, called),
        "f1": reference.f1_score(truth, called),
        "log_loss": reference.log_loss(truth, probability),
        "ece": binned_calibration_error(probability, truth),
        "recall_at_fpr": tpr[fpr <= 0.01].max(),
    }
    curve = found.values.pop("reliability")
    assert found.values == {name: pytest.approx(value, abs=1e-9) for name, value in expected.items()}
    fraction, mean = calibration_curve(truth, probability, n_bins=10)
    np.testing.assert_allclose(curve[curve[:, 2] > 0, 0], mean)
    np.testing.assert_allclose(curve[curve[:, 2] > 0, 1], fraction)
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


def test_constant_scores_score_what_theory_says():
    """A base-rate predictor: chance ranks, the labels' entropy as log-loss, and perfect calibration."""
    truth = np.array([True, False, False, True, False])
    rate = 0.4
    found = evaluate_scores(np.full(5, np.log(rate / (1 - rate))), truth, n_bootstrap=100)
    assert found.values["auroc"] == 0.5
    assert found.intervals["auroc"] == (0.5, 0.5)
    assert found.values["log_loss"] == pytest.approx(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate))
    assert found.values["accuracy"] == 0.6
    assert found.values["balanced_accuracy"] == 0.5
    assert found.values["f1"] == 0
    assert found.values["ece"] == pytest.approx(0, abs=1e-12)
    assert found.values["recall_at_fpr"] == 0
    assert auroc(np.ones(5), truth) == 0.5
    y = np.array([1.0, 2.0, 6.0])
    assert evaluate_scores(np.full(3, 3.0), y, kind="regression").values == {"r2": 0.0, "mse": pytest.approx(14 / 3)}
    logits = np.zeros((4, 4))
    many = evaluate_scores(logits, np.arange(4), kind="multiclass", n_bootstrap=0).values
    assert (many["auroc"], many["balanced_accuracy"]) == (0.5, 0.25)
    assert many["log_loss"] == pytest.approx(np.log(4))
    assert many["ece"] == pytest.approx(0)


def test_several_classes_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 500)
    logits = rng.standard_normal((500, 4)).astype(np.float32)
    logits[np.arange(500), truth] += 1
    found = evaluate_scores(logits, truth, np.arange(500) // 10, kind="multiclass", n_bootstrap=50)
    probability = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    called = logits.argmax(axis=1)
    one_hot = truth[:, None] == np.arange(4)
    assert found.values["auroc"] == pytest.approx(reference.roc_auc_score(one_hot, logits, average="macro"), abs=1e-9)
    assert found.values["accuracy"] == pytest.approx(reference.accuracy_score(truth, called))
    assert found.values["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, called))
    assert found.values["f1"] == pytest.approx(reference.f1_score(truth, called, average="macro"))
    assert found.values["log_loss"] == pytest.approx(reference.log_loss(truth, probability), abs=1e-6)
    expected = binned_calibration_error(probability.max(axis=1), called == truth)
    assert found.values["ece"] == pytest.approx(expected, abs=1e-6)
    assert found.evidence == {"rows": 500, "prompts": 50} | {f"class_{k}": (truth == k).sum() for k in range(4)}
    assert set(found.intervals) == set(METRICS["multiclass"])


def test_regression_equals_scikit_learn_with_a_large_mean():
    rng = np.random.default_rng(0)
    y = 1e6 + rng.standard_normal(400)
    predicted = y + 0.5 * rng.standard_normal(400)
    found = evaluate_scores(predicted, y, np.arange(400) // 8, kind="regression", n_bootstrap=300)
    assert found.values["r2"] == pytest.approx(reference.r2_score(y, predicted), abs=1e-9)
    assert found.values["mse"] == pytest.approx(reference.mean_squared_error(y, predicted), rel=1e-9)
    low, high = found.intervals["r2"]
    assert low < found.values["r2"] < high


def table_of(table):
    return [array.tolist() for array in (table.group, table.key, table.positive, table.negative)] + [table.level]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_results_do_not_depend_on_how_rows_are_cut(data):
    """Ranks to the last bit, also when the table is full and scores are rounded; sums to rounding."""
    n = data.draw(st.integers(20, 200))
    cuts = sorted(data.draw(st.lists(st.integers(1, n - 1), max_size=6, unique=True)))
    limit = data.draw(st.sampled_from([5, 30, 1000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    scores = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    truth, group = np.arange(n) % 3 == 0, rng.integers(0, 3, n)
    whole = RankTable.of(scores, truth, group, limit)
    parts = [
        RankTable.of(*part, limit) for part in zip(*(np.split(a, cuts) for a in (scores, truth, group)), strict=True)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert table_of(merged) == table_of(whole)
    assert len(whole.key) <= limit or whole.level == 31
    assert whole.positive.sum() == truth.sum()
    task = Task("binary", n_groups=3)
    tallies = [
        Tally.of(task, *part)
        for part in zip(*(np.split(a, cuts) for a in (scores[:, None], truth.astype(np.uint8), group)), strict=True)
    ]
    tally = tallies[0]
    for other in tallies[1:]:
        tally = tally.merge(other)
    one, cut = Tally.of(task, scores[:, None], truth, group).finish(n_bootstrap=20), tally.finish(n_bootstrap=20)
    for name in METRICS["binary"]:
        assert cut.values[name] == pytest.approx(one.values[name], rel=1e-12)
        assert cut.intervals[name] == pytest.approx(one.intervals[name], rel=1e-12)
    assert cut.values["auroc"] == one.values["auroc"] == pytest.approx(reference.roc_auc_score(truth, scores))


def test_a_full_table_of_ranks_is_nearly_exact():
    scores, truth, _group = sample(n=30_000)
    table = RankTable.of(scores, truth, np.zeros(30_000), 2000)
    assert table.level > 0
    assert len(table.key) <= 2000
    from millpond.analysis.ranks import area

    assert area(*table.by_score())[0] == pytest.approx(reference.roc_auc_score(truth, scores), abs=1e-4)


def test_a_class_without_rows_is_an_error_of_its_own():
    with pytest.raises(OneClass, match="none is of class 2"):
        evaluate_scores(np.zeros((4, 3)), np.array([0, 1, 0, 1]), kind="multiclass")


def test_same_seed_same_intervals():
    scores, truth, group = sample()
    first, second, other = (evaluate_scores(scores, truth, group, seed=seed).intervals for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "words"),
    [
        (np.zeros(3), np.zeros(2), None, "shape"),
        (np.array([0, np.nan]), np.array([0, 1]), None, "1 of 2 scores"),
        (np.zeros(3), np.ones(3), None, "of 3 rows to evaluate all have the label True"),
        (np.zeros(2), np.array([0, 1]), np.zeros(3), "groups have shape"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(scores, labels, groups, words):
    with pytest.raises(InvalidInput, match=words):
        evaluate_scores(scores, labels, groups)
