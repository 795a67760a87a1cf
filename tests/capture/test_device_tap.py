"""Taps as CUDA graphs record them, on the CPU: the same operations, compared with the host's way row by row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from millpond.capture.device_requests import DeviceFollower
from millpond.capture.device_saes import DeviceSplice, LatentEdits
from millpond.capture.device_tap import BankRow, DeviceTaps, VectorBank, edit_rows, stage_rows
from millpond.capture.edits import Edits
from millpond.capture.requests import BankedEdit, BankedSplice, Following, PlannedEdit, RequestFollower
from millpond.capture.ring import StagingRing
from millpond.capture.tap import HookWork, edit_and_copy
from millpond.store.capture_spec import CaptureWish
from millpond.store.errors import InvalidInput
from millpond.store.interventions import Ablate, Add, Clamp, SpliceSae
from millpond.store.lake import Lake, open_lake
from tests.capture.artifacts import save_small_sae

D, HOOKS = 8, ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
CPU = torch.device("cpu")


def device_taps(
    *, ring_rows: int = 40, edits: int = 2, dtype: torch.dtype = torch.float32, splices: Any = ()
) -> DeviceTaps:
    return DeviceTaps(len(HOOKS), ring_rows, 32, D, dtype, edits, 6, CPU, splices)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    folder = tmp_path_factory.mktemp("saes")
    lake = open_lake(folder / "lake", create=True)
    for architecture in ("jumprelu", "topk"):
        save_small_sae(lake, folder / architecture, D, 13, architecture)
    return lake


def some_interventions(rng: np.random.Generator) -> list[Any]:
    vector = tuple(rng.normal(size=D).tolist())
    latents = {"set_latents": {3: 4.0}, "scale_latents": {5: 0.0, int(rng.integers(6, 13)): 2.0}}
    return [
        SpliceSae(hook=HOOKS[0], artifact="jumprelu", every=2, **latents),
        SpliceSae(hook=HOOKS[1], artifact="topk", positions="prompt", keep_error=bool(rng.integers(2)), **latents),
        Add(hook=HOOKS[0], vector=vector, scale=2.0, positions="prompt"),
        Ablate(hook=HOOKS[0], vector=vector, first_position=1),
        Clamp(hook=HOOKS[1], vector=vector, min=-0.1, max=0.2, positions="generated"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_give_the_same_rows(lake: Lake, seed: int, fused: bool, dtype: torch.dtype) -> None:
    """Random schedules: chunks, requests between each other, one that starts again from 0, an over-run, ring wraps."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    edits = Edits(lake, D)
    saes = ("jumprelu", "topk")
    taps = device_taps(
        dtype=dtype, splices=[(hook, DeviceSplice(edits.sae(name), 32, 3, CPU)) for hook, name in enumerate(saes)]
    )
    host, device = RequestFollower(HOOKS, D, dtype), DeviceFollower(HOOKS, D, dtype, taps)
    wishes: list[dict[str, Any]] = [{}, {"positions": "generated"}, {"every": 3}, {"token_ids": (1, 2, 3)}]
    lengths, tokens, at = {}, {}, {}
    for number, wish in enumerate(wishes):
        name, n_prompt = f"r{number}", int(rng.integers(2, 12))
        lengths[name], tokens[name], at[name] = n_prompt, rng.integers(1, 6, 40).astype(np.int32), 0
        asked = some_interventions(rng) if number % 2 else []
        for follower in (host, device):
            following = Following(n_prompt, CaptureWish(id=name, **wish), (0, 1) if number != 2 else (1,))
            following.see(0, tokens[name][:n_prompt])
            where = [(HOOKS.index(i.hook), i) for i in asked]
            following.edits = tuple(PlannedEdit(hook, i, edits.make(i, i.hook, 0)) for hook, i in where)
            following.splices = tuple(
                BankedSplice(saes.index(i.artifact), i, LatentEdits.of(i)) for i in asked if isinstance(i, SpliceSae)
            )
            where = [(hook, i) for hook, i in where if not isinstance(i, SpliceSae)]
            following.banked = tuple(
                BankedEdit(hook, i, edits.rows(i, i.hook, 0), [h for h, _ in where[:k]].count(hook))
                for k, (hook, i) in enumerate(where)
            )
            follower.admit(name, following)
    total = {name: lengths[name] + 9 for name in lengths}
    for step in range(60):
        if step == 12:
            at["r0"] = 0  # preempted
        batch = []
        for name in rng.permutation([n for n in lengths if at[n] < total[n]]).tolist():
            count = int(rng.integers(1, 5)) if at[name] < lengths[name] else 1
            count = min(count, lengths[name] - at[name]) if at[name] < lengths[name] else count
            batch.append((name, at[name], count))
            at[name] += count
        if not batch:
            break
        n = sum(count for _, _, count in batch)
        ids = np.concatenate([tokens[name][start : start + count] for name, start, count in batch])
        work = host.plan_step((name, start, tokens[name][start : start + count]) for name, start, count in batch)
        device.load_step(batch)
        for hook in range(len(HOOKS)):
            values = [torch.randn(n + 3, D).to(dtype) for _ in range(2 if fused else 1)]  # three rows of padding
            mine, other = [v.clone() for v in values], [v.clone() for v in values]
            edit_and_copy(mine[0], mine[1] if fused else None, work.get(hook, HookWork()))
            taps.apply(other[0], other[1] if fused else None, hook)
            for a, b in zip(mine, other, strict=True):
                torch.testing.assert_close(b, a)
        host.take_rows()
        device.send_rows(torch.from_numpy(ids))
        assert not taps.places.any()
        assert not any(splice.is_used for _, splice in taps.splices)
        assert (taps.target == taps.nowhere).all()
    for name in lengths:
        n_tokens = total[name]  # one position more was computed: the engine ran one step past the end
        one, two = host.confirm(name, n_tokens), device.confirm(name, n_tokens)
        assert len(one.positions) > 0
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_array_equal(one.token_ids, tokens[name][: n_tokens - 1])
        np.testing.assert_array_equal(two.token_ids, one.token_ids)
        assert one.activations.keys() == two.activations.keys()
        for hook in one.activations:
            if name in ("r0", "r2"):  # nothing edits them
                np.testing.assert_array_equal(one.activations[hook], two.activations[hook])
            else:
                kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
                a, b = (torch.from_numpy(r.activations[hook].copy()).view(kind) for r in (one, two))
                torch.testing.assert_close(a, b)


def operations(
    hidden: Tensor, residual: Tensor, places: Tensor, target: Tensor, ring: Tensor, bank: VectorBank
) -> None:
    edit_rows(hidden, residual, places, bank)
    stage_rows(hidden, residual, target, ring)


def test_one_graph_splices_in_every_step(lake: Lake) -> None:
    sae = Edits(lake, D).sae("jumprelu")
    splice = DeviceSplice(sae, 6, 2, CPU)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(splice.apply, fullgraph=True, backend=count, dynamic=False)
    for step in range(4):
        hidden, residual = torch.randn(5, D), torch.randn(5, D)
        value, before = hidden + residual, hidden.clone()
        edits = LatentEdits((7,), (0.0,), (float(step),), keep_error=False)
        if step != 2:
            splice.load([(np.array([step]), edits)], 5)
        compiled(hidden, residual)
        others = torch.arange(5) != (step if step != 2 else -1)
        assert torch.equal(hidden[others], before[others])
        if step != 2:
            latents = sae.encode(value[[step]])
            latents[0, 7] = step
            torch.testing.assert_close(hidden[[step]], sae.decode(latents))
            assert residual[step].eq(0).all()
        splice.clear()
    assert graphs == 1


def test_one_graph_serves_every_step() -> None:
    """Compiled without a break and once: what changes from step to step is data at fixed addresses."""
    taps = device_taps()
    rows = [BankRow(torch.zeros(D), torch.full((D,), float(k))) for k in (1, 2)]
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(operations, fullgraph=True, backend=count, dynamic=False)
    for step in range(3):
        hidden, residual = torch.randn(5, D), torch.randn(5, D)
        value = hidden + residual
        (place,) = taps.bank.places([rows[step % 2]])
        places = np.zeros((5, 2, 2), np.int32)
        places[step, 0, 0] = place
        target = np.full(5, taps.nowhere, np.int64)
        target[step : step + 2] = 7 * step, 7 * step + 1
        taps.load(target, places)
        compiled(hidden, residual, taps.places[:5, 0], taps.target[:5], taps.ring[0], taps.bank)
        value[step] += 1 + step % 2
        torch.testing.assert_close(taps.ring[0, 7 * step : 7 * step + 2], value[step : step + 2])
        assert residual[step].eq(0).all()
        taps.clear()
    assert graphs == 1


def test_nothing_is_looked_at_on_the_host() -> None:
    """On tensors that have a shape and no values: reading one raises, as it would stop a recording."""
    with FakeTensorMode():
        taps = DeviceTaps(1, 40, 32, D, torch.bfloat16, 2, 6, CPU)
        hidden = torch.empty(5, D, dtype=torch.bfloat16)
        operations(hidden, hidden.clone(), taps.places[:5, 0], taps.target[:5], taps.ring[0], taps.bank)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(taps.target.any())


def test_untouched_rows_keep_their_bits() -> None:
    hidden, residual = torch.randn(4, D).bfloat16(), (100 * torch.randn(4, D)).bfloat16()
    before = hidden.clone(), residual.clone()
    bank = VectorBank(2, D, CPU)
    (place,) = bank.places([BankRow(torch.zeros(D), torch.ones(D), keep=False)])
    edit_rows(hidden, residual, torch.tensor([[0], [place], [0], [0]], dtype=torch.int32), bank)
    others = [0, 2, 3]
    assert torch.equal(hidden[others], before[0][others])
    assert torch.equal(residual[others], before[1][others])
    assert hidden[1].eq(1).all()
    assert residual[1].eq(0).all()


def test_the_bank_replaces_what_was_not_needed_for_longest() -> None:
    bank = VectorBank(2, D, CPU)
    a, b, c = (BankRow(torch.zeros(D), torch.full((D,), float(k))) for k in range(3))
    place = dict(zip("ab", bank.places([a, b]), strict=True))
    assert bank.places([a, a]) == [place["a"]] * 2
    assert bank.places([c, a]) == [place["b"], place["a"]]
    assert bank.step[place["b"]].eq(2).all()
    with pytest.raises(InvalidInput, match="3 vectors"):
        bank.places([a, b, c])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=40))
def test_the_ring_never_gives_a_place_away_before_its_rows_were_taken(steps: list[tuple[int, bool]]) -> None:
    ring = StagingRing(torch.zeros(1, 11, 1))
    memory = ring._ring
    taken: list[int] = []
    for number, (rows, drains) in enumerate(steps, 1):
        begin = ring.reserve(rows) if rows else 0
        assert 0 <= begin <= begin + rows <= 10
        memory[0, begin : begin + rows] = float(number)

        def take(ids: np.ndarray, read: Any, number: int = number, begin: int = begin, rows: int = rows) -> None:
            assert ids.tolist() == [number]
            assert (read(0, begin, begin + rows) == number).all()
            taken.append(number)

        ring.send(begin, begin + rows, [(0, begin, begin + rows)], torch.tensor([number]), take)
        if drains:
            ring.drain()
    ring.drain(len(steps))
    assert taken == list(range(1, len(steps) + 1))


def test_a_step_larger_than_the_ring_names_the_setting() -> None:
    with pytest.raises(InvalidInput, match="staging_rows"):
        StagingRing(torch.zeros(1, 11, 1)).reserve(11)


def engine(**changes: Any) -> SimpleNamespace:
    parts = {
        "parallel_config": {"data_parallel_size": 1, "enable_dbo": False, "ubatch_size": 0},
        "scheduler_config": {"async_scheduling": False},
        "model_config": {"enable_prompt_embeds": False, "is_encoder_decoder": False, "is_moe": False},
    }
    config = SimpleNamespace(speculative_config=changes.pop("speculative_config", None))
    for name, values in parts.items():
        values |= {key: changes.pop(key) for key in list(changes) if key in values or name == "parallel_config"}
        setattr(config, name, SimpleNamespace(**values))
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_context_parallel_size", 2),
        ("enable_dbo", True),
        ("ubatch_size", 2),
        ("enable_expert_parallel", True),
    ],
)
def test_settings_that_would_lose_rows_are_refused_by_name(name: str, value: object) -> None:
    from millpond.capture.engine_checks import check_engine

    check_engine(engine(), on_device=True)
    with pytest.raises(InvalidInput, match=name):
        check_engine(engine(**{name: value}), on_device=True)


def test_only_engines_that_are_independent_may_run_in_parallel() -> None:
    from millpond.capture.engine_checks import check_engine

    config = engine(data_parallel_size=2)
    check_engine(config, on_device=True)
    config.model_config.is_moe = True
    with pytest.raises(InvalidInput, match="data_parallel_size above 1 is not supported with capture of a mixture"):
        check_engine(config, on_device=True)


def test_drafts_need_synchronous_scheduling() -> None:
    from millpond.capture.engine_checks import check_engine

    drafts = SimpleNamespace(enable_adaptive_verification=False)
    config = engine(speculative_config=drafts)
    check_engine(config, on_device=True)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(InvalidInput, match="async_scheduling"):
        check_engine(config, on_device=True)
    config.scheduler_config.async_scheduling, drafts.enable_adaptive_verification = False, True
    with pytest.raises(InvalidInput, match="enable_adaptive_verification"):
        check_engine(config, on_device=True)
