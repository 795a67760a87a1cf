"""A repair between vLLM and numba, without which no second engine starts in a process where numba was imported.

On the CPU, vLLM asks every object in every module whether its `__dict__` holds a Triton kernel. llvmlite's library, which
numba brings, answers to any name, `__dict__` too, with one of LLVM's functions, on which vLLM fails.
"""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Let llvmlite's library have no names of Python's own; doing it twice changes nothing."""
    try:
        from llvmlite.binding import ffi
    except ModuleNotFoundError:
        return
    owner = type(ffi.lib)
    original = owner.__getattr__
    if getattr(original, "_millpond", False):
        return

    def look_up(library: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(library, name)

    look_up._millpond = True  # type: ignore[attr-defined]
    owner.__getattr__ = look_up
