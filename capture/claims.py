"""Prompt ids that are taken, where several processes admit requests: the engine that runs them decides."""

from __future__ import annotations

import re
from zlib import crc32


def engine_of(run: str, prompt: str, n_engines: int) -> int:
    """The data-parallel rank that runs requests of this id, whichever process admits them.

    One engine has them all, so that it can refuse the second. The samples `<id>/0`, `<id>/1`, ... go where `<id>` does.
    """
    asked = re.sub(r"(/\d+)+$", "", prompt)
    return crc32(f"{run}\0{asked}".encode()) % n_engines


class PromptClaims:
    """The prompts of runs that one engine has captured, or is about to."""

    def __init__(self) -> None:
        self._taken: set[tuple[str, str]] = set()
        self._open: dict[str, tuple[str, str]] = {}

    def take(self, capture_id: str, run: str, prompt: str) -> bool:
        """Take a prompt of a run for a request; false if another request has it."""
        claim = (run, prompt)
        if self._open.get(capture_id) == claim:
            return True  # resumed after a preemption
        if claim in self._taken:
            return False
        self._taken.add(claim)
        self._open[capture_id] = claim
        return True

    def release(self, capture_id: str) -> None:
        """Nothing of the request will be stored: its prompt may be asked for again."""
        claim = self._open.pop(capture_id, None)
        if claim is not None:
            self._taken.discard(claim)

    def keep(self, capture_id: str) -> None:
        """The request is stored."""
        self._open.pop(capture_id, None)
