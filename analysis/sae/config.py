"""What a sparse autoencoder is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from millpond.store.errors import InvalidInput

ArchitectureName = Literal["batchtopk", "topk", "matryoshka", "relu", "gated", "jumprelu"]
ARCHITECTURES: tuple[str, ...] = get_args(ArchitectureName)
WITH_K = ("batchtopk", "topk", "matryoshka")
"""Architectures whose L0 is set by k; the others have a sparsity penalty."""
DEFAULT_SPARSITY = {"relu": 0.1, "gated": 0.1, "jumprelu": 1e-3}

_POSITIVE = (
    "d_sae", "k", "lr", "batch_size", "buffer_bytes", "log_every", "n_threads", "aux_k", "dead_tokens", "clip",
    "bandwidth", "sparsity", "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True)
class SaeConfig:
    """Hyper-parameters of one training run; saved beside its results.

    Losses are in units in which the inputs, less their mean, have mean squared norm 1.

    Raises:
        InvalidInput: a value is out of its range, or belongs to another architecture.
    """

    d_sae: int
    """Number of latents."""
    k: int | None = None
    """Active latents a row: of each row (topk), or on average over a batch (batchtopk, matryoshka)."""
    architecture: ArchitectureName = "batchtopk"
    """What decides which latents are active, and how sparsity is asked for."""
    sparsity: float | None = None
    """Weight of the penalty: of the L1 norm (relu: times decoder norms; gated: of the gate), or of L0 (jumprelu)."""
    sparsity_warmup: float = 0.05
    """Fraction of the steps over which `sparsity` rises linearly."""
    bandwidth: float = 1e-3
    """Width of JumpReLU's kernel, and its first threshold."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka: numbers of first latents that reconstruct alone; by default d_sae / 16, / 8, / 4, / 2 and d_sae."""
    lr: float | None = None
    """Peak learning rate of Adam; when not given, `default_lr` of the number of steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of its moments."""
    batch_size: int = 2048
    """Rows a step (of each worker, where several train together)."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly."""
    decay: float = 0.1
    """Fraction of the steps, at the end, over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Norm to which gradients are clipped, where the loss counts squared errors summed over dimensions, as other
    libraries do: nearly always, so that steps stay as long when the error falls."""
    aux_k: int | None = None
    """Dead latents a row that the auxiliary loss uses; half the input width when not given."""
    aux_weight: float | None = None
    """Weight of the auxiliary loss, the error of reconstructing the residual from dead latents; 0 turns it off.
    By default 1/32 for the architectures with k, else 0."""
    dead_tokens: int | None = None
    """A latent is dead after this many rows without firing; by default a 20th of the training, at most 10 million."""
    center: Literal["mean", "geometric_median"] = "mean"
    """First value of the decoder's bias: of the first rows, or of the run's statistics where these are given (mean)."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the wide matrix products. With k only latents are selected in it, survivors are computed in float32;
    without k the whole forward and backward pass. `auto`: bfloat16 if the machine has it and there is a k."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto`: on CUDA if there is a device."""
    buffer_bytes: int = 512 << 20
    """Rows of a lazy array are shuffled in a buffer of this size; an array that fits is read once."""
    n_threads: int | None = None
    """PyTorch threads while training; half the CPUs when not given. On a busy machine give 1: waiting threads spin."""
    seed: int = 0
    """Of the initial decoder and the order of the rows."""
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_every: int = 500
    """Steps between checkpoints, when there is a folder for them."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, which must be installed."""

    def __post_init__(self) -> None:
        for name in ("prefixes", "betas"):  # lists, where they come from a file
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; give a number above 0")
        for name, allowed in (
            ("architecture", ARCHITECTURES),
            ("center", ("mean", "geometric_median")),
            ("encoder_dtype", ("auto", "float32", "bfloat16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; give one of {', '.join(allowed)}")
        self._check_architecture()
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise InvalidInput(
                f"warmup {self.warmup} and decay {self.decay} are fractions of the steps; let them sum to at most 1"
            )
        if not 0 <= self.sparsity_warmup <= 1:
            raise InvalidInput(f"sparsity_warmup is {self.sparsity_warmup}; give a fraction of the steps")
        if self.aux_weight is not None and self.aux_weight < 0:
            raise InvalidInput(f"aux_weight is {self.aux_weight}; give 0 or more")

    def _check_architecture(self) -> None:
        name, with_k = self.architecture, self.architecture in WITH_K
        if with_k and self.k is None:
            raise InvalidInput(f"k is not given; {name} needs the number of active latents a row")
        if with_k and self.sparsity is not None:
            raise InvalidInput(f"sparsity is {self.sparsity}; {name} has none, its L0 is set by k")
        if not with_k and self.k is not None:
            raise InvalidInput(f"k is {self.k}; {name} has none, its L0 follows from sparsity")
        if self.k is not None and self.k > self.d_sae:
            raise InvalidInput(f"k is {self.k}, more than the {self.d_sae} latents; lower k or raise d_sae")
        if name == "gated" and self.aux_weight:
            raise InvalidInput(f"aux_weight is {self.aux_weight}; gated has no auxiliary loss for dead latents, give 0")
        if self.prefixes is not None and name != "matryoshka":
            raise InvalidInput(f"prefixes are {self.prefixes}; only matryoshka has them")
        widths = self.prefixes
        if widths is not None and (
            list(widths) != sorted(set(widths)) or not widths or widths[0] < 1 or widths[-1] != self.d_sae
        ):
            raise InvalidInput(
                f"prefixes are {widths}; give rising numbers of latents of which the last is {self.d_sae}"
            )

    @property
    def matryoshka_prefixes(self) -> tuple[int, ...]:
        """The widths whose reconstructions are in the loss; d_sae alone but for matryoshka."""
        if self.architecture != "matryoshka":
            return (self.d_sae,)
        return self.prefixes or tuple(sorted({max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)}))


def default_lr(d_sae: int, steps: int) -> float:
    """Peak learning rate: that of Gao et al. (2024, arXiv 2406.04093, appendix A.3), raised for short runs.

    2e-4 / sqrt(d_sae / 2**14) from 50,000 steps on, more by the square root of the steps that are
    missing, at most 1e-2. On planted features, 400 to 1,600 steps do best within a factor of two of it.
    """
    return min(1e-2, 2e-4 * math.sqrt(2**14 / d_sae) * math.sqrt(max(1.0, 50_000 / steps)))
