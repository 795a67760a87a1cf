"""A repair of vLLM's LoRA arithmetic on the CPU, without which base-model requests would be wrong in mixed batches.

A token without an adapter has index -1. The CUDA kernels skip it; the PyTorch functions that the CPU
build uses index with it, which selects the last adapter (vllm-project/vllm#48421, open when 0.32 came out).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any


def repair() -> None:
    """Let tokens without an adapter get nothing from any; doing it twice changes nothing."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    modules: list[ModuleType] = [lora_ops, torch_ops, punica_cpu]
    for name in ("bgmv_expand", "bgmv_expand_slice"):  # every product ends in one of these
        original = getattr(lora_ops, name)
        if not getattr(original, "_millpond", False):
            repaired = _skipping_no_adapter(original)
            for module in modules:
                setattr(module, name, repaired)


def _skipping_no_adapter(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def expand(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
        # nothing times the last adapter's matrix is nothing
        original(inputs.masked_fill((indices < 0).unsqueeze(1), 0), weights, output, indices, *args, **kwargs)

    expand._millpond = True  # type: ignore[attr-defined]
    return expand
