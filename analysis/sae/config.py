"""What a BatchTopK sparse autoencoder is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from millpond.store.errors import InvalidInput


@dataclass(frozen=True)
class SaeConfig:
    """Hyper-parameters of one training run; saved beside its results.

    Raises:
        InvalidInput: a value is out of its range.
    """

    d_sae: int
    """Number of latents."""
    k: int
    """Active latents a row, on average over a batch."""
    lr: float | None = None
    """Peak learning rate of Adam; when not given, `default_lr` of the number of steps."""
    batch_size: int = 2048
    """Rows a step."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly."""
    decay: float = 0.1
    """Fraction of the steps, at the end, over which the learning rate falls linearly to 0."""
    aux_k: int | None = None
    """Dead latents a row that the auxiliary loss uses; half the input width when not given."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss, the error of reconstructing the residual from dead latents; 0 turns it off."""
    dead_tokens: int | None = None
    """A latent is dead after this many rows without firing; by default a 20th of the training, at most 10 million."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which latents are selected; survivors are computed in float32. `auto`: bfloat16 if the CPU has it."""
    buffer_bytes: int = 512 << 20
    """Rows of a lazy array are shuffled in a buffer of this size; one that fits is read once."""
    n_threads: int | None = None
    """PyTorch threads while training; half the CPUs when not given. On a busy machine give 1: waiting threads spin."""
    seed: int = 0
    """Of the initial decoder and the order of the rows."""
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""

    def __post_init__(self) -> None:
        for name in (
            "d_sae",
            "k",
            "lr",
            "batch_size",
            "buffer_bytes",
            "log_every",
            "n_threads",
            "aux_k",
            "dead_tokens",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.k > self.d_sae:
            raise InvalidInput(f"k is {self.k}, more than the {self.d_sae} latents; lower k or raise d_sae")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise InvalidInput(
                f"warmup {self.warmup} and decay {self.decay} are fractions of the steps; let them sum to at most 1"
            )
        if self.encoder_dtype not in ("auto", "float32", "bfloat16"):
            raise InvalidInput(f"encoder_dtype is {self.encoder_dtype!r}; give 'auto', 'float32' or 'bfloat16'")


def default_lr(d_sae: int, steps: int) -> float:
    """Peak learning rate: that of Gao et al. (2024, arXiv 2406.04093, appendix A.3), raised for short runs.

    2e-4 / sqrt(d_sae / 2**14) from 50,000 steps on, more by the square root of the steps that are
    missing, at most 1e-2. On planted features, 400 to 1,600 steps do best within a factor of two of it.
    """
    return min(1e-2, 2e-4 * math.sqrt(2**14 / d_sae) * math.sqrt(max(1.0, 50_000 / steps)))
