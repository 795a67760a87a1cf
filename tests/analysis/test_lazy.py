"""Lazy expressions against NumPy on the rows themselves, and what a graph from outside may not do."""

import json

import numpy as np
import pytest
from tests.analysis.conftest import HOOKS, D

from millpond.analysis.expressions import Expression
from millpond.analysis.lazy import lazy
from millpond.analysis.pca import PcaReducer
from millpond.analysis.reductions import execute, execute_all
from millpond.store.errors import HookNotCaptured, InvalidInput, LabelNotFound

HOOK = HOOKS[1]


@pytest.fixture(scope="module")
def x(run):
    return run[HOOK].values.astype(np.float64)


@pytest.fixture(scope="module")
def depth(run):
    return run.labels["depth"].values


@pytest.fixture(scope="module")
def v():
    return np.random.default_rng(4).standard_normal(D)


def test_group_means_and_variances_equal_numpys(run, x, depth, v):
    scores = x @ v
    found = (lazy(run)[HOOK] @ v).groupby("depth").mean().compute()
    assert found.provenance["groups"] == [0, 1, 2, 3]
    np.testing.assert_allclose(found["mean"][:, 0], [scores[depth == g].mean() for g in range(4)], rtol=1e-5)
    np.testing.assert_array_equal(found["rows"], np.bincount(depth))
    prompt = run.tokens["prompt"].values
    np.testing.assert_array_equal(found["prompts_by_group"], [len(set(prompt[depth == g])) for g in range(4)])
    assert found.evidence == {"rows": len(x), "prompts": 60}
    spread = (lazy(run)[HOOK] @ np.stack([v, -2 * v], axis=1)).variance().compute()
    np.testing.assert_allclose(spread["variance"], [scores.var(), 4 * scores.var()], rtol=1e-5)
    np.testing.assert_allclose(lazy(run)[HOOK].mean().compute()["mean"], x.mean(axis=0), atol=1e-6)


def test_histograms_and_quantiles_equal_numpys(run, x, depth, v):
    scores = (lazy(run)[HOOK] @ v) * 3 + lazy(run).label("depth")
    expected = (x.astype(np.float32) @ v.astype(np.float32)).astype(np.float64) * 3 + depth
    limits = scores.histogram(20, low=-5, high=5).compute()
    counts, edges = np.histogram(expected, 20, (-5, 5))
    np.testing.assert_allclose(limits["counts"], counts, atol=1)  # a score may sit on an edge
    np.testing.assert_allclose(limits["edges"], edges)
    free = scores.groupby("inside").histogram(7).compute()
    assert free["counts"].sum() == len(x)
    q = [0.0, 0.01, 0.5, 0.9, 1.0]
    found = scores.quantiles(q).compute()["quantiles"]
    np.testing.assert_allclose(found, np.quantile(expected, q, method="inverted_cdf"), atol=np.ptp(expected) * 2.0**-23)
    by_group = scores.groupby("depth").quantiles([0.25, 0.75]).compute()["quantiles"]
    for group in range(4):
        wanted = np.quantile(expected[depth == group], [0.25, 0.75], method="inverted_cdf")
        np.testing.assert_allclose(by_group[group], wanted, atol=np.ptp(expected) * 2.0**-23)


def test_correlation_and_top_rows_equal_numpys(run, x, depth, v):
    scores = x @ v
    found = (lazy(run)[HOOK] @ v).correlation(lazy(run).label("depth")).compute()
    assert found["correlation"] == pytest.approx(np.corrcoef(scores, depth)[0, 1], abs=1e-6)
    top = (lazy(run)[HOOK] @ v).top(7).compute()
    best = np.argsort(-scores)[:7]
    np.testing.assert_allclose(top["value"], scores[best], rtol=1e-5)
    ids = run.prompts["id"].to_numpy()[run.tokens["prompt"].values[best]]
    assert list(top["prompt"]) == list(ids)
    np.testing.assert_array_equal(top["position"], run.tokens["position"].values[best])
    assert set(top.values) == {"value", "prompt", "position"}  # references, no activations


def test_projections_norms_and_comparisons(run, x, depth):
    reducer = PcaReducer(3).fit(run[HOOK])
    spread = lazy(run)[HOOK].project(reducer).variance().compute()["variance"]
    np.testing.assert_allclose(spread, reducer.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-5)
    norms = lazy(run)[HOOK].norm()
    assert norms.mean().compute()["mean"] == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-6)
    share = ((norms > 4.0) * lazy(run).label("inside")).mean().compute()["mean"]
    assert share == pytest.approx(((np.linalg.norm(x, axis=1) > 4) & (depth > 0)).mean())
    late = (10 - lazy(run).position < 0).mean().compute()["mean"]
    assert late == pytest.approx((run.tokens["position"].values > 10).mean())


def test_a_part_of_a_run_is_reduced_alone(run, parts, v):
    train, _ = parts
    found = (lazy(train)[HOOK] @ v).mean().compute()
    assert found["mean"] == pytest.approx((train[HOOK].values @ v).mean(), abs=1e-5)
    assert found.evidence["prompts"] == len(train.prompts)


def test_the_wire_form_survives_json_and_gives_the_same_bits(run, v):
    asked = (lazy(run)[HOOK] @ v).groupby("depth").quantiles([0.5])
    wire = json.loads(json.dumps(asked.expression.to_wire()))
    again = Expression.from_wire(wire)
    assert again == asked.expression
    assert execute(again, run)["quantiles"].tobytes() == asked.compute()["quantiles"].tobytes()
    sent = []
    lazy(run, execute=lambda one: sent.append(one.to_wire()))[HOOK].mean().compute()
    assert sent[0]["reduce"]["of"] == {"op": "activations", "hook": HOOK}


def test_expressions_share_each_read(run, v, monkeypatch):
    from millpond.store.rows import Piece

    reads = []
    real = Piece.read
    monkeypatch.setattr(Piece, "read", lambda self, name, array: reads.append(name) or real(self, name, array))
    score = lazy(run)[HOOK] @ v
    execute_all([score.mean().expression, score.top(3).expression, score.variance().expression], run)
    assert reads.count(HOOK) == sum(map(len, run.plan.spans))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda r: r["blocks.9.hook_resid_post"], HookNotCaptured, r"blocks\.9"),
        (lambda r: r[HOOK] @ np.ones(3), InvalidInput, "directions have .3. values, the rows 16"),
        (lambda r: r[HOOK].histogram(), InvalidInput, "histogram takes one value a row, not 16"),
        (lambda r: r[HOOK].groupby("nothing").mean(), LabelNotFound, "nothing"),
        (lambda r: r[HOOK].norm().quantiles([1.5]), InvalidInput, "less than or equal to 1"),
        (lambda r: r[HOOK].norm().histogram(0), InvalidInput, "bins"),
        (lambda r: r[HOOK].norm().histogram(5, low=2, high=1), InvalidInput, "low must be smaller"),
        (lambda r: (r[HOOK] @ np.ones((16, 2))) + r[HOOK], InvalidInput, "2 and 16 values"),
        (lambda r: (r[HOOK].norm() / 0).mean().compute(), InvalidInput, "NaN or infinite"),
        (lambda r: np.asarray(r[HOOK]), InvalidInput, "no values here"),
    ],
)
def test_what_does_not_fit_is_refused(run, make, error, words):
    with pytest.raises(error, match=words):
        make(lazy(run))


def test_graphs_from_outside_are_data_not_code(run):
    good = lazy(run)[HOOK].norm().mean().expression.to_wire()
    for change, words in (
        ({"run": "other"}, "other"),
        ({"version": 2}, "version"),
        ({"reduce": {**good["reduce"], "op": "apply"}}, "reduce"),
        ({"reduce": {**good["reduce"], "of": {"op": "eval", "code": "1"}}}, "reduce"),
        ({"reduce": {**good["reduce"], "of": {"op": "constant", "value": float("nan")}}}, "finite"),
        ({"extra": 1}, "extra"),
    ):
        with pytest.raises(InvalidInput, match=words):
            execute(Expression.from_wire({**good, **change}), run)
    deep = {"op": "position"}
    for _ in range(100_000):
        deep = {"op": "norm", "of": deep}
    with pytest.raises(InvalidInput, match="nested 100003 deep, the limit is 64"):
        Expression.from_wire({**good, "reduce": {"op": "mean", "of": deep}})
    while "of" in deep:  # taken apart by hand: the interpreter would recurse
        deep = deep.pop("of")
    wide = lazy(run).position
    for _ in range(6):
        wide = wide + wide
    with pytest.raises(InvalidInput, match="127 operations, the limit is 64"):
        wide.mean()
