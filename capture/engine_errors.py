"""Why an engine did not start, or died: what ends one of vLLM's processes, told by the process that started them.

vLLM says "See root cause above" and leaves the rest to its processes' logs.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from millpond.capture.parent_watch import STARTER

_FILE = "MILLPOND_ENGINE_ERRORS"
"""Environment variable that names the file to which the engine's processes add their errors."""
_FATAL = re.compile(r"failed to start|encountered a fatal error")
_REMEDIES = {
    r"[Mm]odel architectures? .* not supported|has no vLLM implementation": "this vLLM does not know the model's architecture; "
    "use another model",
    r"available KV cache memory|memory for the cache blocks": "give less max_model_len, or more kv_cache_memory_bytes",
    r"out of memory|can't allocate memory|Cannot allocate memory": "give less kv_cache_memory_bytes, gpu_memory_utilization or "
    "max_num_batched_tokens, or end what else uses the memory",
}
"""What to do about vLLM's errors that name no remedy of ours."""


class _Notes(logging.Handler):
    """Adds the exception of a fatal error to the file, in one line."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        path = os.environ.get(
            _FILE
        )  # not kept: processes are forked with this handler, and other engines have other files
        if path and error is not None and _FATAL.search(record.getMessage()):
            line = (one_line(error) + "\n").encode(errors="replace")
            with Path(path).open("ab", buffering=0) as file:  # one write, which other processes' do not split
                file.write(line)


def note_errors() -> None:
    """Let this process, one of vLLM's, tell the one that started it what ends it."""
    logger = logging.getLogger("vllm")
    if _FILE in os.environ and not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.ERROR))


class EngineErrors:
    """What the processes tell that are started inside `heard`."""

    def __init__(self) -> None:
        handle, path = tempfile.mkstemp(prefix="millpond-engine-")
        os.close(handle)
        self._path = Path(path)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Processes that are started inside tell, and end with this one; those that they start do too."""
        given = {_FILE: str(self._path), STARTER: str(os.getpid())}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def cause(self) -> str | None:
        """The first error, with what to do about it where that is known; later ones follow from it."""
        try:
            first, *_ = self._path.read_text(errors="replace").splitlines()
        except (ValueError, FileNotFoundError):
            return None
        return with_remedy(first)

    def close(self) -> None:
        """Forget them."""
        self._path.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """The error's kind and text; of our own errors, the text says it all."""
    told = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    text = " ".join(told.split())
    if type(error).__module__.partition(".")[0] == "millpond" and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def with_remedy(cause: str) -> str:
    """The cause and, where one is known, the remedy."""
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, cause):
            return f"{cause}; {remedy}"
    return cause
