"""Hook point names, as TransformerLens spells them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from millpond.store.errors import HookNotCaptured, InvalidInput

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_NAME = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


@dataclass(frozen=True, order=True)
class Hook:
    """One place in the model at which activations are read."""

    layer: int
    """Counted from 0."""
    kind: str
    """One of `KINDS`."""

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.kind}"

    @property
    def hidden_state(self) -> int | None:
        """Index into Hugging Face's `hidden_states` that holds the same values.

        None when there is none: `hidden_states` has the residual stream between layers only, and
        its last entry comes after the final norm.
        """
        return {"resid_pre": self.layer, "resid_post": self.layer + 1}.get(self.kind)


def parse_hook(name: str) -> Hook:
    """The hook point called `name`; TransformerLens 3's `hook_out` is `hook_resid_post`.

    Raises:
        InvalidInput: `name` is no hook point.
    """
    match = _NAME.fullmatch(name)
    kind = match.group(2) if match else ""
    if kind == "out":
        kind = "resid_post"
    if not match or kind not in KINDS:
        raise InvalidInput(
            f"hook {name!r} is not a hook point; write blocks.<layer>.hook_<kind>, with a kind of {', '.join(KINDS)}"
        )
    return Hook(int(match.group(1)), kind)


def hook_sort_key(name: str) -> tuple[int, int]:
    """Sorts hook names by layer, then by their order inside a layer."""
    hook = parse_hook(name)
    return hook.layer, KINDS.index(hook.kind)


def match_hooks(patterns: str | Iterable[str], available: Sequence[str], where: str) -> tuple[str, ...]:
    """The names among `available` that any of `patterns` (names or globs) selects, in the order of `available`.

    Raises:
        HookNotCaptured: a pattern selects nothing; `where` tells the reader what was searched.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set()
    for pattern in patterns:
        canonical = re.sub(r"hook_out$", "hook_resid_post", pattern)
        found = [name for name in available if fnmatchcase(name, canonical)]
        if not found:
            raise HookNotCaptured(
                f"{pattern!r} selects no hook point: {where} {summarize_hooks(available)}; name one of these"
            )
        chosen.update(found)
    return tuple(name for name in available if name in chosen)


def summarize_hooks(names: Iterable[str]) -> str:
    """A short text for many hook names, such as `blocks.{0,4,8}.hook_resid_post`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        hook = parse_hook(name)
        layers.setdefault(hook.kind, []).append(hook.layer)
    parts = []
    for kind, numbers in layers.items():
        numbers = sorted(numbers)
        if len(numbers) == 1:
            parts.append(f"blocks.{numbers[0]}.hook_{kind}")
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            parts.append(f"blocks.{{{numbers[0]}..{numbers[-1]}}}.hook_{kind}")
        else:
            parts.append(f"blocks.{{{','.join(map(str, numbers))}}}.hook_{kind}")
    return ", ".join(parts) or "nothing"
