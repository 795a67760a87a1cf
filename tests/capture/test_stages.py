"""Which pipeline stage has what, and what the first one makes of it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
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


GATHER = """
import os, sys, numpy as np, torch, torch.distributed as dist
from types import SimpleNamespace
from millpond.capture.stages import gather_stages
from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
group = SimpleNamespace(world_size=3, rank_in_group=rank, ranks=[0, 1, 2], cpu_group=dist.group.WORLD)

def part(rows):
    at = np.arange(rows, dtype=np.int32)
    hooks = {} if rank == 1 else {f"h{rank}": np.full((rows, 5), 7 * rank + rows, np.uint16)}
    reads = {f"r{rank}.active": at + rank, f"r{rank}.scores": np.full((rows, 3), rank / 3, np.float32)} if rank else {}
    return CapturedRequest("p", at, rows, at, hooks, reads)

whole = gather_stages(group, {"a": part(3), "none": part(0), "b": CaptureFailed("gone") if rank == 2 else part(2), "c": part(1)})
if rank:
    assert whole == {}
else:
    assert str(whole.pop("b")) == "gone"
    assert list(whole) == ["a", "none", "c"]
    for name, rows in {"a": 3, "none": 0, "c": 1}.items():
        found = whole[name]
        assert {h: (x.dtype.str, x.tolist()) for h, x in found.activations.items()} == {
            "h0": ("<u2", [[rows] * 5] * rows), "h2": ("<u2", [[14 + rows] * 5] * rows)}
        assert found.reads["r2.active"].tolist() == list(range(2, rows + 2))
        assert found.reads["r1.scores"].dtype == np.float32 and np.all(found.reads["r1.scores"] == np.float32(1 / 3))
        assert all(x.flags.aligned for x in (*found.activations.values(), *found.reads.values()))
"""


def test_three_stages_become_one_in_the_first(tmp_path: Path) -> None:
    """In processes of their own: other hooks, reads alone, requests without rows and one that failed."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", GATHER, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    for rank in ranks:
        _, printed = rank.communicate(timeout=120)
        assert rank.returncode == 0, printed.decode()[-2000:]
