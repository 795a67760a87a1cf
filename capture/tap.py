"""The tap: an opaque operator behind each decoder layer that copies chosen rows into a staging buffer.

Everything that depends on requests is data in static buffers, so the operator may sit inside a
compiled graph. `torch.compile` inlines forward hooks that are registered before the first forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.library import Library

from millpond.store.errors import InvalidInput
from millpond.store.hooks import Hook, parse_hook

_library = Library("millpond", "FRAGMENT")  # type: ignore[no-untyped-call]
_active: TapBuffers | None = (
    None  # the operator's schema holds tensors and numbers only, so it looks its buffers up here
)


class TapBuffers:
    """Staging memory of one worker, and the map from a step's tokens to its rows."""

    def __init__(self, hooks: Sequence[str], d_model: int, max_tokens: int, dtype: torch.dtype, device: torch.device):
        self.hooks = tuple(hooks)
        self.stage = torch.zeros(len(hooks), max_tokens, d_model, dtype=dtype, device=device)
        self.source = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        """Token of the step for each staging row."""
        self.count = 0
        """Staging rows in use this step."""

    def arm(self, tokens: NDArray[np.int64]) -> None:
        """Stage these tokens of the coming step, in this order."""
        self.count = len(tokens)
        self.source[: self.count] = torch.from_numpy(tokens)

    def rows(self) -> dict[str, NDArray[Any]]:
        """Copies of the rows staged in the last step, by hook; bfloat16 as its bits in uint16."""
        staged = self.stage[:, : self.count]
        if staged.dtype == torch.bfloat16:
            staged = staged.view(torch.uint16)
        copied = staged.cpu().numpy().copy()
        return {hook: copied[number] for number, hook in enumerate(self.hooks)}


def _tap(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    buffers = _active
    if buffers is None or buffers.count == 0:
        return
    source = buffers.source[: buffers.count]
    rows = hidden.index_select(0, source)
    if residual is not None:
        rows = rows + residual.index_select(0, source)
    buffers.stage[number, : buffers.count] = rows


def _tap_fake(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    return None


# `hidden` is declared as written to, so that no compiler pass drops an operator without outputs.
_library.define("tap(Tensor(a!) hidden, Tensor? residual, int number) -> ()")  # type: ignore[no-untyped-call]
_library.impl("tap", _tap, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library._register_fake("tap", _tap_fake)  # type: ignore[no-untyped-call]


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


def _split_output(output: Any, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The hidden state a layer returned and, where the model fuses norms, the residual still to be added to it."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
        hidden, residual = output
        if hidden.shape == residual.shape:
            return hidden, residual
    raise InvalidInput(
        f"{type(layer).__name__} returned {type(output).__name__}, not a tensor or a (hidden, residual) pair of one "
        "shape; its architecture cannot be tapped yet"
    )


def install_taps(model: nn.Module, n_layers: int, buffers: TapBuffers) -> None:
    """Put a tap behind every layer that `buffers.hooks` names; to be called before the first forward.

    Raises:
        InvalidInput: a hook or the architecture is not supported.
    """
    global _active
    layers = decoder_layers(model, n_layers)
    for number, name in enumerate(buffers.hooks):
        hook = check_supported(parse_hook(name), n_layers)

        def tap(layer: nn.Module, _: Any, output: Any, number: int = number) -> None:
            hidden, residual = _split_output(output, layer)
            torch.ops.millpond.tap(hidden, residual, number)

        layers[hook.layer].register_forward_hook(tap)
    _active = buffers


def check_supported(hook: Hook, n_layers: int) -> Hook:
    """`hook`, if a model of `n_layers` layers can be tapped there.

    Raises:
        InvalidInput: otherwise.
    """
    if hook.kind != "resid_post":
        raise InvalidInput(f"hook {str(hook)!r} cannot be captured yet; capture blocks.{hook.layer}.hook_resid_post")
    if hook.layer >= n_layers:
        raise InvalidInput(
            f"hook {str(hook)!r} is beyond the model's {n_layers} layers; name layers 0 to {n_layers - 1}"
        )
    return hook
