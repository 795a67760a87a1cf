import numpy as np
import pandas as pd
import pytest
from tests.analysis.conftest import HOOKS

from millpond.analysis import LogisticProbe, MassMeanProbe, select_tokens
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = HOOKS[1]


def table(run):
    """Every row of a run in memory, the slow way."""
    rows = run[HOOK]
    frame = pd.DataFrame({name: rows[name].values for name in ("prompt", "position")})
    frame["inside"] = run.labels["inside"].values
    frame["length"] = run.prompts["n_prompt_tokens"].reindex(frame["prompt"]).to_numpy()
    return frame, rows.values


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, lambda f: f["position"] >= 0),
        ({"where": "inside"}, lambda f: f["inside"]),
        ({"where": lambda run: run.labels["depth"] > 2}, None),
        ({"positions": "last"}, lambda f: f["position"] == f["length"] - 1),
        ({"positions": (0, -2)}, lambda f: (f["position"] == 0) | (f["position"] == f["length"] - 2)),
        ({"positions": slice(3, -4)}, lambda f: (f["position"] >= 3) & (f["position"] < f["length"] - 4)),
        ({"where": "inside", "positions": slice(-5, None)}, lambda f: f["inside"] & (f["position"] >= f["length"] - 5)),
    ],
)
def test_chosen_rows_are_those_of_the_whole_table(parts, arguments, wanted):
    run = parts[0]
    frame, rows = table(run)
    marks = (run.labels["depth"].values > 2) if wanted is None else wanted(frame).to_numpy()
    view = select_tokens(run, **arguments, skip_empty=True)
    assert len(view) == marks.sum()
    np.testing.assert_array_equal(view[HOOK].values, rows[marks])
    np.testing.assert_array_equal(view[HOOK]["position"].values, frame["position"][marks])
    np.testing.assert_array_equal(view.labels["inside"].values, frame["inside"][marks])
    assert set(view.prompts.index) == set(frame["prompt"][marks])


@pytest.mark.parametrize("chunk_bytes", [1, 16 * 4 * 100, 1 << 26])
@pytest.mark.parametrize(
    ("pool", "reduce"),
    [("mean", np.mean), ("max", np.max), ("first", lambda a, axis: a[0]), ("last", lambda a, axis: a[-1])],
)
def test_pooled_rows_are_one_a_prompt_however_it_is_cut(parts, pool, reduce, chunk_bytes, monkeypatch):
    from millpond.analysis import selection

    monkeypatch.setattr(selection, "_CHUNK_BYTES", chunk_bytes)
    run = parts[0]
    frame, rows = table(run)
    view = select_tokens(run, positions=slice(2, None), pool=pool)
    assert len(view) == len(run.prompts)
    assert (len(view[HOOK].chunks[0]) > 20) == (chunk_bytes == 1)
    for number, prompt in enumerate(view[HOOK]["prompt"].values):
        mine = rows[(frame["prompt"] == prompt) & (frame["position"] >= 2)]
        np.testing.assert_allclose(view[HOOK].values[number], reduce(mine, axis=0), rtol=1e-5, atol=1e-6)


def test_a_view_takes_the_place_of_a_run(parts):
    """Pooled over the tokens of a prompt, and only at the tokens inside: fit, evaluate and sweep as with a run."""
    train, test = (select_tokens(part, pool="mean") for part in parts)
    sweep = LogisticProbe(progress=False).sweep(train, test, HOOK, "topic", n_bootstrap=20)
    assert set(sweep.table()["n_train"]) == {len(parts[0].prompts)}
    alone = LogisticProbe(progress=False).fit(train[HOOK], train.labels["topic"])
    expected = LogisticProbe(progress=False).fit(train[HOOK].values, train.labels["topic"].values)
    np.testing.assert_allclose(alone.coef_, expected.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sweep.best().coef_, alone.coef_, rtol=1e-4, atol=1e-6)
    assert alone.trained_on_["tokens"] == "mean a prompt"
    assert alone.evidence_["rows"] == alone.evidence_["prompts"] == len(parts[0].prompts)
    deep = [select_tokens(part, where="inside", skip_empty=True) for part in parts]
    labels = {"deeper": lambda view: view.labels["depth"] > 1}
    assert len(MassMeanProbe(progress=False).sweep(*deep, list(HOOKS), labels, n_bootstrap=20).rows) == 6


def test_stretches_between_chosen_rows_are_not_read(parts, monkeypatch):
    import millpond.store.rows as rows_module

    run = parts[0]
    read = []
    original = rows_module.read_rows

    def counted(folder, spec, start, stop, out=None):
        if folder.name == HOOK:
            read.append(stop - start)
        return original(folder, spec, start, stop, out)

    from millpond.analysis import selection

    monkeypatch.setattr(selection, "_GAP_ROWS", 4)
    view = select_tokens(run, positions="last")
    monkeypatch.setattr(rows_module, "read_rows", counted)
    assert len(view[HOOK].values) == len(run.prompts)
    assert sum(read) == len(run.prompts)


def test_prompts_of_uneven_length_across_parts_of_an_open_run(tmp_path):
    """Two commits are two parts; positions are captured from 1; one prompt has a single row."""
    lake = open_lake(tmp_path, create=True)
    spec = lake.create_run("r", hooks=HOOKS[:1], d_model=2, dtype="float32", chunk_rows=4, shard_rows=8)
    folder = lake.run_folder("r")
    writer = RunWriter(folder, spec)
    lengths = [2, 9, 30, 3]
    for number, length in enumerate(lengths):
        positions = np.arange(1, length, dtype=np.int32)
        rows = np.stack([positions, np.full(length - 1, number)], axis=1).astype(np.float32)
        tokens = np.arange(length, dtype=np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, length, positions, {HOOKS[0]: rows}))
        if number == 1:
            writer.commit()
    writer.commit()
    for opened in (lambda: lake["r"], lambda: seal_run(folder)):
        run = opened()
        view = select_tokens(run, pool="mean")
        expected = [[np.arange(1, n).mean(), i] for i, n in enumerate(lengths)]
        np.testing.assert_allclose(view[HOOKS[0]].values, expected)
        last = select_tokens(run.select(np.array([False, True, False, True])), positions="last")
        np.testing.assert_allclose(last[HOOKS[0]].values, [[8, 1], [2, 3]])
        with pytest.raises(InvalidInput, match="3 of 4 prompts have no chosen token"):
            select_tokens(run, positions=(20,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"where": "depth"}, "give one boolean"),
        ({"positions": "middle"}, "positions is 'middle'"),
        ({"positions": ()}, "at least one integer"),
        ({"positions": slice(0, 9, 2)}, "without a step"),
        ({"positions": (500,)}, "no token of the 42 prompts"),
        ({"pool": "sum"}, "pool is 'sum'"),
    ],
)
def test_choices_that_make_no_sense_are_refused(parts, arguments, words):
    with pytest.raises(InvalidInput, match=words):
        select_tokens(parts[0], **arguments)


def test_a_label_that_varies_inside_a_pooled_prompt_is_refused(parts):
    view = select_tokens(parts[0], pool="mean")
    with pytest.raises(InvalidInput, match="label 'inside' varies inside"):
        view.labels["inside"]
    assert len(select_tokens(parts[0], pool="last").labels["inside"]) == len(parts[0].prompts)
