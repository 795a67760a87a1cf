"""The lake: runs of activations as sharded Zarr v3 arrays, with their tokens, prompts and labels."""

from millpond.store.errors import MillpondError
from millpond.store.lake import Lake, open_lake

__all__ = ["Lake", "MillpondError", "open_lake"]
