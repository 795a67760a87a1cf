"""Asynchronous scheduling on vLLM's CPU build, which has it switched off because it gains nothing there.

The scheduler and the model runner are vLLM's own; only the streams and events of CUDA, which have nothing to do
on a CPU, are given a form that does nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any


class _Idle:
    """An event or a stream where every operation has happened when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.synchronize = self.wait_stream = self.wait_event = lambda *_, **__: None
        self.query = lambda: True


def allow() -> None:
    """Let engines that are made after this in this process schedule asynchronously."""
    import torch
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, vllm_config: Any) -> None:
        configure(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keep)
    torch.cuda.Event = torch.cuda.Stream = torch.Event = _Idle
    torch.cuda.current_stream = lambda *_: _Idle()
    torch.cuda.stream = lambda _: nullcontext()
