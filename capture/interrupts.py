"""Ctrl-C, or SIGTERM, during a capture: held back until the capture is between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Remember Ctrl-C and SIGTERM instead of raising anywhere; the function that is yielded raises KeyboardInterrupt.

    An interrupt in the middle of a call to the engine's process would leave both sides waiting for
    each other. The second one acts at once. Outside the main thread nothing is changed.
    """
    asked = False

    def remember(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blocked() -> Iterator[None]:
    """Start processes that Ctrl-C never reaches: they inherit the signal mask, and the driving process ends them.

    The terminal sends Ctrl-C to every process of the group; one that arrives meanwhile is delivered afterwards.
    """
    resource_tracker.ensure_running()  # starting it would unblock SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
