import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from millpond.analysis import LogisticProbe
from millpond.store.errors import HookNotCaptured, InvalidInput

mpl.use("Agg")

RESID = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
LABELS = {"inside": "inside", "deep": lambda run: run.labels["depth"] > 1}


@pytest.fixture(scope="module")
def sweep(parts):
    train, test = parts
    probe = LogisticProbe(progress=False)
    return probe.sweep(train, test, hooks="blocks.*.hook_resid_post", labels=LABELS, C=[0.01, 1.0])


def test_every_hook_label_and_c_is_there_once_with_a_control(sweep, parts):
    table = sweep.table()
    keys = table[["hook", "label", "C", "control"]]
    assert len(keys) == len(keys.drop_duplicates()) == 2 * 2 * 2 * 2
    assert set(table["layer"]) == {0, 2}
    assert set(table["n_train"]) == {len(parts[0])}
    assert set(table["n_test"]) == {len(parts[1])}
    assert set(table["prompts_test"]) == {len(parts[1].prompts)}
    inside = table[table["label"] == "inside"]
    assert set(inside["positives_test"]) == {int(parts[1].labels["inside"].values.sum())}
    assert table["converged"].all()


def test_probes_equal_probes_fitted_alone(sweep, parts):
    train, test = parts
    for (hook, label, C), probe in sweep.probes.items():
        y, truth = (run.labels["inside"] if label == "inside" else run.labels["depth"] > 1 for run in (train, test))
        alone = LogisticProbe(C=C, progress=False).fit(train[hook], y)
        np.testing.assert_allclose(probe.coef_, alone.coef_, atol=1e-4)
        assert probe.C == C
        assert probe.trained_on_ == {"run": "made-up", "hook": hook, "label": label}
        table = sweep.table()
        row = table[(table["hook"] == hook) & (table["label"] == label) & (table["C"] == C) & ~table["control"]].iloc[0]
        scores = alone.decision_function(test[hook])
        assert row["auroc"] == pytest.approx(roc_auc_score(truth.values, scores), abs=1e-4)
        result = alone.evaluate(test[hook], truth)
        assert (row["auroc_low"], row["auroc_high"]) == pytest.approx(result.intervals["auroc"], abs=1e-3)


def test_the_layer_with_the_signal_is_found_and_controls_are_at_chance(sweep):
    table = sweep.table()
    real = table[~table["control"]].set_index(["hook", "label", "C"])["auroc"]
    assert real[RESID[1], "inside", 1.0] > 0.9
    assert real[RESID[0], "inside", 1.0] < 0.65
    assert (table[table["control"]]["auroc"] - 0.5).abs().max() < 0.12
    assert sweep.controls.keys() == sweep.probes.keys()
    key = (RESID[1], "inside", 1.0)
    assert np.linalg.norm(sweep.controls[key].coef_) < np.linalg.norm(sweep.probes[key].coef_) / 2
    assert sweep.best("inside").trained_on_["hook"] == RESID[1]
    assert sweep.best() in sweep.probes.values()
    with pytest.raises(InvalidInput, match="'outside' is not in this sweep, which has inside, deep"):
        sweep.best("outside")


def test_plot_draws_a_line_a_label_and_a_dashed_one_a_control(sweep):
    ax = sweep.plot()
    assert ax.get_xlabel() == "layer"
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 2])
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["inside", "inside (shuffled)"]
    mpl.pyplot.close(ax.figure)


def test_hooks_of_one_layer_are_plotted_by_name(parts):
    ax = LogisticProbe(progress=False).sweep(*parts, hooks="blocks.2.*", labels="inside", control=False).plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"]
    mpl.pyplot.close(ax.figure)


def test_saved_records_are_the_table(sweep, tmp_path):
    folder = sweep.save(tmp_path / "sweep")
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    pd.testing.assert_frame_equal(lines, sweep.table(), check_dtype=False, atol=1e-9)
    saved = json.loads((folder / "table.json").read_text())
    assert len(saved["rows"]) == 16
    assert saved["provenance"]["run"] == "made-up"


def test_reprs(sweep):
    assert repr(sweep) == "<Sweep: 8 probes, 2 hooks, labels inside, deep>"
    assert sweep._repr_html_().count("<tr>") == 16


def test_same_seed_same_sweep(parts):
    def run(seed):
        probe = LogisticProbe(progress=False)
        return probe.sweep(*parts, hooks=RESID[0], labels=["inside"], seed=seed).rows

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hooks": "blocks.9.*", "labels": "inside"}, HookNotCaptured, "blocks.9"),
        ({"hooks": RESID[0], "labels": "depth"}, InvalidInput, "label 'depth' of the training part holds 4 classes"),
        ({"hooks": RESID[0], "labels": []}, InvalidInput, "labels is empty"),
        ({"hooks": RESID[0], "labels": "nowhere"}, InvalidInput, "nowhere"),
        ({"hooks": RESID[0], "labels": "inside", "C": [1.0, -1.0]}, InvalidInput, "numbers above 0"),
        ({"hooks": RESID[0], "labels": {"short": lambda run: np.ones(3)}}, InvalidInput, "shape"),
    ],
)
def test_what_cannot_be_swept_is_refused(parts, arguments, error, words):
    with pytest.raises(error, match=words):
        LogisticProbe(progress=False).sweep(*parts, **arguments)


def test_a_label_with_one_class_in_the_test_part_is_refused(parts):
    train, test = parts

    def source(run):
        return run.labels["inside"].values & (run is train)

    with pytest.raises(InvalidInput, match=r"is False in all .* rows of the test part"):
        LogisticProbe(progress=False).sweep(train, test, RESID[0], {"x": source})


def test_an_autoencoder_trains_on_a_run_and_on_its_stream(parts):
    from millpond.analysis import BatchTopKSae

    train, test = parts
    for source in (train[RESID[1]], train.stream(RESID[1], 128)):
        sae = BatchTopKSae(32, 4, batch_size=128, progress=False, n_threads=1).fit(source, tokens=20_000)
        assert sae.evaluate(test[RESID[1]])["fvu"] < 0.9
    table = sae.top_rows(test[RESID[1]], range(32), n=2)
    assert list(table.columns) == ["latent", "rank", "row", "value", "prompt", "position", "token_id"]
    assert set(table["prompt"]) <= set(test.prompts.index)
