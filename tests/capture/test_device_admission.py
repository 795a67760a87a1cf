"""What is refused where interventions are part of recorded graphs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millpond.capture.admission import EngineFacts
from millpond.capture.vllm_cli import serve_command
from millpond.store.capture_spec import RequestArgs
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake
from tests.capture.artifacts import save_small_sae
from tests.capture.conftest import MODEL

HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4))
SAE = {"op": "sae", "hook": HOOKS[1], "artifact": "s"}
ADD = {"op": "add", "hook": "blocks.*.hook_resid_post", "vector": [1.0, 2.0]}


def facts(**settings: Any) -> EngineFacts:
    config = SimpleNamespace(
        additional_config={"millpond": {"hooks": list(HOOKS), "device_taps": True, **settings}},
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=4), get_hidden_size=lambda: 2, dtype="torch.bfloat16"
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=3),
        parallel_config=SimpleNamespace(_api_process_count=1),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=80),
    )
    return EngineFacts.of(config)


def test_buffers_are_as_large_as_a_step_can_need() -> None:
    found = facts(vectors_per_request=5)
    assert (found.max_tokens, found.staging_rows, found.bank_rows) == (80, 128, 15)


def test_one_vector_at_many_hooks_is_one_place() -> None:
    facts(vectors_per_request=1).check(RequestArgs.model_validate({"intervene": [ADD]}), 5, 5)


@pytest.mark.parametrize(
    ("interventions", "settings", "named"),
    [
        ([ADD, ADD], {}, "edits_per_token 2, the engine has 1"),
        ([ADD], {"edits_per_token": 0}, "edits_per_token 1, the engine has 0"),
        ([ADD, {**ADD, "scale": 2.0}], {"edits_per_token": 2, "vectors_per_request": 1}, "vectors_per_request 2"),
        ([{**ADD, "token_ids": [3]}], {}, "token_ids"),
        ([{**SAE, "artifact": "other"}], {}, "no SAE 'other' at blocks.1.hook_resid_post; start it with .* --saes"),
        ([{**SAE, "hook": HOOKS[0]}], {}, "no SAE 's' at blocks.0.hook_resid_post"),
        (
            [{**SAE, "set_latents": {"0": 1.0, "1": 1.0}, "scale_latents": {"2": 0.0}}],
            {},
            "latents_per_request 2; start",
        ),
        ([{**SAE, "set_latents": {"9": 1.0}}], {}, "has 3 latents; there is no latent 9"),
        ([SAE, SAE], {}, "comes after another intervention"),
        ([ADD, SAE], {}, "comes after another intervention"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, interventions: list[Any], settings: dict[str, int], named: str
) -> None:
    lake = open_lake(tmp_path / "lake", create=True)
    for name in ("s", "other"):
        save_small_sae(lake, tmp_path / name, 2, 3)
    given = {
        "lake": str(lake.folder),
        "saes": [{"hook": HOOKS[1], "artifact": "s"}],
        "latents_per_request": 2,
    } | settings
    check = facts(**given).check
    check(RequestArgs.model_validate({"intervene": [SAE]}), 5, 5)
    with pytest.raises(InvalidInput, match=named):
        check(RequestArgs.model_validate({"intervene": interventions}), 5, 5)


@pytest.mark.parametrize("saes", [["s"], [{"hook": HOOKS[1]}], [{"hook": HOOKS[1], "artifact": "s", "k": 3}]])
def test_saes_of_another_form_are_refused(saes: list[Any]) -> None:
    with pytest.raises(InvalidInput, match="among saes; give a hook and an artifact"):
        facts(saes=saes)


def test_a_setting_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidInput, match="staging_rows"):
        facts(staging_rows="many")


@pytest.mark.slow  # it asks for vLLM's version
def test_serve_hands_saes_to_the_engine(tmp_path: Path) -> None:
    def settings(*saes: str) -> Any:
        command = serve_command(
            str(MODEL), lake=str(tmp_path / "lake"), hooks=HOOKS, run=None, commit_seconds=1.0, arguments=(), saes=saes
        )
        return json.loads(command[command.index("--additional-config") + 1])["millpond"]

    assert settings(f"{HOOKS[1]}=s")["saes"] == [{"hook": HOOKS[1], "artifact": "s"}]
    assert "saes" not in settings()
    for wrong in (HOOKS[1], "=s", f"{HOOKS[1]}="):
        with pytest.raises(InvalidInput, match="give HOOK=ARTIFACT"):
            settings(wrong)
