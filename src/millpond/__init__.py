"""Millpond: a data lake and analysis workspace for language-model activations.

Nothing heavy is imported before it is used: not torch, vLLM, Dask or JupyterHub.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.analysis import BatchTopKSae as BatchTopKSae
    from millpond.analysis import LdaProbe as LdaProbe
    from millpond.analysis import LogisticProbe as LogisticProbe
    from millpond.analysis import MassMeanProbe as MassMeanProbe
    from millpond.analysis import PcaReducer as PcaReducer
    from millpond.analysis import RidgeProbe as RidgeProbe
    from millpond.analysis import lazy as lazy
    from millpond.analysis import select_tokens as select_tokens
    from millpond.store.errors import MillpondError as MillpondError
    from millpond.store.lake import Lake as Lake
    from millpond.store.lake import open_lake as open  # noqa: A004
    from millpond.store.result import Result as Result
    from millpond.store.run import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "BatchTopKSae": ("millpond.analysis", "BatchTopKSae"),
    "Lake": ("millpond.store.lake", "Lake"),
    "LdaProbe": ("millpond.analysis", "LdaProbe"),
    "LogisticProbe": ("millpond.analysis", "LogisticProbe"),
    "MassMeanProbe": ("millpond.analysis", "MassMeanProbe"),
    "MillpondError": ("millpond.store.errors", "MillpondError"),
    "PcaReducer": ("millpond.analysis", "PcaReducer"),
    "RidgeProbe": ("millpond.analysis", "RidgeProbe"),
    "Result": ("millpond.store.result", "Result"),
    "Run": ("millpond.store.run", "Run"),
    "select_tokens": ("millpond.analysis", "select_tokens"),
    "lazy": ("millpond.analysis.lazy", "lazy"),
    "open": ("millpond.store.lake", "open_lake"),
}

__all__ = [
    "BatchTopKSae",
    "Lake",
    "LdaProbe",
    "LogisticProbe",
    "MassMeanProbe",
    "MillpondError",
    "PcaReducer",
    "Result",
    "RidgeProbe",
    "Run",
    "lazy",
    "open",
    "select_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'millpond' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
