"""The tap: an opaque operator at each hook point that edits and copies chosen rows.

Everything that depends on requests is data that the operator looks up, so it may sit inside a
compiled graph. `torch.compile` inlines forward hooks that are registered before the first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from millpond.capture.device_tap import DeviceTaps
from millpond.capture.hook_points import decoder_layers, find_hook_point, value_after, value_before
from millpond.store.errors import InvalidInput
from millpond.store.hooks import Hook, parse_hook

Rows = slice | Tensor
"""Tokens of a step: a range where they are consecutive, otherwise their int64 indexes."""
Edit = Callable[[Tensor], Tensor]
"""From float32 activations (n, d_model) to what they become, of the same shape."""

_library = Library("millpond", "FRAGMENT")  # type: ignore[no-untyped-call]
_active: Taps | None = None  # the operator's schema holds tensors and numbers only, so it looks its work up here


@dataclass
class HookWork:
    """What one hook point does in one step."""

    edits: list[tuple[Rows, Edit]] = field(default_factory=list)
    """Applied in this order, before anything is copied."""
    copies: list[tuple[Rows, Tensor]] = field(default_factory=list)
    """Where the rows go: a tensor of the model's dtype, (n, d_model)."""
    reads: list[tuple[Rows, Callable[[Tensor], None]]] = field(default_factory=list)
    """Computed from activations (n, d_model) as `copies` would keep them, and kept by the function itself."""


class Taps:
    """The hook points of one worker, and what they do in the coming step."""

    def __init__(self, hooks: Sequence[str]) -> None:
        self.hooks = tuple(hooks)
        self.number = {hook: number for number, hook in enumerate(hooks)}
        self.work: Mapping[int, HookWork] = {}
        """By a hook's number. Empty while vLLM profiles, warms up or runs nobody's request."""
        self.device: DeviceTaps | None = None
        """What a hook point does instead where no Python runs when a graph is replayed."""


def _tap(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    if _active is None:
        return
    if _active.device is not None:
        _active.device.apply(hidden, residual, number)
        return
    work = _active.work.get(number)
    if work is not None:
        edit_and_copy(hidden, residual, work)


def edit_and_copy(hidden: Tensor, residual: Tensor | None, work: HookWork) -> None:
    """Do `work` on the tokens of one hook point, (n_tokens, d_model); the value is the sum of both tensors."""
    hidden = hidden.view(-1, hidden.shape[-1])
    if residual is not None:
        residual = residual.view(-1, residual.shape[-1])
    for rows, edit in work.edits:
        hidden[rows] = edit(_float_rows(hidden, residual, rows)).to(hidden.dtype)
        if residual is not None:
            residual[rows] = 0  # the sum is now `hidden` alone, rounded once
    for rows, target in work.copies:
        if residual is not None:
            torch.add(hidden[rows], residual[rows], out=target)
        else:
            target.copy_(hidden[rows])
    for rows, read in work.reads:
        read(hidden[rows] if residual is None else hidden[rows] + residual[rows])


def _float_rows(hidden: Tensor, residual: Tensor | None, rows: Rows) -> Tensor:
    values = hidden[rows].float()
    return values if residual is None else values + residual[rows].float()


def _tap_fake(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    return None


# Both tensors are declared as written to: edits write them, and no compiler pass may drop the operator.
_library.define("tap(Tensor(a!) hidden, Tensor(b!)? residual, int number) -> ()")  # type: ignore[no-untyped-call]
_library.impl("tap", _tap, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library._register_fake("tap", _tap_fake)  # type: ignore[no-untyped-call]


def tapped_hooks(model: nn.Module, n_layers: int, hooks: Sequence[str]) -> tuple[str, ...]:
    """Those of `hooks` whose layers this process has: a pipeline stage has some of a model's.

    Raises:
        InvalidInput: a hook or the architecture is not supported.
    """
    layers = decoder_layers(model, n_layers)
    return tuple(
        hook
        for hook in hooks
        if type(layers[check_layer(parse_hook(hook), n_layers).layer]).__name__ != "PPMissingLayer"
    )


def install_taps(model: nn.Module, n_layers: int, taps: Taps) -> None:
    """Put a tap at every hook point of `taps`; to be called before the first forward.

    Raises:
        InvalidInput: a hook or the architecture is not supported.
    """
    global _active
    layers = decoder_layers(model, n_layers)
    for number, name in enumerate(taps.hooks):
        hook = check_layer(parse_hook(name), n_layers)
        point = find_hook_point(layers, hook)
        if point.before:

            def before(module: nn.Module, args: Any, kwargs: Any, point: Any = point, number: int = number) -> None:
                hidden, residual = value_before(point, args, kwargs)
                torch.ops.millpond.tap(hidden, residual, number)

            point.module.register_forward_pre_hook(before, with_kwargs=True)
        else:

            def after(
                module: nn.Module, _: Any, output: Any, block: bool = hook.kind != "resid_post", number: int = number
            ) -> None:
                hidden, residual = value_after(output, module, block)
                torch.ops.millpond.tap(hidden, residual, number)

            point.module.register_forward_hook(after)
    _active = taps


def check_layer(hook: Hook, n_layers: int) -> Hook:
    """`hook`, if a model of `n_layers` layers has it.

    Raises:
        InvalidInput: otherwise.
    """
    if hook.layer >= n_layers:
        raise InvalidInput(
            f"hook {str(hook)!r} is beyond the model's {n_layers} layers; name layers 0 to {n_layers - 1}"
        )
    return hook
