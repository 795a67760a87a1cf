"""Interventions, made ready to be applied: vectors, stored rows and SAEs are loaded and checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.device_tap import BankRow
from millpond.capture.saes import StoredSae
from millpond.store.artifacts import load_artifact
from millpond.store.errors import InvalidInput
from millpond.store.interventions import Ablate, Add, Clamp, Intervention, Patch, SpliceSae
from millpond.store.lake import Lake

Edit = Callable[[Tensor, NDArray[np.int32]], Tensor]
"""From float32 activations (n, d_model) and their token positions (n,) to what they become."""


@dataclass(frozen=True)
class BankRows:
    """An edit as a vector bank holds it; the same at every hook where it has one vector."""

    at: Callable[[int], BankRow]
    """By token position."""
    count: int
    """Rows that all its positions need."""


class Edits:
    """Makes edits of interventions, for one lake and one model width."""

    def __init__(self, lake: Lake | None, d_model: int) -> None:
        self._lake = lake
        self._d_model = d_model
        self.sae = lru_cache(maxsize=4)(self._load_sae)
        self._directed_rows = lru_cache(maxsize=256)(self._make_directed_rows)

    def make(self, intervention: Intervention, hook: str, n_prompt: int) -> Edit:
        """The edit that `intervention` asks for at `hook` of a request with `n_prompt` prompt tokens.

        Raises:
            InvalidInput: a vector has another width, or what it names is missing or of the wrong kind.
        """
        if isinstance(intervention, Patch):
            return self._patch(intervention, hook, n_prompt)
        if isinstance(intervention, SpliceSae):
            return self._splice(intervention)
        vector: Tensor = self._vector(intervention.vector)
        if isinstance(intervention, Add):
            step = intervention.scale * vector
            return lambda x, _: x + step
        unit = vector / vector.norm()
        if isinstance(intervention, Ablate):
            return lambda x, _: x - (x @ unit)[:, None] * unit
        low, high = intervention.min, intervention.max

        def clamp(x: Tensor, _: NDArray[np.int32]) -> Tensor:
            along = x @ unit
            moved: Tensor = x + (along.clamp(low, high) - along)[:, None] * unit
            return moved

        return clamp

    def rows(self, intervention: Add | Ablate | Clamp | Patch, hook: str, n_prompt: int) -> BankRows:
        """The same edit as rows of a vector bank, for taps inside CUDA graphs.

        Raises:
            InvalidInput: as `make`.
        """
        if isinstance(intervention, Patch):
            source = self._patch_rows(intervention, hook, n_prompt)
            nothing = torch.zeros(self._d_model)
            rows = {at: BankRow(nothing, row, keep=False) for at, row in source.items()}
            return BankRows(rows.__getitem__, len(rows))
        return self._directed_rows(intervention)

    def _make_directed_rows(self, intervention: Add | Ablate | Clamp) -> BankRows:
        vector = self._vector(intervention.vector)
        nothing = torch.zeros_like(vector)
        if isinstance(intervention, Add):
            row = BankRow(nothing, intervention.scale * vector)
        else:
            low, high = (0.0, 0.0) if isinstance(intervention, Ablate) else (intervention.min, intervention.max)
            row = BankRow(
                vector / vector.norm(),
                nothing,
                low=-math.inf if low is None else low,
                high=math.inf if high is None else high,
            )
        return BankRows(lambda _: row, 1)

    def _vector(self, vector: str | tuple[float, ...]) -> Tensor:
        if isinstance(vector, str):
            values = load_artifact(self._needs_lake(vector), vector, "vector").arrays()["vector"]
            what = f"vector {vector!r}"
        else:
            values = np.array(vector, np.float32)
            what = "vector"
        if values.shape != (self._d_model,):
            raise InvalidInput(f"{what} has {values.size} numbers; the model's d_model is {self._d_model}")
        if not np.isfinite(values).all():
            raise InvalidInput(f"{what} does not fit into float32")
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def _patch(self, patch: Patch, hook: str, n_prompt: int) -> Edit:
        rows = self._patch_rows(patch, hook, n_prompt)

        def put(x: Tensor, positions: NDArray[np.int32]) -> Tensor:
            return torch.stack([rows[position] for position in positions.tolist()])

        return put

    def _patch_rows(self, patch: Patch, hook: str, n_prompt: int) -> dict[int, Tensor]:
        """The stored row (d_model,) that each position gets."""
        run = self._needs_lake(patch.run)[patch.run]
        run.match(hook)
        if run.d_model != self._d_model:
            raise InvalidInput(f"run {patch.run!r} has d_model {run.d_model}; the model's is {self._d_model}")
        known = (run.prompts["id"] == patch.prompt).to_numpy()
        if not known.any():
            raise InvalidInput(f"run {patch.run!r} has no prompt {patch.prompt!r}; name one of its prompts' ids")
        source = run.select(known)
        held = {int(position): row for row, position in enumerate(source.tokens["position"].values)}
        if patch.source_positions is not None:
            assert isinstance(patch.positions, tuple)  # its model says so
            n_source = int(run.prompts.loc[known, "n_prompt_tokens"].iloc[0])
            from_end = zip(patch.positions, patch.source_positions, strict=True)
            source_of = {to + n_prompt * (to < 0): p + n_source * (p < 0) for to, p in from_end}
        elif isinstance(patch.positions, tuple):
            source_of = {p + n_prompt * (p < 0): p + n_prompt * (p < 0) for p in patch.positions}
        elif patch.positions in ("prompt", "last"):
            source_of = {int(p): int(p) for p in patch.select(n_prompt, 0, n_prompt)}
        else:
            raise InvalidInput(f"patch has positions {patch.positions!r}; give a list, 'prompt' or 'last'")
        for position in source_of.values():
            if position not in held:
                raise InvalidInput(f"run {patch.run!r} holds no row of prompt {patch.prompt!r} at position {position}")
        values = torch.from_numpy(np.array(source[hook].values, np.float32))
        return {to: values[held[position]] for to, position in source_of.items()}

    def _splice(self, splice: SpliceSae) -> Edit:
        sae = self.sae(splice.artifact)
        for latent in (*splice.set_latents, *splice.scale_latents):
            if latent >= sae.d_sae:
                raise InvalidInput(f"SAE {splice.artifact!r} has {sae.d_sae} latents; there is no latent {latent}")

        def splice_in(x: Tensor, _: NDArray[np.int32]) -> Tensor:
            latents = sae.encode(x)
            error = x - sae.decode(latents) if splice.keep_error else 0
            for latent, factor in splice.scale_latents.items():
                latents[:, latent] *= factor
            for latent, value in splice.set_latents.items():
                latents[:, latent] = value
            return sae.decode(latents) + error

        return splice_in

    def _load_sae(self, name: str) -> StoredSae:
        sae = StoredSae(load_artifact(self._needs_lake(name), name, "sae"))
        if sae.d_in != self._d_model:
            raise InvalidInput(f"SAE {name!r} takes {sae.d_in} dimensions; the model's d_model is {self._d_model}")
        return sae

    def _needs_lake(self, name: str) -> Lake:
        if self._lake is None:
            raise InvalidInput(f"there is no lake that could hold {name!r}; save it in one, or give a vector's numbers")
        return self._lake
