"""Runs that hold reads: with hooks or instead of them, open, compacted, sealed, selected, copied and damaged."""

import numpy as np
import pytest
import torch
import xarray as xr

from millpond.store.artifacts import artifact_names, load_artifact, save_probe
from millpond.store.compaction import compact
from millpond.store.errors import InvalidInput, ReadNotFound
from millpond.store.exporting import export_run
from millpond.store.lake import open_lake
from millpond.store.reads import ReadSpec
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOK = "blocks.1.hook_resid_post"
LIE = ReadSpec(name="lie", read="probe", hook=HOOK, artifact="lie-probe", checksum="0" * 8, width=2)
SAE = ReadSpec(name="sae", read="sae_topk", hook=HOOK, artifact="s", checksum="0" * 8, width=3, d_sae=70_000)
SMALL = ReadSpec(name="small", read="sae_topk", hook=HOOK, artifact="t", checksum="0" * 8, width=1, d_sae=65_536)
LENGTHS = (5, 0, 30, 17, 1, 40, 9)


def bits(values):
    """bfloat16 bits by torch, not by Millpond."""
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(params=[(HOOK,), ()], ids=["beside a hook", "alone"])
def made(request, tmp_path):
    """A run of 102 rows and every value that was put into it, rows of bfloat16."""
    lake = open_lake(tmp_path / "lake", create=True)
    spec = lake.create_run(
        "made", hooks=request.param, d_model=4, dtype="bfloat16", chunk_rows=8, shard_rows=32, reads=(LIE, SAE, SMALL)
    )
    rng = np.random.default_rng(0)
    writer, put = RunWriter(lake.run_folder("made"), spec, segment_rows=32, compact_every=0), []
    for number, n in enumerate(LENGTHS):
        values = {
            "lie.scores": rng.standard_normal((n, 2)).astype(np.float32),
            "sae.indices": rng.integers(0, 70_000, (n, 3)).astype(np.uint32),
            "sae.values": bits(rng.random((n, 3)).astype(np.float32)),
            "sae.active": rng.integers(0, 70_001, n).astype(np.int32),
            "small.indices": rng.integers(0, 65_536, (n, 1)).astype(np.uint16),
            "small.values": bits(rng.random((n, 1)).astype(np.float32)),
            "small.active": np.ones(n, np.int32),
        }
        rows = {hook: bits(rng.standard_normal((n, 4)).astype(np.float32)) for hook in request.param}
        tokens = rng.integers(0, 100, n).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, np.arange(n, dtype=np.int32), rows, values))
        put.append(values)
    writer.commit()
    return lake, put


def check(run, put):
    """Every value of the prompts that `run` has, in its order."""
    numbers = [int(name[1:]) for name in run.prompts["id"]]
    for array in put[0]:
        read, _, name = array.partition(".")
        expected = np.concatenate([put[number][array] for number in numbers])
        found = run.reads[read][name]
        if name == "values":  # exact: every bfloat16 is a float32
            expected = torch.from_numpy(expected.view(np.int16)).view(torch.bfloat16).float().numpy()
        assert np.array_equal(found.values, expected), array
        assert found.dtype == expected.dtype
        lengths = [LENGTHS[number] for number in numbers]
        assert found["position"].values.tolist() == [position for n in lengths for position in range(n)]


def test_reads_follow_their_rows_through_everything_a_run_goes_through(made, tmp_path):
    lake, put = made
    check(lake["made"], put)
    assert compact(lake.run_storage("made")) > 1
    run = lake["made"]
    assert "reads" in repr(run)
    width = 4 * 2 * len(run.hooks) + 2 * 4 + (4 + 2) * 3 + 4 + (2 + 2) * 1 + 4
    assert run.nbytes == 102 * width
    assert verify_run(run).problems == []
    check(run, put)
    seal_run(lake.run_folder("made"))
    lake.collect(grace_s=0)
    run = lake["made"]
    assert verify_run(run).problems == []
    check(run, put)
    for part in run.split(test=0.4, seed=1):
        check(part, put)
    some = run.select(position=slice(2, 20, 3))
    positions = run.tokens["position"].values
    kept = (positions >= 2) & (positions < 20) & ((positions - 2) % 3 == 0)
    assert np.array_equal(some.reads["lie"]["scores"].values, run.reads["lie"]["scores"].values[kept])
    copied = run.select(run.prompts["id"].isin(["p2", "p5"])).materialise(
        "copied", lake=open_lake(tmp_path / "l", create=True)
    )
    assert copied.plan.spec.reads == (LIE, SAE, SMALL)
    assert verify_run(copied).problems == []
    check(copied, put)
    variables = set(run.to_xarray().data_vars)
    assert variables == {*run.hooks, *put[0]}
    with pytest.raises(ReadNotFound, match=r"'other'.*lie, sae, small"):
        run.reads["other"]


def test_any_zarr_reader_opens_them(made):
    lake, put = made
    run = seal_run(lake.run_folder("made"))
    order = [int(name[1:]) for name in run.prompts["id"]]
    data = xr.open_zarr(lake.run_folder("made") / run.manifest.data.path)
    for array in put[0]:
        assert np.array_equal(data[array].values, np.concatenate([put[number][array] for number in order]))
    assert data["sae.values"].attrs == {
        "millpond:read": "sae_topk",
        "millpond:hook": HOOK,
        "millpond:artifact": "s",
        "millpond:dtype": "bfloat16",
        "millpond:d_sae": 70_000,
    }
    assert data["sae.values"].dims == ("row", "sae.code")
    assert data["lie.scores"].dims == ("row", "lie.output")


@pytest.mark.parametrize("form", ["safetensors", "parquet", "numpy"])
def test_they_are_exported(made, tmp_path, form):
    lake, put = made
    files = export_run(lake["made"], tmp_path / "out", form)
    expected = np.concatenate([values["sae.indices"] for values in put])
    if form == "numpy":
        found = np.load(tmp_path / "out" / "sae.indices.npy")
    elif form == "parquet":
        import pandas as pd

        parts = [pd.read_parquet(file)["sae.indices"] for file in files if file.name.startswith("rows")]
        found = np.stack(pd.concat(parts).to_list())
    else:
        from safetensors.torch import load_file

        found = np.concatenate(
            [load_file(file)["sae.indices"].numpy() for file in files if file.name.startswith("rows")]
        )
    assert np.array_equal(found, expected)


def test_damage_is_found(made):
    lake, _ = made
    folder = lake.run_folder("made") / seal_run(lake.run_folder("made")).manifest.data.path
    shard = folder / "sae.indices" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    (problem,) = verify_run(lake["made"]).problems
    assert "sae.indices/c/0/0 does not have the checksum" in problem


def test_an_index_beyond_the_sae_is_found(made):
    lake, put = made
    wrong = {**put[4], "small.active": put[4]["small.active"] + 65_536}
    one, rows = np.zeros(1, np.int32), {hook: np.zeros((1, 4), np.uint16) for hook in lake["made"].hooks}
    writer = RunWriter(lake.run_folder("made"), lake.spec("made"))
    writer.append(CapturedRequest("wrong", one, 1, one, rows, wrong))
    writer.commit()
    (problem,) = verify_run(lake["made"]).problems
    assert problem == "small.active: 65537 is beyond the SAE's 65536 latents"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lie.scores": None}, "lie.scores"),
        ({"lie.scores": np.zeros((1, 2))}, "float64.*lie.scores.*float32"),
        ({"sae.values": np.zeros((1, 2), np.uint16)}, r"\(1, 2\) for sae.values"),
        ({"lie.scores": np.full((1, 2), np.nan, np.float32)}, "NaN in lie.scores"),
        ({"sae.values": np.full((1, 3), 0x7F80, np.uint16)}, "infinity or NaN in sae.values"),
    ],
)
def test_a_request_without_the_right_reads_is_refused(made, change, words):
    lake, put = made
    values = {name: change.get(name, values) for name, values in put[4].items() if change.get(name, 0) is not None}
    one, rows = np.zeros(1, np.int32), {hook: np.zeros((1, 4), np.uint16) for hook in lake["made"].hooks}
    with pytest.raises(InvalidInput, match=words):
        RunWriter(lake.run_folder("made"), lake.spec("made")).append(CapturedRequest("x", one, 1, one, rows, values))


def test_a_run_without_reads_is_written_as_before(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    lake.create_run("plain", hooks=(HOOK,), d_model=4, dtype="float32")
    assert '"reads"' not in (lake.run_folder("plain") / "run.json").read_text()
    with pytest.raises(InvalidInput, match="hooks is empty"):
        lake.create_run("none", hooks=(), d_model=4, dtype="float32")
    with pytest.raises(InvalidInput, match="each its own"):
        lake.create_run("twice", hooks=(), d_model=4, dtype="float32", reads=(LIE, LIE))


def test_artifacts_are_kept_in_s3_as_in_a_folder(seaweedfs):
    lake = open_lake(seaweedfs.url("artifacts"), create=True, **seaweedfs.options())
    coef = np.arange(8, dtype=np.float64).reshape(2, 4)
    save_probe(lake, "one", coef, [1, 2], classes=["a", "b"], hook=HOOK)
    found = load_artifact(lake, "one", "probe")
    assert np.array_equal(found.arrays()["coef"], coef.astype(np.float32))
    assert (found.config["classes"], found.config["hook"], len(found.checksum)) == (["a", "b"], HOOK, 8)
    assert artifact_names(lake) == ["one"]
    with pytest.raises(InvalidInput, match="'one' exists"):
        save_probe(lake, "one", coef, [1, 2])
    with pytest.raises(InvalidInput, match="intercept of shape"):
        save_probe(lake, "two", coef, [1, 2, 3])
