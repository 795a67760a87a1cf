"""Which pipeline stage has what, and what the first one makes of it."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from millpond.capture.stages import gather_stages, join_stages
from millpond.capture.tap import tapped_hooks
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.segment import CapturedRequest

FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def part(hook: str, positions: tuple[int, ...] = (0, 2), tokens: tuple[int, ...] = (5, 6, 7)) -> CapturedRequest:
    rows = np.full((len(positions), 4), float(hook == SECOND), np.float32)
    return CapturedRequest("p", np.array(tokens, np.int32), 3, np.array(positions, np.int32), {hook: rows})


def test_a_stage_taps_the_layers_that_it_has() -> None:
    class PPMissingLayer(nn.Identity):
        """What vLLM leaves in place of another stage's layer."""

    model = nn.Module()
    model.layers = nn.ModuleList([PPMissingLayer(), nn.Linear(1, 1), nn.Linear(1, 1), PPMissingLayer()])
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    assert tapped_hooks(model, 4, hooks) == (hooks[1], hooks[2])
    with pytest.raises(InvalidInput, match="beyond the model's 4 layers"):
        tapped_hooks(model, 4, ["blocks.4.hook_resid_post"])


def test_the_hooks_of_all_stages_become_one_request() -> None:
    (joined,) = join_stages([{"r": part(FIRST)}, {"r": part(SECOND)}]).values()
    assert isinstance(joined, CapturedRequest)
    assert set(joined.activations) == {FIRST, SECOND}
    assert (joined.activations[FIRST] == 0).all()
    assert (joined.activations[SECOND] == 1).all()
    assert joined.positions.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"r": CaptureFailed("rows are missing")}, "rows are missing"),
        ({}, "never reached every pipeline stage"),
        ({"r": part(SECOND, positions=(0, 1))}, "different positions"),
        ({"r": part(SECOND, tokens=(5, 6, 8))}, "different positions"),
    ],
)
def test_a_request_that_one_stage_does_not_have_whole_fails(other: dict[str, Any], reason: str) -> None:
    crossed = pickle.loads(pickle.dumps(other))
    joined = join_stages([{"r": part(FIRST), "s": part(FIRST)}, crossed | {"s": part(SECOND)}])
    assert isinstance(joined["r"], CaptureFailed)
    assert reason in str(joined["r"])
    assert isinstance(joined["s"], CapturedRequest)  # no other request is concerned


def test_without_a_pipeline_nothing_is_sent() -> None:
    mine = {"r": part(FIRST)}
    assert gather_stages(SimpleNamespace(world_size=1), mine) == mine
