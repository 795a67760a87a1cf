"""Everything that changes a lake, and every check of it, writes one event that a log collector can read."""

import io
import json
import logging

import numpy as np
import pytest

from millpond.cli import main
from millpond.store.compaction import compact
from millpond.store.configuration import LakeConfiguration, expire_runs, write_configuration
from millpond.store.exporting import export_run
from millpond.store.importing import import_run
from millpond.store.lake import open_lake
from millpond.store.logs import JsonLines
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def events():
    """The fields of what was logged since the last call."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("millpond.store")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def read():
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        stream.seek(0)
        stream.truncate()
        assert all(line.pop("time") > 0 and line.pop("logger").startswith("millpond.store.") for line in lines)
        return lines

    yield read
    logger.removeHandler(handler)
    logger.setLevel(level)


def event(name, run, level="info", **fields):
    return {"event": name, "level": level, "run": run, **fields}


def test_one_event_an_operation(tmp_path, events):
    lake = open_lake(tmp_path / "lake", create=True)
    spec = lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8)
    assert events() == [event("created", "a", hooks=1, d_model=4)]
    steps = np.arange(3, dtype=np.int32)
    for number in range(4):
        writer = RunWriter(lake.run_folder("a"), spec, compact_every=0)
        for one in (2 * number, 2 * number + 1):
            writer.append(CapturedRequest(f"p{one}", steps, 3, steps, {HOOK: np.full((3, 4), one, np.float32)}))
        writer.commit()
        (found,) = events()
        assert len(found.pop("segment")) == 32
        assert found == event("committed", "a", rows=6, prompts=2)
    folder = lake.run_storage("a")
    compact(folder)
    assert events() == [event("compacted", "a", version=1, commits=4)]
    lake.retain("a", ["sae"], grace_s=0)
    assert events() == [event("retention", "a", consumed_by=["sae"], grace_s=0)]
    first = min((tmp_path / "lake" / "runs" / "a" / "segments").iterdir())
    size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    list(zip(range(2), lake["a"].follow("sae", timeout_s=0, poll_s=0.01, view_rows=6), strict=False))
    assert events() == [
        event("dropped", "a", version=2, segments=1, prompts=2, rows=6),
        event("collected", "a", objects=1, bytes=size),
    ]
    lake["a"].labels.add("good", [True] * 6, by="prompt", source="by hand")
    assert events() == [event("labelled", "a", label="good", version=1)]
    run = seal_run(lake.run_folder("a"))
    assert events() == [event("sealed", "a", rows=18, prompts=6)]
    lake.collect(grace_s=0)
    (found,) = events()
    assert (found["event"], found["run"]) == ("collected", "a")
    verify_run(run)
    assert events() == [event("verified", "a", rows=18, problems=0)]
    export_run(run, tmp_path / "out", "numpy")
    assert events() == [event("exported", "a", rows=18, format="numpy", path=str(tmp_path / "out"))]
    path = tmp_path / "out" / f"{HOOK}.npy"
    import_run(lake, "b", path, "numpy", rows_are="prompts", hooks={HOOK: HOOK})
    assert [found["event"] for found in events()] == ["created", "sealed", "imported"]
    assert main(["cp", str(lake.folder), "a", str(lake.folder), "c"]) == 0
    assert events()[-1] == event("copied", "c", rows=18, source="a")
    assert main(["rm", str(lake.folder), "c", "--grace", "5"]) == main(["restore", str(lake.folder), "c"]) == 0
    assert events() == [event("deleted", "c", grace_s=5), event("restored", "c")]
    assert main(["rm", str(lake.folder), "c", "--grace", "0"]) == 0
    assert events() == [event("deleted", "c", grace_s=0), event("removed", "c")]
    write_configuration(lake, LakeConfiguration(keep_runs_s=1e-6, deletion_grace_s=9))
    expire_runs(lake)
    assert events()[:2] == [event("expired", "a", keep_runs_s=1e-6), event("deleted", "a", grace_s=9)]


def test_what_is_wrong_is_an_error(sealed, events):
    (shard,) = sealed.folder.glob(f"data-*/{HOOK}/c/0/0")
    shard.unlink()
    assert not verify_run(sealed.run).ok
    assert events() == [event("verified", "made", level="error", rows=172, problems=1)]


def test_a_record_factory_of_another_library_adds_no_field(tmp_path, events):
    plain = logging.getLogRecordFactory()

    def factory(*args, **kwargs):
        record = plain(*args, **kwargs)
        record.process_role = "engine"
        return record

    logging.setLogRecordFactory(factory)
    try:
        open_lake(tmp_path / "lake", create=True).create_run("a", hooks=(HOOK,), d_model=4, dtype="float32")
        assert events() == [event("created", "a", hooks=1, d_model=4)]
    finally:
        logging.setLogRecordFactory(plain)
