"""On CUDA: recorded graphs, the staging ring's stream, both model runners. `make test-gpu`; skipped without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import torch

from millpond.capture.device_requests import DeviceFollower
from millpond.capture.device_tap import DeviceTaps
from millpond.capture.edits import Edits
from millpond.capture.requests import BankedEdit, Following
from millpond.store.capture_spec import CaptureWish
from millpond.store.interventions import Add
from millpond.store.lake import open_lake
from tests.capture.models import Inside
from tests.capture.test_device_engine import check_steered, mixed
from tests.capture.test_scheduler import ALL, POST, World, capture, prompts


def _has_gpu() -> bool:
    # not torch.cuda: the tests' own process stays off the device, which the engines need
    return shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], check=False).returncode == 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not _has_gpu(), reason="needs a CUDA GPU; `make test-gpu` on a machine that has one"),
]

D = 64
HOOK = "blocks.0.hook_resid_post"


def test_a_recorded_graph_stages_and_edits_other_rows_at_every_replay() -> None:
    device = torch.device("cuda")
    taps = DeviceTaps(1, 20, 16, D, torch.bfloat16, 1, 4, device)
    taps.warm_up()
    follower = DeviceFollower((HOOK,), D, torch.bfloat16, taps)
    hidden = torch.zeros(8, D, dtype=torch.bfloat16, device=device)
    residual = torch.zeros_like(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taps.apply(hidden, residual, 0)
    add = Add(hook=HOOK, vector=(1.0,) * D, scale=3.0, positions="generated")
    rows = Edits(None, D).rows(add, HOOK, 0)
    expected: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for name in expected:
        following = Following(3, CaptureWish(id=name), (0,))
        following.banked = (BankedEdit(0, add, rows, 0),) if name == "b" else ()
        follower.admit(name, following)
    for step in range(40):  # the ring's 20 rows go round many times
        count = 3 if step == 0 else 1
        start = 0 if step == 0 else step + 2
        order = ["a", "b"] if step % 2 else ["b", "a"]
        values = torch.randn(2, 8, D, device=device).bfloat16()
        follower.load_step([(name, start, count) for name in order])
        hidden.copy_(values[0])
        residual.copy_(values[1])
        graph.replay()
        follower.send_rows(torch.arange(2 * count, dtype=torch.int32, device=device))
        for place, name in enumerate(order):
            mine = values[:, place * count : (place + 1) * count]
            whole = mine[0] + mine[1]
            if name == "b" and step:
                whole = (mine[0].float() + mine[1].float() + 3.0).bfloat16()
            expected[name].append(whole.cpu())
    for name, parts in expected.items():
        kept = follower.confirm(name, 3 + 40)
        assert kept.positions.tolist() == list(range(42))
        stored = torch.from_numpy(kept.activations[HOOK].copy()).view(torch.bfloat16)
        assert torch.equal(stored, torch.cat(parts))


ENGINES: dict[str, tuple[str, str]] = {
    f"{runner}-{mode}": (runner, mode)
    for runner in ("v1", "v2")
    for mode in ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "NONE")
}


@pytest.fixture(scope="module", params=list(ENGINES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, str]:
    world = World(tmp_path_factory.mktemp(request.param.replace("_", "-")))
    runner, mode = ENGINES[request.param]
    many = [capture_all(f"p{i}", p) for i, p in enumerate(prompts(1, 12, 60))]
    for name, asks, more in (
        ("mixed", mixed(), {"max_num_batched_tokens": 64, "max_num_seqs": 6}),
        ("preempted", many, {"num_gpu_blocks_override": 30, "block_size": 16, "max_num_seqs": 12}),
    ):
        lake = world.lake(name, dtype="bfloat16", run=ALL, few=POST[1:])
        world.add(name, [asks], lake, enforce_eager=False, compilation_config={"cudagraph_mode": mode}, **more)
        run = world.runs[name]
        run.dtype, run.asynchronous = "bfloat16", True
        run.settings = {"staging_rows": 2048, "edits_per_token": 1}
        run.environment = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
        world.run(name)
    return world, request.param


def capture_all(name: str, tokens: list[int]) -> Any:
    from tests.capture.engine_runs import Ask

    return Ask(tokens, capture(name), {"max_tokens": 40})


def test_every_row_is_as_right_as_bfloat16_can_be(world: tuple[World, str]) -> None:
    """At most twice the error of Hugging Face's own bfloat16, with the right tokens and positions."""
    engines, _ = world
    short = Inside(engines.model, torch.bfloat16)
    assert engines.outcomes["preempted"].preemptions > 0
    for name in ("mixed", "preempted"):
        for run_name in ("run", "few") if name == "mixed" else ("run",):
            run = open_lake(engines.folder / name)[run_name]
            coordinates = run.tokens.compute()
            values = {hook: run[hook].values for hook in run.hooks}
            sequences = {
                ask.millpond["capture"]["id"]: ask.tokens + answer.tokens[0]
                for ask, answer in engines.answers(name)
                if "capture" in (ask.millpond or {}) and ask.millpond["capture"].get("run", "run") == run_name
            }
            assert set(run.prompts["id"]) == set(sequences)
            for number, prompt_id in run.prompts["id"].items():
                mine = coordinates["prompt"].values == number
                at, tokens = coordinates["position"].values[mine], sequences[prompt_id]
                np.testing.assert_array_equal(coordinates["token_id"].values[mine], np.array(tokens)[at])
                right, rough = (inside.values(tokens[:-1]) for inside in (engines.inside, short))
                for hook in run.hooks:
                    truth = right[hook][at].numpy()
                    theirs = np.linalg.norm(rough[hook][at].float().numpy() - truth)
                    assert np.linalg.norm(values[hook][mine] - truth) <= 2 * theirs + 1e-3 * np.linalg.norm(truth), hook


def test_steering_changes_one_request(world: tuple[World, str]) -> None:
    check_steered(world[0], "mixed", first=4)  # bfloat16 may choose another of two like tokens later
