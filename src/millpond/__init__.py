"""Millpond: a data lake and analysis workspace for language-model activations.

Nothing heavy is imported before it is used: not torch, vLLM, Dask or JupyterHub.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.analysis import BatchTopKSae as BatchTopKSae
    from millpond.analysis import Crosscoder as Crosscoder
    from millpond.analysis import GatedSae as GatedSae
    from millpond.analysis import JumpReluSae as JumpReluSae
    from millpond.analysis import LdaProbe as LdaProbe
    from millpond.analysis import LogisticProbe as LogisticProbe
    from millpond.analysis import MassMeanProbe as MassMeanProbe
    from millpond.analysis import MatryoshkaSae as MatryoshkaSae
    from millpond.analysis import PcaReducer as PcaReducer
    from millpond.analysis import ReluSae as ReluSae
    from millpond.analysis import RidgeProbe as RidgeProbe
    from millpond.analysis import Sae as Sae
    from millpond.analysis import SkipTranscoder as SkipTranscoder
    from millpond.analysis import TopKSae as TopKSae
    from millpond.analysis import Transcoder as Transcoder
    from millpond.analysis import lazy as lazy
    from millpond.analysis import select_tokens as select_tokens
    from millpond.analysis import train_together as train_together
    from millpond.capture.params import capture_params as capture_params
    from millpond.hub.client import as_completed as as_completed
    from millpond.hub.client import connect as connect
    from millpond.store.errors import MillpondError as MillpondError
    from millpond.store.lake import Lake as Lake
    from millpond.store.lake import open_lake as open  # noqa: A004
    from millpond.store.result import Result as Result
    from millpond.store.run import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "BatchTopKSae": ("millpond.analysis", "BatchTopKSae"),
    "Crosscoder": ("millpond.analysis", "Crosscoder"),
    "GatedSae": ("millpond.analysis", "GatedSae"),
    "JumpReluSae": ("millpond.analysis", "JumpReluSae"),
    "Lake": ("millpond.store.lake", "Lake"),
    "LdaProbe": ("millpond.analysis", "LdaProbe"),
    "LogisticProbe": ("millpond.analysis", "LogisticProbe"),
    "MassMeanProbe": ("millpond.analysis", "MassMeanProbe"),
    "MatryoshkaSae": ("millpond.analysis", "MatryoshkaSae"),
    "MillpondError": ("millpond.store.errors", "MillpondError"),
    "PcaReducer": ("millpond.analysis", "PcaReducer"),
    "ReluSae": ("millpond.analysis", "ReluSae"),
    "Result": ("millpond.store.result", "Result"),
    "RidgeProbe": ("millpond.analysis", "RidgeProbe"),
    "Run": ("millpond.store.run", "Run"),
    "Sae": ("millpond.analysis", "Sae"),
    "SkipTranscoder": ("millpond.analysis", "SkipTranscoder"),
    "TopKSae": ("millpond.analysis", "TopKSae"),
    "Transcoder": ("millpond.analysis", "Transcoder"),
    "as_completed": ("millpond.hub.client", "as_completed"),
    "capture_params": ("millpond.capture.params", "capture_params"),
    "connect": ("millpond.hub.client", "connect"),
    "lazy": ("millpond.analysis.lazy", "lazy"),
    "open": ("millpond.store.lake", "open_lake"),
    "select_tokens": ("millpond.analysis", "select_tokens"),
    "train_together": ("millpond.analysis", "train_together"),
}

__all__ = [
    "BatchTopKSae",
    "Crosscoder",
    "GatedSae",
    "JumpReluSae",
    "Lake",
    "LdaProbe",
    "LogisticProbe",
    "MassMeanProbe",
    "MatryoshkaSae",
    "MillpondError",
    "PcaReducer",
    "ReluSae",
    "Result",
    "RidgeProbe",
    "Run",
    "Sae",
    "SkipTranscoder",
    "TopKSae",
    "Transcoder",
    "as_completed",
    "capture_params",
    "connect",
    "lazy",
    "open",
    "select_tokens",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'millpond' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
