"""The SAE example from end to end on a few files, whose activations transformers computed in place of a capture."""

import json
import keyword
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from millpond.hub.demo import PROMPT_LABELS, RUN, TOKEN_LABELS
from millpond.store.dtypes import encode_bfloat16
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "stdlib_llama" / "model"
HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def demo(tmp_path):
    from transformers import AutoModelForCausalLM

    prompts = tmp_path / "prompts.parquet"
    subprocess.run(
        [sys.executable, EXAMPLES / "stdlib_llama" / "prompts.py", "--out", prompts, "--tokens", "12000"],
        check=True,
        capture_output=True,
    )
    table = pd.read_parquet(prompts)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    lake = open_lake(tmp_path / "demo" / "lake", create=True)
    provenance = {"model": str(MODEL)}
    spec = lake.create_run(RUN, hooks=(HOOK,), d_model=256, dtype="bfloat16", provenance=provenance, shard_rows=4096)
    writer = RunWriter(lake.run_folder(RUN), spec)
    for name, ids in zip(table["id"], table["token_ids"], strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[4][0, 1:].numpy()
        positions = np.arange(1, len(ids), dtype=np.int32)
        rows = {HOOK: encode_bfloat16(hidden)}
        writer.append(CapturedRequest(name, np.asarray(ids, np.int32), len(ids), positions, rows))
    writer.commit()
    labels = {name: dict(zip(table["id"], map(np.asarray, table[name]), strict=True)) for name in TOKEN_LABELS}
    seal_run(
        lake.run_folder(RUN),
        prompts=table[["id", "path", *PROMPT_LABELS]],
        prompt_labels=PROMPT_LABELS,
        token_labels=labels,
        token_label_dtypes=dict.fromkeys(TOKEN_LABELS, "bool") | {"bracket_depth": "int64", "indentation": "int64"},
    )
    return tmp_path / "demo"


@pytest.mark.slow
def test_the_example_trains_evaluates_and_shows_latents(demo, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "sae_stdlib.py", "--demo", demo, "--out", out, "--tokens", "60000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] >= 60_000
    assert last["l0"] == pytest.approx(32, abs=1)
    assert last["fvu"] < 0.7
    page = (out / "latents.html").read_text()
    assert "<mark>" in page
    assert "<script" not in page
    for label in ("in_string", "in_comment", "is_keyword"):
        assert f"\n{label}: latent " in done.stdout
    shown = done.stdout.partition("\nis_keyword: latent ")[2].splitlines()[1:4]
    tokens = [line.partition("[")[2].partition("]")[0].strip("' ") for line in shown]
    assert set(tokens) & set(keyword.kwlist), done.stdout
