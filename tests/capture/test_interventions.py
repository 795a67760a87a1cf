"""What interventions do to the model, against Hugging Face with a hook; and what they must not touch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from millpond.capture.saes import StoredSae
from millpond.store.artifacts import load_artifact, save_direction, save_sae
from millpond.store.lake import Lake, open_lake
from tests.capture.engine_runs import Answer, Ask, EngineRun, run_engines
from tests.capture.models import D_MODEL, VOCABULARY, Inside, make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

POST = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
HOOK = POST[1]
RNG = np.random.default_rng(4)
PROMPT = RNG.integers(3, VOCABULARY, 70).tolist()
OTHERS = [RNG.integers(3, VOCABULARY, int(n)).tolist() for n in (5, 40, 64)]
VECTOR = RNG.normal(0, 1, D_MODEL).astype(np.float32)
UNIT = torch.from_numpy(VECTOR / np.linalg.norm(VECTOR))
GENERATE = {"max_tokens": 8}


def ask(name: str, *intervene: dict[str, Any], tokens: list[int] = PROMPT, **filters: Any) -> Ask:
    return Ask(tokens, {"capture": {"id": name, **filters}, "intervene": list(intervene)}, GENERATE)


def step(op: str, **more: Any) -> dict[str, Any]:
    vector = {} if op in ("patch", "sae") else {"vector": "direction"}
    return {"op": op, "hook": HOOK, **vector, **more}


STEERED = {
    "add": ask("add", step("add", scale=3.0)),
    "inline": ask("inline", step("add", vector=VECTOR.tolist(), scale=3.0)),
    "ablate": ask("ablate", step("ablate", positions="prompt")),
    "clamp": ask("clamp", step("clamp", min=-0.2, max=0.1)),
    "generated": ask("generated", step("add", scale=5.0, positions="generated")),
    "range": ask("range", step("add", scale=3.0, first_position=10, end_position=20)),
    "two": ask("two", step("add", scale=3.0), step("ablate")),
    "patch": ask("patch", step("patch", run="source", prompt="s", positions=[3, -1], source_positions=[7, 0])),
    "sae": ask("sae", step("sae", artifact="sae", set_latents={"3": 4.0}, scale_latents={"5": 0.0})),
    "sae-error": ask("sae-error", step("sae", artifact="sae", set_latents={"3": 4.0}, keep_error=True)),
}


def make_sae(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    shapes = {"W_enc": (D_MODEL, 96), "b_enc": (96,), "W_dec": (96, D_MODEL), "b_dec": (D_MODEL,)}
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights | {"threshold": torch.full((96,), 0.05)}, folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": 96, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(config))


def sae_change(lake: Lake, *, keep_error: bool) -> Callable[[Tensor], Tensor]:
    weights = {name: torch.from_numpy(values) for name, values in load_artifact(lake, "sae", "sae").arrays().items()}

    def change(x: Tensor) -> Tensor:
        pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        latents = torch.where(pre > weights["threshold"], pre.relu(), torch.zeros(()))
        assert 0.02 < (latents > 0).float().mean() < 0.98
        error = x - latents @ weights["W_dec"] - weights["b_dec"]
        latents[..., 3] = 4.0
        if not keep_error:
            latents[..., 5] = 0.0
        return latents @ weights["W_dec"] + weights["b_dec"] + (error if keep_error else 0)

    return change


class Steered:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = make_model("Llama", folder / "model", seed=1)
        self.inside = Inside(model, torch.float32)
        self.lake = open_lake(folder / "lake", create=True)
        for run in ("run", "source", "isolated", "zero", "strong"):
            self.lake.create_run(run, hooks=tuple(POST), d_model=D_MODEL, dtype="float32", chunk_rows=16, shard_rows=64)
        save_direction(self.lake, "direction", VECTOR, hook=HOOK)
        make_sae(folder / "sae")
        save_sae(self.lake, "sae", folder / "sae")
        first = EngineRun(
            str(model), str(self.lake.folder), POST, "float32", [[ask("s", tokens=OTHERS[1])]], run="source"
        )
        bystanders = [ask(f"other{i}", tokens=tokens) for i, tokens in enumerate(OTHERS)]
        mixed = EngineRun(
            str(model),
            str(self.lake.folder),
            POST,
            "float32",
            [[*STEERED.values(), *bystanders]],
            {"max_num_batched_tokens": 128},
        )

        # the same schedule twice, once with a strength of zero
        def pair(strength: float) -> list[list[Ask]]:
            return [[ask("a", step("add", scale=strength)), *bystanders]]

        zero, strong = (
            EngineRun(str(model), str(self.lake.folder), POST, "float32", pair(strength), run=name)
            for name, strength in (("zero", 0.0), ("strong", 40.0))
        )
        plain = Ask(PROMPT, None, GENERATE)
        steered = Ask(PROMPT, {"intervene": [step("add", scale=3.0)]}, GENERATE)
        bad = [
            Ask(PROMPT, {"intervene": [step("add", vector=[1.0, 2.0])]}, GENERATE),
            Ask(PROMPT, {"intervene": [step("add", vector="nobody")]}, GENERATE),
            Ask(PROMPT, {"intervene": [step("add", hook="blocks.2.hook_mlp_out")]}, GENERATE),
            Ask(PROMPT, {"intervene": [step("rotate")]}, GENERATE),
        ]
        isolated = EngineRun(
            str(model),
            str(self.lake.folder),
            POST,
            "float32",
            [[steered], [plain], [steered], [plain], *([one] for one in bad)],
            {"enable_prefix_caching": True, "block_size": 32},
            run="isolated",
        )
        outcomes = run_engines([first], folder, own_processes=False)
        from millpond.store.seal import seal_run

        seal_run(self.lake.run_folder("source"))
        outcomes += run_engines([mixed, zero, strong], folder)
        outcomes += run_engines([isolated], folder, own_processes=True)  # whose admission is a process of its own
        _, mixed_outcome, zero_outcome, strong_outcome, self.isolated = outcomes
        self.mixed = dict(zip([*STEERED, "other0", "other1", "other2"], mixed_outcome.rounds[0], strict=True))
        self.pairs = zero_outcome.rounds[0], strong_outcome.rounds[0]

    def rows(self, run_name: str, prompt: str) -> Tensor:
        """Stored rows of one prompt, (n_hooks, n_rows, d_model)."""
        run = self.lake[run_name]
        number = int(np.flatnonzero(run.prompts["id"] == prompt)[0])
        mine = run.tokens["prompt"].values == number
        return torch.from_numpy(np.stack([run[hook].values[mine] for hook in POST]))

    def check(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Rows and tokens of a steered request, where `change` is what its intervention does to (1, n, d_model)."""
        answer: Answer = self.mixed[name]
        tokens = [*PROMPT, *answer.tokens[0]]
        handle = self.inside.edit(1, change)
        try:
            truth = self.inside.values(tokens[:-1])
            with torch.no_grad():
                logits = self.inside.model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        finally:
            handle.remove()
        stored = self.rows("run", name)
        for number, hook in enumerate(POST):
            torch.testing.assert_close(stored[number], truth[hook], rtol=0, atol=3e-5)
        assert logits[len(PROMPT) - 1 :].argmax(-1).tolist() == answer.tokens[0]


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Steered:
    return Steered(tmp_path_factory.mktemp("steered"))


def at(positions: slice | list[int], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, positions] = change(x[:, positions])
        return x

    return apply


def test_vectors_are_added_projected_out_and_clamped(steered: Steered) -> None:
    n = len(PROMPT)
    added = torch.from_numpy(VECTOR)
    steered.check("add", lambda x: x + 3 * added)
    steered.check("inline", lambda x: x + 3 * added)
    steered.check("ablate", at(slice(0, n), lambda x: x - (x @ UNIT)[..., None] * UNIT))
    steered.check("clamp", lambda x: x + ((x @ UNIT).clamp(-0.2, 0.1) - x @ UNIT)[..., None] * UNIT)
    steered.check("generated", at(slice(n, None), lambda x: x + 5 * added))
    steered.check("range", at(slice(10, 20), lambda x: x + 3 * added))
    steered.check("two", lambda x: x + 3 * added - ((x + 3 * added) @ UNIT)[..., None] * UNIT)


def test_rows_are_patched_from_another_prompt(steered: Steered) -> None:
    source = steered.rows("source", "s")[1]
    steered.check("patch", at([3, len(PROMPT) - 1], lambda x: source[[7, 0]][None]))


def test_saes_are_spliced_in_with_edited_latents(steered: Steered) -> None:
    steered.check("sae", sae_change(steered.lake, keep_error=False))
    steered.check("sae-error", sae_change(steered.lake, keep_error=True))


def test_others_in_the_batch_stay_as_they_were(steered: Steered) -> None:
    for number, tokens in enumerate(OTHERS):
        name = f"other{number}"
        answer = steered.mixed[name].tokens[0]
        assert answer == steered.inside.greedy(tokens, len(answer))
        assert torch.equal(steered.rows("zero", name), steered.rows("strong", name))  # to the bit
    zero, strong = steered.pairs
    assert [a.tokens for a in zero[1:]] == [a.tokens for a in strong[1:]]
    assert zero[0].tokens != strong[0].tokens


def test_the_prefix_cache_keeps_steered_requests_apart(steered: Steered) -> None:
    first, plain, again, plain_again, *bad = (answers[0] for answers in steered.isolated.rounds)
    assert (first.cached, plain.cached) == (0, 0)
    assert (again.cached, plain_again.cached) == (64, 64)  # each from its own kind
    assert first.tokens == again.tokens == steered.mixed["add"].tokens
    assert plain.tokens == plain_again.tokens == [steered.inside.greedy(PROMPT, 8)]
    assert [answer.tokens for answer in bad] == [[[]]] * 4  # refused before anything was generated


def test_stored_saes_encode_as_their_formulas_say(steered: Steered) -> None:
    sae = StoredSae(load_artifact(steered.lake, "sae", "sae"))
    x = torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(2))
    latents = sae.encode(x)
    assert latents.shape == (7, 96)
    error = x - sae.decode(latents)
    edited = latents.clone()
    edited[:, 3] = 4.0
    torch.testing.assert_close(sae_change(steered.lake, keep_error=True)(x), sae.decode(edited) + error)
