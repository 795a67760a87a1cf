"""Whole capture jobs of the example model against Hugging Face on the same tokens; test_scheduler.py has the engine's tricks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millpond as mp
from millpond.store.verify import verify_run
from tests.capture.conftest import HOOK, N_LAYERS, Reference

pytestmark = pytest.mark.slow


def rows_by_prompt(run: mp.Run) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions, token ids and activations (n_layers, rows, d_model) of each prompt id."""
    coordinates = run.tokens.compute()
    layers = np.stack([run[HOOK.format(layer)].values for layer in range(N_LAYERS)])
    prompts = coordinates["prompt"].values
    return {
        prompt_id: (
            coordinates["position"].values[prompts == number],
            coordinates["token_id"].values[prompts == number],
            layers[:, prompts == number],
        )
        for number, prompt_id in run.prompts["id"].items()
    }


def relative_error(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Norm of the difference over the norm, by layer."""
    return np.linalg.norm(values - truth, axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))


def capture(tmp_path: Path, job: Path) -> mp.Run:
    done = subprocess.run([sys.executable, "-m", "millpond.cli", "capture", str(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = mp.open(tmp_path / "lake")["run"]
    assert run.state == "sealed"
    assert f"{len(run):,} rows asked = {len(run):,} stored" in done.stdout
    assert verify_run(run).problems == []
    return run


def test_float32_equals_hugging_face_with_generation(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    python_prompts: list[list[int]],
    reference: Reference,
) -> None:
    prompts = [{"id": f"p{number}", "token_ids": ids} for number, ids in enumerate(python_prompts)]
    engine = {"max_num_batched_tokens": 128, "max_num_seqs": 16, "enable_prefix_caching": True}
    job = write_job(write_prompts(prompts), capture={"max_new_tokens": 6}, engine=engine)
    captured = rows_by_prompt(capture(tmp_path, job))
    assert set(captured) == {prompt["id"] for prompt in prompts}
    for prompt in prompts:
        positions, token_ids, values = captured[prompt["id"]]
        n_prompt = len(prompt["token_ids"])
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
        assert token_ids[:n_prompt].tolist() == prompt["token_ids"]
        assert n_prompt <= len(positions) <= n_prompt + 5
        assert relative_error(values, reference.residuals(token_ids.tolist())).max() < 1e-4
    short = captured["p0"][1]
    n_prompt = len(python_prompts[0])
    assert short[n_prompt : n_prompt + 3].tolist() == reference.greedy(python_prompts[0], 3)


def test_bfloat16_is_no_worse_than_twice_hugging_faces_own_error(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    python_prompts: list[list[int]],
    reference: Reference,
    reference_bfloat16: Reference,
) -> None:
    prompts = [{"id": f"p{number}", "token_ids": ids} for number, ids in enumerate(python_prompts)]
    run = capture(tmp_path, write_job(write_prompts(prompts), model={"dtype": "bfloat16"}))
    assert run.dtype == "bfloat16"
    captured = rows_by_prompt(run)
    truth = np.concatenate([reference.residuals(p["token_ids"]) for p in prompts], axis=1)
    theirs = np.concatenate([reference_bfloat16.residuals(p["token_ids"]) for p in prompts], axis=1)
    ours = np.concatenate([captured[p["id"]][2] for p in prompts], axis=1)
    assert np.all(relative_error(ours, truth) <= 2 * relative_error(theirs, truth))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"positions": [0, -1, 2], "hooks": ["blocks.1.hook_out", "blocks.4.hook_resid_post"]},
            lambda n: [0, 2, n - 1],
        ),
        ({"positions": "generated", "max_new_tokens": 4}, lambda n: [n, n + 1, n + 2]),
    ],
)
def test_positions_choose_rows(
    section: dict[str, Any],
    expected: Callable[[int], list[int]],
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    python_prompts: list[list[int]],
    reference: Reference,
) -> None:
    chosen = [ids for ids in python_prompts if len(ids) > 5][:5]
    prompts = [{"id": f"p{number}", "token_ids": ids} for number, ids in enumerate(chosen)]
    run = capture(tmp_path, write_job(write_prompts(prompts), capture=section))
    coordinates = run.tokens.compute()
    layer = int(run.hooks[-1].split(".")[1])
    values = run[run.hooks[-1]].values
    for number, prompt_id in run.prompts["id"].items():
        ids = chosen[int(prompt_id[1:])]
        mine = coordinates["prompt"].values == number
        assert coordinates["position"].values[mine].tolist() == expected(len(ids))
        if "max_new_tokens" not in section:
            truth = reference.residuals(ids)[layer][expected(len(ids))]
            np.testing.assert_allclose(values[mine], truth, rtol=1e-3, atol=1e-3)
    assert len(run.hooks) == (2 if "hooks" in section else N_LAYERS)
