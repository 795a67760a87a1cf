import json
import shutil

import numpy as np
import pytest

from millpond.store.collect import collect_run
from millpond.store.errors import LakeCorrupt
from millpond.store.files import encode_document, read_json
from millpond.store.objects import open_storage
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run


def findings(made):
    try:
        return verify_run(made.run).problems
    except LakeCorrupt as error:
        return [str(error)]


def test_a_whole_run_is_whole(sealed):
    collect_run(open_storage(sealed.folder), grace_s=0)
    found = verify_run(sealed.run)
    assert (found.ok, found.rows, found.prompts) == (True, 172, 13)
    files = [path for path in sealed.folder.rglob("*") if path.is_file()]
    own = {"run.json", "manifest.json", "label.json"}  # checked whenever they are read
    files = [path for path in files if path.parent.name != "closing"]
    assert found.files == len([path for path in files if path.name not in own])
    assert verify_run(sealed.run.split(0.5)[0]).rows == 172


@pytest.mark.parametrize("state", ["open", "sealed"])
def test_a_flipped_byte_in_any_file_is_found(opened, state):
    if state == "sealed":
        opened.seal()
        collect_run(open_storage(opened.folder), grace_s=0)
    kinds = {}
    for path in sorted(opened.folder.rglob("*")):
        if path.is_file() and path.parent.name != "closing":  # only their presence counts
            relative = path.relative_to(opened.folder).parts
            kinds.setdefault((relative[0].split("-")[0], relative[-3:-1], path.suffix), path)
    chosen = list(kinds.values())
    assert {"run.json", "prompts.parquet", "zarr.json"} <= {path.name for path in chosen}
    assert findings(opened) == []
    rng = np.random.default_rng(0)
    for path in chosen[:: 1 if state == "sealed" else 3]:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 0xFF
        path.write_bytes(flipped)
        assert len(findings(opened)) >= 1, path
        path.write_bytes(content)
    assert findings(opened) == []


def test_missing_and_truncated_shards_are_named(sealed):
    folder = sealed.folder / sealed.run.manifest.data.path / "blocks.1.hook_mlp_out"
    (folder / "c" / "0" / "0").unlink()
    shard = folder / "c" / "1" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    missing, short = verify_run(sealed.run).problems
    assert missing.endswith("c/0/0 is missing")
    assert "c/1/0 has " in short
    shutil.rmtree(folder)
    assert any("zarr.json is missing" in problem for problem in verify_run(sealed.run).problems)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_found(opened, value):
    writer = RunWriter(opened.folder, opened.run.plan.spec, nonfinite="allow")
    rows = np.zeros((3, 4), np.float32)
    rows[1, 2] = value
    bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
    steps = np.arange(3, dtype=np.int32)
    good = np.zeros((3, 4), np.uint16)
    first, second = opened.run.hooks
    writer.append(CapturedRequest("bad", steps, 3, steps, {first: good, second: bits}))
    writer.commit()
    assert verify_run(opened.run).problems == [f"{second}: row 173 is not finite (1 such rows in its block)"]


def test_a_prompt_captured_twice_is_seen_once(opened):
    writer = RunWriter(opened.folder, opened.run.plan.spec)
    rows = {hook: np.zeros((1, 4), np.uint16) for hook in opened.run.hooks}
    one = np.zeros(1, np.int32)
    writer.append(CapturedRequest("p3", one, 1, one, rows))
    writer.commit()
    run = opened.run
    assert verify_run(run).problems == []
    assert run.prompts["id"].tolist() == [f"p{number}" for number in range(13)]
    assert np.array_equal(run[run.hooks[0]].values, opened.float32(run.hooks[0]))


@pytest.mark.parametrize("count", ["rows", "prompts", "tokens", "rows_asked"])
def test_wrong_counts_are_found(sealed, count):
    manifest = read_json(sealed.folder / "manifest.json")
    manifest["counts"][count] += 1
    open_storage(sealed.folder).put("manifest.json", encode_document(manifest))
    (problem,) = verify_run(sealed.run).problems
    assert problem.startswith(f"manifest.json: {count} is ")


def test_a_count_that_contradicts_the_prompt_table_refuses_to_open(sealed):
    manifest = read_json(sealed.folder / "manifest.json")
    manifest["data"]["rows"] += 1
    open_storage(sealed.folder).put("manifest.json", encode_document(manifest))
    with pytest.raises(LakeCorrupt, match=r"count 13 prompts and 172 rows, their commits 13 and 173"):
        _ = sealed.run


def test_an_array_that_is_not_recorded_is_found(sealed):
    manifest = read_json(sealed.folder / "manifest.json")
    del manifest["data"]["arrays"]["token_id"]
    open_storage(sealed.folder).put("manifest.json", encode_document(manifest))
    assert any("token_id is not both" in problem for problem in verify_run(sealed.run).problems)


def test_documents_carry_their_checksum(sealed):
    import google_crc32c

    for name in ("run.json", "manifest.json", "labels/even/1/label.json"):
        content = (sealed.folder / name).read_bytes()
        digits = json.loads(content)["crc32c"].encode()
        assert content.count(digits) == 1
        assert f"{google_crc32c.value(content.replace(digits, b'00000000')):08x}".encode() == digits
