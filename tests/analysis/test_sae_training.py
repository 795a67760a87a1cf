"""Resuming, training several at once, transcoders and crosscoders, and workers that train together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr

from millpond.analysis import (
    BatchTopKSae,
    Crosscoder,
    SkipTranscoder,
    TopKSae,
    Transcoder,
    following,
    train_together,
)
from millpond.analysis.sae.estimator import JumpReluSae, MatryoshkaSae, ReluSae, Sae
from millpond.analysis.sae.scaling import geometric_median
from millpond.store.errors import HookNotCaptured, InvalidInput, LakeCorrupt
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = "blocks.0.hook_resid_post"
OPTIONS = {"batch_size": 256, "progress": False, "n_threads": 1}


def rows(n=4096, d=32, seed=0, chunk=512, attrs=None):
    """Sums of few of 48 unit directions, far from 0, as a run gives them."""
    directions = np.random.default_rng(99).standard_normal((48, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng([seed, n])
    on = rng.random((n, 48)) < 3 / 48
    x = (7 * (on * (1 + np.abs(rng.standard_normal((n, 48))))) @ directions + 50).astype(np.float32)
    number = da.from_array(np.arange(n), chunks=chunk)
    return xr.DataArray(
        da.from_array(x, chunks=(chunk, -1)),
        dims=("row", "d_model"),
        coords={"prompt": ("row", number // 10), "token_id": ("row", number % 7)},
        attrs=attrs or {"run": "r", "hook": "h"},
    )


TRAIN = """
import sys
sys.path.insert(0, {here!r})
import test_sae_training as t
t.Sae(64, {k}, architecture={architecture!r}, checkpoint_every=7, log_every=1, buffer_bytes=1 << 18, dead_tokens=1024,
      **t.OPTIONS).fit(t.rows(), tokens=60 * 256, epochs=4, out=sys.argv[1], resume=True).save(sys.argv[1] + "/done")
"""


@pytest.mark.parametrize(("architecture", "k"), [("batchtopk", 3), ("jumprelu", None)])
def test_a_killed_and_resumed_training_is_an_uninterrupted_one_to_the_bit(tmp_path, architecture, k):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", TRAIN.format(here=here, k=k, architecture=architecture)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    for at in (9, 30):
        process = subprocess.Popen([*command, str(out)], env=environment)
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= at:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        held = torch.load(out / "checkpoint.pt", weights_only=True)
        assert held["step"] >= at // 7 * 7
    assert not (out / "done").exists()
    for folder in (out, tmp_path / "whole"):
        assert subprocess.run([*command, str(folder)], env=environment).returncode == 0
    one, two = (Sae.load(folder / "done") for folder in (out, tmp_path / "whole"))
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        np.testing.assert_array_equal(getattr(one.weights_, name), getattr(two.weights_, name))
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (out, tmp_path / "whole")
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, 61))
    assert lines[0] == lines[1]


def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path):
    sae = BatchTopKSae(64, 3, checkpoint_every=4, **OPTIONS)
    sae.fit(rows(), tokens=10 * 256, out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InvalidInput, match=r"resume=True \(--resume\) to go on"):
        sae.fit(rows(), tokens=10 * 256, out=tmp_path)
    with pytest.raises(InvalidInput, match="its k is 3, this one's 4"):
        BatchTopKSae(64, 4, **OPTIONS).fit(rows(), tokens=10 * 256, out=tmp_path, resume=True)
    with pytest.raises(InvalidInput, match=r"width \[32\], X has \[20\]"):
        sae.fit(rows(d=20), tokens=10 * 256, out=tmp_path, resume=True)
    with pytest.raises(InvalidInput, match="its rows is 4096, this one's 3840"):
        sae.fit(rows(3840), tokens=10 * 256, out=tmp_path, resume=True)
    with pytest.raises(InvalidInput, match="its tokens is 2560, this one's 2816"):
        sae.fit(rows(), tokens=11 * 256, out=tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    (tmp_path / "checkpoint.pt").write_bytes(before[:1000])
    with pytest.raises(LakeCorrupt, match="cannot be read"):
        sae.fit(rows(), tokens=10 * 256, out=tmp_path, resume=True)


def test_tensorboard_is_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InvalidInput, match="tensorboard is not installed"):
        BatchTopKSae(64, 3, tensorboard=True, **OPTIONS).fit(rows(), out=tmp_path)


def test_a_finished_training_resumes_to_its_own_weights(tmp_path):
    sae = BatchTopKSae(64, 3, **OPTIONS).fit(rows(), out=tmp_path)
    again = BatchTopKSae(64, 3, **OPTIONS).fit(rows(), out=tmp_path, resume=True)
    np.testing.assert_array_equal(sae.W_dec_, again.W_dec_)
    np.testing.assert_array_equal(sae.threshold_, again.threshold_)


def test_a_resumed_stream_goes_on_where_it_was(tmp_path):
    x = rows().values
    every = [x[i % 2 * 2048 : (i % 2 + 1) * 2048] for i in range(16)]

    def fit(batches, out=None):
        sae = BatchTopKSae(64, 3, checkpoint_every=5, **(OPTIONS | {"batch_size": 2048}))
        return sae.fit(batches, tokens=16 * 2048, out=out, resume=True).weights_

    whole = fit(iter(every))
    with pytest.raises(InvalidInput, match="ended after 26,624 of 32,768 rows"):
        fit(iter(every[:13]), tmp_path)
    resumed = fit(iter(every), tmp_path)
    np.testing.assert_array_equal(whole.w_dec, resumed.w_dec)
    np.testing.assert_array_equal(whole.threshold, resumed.threshold)


def test_a_resumed_run_stream_reads_nothing_of_what_came_before(run, tmp_path, monkeypatch):
    from millpond.store import stream as streams

    batch_rows, steps, kept = 1024, 40, 30
    read, original = [], streams.read_rows_to

    def counted(path, array, start, out, place):
        read.append(len(place))
        original(path, array, start, out, place)

    monkeypatch.setattr(streams, "read_rows_to", counted)

    def fit(out, **options):
        stream = run.stream(run.hooks[0], batch_rows, buffer_rows=batch_rows, **options)
        sae = BatchTopKSae(32, 3, checkpoint_every=kept, **(OPTIONS | {"batch_size": batch_rows}))
        return sae.fit(stream, tokens=steps * batch_rows, out=out, resume=True).weights_

    whole = fit(tmp_path / "whole")
    assert sum(read) >= steps * batch_rows
    with pytest.raises(InvalidInput, match="X ended after"):
        fit(tmp_path / "short", epochs=kept * batch_rows // run.n_rows + 2)
    read.clear()
    resumed = fit(tmp_path / "short")
    np.testing.assert_array_equal(whole.w_dec, resumed.w_dec)
    np.testing.assert_array_equal(whole.threshold, resumed.threshold)
    # the batches left, and at most the groups of rows begun before and read ahead
    assert sum(read) <= (steps - kept + 3) * batch_rows
    with pytest.raises(InvalidInput, match="its start is"):
        fit(tmp_path / "short", seed=1)


@pytest.fixture
def growing(tmp_path):
    """An open run, and a function that commits prompts of 512 rows, each with its number in the first column."""
    lake = open_lake(tmp_path / "lake", create=True)
    sizes = {"d_model": 16, "dtype": "float32", "chunk_rows": 64, "shard_rows": 256}
    spec = lake.create_run("grown", hooks=(HOOK,), provenance={}, **sizes)
    writer, steps = RunWriter(lake.run_folder("grown"), spec), np.arange(512, dtype=np.int32)

    def commit(prompts):
        for number in prompts:
            x = np.random.default_rng(number).standard_normal((512, 16)).astype(np.float32)
            x[:, 0] = (512 * number + steps) / 20_000
            writer.append(CapturedRequest(f"p{number}", steps, 512, steps, {HOOK: x}))
        writer.commit()

    return lake, commit


def test_a_training_follows_a_run_while_it_is_captured(growing, tmp_path):
    lake, commit = growing
    metrics, steps_before_the_end = tmp_path / "sae" / "metrics.jsonl", []

    def write():
        for first in range(0, 34, 2):
            commit(range(first, first + 2))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 17):
            time.sleep(0.01)
        steps_before_the_end.append(metrics.read_text().count("\n"))
        commit(range(34, 40))
        seal_run(lake.run_folder("grown"))

    writer = threading.Thread(target=write)
    writer.start()
    sae = BatchTopKSae(32, 3, log_every=1, **(OPTIONS | {"batch_size": 1024}))
    sae.fit(following(lake["grown"], HOOK, 1024, poll_s=0.01), tokens=40 * 512, out=metrics.parent)
    writer.join()
    assert steps_before_the_end == [17]
    assert metrics.read_text().count("\n") == 20
    with pytest.raises(InvalidInput, match="ended after 20,480 of 21,504 rows"):
        sae.fit(following(lake["grown"], HOOK, 1024), tokens=42 * 512)


def test_following_gives_each_row_once_and_a_resumed_training_what_is_left(growing, tmp_path):
    lake, commit = growing
    commit(range(30))
    commit(range(30, 34))

    def fit():
        sae = BatchTopKSae(32, 3, checkpoint_every=17, **(OPTIONS | {"batch_size": 1024}))
        batches = following(lake["grown"], HOOK, 1024, consumer="sae", timeout_s=0)
        return sae.fit(batches, tokens=40 * 512, out=tmp_path / "sae", resume=True)

    with pytest.raises(InvalidInput, match="ended after 17,408 of 20,480 rows"):
        fit()
    commit(range(34, 40))
    views = list(following(lake["grown"], HOOK, 900, consumer="probe", timeout_s=0))
    numbers = np.rint(np.concatenate(views)[:, 0] * 20_000).astype(int)
    assert len(numbers) == len(set(numbers)) == 40 * 512 // 900 * 900
    assert np.abs(np.diff(numbers[:900])).mean() > 3000  # neighbours are mixed
    assert fit().trained_on_["tokens"] == 40 * 512
    with pytest.raises(InvalidInput, match="consumer is not given"):
        next(following(lake["grown"], HOOK, 900).batches(3))
    with pytest.raises(HookNotCaptured, match=r"blocks\.9"):
        following(lake["grown"], "blocks.9.hook_resid_post")


FOLLOW = """
import sys
sys.path.insert(0, {here!r})
import test_sae_training as t
t.follow_to_the_end(t.open_lake(sys.argv[1]), sys.argv[2])
"""


def follow_to_the_end(lake, out):
    sae = Sae(32, 3, architecture="batchtopk", checkpoint_every=7, log_every=1, **OPTIONS)
    batches = following(lake["grown"], HOOK, 256, consumer="sae", view_rows=1000, buffer_bytes=1 << 16, poll_s=0.01)
    sae.fit(batches, tokens=110 * 256, out=out, resume=True).save(f"{out}/done")


def test_segments_are_dropped_behind_a_training_that_is_killed_and_goes_on_to_the_bit(growing, tmp_path):
    """The run grows in one lake, which keeps all, and segment by segment in another, which drops what was used."""
    kept, commit = growing
    commit(range(40))
    shutil.copytree(kept.folder, tmp_path / "dropping")
    lake = open_lake(tmp_path / "dropping")
    lake.retain("grown", ["sae"], grace_s=0)
    source, target, out = kept.run_folder("grown"), lake.run_folder("grown"), tmp_path / "killed"

    def grow():
        for number in range(40, 60):
            commit([number])
            for path in sorted(source.glob("commits/*.json")):
                if not (target / "segments" / path.stem).exists() and path.stem not in copied:
                    shutil.copytree(source / "segments" / path.stem, target / "segments" / path.stem)
                    shutil.copy(path, target / f".{path.name}")
                    (target / f".{path.name}").rename(target / "commits" / path.name)
                    copied.add(path.stem)
            time.sleep(0.05)

    copied = {path.stem for path in source.glob("commits/*.json")}
    writer = threading.Thread(target=grow)
    command = [sys.executable, "-c", FOLLOW.format(here=str(Path(__file__).parent)), str(lake.folder), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for at in (20, 60):
        process = subprocess.Popen(command, env=environment)
        if not writer.ident:
            writer.start()
        wait_for(lambda at=at, process=process: len(metrics_of(out)) >= at or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    writer.join()
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    dropped = lake["grown"].n_dropped_rows
    assert 0 < dropped <= checkpoint * 256
    assert subprocess.run(command, env=environment).returncode == 0
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 111))
    assert lake["grown"].n_dropped_rows > dropped
    held = sum(path.stat().st_size for path in target.glob("segments/**/c/*/0"))
    assert held < 0.2 * sum(path.stat().st_size for path in source.glob("segments/**/c/*/0"))
    # the same views, from the lake that keeps all, without a kill
    for path in sorted((target / "consumers" / "sae").iterdir()):
        given = source / "consumers" / "sae" / f"given-{path.name.removeprefix('given-')}"
        given.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, given)
    follow_to_the_end(kept, tmp_path / "whole")
    one, two = (Sae.load(folder / "done") for folder in (out, tmp_path / "whole"))
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        np.testing.assert_array_equal(getattr(one.weights_, name), getattr(two.weights_, name))
    (out / "checkpoint.pt").unlink()
    with pytest.raises(InvalidInput, match=r"consumer 'sae' has used [\d,]+ rows, batch 0 begins at row 0"):
        follow_to_the_end(lake, out)


def metrics_of(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.002)
    assert condition()


def test_hooks_that_are_followed_are_aligned_and_train_transcoders_and_crosscoders(tmp_path):
    hooks = (HOOK, "blocks.1.hook_resid_post")
    lake = open_lake(tmp_path / "lake", create=True)
    spec = lake.create_run("two", hooks=hooks, d_model=8, dtype="float32", chunk_rows=64, shard_rows=256)
    writer, steps = RunWriter(lake.run_folder("two"), spec), np.arange(512, dtype=np.int32)
    for number in range(40):
        x = np.random.default_rng(number).standard_normal((512, 8)).astype(np.float32)
        writer.append(CapturedRequest(f"p{number}", steps, 512, steps, {hooks[0]: x, hooks[1]: 2 * x + 1}))
    writer.commit()
    batches = list(following(lake["two"], hooks, 512, timeout_s=0))
    assert len(batches) == 40
    for batch in batches:
        np.testing.assert_array_equal(batch[hooks[1]], 2 * batch[hooks[0]] + 1)
    saes = {"t": SkipTranscoder(16, 2, **OPTIONS), "c": Crosscoder(16, 2, **OPTIONS)}
    train_together(saes, following(lake["two"], hooks, 256, timeout_s=0), tokens=80 * 256, progress=False)
    assert saes["t"].trained_on_ | {"tokens": 0} == {
        "run": "two",
        "hook": HOOK,
        "model": "",
        "hook_out": hooks[1],
        "tokens": 0,
    }
    assert (saes["c"].names_, saes["c"].W_dec_.shape) == (hooks, (16, 16))
    assert saes["t"].evaluate(lake["two"][hooks[0]], lake["two"][hooks[1]]).values["fvu"] < 0.2
    with pytest.raises(InvalidInput, match="name one or several hooks, each once"):
        following(lake["two"], [HOOK, HOOK])


def test_several_trained_on_one_read_are_what_each_is_alone(tmp_path):
    reads = []

    def counted(block):
        reads.append(len(block))
        return block

    x = rows()
    x = x.copy(data=x.data.map_blocks(counted, dtype=np.float32, meta=np.empty((0, 0), np.float32)))
    saes = {"a": BatchTopKSae(64, 3, **OPTIONS), "b": TopKSae(32, 2, **OPTIONS), "c": MatryoshkaSae(48, 4, **OPTIONS)}
    train_together(saes, x, tokens=4096, out=tmp_path, progress=False)
    assert sum(reads) == 4096
    assert sorted(path.parent.name for path in tmp_path.glob("*/metrics.jsonl")) == ["a", "b", "c"]
    alone = TopKSae(32, 2, **OPTIONS).fit(rows(), tokens=4096)
    np.testing.assert_array_equal(saes["b"].W_dec_, alone.W_dec_)
    with pytest.raises(InvalidInput, match="batch_size is 256 for 'a' and 128 for 'b'"):
        train_together({"a": BatchTopKSae(64, 3, **OPTIONS), "b": BatchTopKSae(64, 3, batch_size=128)}, x)


def test_hooks_of_one_read_are_dealt_to_those_that_see_them():
    hooks = {"first": rows(), "second": rows(d=20)}
    saes = {
        "sae": BatchTopKSae(64, 3, **OPTIONS),
        "transcoder": Transcoder(64, 3, **OPTIONS),
        "both": Crosscoder(64, 3, **OPTIONS),
    }
    sees = {"sae": "second", "transcoder": ["first", "second"], "both": ["first", "second"]}
    train_together(saes, hooks, tokens=4096, hooks=sees, progress=False)
    assert saes["sae"].W_enc_.shape == (20, 64)
    assert (saes["transcoder"].W_enc_.shape, saes["transcoder"].W_dec_.shape) == ((32, 64), (64, 20))
    assert saes["both"].W_dec_.shape == (64, 52)
    with pytest.raises(InvalidInput, match="is to see 'third'; X holds first, second"):
        train_together(saes, hooks, tokens=4096, hooks={"sae": "third"})


def test_a_skip_transcoder_learns_a_linear_map_and_its_weights_are_for_raw_rows():
    x = rows(8192)
    mixing = np.random.default_rng(3).standard_normal((32, 20)).astype(np.float32)
    y = xr.DataArray(x.data @ da.from_array(mixing) + 5, dims=("row", "d_model"), attrs={"run": "r", "hook": "h_out"})
    sae = SkipTranscoder(64, 3, **OPTIONS).fit(x, y, tokens=60_000, epochs=10)
    result = sae.evaluate(x, y)
    assert result["fvu"] < 0.01
    assert sae.trained_on_["hook_out"] == "h_out"
    weights, raw = sae.weights_, x.values
    pre = raw @ weights.w_enc + weights.b_enc
    latents = np.where(pre > weights.threshold, pre, 0)
    rebuilt = latents @ weights.w_dec + weights.b_dec + raw @ weights.w_skip
    fvu = np.square(y.values - rebuilt).sum() / np.square(y.values - y.values.mean(0)).sum()
    assert fvu == pytest.approx(result["fvu"], rel=0.02)
    plain = Transcoder(64, 3, **OPTIONS).fit(x, y, tokens=60_000, epochs=10).evaluate(x, y)
    assert 0.02 < plain["fvu"] < 0.3


def test_a_crosscoder_tells_shared_from_private_directions(tmp_path):
    """Two models: 24 directions are in both, 12 in each alone; the second is ten times as long."""
    rng = np.random.default_rng(0)
    names = rng.standard_normal((2, 48, 32))
    names /= np.linalg.norm(names, axis=2, keepdims=True)
    names[0, 36:] = 0
    names[1, 24:36] = 0
    on = (rng.random((16384, 48)) < 3 / 48) * (1 + np.abs(rng.standard_normal((16384, 48))))
    first, second = (on @ names[0]).astype(np.float32), (10 * on @ names[1]).astype(np.float32)
    sae = Crosscoder(64, 3, lr=5e-3, **OPTIONS).fit({"base": first, "chat": second}, tokens=300_000, epochs=20)
    result = sae.evaluate({"base": first, "chat": second})
    assert result["fvu"] < 0.15
    assert {"fvu_0", "fvu_1"} <= result.values.keys()
    folder = sae.save(tmp_path)
    norms = Crosscoder.load(folder).decoder_norms()
    whole = np.concatenate([names[0], names[1]], axis=1)
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    decoder = sae.W_dec_ * np.repeat(sae.factors_, 32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    which = (whole @ decoder.T).argmax(axis=1)
    assert np.median(norms[which[:24]].min(axis=1)) > 0.7
    assert np.median(norms[which[24:36], 1]) < 0.2
    assert np.median(norms[which[36:], 0]) < 0.2
    with pytest.raises(InvalidInput, match="give base, chat"):
        sae.evaluate({"chat": second, "base": first})


def test_runs_with_other_tokens_do_not_make_a_crosscoder():
    one, two = rows(attrs={"run": "a"}), rows(attrs={"run": "b"})
    moved = two.assign_coords(token_id=("row", (two.coords["token_id"].data + (np.arange(4096) == 77)) % 7))
    with pytest.raises(InvalidInput, match="differ in token_id from row 77 on"):
        Crosscoder(64, 3, **OPTIONS).fit({"a": one, "b": moved})


def test_statistics_replace_the_first_rows_and_the_median_is_one():
    from types import SimpleNamespace

    x = rows().values
    known = SimpleNamespace(mean=x.mean(axis=0), variance=x.var(axis=0))
    sae = ReluSae(32, decay=1.0, warmup=0.0, lr=1e-9, **OPTIONS).fit(x[:256], statistics=known)
    np.testing.assert_allclose(sae.b_dec_, x.mean(axis=0), atol=1e-4)
    off = np.concatenate([x, x[:40] + 1e5])
    median = geometric_median(torch.from_numpy(off).double())
    away = torch.from_numpy(off).double() - median
    pull = (away / away.norm(dim=1, keepdim=True)).sum(0)  # 0 at the point of least summed distance
    assert float(pull.norm()) < 1e-2
    sae = ReluSae(32, center="geometric_median", lr=1e-9, **(OPTIONS | {"batch_size": 4136})).fit(off)
    np.testing.assert_allclose(sae.b_dec_, median.numpy(), atol=2e-2)


def test_a_whole_run_is_centred_by_its_ingest_statistics_without_another_read(run, monkeypatch):
    from millpond.store import rows as stored

    hook, reads, original = run.hooks[1], [], stored.read_rows
    every = run.to_numpy(hook).astype(np.float64)

    def counted(path, array, start, stop, out=None):
        reads.append(stop - start)
        return original(path, array, start, stop, out)

    monkeypatch.setattr(stored, "read_rows", counted)

    def center(x, **options):
        reads.clear()
        sae = ReluSae(8, decay=1.0, warmup=0.0, lr=1e-9, **(OPTIONS | options)).fit(x, tokens=256)
        return sae.b_dec_

    tolerance = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(center(run[hook]), every.mean(0), **tolerance)
    assert sum(reads) == run.n_rows  # once, into memory
    np.testing.assert_allclose(center(run[hook], buffer_bytes=1 << 16), every.mean(0), **tolerance)
    assert sum(reads) < run.n_rows  # a group of chunks or two
    np.testing.assert_allclose(center(run.stream(hook, 256)), every.mean(0), **tolerance)
    part = run.split(test=0.5, seed=0)[0]
    off = center(part[hook]) - every.mean(0)
    assert 1e-3 < np.abs(off).max() < 1
    doubled = center(run[hook] * 2)
    assert np.abs(doubled - 2 * every.mean(0)).max() > 1e-3  # not the run's rows: taken from those it saw


def test_jumprelu_learns_its_thresholds_and_pays_for_l0():
    options = OPTIONS | {"bandwidth": 0.05, "sparsity_warmup": 0.0}
    x = rows()
    dense, sparse = (
        JumpReluSae(64, sparsity=weight, **options).fit(x, tokens=80_000, epochs=20).evaluate(x)["l0"]
        for weight in (1e-3, 3e-2)
    )
    assert sparse < 0.7 * dense


@pytest.mark.slow
def test_two_workers_train_one_autoencoder(tmp_path):
    from distributed import Client, LocalCluster

    def leave_this_host():
        from millpond.analysis.sae import shared_memory

        here, number = shared_memory._host(), os.getpid()
        shared_memory._host = lambda: f"host of {number}"
        return here is not None

    x = rows(16384)
    options = {"batch_size": 128, "progress": False, "n_threads": 1, "encoder_dtype": "float32"}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        sae = BatchTopKSae(64, 3, **options).fit(x, tokens=120_000, epochs=8, client=client, out=tmp_path)
        assert all(client.run(leave_this_host).values())
        again = BatchTopKSae(64, 3, **options).fit(x, tokens=120_000, epochs=8, client=client)  # through sockets
        broken = x.copy(data=da.where(da.arange(16384, chunks=512)[:, None] == 5000, np.nan, x.data))
        with pytest.raises(InvalidInput, match="holds NaN or infinity"):
            BatchTopKSae(64, 3, buffer_bytes=1 << 16, **options).fit(broken, client=client)
    np.testing.assert_array_equal(sae.W_dec_, again.W_dec_)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == -(-120_000 // 256) * 256
    alone = BatchTopKSae(64, 3, **(options | {"batch_size": 256})).fit(x, tokens=120_000, epochs=8)
    held_out = rows(3000, seed=5)
    with_two, with_one = (each.calibrate(held_out, 3).evaluate(held_out)["fvu"] for each in (sae, alone))
    assert with_two < 1.15 * with_one + 0.01
