"""Reads, made ready to be computed: probes and SAEs are loaded and checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from millpond.capture.saes import StoredSae
from millpond.store.artifacts import Artifact, load_artifact
from millpond.store.errors import ArtifactNotFound, HookNotCaptured, InvalidInput
from millpond.store.hooks import match_hooks
from millpond.store.lake import Lake
from millpond.store.reads import Read, ReadProbe, ReadSaeTopk, ReadSpec

Reader = Callable[[Tensor], tuple[Tensor, ...]]
"""From rows (n, d_model) as a run would keep them to the values of the read's arrays, in the order of `ReadSpec.arrays`."""

_BLOCK_VALUES = 1 << 24  # latents computed at once: 64 MiB


class Readers:
    """Makes readers of reads, for one lake and one model.

    Args:
        lake: holds the artifacts.
        d_model: width of the rows.
        dtype: of the rows, and of SAE values.
        sae: loads SAEs of that width by name.
    """

    def __init__(self, lake: Lake | None, d_model: int, dtype: str, sae: Callable[[str], StoredSae]) -> None:
        self._lake = lake
        self._d_model = d_model
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._sae = sae
        # artifacts never change, and every request asks again
        self._resolved = lru_cache(maxsize=256)(self._resolve)
        self.make = lru_cache(maxsize=16)(self._make)

    def resolve(self, reads: Sequence[Read], hooks: Sequence[str]) -> tuple[ReadSpec, ...]:
        """What a run that is made for `reads` records of them, with the sizes of their artifacts.

        Args:
            reads: as a job or a request asks for them.
            hooks: hook points that can be read.

        Raises:
            InvalidInput: one cannot be computed; the message names the field.
        """
        found: list[ReadSpec] = []
        for number, read in enumerate(reads):
            spec = self._resolved(read, f"capture.reads.{number}", tuple(hooks))
            if any(spec.name == other.name for other in found):
                raise InvalidInput(
                    f"capture.reads.{number}.name: {spec.name!r} is taken; give each read a name of its own"
                )
            self.make(spec)
            found.append(spec)
        return tuple(found)

    def _resolve(self, read: Read, field: str, hooks: tuple[str, ...]) -> ReadSpec:
        named = match_hooks(read.hook, hooks, f"{field}.hook: to be read there are")
        if len(named) != 1:
            raise HookNotCaptured(f"{field}.hook: {read.hook!r} names {len(named)} hook points; name one")
        artifact = self._load(read.artifact, "probe" if isinstance(read, ReadProbe) else "sae", field)
        if isinstance(read, ReadSaeTopk):
            width, d_sae = self._code_sizes(read, field)
        else:
            width, d_sae = len(self._probe(artifact, field)[1]), None
        return ReadSpec(
            name=read.name or read.artifact,
            read=read.read,
            hook=named[0],
            artifact=read.artifact,
            checksum=artifact.checksum,
            width=width,
            d_sae=d_sae,
        )

    def _code_sizes(self, read: ReadSaeTopk, field: str) -> tuple[int, int]:
        """Codes a row, and latents of the SAE."""
        try:
            sae = self._sae(read.artifact)
        except InvalidInput as error:
            raise InvalidInput(f"{field}.artifact: {error}") from error
        if read.k is None and sae.k is None:
            raise InvalidInput(
                f"{field}.k is missing: SAE {read.artifact!r} of architecture {sae.architecture!r} has a threshold and no k "
                "of its own; give k, the most latents of a row that are kept"
            )
        most = sae.d_sae if sae.k is None else sae.k
        k = sae.k if read.k is None else read.k
        assert k is not None
        if k > most:
            why = f"{sae.d_sae} latents" if sae.k is None else f"at most {sae.k} active latents a row"
            raise InvalidInput(f"{field}.k is {k}, but SAE {read.artifact!r} has {why}; give {most} or less")
        return k, sae.d_sae

    def _probe(self, artifact: Artifact, field: str) -> tuple[Tensor, Tensor]:
        """Weights (d_model, n_outputs) and offsets (n_outputs,)."""
        tensors = artifact.arrays()
        if not {"coef", "intercept"} <= set(tensors):
            raise InvalidInput(
                f"{field}.artifact: probe {artifact.name!r} holds {', '.join(tensors)}; save it with save_probe"
            )
        coef, intercept = torch.from_numpy(tensors["coef"]).float(), torch.from_numpy(tensors["intercept"]).float()
        if coef.shape[1] != self._d_model:
            raise InvalidInput(
                f"{field}.artifact: probe {artifact.name!r} takes {coef.shape[1]} dimensions; the model's d_model is "
                f"{self._d_model}"
            )
        return coef.T.contiguous(), intercept

    def _make(self, spec: ReadSpec) -> Reader:
        """What computes `spec`.

        Raises:
            InvalidInput: its artifact is gone, or is not the one that the run was made with.
        """
        field = f"read {spec.name!r}"
        artifact = self._load(spec.artifact, "probe" if spec.read == "probe" else "sae", field)
        if artifact.checksum != spec.checksum:
            raise InvalidInput(
                f"{field}: artifact {spec.artifact!r} is not the one that the run was made with; capture into a new run"
            )
        reader = self._scores(*self._probe(artifact, field)) if spec.read == "probe" else self._codes(spec)
        try:
            reader(torch.zeros(1, self._d_model, dtype=self._dtype))
        except (KeyError, RuntimeError) as error:  # a tensor is missing or has another shape than the others
            raise InvalidInput(
                f"{field}: artifact {spec.artifact!r} cannot be computed ({error}); save it again"
            ) from error
        return reader

    def _scores(self, weights: Tensor, offsets: Tensor) -> Reader:
        return lambda rows: (torch.addmm(offsets, rows.float(), weights),)

    def _codes(self, spec: ReadSpec) -> Reader:
        sae, block = self._sae(spec.artifact), max(_BLOCK_VALUES // (spec.d_sae or 1), 1)

        def codes(rows: Tensor) -> tuple[Tensor, ...]:
            parts = [sae.codes(rows[start : start + block].float(), spec.width) for start in range(0, len(rows), block)]
            indices, values, active = (torch.cat(column) for column in zip(*parts, strict=True))
            return indices, values.to(self._dtype), active

        return codes

    def _load(self, name: str, kind: Literal["probe", "sae"], field: str) -> Artifact:
        if self._lake is None:
            raise InvalidInput(f"{field}.artifact: there is no lake yet that could hold {name!r}; save it there first")
        try:
            return load_artifact(self._lake, name, kind)
        except ArtifactNotFound as error:
            raise ArtifactNotFound(f"{field}.artifact: {error}") from error
        except InvalidInput as error:
            raise InvalidInput(f"{field}.artifact: {error}") from error
