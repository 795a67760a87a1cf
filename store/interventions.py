"""What may be done to activations while the model runs: the vocabulary that jobs, requests and workers share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from millpond.store.positions import PositionFilter

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Interventions are computed in float32."""
Vector = Annotated[str, Field(min_length=1)] | Annotated[tuple[float, ...], Field(min_length=1)]
"""The name of a vector kept in the lake, or its d_model numbers."""


class _Intervention(PositionFilter):
    """Changes the activation x of one hook at the chosen positions, in float32, and rounds once."""

    hook: str
    """Hook point name or glob."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class _Directed(_Intervention):
    vector: Vector
    """Name of a vector of the lake, or its numbers."""

    @model_validator(mode="after")
    def _finite(self) -> _Directed:
        if isinstance(self.vector, tuple):
            norm = math.hypot(*self.vector)
            if not norm <= FLOAT32_MAX:
                raise ValueError("vector holds a value that is not finite, or its length is none in float32")
            if norm == 0 and not isinstance(self, Add):
                raise ValueError("vector is zero, which is no direction")
        return self


class Add(_Directed):
    """x + scale * vector."""

    op: Literal["add"] = "add"
    scale: float = Field(default=1.0, ge=-FLOAT32_MAX, le=FLOAT32_MAX)
    """Factor of the vector."""


class Ablate(_Directed):
    """x without its component along the vector."""

    op: Literal["ablate"] = "ablate"


class Clamp(_Directed):
    """x moved along the vector until its coordinate on the unit vector lies between `min` and `max`."""

    op: Literal["clamp"] = "clamp"
    min: float | None = Field(default=None, allow_inf_nan=False)
    """Lower end; none by default."""
    max: float | None = Field(default=None, allow_inf_nan=False)
    """Upper end; none by default."""

    @model_validator(mode="after")
    def _interval(self) -> Clamp:
        if self.min is None and self.max is None:
            raise ValueError("min and max are both missing; give at least one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Patch(_Intervention):
    """x replaced by the stored row of another prompt.

    Position p takes the row at position p of the source, or the one that `source_positions` names.
    """

    op: Literal["patch"] = "patch"
    run: str
    """A sealed run of the lake that holds the hook."""
    prompt: str
    """A prompt's id in that run."""
    source_positions: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """One source position for each of `positions`, which must then be a list of the same length."""

    @model_validator(mode="after")
    def _aligned(self) -> Patch:
        if self.source_positions is not None and (
            not isinstance(self.positions, tuple) or len(self.positions) != len(self.source_positions)
        ):
            raise ValueError("source_positions needs positions to be a list of the same length")
        return self


class SpliceSae(_Intervention):
    """x replaced by the reconstruction of a stored SAE, with chosen latents edited."""

    op: Literal["sae"] = "sae"
    artifact: Annotated[str, Field(min_length=1)]
    """Name of an SAE kept in the lake."""
    set_latents: dict[int, float] = Field(default_factory=dict)
    """Latent to the value it gets."""
    scale_latents: dict[int, float] = Field(default_factory=dict)
    """Latent to the factor that its value is multiplied with."""
    keep_error: bool = False
    """Add what the SAE does not reconstruct, so that only the edits change x."""

    @model_validator(mode="after")
    def _finite_edits(self) -> SpliceSae:
        for field in ("set_latents", "scale_latents"):
            for latent, value in getattr(self, field).items():
                if latent < 0 or not math.isfinite(value):
                    raise ValueError(f"{field} has {latent}: {value}; latents count from 0 and values are finite")
        return self


Intervention = Annotated[Add | Ablate | Clamp | Patch | SpliceSae, Field(discriminator="op")]


def interventions_hash(interventions: Sequence[_Intervention]) -> str:
    """Hex digest that differs whenever what the model computes may differ."""
    values = [intervention.model_dump(mode="json") for intervention in interventions]
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
