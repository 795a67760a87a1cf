"""The taps that CUDA graphs record, in whole engines on the CPU: the same buffers, operations and bookkeeping."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from millpond.capture.versions import worker_argument
from millpond.store.artifacts import save_sae
from millpond.store.lake import open_lake
from tests.capture.engine_runs import Ask, EngineRun
from tests.capture.test_interventions import make_sae, sae_change
from tests.capture.test_scheduler import ALL, POST, SHARED, VECTOR, World, capture, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPLICE = {"op": "sae", "hook": POST[1], "artifact": "sae", "set_latents": {"3": 4.0}, "scale_latents": {"5": 0.0}}
ON_DEVICE = {
    "device_taps": True,
    "staging_rows": 96,
    "edits_per_token": 2,
    "saes": [{"hook": POST[1], "artifact": "sae"}],
}
GENERATE = {"max_tokens": 12}


def mixed() -> list[Ask]:
    return [
        Ask(SHARED[:60], capture("all"), GENERATE),
        Ask(SHARED[:33]),
        Ask(SHARED[:50], capture("prompt", positions="prompt"), GENERATE),
        Ask(SHARED[:41], capture("generated", positions="generated"), GENERATE),
        Ask(SHARED[:64], capture("list", positions=[0, 5, -1, 66]), GENERATE),
        Ask(SHARED[:90], capture("tokens", token_ids=SHARED[5:9], run="few"), GENERATE),
        Ask(SHARED[:40], {"intervene": [{"op": "add", "hook": POST[1], "vector": VECTOR}]}, GENERATE),
        Ask(SHARED[:37], {"intervene": [SPLICE]}, GENERATE),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("device"))
    make_sae(world.folder / "sae")
    few = {"run": ALL, "few": POST[1:]}
    stopping = {"max_tokens": 40, "temperature": 1.0, "stop_token_ids": list(range(3, 40)), "ignore_eos": False}
    asks = [*mixed(), Ask(SHARED[:44], capture("stopped", run="few"), stopping)]

    def add(name: str, asks: list[Ask], runs: dict[str, list[str]] | None = None, **engine: Any) -> EngineRun:
        lake = world.lake(name, **(runs or {}))
        save_sae(lake, "sae", world.folder / "sae")
        world.add(name, [asks], lake, **engine)
        return world.runs[name]

    add("compiled", mixed(), few, max_num_batched_tokens=64, max_num_seqs=6, enforce_eager=False).settings = ON_DEVICE
    many = [Ask(p, capture(f"p{i}"), {"max_tokens": 40}) for i, p in enumerate(prompts(1, 12, 60))]
    preempted = add("preempted", many, num_gpu_blocks_override=14, block_size=32, max_num_seqs=12)
    preempted.settings, preempted.asynchronous = ON_DEVICE, True
    preempted.engine["max_num_batched_tokens"] = 96
    extension = {
        "worker_cls": "tests.capture.extension_worker.Worker033",
        "worker_extension_cls": "millpond.capture.worker.TapExtension",
    }
    if worker_argument() in extension.items():
        extension = {}  # vLLM 0.33 needs no help
    for name, settings, more in (("host", {}, extension), ("device", ON_DEVICE, {})):
        run = add(name, asks, few, max_num_batched_tokens=64, max_num_seqs=6, **more)
        run.settings, run.asynchronous = settings, True
    world.run("compiled", "preempted", "host", "device")
    stages = add("stages", [*mixed()[:2], *mixed()[-2:]], pipeline_parallel_size=2, max_num_batched_tokens=64)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    stages.environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    stages.settings = ON_DEVICE
    world.run("stages", own_processes=True)
    return world


def check_steered(world: World, name: str, first: int = 12) -> None:
    """The first tokens of the steered requests are Hugging Face's with the same vector added, or the same SAE."""
    spliced = sae_change(open_lake(world.folder / name), keep_error=False)
    changes: dict[int, Callable[[Tensor], Tensor]] = {40: lambda x: x + torch.tensor(VECTOR), 37: spliced}
    for length, change in changes.items():
        (answer,) = [answer for ask, answer in world.answers(name) if len(ask.tokens) == length]
        handle = world.inside.edit(1, change)
        steered = world.inside.greedy(SHARED[:length], first)
        handle.remove()
        assert answer.tokens[0][:first] == steered != world.inside.greedy(SHARED[:length], first)


@pytest.mark.parametrize("name", ["compiled", "host", "device"])
def test_every_row_and_edit_is_that_of_hugging_face(world: World, name: str) -> None:
    """Compiled with device taps; scheduled asynchronously with the host's taps (in an extension) and the device's."""
    positions = world.check(name)
    assert positions["all"].tolist() == list(range(71))
    assert positions["list"].tolist() == [0, 5, 63, 66]
    few = world.check(name, "few")
    answers = {len(ask.tokens): answer for ask, answer in world.answers(name)}
    tokens = [*SHARED[:90], *answers[90].tokens[0][:-1]]
    assert few["tokens"].tolist() == [i for i, token in enumerate(tokens) if token in SHARED[5:9]]
    check_steered(world, name)


def test_the_step_past_a_stop_leaves_no_rows(world: World) -> None:
    """Scheduled asynchronously, a request that stops has been given one step more."""
    kept = {name: sum(map(len, world.check("host", name).values())) for name in ("run", "few")}
    (stopped,) = [answer for ask, answer in world.answers("host") if len(ask.tokens) == 44]
    assert 1 <= len(stopped.tokens[0]) < 40
    assert len(world.check("host", "few")["stopped"]) == 44 + len(stopped.tokens[0]) - 1
    assert world.outcomes["host"].statistics["rows"] == sum(kept.values()) + 1


def test_rows_computed_again_after_a_preemption_are_the_last_ones(world: World) -> None:
    assert world.outcomes["preempted"].preemptions > 0
    positions = world.check("preempted")
    assert sum(map(len, positions.values())) == sum(
        len(ask.tokens) + len(answer.tokens[0]) - 1 for ask, answer in world.answers("preempted")
    )


def test_pipeline_stages_fill_one_run(world: World) -> None:
    """Two processes, one with layer 0 and one with 1 and 2, or the other way round."""
    assert len(world.check("stages")["all"]) == 71
    check_steered(world, "stages")
