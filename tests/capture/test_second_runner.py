"""vLLM's second model runner in whole engines: every row against Hugging Face, in the order in which it puts them."""

from __future__ import annotations

import pytest

from millpond.store.artifacts import save_sae
from tests.capture.engine_runs import Ask
from tests.capture.interpreted import environment
from tests.capture.test_device_engine import GENERATE, ON_DEVICE, check_steered, mixed
from tests.capture.test_interventions import make_sae
from tests.capture.test_scheduler import ALL, POST, SHARED, World, capture

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]  # for its time; see docs/capture.md
KINDS = ("host", "device")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An engine with the host's taps, and one with the device's that schedules asynchronously.

    Prompts are longer than a step, requests more than the batch holds, keys and values more than fit.
    """
    world = World(tmp_path_factory.mktemp("second"))
    make_sae(world.folder / "sae")
    stopping = {"max_tokens": 40, "temperature": 1.0, "stop_token_ids": list(range(3, 40)), "ignore_eos": False}
    asks = [
        *mixed(),
        Ask(SHARED[:44], capture("stopped", run="few"), stopping),
        Ask(SHARED[:30], capture("aborted"), {"max_tokens": 50}, abort_after=6),
    ]
    shared = [*SHARED[:80], 5]
    sampled = GENERATE | {"n": 2, "temperature": 1.0}
    again = [Ask([*shared, 6]), Ask(shared, capture("shared")), Ask(SHARED[:30], capture("sampled"), sampled)]
    for kind in KINDS:
        lake = world.lake(kind, run=ALL, few=POST[1:])
        save_sae(lake, "sae", world.folder / "sae")
        limits = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "block_size": 32, "num_gpu_blocks_override": 13}
        world.add(kind, [asks, [Ask(shared)], again], lake, enable_prefix_caching=True, **limits)
    world.runs["device"].settings, world.runs["device"].asynchronous = ON_DEVICE, True
    (world.folder / "triton").mkdir()
    with pytest.MonkeyPatch.context() as process:
        for variable, value in environment(world.folder / "triton").items():
            process.setenv(variable, value)
        world.run(*KINDS)
    asks[-1].millpond = None  # it was dropped
    return world


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_edit_is_that_of_hugging_face(world: World, kind: str) -> None:
    assert world.outcomes[kind].preemptions > 0
    positions = world.check(kind) | world.check(kind, "few")
    assert positions["all"].tolist() == list(range(71))
    assert positions["generated"].tolist() == list(range(41, 52))
    assert positions["list"].tolist() == [0, 5, 63, 66]
    answers = {len(ask.tokens): answer for ask, answer in world.answers(kind)}
    assert len(positions["stopped"]) == 44 + len(answers[44].tokens[0]) - 1 < 83
    assert (len(positions["sampled/0"]), len(positions["sampled/1"])) == (41, 41)
    assert (answers[82].cached, len(positions["shared"])) == (64, 81)
    check_steered(world, kind)
