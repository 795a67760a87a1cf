"""Sparse autoencoders: train on activations, then encode, evaluate, keep and look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, run_pass
from millpond.analysis.remote import HandedSae, backend_of, check_unused, stays
from millpond.analysis.sae import blocks, evaluation
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.format import read_sae, write_sae
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis.passes import RowArray
    from millpond.analysis.sae.fit import Learner, Trained

Floats = NDArray[np.float32]


class Sae(HandedSae):
    """A sparse autoencoder with `d_sae` latents; `architecture` decides which of them are active.

    Weights are kept in the activations' own units and in SAELens' shapes: `W_enc_` (d_in, d_sae),
    `W_dec_` (d_sae, d_out) with rows of norm 1. BatchTopK and Matryoshka are used as JumpReLU, with a
    `threshold_` at which k latents are active on average.

    Args:
        d_sae: number of latents.
        k: active latents a row, for the architectures that have it.
        progress: show bars.
        options: the further fields of `SaeConfig`, such as `lr`, `batch_size` or `seed`.
    """

    kind: ClassVar[str] = "sae"
    skip: ClassVar[bool] = False
    _architecture: ClassVar[str | None] = None

    def __init__(self, d_sae: int, k: int | None = None, *, progress: bool = True, **options: Any) -> None:
        if self._architecture is not None and options.setdefault("architecture", self._architecture) != (
            self._architecture
        ):
            raise InvalidInput(
                f"{type(self).__name__} is always {self._architecture}; use Sae for another architecture"
            )
        self.config: SaeConfig | None = SaeConfig(d_sae=d_sae, k=k, **options)
        """None for an autoencoder that another library trained."""
        self.d_sae = d_sae
        self.progress = progress
        self.trained_on_: dict[str, Any] = {}
        self.weights_: blocks.SaeWeights | None = None
        self.frequency_: NDArray[np.float64] | None = None
        """Firing frequency of each latent over the last fifth of the training, (d_sae,)."""

    def fit(
        self,
        X: RowArray | Iterable[Any],
        tokens: int | None = None,
        out: str | Path | None = None,
        *,
        epochs: int = 1,
        resume: bool = False,
        statistics: Any = None,
        client: Any = None,
    ) -> Self:
        """Train on `tokens` rows of `X`.

        Args:
            X: an array (rows, d_in) such as `run[hook]`, whose rows are shuffled through a bounded
                buffer; or an iterable of batches (rows, d_in) that are already shuffled, such as
                `run.stream(hook)`, or `following(run, hook)` while the run is being captured.
            tokens: rows to train on; by default all of an array, `epochs` times.
            out: folder for `config.json`, `metrics.jsonl` and the checkpoint.
            epochs: how often the rows of an array may be used.
            resume: go on from the checkpoint in `out`; without one, start. A killed training that is
                resumed gives the weights that it would have given, to the bit on the same CPU.
            statistics: mean and variance of `X` from elsewhere, such as `run.stats[hook]` for a view of the
                run. By default those of the run itself, if `X` is the hook of a whole run that has them, or
                else those of the first 16,384 rows that it trains on.
            client: a `dask.distributed.Client` whose workers train together, each on rows of its own.

        Raises:
            InvalidInput: `X` is empty or not finite, has fewer rows than `tokens`, or needs `tokens`; `out`
                holds a checkpoint of another training, or `resume` is off.
        """
        if backend_of(X) is not None:
            check_unused(
                "fit",
                {
                    "out": (out, None),
                    "resume": (resume, False),
                    "statistics": (statistics, None),
                    "client": (client, None),
                },
            )
            self.submit_fit(X, tokens=tokens, epochs=epochs).result()
            return self
        self._fit([X], tokens, out, epochs, resume, [statistics], client)
        return self

    def _fit(
        self,
        arrays: Sequence[Any],
        tokens: int | None,
        out: str | Path | None,
        epochs: int,
        resume: bool,
        statistics: Sequence[Any],
        client: Any,
    ) -> None:
        from millpond.analysis.sae.together import run_training

        learner = self._learner("", len(arrays))
        (trained,) = run_training(
            arrays, [learner], tokens, out, epochs, resume, statistics, client, self.progress
        )  # fmt: skip
        self._take(trained, arrays)

    def _learner(self, name: str, n_arrays: int) -> Learner:
        from millpond.analysis.sae.fit import Learner

        return Learner(name, self._trainable(), tuple(range(n_arrays)))

    def _trainable(self) -> SaeConfig:
        if self.config is None:
            raise InvalidInput("this autoencoder was trained by another library; make a new one to train")
        return self.config

    def _take(self, trained: Trained, arrays: Sequence[Any]) -> None:
        self._forget()
        self.weights_, self.frequency_ = trained.weights, trained.frequency
        self.trained_on_ = origin(arrays[0])
        hooks = [origin(array).get("hook") for array in arrays]
        if len(arrays) > 1 and all(hooks):
            self.trained_on_["hooks"] = hooks
        self.trained_on_["tokens"] = trained.tokens

    @property
    def W_enc_(self) -> Floats:  # noqa: N802 - SAELens' name
        """Encoder (d_in, d_sae)."""
        return self._weights().w_enc

    @property
    def b_enc_(self) -> Floats:
        """Encoder bias (d_sae,)."""
        return self._weights().b_enc

    @property
    def W_dec_(self) -> Floats:  # noqa: N802
        """Decoder (d_sae, d_out)."""
        return self._weights().w_dec

    @property
    def b_dec_(self) -> Floats:
        """Decoder bias (d_out,)."""
        return self._weights().b_dec

    @property
    def threshold_(self) -> Floats | None:
        """Pre-activation above which each latent is active, (d_sae,); None for architectures without one."""
        return self._weights().threshold

    def encode(self, x: NDArray[Any]) -> Floats:
        """Activations (rows, d_sae) of the latents."""
        return blocks.encode(self._weights(), self._check_rows(x))

    def decode(self, latents: NDArray[Any]) -> Floats:
        """Reconstructions (rows, d_out) from activations of the latents, without a transcoder's skip connection."""
        weights = self._weights()
        return np.asarray(latents @ weights.w_dec + weights.b_dec)

    def reconstruct(self, x: NDArray[Any]) -> Floats:
        """Reconstructions (rows, d_out) from rows (rows, d_in); a crosscoder's hooks lie side by side."""
        return blocks.reconstruct(self._weights(), self.encode(x), np.asarray(x))

    def evaluate(self, X: RowArray) -> Result:
        """L0, FVU, explained variance, mean squared error, cosine similarity, dead latents and more over the rows of `X`.

        One pass; `evaluation.summary` says what the values are.
        """
        if backend_of(X) is not None:
            return self._ask("evaluate", {"data": X, "labels": None})
        return self._evaluate([X], None)

    def _evaluate(self, inputs: Sequence[Any], outputs: Sequence[Any] | None) -> Result:
        weights = self._weights()
        sums = evaluation.run(weights, inputs, outputs, self.progress)
        values = evaluation.summary(weights, sums)
        provenance = {
            "estimator": type(self).__name__,
            "parameters": asdict(self.config) if self.config else {},
            "trained_on": self.trained_on_,
            "evaluated_on": origin(inputs[0]),
        }
        return Result(f"{self.kind}-evaluation", values, {}, {"rows": int(sums["rows"])}, provenance)

    def calibrate(self, X: RowArray, l0: float | None = None) -> Self:
        """A copy whose threshold makes `l0` latents (by default k) active a row of `X` on average, within 0.5 %.

        A threshold set on the training rows gives another L0 on rows of other documents; this makes
        reconstructions comparable at equal L0. A pass over `X` a step of the search, about five.

        Raises:
            InvalidInput: there is no threshold, or `l0` is not between 0 and what the rows can have.
        """
        weights = self._weights()
        if weights.threshold is None:
            raise InvalidInput(f"{weights.architecture} has no threshold to calibrate")
        if l0 is None and (self.config is None or self.config.k is None):
            raise InvalidInput("l0 is not given, and there is no k to take it from")
        wanted = float(self.config.k if l0 is None else l0)  # type: ignore[union-attr, arg-type]
        moved = copy(self)
        factor, low, high = 1.0, 0.0, float("inf")
        typical = float(np.median(weights.threshold))
        for _ in range(30):
            shifted = weights.threshold * np.float32(factor) if typical > 0 else weights.threshold + factor - 1
            moved.weights_ = replace(weights, threshold=shifted.astype(np.float32))
            active = float(moved.firing_frequency(X).sum())
            if abs(active - wanted) <= 0.005 * wanted:
                return moved
            if active < wanted:
                high = factor
                if high <= 1e-6:
                    break
            else:
                low = factor
            # L0 falls about exponentially with the threshold, by e in about 0.4 of it; the bracket guards the guess
            guess = factor * (1 + 0.4 * np.log(active / wanted)) if active > 0 else 0.0
            factor = guess if low < guess < high else (low + high) / 2 if high < float("inf") else 2 * low + 1e-3
        raise InvalidInput(f"l0={wanted:g} cannot be reached on these rows; give a number above 0 and below d_sae")

    def firing_frequency(self, X: RowArray) -> NDArray[np.float64]:
        """Fraction of the rows of `X` in which each latent is active, (d_sae,)."""
        rows = AlignedRows(self._check_rows(X))
        fired, n = run_pass(Pass(rows, evaluation.count, self._weights()), description="SAE", progress=self.progress)
        return np.asarray(fired / n)

    def top_rows(self, X: RowArray, latents: Iterable[int] | None = None, n: int = 10) -> pd.DataFrame:
        """The `n` rows of `X` that activate each of `latents` (by default all) most, strongest first.

        One pass that holds `n` rows a latent. Columns: latent, rank, row, value, and the row
        coordinates of `X` (prompt, position, token_id) if it has them. Rows that do not activate a
        latent are left out, so a rare one may have fewer than `n`; ties go to the earlier row.

        Raises:
            InvalidInput: a latent is out of range.
        """
        if backend_of(X) is not None:
            return self._top_rows_there(X, latents, n)
        from millpond.analysis.sae.latents import top_rows

        return top_rows(self._weights(), self._check_rows(X), latents, n, progress=self.progress)

    def save(self, folder: str | Path, **metadata: Any) -> Path:
        """Write `cfg.json`, `sae_weights.safetensors` and `sparsity.safetensors` in SAELens' layout.

        `metadata` is added to that of SAELens: model_name, hook_name, prepend_bos, context_size and
        dataset_path are asked for by some of its tools.
        """
        known = {"model_name": self.trained_on_.get("model", ""), "hook_name": self.trained_on_.get("hook", "")}
        ours = {
            "kind": self.kind,
            "config": None if self.config is None else asdict(self.config),
            "trained_on": self.trained_on_,
            **self._own_facts(),
        }
        return write_sae(Path(folder), self._weights(), known | metadata, ours, self.frequency_)

    def _own_facts(self) -> dict[str, Any]:
        """What `save` keeps of a subclass beside its weights."""
        return {}

    @classmethod
    def load(cls, folder: str | Path) -> Sae:
        """Read what `save` or SAELens wrote; a transcoder or crosscoder is given as that.

        Raises:
            InvalidInput: there is none, it cannot be read, or it is not what this class is.
        """
        weights, cfg, frequency = read_sae(Path(folder))
        ours = cfg.get("metadata", {}).get("millpond") or {}
        kind = _class(weights, ours)
        if not issubclass(kind, cls):
            raise InvalidInput(
                f"{folder} holds {ours or cfg['architecture']!r}, which is no {cls.__name__}; use Sae.load"
            )
        sae = kind.__new__(kind)
        config = ours.get("config")
        sae.config = SaeConfig(**config) if config else None
        sae.d_sae, sae.progress = weights.d_sae, True
        sae.weights_, sae.frequency_ = weights, frequency
        named = {"hook": cfg.get("metadata", {}).get("hook_name"), "model": cfg.get("metadata", {}).get("model_name")}
        sae.trained_on_ = ours.get("trained_on") or {key: value for key, value in named.items() if value}
        sae._load_facts(ours)
        return sae

    def _load_facts(self, ours: dict[str, Any]) -> None:
        """Take what `_own_facts` gave."""

    def __repr__(self) -> str:
        there = "in the vault" if "remote_" in vars(self) else "not fitted"
        fitted = ", ".join(f"{key}={value}" for key, value in self.trained_on_.items()) or there
        k = f" k={self.config.k}" if self.config and self.config.k else ""
        return f"<{type(self).__name__} d_sae={self.d_sae}{k}: {fitted}>"

    def _weights(self) -> blocks.SaeWeights:
        if "remote_" in vars(self):
            raise stays(
                f"the weights of this {type(self).__name__} are", "evaluate, top_rows and interventions use them there"
            )
        if self.weights_ is None:
            raise InvalidInput(f"this {type(self).__name__} is not fitted; call fit, or load")
        return self.weights_

    def _check_rows(self, x: Any) -> Any:
        width = len(self._weights().w_enc)
        shape = np.shape(x)
        if len(shape) != 2 or shape[1] != width:
            raise InvalidInput(f"rows have shape {shape}; give (rows, {width}), the width it was trained on")
        return x


class BatchTopKSae(Sae):
    """An autoencoder with k active latents a row on average (`sae.batchtopk`)."""

    _architecture = "batchtopk"

    def __init__(self, d_sae: int, k: int, *, progress: bool = True, **options: Any) -> None:
        super().__init__(d_sae, k, progress=progress, **options)


class TopKSae(Sae):
    """An autoencoder with k active latents in each row (`sae.topk`)."""

    _architecture = "topk"


class MatryoshkaSae(Sae):
    """BatchTopK whose first latents reconstruct without the later ones (`sae.matryoshka`)."""

    _architecture = "matryoshka"


class ReluSae(Sae):
    """ReLU with an L1 penalty times decoder norms (`sae.relu`)."""

    _architecture = "relu"


class GatedSae(Sae):
    """Gated: which latents are active, and how strongly, are decided apart (`sae.gated`)."""

    _architecture = "gated"


class JumpReluSae(Sae):
    """A learned threshold for each latent and an L0 penalty (`sae.jumprelu`)."""

    _architecture = "jumprelu"


def _class(weights: blocks.SaeWeights, ours: Mapping[str, Any]) -> type[Sae]:
    if ours.get("kind") == "crosscoder":
        from millpond.analysis.sae.crosscoder import Crosscoder

        return Crosscoder
    if not weights.tied:
        from millpond.analysis.sae.transcoder import SkipTranscoder, Transcoder

        return Transcoder if weights.w_skip is None else SkipTranscoder
    name = (ours.get("config") or {}).get("architecture")
    kinds = (BatchTopKSae, TopKSae, MatryoshkaSae, ReluSae, GatedSae, JumpReluSae)
    return next((kind for kind in kinds if kind._architecture == name), Sae)


def origin(array: Any) -> dict[str, Any]:
    """Run, hook and model that an array of a run says it is of."""
    attributes = getattr(array, "attrs", {})
    return {key: attributes[key] for key in ("run", "hook", "model") if key in attributes}
