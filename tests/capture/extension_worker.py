"""vLLM 0.32's worker, waking up its extension as 0.33's does; 0.32 only mixes it in."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from millpond.capture.worker import TapExtension

_init_device = CPUWorker.init_device


def _init_and_wake(self: Any) -> None:
    _init_device(self)
    if type(self) is CPUWorker:  # Millpond's own worker is a subclass
        TapExtension.init_worker_extension(self)


CPUWorker.init_device = _init_and_wake  # type: ignore[method-assign]
Worker033 = CPUWorker  # not a subclass: 0.33, too, adds the extension to the bases of this class, which has subclasses
