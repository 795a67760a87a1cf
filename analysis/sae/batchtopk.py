"""BatchTopK sparse autoencoder: train on a stream of activations, use it as a JumpReLU autoencoder."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, run_pass
from millpond.analysis.sae import blocks
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.format import read_sae, write_sae
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis.passes import RowArray

Floats = NDArray[np.float32]


class BatchTopKSae:
    """Sparse autoencoder with `d_sae` latents, of which k are active in a row on average.

    Trained with BatchTopK; afterwards a latent is active where its pre-activation exceeds
    `threshold_`, calibrated so that k are active on average. Weights are kept in the activations' own
    units and in SAELens' shapes: `W_enc_` (d_in, d_sae), `W_dec_` (d_sae, d_in) with rows of norm 1.

    Args:
        d_sae: number of latents.
        k: active latents a row, on average.
        progress: show bars.
        options: the further fields of `SaeConfig`, such as `lr`, `batch_size` or `seed`.
    """

    W_enc_: Floats
    b_enc_: Floats
    W_dec_: Floats
    b_dec_: Floats
    threshold_: float

    def __init__(self, d_sae: int, k: int, *, progress: bool = True, **options: Any) -> None:
        self.config = SaeConfig(d_sae=d_sae, k=k, **options)
        self.progress = progress
        self.trained_on_: dict[str, Any] = {}

    def fit(
        self, X: RowArray | Iterable[Any], tokens: int | None = None, out: str | Path | None = None
    ) -> BatchTopKSae:
        """Train on `tokens` rows of `X`.

        Args:
            X: an array (rows, d_in) such as `run[hook]`, whose rows are shuffled through a bounded
                buffer and repeated as often as needed; or an iterable of batches (rows, d_in) that
                are already shuffled, such as `run.stream(hook)`.
            tokens: rows to train on; by default one pass over an array.
            out: folder for `config.json` and `metrics.jsonl`. A cut-off training cannot be resumed yet.

        Raises:
            InvalidInput: `X` is empty or not finite, ends before `tokens` rows, or needs `tokens`.
        """
        from millpond.analysis.sae.fit import train

        trained = train(X, self.config, tokens, None if out is None else Path(out), self.progress)
        self.W_enc_, self.b_enc_ = trained.w_enc, trained.b_enc
        self.W_dec_, self.b_dec_ = trained.w_dec, trained.b_dec
        self.threshold_ = trained.threshold
        attributes = getattr(X, "attrs", {})
        self.trained_on_ = {key: attributes[key] for key in ("run", "hook", "model") if key in attributes}
        self.trained_on_["tokens"] = trained.tokens
        return self

    def encode(self, x: NDArray[Any]) -> Floats:
        """Activations (rows, d_sae) of the latents: pre-activations above the threshold, else 0."""
        return blocks.encode(self._weights(), self._check_rows(x))

    def decode(self, latents: NDArray[Any]) -> Floats:
        """Reconstructions (rows, d_in) from activations of the latents."""
        self._check_fitted()
        return np.asarray(latents @ self.W_dec_ + self.b_dec_)

    def evaluate(self, X: RowArray) -> Result:
        """L0, FVU, explained variance, mean squared error, cosine similarity and dead latents over the rows of `X`.

        FVU is the squared error over the variance about the mean, both summed over all rows and
        dimensions; explained variance is 1 - FVU. Dead latents are those that no row of `X` activates.
        """
        rows = AlignedRows(self._check_rows(X))
        sums = run_pass(Pass(rows, blocks.evaluate, self._weights()), description="SAE", progress=self.progress)
        n, d_in = sums["rows"], self.W_dec_.shape[1]
        if sums["bad"]:
            raise InvalidInput(f"{sums['bad']:,} of {n:,} rows hold NaN or infinity; leave those rows out")
        variance = sums["square"] - float(sums["total"] @ sums["total"]) / n
        values = {
            "l0": sums["fired"].sum() / n,
            "fvu": sums["residual"] / variance,
            "explained_variance": 1 - sums["residual"] / variance,
            "mse": sums["residual"] / (n * d_in),
            "cosine": sums["cosine"] / n,
            "dead_latents": float((sums["fired"] == 0).mean()),
        }
        attributes = getattr(X, "attrs", {})
        provenance = {
            "estimator": "BatchTopKSae", "parameters": asdict(self.config), "trained_on": self.trained_on_,
            "evaluated_on": {key: attributes[key] for key in ("run", "hook", "model") if key in attributes},
        }  # fmt: skip
        return Result("sae-evaluation", {k: float(v) for k, v in values.items()}, {}, {"rows": int(n)}, provenance)

    def calibrate(self, X: RowArray, l0: float | None = None) -> BatchTopKSae:
        """A copy whose threshold makes `l0` latents (by default k) active a row of `X` on average, within 0.5 %.

        A threshold set on the training rows gives another L0 on rows of other documents; this makes
        reconstructions comparable at equal L0. A pass over `X` a step of the search, about five.

        Raises:
            InvalidInput: `l0` is not between 0 and what the rows can have.
        """
        wanted = float(self.config.k if l0 is None else l0)
        moved = copy(self)
        low, high = 0.0, float("inf")
        for _ in range(30):
            active = float(moved.firing_frequency(X).sum())
            if abs(active - wanted) <= 0.005 * wanted:
                return moved
            if active < wanted:
                high = moved.threshold_
                if high <= 0:
                    break
            else:
                low = moved.threshold_
            # L0 falls about exponentially with the threshold, by e in about 0.4 of it; the bracket guards the guess
            guess = moved.threshold_ * (1 + 0.4 * np.log(active / wanted)) if active > 0 else 0.0
            inside = low < guess < high
            moved.threshold_ = guess if inside else (low + high) / 2 if high < float("inf") else 2 * low + 1e-3
        raise InvalidInput(f"l0={wanted:g} cannot be reached on these rows; give a number above 0 and below d_sae")

    def firing_frequency(self, X: RowArray) -> NDArray[np.float64]:
        """Fraction of the rows of `X` in which each latent is active, (d_sae,)."""
        rows = AlignedRows(self._check_rows(X))
        fired, n = run_pass(Pass(rows, blocks.count, self._weights()), description="SAE", progress=self.progress)
        return np.asarray(fired / n)

    def top_rows(self, X: RowArray, latents: Iterable[int], n: int = 10) -> pd.DataFrame:
        """The `n` rows of `X` that activate each of `latents` most, strongest first.

        One pass that holds `n` rows a latent. Columns: latent, rank, row, value, and the row
        coordinates of `X` (prompt, position, token_id) if it has them. Rows that do not activate a
        latent are left out, so a rare one may have fewer than `n`; ties go to the earlier row.
        """
        import pandas as pd

        chosen = np.unique(np.fromiter(latents, np.int64))
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= self.config.d_sae:
            raise InvalidInput(f"latents are {chosen[:5]}...; give numbers from 0 to {self.config.d_sae - 1}")
        rows = AlignedRows(self._check_rows(X), range(len(X)))  # type: ignore[arg-type]
        state = (self._weights().only(chosen), n)
        one = Pass(rows, blocks.strongest, state, blocks.Merge(n))
        values, numbers = run_pass(one, description="SAE", progress=self.progress)
        order = [(i, j) for i in range(len(chosen)) for j in range(len(values[i])) if values[i, j] > 0]
        at = tuple(np.array(order, np.int64).reshape(-1, 2).T)
        table = pd.DataFrame({"latent": chosen[at[0]], "rank": at[1], "row": numbers[at], "value": values[at]})
        for name, coordinate in getattr(X, "coords", {}).items():
            if coordinate.dims == ("row",):
                table[name] = np.asarray(coordinate.compute())[table["row"]]
        return table

    def save(self, folder: str | Path, **metadata: Any) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` in SAELens' layout, as a JumpReLU autoencoder.

        `metadata` is added to that of SAELens: model_name, hook_name, prepend_bos, context_size and
        dataset_path are asked for by some of its tools.
        """
        self._check_fitted()
        known = {"model_name": self.trained_on_.get("model", ""), "hook_name": self.trained_on_.get("hook", "")}
        return write_sae(Path(folder), self._weights(), self.config, known | metadata, self.trained_on_)

    @classmethod
    def load(cls, folder: str | Path) -> BatchTopKSae:
        """Read what `save` wrote."""
        weights, config, trained_on = read_sae(Path(folder))
        sae = cls(config.d_sae, config.k)
        sae.config, sae.trained_on_ = config, trained_on
        sae.W_enc_, sae.b_enc_, sae.W_dec_, sae.b_dec_ = weights.w_enc, weights.b_enc, weights.w_dec, weights.b_dec
        sae.threshold_ = weights.threshold
        return sae

    def __repr__(self) -> str:
        fitted = ", ".join(f"{key}={value}" for key, value in self.trained_on_.items()) or "not fitted"
        return f"<BatchTopKSae d_sae={self.config.d_sae} k={self.config.k}: {fitted}>"

    def _weights(self) -> blocks.SaeWeights:
        self._check_fitted()
        return blocks.SaeWeights(self.W_enc_, self.b_enc_, self.W_dec_, self.b_dec_, self.threshold_)

    def _check_fitted(self) -> None:
        if not hasattr(self, "W_enc_"):
            raise InvalidInput("this BatchTopKSae is not fitted; call fit, or BatchTopKSae.load")

    def _check_rows(self, x: Any) -> Any:
        self._check_fitted()
        shape = np.shape(x)
        if len(shape) != 2 or shape[1] != len(self.W_enc_):
            raise InvalidInput(f"rows have shape {shape}; give (rows, {len(self.W_enc_)}), the width it was trained on")
        return x
