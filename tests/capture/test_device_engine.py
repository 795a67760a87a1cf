"""The taps that CUDA graphs record, in whole engines on the CPU: the same buffers, operations and bookkeeping."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.capture.engine_runs import Ask
from tests.capture.models import D_MODEL
from tests.capture.test_scheduler import ALL, POST, SHARED, VECTOR, World, capture, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ON_DEVICE = {"device_taps": True, "staging_rows": 96, "edits_per_token": 2}
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
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("device"))

    def add(name: str, asks: list[Ask], runs: dict[str, list[str]] | None = None, **engine: Any) -> None:
        world.add(name, [asks], world.lake(name, **(runs or {})), **engine)
        world.runs[name].settings = dict(ON_DEVICE)

    few = {"run": ALL, "few": POST[1:]}
    add("eager", mixed(), few, max_num_batched_tokens=64, max_num_seqs=6)
    add("compiled", mixed(), few, max_num_batched_tokens=64, max_num_seqs=6, enforce_eager=False)
    many = [Ask(p, capture(f"p{i}"), {"max_tokens": 40}) for i, p in enumerate(prompts(1, 12, 60))]
    add("preempted", many, num_gpu_blocks_override=14, block_size=32, max_num_seqs=12, max_num_batched_tokens=96)
    world.run("eager", "compiled", "preempted")
    return world


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_every_row_and_edit_is_that_of_hugging_face(world: World, name: str) -> None:
    positions = world.check(name)
    assert positions["all"].tolist() == list(range(71))
    assert positions["list"].tolist() == [0, 5, 63, 66]
    few = world.check(name, "few")
    answers = {len(ask.tokens): answer for ask, answer in world.answers(name)}
    tokens = [*SHARED[:90], *answers[90].tokens[0][:-1]]
    assert few["tokens"].tolist() == [i for i, token in enumerate(tokens) if token in SHARED[5:9]]
    handle = world.inside.edit(1, lambda x: x + torch.tensor(VECTOR))
    steered = world.inside.greedy(SHARED[:40], 12)
    handle.remove()
    assert answers[40].tokens == [steered] != [world.inside.greedy(SHARED[:40], 12)]


def test_rows_computed_again_after_a_preemption_are_the_last_ones(world: World) -> None:
    assert world.outcomes["preempted"].preemptions > 0
    positions = world.check("preempted")
    assert sum(map(len, positions.values())) == sum(
        len(ask.tokens) + len(answer.tokens[0]) - 1 for ask, answer in world.answers("preempted")
    )
