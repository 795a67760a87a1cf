"""How the chunks of activations are compressed: recorded in Zarr's metadata, undone by every Zarr v3 reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, LakeCorrupt

if TYPE_CHECKING:
    from numcodecs import Blosc

BLOSC: dict[str, dict[str, Any]] = {
    "lz4": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0},
    "zstd": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20},
}
"""Codec to its settings: lz4 is for ingest over a network, zstd for archives (1.3 and 1.4 times smaller, bfloat16)."""
CODECS = ("none", *BLOSC)


def check_codec(codec: str) -> str:
    """`codec`, if rows may be stored with it.

    Raises:
        InvalidInput: otherwise.
    """
    if codec not in CODECS:
        raise InvalidInput(f"codec {codec!r} is not known; use one of {', '.join(CODECS)}")
    return codec


def zarr_codecs(codec: str, itemsize: int) -> list[dict[str, Any]]:
    """The codecs of one chunk, as `zarr.json` lists them."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    if codec == "none":
        return [little]
    return [little, {"name": "blosc", "configuration": {"typesize": itemsize, **BLOSC[codec]}}]


def encoder(codec: str) -> Blosc:
    """Compresses chunks; its `encode` takes an array and gives bytes."""
    from numcodecs import Blosc

    settings = BLOSC[codec]
    shuffle = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}[settings["shuffle"]]
    return Blosc(settings["cname"], settings["clevel"], shuffle, settings["blocksize"])


def decode_chunk(data: Any, out: NDArray[Any], where: str) -> None:
    """Decompress one chunk into `out`, which is contiguous; the settings are in the chunk itself.

    Raises:
        LakeCorrupt: it is no chunk of that size.
    """
    from numcodecs import blosc

    target = out.reshape(-1).view(np.uint8)
    try:
        blosc.decompress(data, target)
    except (RuntimeError, ValueError) as error:
        raise LakeCorrupt(
            f"{where} holds a chunk that cannot be decompressed ({error}); run millpond verify"
        ) from error
