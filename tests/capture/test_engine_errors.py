"""Engines that do not start: whoever starts them says why, and what to do."""

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
    command = [sys.executable, "-m", "millpond.cli", "capture", str(tmp_path / "job.toml")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "millpond: CaptureFailed: the engine did not start: the model has attention heads of size 16"
    )
    assert last.endswith("use another model, or a GPU")
    assert list((tmp_path / "lake" / "runs").glob("*")) == []


PROCESS = """
import logging
from millpond.capture.engine_errors import note_errors
from millpond.store.errors import InvalidInput

note_errors()
logger = logging.getLogger("vllm.v1.engine.core")
for message, error in [
    ("Invocation of %s method failed", OSError("the engine goes on")),
    ("WorkerProc failed to start.", InvalidInput("layer 3\\nis unknown; name another")),
    ("EngineCore failed to start.", RuntimeError("See stack trace for root cause.")),
]:
    try:
        raise error
    except Exception:
        logger.exception(message)
"""


def test_the_first_fatal_error_is_the_cause_and_a_known_one_gets_its_remedy() -> None:
    errors = EngineErrors()
    assert errors.cause() is None
    with errors.heard():
        subprocess.run([sys.executable, "-c", PROCESS], check=True, capture_output=True)
    assert errors.cause() == "layer 3 is unknown; name another"
    errors.close()
    told = with_remedy("ValueError: ... larger than the available KV cache memory (0.1 GiB)")
    assert told.endswith("(0.1 GiB); give less max_model_len, or more kv_cache_memory_bytes")
    assert with_remedy("ValueError: something new") == "ValueError: something new"
