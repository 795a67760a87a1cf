"""Batch jobs as users run them: through the command line, killed, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from millpond.analysis.jobs import ProbeJob, read_probe_job, run_probe_job
from millpond.analysis.probes.logistic import LogisticProbe
from millpond.store.errors import HookNotCaptured, InvalidInput, LabelNotFound, RunOpen
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

D = 12
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4))


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """A sealed run whose label is ever more linear in deeper layers, and an open one."""
    lake = open_lake(tmp_path_factory.mktemp("jobs") / "lake", create=True)
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    for name in ("deep", "open"):
        spec = lake.create_run(name, hooks=HOOKS, d_model=D, dtype="float32", chunk_rows=64, shard_rows=256)
        writer = RunWriter(lake.run_folder(name), spec)
        labels = {}
        for number in range(50):
            inside = rng.random(30) < 0.4
            rows = {
                hook: (rng.standard_normal((30, D)) + layer * 0.3 * inside[:, None] * direction).astype(np.float32)
                for layer, hook in enumerate(HOOKS)
            }
            tokens = np.arange(30, dtype=np.int32)
            writer.append(CapturedRequest(f"p{number}", tokens, 30, tokens, rows))
            labels[f"p{number}"] = inside
        writer.commit()
        if name == "deep":
            types = {"inside": "bool"}
            seal_run(
                lake.run_folder(name), token_labels={"inside": labels}, token_label_dtypes=types, expected_rows=1500
            )
    return lake


def job_of(lake, out, **given):
    return ProbeJob(
        **({"run": f"{lake.folder}/deep", "hooks": ("*",), "label": ("inside",), "out": str(out), "workers": 0} | given)
    )


def test_a_job_equals_the_sweep_by_hand(lake, tmp_path):
    done = run_probe_job(job_of(lake, tmp_path / "out", seed=3), progress=False)
    train, test = lake["deep"].split(test=0.2, seed=3)
    swept = LogisticProbe(progress=False).sweep(train, test, "*", "inside", seed=3)
    assert json.loads((done.folder / "result.json").read_text())["rows"] == json.loads(json.dumps(list(swept.rows)))
    lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["hook"] for line in lines] == [row["hook"] for row in swept.rows]
    with np.load(done.folder / "hooks" / f"{HOOKS[3]}.npz") as weights:
        np.testing.assert_array_equal(weights["inside|1|coef"], swept.probes[HOOKS[3], "inside", 1.0].coef_)
    assert (done.folder / "layers.png").read_bytes()[:4] == b"\x89PNG"
    assert read_probe_job(done.folder / "job.toml") == job_of(lake, tmp_path / "out", seed=3)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_gives_the_same_bytes(lake, tmp_path):
    whole = run_probe_job(job_of(lake, tmp_path / "whole"), progress=False)
    toml = tmp_path / "job.toml"
    toml.write_text(f'run = "{lake.folder}/deep"\nhooks = ["blocks.*"]\nlabel = "inside"\nseed = 9\n')
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "millpond.cli", "probe", str(toml), "--out", str(out), "--seed", "0",
        "--hooks", "*", "--workers", "2", "--memory-limit", "1GB",
    ]  # fmt: skip
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as first:
        while not list(out.glob("hooks/*.json")) and first.poll() is None:
            time.sleep(0.005)
        os.killpg(first.pid, signal.SIGKILL)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("hooks/*.json")}
    assert 1 <= len(finished) < len(HOOKS), first.stderr
    assert not (out / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(finished)} hooks from before" in done.stdout
    assert all((out / "hooks" / name).stat().st_mtime_ns == time_ns for name, time_ns in finished.items())
    for name in ("metrics.jsonl", *(f"hooks/{hook}.json" for hook in HOOKS)):
        assert (out / name).read_bytes() == (whole.folder / name).read_bytes()
    rows = [json.loads((folder / "result.json").read_text())["rows"] for folder in (out, whole.folder)]
    assert rows[0] == rows[1]


def test_a_file_says_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('run = "lake/x"\nhooks = "a"\nlabel = ["b"]\nout = "o"\nstrengths = 0.5\nworkers = 1\n')
    assert read_probe_job(path) == ProbeJob("lake/x", ("a",), ("b",), "o", strengths=(0.5,), workers=1)
    path.write_text("seed = [1]")
    with pytest.raises(InvalidInput, match=r"seed: .*integer"):
        read_probe_job(path)
    path.write_text("hook = 1")
    with pytest.raises(InvalidInput, match="hook: unknown field"):
        read_probe_job(path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"run": "deep"}, InvalidInput, "its lake's folder, a slash and its name"),
        ({"hooks": ("blocks.7.hook_resid_post",)}, HookNotCaptured, r"blocks\.7"),
        ({"label": ("nothing",)}, LabelNotFound, "nothing"),
        ({"label": ()}, InvalidInput, "label is missing"),
        ({"estimator": "svm"}, InvalidInput, "estimator"),
        ({"workers": -1}, InvalidInput, "workers is -1"),
        ({"test": 2.0}, InvalidInput, "test is 2.0"),
    ],
)
def test_what_cannot_run_is_refused_before_the_folder_is_made(lake, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        run_probe_job(job_of(lake, tmp_path / "out", **change), progress=False)
    assert not (tmp_path / "out").exists()


def test_an_open_run_and_another_jobs_folder_are_refused(lake, tmp_path):
    with pytest.raises(RunOpen, match="'open' is open"):
        run_probe_job(job_of(lake, tmp_path / "out", run=f"{lake.folder}/open"), progress=False)
    run_probe_job(job_of(lake, tmp_path / "out", hooks=(HOOKS[0],)), progress=False)
    with pytest.raises(InvalidInput, match="another job"):
        run_probe_job(job_of(lake, tmp_path / "out", hooks=(HOOKS[1],)), progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(InvalidInput, match="not empty"):
        run_probe_job(job_of(lake, tmp_path / "mine"), progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler": "tcp://192.0.2.1:8786"}, r"scheduler: .*loopback only.*tls://HOST:PORT"),
        ({"scheduler": "192.0.2.1"}, r"scheduler: .*tls://HOST:PORT"),
        ({"scheduler": "tls://h:1", "workers": 2}, "give one of the two"),
        ({"scheduler": "tls://h:1", "memory_limit": "1GB"}, "memory_limit"),
        ({"workers": 2, "memory_limit": "much"}, "such as 4GB"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_before_the_folder_is_made(lake, tmp_path, change, words):
    with pytest.raises(InvalidInput, match=words):
        run_probe_job(job_of(lake, tmp_path / "out", **({"workers": None} | change)), progress=False)
    assert not (tmp_path / "out").exists()
