"""Probes, sparse autoencoders and other analyses of captured activations, run next to the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.analysis.lazy import lazy
    from millpond.analysis.pca import PcaReducer
    from millpond.analysis.probes.logistic import LogisticProbe
    from millpond.analysis.probes.means import LdaProbe, MassMeanProbe
    from millpond.analysis.probes.ridge import RidgeProbe
    from millpond.analysis.sae.batchtopk import BatchTopKSae
    from millpond.analysis.selection import select_tokens
    from millpond.analysis.sweep import Sweep

__all__ = [
    "BatchTopKSae",
    "LdaProbe",
    "LogisticProbe",
    "MassMeanProbe",
    "PcaReducer",
    "RidgeProbe",
    "Sweep",
    "lazy",
    "select_tokens",
]

_HOMES = {
    "BatchTopKSae": "millpond.analysis.sae.batchtopk",
    "LdaProbe": "millpond.analysis.probes.means",
    "LogisticProbe": "millpond.analysis.probes.logistic",
    "MassMeanProbe": "millpond.analysis.probes.means",
    "PcaReducer": "millpond.analysis.pca",
    "RidgeProbe": "millpond.analysis.probes.ridge",
    "Sweep": "millpond.analysis.sweep",
    "select_tokens": "millpond.analysis.selection",
    "lazy": "millpond.analysis.lazy",
}


def __getattr__(name: str) -> Any:
    """Import an estimator when it is first asked for: they need scikit-learn or PyTorch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
