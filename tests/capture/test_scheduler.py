"""Captured rows against Hugging Face under everything the scheduler does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millpond.store.lake import Lake, open_lake
from millpond.store.verify import verify_run
from tests.capture.engine_runs import Ask, EngineRun, Outcome, run_engines
from tests.capture.models import D_MODEL, VOCABULARY, Inside, make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ALL = [f"blocks.{layer}.hook_{kind}" for layer in range(3) for kind in KINDS]
POST = [hook for hook in ALL if hook.endswith("resid_post")]
VECTOR = np.random.default_rng(8).normal(0, 2, D_MODEL).tolist()
SHARED = np.random.default_rng(9).integers(3, VOCABULARY, 96).tolist()


def prompts(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, int(n)).tolist() for n in rng.integers(1, longest, count)]


def capture(name: str, **filters: Any) -> dict[str, Any]:
    return {"capture": {"id": name, **filters}}


class World:
    """The engines' lakes and what Hugging Face says of any sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model("Llama", folder / "model")
        self.inside = Inside(self.model, torch.float32)
        self.outcomes: dict[str, Outcome] = {}
        self.runs: dict[str, EngineRun] = {}

    def lake(self, name: str, dtype: str = "float32", **runs: list[str]) -> Lake:
        lake = open_lake(self.folder / name, create=True)
        for run, hooks in (runs or {"run": ALL}).items():
            lake.create_run(run, hooks=tuple(hooks), d_model=D_MODEL, dtype=dtype, chunk_rows=16, shard_rows=64)
        return lake

    def add(self, name: str, rounds: list[list[Ask]], lake: Lake | None = None, **engine: Any) -> None:
        lake = lake or self.lake(name)
        self.runs[name] = EngineRun(str(self.model), str(lake.folder), ALL, "float32", rounds, engine)

    def run(self, *names: str, own_processes: bool = False) -> None:
        runs = [self.runs[name] for name in names]
        self.outcomes |= zip(names, run_engines(runs, self.folder, own_processes=own_processes), strict=True)

    def answers(self, name: str) -> list[tuple[Ask, Any]]:
        pairs = zip(self.runs[name].rounds, self.outcomes[name].rounds, strict=True)
        return [pair for asks, answers in pairs for pair in zip(asks, answers, strict=True)]

    def check(self, name: str, run_name: str = "run") -> dict[str, np.ndarray]:
        """Every row of a run against Hugging Face on its prompt's tokens; returns the positions of each prompt."""
        run = open_lake(self.folder / name)[run_name]
        assert [p for p in verify_run(run).problems if "open" not in p] == []
        coordinates = run.tokens.compute()
        values = {hook: run[hook].values for hook in run.hooks}
        sequences = {}
        for ask, answer in self.answers(name):
            asked = json.loads(ask.millpond) if isinstance(ask.millpond, str) else ask.millpond
            wish = (asked or {}).get("capture")
            if wish and (wish.get("run") or "run") == run_name:
                for index, generated in enumerate(answer.tokens):
                    suffix = f"/{index}" if len(answer.tokens) > 1 else ""
                    sequences[wish["id"] + suffix] = ask.tokens + generated
        assert set(run.prompts["id"]) == set(sequences)
        positions = {}
        for number, prompt_id in run.prompts["id"].items():
            mine = coordinates["prompt"].values == number
            at = positions[prompt_id] = coordinates["position"].values[mine]
            tokens = sequences[prompt_id]
            np.testing.assert_array_equal(coordinates["token_id"].values[mine], np.array(tokens, np.int32)[at])
            truth = self.inside.values(tokens[: max(len(tokens) - 1, 1)] if len(tokens) > len(at) else tokens)
            for hook in run.hooks:
                off = np.abs(values[hook][mine] - truth[hook][at].numpy()).max(axis=1) > 2e-5
                where = f"engine {name!r}, run {run_name!r}, {prompt_id!r} at {hook}, positions {at[off].tolist()}"
                np.testing.assert_allclose(values[hook][mine], truth[hook][at], rtol=0, atol=2e-5, err_msg=where)
        return positions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("scheduler"))
    generate = {"max_tokens": 12}
    mixed = [
        Ask(SHARED[:60], capture("all"), generate),
        Ask(SHARED[:33]),
        Ask(SHARED[:50], capture("prompt", positions="prompt"), generate),
        Ask(SHARED[:41], capture("generated", positions="generated"), generate),
        Ask(SHARED[:70], capture("last", positions="last"), generate),
        Ask(SHARED[10:30], None, generate),
        Ask(SHARED[:64], capture("list", positions=[0, 5, -1, 66]), generate),
        Ask(SHARED[:55], capture("stride", every=7, first_position=3, end_position=50)),
        Ask(SHARED[:90], capture("tokens", token_ids=SHARED[5:9], run="few"), generate),
        Ask(SHARED[:20], json.dumps(capture("json", run="few")), generate),
    ]
    world.add("mixed", [mixed], world.lake("mixed", run=ALL, few=POST[1:]), max_num_batched_tokens=64, max_num_seqs=6)
    many = [Ask(p, capture(f"p{i}"), {"max_tokens": 60}) for i, p in enumerate(prompts(1, 12, 60))]
    world.add("preempted", [many], num_gpu_blocks_override=16, block_size=32, max_num_seqs=12)
    cached = [
        [Ask(SHARED[:80])],
        [Ask(SHARED[:80], capture("captured"), generate), Ask([*SHARED[:80], 5, 6])],
        [Ask([*SHARED[:80], 7], capture("again"))],
    ]
    world.add("cached", cached, enable_prefix_caching=True, block_size=32)
    sampled = {"n": 3, "temperature": 1.0, "max_tokens": 9}
    world.add(
        "samples",
        [[Ask(SHARED[:20], capture("n"), sampled | {"seed": 1}), Ask(SHARED[:25], capture("m"), sampled)]],
    )
    stopping = {
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 3,
        "stop_token_ids": list(range(3, 20)),
        "ignore_eos": False,
    }
    world.add(
        "ended",
        [
            [
                Ask(SHARED[:30], capture("aborted"), {"max_tokens": 50}, abort_after=4),
                Ask(SHARED[:40], capture("stopped"), stopping),
                Ask(SHARED[:35], capture("bystander"), generate),
            ],
            [Ask(SHARED[:30], capture("aborted-again"), generate)],
        ],
    )
    repeated = (SHARED[:8] * 6)[:44]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    world.add(
        "drafted",
        [[Ask(repeated, capture("a"), {"max_tokens": 40}), Ask(SHARED[:30], capture("b"), {"max_tokens": 40})]],
        speculative_config=drafts,
    )
    world.add("compiled", [mixed[:1] + mixed[2:7]], enforce_eager=False, max_num_batched_tokens=64)
    world.run("mixed", "preempted", "cached", "samples", "ended", "compiled")
    steered = {"intervene": [{"op": "add", "hook": POST[1], "vector": VECTOR}]}
    two = [
        Ask(SHARED[:40], capture("a"), generate),
        Ask(SHARED[:30], steered, generate),
        Ask(SHARED[:25], capture("b")),
    ]
    world.add("parallel", [two], tensor_parallel_size=2)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    world.runs["parallel"].environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    # numba, which drafts, keeps vLLM from starting twice in a process, and two ranks need two
    world.run("drafted", "parallel", own_processes=True)
    return world


def test_requests_of_different_wishes_share_batches(world: World) -> None:
    positions = world.check("mixed")
    assert positions["all"].tolist() == list(range(71))
    assert positions["prompt"].tolist() == list(range(50))
    assert positions["generated"].tolist() == list(range(41, 52))
    assert positions["last"].tolist() == [69]
    assert positions["list"].tolist() == [0, 5, 63, 66]
    assert positions["stride"].tolist() == list(range(3, 50, 7))
    few = world.check("mixed", "few")
    generated = next(answer.tokens[0] for ask, answer in world.answers("mixed") if ask.tokens == SHARED[:90])
    tokens = [*SHARED[:90], *generated[:-1]]
    assert few["tokens"].tolist() == [i for i, token in enumerate(tokens) if token in SHARED[5:9]]
    rows = sum(map(len, positions.values())) + sum(map(len, few.values()))
    assert world.outcomes["mixed"].statistics["rows"] == rows  # nothing was staged that nobody asked for
    for ask, answer in world.answers("mixed"):
        assert answer.tokens[0][:3] == world.inside.greedy(ask.tokens, min(3, len(answer.tokens[0])))


def test_preempted_requests_are_whole(world: World) -> None:
    assert world.outcomes["preempted"].preemptions > 0
    positions = world.check("preempted")
    for ask, answer in world.answers("preempted"):
        assert len(positions[ask.millpond["capture"]["id"]]) == len(ask.tokens) + len(answer.tokens[0]) - 1


def test_captured_requests_compute_what_others_read_from_the_prefix_cache(world: World) -> None:
    positions = world.check("cached")
    assert (len(positions["captured"]), len(positions["again"])) == (91, 81)
    by_id = {json.dumps(ask.millpond): answer for ask, answer in world.answers("cached")}
    plain = [answer for ask, answer in world.answers("cached") if ask.millpond is None]
    assert plain[1].cached == 64  # two blocks of 32
    assert all(answer.cached == 0 for key, answer in by_id.items() if "capture" in key)


def test_every_sample_has_rows_of_its_own(world: World) -> None:
    positions = world.check("samples")
    assert {name: len(at) for name, at in positions.items()} == {
        f"{name}/{index}": n + 8 for name, n in (("n", 20), ("m", 25)) for index in range(3)
    }
    for _, answer in world.answers("samples"):
        assert len({tuple(tokens) for tokens in answer.tokens}) == 3


def test_aborted_requests_leave_nothing_and_stopped_ones_all_they_had(world: World) -> None:
    world.runs["ended"].rounds[0][0].millpond = None  # it was dropped
    positions = world.check("ended")
    stopped = next(answer for ask, answer in world.answers("ended") if ask.tokens == SHARED[:40])
    assert 1 <= len(stopped.tokens[0]) < 40
    assert len(positions["stopped"]) == 40 + len(stopped.tokens[0]) - 1
    assert len(positions["aborted-again"]) == 41


def test_rejected_drafts_leave_no_rows(world: World) -> None:
    positions = world.check("drafted")
    assert (len(positions["a"]), len(positions["b"])) == (44 + 39, 30 + 39)
    steps = world.outcomes["drafted"].statistics["steps"]
    assert steps < 60  # some drafts were accepted, so there were fewer steps than tokens


def test_in_a_tensor_parallel_group_one_rank_keeps_rows_and_all_intervene(world: World) -> None:
    positions = world.check("parallel")
    assert (len(positions["a"]), len(positions["b"])) == (51, 25)
    (answer,) = [answer for ask, answer in world.answers("parallel") if len(ask.tokens) == 30]
    handle = world.inside.edit(1, lambda x: x + torch.tensor(VECTOR))
    expected = world.inside.greedy(SHARED[:30], 12)
    handle.remove()
    assert answer.tokens == [expected] != [world.inside.greedy(SHARED[:30], 12)]


def test_compiled_models_give_the_same(world: World) -> None:
    positions = world.check("compiled")
    assert len(positions["all"]) == 71
