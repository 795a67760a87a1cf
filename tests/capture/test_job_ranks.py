"""Jobs through engines of two processes: every row against Hugging Face."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import millpond as mp
from millpond.store.artifacts import save_probe
from millpond.store.lake import open_lake
from millpond.store.verify import verify_run
from tests.capture.artifacts import INTERCEPT, coefficients
from tests.capture.conftest import D_MODEL, HOOK, MODEL, N_LAYERS, Reference
from tests.capture.serving import TWO_CORES
from tests.capture.test_serving import assert_rows, prompt_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("parallel", "writers"), [("tensor", 1), ("pipeline", 1), ("data", 2)])
def test_a_job_of_two_ranks_is_hugging_faces(
    parallel: str, writers: int, tmp_path: Path, reference: Reference, python_prompts: list[list[int]]
) -> None:
    lake = open_lake(tmp_path / "lake", create=True)
    save_probe(lake, "p", coefficients(D_MODEL), INTERCEPT)
    sent = {f"p{number}": ids for number, ids in enumerate(python_prompts)}
    prompts, job = tmp_path / "prompts.jsonl", tmp_path / "job.toml"
    prompts.write_text("".join(json.dumps({"id": name, "token_ids": ids}) + "\n" for name, ids in sent.items()))
    job.write_text(f"""
        model = {{path = "{MODEL}", dtype = "float32"}}
        prompts = {{path = "{prompts}"}}
        destination = {{lake = "{lake.folder}", run = "run", chunk_rows = 64, shard_rows = 512}}
        engine = {{{parallel}_parallel_size = 2, kv_cache_memory_bytes = {1 << 28}, max_num_batched_tokens = 128, max_num_seqs = 8}}
        [capture]
        hooks = ["blocks.*.hook_resid_post"]
        reads = [{{read = "probe", artifact = "p", hook = "{HOOK.format(N_LAYERS - 1)}"}}]
        max_new_tokens = 4
    """)
    command = [sys.executable, "-m", "millpond.cli", "capture", str(job), "--metrics", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | TWO_CORES, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    run = mp.open(tmp_path / "lake")["run"]
    assert (run.state, verify_run(run).problems) == ("sealed", [])
    assert sorted(run.prompts["id"]) == sorted(sent)
    shown = "".join(file.read_text() for file in tmp_path.glob("*.prom"))
    written = [float(rows) for rows in re.findall(r"^millpond_capture_committed_rows_total\{.*\} (\S+)$", shown, re.M)]
    assert (len(written), sum(written)) == (writers, run.n_rows)
    assert min(written) > run.n_rows / 4
    for name, ids in sent.items():
        at, tokens, rows = prompt_rows(run, name)
        assert at == list(range(len(ids) + 3))
        assert tokens[: len(ids)] == ids
        assert_rows(rows, reference.residuals(tokens))
        scores = run.select([name]).reads["p"]["scores"].values
        expected = rows[-1] @ coefficients(D_MODEL).T + INTERCEPT
        assert abs(scores - expected).max() <= 1e-5 * abs(expected).max()
