"""vLLM's second model runner in whole engines: every row against Hugging Face, under everything its scheduler does."""

from __future__ import annotations

from typing import Any

import pytest

from millpond.store.artifacts import save_sae
from tests.capture.engine_runs import Ask
from tests.capture.interpreted import environment
from tests.capture.test_device_engine import GENERATE, ON_DEVICE, check_steered, mixed
from tests.capture.test_interventions import make_sae
from tests.capture.test_scheduler import ALL, POST, SHARED, World, capture, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("second"))
    make_sae(world.folder / "sae")

    def add(name: str, rounds: list[list[Ask]], *, on_device: bool, few: bool = False, **engine: Any) -> None:
        lake = world.lake(name, run=ALL, **({"few": POST[1:]} if few else {}))
        save_sae(lake, "sae", world.folder / "sae")
        world.add(name, rounds, lake, **engine)
        run = world.runs[name]
        run.settings, run.asynchronous = ON_DEVICE if on_device else {}, on_device

    small = {"max_num_batched_tokens": 64, "max_num_seqs": 6}
    stopping = {"max_tokens": 40, "temperature": 1.0, "stop_token_ids": list(range(3, 40)), "ignore_eos": False}
    many = [Ask(p, capture(f"p{i}"), {"max_tokens": 40}) for i, p in enumerate(prompts(1, 12, 60))]
    for kind, on_device in (("host", False), ("device", True)):
        asks = [
            *mixed(),
            Ask(SHARED[:44], capture("stopped", run="few"), stopping),
            Ask(SHARED[:30], capture("aborted"), {"max_tokens": 50}, abort_after=6),
        ]
        after = [Ask([*SHARED[:80], 5]), Ask(SHARED[:30], capture("again"), GENERATE | {"n": 2, "temperature": 1.0})]
        add(
            f"mixed-{kind}",
            [asks, after],
            on_device=on_device,
            few=True,
            enable_prefix_caching=True,
            block_size=32,
            **small,
        )
        add(
            f"preempted-{kind}",
            [many],
            on_device=on_device,
            num_gpu_blocks_override=14,
            block_size=32,
            max_num_seqs=12,
            max_num_batched_tokens=96,
        )
    with pytest.MonkeyPatch.context() as process:
        (world.folder / "triton").mkdir()
        for variable, value in environment(world.folder / "triton").items():
            process.setenv(variable, value)
        world.run(*world.runs)
    for kind in ("host", "device"):
        world.runs[f"mixed-{kind}"].rounds[0][-1].millpond = None  # it was dropped
    return world


@pytest.mark.parametrize("kind", ["host", "device"])
def test_mixed(world: World, kind: str) -> None:
    name = f"mixed-{kind}"
    positions = world.check(name)
    assert positions["all"].tolist() == list(range(71))
    assert positions["list"].tolist() == [0, 5, 63, 66]
    assert len(positions["again/0"]) == len(positions["again/1"]) == 41
    world.check(name, "few")
    check_steered(world, name)
    (plain,) = [answer for ask, answer in world.answers(name) if len(ask.tokens) == 81]
    assert plain.cached >= 64


@pytest.mark.parametrize("kind", ["host", "device"])
def test_preempted(world: World, kind: str) -> None:
    name = f"preempted-{kind}"
    assert world.outcomes[name].preemptions > 0
    positions = world.check(name)
    assert sum(map(len, positions.values())) == sum(
        len(ask.tokens) + len(answer.tokens[0]) - 1 for ask, answer in world.answers(name)
    )
