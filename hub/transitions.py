"""The states of a job and what leads from one to the next: the only table, and the drawing of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from millpond.store.errors import LeaseLost
from millpond.store.queue import State


@dataclass(frozen=True)
class Transition:
    """What happens to a job in a state, and which state follows."""

    event: str
    source: State | None
    """None before the job is there."""
    target: State
    note: str = ""


TRANSITIONS = (
    Transition("submit", None, "queued"),
    Transition("claim", "queued", "claimed"),
    Transition("heartbeat", "claimed", "claimed", "renews the lease"),
    Transition("claim", "claimed", "claimed", "the lease ran out"),
    Transition("finish", "claimed", "finished"),
    Transition("hand over", "claimed", "queued", "a worker is done, an executor goes on"),
    Transition("fail", "claimed", "failed"),
    Transition("give up", "claimed", "failed", "the last lease ran out"),
    Transition("time out", "claimed", "failed", "it ran longer than a job may"),
    Transition("cancel", "queued", "cancelled"),
    Transition("cancel", "claimed", "cancelled", "its worker is told by LeaseLost"),
)
FINAL = frozenset(get_args(State)) - {step.source for step in TRANSITIONS}
"""States that nothing leads out of."""

_TARGETS = {(step.event, step.source): step.target for step in TRANSITIONS}


def follow(event: str, state: State | None) -> State:
    """The state after `event`.

    Raises:
        LeaseLost: it cannot happen to a job in `state`.
    """
    try:
        return _TARGETS[event, state]
    except KeyError:
        raise LeaseLost(f"a job that is {state} cannot {event}; stop working on it") from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for step in TRANSITIONS:
        note = f" ({step.note})" if step.note else ""
        lines.append(f"    {step.source or '[*]'} --> {step.target}: {step.event}{note}")
    lines += [f"    {state} --> [*]" for state in get_args(State) if state in FINAL]
    return "\n".join(lines) + "\n"
