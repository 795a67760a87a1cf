import errno
import json
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from millpond.cli import main
from millpond.store.errors import InvalidInput, LakeCorrupt, QuotaExceeded, RunExists, StorageFailed
from millpond.store.exporting import _appearing_whole, export_run
from millpond.store.importing import import_run
from millpond.store.lake import open_lake
from millpond.store.materialise import copy_run
from millpond.store.seal import seal_run
from millpond.store.segment import SegmentWriter
from millpond.store.verify import verify_run

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


TWO_PROMPTS = {"hooks": {"flat": HOOK}, "rows_are": "tokens", "prompts": pd.DataFrame({"id": [1, 2]})}


@pytest.fixture
def lake(tmp_path):
    return open_lake(tmp_path / "lake", create=True)


def arrow_cache(folder, acts, tokens):
    """The files that SAELens' cache runner leaves: Hugging Face's `save_to_disk` of one row a context."""
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "cache_activations_runner_cfg.json").write_text(json.dumps({"hook_name": HOOK, "model_name": "toy"}))
    for number, part in enumerate(np.array_split(np.arange(len(acts)), 2)):
        nested = pa.array([list(map(list, one)) for one in acts[part].astype(object)], pa.list_(pa.list_(pa.float32())))
        table = pa.table({HOOK: nested, "token_ids": pa.array(list(tokens[part]), pa.list_(pa.int32()))})
        with pa.ipc.new_stream(folder / f"data-{number:05d}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)


def test_a_saelens_cache_becomes_a_run(lake, tmp_path):
    rng = np.random.default_rng(0)
    acts, tokens = rng.standard_normal((11, 6, 4)).astype(np.float32), rng.integers(0, 99, (11, 6))
    arrow_cache(tmp_path / "cache", acts, tokens)
    run = import_run(lake, "imported", tmp_path / "cache", "saelens", chunk_rows=8, shard_rows=32, model="toy")
    assert np.array_equal(run[HOOK].values, acts.reshape(-1, 4))
    found = run.tokens.compute()
    assert found["token_id"].values.tolist() == tokens.reshape(-1).tolist()
    assert found["prompt"].values.tolist() == np.repeat(np.arange(11), 6).tolist()
    assert found["position"].values.tolist() == np.tile(np.arange(6), 11).tolist()
    assert run.provenance["imported_from"]["settings"]["model_name"] == "toy"
    assert verify_run(run).problems == []
    assert run.stats[HOOK].count == 66
    assert np.allclose(run.stats[HOOK].mean, acts.reshape(-1, 4).mean(0), atol=1e-6)
    assert np.allclose(run.stats[HOOK].variance, acts.reshape(-1, 4).var(0), atol=1e-6)


def test_a_safetensors_folder_keeps_its_bits(lake, tmp_path):
    acts = torch.randn(2, 3, 5, 4).bfloat16()
    for number in range(2):
        tensors = {HOOK: acts[number], "mlp": -acts[number], "input_ids": torch.arange(15).reshape(3, 5)}
        save_file(tensors, tmp_path / f"part-{number}.safetensors")
    run = import_run(lake, "imported", tmp_path, "safetensors", hooks={"mlp": OTHER}, chunk_rows=4, shard_rows=8)
    assert run.dtype == "bfloat16"
    assert run.hooks == (HOOK, OTHER)
    assert torch.equal(run.to_torch(HOOK, "bfloat16"), acts.reshape(-1, 4))
    assert torch.equal(run.to_torch(OTHER, "bfloat16"), -acts.reshape(-1, 4))
    assert run.tokens["token_id"].values.tolist() == [*range(15), *range(15)]
    assert verify_run(run).ok


@pytest.mark.parametrize("rows_are", ["prompts", "tokens"])
def test_numpy_arrays_with_prompts_of_their_own(lake, tmp_path, rows_are):
    acts = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float16)
    np.save(tmp_path / "acts.npy", acts)
    n = 7 if rows_are == "prompts" else 1
    prompts = pd.DataFrame({"id": [f"q{i}" for i in range(n)], "topic": [f"t{i % 2}" for i in range(n)]})
    given = {"hooks": {"acts": HOOK}, "rows_are": rows_are, "prompts": prompts}
    run = import_run(lake, "imported", tmp_path / "acts.npy", "numpy", **given)
    assert np.array_equal(run[HOOK].values, acts.astype(np.float32))
    assert run.prompts["id"].tolist() == prompts["id"].tolist()
    assert run.prompts["n_rows"].tolist() == ([1] * 7 if n == 7 else [7])
    assert len(run.select(where="topic == 't0'")) == (4 if n == 7 else 7)


def save_odd(folder):
    np.save(folder / "int.npy", np.zeros((2, 3, 4), np.int32))
    np.save(folder / "text.npy", np.array(["a"]))
    np.save(folder / "flat.npy", np.zeros((6, 4), np.float32))
    np.save(folder / "nan.npy", np.full((1, 2, 4), np.nan, np.float32))
    np.savez(folder / "differ.npz", **{HOOK: np.zeros((1, 2, 4), np.float32), OTHER: np.zeros((1, 3, 4), np.float32)})
    np.savez(folder / "tokens.npz", **{HOOK: np.zeros((1, 2, 4), np.float32), "tokens": np.zeros(3, int)})
    (folder / "short.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (folder / "not.arrow").write_bytes(b"nothing")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("file", "form", "more", "message"),
    [
        ("int.npy", "numpy", {"hooks": {"int": HOOK}}, "int has data type int32; activations are F32, F16 or BF16"),
        ("text.npy", "numpy", {}, "text has data type <U1"),
        ("flat.npy", "numpy", {}, "names no hook point: it holds flat"),
        ("flat.npy", "numpy", {"hooks": {"flat": HOOK}}, "does not say what a prompt is; give --rows-are"),
        ("flat.npy", "numpy", {"hooks": {"flat": "layer 3"}}, "'layer 3' is not a hook point"),
        ("flat.npy", "safetensors", {}, "holds no .safetensors file"),
        ("nan.npy", "numpy", {"hooks": {"nan": HOOK}}, "holds an infinity or NaN"),
        ("differ.npz", "numpy", {}, "the hooks have different rows"),
        ("tokens.npz", "numpy", {}, "token ids of shape .3,. do not fit rows of shape .1, 2."),
        ("short.safetensors", "safetensors", {}, "cannot be read as safetensors"),
        ("not.arrow", "saelens", {}, "cannot be read as Arrow"),
        ("empty", "saelens", {}, "holds no .arrow file"),
        ("flat.npy", "numpy", TWO_PROMPTS, "prompts has 2 rows"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_imported_leave_no_run(lake, tmp_path, file, form, more, message):
    save_odd(tmp_path)
    with pytest.raises(InvalidInput, match=message) as caught:
        import_run(lake, "imported", tmp_path / file, form, **more)
    assert "\n" not in str(caught.value)
    assert list(lake) == []
    lake.create_run("imported", hooks=(HOOK,), d_model=4, dtype="float32")  # the name is free


def test_what_is_exported_is_what_is_stored(sealed, tmp_path):
    run = sealed.run
    view = run.select(where="even and position > 0")
    kept = (sealed.token_id % 2 == 0) & (sealed.position > 0)
    columns = {
        "prompt": sealed.prompt[kept],
        "position": sealed.position[kept],
        "token_id": sealed.token_id[kept],
        "label_even": np.ones(kept.sum(), bool),
    }
    export_run(view, tmp_path / "st", "safetensors")
    files = [load_file(path) for path in sorted((tmp_path / "st").glob("*.safetensors"))]
    for hook in run.hooks:
        bits = torch.from_numpy(sealed.stored[hook][kept].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(torch.cat([tensors[hook] for tensors in files]), bits)
    export_run(view, tmp_path / "np", "numpy")
    export_run(view, tmp_path / "pq", "parquet", hooks=(OTHER,))
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "pq").glob("rows-*.parquet"))])
    assert np.array_equal(np.array(table[OTHER].to_pylist(), np.float32), sealed.float32(OTHER)[kept])
    assert HOOK not in table.column_names
    assert np.array_equal(np.load(tmp_path / "np" / f"{HOOK}.npy"), sealed.float32(HOOK)[kept])
    for name, values in columns.items():
        assert torch.cat([tensors[name] for tensors in files]).tolist() == values.tolist()
        assert table[name].to_pylist() == values.tolist()
        assert np.load(tmp_path / "np" / f"{name}.npy").tolist() == values.tolist()
    prompts = pd.read_parquet(tmp_path / "pq" / "prompts.parquet")
    assert prompts["prompt"].tolist() == sorted(set(sealed.prompt[kept]))
    with pytest.raises(InvalidInput, match="exists and is not empty; name a new folder"):
        export_run(view, tmp_path / "pq", "parquet")


def test_a_view_becomes_a_run_with_provenance(sealed, tmp_path):
    run = sealed.run
    run.labels.add("mood", np.arange(13) % 3)
    view = run.select(where="token_id % 3 == 0")
    kept = sealed.token_id % 3 == 0
    made = view.materialise("subset", hooks="blocks.1.*")
    assert made.state == "sealed"
    assert made.hooks == (OTHER,)
    assert np.array_equal(made[OTHER].values, sealed.float32(OTHER)[kept])
    assert np.array_equal(made.labels["even"].values, (sealed.token_id % 2 == 0)[kept])
    assert np.array_equal(made.labels["mood"].values, (sealed.prompt % 3)[kept])
    assert made.labels["source"].values.tolist() == [f"s{i % 3}" for i in sealed.prompt[kept]]
    assert np.array_equal(made.tokens["token_id"].values, sealed.token_id[kept])
    ids = made.prompts["id"].loc[made.tokens["prompt"].values]
    assert ids.tolist() == [f"p{i}" for i in sealed.prompt[kept]]
    origin = made.provenance["selected_from"]
    assert (origin["id"], origin["rows"], origin["of_rows"]) == (run.plan.spec.id, kept.sum(), 172)
    assert origin["labels"] == {"even": 1, "mood": 1, "source": 0}
    assert verify_run(made).problems == []
    assert made.stats[OTHER].count == kept.sum()
    other = open_lake(tmp_path / "other", create=True)
    copied = made.materialise("copy", lake=other)
    assert np.array_equal(copied[OTHER].values, made[OTHER].values)
    assert list(copied.labels) == list(made.labels)
    with pytest.raises(RunExists):
        view.materialise("subset")


def command(capsys, *arguments):
    from millpond.cli import main

    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_commands_on_a_lake(sealed, tmp_path, capsys):
    lake = sealed.lake.folder
    np.save(tmp_path / "acts.npy", np.ones((2, 3, 4), np.float32))
    code, out, _ = command(
        capsys, "import", lake, "ones", tmp_path / "acts.npy", "--format", "numpy", "--hooks", "acts", HOOK
    )
    assert (code, "6 rows of 1 hooks, 2 prompts" in out) == (0, True)
    code, out, _ = command(capsys, "show", lake, "ones", "--stats")
    assert "6 rows of 4, mean norm 2, largest value 1" in out
    code, out, _ = command(
        capsys, "cp", lake, "made", tmp_path / "copies", "even", "--where", "even", "--hooks", "blocks.0.*"
    )
    assert code == 0
    copy = open_lake(tmp_path / "copies")["even"]
    assert np.array_equal(copy[HOOK].values, sealed.float32(HOOK)[sealed.token_id % 2 == 0])
    code, out, _ = command(capsys, "export", lake, "ones", tmp_path / "out", "--format", "numpy")
    assert np.load(tmp_path / "out" / f"{HOOK}.npy").tolist() == np.ones((6, 4)).tolist()
    code, out, _ = command(capsys, "metrics", lake)
    assert 'millpond_run_rows{run="made"} 172\n' in out
    assert "# TYPE millpond_run_rows gauge\n" in out
    assert "millpond_lake_deleted_runs 0\n" in out
    assert command(capsys, "rm", lake, "ones")[0] == 0
    assert [line.split()[0] for line in command(capsys, "ls", lake)[1].splitlines()] == ["made"]
    assert "millpond_lake_deleted_runs 1\n" in command(capsys, "metrics", lake)[1]
    assert command(capsys, "gc", lake)[:2] == (0, "")
    assert command(capsys, "restore", lake, "ones")[0] == 0
    assert command(capsys, "verify", lake, "ones")[0] == 0
    command(capsys, "rm", lake, "ones", "--grace", "0")
    code, _, error = command(capsys, "restore", lake, "ones")
    assert code == 2
    assert "cannot be restored" in error
    for arguments in (("show", lake, "gone"), ("cp", lake, "made", tmp_path / "copies", "x", "--where", "colour")):
        assert command(capsys, *arguments)[0] == 2
    assert "x" not in open_lake(tmp_path / "copies")


def test_quotas_and_retention(sealed, tmp_path, capsys):
    from millpond.store.configuration import expire_runs, used_bytes

    lake = sealed.lake
    used = used_bytes(lake)
    assert used == sum(path.stat().st_size for path in (lake.folder / "runs").rglob("*") if path.is_file())
    code, out, _ = command(capsys, "configure", lake.folder, "--quota-bytes", used + 2000, "--run-quota-bytes", 5000)
    assert (code, f"quota_bytes          {used + 2000}" in out) == (0, True)
    code, _, error = command(capsys, "cp", lake.folder, "made", lake.folder, "copy")
    assert code == 2
    assert error.startswith(f"millpond: QuotaExceeded: the lake '{lake.folder}' has {used:,} bytes")
    assert "copy" not in lake
    command(capsys, "configure", lake.folder, "--run-quota-bytes", 100, "--quota-bytes", -1)
    np.save(tmp_path / "acts.npy", np.ones((2, 30, 4), np.float32))
    with pytest.raises(QuotaExceeded, match=r"run 'new' would have 960 bytes, but a run .* may have 100"):
        import_run(lake, "new", tmp_path / "acts.npy", "numpy", hooks={"acts": HOOK})
    assert command(capsys, "configure", lake.folder, "--keep-runs-s", 0)[0] == 2
    assert expire_runs(lake) == []
    command(capsys, "configure", lake.folder, "--keep-runs-s", 0.01)
    assert expire_runs(lake, dry_run=True) == ["made"] == expire_runs(lake)
    assert list(lake) == []
    lake.restore("made")
    assert lake["made"].n_rows == 172


def test_an_export_appears_whole_or_not_at_all(sealed, tmp_path, monkeypatch):
    """Also behind one that was killed, and beside one that is under way."""
    target, partial = tmp_path / "out", tmp_path / "out.millpond-partial"
    partial.mkdir()
    (partial / "rows-00000.safetensors").write_bytes(b"of an export that was killed")

    def full(self, data, *more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(StorageFailed, match="free space"):
            export_run(sealed.run, target, "numpy")
    assert list(tmp_path.glob("out*")) == []
    with _appearing_whole(target) as folder:
        (folder / "half").touch()
        with pytest.raises(InvalidInput, match="another export is writing"):
            export_run(sealed.run, target, "numpy")
    assert [file.name for file in target.iterdir()] == ["half"]
    (target / "half").unlink()
    files = export_run(sealed.run, target, "numpy")
    assert sorted(files) == sorted(target.iterdir())
    first = (sealed.run.prompts["id"] == "p0").to_numpy()
    sealed.run.select(first).labels.add("some", pd.Series([1], index=["p0"]))
    with pytest.raises(InvalidInput, match="has no value for prompt"):
        export_run(sealed.run, tmp_path / "labelled", "numpy")
    assert not (tmp_path / "labelled").exists()


def test_a_copy_that_was_killed_is_told_from_a_run_and_made_again(sealed, capsys):
    """Nobody writes to it or seals it; it is removed and its name taken again, by the commands that the errors name."""
    lake, url = sealed.lake, str(sealed.lake.folder)
    spec = lake.create_run("half", hooks=(HOOK,), d_model=4, dtype="bfloat16", filling=True)
    (lake.run_folder("half") / "data-0").mkdir()
    for refused in (
        lambda: SegmentWriter(lake.run_storage("half"), spec),
        lambda: seal_run(lake.run_folder("half")),
    ):
        with pytest.raises(InvalidInput, match="millpond rm LAKE half --grace 0"):
            refused()
    assert main(["ls", url]) == 0
    assert "filling" in capsys.readouterr().out
    assert main(["verify", url, "half"]) == 1
    with pytest.raises(RunExists, match=r"millpond rm .* half"):
        copy_run(sealed.run, lake, "half")
    assert main(["rm", url, "half"]) == 0
    with pytest.raises(RunExists, match=r"waits for its grace period.* half --grace 0"):
        copy_run(sealed.run, lake, "half")
    assert main(["rm", url, "half", "--grace", "0"]) == 0
    assert verify_run(copy_run(sealed.run, lake, "half")).ok


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_neither_a_copy_nor_sealing_gives_damaged_bytes_new_checksums(build, tmp_path, codec):
    made = build((5, 30, 9), codec=codec, folder=tmp_path / "lake")
    path = next((made.folder / "segments").glob(f"*/{HOOK}/c/0/0"))
    whole = path.read_bytes()
    path.write_bytes(bytes([*whole[:40], whole[40] ^ 4, *whole[41:]]))
    with pytest.raises(LakeCorrupt, match="does not have its checksum"):
        made.seal()
    path.write_bytes(whole)
    sealed = made.seal()
    path = next(made.folder.glob(f"data-*/{HOOK}/c/0/0"))
    whole = path.read_bytes()
    path.write_bytes(bytes([*whole[:40], whole[40] ^ 4, *whole[41:]]))
    with pytest.raises(LakeCorrupt, match="does not have its checksum"):
        copy_run(sealed, made.lake, "copy")
    assert made.lake.runs() == ["made"]
    path.write_bytes(whole)
    assert verify_run(copy_run(sealed, made.lake, "copy")).ok


def test_what_cannot_be_read_does_not_keep_the_rest_from_gc_and_verify(sealed, capsys):
    url, lake = str(sealed.lake.folder), sealed.lake
    lake.create_run("cut", hooks=(HOOK,), d_model=4, dtype="float32")
    (lake.run_folder("cut") / "run.json").write_text("{")
    (lake.run_folder("made") / "segments").mkdir(exist_ok=True)
    (lake.run_folder("made") / "segments" / "rest").write_bytes(bytes(10))
    assert main(["gc", url, "--grace", "0"]) == 1
    printed = capsys.readouterr().out
    assert "cut: LakeCorrupt" in printed
    assert "made: freed" in printed
    assert main(["compact", url]) == 1
    shards = sorted((lake.run_folder("made")).glob(f"data-*/{OTHER}/c/*/0"))[:2]
    for shard in shards:
        shard.unlink()
        shard.mkdir()  # to read it fails as a bad sector does: with a number of the operating system's
    capsys.readouterr()
    assert main(["verify", url]) == 1
    printed = capsys.readouterr().out
    assert all(str(shard) in printed for shard in shards)
    assert "made: 2 problems" in printed
