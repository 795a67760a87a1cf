"""Crosscoders: one set of latents that reads and reconstructs several hooks at once.

Lindsey et al. (2024, "Sparse crosscoders for cross-layer features and model diffing", Transformer Circuits):
hooks of several layers, or the same hook of two models on the same tokens. A latent is in all of them;
how long its decoder row is in each says where it belongs. With BatchTopK as in Minder et al. (2025, arXiv
2504.02922). Each hook is scaled to the same norm a dimension, so none outweighs the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.sae.estimator import Sae, origin
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.sae.fit import Learner, Trained
    from millpond.store.result import Result


class Crosscoder(Sae):
    """Reconstructs the rows of several hooks from all of them; `fit({name: rows, ...})`.

    The rows of the hooks lie side by side in `W_enc_` (sum of widths, d_sae) and `W_dec_`.
    """

    kind: ClassVar[str] = "crosscoder"
    names_: tuple[str, ...] = ()
    """The hooks, as they were called in `fit`."""
    widths_: tuple[int, ...] = ()
    factors_: tuple[float, ...] = ()
    """What each hook was multiplied with in training, so that none outweighs the others."""

    def fit(  # type: ignore[override]
        self,
        X: Mapping[str, Any],
        tokens: int | None = None,
        out: str | Path | None = None,
        *,
        epochs: int = 1,
        resume: bool = False,
        statistics: Mapping[str, Any] | None = None,
        client: Any = None,
    ) -> Self:
        """Train on `tokens` rows of the hooks in `X`, aligned by row; see `Sae.fit`.

        Of two runs, give views of the same prompts; their tokens are compared if the arrays carry them.
        """
        check_tokens_align(X)
        self.names_ = tuple(X)
        self.widths_ = tuple(int(np.shape(array)[1]) for array in X.values())
        known = statistics or {}
        self._fit(list(X.values()), tokens, out, epochs, resume, [known.get(name) for name in X], client)
        return self

    def evaluate(self, X: Mapping[str, Any]) -> Result:  # type: ignore[override]
        """The values of `Sae.evaluate`, over all hooks side by side, and `fvu_<name>` of each."""
        self._weights()
        if tuple(X) != self.names_:
            raise InvalidInput(f"hooks are {', '.join(X)}; give {', '.join(self.names_)}, as in fit")
        check_tokens_align(X)
        return self._evaluate(list(X.values()), list(X.values()))

    def decoder_norms(self) -> NDArray[np.float32]:
        """Norm of each latent's decoder row in each scaled hook, (d_sae, hooks), over the greatest of the latent.

        About (1, 1) for a latent that two models share, about (1, 0) for one of the first alone.
        """
        parts = np.split(self._weights().w_dec, np.cumsum(self.widths_)[:-1], axis=1)
        norms = np.stack([f * np.linalg.norm(part, axis=1) for f, part in zip(self.factors_, parts, strict=True)], 1)
        return np.asarray(norms / np.maximum(norms.max(axis=1, keepdims=True), 1e-30))

    def _learner(self, name: str, n_arrays: int) -> Learner:
        every = tuple(range(n_arrays))
        return replace(super()._learner(name, n_arrays), outputs=every)

    def _take(self, trained: Trained, arrays: Sequence[Any]) -> None:
        super()._take(trained, arrays)
        self.factors_ = trained.factors

    def _own_facts(self) -> dict[str, Any]:
        return {"names": list(self.names_), "widths": list(self.widths_), "factors": list(self.factors_)}

    def _load_facts(self, ours: dict[str, Any]) -> None:
        self.names_, self.widths_, self.factors_ = (tuple(ours[name]) for name in ("names", "widths", "factors"))


def check_tokens_align(X: Mapping[str, Any]) -> None:
    """Refuse arrays whose `token_id` or `position` coordinates differ.

    Raises:
        InvalidInput: they differ, or the numbers of rows do.
    """
    first_name, first = next(iter(X.items()), ("", None))
    if first is None:
        raise InvalidInput("X holds no hooks; give at least one")
    for name, array in X.items():
        if np.shape(array)[0] != np.shape(first)[0]:
            raise InvalidInput(
                f"{first_name} has {np.shape(first)[0]:,} rows and {name} {np.shape(array)[0]:,}; "
                "give views of the same prompts"
            )
        if origin(array).get("run") == origin(first).get("run"):
            continue
        for coordinate in ("position", "token_id"):
            if coordinate in getattr(array, "coords", {}) and coordinate in getattr(first, "coords", {}):
                here, there = (np.asarray(part.coords[coordinate].data) for part in (first, array))
                if not np.array_equal(here, there):
                    row = int((here != there).argmax())
                    raise InvalidInput(
                        f"{first_name} and {name} differ in {coordinate} from row {row:,} on "
                        f"({here[row]} and {there[row]}); capture both runs with the same prompts, in the same order"
                    )
