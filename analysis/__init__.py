"""Probes, sparse autoencoders and other analyses of captured activations, run next to the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.analysis.lazy import lazy
    from millpond.analysis.pca import PcaReducer
    from millpond.analysis.probes.logistic import LogisticProbe
    from millpond.analysis.probes.means import LdaProbe, MassMeanProbe
    from millpond.analysis.probes.ridge import RidgeProbe
    from millpond.analysis.sae.crosscoder import Crosscoder
    from millpond.analysis.sae.estimator import (
        BatchTopKSae,
        GatedSae,
        JumpReluSae,
        MatryoshkaSae,
        ReluSae,
        Sae,
        TopKSae,
    )
    from millpond.analysis.sae.follow import following
    from millpond.analysis.sae.together import train_together
    from millpond.analysis.sae.transcoder import SkipTranscoder, Transcoder
    from millpond.analysis.selection import select_tokens
    from millpond.analysis.sweep import Sweep

__all__ = [
    "BatchTopKSae",
    "Crosscoder",
    "GatedSae",
    "JumpReluSae",
    "LdaProbe",
    "LogisticProbe",
    "MassMeanProbe",
    "MatryoshkaSae",
    "PcaReducer",
    "ReluSae",
    "RidgeProbe",
    "Sae",
    "SkipTranscoder",
    "Sweep",
    "TopKSae",
    "Transcoder",
    "following",
    "lazy",
    "select_tokens",
    "train_together",
]

_HOMES = {
    "BatchTopKSae": "millpond.analysis.sae.estimator",
    "Crosscoder": "millpond.analysis.sae.crosscoder",
    "GatedSae": "millpond.analysis.sae.estimator",
    "JumpReluSae": "millpond.analysis.sae.estimator",
    "LdaProbe": "millpond.analysis.probes.means",
    "LogisticProbe": "millpond.analysis.probes.logistic",
    "MassMeanProbe": "millpond.analysis.probes.means",
    "MatryoshkaSae": "millpond.analysis.sae.estimator",
    "PcaReducer": "millpond.analysis.pca",
    "ReluSae": "millpond.analysis.sae.estimator",
    "RidgeProbe": "millpond.analysis.probes.ridge",
    "Sae": "millpond.analysis.sae.estimator",
    "SkipTranscoder": "millpond.analysis.sae.transcoder",
    "Sweep": "millpond.analysis.sweep",
    "TopKSae": "millpond.analysis.sae.estimator",
    "Transcoder": "millpond.analysis.sae.transcoder",
    "following": "millpond.analysis.sae.follow",
    "select_tokens": "millpond.analysis.selection",
    "lazy": "millpond.analysis.lazy",
    "train_together": "millpond.analysis.sae.together",
}


def __getattr__(name: str) -> Any:
    """Import an estimator when it is first asked for: they need scikit-learn or PyTorch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
