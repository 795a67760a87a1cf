"""The vLLM worker that captures and intervenes, for both ways in that vLLM has had.

vLLM 0.32: `--worker-cls millpond.capture.worker.TapWorker`. From 0.33, which lets an extension wake up with its worker:
`--worker-extension-cls millpond.capture.worker.TapExtension`.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from millpond.capture.tapping import Tapping


def _base_worker() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


class TapMethods:
    """What the engine's clients call in every worker."""

    _millpond: Tapping

    def millpond_confirm(self, finished: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        """See `Tapping.confirm`."""
        return self._millpond.confirm(finished)

    def millpond_drop(self, capture_ids: list[str]) -> None:
        """See `Tapping.drop`."""
        self._millpond.drop(capture_ids)

    def millpond_poll(self, capture_ids: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """See `Tapping.poll`."""
        return self._millpond.poll(capture_ids)

    def millpond_commit(self) -> tuple[int, int, str | None]:
        """See `Tapping.commit`."""
        return self._millpond.commit()

    def millpond_tell_job(self, job: str) -> None:
        """See `Tapping.tell_job`."""
        self._millpond.tell_job(job)

    def millpond_statistics(self) -> dict[str, float]:
        """See `Tapping.statistics`."""
        return self._millpond.statistics()


class TapWorker(_base_worker(), TapMethods):  # type: ignore[misc]
    """vLLM's own worker, with taps at the hook points named in `additional_config["millpond"]`.

    vLLM adds an extension to the bases of its worker's class, and so to this one's: with `TapMethods` first
    there would be no order of the bases.

    `additional_config` is part of vLLM's compilation cache key, so a cached graph without these taps
    is never loaded.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and tap it."""
        super().load_model(*args, **kwargs)
        self._millpond = Tapping(self)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step, and take the rows that it kept."""
        self._millpond.before_step(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self._millpond.after_step()
        return output


class TapExtension(TapMethods):
    """The same as an extension that vLLM mixes into its worker."""

    def init_worker_extension(self) -> None:
        """Wrap the worker's methods; vLLM calls this between `init_device` and `load_model`."""
        worker: Any = self
        load, execute = worker.load_model, worker.execute_model

        def load_model(*args: Any, **kwargs: Any) -> None:
            load(*args, **kwargs)
            self._millpond = Tapping(self)

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._millpond.before_step(scheduler_output)
            output = execute(scheduler_output, *args, **kwargs)
            self._millpond.after_step()
            return output

        worker.load_model, worker.execute_model = load_model, execute_model
