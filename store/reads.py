"""Reads: what a run keeps of each row in place of the row, a probe's scores or an SAE's top-k codes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.store.dtypes import STORED_AS
from millpond.store.shards import ArraySpec

_MOST_SHORT = 1 << 16


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    hook: str
    """Hook point whose rows are read."""
    artifact: Annotated[str, Field(min_length=1)]
    """What reads them, kept in the lake."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    """Under which the run has it; the artifact's name where it is missing."""


class ReadProbe(_Read):
    """The scores of a stored probe: x @ coef.T + intercept."""

    read: Literal["probe"] = "probe"


class ReadSaeTopk(_Read):
    """The k largest latents of a stored SAE, with their indices."""

    read: Literal["sae_topk"] = "sae_topk"
    k: int | None = Field(default=None, ge=1)
    """Codes a row; a top-k SAE has a k of its own, others need one given."""


Read = Annotated[ReadProbe | ReadSaeTopk, Field(discriminator="read")]
"""What a job or a request asks to be read."""


class ReadSpec(BaseModel):
    """One read of a run, fixed when the run is created.

    Its arrays are `<name>.scores` (float32, a column for each of `width` outputs), or `<name>.indices` (uint16, or uint32
    where `d_sae` is above 65,536) and `<name>.values` (the run's data type), both with `width` columns, the largest value
    first, and `<name>.active`: how many latents of the row are above 0. A value of 0 is an empty place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    read: Literal["probe", "sae_topk"]
    hook: str
    artifact: str
    checksum: str
    """The artifact's, 8 hexadecimal digits."""
    width: int = Field(gt=0)
    """Outputs of the probe, or codes a row."""
    d_sae: int | None = None
    """Latents of the SAE."""

    def arrays(self, dtype: str, chunk_rows: int, shard_rows: int) -> dict[str, ArraySpec]:
        """The arrays of a run whose activations have `dtype`, by name."""
        if self.read == "probe":
            scores = ArraySpec("float32", self.width, chunk_rows, shard_rows, dimension=f"{self.name}.output")
            return {f"{self.name}.scores": scores}
        index = "uint16" if (self.d_sae or 0) <= _MOST_SHORT else "uint32"
        kinds = {"indices": index, "values": STORED_AS[dtype]}
        codes = {
            f"{self.name}.{part}": ArraySpec(kind, self.width, chunk_rows, shard_rows, dimension=f"{self.name}.code")
            for part, kind in kinds.items()
        }
        return codes | {f"{self.name}.active": ArraySpec("int32", None, chunk_rows, shard_rows)}

    @property
    def float_arrays(self) -> tuple[str, ...]:
        """Names of the arrays whose values must be finite."""
        return (f"{self.name}.scores" if self.read == "probe" else f"{self.name}.values",)

    def array_dtype(self, array: str, dtype: str) -> str | None:
        """The data type of the values of `array` where it is that of activations, `dtype`; None where it is its own."""
        return dtype if array == f"{self.name}.values" else None

    def attributes(self, array: str, dtype: str) -> dict[str, Any]:
        """The Zarr attributes of one of the arrays."""
        of_rows = self.array_dtype(array, dtype)
        return {
            "millpond:read": self.read,
            "millpond:hook": self.hook,
            "millpond:artifact": self.artifact,
            **({} if of_rows is None else {"millpond:dtype": of_rows}),
            **({} if self.d_sae is None else {"millpond:d_sae": self.d_sae}),
        }
