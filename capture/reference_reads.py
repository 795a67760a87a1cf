"""A run's reads beside what its artifacts make of Hugging Face's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.capture.edits import Edits
from millpond.capture.reads import Readers
from millpond.store.lake import Lake
from millpond.store.reads import ReadSpec

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """Values of one array of a read."""

    difference: Floats
    """From what Hugging Face's rows give."""
    truth: Floats


class ReferenceRead:
    """Computes one read again.

    Args:
        spec: of the run.
        lake: holds its artifact.
        d_model: width of the rows.
        dtype: the run's.

    Raises:
        InvalidInput: its artifact is gone, or is not the one that the run was made with.
    """

    def __init__(self, spec: ReadSpec, lake: Lake | None, d_model: int, dtype: str) -> None:
        sae = Edits(lake, d_model).sae
        self.spec = spec
        self._exact = Readers(lake, d_model, "float32", sae).make(spec)
        self._rounded = Readers(lake, d_model, dtype, sae).make(spec)
        self._sae = sae(spec.artifact) if spec.read == "sae_topk" else None

    def of(self, rows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """What the run would keep of rows (n, d_model), its values as float32."""
        import torch

        names = ("scores",) if self._sae is None else ("indices", "values", "active")
        values = self._rounded(torch.from_numpy(np.ascontiguousarray(rows)))
        return {
            name: (value.float() if value.is_floating_point() else value).numpy()
            for name, value in zip(names, values, strict=True)
        }

    def compare(self, found: dict[str, NDArray[Any]], rows: NDArray[np.float32]) -> dict[str, Compared]:
        """Stored values against those of Hugging Face's float32 rows (n, d_model), by the name of the run's array.

        A code may change places with one as large, so values are compared in order of size, and again, as its index
        says, with the latent itself; the larger difference counts.
        """
        import torch

        exact = torch.from_numpy(np.ascontiguousarray(rows))
        right = [values.double().numpy() for values in self._exact(exact)]
        if self._sae is None:
            return {f"{self.spec.name}.scores": Compared(found["scores"] - right[0], right[0])}
        _, largest, active = right
        named = np.take_along_axis(self._sae.dense(exact).numpy(), found["indices"].astype(np.int64), axis=1)
        apart = np.maximum(np.abs(found["values"] - largest), np.abs(found["values"] - named))
        return {
            f"{self.spec.name}.values": Compared(apart, largest),
            f"{self.spec.name}.active": Compared(found["active"] - active, active),
        }
