"""Capture jobs on the example model, and what Hugging Face computes for the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"
HOOK = "blocks.{}.hook_resid_post"
N_LAYERS, D_MODEL, CONTEXT = 6, 256, 512


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[..., Path]:
    def write(prompts: list[dict[str, Any]], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        return path

    return write


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    """Writes a job file; keywords such as `capture={"positions": "last"}` change a section."""

    def write(prompt_file: Path, /, **sections: dict[str, Any]) -> Path:
        job: dict[str, dict[str, Any]] = {
            "model": {"path": str(MODEL), "dtype": "float32"},
            "capture": {"hooks": ["blocks.*.hook_resid_post"]},
            "prompts": {"path": str(prompt_file)},
            "destination": {"lake": str(tmp_path / "lake"), "run": "run", "chunk_rows": 16, "shard_rows": 64},
            "engine": {"kv_cache_memory_bytes": 1 << 28},
        }
        for section, values in sections.items():
            job[section] = {key: value for key, value in (job[section] | values).items() if value is not None}
        path = tmp_path / "job.toml"
        lines = []
        for section, values in job.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        path.write_text("\n".join(lines))
        return path

    return write


class Reference:
    """The model as Hugging Face runs it, one sequence at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()

    @torch.no_grad()
    def residuals(self, token_ids: list[int]) -> np.ndarray:
        """resid_post of every layer, (n_layers, n_tokens, d_model), float32."""
        before_norm: list[torch.Tensor] = []
        handle = self.model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
        states = self.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        handle.remove()
        # the last of Hugging Face's hidden states comes after the final norm
        layers = [*states[1:-1], before_norm[0]]
        return torch.stack([layer[0] for layer in layers]).float().numpy()

    @torch.no_grad()
    def greedy(self, token_ids: list[int], n: int) -> list[int]:
        ids = list(token_ids)
        for _ in range(n):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(token_ids) :]


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(torch.float32)


@pytest.fixture(scope="session")
def reference_bfloat16() -> Reference:
    return Reference(torch.bfloat16)


@pytest.fixture(scope="session")
def python_prompts() -> list[list[int]]:
    """Token ids of pieces of Python of many lengths; some share a long beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(Path(json.__file__).read_text())["input_ids"]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 20).tolist()
    prompts = [ids[:1] + ids[95 * number + 1 : 95 * number + 1 + length] for number, length in enumerate(lengths)]
    return prompts + [ids[:200] + tail for tail in (ids[300:340], ids[500:520], [])]
