"""What a capture job refuses, how it says so, and what it leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import millpond as mp
from millpond.capture.job import run_capture
from millpond.capture.plan import plan_capture
from millpond.capture.prompt_file import read_prompts
from millpond.cli import main
from millpond.store.capture_spec import CaptureJob, PairedSection, PromptsSection, read_job
from millpond.store.configuration import LakeConfiguration, write_configuration
from millpond.store.errors import InvalidInput, RunExists
from millpond.store.objects import open_storage
from millpond.store.seal import seal_run
from millpond.store.verify import verify_run
from tests.capture.conftest import MODEL

GOOD = [
    {"id": "a", "token_ids": [0, 5, 6], "mark": [True, False, True]},
    {"id": "b", "token_ids": [0, 7], "mark": [False, True]},
]


Refused = Callable[..., None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a job file ends the command with 2 and one line that holds all words."""

    def check(job: Path, *words: str) -> None:
        assert main(["capture", str(job)]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        for word in words:
            assert word in printed

    return check


@pytest.fixture
def refused_prompts(refused: Refused, write_prompts: Callable[..., Path], write_job: Callable[..., Path]) -> Refused:
    """The same for a job of these prompts; keywords change its sections, as those of `write_job`."""

    def check(prompts: list[dict[str, Any]], /, *words: str, **sections: dict[str, Any]) -> None:
        refused(write_job(write_prompts(prompts), **sections), *words)

    return check


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"path": "nowhere/model"}}, ["'nowhere/model'", "config.json", "Hugging Face model folder"]),
        ({"model": {"dtype": "int4"}}, ["model.dtype", "'int4'", "bfloat16"]),
        (
            {"capture": {"hooks": ["blocks.9.hook_resid_post"]}},
            ["blocks.9.hook_resid_post", "blocks.{0..5}.hook_resid_post"],
        ),
        ({"capture": {"hooks": ["resid"]}}, ["'resid'", "blocks.{0..5}.hook_resid_post"]),
        ({"capture": {"hooks": []}}, ["capture.hooks"]),
        ({"capture": {"hooks": "blocks.0.hook_resid_post"}}, ["capture.hooks: Input should be a list"]),
        ({"capture": {"positions": [2]}}, ["capture.positions", "'b'", "2 tokens"]),
        ({"capture": {"positions": "some"}}, ["capture.positions: give 'all', ", "or a list of positions", "'some'"]),
        ({"capture": {"positions": []}}, ["capture.positions: give 'all', ", "or a list of positions", "[]"]),
        ({"capture": {"positions": "generated"}}, ["capture.positions", "selects no token"]),
        ({"capture": {"hook": "x"}}, ["capture.hook", "did you mean 'hooks'?"]),
        ({"prompts": {"path": "nowhere.jsonl"}}, ["'nowhere.jsonl'", "does not exist"]),
        ({"prompts": {"path": "prompts.csv"}}, ["'prompts.csv'", ".jsonl, .parquet or .txt"]),
        ({"prompts": {"metadata": ["author"]}}, ["'author'", "id, token_ids, mark"]),
        ({"destination": {"run": "../up"}}, ["'../up'"]),
        ({"destination": {"consumed_by": ["sae", "a b"]}}, ["destination.consumed_by.1", "'a b'"]),
        ({"destination": {"lake": "/proc/lake"}}, ["/proc/lake", "0 B free", "free space"]),
        ({"destination": {"shard_rows": 100}}, ["shard_rows 100", "chunk_rows 16"]),
        (
            {"destination": {"lake": "gs://bucket/lake"}},
            ["destination.lake", "'gs://bucket/lake'", "s3://bucket/prefix"],
        ),
        ({"destination": {"lake": "memory://lake"}}, ["destination.lake", "'memory://lake'", "s3://bucket/prefix"]),
        ({"destination": {"lake": ""}}, ["destination.lake", "''"]),
        ({"destination": {"lake": __file__}}, ["test_job.py"]),
        ({"destination": {"lake": "/etc"}}, ["'/etc'", "is not a lake"]),
        ({"capture": {"max_new_tokens": 512}}, ["max_new_tokens", "512"]),
        ({"prompts": {"id": "uid"}}, ["'uid'", "prompts.id", "id, token_ids, mark"]),
        ({"prompts": {"metadata": ["mark", "mark"]}}, ["mark, mark", "twice"]),
        ({"engine": {"nonsense": 1}}, ["engine.nonsense"]),
        ({"engine": {"dtype": "bfloat16"}}, ["engine.dtype", "set by Millpond"]),
        ({"destination": {"reuse": ["gone"]}}, ["destination.reuse.0", "'gone'", "no runs yet"]),
        ({"engine": {"tensor_parallel_size": "two"}}, ["engine.tensor_parallel_size", "'two'"]),
        ({"engine": {"data_parallel_size": 0}}, ["engine.data_parallel_size", "0", "from 1 to"]),
        ({"engine": {"data_parallel_rank": 1}}, ["engine.data_parallel_rank", "one machine"]),
        ({"engine": {"max_model_len": 1000}}, ["engine.max_model_len", "1000", "512"]),
        ({"engine": {"max_num_seqs": "many"}}, ["engine.max_num_seqs", "'many'"]),
    ],
)
def test_a_bad_field_is_refused_by_name(
    sections: dict[str, Any],
    words: list[str],
    tmp_path: Path,
    refused_prompts: Refused,
) -> None:
    refused_prompts(GOOD, *words, **sections)
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, ["intervene.0.op: Field required"]),
        ({"op": "steer"}, ["intervene.0.op", "'add', 'ablate'", "'steer'"]),
        ({"op": "add", "vector": [1.0, 2.0]}, ["intervene.0", "vector has 2 numbers", "256"]),
        ({"op": "add", "vector": "truth"}, ["intervene.0", "no lake", "'truth'"]),
        ({"op": "add", "vector": [1.0] * 256, "hook": "blocks.6.hook_resid_post"}, ["intervene.0", "'blocks.6."]),
        (
            {"op": "add", "vector": [1.0] * 256, "positions": [3, 4]},
            ["intervene.0", "(3, 4)", "no token of any prompt"],
        ),
        ({"op": "ablate", "vector": [0.0] * 256}, ["intervene.0", ": vector is zero"]),
    ],
)
def test_a_bad_intervention_is_refused_by_number(
    asked: dict[str, Any],
    words: list[str],
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    refused: Refused,
) -> None:
    job = write_job(write_prompts(GOOD))
    fields = {"hook": "blocks.0.hook_resid_post", **asked}
    job.write_text(
        job.read_text() + "\n[[intervene]]\n" + "\n".join(f"{key} = {json.dumps(v)}" for key, v in fields.items())
    )
    refused(job, *words)


def test_prompts_that_an_intervention_misses_are_counted(
    write_prompts: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    prompts = [{"id": str(i), "token_ids": list(range(n))} for i, n in enumerate((2, 5, 5, 9))]
    job = read_job(
        write_job(write_prompts(prompts), capture={"hooks": ["blocks.0.hook_resid_post"], "max_new_tokens": 2})
    )
    wheres: list[dict[str, Any]] = [
        {},
        {"positions": [0, 5]},  # two tokens are generated, and the second one's position is never computed
        {"positions": [-9]},
        {"positions": "prompt", "first_position": 4},
        {"positions": "prompt", "token_ids": [3, 100]},
        {"token_ids": [3]},  # one of the generated may be
    ]
    asked = [{"op": "add", "hook": "blocks.0.hook_resid_post", "vector": [1.0] * 256} | where for where in wheres]
    plan = plan_capture(CaptureJob.model_validate(job.model_dump() | {"intervene": asked}))
    assert plan.missed == (0, 1, 3, 1, 1, 0)
    told = [line for line in plan.summary().splitlines() if line.startswith("missed")]
    assert len(told) == 4
    assert told[1] == "missed   intervene.2: 3 of 4 prompts lack some or all of its positions"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["has no prompts"]),
        ([{"id": "a", "token_ids": []}], ["'a'", "no tokens"]),
        ([{"id": "a", "token_ids": [0] * 600}], ["PromptTooLong", "'a'", "600", "511"]),
        ([{"id": "a", "token_ids": [0, 4096]}], ["'a'", "4096", "0 to 4095"]),
        ([{"id": "a", "token_ids": [0]}, {"id": "a", "token_ids": [1]}], ["'a'", "twice"]),
        ([{"id": "a", "token_ids": ["x"]}], ["token_ids", "lists of integers"]),
        ([{"id": "a", "body": "x"}], ["'text'", "'token_ids'", "body"]),
        ([{"id": "a", "text": 3}], ["prompt 1", "3"]),
        ([{"id": "a", "token_ids": [1.5]}], ["prompt 1", "[1.5]", "lists of integers"]),
        ([{"id": "a", "token_ids": "123"}], ["prompt 1", "'123'", "lists of integers"]),
        ([{"id": "a", "token_ids": [1]}, {"token_ids": [1]}], ["prompt 2", "nan"]),
        ([{"id": "", "token_ids": [1]}], ["prompt 1", "''"]),
    ],
)
def test_bad_prompts_are_refused(
    prompts: list[dict[str, Any]],
    words: list[str],
    refused_prompts: Refused,
) -> None:
    refused_prompts(prompts, *words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[True], [True, False]], ["'mark'", "'a'", "1 values", "3 tokens"]),
        ([[True, True, True], 4], ["'mark'", "'b'", "4"]),
        ([["x", "y", "z"], ["x", "y"]], ["'mark'", "booleans, integers or floats"]),
        ([[[1], [2], [3]], [1, 2]], ["'mark'", "'a'", "one value a token"]),
        ([[[1], [2, 3], [4]], [1, 2]], ["'mark'", "'a'", "one value a token"]),
    ],
)
def test_token_labels_of_the_wrong_form_are_refused(
    labels: list[Any],
    words: list[str],
    refused_prompts: Refused,
) -> None:
    prompts = [prompt | {"mark": mark} for prompt, mark in zip(GOOD, labels, strict=True)]
    refused_prompts(prompts, *words, prompts={"token_labels": ["mark"]})


@pytest.mark.parametrize(
    ("sections", "values", "words"),
    [
        ({"metadata": ["kind"]}, [1, "x"], ["'kind'", "mixes types"]),
        ({"prompt_labels": ["kind"]}, ["y", None], ["'kind'", "missing", "'b'"]),
    ],
)
def test_prompt_columns_that_cannot_be_stored_are_refused_before_the_capture(
    sections: dict[str, Any],
    values: list[Any],
    words: list[str],
    refused_prompts: Refused,
) -> None:
    prompts = [prompt | {"kind": value} for prompt, value in zip(GOOD, values, strict=True)]
    refused_prompts(prompts, *words, prompts=sections)


def test_models_that_cannot_be_used_are_refused(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    refused: Refused,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    job = write_job(write_prompts(GOOD), model={"path": str(model)})
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"num_hidden_layers": 6', '"num_hidden_layers": "x"'))
    refused(job, "config.json")
    (model / "config.json").write_text(
        config.replace('"num_hidden_layers"', '"num_local_experts": 8, "num_hidden_layers"')
    )
    experts = write_job(write_prompts(GOOD), model={"path": str(model)}, engine={"data_parallel_size": 2})
    refused(experts, "engine.data_parallel_size is 2", "mixture of experts", "several captures")
    job = write_job(write_prompts(GOOD), model={"path": str(model)})
    (model / "config.json").write_text(config)
    (model / "model.safetensors").write_bytes(b"ab")
    refused(job, "model.safetensors", "no safetensors file")


def test_malformed_jsonl_names_the_line(tmp_path: Path, write_job: Callable[..., Path], refused: Refused) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": "a", "token_ids": [1]}\n\n{"id": "b", \n')
    refused(write_job(path), "broken.jsonl:3")
    path.write_text('{"id": "a", "text": "\\ud83d\\ude00"}\n{"id": "b", "text": "\\ud83d"}\n')
    refused(write_job(path), "broken.jsonl:2", "'\\ud83d' is half of a surrogate pair")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_prompts_may_be_objects_of_a_store(tmp_path: Path, name: str) -> None:
    """Named by a URL, as the gateway hands them to workers on other hosts."""
    table = pd.DataFrame(GOOD)
    data = table.to_json(orient="records", lines=True).encode() if name == "p.jsonl" else table.to_parquet(index=False)
    storage = open_storage(f"memory://{tmp_path.name}/prompts")
    storage.put(name, data)
    found = read_prompts(PromptsSection(path=f"{storage.url}/{name}", token_labels=("mark",)), MODEL, 16, 100)
    assert (found.ids, found.token_ids) == (["a", "b"], [[0, 5, 6], [0, 7]])
    assert found.token_labels["mark"]["a"].tolist() == [True, False, True]
    with pytest.raises(InvalidInput, match="does not exist"):
        read_prompts(PromptsSection(path=f"{storage.url}/other.jsonl"), MODEL, 16, 100)


def test_malformed_toml_and_a_missing_job_file_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "job.toml"
    refused(path, "job.toml", "No such file")
    path.write_text("[model\n")
    refused(path, "job.toml", "not TOML", "line 1")
    path.write_text("[model]\n")
    refused(path, "job.toml", "model.path", "required")


def test_an_existing_run_is_refused(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    refused: Refused,
) -> None:
    job = write_job(write_prompts(GOOD))
    lake = mp.open(tmp_path / "lake", create=True)
    lake.create_run("run", hooks=("blocks.0.hook_resid_post",), d_model=4, dtype="float32")
    refused(job, "RunExists", "'run'", "is open", "capture JOB --resume", "millpond rm")
    seal_run(lake.run_storage("run"))
    refused(job, "RunExists", "'run'", "millpond rm")


def test_paired_runs_are_made_all_or_none(write_prompts: Callable[..., Path], write_job: Callable[..., Path]) -> None:
    """Somebody else makes the second one after the job was checked."""
    job = read_job(write_job(write_prompts(GOOD)))
    plan = plan_capture(job.model_copy(update={"paired": (PairedSection(run="second"), PairedSection(run="third"))}))
    lake = mp.open(job.destination.lake, create=True)
    lake.create_run("second", hooks=("blocks.0.hook_resid_post",), d_model=4, dtype="float32")
    with pytest.raises(RunExists, match="'second'"):
        run_capture(plan)
    with pytest.raises(InvalidInput, match="'second' was begun with another job"):
        run_capture(plan, resume=True, keep=True)
    assert list(lake) == ["second"]
    assert lake["second"].d_model == 4


def test_a_plan_counts_rows_and_bytes(write_prompts: Callable[..., Path], write_job: Callable[..., Path]) -> None:
    many = [{"id": str(number), "token_ids": [0] * 500} for number in range(10)]
    plan = plan_capture(read_job(write_job(write_prompts(many))))
    assert plan.rows == 5000
    assert plan.bytes == 5000 * 6 * 256 * 4


def test_a_job_beyond_the_quota_is_refused_before_a_run_is_made(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    refused: Refused,
) -> None:
    job = write_job(write_prompts(GOOD))
    plan = plan_capture(read_job(job))
    lake = mp.open(plan.job.destination.lake, create=True)
    write_configuration(lake, LakeConfiguration(run_quota_bytes=plan.bytes - 1))
    refused(job, "QuotaExceeded", f"would have {plan.bytes:,} bytes", "run_quota_bytes: millpond configure")
    assert list(lake) == []


def test_a_dry_run_counts_and_writes_nothing(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["capture", str(write_job(write_prompts(GOOD), capture={"positions": "last"})), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2, 5 tokens" in printed
    assert "2 a hook, 12.3 kB in all" in printed  # 2 rows x 6 hooks x 256 x 4 bytes
    assert not (tmp_path / "lake").exists()


def run_cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "millpond.cli", *arguments], capture_output=True, text=True, **options)


@pytest.mark.slow
def test_texts_labels_and_metadata_reach_the_run(tmp_path: Path, write_job: Callable[..., Path]) -> None:
    texts = ["def f(x):\n    return x\n", "import os\n", "class A:\n    pass\n"]
    path = tmp_path / "prompts.parquet"
    pd.DataFrame(
        {"name": ["x", "y", "z"], "text": texts, "kind": ["def", "import", "class"], "n": [1, 2, 3]}
    ).to_parquet(path)
    job = write_job(path, prompts={"id": "name", "prompt_labels": ["kind"], "metadata": ["n"]})
    done = run_cli("capture", str(job))
    assert done.returncode == 0, done.stderr[-2000:]
    run = mp.open(tmp_path / "lake")["run"]
    table = run.prompts.set_index("id")
    assert table["n"].to_dict() == {"x": 1, "y": 2, "z": 3}
    tokens = run.tokens.compute()
    kinds = run.labels["kind"].values
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.provenance["capture"]["model"]["path"])
    for number, row in run.prompts.iterrows():
        mine = tokens["prompt"].values == number
        assert tokenizer.decode(tokens["token_id"].values[mine][1:]) == texts["xyz".index(row["id"])]
        assert set(kinds[mine]) == {row["kind"]}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_confirmed_and_a_second_capture_is_kept_out(
    tmp_path: Path, write_prompts: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    """The terminal sends SIGINT to the engine's process too; a prompt without wanted rows is stored as such."""
    sent = [{"id": str(n), "token_ids": [0] if n == 0 else [0, 5] * 150} for n in range(2000)]
    shards = {"chunk_rows": 64, "shard_rows": 4096}
    job = write_job(write_prompts(sent), capture={"first_position": 1}, destination=shards)
    command = [sys.executable, "-m", "millpond.cli", "capture", str(job)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "lake" / "runs").glob("run/commits/[!.]*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130, printed[-2000:]
    assert printed.splitlines()[-1].startswith("millpond: interrupted")
    assert "Traceback" not in printed
    run = mp.open(tmp_path / "lake")["run"]
    assert run.state == "open"
    assert 0 < len(run.prompts) < len(sent)
    assert verify_run(run).problems == []
    assert run.prompts.set_index("id")["n_rows"].to_dict() == {
        prompt_id: 0 if prompt_id == "0" else 299 for prompt_id in run.prompts["id"]
    }
    with (tmp_path / "lake" / "runs" / "run" / "capture.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run_cli("capture", str(job), "--resume")
    assert second.returncode == 2
    assert "captured by another process" in second.stderr
    assert len(mp.open(tmp_path / "lake")["run"].prompts) == len(run.prompts)


@pytest.mark.slow
def test_a_disk_that_fills_in_the_middle_leaves_no_run(
    tmp_path: Path, write_prompts: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    job = write_job(write_prompts([{"id": str(number), "token_ids": [0] * 500} for number in range(8)]))
    script = f"""
        mount -t tmpfs -o size=64m none {tmp_path}/disk
        (until [ -e {tmp_path}/disk/lake/runs/run/run.json ]; do sleep 0.05; done
         head -c 60M /dev/zero > {tmp_path}/disk/filler) &
        {sys.executable} -m millpond.cli capture {job}
        code=$?
        wait
        echo runs left: $(ls -A {tmp_path}/disk/lake/runs)
        exit $code
    """
    (tmp_path / "disk").mkdir()
    job.write_text(job.read_text().replace(str(tmp_path / "lake"), str(tmp_path / "disk" / "lake")))
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    done = subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith(
        "millpond: CaptureFailed: writing to the lake failed: No space left on device"
    )
    assert done.stdout.splitlines()[-1] == "runs left:"


@pytest.mark.slow
def test_a_killed_capture_is_resumed_without_losing_or_repeating_a_prompt(
    tmp_path: Path, write_prompts: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    sent = [{"id": str(n), "token_ids": [0, *rng.integers(2, 4096, 200).tolist()]} for n in range(600)]
    job = write_job(write_prompts(sent), destination={"chunk_rows": 64, "shard_rows": 1024})
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond.cli", "capture", str(job)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "lake" / "runs").glob("run/commits/[!.]*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run = mp.open(tmp_path / "lake")["run"]
    assert run.state == "open"
    assert 0 < len(run.prompts) < len(sent)
    assert verify_run(run).problems == []
    other = write_job(write_prompts(sent[1:], "other.jsonl"), destination={"chunk_rows": 64, "shard_rows": 1024})
    refused_job = run_cli("capture", str(other), "--resume")
    assert refused_job.returncode == 2
    assert "another job" in refused_job.stderr
    job = write_job(write_prompts(sent), destination={"chunk_rows": 64, "shard_rows": 1024})
    done = run_cli("capture", str(job), "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    run = mp.open(tmp_path / "lake")["run"]
    assert sorted(run.prompts["id"], key=int) == [prompt["id"] for prompt in sent]
    assert verify_run(run).problems == []
    tokens = run.tokens.compute()
    for number, prompt_id in run.prompts["id"].items():
        assert (
            tokens["token_id"].values[tokens["prompt"].values == number].tolist() == sent[int(prompt_id)]["token_ids"]
        )
