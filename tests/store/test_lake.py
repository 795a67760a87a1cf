import json

import numpy as np
import pytest

from millpond.store.errors import InvalidInput, LakeCorrupt, RunExists, RunNotFound, UnsafeStore
from millpond.store.lake import open_lake
from millpond.store.verify import verify_run

HOOK = ("blocks.0.hook_resid_post",)


def new_run(lake, name="a", **more):
    return lake.create_run(name, **{"hooks": HOOK, "d_model": 4, "dtype": "bfloat16"} | more)


def test_a_lake_is_made_once_and_opened_again(tmp_path):
    with pytest.raises(InvalidInput, match="is not a lake"):
        open_lake(tmp_path / "lake")
    open_lake(tmp_path / "lake", create=True)
    lake = open_lake(f"file://{tmp_path / 'lake'}")
    assert list(lake) == []
    new_run(lake, "b")
    new_run(lake, "a")
    assert list(lake) == ["a", "b"]
    assert "a" in lake
    assert 3 not in lake
    assert lake["a"].n_rows == 0


def test_folders_that_are_no_lake_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InvalidInput, match="neither a lake nor empty"):
        open_lake(tmp_path, create=True)
    with pytest.raises(InvalidInput, match="cannot be used"):
        open_lake(tmp_path / "mine.txt" / "lake", create=True)


def test_an_interrupted_creation_can_be_done_again(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / ".millpond.json.0123").write_text("{")
    assert len(open_lake(tmp_path, create=True)) == 0


def test_unknown_versions_are_refused(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    new_run(lake)
    for path, what in (
        (tmp_path / "lake" / "runs" / "a" / "run.json", "upgrade"),
        (tmp_path / "lake" / "millpond.json", "upgrade"),
    ):
        document = json.loads(path.read_text())
        del document["crc32c"]
        path.write_text(json.dumps(document | {"version": 3}))
        with pytest.raises(InvalidInput, match=rf"version 3.*{what}"):
            open_lake(tmp_path / "lake")["a"]


def test_a_damaged_document_is_named_in_one_line(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    new_run(lake)
    path = lake.run_folder("a") / "run.json"
    document = json.loads(path.read_text())
    del document["crc32c"]
    path.write_text(json.dumps(document | {"d_model": -4}))
    with pytest.raises(LakeCorrupt, match=r"run.json is no RunSpec: d_model: ") as caught:
        lake["a"]
    assert "\n" not in str(caught.value)


def test_existing_and_missing_runs_are_named_with_a_remedy(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    with pytest.raises(RunNotFound, match="which holds no runs; name one"):
        lake["a"]
    new_run(lake)
    with pytest.raises(RunExists) as exists:
        new_run(lake)
    with pytest.raises(RunNotFound) as missing:
        lake["b"]
    with pytest.raises(RunNotFound, match="holds a; name one"):
        lake.delete("b")
    assert str(exists.value) == (
        f"run 'a' exists in the lake '{lake.folder}'; choose another name, or remove it with: millpond rm {lake.folder} a"
    )
    assert str(missing.value).startswith("run 'b' is not in the lake")
    assert lake.get("b") is None  # a Mapping: RunNotFound is a KeyError


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "é", "x" * 129, "a\n"])
def test_run_names(tmp_path, name):
    lake = open_lake(tmp_path / "lake", create=True)
    with pytest.raises(InvalidInput, match="is not allowed; use 1 to 128"):
        new_run(lake, name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"hooks": ()}, "hooks is empty"),
        ({"hooks": ("blocks.0.q",)}, "is not a hook point"),
        ({"d_model": 0}, "d_model is 0; give 1 or more"),
        ({"chunk_rows": 0}, "chunk_rows is 0; give 1 or more"),
        ({"chunk_rows": 3, "shard_rows": 8}, "shard_rows 8 is not a multiple of chunk_rows 3"),
        ({"dtype": "int8"}, "dtype 'int8' cannot be stored"),
        ({"provenance": {"model": object()}}, "provenance of run 'a' cannot be written"),
    ],
)
def test_refused_arguments_leave_nothing(tmp_path, argument, message):
    lake = open_lake(tmp_path / "lake", create=True)
    with pytest.raises(InvalidInput, match=message):
        new_run(lake, **argument)
    assert not (lake.folder / "runs").exists()


def test_hooks_are_sorted_and_aliases_resolved(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    spec = new_run(lake, hooks=("blocks.10.hook_out", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_pre"))
    assert spec.hooks == ("blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.10.hook_resid_post")


def test_deletion_leaves_nothing_and_frees_the_name(sealed):
    sealed.lake.delete("made")
    assert list((sealed.lake.folder / "runs").iterdir()) == []
    assert list(sealed.lake) == []
    new_run(sealed.lake, "made")
    assert sealed.run.n_rows == 0


def test_deletion_with_a_grace_period_can_be_taken_back(sealed):
    lake, values = sealed.lake, sealed.run[HOOK[0]]
    lake.delete("made", grace_s=3600)
    assert list(lake) == []
    with pytest.raises(RunNotFound):
        lake["made"]
    with pytest.raises(RunExists, match=r"waits for its grace period to end; .* millpond rm .* --grace 0"):
        new_run(lake, "made")
    assert np.array_equal(values.values, sealed.float32(HOOK[0]))  # opened before
    assert lake.collect() == {}
    lake.restore("made")
    assert verify_run(lake["made"]).ok
    lake.delete("made", grace_s=3600)
    assert lake.collect(grace_s=0, dry_run=True)["made"].bytes > 10_000
    assert lake.collect(grace_s=0)["made"].paths == ["runs/made"]
    with pytest.raises(RunNotFound, match="cannot be restored"):
        lake.restore("made")
    new_run(lake, "made")


def test_a_store_that_ignores_conditions_is_refused(tmp_path, monkeypatch):
    """As rclone's S3 server does: every creation succeeds."""
    from millpond.store.objects import MemoryStorage

    monkeypatch.setattr(MemoryStorage, "create", lambda self, path, data: self.put(path, data) or True)
    monkeypatch.setattr(MemoryStorage, "volume", f"memory://{tmp_path}")
    lake = open_lake(f"memory://{tmp_path.name}-careless", create=True)
    with pytest.raises(UnsafeStore, match=r"4 of 4 racing creates .*If-None-Match"):
        new_run(lake)
