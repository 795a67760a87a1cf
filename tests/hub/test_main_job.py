"""The whole main job as `millpond demo` runs it, with real vLLM, on a tenth of the demo's tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import millpond as mp

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_captures_probes_decomposes_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [
        sys.executable,
        "-m",
        "millpond.cli",
        "demo",
        "--out",
        str(out),
        "--tokens",
        "40000",
        "--sae-tokens",
        "400000",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(out / "report.html")

    run = mp.open(out / "lake")["stdlib-heldout"]
    assert run.state == "sealed"
    prompts = pd.read_parquet(out / "prompts.parquet")
    assert len(run) == sum(len(ids) - 1 for ids in prompts["token_ids"])  # all but the beginning-of-sequence tokens
    by_id = prompts.set_index("id")
    tokens = run.tokens.compute()
    in_string = run.labels["in_string"].values
    for number, prompt_id in list(run.prompts["id"].items())[::17]:
        mine = tokens["prompt"].values == number
        assert tokens["token_id"].values[mine].tolist() == by_id.loc[prompt_id, "token_ids"][1:].tolist()
        assert in_string[mine].tolist() == by_id.loc[prompt_id, "in_string"][1:].tolist()

    rows = pd.DataFrame([json.loads(line) for line in (out / "sweep" / "metrics.jsonl").read_text().splitlines()])
    best = rows[~rows["control"]].groupby("label")["auroc"].max()
    assert best["in_string"] > 0.95
    assert best["in_comment"] > 0.95
    common = rows[rows["control"] & rows["label"].isin(["in_string", "in_comment"])]
    assert np.all(np.abs(common["auroc"] - 0.5) < 0.05)

    sae = mp.BatchTopKSae.load(out / "sae")
    _, test = run.split(0.25, 0, by="path")
    result = sae.evaluate(test["blocks.3.hook_resid_post"])
    assert result["explained_variance"] > 0.5  # on a tenth of the rows and of the training
    page = (out / "report.html").read_text()
    assert f"{len(run):,} x 6 hooks" in page
    assert not re.search(r"""(?:src|href)=["']https?://""", page)

    verified = subprocess.run(
        [sys.executable, "-m", "millpond.cli", "verify", str(out / "lake")], capture_output=True, text=True
    )
    assert verified.returncode == 0
    assert f"whole; {len(run):,} rows" in verified.stdout
