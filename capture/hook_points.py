"""Where a vLLM model's hook points are: which module, before or after it, for every known kind of decoder layer.

`attn_out` and `mlp_out` are what a block adds to the residual stream, norms behind the block included,
as in TransformerLens. So resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from millpond.store.errors import InvalidInput
from millpond.store.hooks import KINDS, Hook


@dataclass(frozen=True)
class Layout:
    """Which child modules of a decoder layer see the values inside it."""

    attn_out: str
    """The child whose output is `attn_out`."""
    resid_mid: str | None
    """The child whose input is `resid_mid`; None where attention and MLP run side by side."""
    mlp_out: str
    """The child whose output is `mlp_out`."""


_PRE_NORM = Layout("self_attn", "post_attention_layernorm", "mlp")
_SANDWICH = Layout("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LAYOUTS = {
    "LlamaDecoderLayer": _PRE_NORM,
    "MistralDecoderLayer": _PRE_NORM,
    "Qwen2DecoderLayer": _PRE_NORM,
    "Qwen3DecoderLayer": _PRE_NORM,
    "Qwen3MoeDecoderLayer": _PRE_NORM,
    "DeepseekV2DecoderLayer": _PRE_NORM,
    "MixtralDecoderLayer": Layout("self_attn", "post_attention_layernorm", "block_sparse_moe"),
    "Gemma2DecoderLayer": _SANDWICH,
    "Gemma3DecoderLayer": _SANDWICH,
    "Olmo2DecoderLayer": Layout("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "GPT2Block": Layout("attn", "ln_2", "mlp"),
    "OPTDecoderLayer": Layout("self_attn", "final_layer_norm", "fc2"),
    "GPTNeoXLayer": Layout("attention", "post_attention_layernorm", "mlp"),
}


@dataclass(frozen=True)
class HookPoint:
    """One side of one module, where a hook's values pass."""

    module: nn.Module
    before: bool
    """Whether the values are what the module gets, not what it returns."""
    arguments: tuple[tuple[str, int], ...] = ()
    """Names and places of the arguments that add up to the value; only looked at where `before`."""


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The model's list of `n_layers` decoder layers.

    Raises:
        InvalidInput: there is not exactly one such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    found = [name for name in lists if name.rpartition(".")[2] in ("layers", "h", "blocks")]
    if len(found) != 1:
        raise InvalidInput(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} decoder layers ({', '.join(lists) or 'none'}); "
            "its architecture cannot be tapped yet"
        )
    return lists[found[0]]


def find_hook_point(layers: nn.ModuleList, hook: Hook) -> HookPoint:
    """Where the values of `hook` pass.

    Raises:
        InvalidInput: the layer is of a kind whose inside is not known, or has no such value.
    """
    layer = layers[hook.layer]
    if hook.kind == "resid_pre":
        return HookPoint(layer, True, _layer_arguments(layer))
    if hook.kind == "resid_post":
        return HookPoint(layer, False)
    kind = type(layer).__name__
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise InvalidInput(
            f"hook {str(hook)!r}: the inside of {kind} is not known yet; resid_pre and resid_post can be captured, and "
            f"all of {', '.join(KINDS)} of {', '.join(_LAYOUTS)}"
        )
    if kind == "OPTDecoderLayer" and not layer.do_layer_norm_before:
        raise InvalidInput(
            f"hook {str(hook)!r}: this OPT normalises the residual stream itself (do_layer_norm_before is false), so only "
            "resid_pre and resid_post exist"
        )
    child: str | None = getattr(layout, hook.kind)
    if child is None or (hook.kind == "resid_mid" and getattr(layer, "use_parallel_residual", False)):
        raise InvalidInput(f"hook {str(hook)!r}: attention and MLP of {kind} run side by side; there is no resid_mid")
    module = getattr(layer, child)
    if hook.kind != "resid_mid":
        return HookPoint(module, False)
    return HookPoint(module, True, (("", 0), ("residual", 1)))


def _layer_arguments(layer: nn.Module) -> tuple[tuple[str, int], ...]:
    order = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in order:
        raise InvalidInput(
            f"{type(layer).__name__} takes {', '.join(order)}, not hidden_states; its architecture cannot be tapped yet"
        )
    return tuple((name, order.index(name)) for name in ("hidden_states", "residual") if name in order)


def value_before(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The hidden state among a module's arguments and, where norms are fused, the residual still to be added to it."""
    values = [kwargs[name] if name in kwargs else args[i] if i < len(args) else None for name, i in point.arguments]
    if not isinstance(values[0], Tensor):
        raise InvalidInput(f"{type(point.module).__name__} got no tensor; its architecture cannot be tapped yet")
    return values[0], values[1] if len(values) > 1 else None


def value_after(output: Any, module: nn.Module, block: bool) -> tuple[Tensor, Tensor | None]:
    """What a module returned, as a hidden state and the residual still to be added to it.

    Args:
        output: the module's output.
        module: only named in errors.
        block: whether the module is attention or an MLP, which return their value first and whatever else after it.
    """
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        if block or (len(output) == 1):
            return output[0], None
        if len(output) == 2 and isinstance(output[1], Tensor) and output[0].shape == output[1].shape:
            return output[0], output[1]
        if len(output) == 2 and output[1] is None:
            return output[0], None
    raise InvalidInput(
        f"{type(module).__name__} returned {type(output).__name__}, not a tensor or a (hidden, residual) pair of one "
        "shape; its architecture cannot be tapped yet"
    )
