"""vLLM general plugin: what every engine process must know of captured requests."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make captured requests compute every position: they never read the prefix cache.

    A position whose keys and values come from the cache is not computed, so its residual stream
    would be missing. vLLM calls this in every one of its processes; doing it twice changes nothing.
    """
    from vllm.v1.request import Request

    original = Request.get_skip_reading_prefix_cache
    if getattr(original, "_millpond", False):
        return

    def skip_reading_prefix_cache(self: Any) -> bool:
        extra = getattr(self.sampling_params, "extra_args", None) or {}
        return "millpond" in extra or bool(original(self))

    skip_reading_prefix_cache._millpond = True  # type: ignore[attr-defined]
    Request.get_skip_reading_prefix_cache = skip_reading_prefix_cache
