import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from tests.analysis.conftest import HOOKS

from millpond.analysis import LdaProbe, LogisticProbe, MassMeanProbe, RidgeProbe
from millpond.store.errors import (
    HookNotCaptured,
    InvalidInput,
    MissingLabels,
    OneClass,
    OverlappingGroups,
    RunOpen,
    UnknownPrompts,
)
from millpond.store.lake import open_lake
from millpond.store.segment import CapturedRequest, RunWriter

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
        assert probe.trained_on_.items() >= {"run": "made-up", "hook": hook, "label": label}.items()
        assert probe.evaluation_ is sweep.results[hook, label, C]
        table = sweep.table()
        row = table[(table["hook"] == hook) & (table["label"] == label) & (table["C"] == C) & ~table["control"]].iloc[0]
        scores = alone.decision_function(test[hook])
        assert row["auroc"] == pytest.approx(roc_auc_score(truth.values, scores), abs=1e-4)
        result = alone.evaluate(test[hook], truth)
        assert (row["auroc_low"], row["auroc_high"]) == pytest.approx(result.intervals["auroc"], abs=1e-3)
        assert probe.evaluation_.evidence == result.evidence
        assert probe.evaluation_["selectivity"] == row["selectivity"]


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


def test_controls_and_selectivity(sweep, parts):
    """Random directions carry some of the signal, far less than the probe; selectivity is against the shuffled label."""
    table = sweep.table()
    real = table[~table["control"]].set_index(["hook", "label", "C"])
    shuffled = table[table["control"]].set_index(["hook", "label", "C"])["auroc"]
    np.testing.assert_allclose(real["selectivity"], real["auroc"] - shuffled)
    assert real["random_direction"].between(0.4, 0.8).all()
    assert real["random_direction"][RESID[1], "inside", 1.0] < real["auroc"][RESID[1], "inside", 1.0] - 0.1
    with pytest.raises(InvalidInput, match="controls holds 'chance'"):
        LogisticProbe(progress=False).sweep(*parts, RESID[0], "inside", controls=["chance"])


def test_plot_draws_lines_a_label_without_pyplot(sweep):
    figure = sweep.plot()
    [ax] = figure.axes
    assert ax.get_xlabel() == "layer"
    assert [line.get_linestyle() for line in ax.lines] == ["-", ":", "--"] * 2
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 2])
    assert next(text.get_text() for text in ax.get_legend().get_texts()) == "inside"
    assert "<svg" in figure._repr_html_()
    code = (
        "import sys, millpond.store.figures as f; f.new_figure().subplots().plot([1, 2]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hooks_of_one_layer_are_plotted_by_name(parts):
    sweep = LogisticProbe(progress=False).sweep(*parts, hooks="blocks.2.*", labels="inside", controls=())
    [ax] = sweep.plot().axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"]
    assert len(ax.lines) == 1


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
        ({"hooks": RESID[0], "labels": "inside", "alpha": 1.0}, InvalidInput, "alpha is no argument"),
        ({"hooks": RESID[0], "labels": "inside", "groups": "nowhere"}, InvalidInput, "groups='nowhere' is no column"),
        ({"hooks": RESID[0], "labels": []}, InvalidInput, "labels is empty"),
        ({"hooks": RESID[0], "labels": "nowhere"}, InvalidInput, "nowhere"),
        ({"hooks": RESID[0], "labels": "inside", "C": [1.0, -1.0]}, InvalidInput, "a number above 0"),
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

    with pytest.raises(OneClass, match=r"is False in all .* rows of the test part"):
        LogisticProbe(progress=False).sweep(train, test, RESID[0], {"x": source})


def test_an_autoencoder_trains_on_a_run_and_on_its_stream(parts):
    from millpond.analysis import BatchTopKSae

    train, test = parts
    for source in (train[RESID[1]], train.stream(RESID[1], 128)):
        sae = BatchTopKSae(32, 4, batch_size=128, progress=False, n_threads=1).fit(source, tokens=20_000, epochs=16)
        assert sae.evaluate(test[RESID[1]])["fvu"] < 0.9
    table = sae.top_rows(test[RESID[1]], range(32), n=2)
    assert list(table.columns) == ["latent", "rank", "row", "value", "prompt", "position", "token_id"]
    assert set(table["prompt"]) <= set(test.prompts.index)


def test_every_estimator_sweeps_and_mixes_kinds_of_labels(parts):
    train, test = parts
    hooks = list(RESID)
    classes = {"inside": "inside", "depth": "depth"}
    for probe, name, values in [
        (LogisticProbe(progress=False), "C", [0.1, 1.0]),
        (LdaProbe(progress=False), "shrinkage", [0.0, 0.5]),
        (RidgeProbe(task="classification", progress=False), "alpha", [1.0, 10.0]),
        (MassMeanProbe(progress=False), None, None),
        (MassMeanProbe(whiten=True, progress=False), None, None),
    ]:
        sweep = probe.sweep(train, test, hooks, classes, values, n_bootstrap=50)
        table = sweep.table()
        assert len(table) == 2 * 2 * 2 * (len(values) if values else 1)
        assert (name is None) or (name in table)
        best = sweep.best("inside")
        assert type(best) is type(probe)
        assert best.trained_on_["hook"] == RESID[1]
        assert best.evaluation_["auroc"] > 0.85
        assert sweep.best("depth").evaluation_["auroc"] > 0.6
        assert sweep.best("depth").evaluation_.evidence["class_0"] > 0
        hook = best.trained_on_["hook"]
        alone = best.evaluate(test[hook], test.labels["inside"], n_bootstrap=0)
        assert alone["auroc"] == pytest.approx(best.evaluation_["auroc"], abs=1e-6)
    numbers = RidgeProbe(progress=False).sweep(train, test, hooks, "depth", alpha=[1.0, 100.0], n_bootstrap=50)
    best = numbers.best()
    low, high = best.evaluation_.intervals["r2"]
    assert 0.1 < low < best.evaluation_["r2"] < high < 1
    assert numbers.table().query("control")["r2"].max() < 0.05
    assert best.evaluation_["random_direction"] < best.evaluation_["r2"]
    assert numbers.plot().axes[0].get_ylabel() == "R2 on the test part"


def test_best_goes_by_cross_validation_on_the_training_part(parts):
    train, test = parts
    sweep = LogisticProbe(progress=False).sweep(train, test, RESID[1], "inside", C=[1e-4, 1.0], cv=3, n_bootstrap=20)
    table = sweep.table().query("not control").set_index("C")
    alone = LogisticProbe(C=[1e-4, 1.0], cv=3, progress=False).fit(train[RESID[1]], train.labels["inside"])
    np.testing.assert_allclose(table["cv_loss"], alone.cv_results_["loss"], rtol=1e-4)
    assert sweep.best().C == alone.C_ == table["cv_loss"].idxmin()


def test_labels_by_prompt_id(parts):
    train, test = parts
    ids = [*train.prompts["id"], *test.prompts["id"]]
    given = {name: int(name[1:]) % 2 for name in ids}
    probe = MassMeanProbe(progress=False)
    by_id = probe.sweep(train, test, RESID[0], {"odd": given}, n_bootstrap=0)
    series = probe.sweep(train, test, RESID[0], {"odd": pd.Series(given)}, n_bootstrap=0)
    stored = probe.sweep(train, test, RESID[0], {"odd": lambda run: run.labels["topic"] == "topic 1"}, n_bootstrap=0)
    assert by_id.rows == series.rows
    assert by_id.rows[0]["auroc"] == stored.rows[0]["auroc"]
    with pytest.raises(UnknownPrompts, match="1 prompts that the parts do not have, such as 'p999'"):
        probe.sweep(train, test, RESID[0], {"odd": given | {"p999": 1}})
    del given[ids[0]]
    with pytest.raises(MissingLabels, match=f"no value for 1 of .* such as '{ids[0]}'"):
        probe.sweep(train, test, RESID[0], {"odd": given})


def test_labels_of_whole_prompts_are_shuffled_by_prompt(parts):
    from millpond.analysis.controls import shuffle_labels

    train, _ = parts
    prompts, topic = train.tokens["prompt"].values, train.labels["topic"].values
    shuffled = shuffle_labels(topic, prompts, "topic", 0)
    assert (shuffled != topic).any()
    assert all(len(set(shuffled[prompts == prompt])) == 1 for prompt in set(prompts))
    inside = train.labels["inside"].values
    mixed = shuffle_labels(inside, prompts, "inside", 0)
    assert mixed.sum() == inside.sum()
    assert (mixed != inside).mean() > 0.2


def test_parts_that_share_prompts_or_groups_are_refused(run, parts):
    train, test = parts
    probe = LogisticProbe(progress=False)
    with pytest.raises(OverlappingGroups, match=f"share {len(train.prompts)} prompts"):
        probe.sweep(train, run, RESID[0], "inside")
    with pytest.raises(OverlappingGroups, match=r"values of 'path', such as file .*\(by='path'\)"):
        probe.sweep(train, test, RESID[0], "inside", groups="path")
    apart = run.split(test=0.3, seed=1, by="path")
    sweep = probe.sweep(*apart, RESID[0], "inside", groups="path", n_bootstrap=20)
    assert set(sweep.table()["groups_test"]) == {6}
    assert set(sweep.table()["prompts_test"]) == {18}
    assert sweep.best().evaluation_.evidence["groups"] == 6
    fitted = probe.fit(train[RESID[0]], train.labels["inside"])
    with pytest.raises(OverlappingGroups, match=f"fitted to {len(train.prompts)} of the prompts"):
        fitted.evaluate(run[RESID[0]], run.labels["inside"])
    assert fitted.evaluate(run[RESID[0]], run.labels["inside"], allow_overlap=True, n_bootstrap=0)["auroc"] > 0


def test_an_open_run_is_refused(tmp_path, parts):
    lake = open_lake(tmp_path, create=True)
    spec = lake.create_run("growing", hooks=RESID[:1], d_model=4, dtype="float32")
    writer = RunWriter(lake.run_folder("growing"), spec)
    for number in range(4):
        rows = np.zeros((3, 4), np.float32)
        tokens = np.full(3, number, np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, 3, np.arange(3, dtype=np.int32), {RESID[0]: rows}))
    writer.commit()
    train, test = lake["growing"].split(0.5)
    with pytest.raises(RunOpen, match="'growing' is open"):
        LogisticProbe().sweep(train, test, RESID[0], {"x": lambda run: np.arange(len(run)) % 2})
    with pytest.raises(RunOpen, match="'growing' is open"):
        LogisticProbe().fit(train[RESID[0]], np.arange(6) % 2)


def test_every_byte_is_read_once_a_pass_however_many_labels(parts, monkeypatch):
    """Bytes that leave the shards: the same for one label and for forty, and a whole number of the hooks' bytes."""
    import millpond.store.rows as rows_module

    train, test = parts
    read = []
    original = rows_module.read_rows

    def counted(folder, spec, start, stop, out=None):
        found = original(folder, spec, start, stop, out)
        if found.ndim == 2:
            read.append(found.nbytes)
        return found

    monkeypatch.setattr(rows_module, "read_rows", counted)

    def stored(part):
        """A view of some prompts reads from the first of them to the last."""
        return sum((piece.stop - piece.start) * 16 * 4 for span in part.plan.spans for piece in span)

    def bytes_for(n_labels):
        read.clear()
        labels = {f"l{i}": lambda run, i=i: run.labels["depth"] % 2 == i % 2 for i in range(n_labels)}
        MassMeanProbe(progress=False).sweep(train, test, list(RESID), labels, controls=(), n_bootstrap=0)
        return sum(read)

    one = bytes_for(1)
    assert bytes_for(40) == one
    # for each of two hooks: a first look (here one block holds all), one pass to fit, and one over the test part
    assert one == 2 * (2 * stored(train) + stored(test))


def test_hooks_are_fitted_in_batches_with_the_same_bits(parts, monkeypatch):
    from millpond.analysis.probes import moments

    for probe in (LogisticProbe(progress=False), LdaProbe(progress=False), RidgeProbe(progress=False)):
        together = probe.sweep(*parts, list(HOOKS), "depth", n_bootstrap=0).rows
        monkeypatch.setattr(moments, "METRIC_BYTES", 1)
        assert probe.sweep(*parts, list(HOOKS), "depth", n_bootstrap=0).rows == together
        monkeypatch.undo()
