"""Which of vLLM's settings capture works with; an engine with any other does not start."""

from __future__ import annotations

from typing import Any

from millpond.store.errors import InvalidInput


def check_engine(config: Any, *, on_device: bool) -> None:
    """Check that an engine is set up in a way that capture supports.

    Args:
        config: vLLM's configuration.
        on_device: whether taps are part of the model's graphs.

    Raises:
        InvalidInput: it is not; starting anyway would give wrong or missing rows.
    """
    parallel = config.parallel_config
    for name, remedy in {
        "prefill_context_parallel_size": "use tensor_parallel_size",
        "ubatch_size": "leave it out",
    }.items():
        if (getattr(parallel, name, 1) or 1) > 1:
            raise InvalidInput(f"{name} above 1 is not supported with capture; {remedy}")
    # engines of dense models are independent of each other, and workers see a size of 1
    if parallel.data_parallel_size > 1 and config.model_config.is_moe:
        raise InvalidInput(
            "data_parallel_size above 1 is not supported with capture of a mixture of experts, whose engines compute every "
            "step together; start several servers that share the lake"
        )
    for name in ("enable_dbo", "enable_expert_parallel"):
        if getattr(parallel, name, False):
            raise InvalidInput(f"{name} is not supported with capture; leave it out")
    speculative = config.speculative_config
    if speculative is not None:
        if config.scheduler_config.async_scheduling:
            raise InvalidInput(
                "speculative decoding with asynchronous scheduling is not supported with capture: the host does not know "
                "which positions a step computes; set async_scheduling to false"
            )
        if getattr(speculative, "enable_adaptive_verification", False):
            raise InvalidInput(
                "speculative_config.enable_adaptive_verification orders tokens on the device, where capture cannot follow; "
                "set it to false"
            )
    if config.model_config.enable_prompt_embeds:
        raise InvalidInput("enable_prompt_embeds is not supported with capture: rows need tokens; leave it out")
    if on_device and config.model_config.is_encoder_decoder:
        raise InvalidInput("encoder-decoder models are not supported with capture")


def check_attention(config: Any) -> None:
    """Check that there are attention kernels for a model that is loaded; vLLM's CPU engine would die at the first step.

    Args:
        config: vLLM's configuration, in which the model's attention layers have put themselves.

    Raises:
        InvalidInput: there are none.
    """
    for layer in config.compilation_config.static_forward_context.values():
        backend, size = getattr(layer, "attn_backend", None), getattr(layer, "head_size", None)
        if backend is not None and size is not None and not backend.supports_head_size(size):
            sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
            raise InvalidInput(
                f"the model has attention heads of size {size}; vLLM's {backend.get_name()} kernels take {sizes}: use another "
                "model, or a GPU"
            )
