"""An engine's processes end with the one that started them, whatever ended that: nobody else would, and they hold the model's memory."""

from __future__ import annotations

import os
import signal
import threading
import time

STARTER = "MILLPOND_ENGINE_STARTER"
"""Environment variable that holds the id of the process that starts engines."""
_NAME = "millpond-parent"
_SECONDS = 1.0
_PATIENCE = 30.0


def end_with_parent() -> None:
    """Let this process, one of vLLM's, end when its parent has; nothing in the process that starts engines itself."""
    starter = os.environ.get(STARTER)
    if starter is None or starter == str(os.getpid()) or any(each.name == _NAME for each in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(os.getppid(),), name=_NAME, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # vLLM ends its own processes on it
    time.sleep(_PATIENCE)
    os._exit(1)
