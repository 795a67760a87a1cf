"""Transcoders: latents of one hook that reconstruct another, such as an MLP's output from its input.

Dunefsky, Chlenski and Nanda (2024, "Transcoders find interpretable LLM feature circuits", arXiv 2406.11944);
with a linear skip connection: Paulo, Shabalin and Belrose (2025, "Transcoders beat sparse autoencoders for
interpretability", arXiv 2501.18823). Any of the architectures decides which latents are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from millpond.analysis.sae.estimator import Sae, origin
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray
    from millpond.analysis.sae.fit import Learner, Trained
    from millpond.store.result import Result


class Transcoder(Sae):
    """Reconstructs the rows of one hook from the same rows of another; `fit(X, Y)`, `evaluate(X, Y)`."""

    kind: ClassVar[str] = "transcoder"

    def fit(  # type: ignore[override]
        self,
        X: RowArray,
        Y: RowArray,
        tokens: int | None = None,
        out: str | Path | None = None,
        *,
        epochs: int = 1,
        resume: bool = False,
        statistics: Sequence[Any] = (None, None),
        client: Any = None,
    ) -> Self:
        """Train on `tokens` rows of `X` (rows, d_in) and `Y` (rows, d_out), aligned by row; see `Sae.fit`."""
        self._fit([X, Y], tokens, out, epochs, resume, statistics, client)
        return self

    def evaluate(self, X: RowArray, Y: RowArray) -> Result:  # type: ignore[override]
        """The values of `Sae.evaluate`, for the reconstruction of `Y` from `X`."""
        self._check_rows(X)
        return self._evaluate([X], [Y])

    def _learner(self, name: str, n_arrays: int) -> Learner:
        if n_arrays != 2:
            raise InvalidInput(f"a transcoder has 2 hooks, one in and one out; {n_arrays} are given")
        return replace(super()._learner(name, 1), outputs=(1,), skip=self.skip)

    def _take(self, trained: Trained, arrays: Sequence[Any]) -> None:
        super()._take(trained, arrays[:1])
        if hook := origin(arrays[1]).get("hook"):
            self.trained_on_["hook_out"] = hook


class SkipTranscoder(Transcoder):
    """A transcoder whose output also has a learned linear map of the input."""

    skip: ClassVar[bool] = True
