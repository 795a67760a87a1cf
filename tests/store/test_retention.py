"""Retention `consumed`: what followers used is dropped, and nothing else is."""

import uuid

import numpy as np
import pytest

from millpond.store import versions
from millpond.store.collect import collect_run
from millpond.store.compaction import compact
from millpond.store.configuration import QUOTA_BYTES, LakeConfiguration, used_bytes, write_configuration
from millpond.store.errors import InvalidInput, QuotaExceeded
from millpond.store.follow import Follower, consumed, position
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOK = "blocks.0.hook_resid_post"
ROWS = 4


def append(made, numbers):
    writer = RunWriter(made.folder, made.lake.spec("made"), compact_every=0)
    for number in numbers:
        steps = np.arange(ROWS, dtype=np.int32)
        rows = {hook: np.full((ROWS, 4), number, np.float32) for hook in writer.spec.hooks}
        writer.append(CapturedRequest(f"p{number}", steps, ROWS, steps, rows))
    writer.commit()


@pytest.fixture
def grown(build, tmp_path):
    """Four segments of two prompts each."""
    made = build([], dtype="float32", folder=tmp_path / "lake")
    for first in range(0, 8, 2):
        append(made, range(first, first + 2))
    return made


def use(made, consumer, views):
    """Use so many views of two prompts; those that were given before come first."""
    follower = Follower(made.run, consumer, poll_s=0.01, timeout_s=0, view_rows=2 * ROWS)
    ids = []
    for _, (number, view) in zip(range(views), follower.views(), strict=False):
        ids += view.prompts["id"].tolist()
        follower.use(number)
    return ids


def numbers(run):
    return sorted({int(value) for value in run[HOOK].values[:, 0]})


def segments(made):
    return {path.name for path in (made.folder / "segments").iterdir()}


def test_used_rows_go_and_their_prompts_stay_taken(grown, capsys):
    from millpond.cli import main

    before = segments(grown)
    grown.lake.retain("made", ["sae"], grace_s=0)
    assert use(grown, "sae", 3) == [f"p{number}" for number in range(6)]
    run = grown.run
    assert (numbers(run), run.n_rows, run.n_dropped_rows) == ([6, 7], 2 * ROWS, 6 * ROWS)
    assert sorted(run.dropped["id"]) == [f"p{number}" for number in range(6)]
    assert len(before - segments(grown)) == 3
    append(grown, [0, 5, 6, 8])  # as a resumed capture would send them
    assert numbers(grown.run) == [6, 7, 8]
    compact(grown.run.plan.folder)
    assert numbers(grown.run) == [6, 7, 8]
    found = verify_run(grown.run)
    assert (found.problems, found.rows, found.dropped_rows) == ([], 3 * ROWS, 6 * ROWS)
    statistics = grown.run.stats[HOOK]  # over all that was ever committed, the repeated requests too
    assert statistics.count == 12 * ROWS
    assert statistics.mean.tolist() == pytest.approx([(28 + 0 + 5 + 6 + 8) / 12] * 4)
    for command, expected in (
        ("ls", "(24 rows dropped)"),
        ("verify", "12 rows (24 more were used and dropped), 3 prompts"),
        ("show", "consumer sae: used 24 rows of 6 prompts in 3 views"),
        ("metrics", 'millpond_run_dropped_rows{run="made"} 24\n'),
    ):
        assert main([command, str(grown.lake.folder), *(["made"] if command == "show" else [])]) == 0
        assert expected in capsys.readouterr().out
    run = seal_run(grown.folder, expected_rows=9 * ROWS)
    assert (numbers(run), run.manifest.counts["rows_dropped"], verify_run(run).problems) == ([6, 7, 8], 6 * ROWS, [])
    assert run.stats[HOOK].count == 3 * ROWS


def test_rows_stay_until_every_consumer_has_used_them_and_for_readers_of_before(grown):
    grown.lake.retain("made", ["sae", "probe"], grace_s=1000)
    use(grown, "sae", 4)
    compact(grown.run.plan.folder)
    reader = grown.run
    assert grown.run.n_dropped_rows == 0
    use(grown, "probe", 2)
    assert grown.run.n_dropped_rows == 2 * ROWS  # the rest at the next minute, or by whoever collects
    collect_run(grown.run.plan.folder)
    assert grown.run.n_dropped_rows == 4 * ROWS
    assert numbers(grown.run) == [4, 5, 6, 7]
    assert len(segments(grown)) == 4
    assert numbers(reader) == list(range(8))
    collect_run(grown.run.plan.folder, grace_s=500)
    assert len(segments(grown)) == 4
    assert numbers(reader) == list(range(8))
    collect_run(grown.run.plan.folder, grace_s=0)
    assert len(segments(grown)) == 2
    assert (numbers(grown.run), verify_run(grown.run).problems) == ([4, 5, 6, 7], [])
    grown.lake.retain("made", None)
    use(grown, "probe", 2)
    collect_run(grown.run.plan.folder, grace_s=0)
    assert numbers(grown.run) == [4, 5, 6, 7]


def test_pages_that_are_merged_keep_what_was_dropped(grown):
    grown.lake.retain("made", ["sae"], grace_s=0)
    for number in range(8, 40):
        append(grown, [number])
        compact(grown.run.plan.folder)
        use(grown, "sae", 1)
    run = grown.run
    assert max(page.level for page in run.snapshot.version.pages) > 0
    used = consumed(run.plan.folder, "sae")
    assert sorted(run.dropped["id"]) == sorted(used)
    assert numbers(run) == [number for number in range(40) if f"p{number}" not in used]
    assert run.stats[HOOK].count == 40 * ROWS
    assert run.stats[HOOK].mean[0] == pytest.approx(19.5)
    assert verify_run(run).problems == []
    append(grown, range(40))
    assert numbers(grown.run) == numbers(run)


def test_what_was_given_and_not_used_is_given_again(grown):
    folder = grown.run.plan.folder
    given = [view for _, view in zip(range(3), Follower(grown.run, "sae", view_rows=2 * ROWS).views(), strict=False)]
    append(grown, range(8, 10))
    compact(folder)
    again = Follower(grown.run, "sae", poll_s=0.01, timeout_s=0, view_rows=5 * ROWS)
    views = [(number, view.prompts["id"].tolist()) for number, view in again.views()]
    assert views[:3] == [(number, view.prompts["id"].tolist()) for number, view in given]
    assert views[3:] == [(3, ["p6", "p7", "p8", "p9"])]
    assert position(folder, "sae").views == 0
    again.use(1)
    at = position(folder, "sae")
    assert (at.views, at.prompts, at.rows) == (2, 4, 4 * ROWS)
    with pytest.raises(InvalidInput, match="view_rows is 0"):
        grown.run.follow(view_rows=0)


def test_what_retention_cannot_be(grown):
    with pytest.raises(InvalidInput, match=r"retention of run 'made': consumed_by"):
        grown.lake.retain("made", [])
    with pytest.raises(InvalidInput, match="grace_s"):
        grown.lake.retain("made", ["sae"], grace_s=-1)
    with pytest.raises(InvalidInput, match=r"label name '\.\./x'"):
        grown.lake.retain("made", ["../x"])
    seal_run(grown.folder)
    with pytest.raises(InvalidInput, match="is sealed"):
        grown.lake.retain("made", ["sae"])


def test_ids_that_no_key_leads_to_are_found(grown, monkeypatch):
    """The keys decide whether an id is looked for at all: a request of a missing one would become visible again."""
    right = versions.prompt_keys
    monkeypatch.setattr(versions, "prompt_keys", lambda ids: right(ids) ^ np.uint64(1))
    compact(grown.run.plan.folder)
    monkeypatch.undo()
    (problem,) = verify_run(grown.run).problems
    assert problem.endswith(".keys does not have the keys of its prompts")


def test_a_writer_stops_at_the_quota_and_what_it_has_can_be_committed(grown):
    used = used_bytes(grown.lake)
    write_configuration(grown.lake, LakeConfiguration(quota_bytes=used + 3 * ROWS * 4 * 4 * 2))
    writer = RunWriter(grown.folder, grown.lake.spec("made"))
    steps = np.arange(ROWS, dtype=np.int32)
    requests = [
        CapturedRequest(f"q{n}", steps, ROWS, steps, dict.fromkeys(writer.spec.hooks, np.ones((ROWS, 4), np.float32)))
        for n in range(4)
    ]
    for request in requests[:3]:
        writer.append(request)
    with pytest.raises(QuotaExceeded, match=rf"has {used:,} bytes, and run 'made' would add 512, but it may have"):
        writer.append(requests[3])
    writer.commit()
    assert verify_run(grown.run).problems == []
    assert grown.run.n_rows == 11 * ROWS
    with pytest.raises(QuotaExceeded):
        writer.append(requests[3])  # what was committed counts
    with pytest.raises(QuotaExceeded, match="run 'made' would"):
        grown.run.labels.add("good", [True] * 11, by="prompt")
    write_configuration(grown.lake, LakeConfiguration(run_quota_bytes=used))
    with pytest.raises(QuotaExceeded, match=r"a run of the lake .* may have"):
        RunWriter(grown.folder, writer.spec).append(requests[3])
    write_configuration(grown.lake, LakeConfiguration())
    RunWriter(grown.folder, writer.spec).append(requests[3])


def test_writers_that_all_looked_at_the_same_time_do_not_pass_the_quota_together():
    """Each sees all the room there is; none may take it before it looks again, although no minute passes."""
    lake = open_lake(f"memory://{uuid.uuid4().hex}", create=True)
    quota, rows = 24 << 20, 64
    spec = lake.create_run("many", hooks=(HOOK,), d_model=1024, dtype="float32", chunk_rows=rows, shard_rows=10 * rows)
    write_configuration(lake, LakeConfiguration(quota_bytes=quota))
    writers = [RunWriter(lake.run_storage("many"), spec, compact_every=0, statistics=False) for _ in range(8)]
    steps, values = np.arange(rows, dtype=np.int32), np.ones((rows, 1024), np.float32)
    left, number = list(writers), 0
    while left:
        for writer in list(left):
            number += 1
            try:
                writer.append(CapturedRequest(f"p{number}", steps, rows, steps, {HOOK: values}))
                writer.commit()
            except QuotaExceeded:
                left.remove(writer)
    assert used_bytes(lake) <= quota + len(writers) * QUOTA_BYTES
    assert lake["many"].n_rows * 4096 > 0.8 * quota


def test_shards_of_the_open_segment_count_once(monkeypatch):
    lake = open_lake(f"memory://{uuid.uuid4().hex}", create=True)
    sizes = {"hooks": (HOOK,), "d_model": 1024, "dtype": "float32", "chunk_rows": 32, "shard_rows": 64}
    spec = lake.create_run("one", **sizes)
    need = 16 * 64 * 4096 * 1.05
    write_configuration(lake, LakeConfiguration(quota_bytes=int(need)))
    writer = RunWriter(lake.run_storage("one"), spec, segment_rows=16 * 64, compact_every=0, statistics=False)
    monkeypatch.setattr("millpond.store.configuration.QUOTA_SECONDS", -1)  # looks at every request
    steps, values = np.arange(64, dtype=np.int32), np.ones((64, 1024), np.float32)
    for number in range(15):
        writer.append(CapturedRequest(f"p{number}", steps, 64, steps, {HOOK: values}))
    assert used_bytes(lake) > 0.8 * need  # all but what waits is there to be listed
    writer.append(CapturedRequest("last", steps, 64, steps, {HOOK: values}))
    assert lake["one"].n_rows == 1024
