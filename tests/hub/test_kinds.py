"""Every kind of job: what is refused on the wire, what comes out against numbers worked out here, and what the rules see."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest
from tests.hub.gatehouse import HOOK, HOOKS, PROMPTS, D, probe, rows, write_run

from millpond.analysis import expressions as ex
from millpond.hub.answers import pack_evidence, pack_result, releasable, unpack_evidence, unpack_result
from millpond.hub.bits import BitWriter
from millpond.hub.database import open_database
from millpond.hub.generations import _evidence
from millpond.hub.kinds import KINDS, parse_job
from millpond.hub.policy import Charges, Disclosure, ModelPolicy, Policy
from millpond.hub.projects import Projects
from millpond.hub.rules import Rule, judge
from millpond.hub.shapes import Context, write_result
from millpond.hub.vault import Vault, label_mark
from millpond.store.errors import InvalidInput, LabelNotFound, NotHeld, TooFewPrompts
from millpond.store.lake import open_lake
from millpond.store.result import Result

POLICY = Policy(models={"m": ModelPolicy(parameters=8_000_000_000)})


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    lake = open_lake(folder / "lake", create=True)
    data, marks = write_run(lake, "shared")
    write_run(lake, "steered", seed=1, interventions=[{"op": "add", "hook": HOOK}])
    write_run(lake, "copies", seed=2, same_text=True)
    engine = open_database(f"sqlite:///{folder / 'hub.db'}")
    projects = Projects(engine)
    projects.create("one", models=["m"], by="ada")
    projects.create("two", models=["m"], by="eve")
    found = Vault(lake, projects, POLICY, "one", "0" * 16)
    found.data_, found.marks_ = data[HOOK], marks
    found.handles = {
        (run, kind): projects.hold("one", "run", f"{run}-{kind}", run, model="m", detail={"prompts": kind}).handle.hex()
        for run in ("shared", "steered", "copies") for kind in ("own", "restricted")
    }  # fmt: skip
    yield found
    engine.dispose()


@pytest.fixture
def run(vault):
    return vault.handles["shared", "own"]


def do(vault, job, *, number=0):
    """What an executor does with a job; a fresh id, so that artifacts do not meet."""
    number = np.random.default_rng().integers(1 << 62)
    parsed = parse_job(job)
    at = dataclasses.replace(vault, job=f"{number:016x}", pins=None)
    at = at.at(at.pin(parsed))
    outcome = parsed.run(at, lambda _: None)
    assert len(outcome.answers) == parsed.answers()
    for one in outcome.answers:  # the quote bounds what is sent, and what is kept is what was measured
        out = BitWriter()
        kept = releasable(one.result)
        write_result(out, kept, Context(POLICY.disclosure, False))
        assert repr(unpack_result(pack_result(kept))) == repr(kept)
        assert unpack_evidence(pack_evidence(one.evidence)) == one.evidence
    sizes = sum(len(_bytes(one.result)) + 16 for one in outcome.answers)
    assert sizes <= parsed.quote(at, Charges())
    return outcome


def _bytes(result):
    from millpond.hub.body import ReleasedResult, encode

    return encode(ReleasedResult(releasable(result)), Context(POLICY.disclosure, False))


def verdict(answer):
    return judge(answer.result, answer.evidence, (), POLICY.disclosure)


def held(vault, outcome):
    (made,) = outcome.made
    return vault.projects.hold("one", made.kind, made.name, made.target, model="m", detail=made.detail).handle.hex()


R = "0" * 16
GOOD = probe(R)
BAD = {
    "no kind": {**GOOD, "kind": "shell"},
    "unknown field": {**GOOD, "code": "import os"},
    "unknown estimator": {**GOOD, "estimator": {"name": "os.system", "params": {}}},
    "unknown parameter": probe(R, callback="x"),
    "parameter out of range": probe(R, name="LogisticProbe", C=0.0),
    "parameter not finite": probe(R, name="LogisticProbe", C=float("inf")),
    "autoencoder as a probe": probe(R, name="BatchTopKSae", d_sae=4),
    "name for a handle": {**GOOD, "train": rows("shared")},
    "handle with a slash": {**GOOD, "train": rows("../../../../x")},
    "split by nothing": {**GOOD, "train": {"run": R, "split": {"test": 1.0}, "part": "train"}},
    "too many latents": {"kind": "latents", "artifact": R, "hook": HOOK, "rows": rows(R), "latents": [0] * 513},
    "negative latent": {"kind": "latents", "artifact": R, "hook": HOOK, "rows": rows(R), "latents": [-1]},
    "two hooks of an autoencoder": {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": {"d_sae": 4, "k": 2}}, "hooks": list(HOOKS),
        "rows": rows(R), "tokens": 10,
    },
    "device of an autoencoder": {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": {"d_sae": 4, "k": 2, "device": "cuda"}},
        "hooks": [HOOK], "rows": rows(R), "tokens": 10,
    },
    "values that are no base64": {"kind": "graph", "graph": "{}", "values": "!", "hook": HOOK, "rows": rows(R)},
    "expression of another run": {
        "kind": "expression", "rows": rows(R), "expression": {"run": "1" * 16, "reduce": {"op": "mean", "of": {"op": "position"}}},
    },
    "groups of a histogram": {
        "kind": "expression", "rows": rows(R),
        "expression": {"run": R, "reduce": {"op": "histogram", "by": "x", "of": {"op": "position"}}},
    },
    "path of a model's prompts": {"kind": "capture", "model": "m", "name": "x", "prompts": "/etc/passwd", "hooks": [HOOK]},
    "name with a slash": {"kind": "capture", "model": "m", "name": "../x", "prompts": R, "hooks": [HOOK]},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_job_is_refused_before_anything_is_looked_up(name):
    parse_job(GOOD)
    with pytest.raises(InvalidInput, match="job: "):
        parse_job(BAD[name])


def test_a_kind_is_what_its_file_says():
    assert set(KINDS) >= {
        "probe",
        "evaluate",
        "sweep",
        "release",
        "expression",
        "statistics",
        "sae_train",
        "latents",
        "graph",
        "capture",
    }
    assert all(name == model.model_fields["kind"].annotation.__args__[0] for name, model in KINDS.items())


def test_a_probe_is_fitted_measured_released_and_measured_again(vault, run):
    outcome = do(vault, probe(run))
    (answer,) = outcome.answers
    assert answer.result.kind == "probe-evaluation"
    assert answer.result["auroc"] == pytest.approx(0.983, abs=0.01)  # two normals 3 apart: Phi(3 / sqrt 2)
    assert verdict(answer).outcome == "pass"
    view = vault.lake["shared"]
    train, test = view.split(0.25, 1)
    assert answer.evidence.rows == min(len(train), len(test)) == answer.result.evidence["rows"]
    artifact = held(vault, outcome)

    (again,) = do(
        vault, {"kind": "evaluate", "artifact": artifact, "hook": HOOK, "label": "true", "rows": rows(run, "test")}
    ).answers
    assert again.result.values["auroc"] == answer.result.values["auroc"]
    assert again.result.intervals == answer.result.intervals

    (released,) = do(vault, {"kind": "release", "artifact": artifact}).answers
    x, y = train[HOOK].values, train.labels["true"].values
    means = x[y].astype(np.float64).mean(axis=0) - x[~y].astype(np.float64).mean(axis=0)
    direction = np.asarray(released.result["direction"])
    assert direction @ means / np.linalg.norm(direction) / np.linalg.norm(means) == pytest.approx(1, abs=1e-6)
    assert released.evidence.class_rows == (int((~y).sum()), int(y.sum()))
    within = [x[y == value].astype(np.float64).var(axis=0).sum() for value in (False, True)]
    whole = vault.data_.astype(np.float64).var(axis=0).sum()
    assert released.evidence.variance_ratio == pytest.approx(min(within) / whole, rel=1e-6)
    assert released.evidence.identical_share == pytest.approx(1 / min(released.evidence.class_rows))
    assert verdict(released).outcome == "pass"


def test_a_probe_of_numbers_is_a_regression_and_its_direction_solves_the_normal_equations(vault, run):
    x = vault.data_[:, 0]
    vault.run(run).labels.add(label_mark("one") + "height", x.astype(np.float64))
    outcome = do(vault, probe(run, name="RidgeProbe", label="height"))
    assert outcome.answers[0].result.kind == "regression-evaluation"
    assert outcome.answers[0].result["r2"] == pytest.approx(1, abs=1e-3)


def test_a_sweep_answers_once_a_label_in_the_declared_order(vault, run):
    job = {
        "kind": "sweep", "estimator": {"name": "LogisticProbe", "params": {"C": [0.01, 1.0]}}, "hooks": ["blocks.*"],
        "labels": ["true"], "train": rows(run, "train"), "test": rows(run, "test"),
    }  # fmt: skip
    (answer,) = do(vault, job).answers
    auroc = np.asarray(answer.result["auroc"])
    assert auroc.shape == (2 * 2 * 2,)  # hooks, strengths, and the controls
    assert auroc[:2] == pytest.approx(0.5, abs=0.1)
    assert auroc[2:4] == pytest.approx(0.983, abs=0.02)
    assert auroc[4:] == pytest.approx(0.5, abs=0.1)
    assert verdict(answer).outcome == "pass"


def expression(run, reduce, where=None):
    return {"kind": "expression", "rows": rows(run, where=where), "expression": {"run": run, "reduce": reduce}}


AXIS = {"op": "project", "of": {"op": "activations", "hook": HOOK}, "directions": [[1.0] + [0.0] * (D - 1)]}


def test_expressions_have_the_values_and_intervals_of_their_rows(vault, run):
    x, y = vault.data_[:, 0].astype(np.float64), vault.marks_
    (grouped,) = do(vault, expression(run, {"op": "mean", "of": AXIS, "by": "true"})).answers
    assert np.allclose(grouped.result["means"], [x[~y].mean(), x[y].mean()], atol=1e-6)
    # clusters of 20 rows: the standard error of a ratio of sums by prompt
    by_prompt = [
        (y[i * 20 : i * 20 + 20].sum(), x[i * 20 : i * 20 + 20][y[i * 20 : i * 20 + 20]].sum()) for i in range(PROMPTS)
    ]
    n, s = map(np.array, zip(*by_prompt, strict=True))
    error = np.sqrt(PROMPTS / (PROMPTS - 1) * ((s - n * s.sum() / n.sum()) ** 2).sum()) / n.sum()
    low, high = grouped.result["means_low"][1], grouped.result["means_high"][1]
    assert (high - low) / 2 / 1.959963984540054 == pytest.approx(error, rel=1e-6)
    (mean,) = do(vault, expression(run, {"op": "mean", "of": {"op": "activations", "hook": HOOK}})).answers
    assert np.allclose(mean.result["mean"], vault.data_.mean(axis=0), atol=1e-5)
    assert verdict(mean).outcome == "pass"
    (top,) = do(vault, expression(run, {"op": "top", "of": AXIS, "n": 3})).answers
    best = np.argsort(-x)[:3]
    assert np.array_equal(top.result["contexts"], np.stack([best // 20, best % 20], axis=1))
    (bins,) = do(vault, expression(run, {"op": "histogram", "of": AXIS, "bins": 4, "low": -8.0, "high": 8.0})).answers
    assert np.array_equal(bins.result["counts"], np.histogram(x, 4, (-8, 8))[0])
    assert set(bins.result.values) == {"counts"}
    (middle,) = do(vault, expression(run, {"op": "quantiles", "of": AXIS, "q": [0.5]})).answers
    assert middle.result["means"][0] == pytest.approx(np.quantile(x, 0.5, method="inverted_cdf"), abs=1e-4)
    (r,) = do(
        vault, expression(run, {"op": "correlation", "of": AXIS, "other": {"op": "label", "name": "true"}})
    ).answers
    assert r.result["similarity"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_statistics_are_those_of_the_chosen_rows(vault, run):
    (answer,) = do(
        vault, {"kind": "statistics", "rows": rows(run, where="true and source == 's1'"), "hook": HOOK}
    ).answers
    chosen = vault.marks_ & (np.arange(PROMPTS * 20) // 20 % 4 == 1)
    x = vault.data_[chosen].astype(np.float64)
    assert answer.result["mean"] == pytest.approx(x.mean(), abs=1e-6)
    assert answer.result["sd"] == pytest.approx(x.std(), rel=1e-6)
    assert answer.result["norm"] == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-6)
    low, high = answer.result.intervals["norm"]
    assert low < answer.result["norm"] < high


def test_an_autoencoder_is_trained_kept_and_looked_at(vault, run):
    job = {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": {"d_sae": 16, "k": 4, "batch_size": 64}},
        "hooks": [HOOK], "rows": rows(run, "train"), "tokens": 20_000, "test": rows(run, "test"),
    }  # fmt: skip
    outcome, again = do(vault, job), do(vault, job)
    (answer,) = outcome.answers
    assert 0.4 < answer.result["explained_variance"] < 1
    assert pack_result(releasable(answer.result)) == pack_result(releasable(again.answers[0].result))
    artifact = held(vault, outcome)
    with pytest.raises(InvalidInput, match="may not leave"):
        parse_job({"kind": "release", "artifact": artifact}).quote(vault, Charges())
    looked = do(
        vault,
        {"kind": "latents", "artifact": artifact, "hook": HOOK, "rows": rows(run), "latents": [3, 1], "contexts": 2},
    )
    assert [one.result.kind for one in looked.answers] == ["latent"] * 2
    assert looked.answers[0].result["contexts"].shape == (2, 2)
    (measured,) = do(vault, {"kind": "evaluate", "artifact": artifact, "hook": HOOK, "rows": rows(run, "test")}).answers
    assert measured.result["fvu"] == answer.result["fvu"]


def test_a_graph_of_the_clients_own_is_measured_and_its_statistic_is_for_review(vault, run):
    import torch

    from millpond.hub.trace import trace

    class Score(torch.nn.Module):
        def forward(self, x):
            return {"scores": x[:, 0], "statistic": x.mean(dim=0)}

    graph, values = trace(Score(), D)
    job = {
        "kind": "graph", "graph": graph, "values": base64.b64encode(values).decode(), "hook": HOOK, "label": "true",
        "rows": rows(run), "batch_rows": 100,
    }  # fmt: skip
    scored, statistic = do(vault, job).answers
    assert scored.result["auroc"] == pytest.approx(0.983, abs=0.01)
    assert verdict(scored).outcome == "pass"
    assert np.allclose(statistic.result["means"], vault.data_.mean(axis=0), atol=1e-5)
    assert verdict(statistic).rules == (Rule.CUSTOM_OUTPUT,)


WEIGHED = {"op": "multiply", "left": {"op": "activations", "hook": HOOK}, "right": {"op": "label", "name": "true"}}
MEAN = {"op": "mean", "of": AXIS}
ATTACKS = {
    "mean of one row": ("shared", "own", MEAN, "prompt == 3 and position == 2", "refuse", Rule.NO_VARIANCE),
    "mean weighed by a label": ("shared", "own", MEAN | {"of": WEIGHED}, None, "review", Rule.CUSTOM_OUTPUT),
    "mean of a steered run": ("steered", "own", MEAN, None, "review", Rule.INTERVENED),
    "one prompt many times": ("copies", "restricted", MEAN, None, "refuse", Rule.TOO_FEW_PROMPTS),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_evidence_shows_what_a_result_would_give_away(vault, name):
    run, kind, reduce, where, outcome, rule = ATTACKS[name]
    (answer,) = do(vault, expression(vault.handles[run, kind], reduce, where)).answers
    found = verdict(answer)
    assert found.outcome == outcome
    assert rule in found.rules


@pytest.mark.parametrize("where", ["prompt < 19", "prompt == 3", "prompt > 1000"])
def test_few_prompts_of_somebody_else_are_not_selected_at_all(vault, where):
    with pytest.raises(TooFewPrompts, match="fewer than 20 restricted prompts"):
        do(vault, expression(vault.handles["shared", "restricted"], MEAN, where))


@pytest.mark.parametrize("whose", ["own", "restricted"])
def test_rates_by_a_probe_are_judged_by_whose_rows_it_was_fitted_to(vault, whose):
    """A probe's mean score of own completions is an equation for what it was fitted to, and so is a steered rate."""
    source = vault.handles["shared", whose]
    outcome = do(vault, probe(source, test=False) | {"train": rows(source)})
    handle = held(vault, outcome)
    common = {"kind": "generate", "model": "m", "prompts": [{"id": "a", "text": "b"}], "sampling": {"max_tokens": 1}}
    add = {"op": "add", "hook": HOOK, "vector": handle}
    for more in (
        {"score": {"probe": handle, "threshold": 0.0}},
        {"score": {"contains": ["x"]}, "interventions": [add]},
    ):
        evidence = _evidence(parse_job(common | more), vault, np.arange(200), ())
        assert evidence.custom == (whose == "restricted")
        found = judge(Result("rates", {"rates": np.array([0.5])}), evidence, (), Disclosure())
        assert found.outcome == ("review" if whose == "restricted" else "pass")


@pytest.mark.parametrize("name", ["MassMeanProbe", "RidgeProbe"])
def test_a_direction_fitted_to_one_row_is_refused(vault, run, name):
    n = PROMPTS * 20
    if name == "MassMeanProbe":
        label = np.arange(n) == 77  # one row of a class
    else:
        label = np.random.default_rng(0).standard_normal(n)  # a number far out
        label[77] = 1e4
    vault.run(run).labels.add(label_mark("one") + f"spike{len(name)}", label)
    vault._runs.clear()
    outcome = do(vault, probe(run, test=False, name=name, label=f"spike{len(name)}") | {"train": rows(run)})
    (answer,) = do(vault, {"kind": "release", "artifact": held(vault, outcome)}).answers
    found = verdict(answer)
    assert found.outcome == "refuse"
    assert set(found.rules) & {Rule.NO_VARIANCE, Rule.IDENTICAL_ROWS}


def test_another_projects_labels_and_runs_are_not_there(vault, run):
    vault.run(run).labels.add(label_mark("two") + "secret", np.zeros(PROMPTS * 20, bool))
    vault._runs.clear()
    for label in ("secret", label_mark("two") + "secret", f"{label_mark('two')}secret@1"):
        with pytest.raises(LabelNotFound):
            do(vault, probe(run, label=label))
        with pytest.raises((LabelNotFound, InvalidInput)):
            do(vault, {"kind": "statistics", "rows": rows(run, where=label.replace("@1", " @ 1")), "hook": HOOK})
    with pytest.raises(NotHeld):
        do(dataclasses.replace(vault, project="two", _runs={}), probe(run))


def test_labels_are_those_of_the_moment_of_submission(vault, run):
    name = label_mark("one") + "moving"
    vault.run(run).labels.add(name, vault.marks_)
    vault._runs.clear()
    job = parse_job({"kind": "statistics", "rows": rows(run, where="moving"), "hook": HOOK})
    pins = vault.pin(job)
    vault.run(run).labels.add(name, ~vault.marks_)
    at = dataclasses.replace(vault, _runs={}, pins=pins)
    assert job.run(at, lambda _: None).answers[0].result["mean"] == pytest.approx(
        vault.data_[vault.marks_].mean(), abs=1e-5
    )


def test_weights_are_found_wherever_they_stand():
    from millpond.hub.summaries import mixes

    axis, label = ex.Project.model_validate(AXIS), ex.Label(name="x")
    deep = ex.Norm(
        of=ex.Arithmetic(
            op="add", left=ex.Constant(value=1), right=ex.Arithmetic(op="multiply", left=axis, right=label)
        )
    )
    assert mixes(ex.Mean(of=deep))
    assert mixes(ex.Correlation(of=axis, other=ex.Arithmetic(op="subtract", left=ex.Position(), right=axis)))
    assert not mixes(ex.Correlation(of=axis, other=label))
    assert not mixes(ex.Mean(of=ex.Compare(op="greater", left=axis, right=ex.Constant(value=0))))
