import pickle

import numpy as np
import pytest
import torch

from millpond.store.errors import InvalidInput

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_library_gets_the_same_values(build, tmp_path, dtype):
    made = build((5, 30, 17, 64), dtype=dtype, folder=tmp_path / "lake")
    run, expected = made.run, made.float32(HOOK)
    assert np.array_equal(run.to_numpy(HOOK), expected)
    assert np.array_equal(run.to_torch(HOOK).numpy(), expected)
    assert np.array_equal(run.to_dask(HOOK).compute(), expected)
    tensor = run.to_torch(HOOK, dtype)
    assert tensor.dtype == getattr(torch, dtype)
    assert np.array_equal(tensor.float().numpy(), expected)
    array = run.to_dask(HOOK, dtype)[3:90:2].compute()
    assert array.dtype.name == dtype
    assert np.array_equal(array.astype(np.float32), expected[3:90:2])
    for other in {"bfloat16", "float16", "float64"} - {dtype}:
        with pytest.raises(InvalidInput, match=f"dtype {other!r} is not a view of rows stored as {dtype}"):
            run.to_numpy(HOOK, other)


def test_a_dataset_of_all_hooks(sealed):
    dataset = sealed.run.to_xarray()
    assert list(dataset.data_vars) == [HOOK, OTHER]
    assert dict(dataset.sizes) == {"row": 172, "d_model": 4}
    assert sorted(dataset.coords) == ["label_even", "label_source", "position", "prompt", "token_id"]
    assert all(variable.chunks is not None for variable in dataset.variables.values())
    late = dataset.where((dataset.position > 2).compute(), drop=True)
    assert np.array_equal(late[OTHER].values, sealed.float32(OTHER)[sealed.position > 2])
    means = dataset[HOOK].groupby(dataset["label_even"].compute()).mean().values
    rows, even = sealed.float32(HOOK), sealed.token_id % 2 == 0
    assert np.allclose(means, [rows[~even].mean(0), rows[even].mean(0)], atol=1e-6)
    bits = sealed.run.to_xarray("blocks.1.*", dtype="bfloat16")
    assert list(bits.data_vars) == [OTHER]
    assert bits[OTHER].dtype.name == "bfloat16"


def test_a_lake_is_a_tree_of_runs(sealed):
    sealed.lake.create_run("empty", hooks=(HOOK,), d_model=4, dtype="float32")
    tree = sealed.lake.to_datatree()
    assert sorted(tree.children) == ["empty", "made"]
    assert np.array_equal(tree["made"][HOOK].values, sealed.float32(HOOK))
    assert tree["empty"].sizes["row"] == 0
    assert set(sealed.lake.to_datatree(["made"]).children) == {"made"}


def test_graphs_have_at_most_one_task_a_shard_and_small_tasks(build, tmp_path):
    made = build([7] * 300, chunk_rows=8, shard_rows=64, segment_rows=20, folder=tmp_path / "lake")
    run = made.run
    assert len(run.plan.parts) == 100
    array = run.to_dask(HOOK)
    assert array.npartitions == len(dict(array.dask)) <= 2100 / 64 + 2  # many small parts make one block
    run.labels.add("n", np.arange(300))
    run.labels.add("t", np.arange(2100))
    view = run.select(where="token_id % 2 == 0")
    for lazy in (view.to_dask(HOOK), view.tokens["prompt"].data, view.labels["n"].data, view.labels["t"].data):
        keys = dict(lazy.dask)
        assert len(keys) <= 2100 / 64 + 2
        assert max(len(pickle.dumps(task)) for task in keys.values()) < 10_000
    whole = np.arange(2100)[made.token_id % 2 == 0]
    assert np.array_equal(view.labels["t"].values, whole)
    assert np.array_equal(view.labels["n"].values, whole // 7)
    assert np.array_equal(view[HOOK].values, made.float32(HOOK)[whole])
