import dask
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.store.errors import HookNotCaptured, InvalidInput, RunOpen

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


def check_view(made, view, kept):
    """`view` holds exactly the rows of the prompts `kept`, against a selection with NumPy alone."""
    rows = np.isin(made.prompt, np.flatnonzero(kept))
    assert len(view) == view.n_rows == rows.sum()
    assert view.prompts.index.tolist() == np.flatnonzero(kept).tolist()
    for hook in (HOOK, OTHER):
        array = view[hook]
        assert array.dims == ("row", "d_model")
        assert array.dtype == np.float32
        assert np.array_equal(array.values, made.float32(hook)[rows])
        for name in ("prompt", "position", "token_id"):
            assert array.coords[name].dtype == np.int32
            assert np.array_equal(array.coords[name].values, getattr(made, name)[rows])
            assert array.coords[name].chunks == (array.chunks[0],)
        for label in view.labels.values():
            assert label.chunks == (array.chunks[0],)
    if view.labels:
        even = np.concatenate([made.even[name] for name in made.table["id"]])
        assert np.array_equal(view.labels["even"].values, even[rows])
        assert np.array_equal(view.labels["source"].values, made.table["source"].to_numpy(str)[made.prompt[rows]])


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20]), min_size=1, max_size=14),
    chunk_rows=st.integers(1, 9),
    chunks=st.integers(1, 3),
    segment_rows=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    data=st.data(),
)
def test_views_equal_a_selection_by_numpy(
    build, tmp_path_factory, lengths, chunk_rows, chunks, segment_rows, dtype, data
):
    made = build(
        lengths,
        dtype=dtype,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * chunks,
        segment_rows=segment_rows,
        folder=tmp_path_factory.mktemp("view") / "lake",
    )
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    check_view(made, made.run.select(kept), kept)
    made.seal()
    check_view(made, made.run, np.ones(len(lengths), bool))
    view = made.run.select(kept)
    check_view(made, view, kept)
    again = np.array(data.draw(st.lists(st.booleans(), min_size=int(kept.sum()), max_size=int(kept.sum()))), bool)
    both = kept.copy()
    both[kept] = again
    check_view(made, view.select(again), both)


def test_split_parts_the_prompts(sealed):
    run = sealed.run
    train, test = run.split(0.3, seed=5)
    assert len(test.prompts) == 4  # 0.3 * 13
    numbers = [*train.prompts.index, *test.prompts.index]
    assert sorted(numbers) == list(range(13))
    check_view(sealed, test, np.isin(np.arange(13), test.prompts.index))
    assert run.split(0.3, seed=5)[1].prompts.index.equals(test.prompts.index)
    assert len({tuple(run.split(0.3, seed=seed)[1].prompts.index) for seed in range(5)}) > 1


def test_split_keeps_groups_together(sealed):
    train, test = sealed.run.split(0.34, by="source")
    assert len(set(test.prompts["source"])) == 1
    assert not set(train.prompts["source"]) & set(test.prompts["source"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": 0}, "between 0 and 1"),
        ({"test": 0.01}, "leaves a part empty"),
        ({"by": "book"}, "by='book' is no column"),
    ],
)
def test_refused_splits(sealed, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        sealed.run.split(**arguments)


def test_refused_selections(sealed):
    run = sealed.run
    for wrong in (np.ones(12, bool), np.ones(13, int)):
        with pytest.raises(InvalidInput, match="give 13 booleans"):
            run.select(wrong)
    marks = pd.Series(np.arange(13) < 4)
    with pytest.raises(InvalidInput, match="another index"):
        run.select(marks.sort_index(ascending=False))
    assert len(run.select(marks).prompts) == 4


def test_hooks_that_are_not_there(sealed):
    for key in ("blocks.2.hook_resid_post", "blocks.*", 3):
        with pytest.raises(
            HookNotCaptured, match=r"run 'made' holds blocks.0.hook_resid_post, blocks.1.hook_mlp_out"
        ) as caught:
            sealed.run[key]
        assert "\n" not in str(caught.value)
    expected = {"run": "made", "run_id": sealed.run.plan.spec.id, "state": "sealed", "hook": HOOK, "model": "toy"}
    assert sealed.run["blocks.0.hook_out"].attrs == expected | {"dtype": "bfloat16"}


def test_any_slice_computes_on_any_scheduler(sealed):
    lazy = sealed.run[HOOK]
    expected = sealed.float32(HOOK)
    for scheduler in ("sync", "threads"):
        with dask.config.set(scheduler=scheduler):
            assert np.array_equal(lazy[37:99:3].values, expected[37:99:3])
            assert np.allclose(lazy.mean("row").values, expected.mean(0))


def test_a_run_stays_as_it_was_opened(opened):
    before = opened.run
    assert before.state == "open"
    with pytest.raises(RunOpen, match="run 'made' is open"):
        before.check_sealed()
    opened.seal()
    assert before.n_rows == opened.run.n_rows == 172
    assert opened.run.check_sealed().counts == {"rows": 172, "prompts": 13, "rows_asked": 172, "tokens": 172}
    assert opened.run.nbytes == 172 * 4 * 2 * 2
