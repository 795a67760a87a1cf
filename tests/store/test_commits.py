import json
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from millpond.store import commits
from millpond.store.collect import collect_run
from millpond.store.commits import commit_path
from millpond.store.compaction import FANOUT, compact
from millpond.store.errors import CaptureFailed, InvalidInput, LakeCorrupt
from millpond.store.lake import open_lake
from millpond.store.objects import open_storage
from millpond.store.run import open_run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run
from millpond.store.versions import latest_version

HOOK = "blocks.0.hook_resid_post"


def request(name, value=1.0, n=3):
    positions = np.arange(n, dtype=np.int32)
    return CapturedRequest(name, positions, n, positions, {HOOK: np.full((n, 4), value, np.float32)})


@pytest.fixture(params=["memory", "ceph"])
def lake(request):
    if request.param == "memory":
        return open_lake(f"memory://{uuid.uuid4().hex}", create=True)
    server = request.getfixturevalue("ceph")
    return open_lake(server.url(uuid.uuid4().hex), create=True, **server.options())


@pytest.fixture
def run(lake):
    lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8)
    return lake.run_storage("a")


def writer_of(run, **more):
    return RunWriter(run, open_run(run).plan.spec, 10**6, compact_every=0, **more)


def write(run, names, value=1.0):
    writer = writer_of(run)
    for name in names:
        writer.append(request(name, value))
    writer.commit()
    return writer


def contents(run):
    opened = open_run(run)
    return dict(zip(opened.prompts["id"], opened[HOOK].values[::3, 0].tolist(), strict=True))


def test_the_first_commit_of_a_request_stays(run):
    write(run, ["x", "y"], 1)
    write(run, ["y", "z"], 2)
    expected = {"x": 1, "y": 1, "z": 2}
    assert contents(run) == expected
    assert compact(run) == 2
    assert contents(run) == expected
    write(run, ["z", "x", "w"], 3)
    write(run, ["w"], 4)
    expected["w"] = 3
    assert contents(run) == expected
    assert compact(run) == 2
    assert compact(run) == 0
    assert contents(run) == expected
    assert list(run.list("commits")) == []
    assert verify_run(open_run(run)).problems == []
    assert len(seal_run(run).prompts) == 4
    assert contents(run) == expected
    assert verify_run(open_run(run)).problems == []


def test_eight_writers_race_for_the_same_requests(run):
    def fill(number):
        for start in range(0, 12, 3):
            write(run, [f"p{n}" for n in range(start, start + 4)], number)
            compact(run)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(8)))
    before = contents(run)
    assert sorted(before) == sorted(f"p{n}" for n in range(13))
    while compact(run):
        pass
    assert contents(run) == before
    assert verify_run(open_run(run)).problems == []


def test_pages_stay_few_and_versions_stay_readable(run):
    versions = {}
    for number in range(FANOUT * 2 + 3):
        write(run, [f"p{number}"], number)
        compact(run)
        versions[latest_version(run, open_run(run).plan.spec.id).number] = number + 1
    pages = latest_version(run, open_run(run).plan.spec.id).pages
    assert [page.level for page in pages] == [1, 1, 0, 0, 0]
    assert [page.segments for page in pages] == [FANOUT, FANOUT, 1, 1, 1]
    for version, count in list(versions.items())[::5]:
        old = open_run(run, version=version)
        assert (old.version, old.prompts["id"].tolist()) == (version, [f"p{n}" for n in range(count)])
        assert np.array_equal(old[HOOK].values[::3, 0], np.arange(count))
    assert collect_run(run).paths == []
    newest = open_run(run)
    removed = collect_run(run, grace_s=0).paths
    assert sum(path.startswith("manifests/") for path in removed) == FANOUT * 2 + 2
    assert sum(path.startswith("index/") for path in removed) == 3 * (FANOUT * 2 - 2)
    assert len(newest.prompts) == len(open_run(run).prompts) == FANOUT * 2 + 3
    with pytest.raises(FileNotFoundError):
        open_run(run, version=1)


def test_an_abandoned_segment_is_collected_and_its_late_writer_told(run):
    write(run, ["x"])
    late = writer_of(run)
    late.append(request("y"))
    late._segment._arrays[HOOK].finish()
    assert collect_run(run).paths == []
    plan = collect_run(run, grace_s=0, dry_run=True)
    assert len(plan.paths) == 1
    assert len(run.folders("segments")) == 2
    assert collect_run(run, grace_s=0).paths == plan.paths
    assert len(run.folders("segments")) == 1
    with pytest.raises(CaptureFailed, match="was collected as abandoned before it was committed"):
        late.commit()
    assert contents(run) == {"x": 1}
    assert verify_run(open_run(run)).problems == []
    assert compact(run) == 1
    assert contents(run) == {"x": 1}


def test_collection_spares_what_is_committed_and_compacted_behind_its_back(run, monkeypatch):
    """The commit, its compaction and the deletion of its record all fall between the listing and the fence."""
    from millpond.store import collect

    writer = writer_of(run)
    writer.append(request("x"))
    writer._segment._arrays[HOOK].finish()
    fence, done = collect._fence, []

    def late(run, segment):
        if not done:
            done.append(segment)
            writer.commit()
            assert compact(run) == 1
        return fence(run, segment)

    monkeypatch.setattr(collect, "_fence", late)
    assert collect_run(run, grace_s=0).paths == []
    assert done
    assert list(run.list("commits")) == []
    assert contents(run) == {"x": 1}
    assert verify_run(open_run(run)).problems == []


def test_a_commit_that_is_compacted_while_a_reader_opens_is_not_missed(run, monkeypatch):
    from millpond.store import snapshot

    write(run, ["x"])
    read, times = snapshot.read_commits, []

    def late(run, paths):
        if not times:
            times.append(1)
            monkeypatch.setattr(snapshot, "read_commits", read)
            assert compact(run) == 1
        return read(run, paths)

    monkeypatch.setattr(snapshot, "read_commits", late)
    assert contents(run) == {"x": 1}
    assert times


def test_a_commit_after_the_closing_is_not_acknowledged(run, monkeypatch):
    """And one that was acknowledged before is in the sealed run."""
    write(run, ["x"])
    late = writer_of(run)
    late.append(request("y"))
    from millpond.store import seal

    original = seal.Merge

    def merge(snapshot):
        with pytest.raises(CaptureFailed, match="was sealed before 3 rows were committed"):
            late.commit()
        with pytest.raises(InvalidInput, match="is being sealed or deleted and cannot grow"):
            write(run, ["z"])
        return original(snapshot)

    monkeypatch.setattr(seal, "Merge", merge)
    assert seal_run(run).prompts["id"].tolist() == ["x"]


def test_a_dead_compactor_is_replaced_and_two_do_no_harm(run):
    write(run, ["x"])
    run.create("lease.json", b"{}")
    assert compact(run) == 0
    time.sleep(1.1)  # the store's clock may count whole seconds
    assert compact(run, lease_s=0) == 1
    write(run, ["y"])
    started = threading.Barrier(2)

    def race(_):
        started.wait()
        return compact(run, lease_s=-10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(race, range(2)))
    assert contents(run) == {"x": 1, "y": 1}
    assert verify_run(open_run(run)).problems == []


def test_writers_with_wrong_clocks_lose_nothing(run, monkeypatch):
    clock, real = [0], time.time_ns
    monkeypatch.setattr(commits.time, "time_ns", lambda: real() + clock[0])
    for number, shift in enumerate((0, -86_400, 3_600, -(10**8))):
        clock[0] = shift * 10**9
        write(run, [f"p{number}", "same"], number)
        if number % 2:
            compact(run)
        assert collect_run(run).paths == []
    before = contents(run)
    assert sorted(before) == ["p0", "p1", "p2", "p3", "same"]
    assert all(before[f"p{number}"] == number for number in range(4))
    compact(run)
    assert contents(run) == before
    assert verify_run(open_run(run)).problems == []


def test_a_newer_version_and_a_damaged_page_are_named(run):
    write(run, ["x"])
    compact(run)
    (page,) = [entry.path for entry in run.list("index") if entry.path.endswith(".segments.parquet")]
    content = run.get(page)
    run.put(page, content[:-9] + b"\xff" + content[-8:])
    with pytest.raises(LakeCorrupt, match="does not have the checksum of the manifest"):
        open_run(run)
    run.put(page, content)
    (version,) = [entry.path for entry in run.list("manifests")]
    document = json.loads(run.get(version))
    del document["crc32c"]
    run.put(version, json.dumps(document | {"version": 3}).encode())
    with pytest.raises(InvalidInput, match=r"format version 3; .* upgrade Millpond"):
        open_run(run)


def test_bad_requests_are_refused(run):
    writer = writer_of(run)
    writer.append(request("x"))
    with pytest.raises(InvalidInput, match=r"'x' .* was appended before"):
        writer.append(request("x"))
    for name in ("", "a\ud800"):
        with pytest.raises(InvalidInput, match="an id that is empty, or holds half of a surrogate pair"):
            writer.append(request(name))
    with pytest.raises(
        InvalidInput, match=r"infinity or NaN in 3 rows of blocks.0.hook_resid_post, first at position 0"
    ):
        writer.append(request("y", np.nan))
    writer.commit()
    assert contents(run) == {"x": 1}


def test_an_open_run_of_version_1_is_read_and_sealed_but_does_not_grow(opened):
    """Version 1 numbered its commits and had neither codecs nor statistics."""
    from millpond.store.files import decode_document, encode_document

    folder = opened.folder
    storage = open_storage(folder)
    for number, entry in enumerate(sorted(storage.list("commits"))):
        record = decode_document(storage.get(entry.path), "")
        del record["statistics"]
        name = entry.path.rpartition("/")[2]
        storage.put(f"commits/{number:08d}-{name}", encode_document(record))
        storage.delete(entry.path)
    spec = decode_document(storage.get("run.json"), "")
    del spec["codec"]
    storage.put("run.json", encode_document(spec | {"version": 1}))
    run = open_run(folder)
    assert np.array_equal(run[HOOK].values, opened.float32(HOOK))
    with pytest.raises(InvalidInput, match="format version 1, which is read and sealed but does not grow"):
        RunWriter(folder, run.plan.spec).append(request("x"))
    opened.seal()
    assert np.array_equal(opened.run[HOOK].values, opened.float32(HOOK))
    assert verify_run(opened.run).ok


def test_a_tombstone_is_an_empty_commit(run):
    assert run.create(commit_path("0" * 32), b"")
    assert contents(run) == {}
    assert os.path.basename(commit_path("x")) == "x.json"  # noqa: PTH119


@pytest.mark.parametrize("between", ["commits", "compactions"])
def test_a_copy_made_while_a_run_grows_holds_what_was_acknowledged_before(opened, tmp_path, between):
    """In the three passes of docs/howto/backup.md."""
    run = opened.lake.run_storage("made")
    before = set(open_run(run).prompts["id"])

    def grow(number):
        positions = np.arange(3, dtype=np.int32)
        rows = {hook: np.ones((3, 4), np.uint16) for hook in open_run(run).hooks}
        writer = RunWriter(run, open_run(run).plan.spec, compact_every=0)
        writer.append(CapturedRequest(f"late{number}", positions, 3, positions, rows))
        writer.commit()
        if between == "compactions":
            assert compact(run) > 0

    passes = [lambda path: "commits" in path, lambda path: "manifests" in path]
    passes.append(lambda path: not any(one(path) for one in passes[:2]))
    for number, chosen in enumerate(passes):
        for entry in opened.lake.storage.list():
            if chosen(entry.path):
                target = tmp_path / "copy" / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.lake.storage.get(entry.path))
        grow(number)
    copy = open_lake(tmp_path / "copy")["made"]
    assert before <= set(copy.prompts["id"]) < set(open_run(run).prompts["id"])
    assert verify_run(copy).problems == []
