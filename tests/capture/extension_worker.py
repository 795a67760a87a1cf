"""A worker that wakes up its extension as vLLM 0.33 does; 0.32 only mixes it in."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from millpond.capture.worker import TapExtension


class Worker033(CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        TapExtension.init_worker_extension(self)  # type: ignore[arg-type]
