"""The estimators that a job may name, and the parameters of each with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from millpond.hub.kinds.base import Finite, Wire

Strength = Annotated[float, Field(gt=0, le=1e12)]
Strengths = Strength | Annotated[tuple[Strength, ...], Field(min_length=1, max_length=32)]
Share = Annotated[float, Field(ge=0, le=1)]
Weights = Literal["balanced"] | None
Folds = Annotated[int, Field(ge=2, le=20)]
Value = bool | int | Finite | str | tuple[Finite, ...] | None


class _Logistic(Wire):
    C: Strengths = 1.0
    fit_intercept: bool = True
    standardize: bool = False
    class_weight: Weights = None
    cv: Folds = 5
    tol: float = Field(default=1e-4, gt=0, le=1)
    max_iter: int = Field(default=100, ge=1, le=10_000)


class _Ridge(Wire):
    alpha: Strengths = 1.0
    task: Literal["regression", "classification"] = "regression"
    fit_intercept: bool = True
    class_weight: Weights = None
    cv: Folds = 5


class _MassMean(Wire):
    whiten: bool = False


class _Lda(Wire):
    shrinkage: Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=32)] = 0.0
    class_weight: Weights = None
    cv: Folds = 5


class _Sae(Wire):
    d_sae: int = Field(ge=1, le=1 << 20)
    k: int | None = Field(default=None, ge=1, le=65_536)
    sparsity: float | None = Field(default=None, gt=0, le=1e6)
    sparsity_warmup: Share = 0.05
    bandwidth: float = Field(default=1e-3, gt=0, le=10)
    prefixes: Annotated[tuple[int, ...], Field(min_length=1, max_length=32)] | None = None
    lr: float | None = Field(default=None, gt=0, le=10)
    batch_size: int = Field(default=2048, ge=1, le=1 << 20)
    warmup: Share = 0.05
    decay: Share = 0.1
    clip: float = Field(default=1.0, gt=0, le=1e6)
    aux_k: int | None = Field(default=None, ge=1, le=65_536)
    aux_weight: float | None = Field(default=None, ge=0, le=1e3)
    dead_tokens: int | None = Field(default=None, ge=1)
    center: Literal["mean", "geometric_median"] = "mean"
    seed: int = Field(default=0, ge=0, lt=1 << 32)


PROBES: dict[str, type[Wire]] = {
    "LogisticProbe": _Logistic, "RidgeProbe": _Ridge, "MassMeanProbe": _MassMean, "LdaProbe": _Lda,
}  # fmt: skip
SAES: dict[str, type[Wire]] = dict.fromkeys(
    ("BatchTopKSae", "TopKSae", "MatryoshkaSae", "ReluSae", "GatedSae", "JumpReluSae"), _Sae
)


class _Estimator(Wire):
    name: str
    params: dict[str, Value] = Field(default_factory=dict)
    """Arguments of its constructor, as in `millpond.analysis`."""

    @property
    def checked(self) -> dict[str, Any]:
        """The parameters that were given, in their types."""
        return (PROBES | SAES)[self.name].model_validate(self.params).model_dump(exclude_unset=True)

    @model_validator(mode="after")
    def _known(self) -> _Estimator:
        (PROBES | SAES)[self.name].model_validate(self.params)
        return self


class ProbeEstimator(_Estimator):
    """A probe."""

    name: Literal["LogisticProbe", "RidgeProbe", "MassMeanProbe", "LdaProbe"]

    @property
    def strengths(self) -> int:
        """How many strengths a sweep compares."""
        given = [self.checked.get(name) for name in ("C", "alpha", "shrinkage")]
        return max(len(value) if isinstance(value, tuple) else 1 for value in given)


class SaeEstimator(_Estimator):
    """A sparse autoencoder."""

    name: Literal["BatchTopKSae", "TopKSae", "MatryoshkaSae", "ReluSae", "GatedSae", "JumpReluSae"]
