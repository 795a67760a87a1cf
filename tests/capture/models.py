"""Tiny random models of every decoder family that is claimed, and what Hugging Face computes inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, D_MODEL, N_LAYERS = 128, 64, 3
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 1}
_HEAD = {"head_dim": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Mistral": ("MistralConfig", _GROUPED | {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3Config", _GROUPED | _HEAD),
    "Gemma2": ("Gemma2Config", _GROUPED | _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "Gemma3": ("Gemma3TextConfig", _GROUPED | _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "Phi3": ("Phi3Config", _GROUPED),
    "GPT2": ("GPT2Config", {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 256}),
    "GPTNeoX": ("GPTNeoXConfig", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "GPTNeoX-parallel": ("GPTNeoXConfig", {"use_parallel_residual": True, "rotary_pct": 0.5}),
    "OPT": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": D_MODEL, "do_layer_norm_before": True}),
    "OLMo2": ("Olmo2Config", _GROUPED),
    "Mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        _GROUPED
        | _HEAD
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
}
"""Name to the configuration class and what it needs beyond the sizes."""


def make_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model of `family` (float32 safetensors) into `folder`."""
    import transformers

    class_name, more = FAMILIES[family]
    config = getattr(transformers, class_name)(**(_SIZES | {"tie_word_embeddings": True} | more))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # larger than the usual start, so that every layer changes its input visibly
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if family.startswith("DeepSeek"):
            # Attention over rotated shared keys differs between vLLM 0.32's CPU build and Hugging Face on equal
            # inputs, from the first layer on. They are zero here, so everything but that rotation is compared.
            for layer in model.model.layers:
                layer.self_attn.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] = 0
    model.save_pretrained(folder)
    return folder


class Inside:
    """What Hugging Face computes at the hook points of a model, one sequence at a time.

    Every value is taken where the model itself adds it up: what enters a layer, what leaves it, and what
    attention and the MLP add in between.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.layers: Sequence[nn.Module] = next(
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "h")
        )

    def edit(self, layer: int, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
        """Put `change` behind a layer: it gets and returns (1, n_tokens, d_model)."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return self.layers[layer].register_forward_hook(hook)

    @torch.no_grad()
    def values(self, token_ids: list[int]) -> dict[str, Tensor]:
        """Every hook's values, (n_tokens, d_model), by hook name."""
        found: dict[str, Tensor] = {}
        handles = []

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
                value = output if output is not None else (args[0] if args else kwargs["hidden_states"])
                found[name] = (value[0] if isinstance(value, tuple) else value).detach().clone().reshape(-1, D_MODEL)

            return hook

        for number, layer in enumerate(self.layers):
            prefix = f"blocks.{number}.hook_"
            handles.append(layer.register_forward_pre_hook(keep(prefix + "resid_pre"), with_kwargs=True))
            handles.append(layer.register_forward_hook(keep(prefix + "resid_post"), with_kwargs=True))
            attention, mlp = _branches(layer)
            handles.append(attention.register_forward_hook(keep(prefix + "attn_out"), with_kwargs=True))
            handles.append(mlp.register_forward_hook(keep(prefix + "mlp_out"), with_kwargs=True))
        try:
            self.model(torch.tensor([token_ids]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for number, layer in enumerate(self.layers):
            prefix = f"blocks.{number}.hook_"
            if not getattr(layer, "use_parallel_residual", False):
                found[prefix + "resid_mid"] = found[prefix + "resid_pre"] + found[prefix + "attn_out"]
        return found

    @torch.no_grad()
    def greedy(self, token_ids: list[int], n: int) -> list[int]:
        """The next `n` tokens, most likely first."""
        ids = list(token_ids)
        for _ in range(n):
            ids.append(int(self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(token_ids) :]


def _branches(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a Hugging Face layer adds to its residual stream."""
    children = dict(layer.named_children())
    if "post_feedforward_layernorm" in children:  # norms behind the branches
        return children["post_attention_layernorm"], children["post_feedforward_layernorm"]
    attention = next(children[name] for name in ("self_attn", "attn", "attention") if name in children)
    mlp = next(children[name] for name in ("mlp", "block_sparse_moe", "fc2") if name in children)
    return attention, mlp
