"""Engines that do not start: the commands that start them say why, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from millpond.capture.engine_errors import EngineErrors, with_remedy
from tests.capture.models import D_MODEL, FAMILIES, make_model


@pytest.mark.slow
def test_what_ended_an_engines_worker_is_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16, which the CPU's attention kernels do not have: vLLM itself says "See root cause above"."""
    heads = {"num_attention_heads": D_MODEL // 16, "num_key_value_heads": D_MODEL // 16}
    monkeypatch.setitem(FAMILIES, "Llama", ("LlamaConfig", heads))
    model = make_model("Llama", tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "token_ids": [1, 5, 6]}\n')
    (tmp_path / "job.toml").write_text(f"""
        model = {{path = "{model}"}}
        prompts = {{path = "{tmp_path}/prompts.jsonl"}}
        destination = {{lake = "{tmp_path}/lake", run = "run"}}
        capture = {{hooks = ["blocks.*.hook_resid_post"]}}
        engine = {{skip_tokenizer_init = true}}
    """)
    commands = {
        "capture": [str(tmp_path / "job.toml")],
        "serve": [str(model), "--lake", str(tmp_path / "lake2"), "--", "--skip-tokenizer-init", "--enforce-eager"],
        "worker": ["--queue", str(tmp_path / "queue"), "--lake", str(tmp_path / "lake3"), "--model", str(model)],
    }
    commands["worker"] += ["--engine", '{"skip_tokenizer_init": true}']
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "millpond.cli", name, *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, rest in commands.items()
    }
    for name, process in started.items():
        printed, _ = process.communicate(timeout=500)
        last = printed.splitlines()[-1]
        assert process.returncode == 1, (name, printed[-3000:])
        assert last.startswith("millpond: "), (name, last)
        assert "attention heads of size 16" in last, (name, last)
        assert "use another model" in last, (name, last)
    assert list((tmp_path / "lake" / "runs").glob("*")) == []


def test_the_first_error_is_the_cause_and_the_remedy_is_added_once() -> None:
    errors = EngineErrors()
    assert errors.cause() is None
    errors.close()
    told = with_remedy("ValueError: ... larger than the available KV cache memory (0.1 GiB)")
    assert told.endswith("(0.1 GiB); give less max_model_len, or more kv_cache_memory_bytes")
    assert with_remedy("ValueError: something new") == "ValueError: something new"
