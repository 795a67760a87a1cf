import contextlib
import os
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorstore
import xarray as xr
import zarr

from millpond.store.collect import collect_run
from millpond.store.errors import CaptureFailed, InvalidInput, LakeCorrupt
from millpond.store.lake import open_lake
from millpond.store.objects import open_storage
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.stats import unpack_statistics
from millpond.store.verify import verify_run

HOOK = "blocks.0.hook_resid_post"


def check_whole(made):
    run = made.run
    assert run.state == "sealed"
    for hook in run.hooks:
        assert np.array_equal(run[hook].values, made.float32(hook))
    assert list(run.labels) == ["even", "source"]
    assert verify_run(run).problems == []
    collect_run(open_storage(made.folder), grace_s=0)
    assert verify_run(made.run).problems == []
    names = sorted(path.name for path in made.folder.iterdir())
    assert names == ["closing", run.manifest.data.path, "labels", "manifest.json", "run.json"]


def test_other_libraries_open_a_sealed_run_by_path(sealed):
    folder = sealed.folder / sealed.run.manifest.data.path
    group = zarr.open_group(str(folder), mode="r")
    dataset = xr.open_zarr(folder)
    expected = {**sealed.stored, "prompt": sealed.prompt, "position": sealed.position, "token_id": sealed.token_id}
    assert sorted(group.array_keys()) == sorted(expected)
    for name, values in expected.items():
        driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        assert np.array_equal(group[name][:], values)
        assert np.array_equal(dataset[name].values, values)
        assert np.array_equal(tensorstore.open(driver, read=True).result().read().result(), values)
    assert dataset[HOOK].dims == ("row", "d_model")
    assert dataset[HOOK].attrs == {"millpond:dtype": "bfloat16", "millpond:hook": HOOK, "millpond:hidden_state": 1}
    (array,) = (sealed.folder / "labels" / "even").glob("data-*")
    label = zarr.open_array(str(array), mode="r")
    assert np.array_equal(label[:], sealed.token_id % 2 == 0)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_zarrs_reads_a_sealed_run(build, tmp_path, codec):
    made = build((6, 10, 40), chunk_rows=4, shard_rows=8, folder=tmp_path / "lake", codec=codec)
    made.seal()
    folder = made.folder / made.run.manifest.data.path
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        assert np.array_equal(zarr.open_array(str(folder / HOOK), mode="r")[:], made.stored[HOOK])
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / HOOK)}}
    assert np.array_equal(tensorstore.open(driver, read=True).result().read().result(), made.stored[HOOK])


def test_xarray_opens_a_sealed_run_in_s3(ceph):
    lake = open_lake(ceph.url(uuid.uuid4().hex), create=True, **ceph.options())
    spec = lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8, codec="lz4")
    writer = RunWriter(lake.run_storage("a"), spec)
    positions = np.arange(20, dtype=np.int32)
    rows = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    writer.append(CapturedRequest("p", positions, 20, positions, {HOOK: rows}))
    writer.commit()
    run = seal_run(lake.run_storage("a"))
    url = f"{run.plan.folder.url}/{run.manifest.data.path}"
    dataset = xr.open_zarr(url, storage_options=ceph.options())
    assert np.array_equal(dataset[HOOK].values, rows)
    assert np.array_equal(dataset["position"].values, positions)


def test_sealing_keeps_rows_with_their_tokens(opened):
    before = opened.run
    values, tokens, ids = before[HOOK].values, before.tokens.compute(), before.prompts["id"]
    opened.seal()
    check_whole(opened)
    after = opened.run.tokens.compute()
    one = {(ids[p], q): (t, *row) for p, q, t, row in zip(*(tokens[n].values for n in tokens), values, strict=True)}
    names = opened.run.prompts["id"]
    rows = zip(*(after[n].values for n in after), opened.run[HOOK].values, strict=True)
    assert {(names[p], q): (t, *row) for p, q, t, row in rows} == one


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_sealing_keeps_the_bytes_of_whole_shards(build, tmp_path, codec):
    """Segments of 16, 16, 20 and 5 rows, shards of 8: the first two keep theirs."""
    made = build((6, 10, 16, 20, 5), chunk_rows=4, shard_rows=8, segment_rows=16, folder=tmp_path / "lake", codec=codec)
    inodes = {p.stat().st_ino for p in (made.folder / "segments").glob(f"*/{HOOK}/c/*/0")}
    made.seal()
    data = made.folder / made.run.manifest.data.path
    kept = [(data / HOOK / "c" / str(shard) / "0").stat().st_ino in inodes for shard in range(8)]
    assert kept == [True] * 4 + [False] * 4
    check_whole(made)
    assert np.array_equal(zarr.open_array(str(data / HOOK), mode="r")[:], made.stored[HOOK])
    found = unpack_statistics((data / "statistics.safetensors").read_bytes())[HOOK]
    values = made.float32(HOOK).astype(np.float64)
    assert found.count == len(values) == 57
    assert np.allclose(found.mean, values.mean(0), rtol=1e-6)
    assert np.allclose(found.variance, values.var(0), rtol=1e-5)


class Interrupt(BaseException):
    """As a kill would: nothing of ours catches it."""


def test_an_interruption_at_any_sync_or_rename_can_be_done_again(build, tmp_path, monkeypatch):
    """Every durable step ends in an fsync or a rename; stop before each in turn."""
    steps, stop_at = 0, None

    def stopping(call):
        def wrapped(*arguments, **more):
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise Interrupt
            return call(*arguments, **more)

        return wrapped

    first = build((3, 0, 9), chunk_rows=4, shard_rows=8, folder=tmp_path / "count")
    stopped = build((3, 0, 9), chunk_rows=4, shard_rows=8, folder=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopping(os.fsync))
        patch.setattr(Path, "rename", stopping(Path.rename))
        patch.setattr(Path, "replace", stopping(Path.replace))
        first.seal()
        total, states = steps, []
        assert total > 60
        for step in range(1, total + 1, 4):
            steps, stop_at = 0, step
            with contextlib.suppress(Interrupt):
                stopped.seal()
            run = stopped.run
            states.append(run.state)
            assert run.n_rows == 12
            assert np.array_equal(run[HOOK].values, stopped.float32(HOOK))
            if run.state == "sealed":
                assert list(run.labels) == ["even", "source"]
                break
    assert states.count("open") > 15
    assert stopped.seal().state == "sealed"
    check_whole(stopped)


def test_a_reader_goes_on_across_sealing_and_until_the_grace_period_ends(opened):
    before = opened.run
    values = before[HOOK].values
    opened.seal()
    assert collect_run(open_storage(opened.folder)).paths == []
    assert np.array_equal(before[HOOK].values, values)
    assert "segments" in collect_run(open_storage(opened.folder), grace_s=0).paths
    with pytest.raises(LakeCorrupt, match="is missing"):
        _ = before[HOOK].values
    check_whole(opened)


def test_an_empty_run_can_be_sealed(build, tmp_path):
    made = build([], folder=tmp_path / "lake")
    run = seal_run(made.folder)
    assert (run.state, run.n_rows, len(run.prompts)) == ("sealed", 0, 0)
    assert run[HOOK].values.shape == (0, 4)
    assert verify_run(run).ok


def table(made, **columns):
    return made.table.assign(**columns)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m: {"expected_rows": 173}, CaptureFailed, "holds 172 rows, but 173 were asked for"),
        (lambda m: {"prompts": m.table[:5]}, InvalidInput, "prompt 'p5' was captured but has no metadata"),
        (lambda m: {"prompts": table(m, n_rows=1)}, InvalidInput, "'n_rows' is one of Millpond's own"),
        (lambda m: {"prompts": m.table.drop(columns="id")}, InvalidInput, "no column 'id'"),
        (lambda m: {"prompts": pd.concat([m.table, m.table[:1]])}, InvalidInput, "has id 'p0' more than once"),
        (lambda m: {"prompt_labels": ("mood",)}, InvalidInput, "prompt label 'mood' is no column"),
        (
            lambda m: {"prompts": table(m, x=[None] + [1] * 12), "prompt_labels": ("x",)},
            InvalidInput,
            "'x' has no value for prompt 'p0'",
        ),
        (
            lambda m: {"token_labels": {"even": {}}, "token_label_dtypes": {"even": "bool"}},
            InvalidInput,
            "no values for prompt 'p0'",
        ),
        (lambda m: {"token_labels": {"even": m.even}}, InvalidInput, "has no data type"),
    ],
)
def test_what_does_not_fit_leaves_the_run_open(opened, arguments, error, message):
    with pytest.raises(error, match=message):
        seal_run(opened.folder, **arguments(opened))
    assert opened.run.state == "open"
    assert not list(opened.folder.glob("data-*"))
    opened.seal()
    check_whole(opened)


def test_a_sealed_run_takes_no_other_labels(sealed):
    with pytest.raises(InvalidInput, match="is sealed without the label 'more'"):
        seal_run(sealed.folder, token_labels={"more": {}})
    check_whole(sealed)
