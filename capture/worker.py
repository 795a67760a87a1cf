"""The vLLM worker that captures: `--worker-cls millpond.capture.worker.TapWorker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from vllm.platforms import current_platform

from millpond.capture.requests import RequestFollower
from millpond.capture.sink import LakeSink
from millpond.capture.tap import TapBuffers, install_taps
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.files import read_json
from millpond.store.manifest import RunSpec
from millpond.store.segment import RunWriter


def _base_worker() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


class TapWorker(_base_worker()):  # type: ignore[misc]
    """vLLM's own worker, with taps behind the layers of the run named in `additional_config["millpond"]`.

    `additional_config` is part of vLLM's compilation cache key, so a cached graph without these taps
    is never loaded.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and tap it, before anything is compiled or profiled.

        Raises:
            InvalidInput: the engine is set up in a way that capture does not support.
        """
        super().load_model(*args, **kwargs)
        parallel = self.vllm_config.parallel_config
        if getattr(self, "use_v2_model_runner", False):
            raise InvalidInput("vLLM's V2 model runner is not supported yet; set VLLM_USE_V2_MODEL_RUNNER=0")
        if parallel.world_size > 1 or parallel.data_parallel_size > 1 or self.vllm_config.speculative_config:
            raise InvalidInput(
                "parallel and speculative engines are not supported yet; use one worker and no draft model"
            )
        if self.vllm_config.scheduler_config.async_scheduling:
            raise InvalidInput("asynchronous scheduling is not supported yet; set async_scheduling to false")
        settings = self.vllm_config.additional_config["millpond"]
        folder = Path(settings["run_folder"])
        spec = RunSpec.model_validate(read_json(folder / "run.json"))
        model = self.vllm_config.model_config
        if model.get_hidden_size() != spec.d_model or str(model.dtype).removeprefix("torch.") != spec.dtype:
            raise InvalidInput(
                f"run {spec.name!r} is for d_model {spec.d_model} and {spec.dtype}, the engine has "
                f"{model.get_hidden_size()} and {model.dtype}"
            )
        runner = self.model_runner
        self._buffers = TapBuffers(spec.hooks, spec.d_model, runner.max_num_tokens, model.dtype, runner.device)
        self._follower = RequestFollower(self._buffers.rows())
        self._sink = LakeSink(RunWriter(folder, spec), settings.get("queue_bytes", 1 << 30))
        install_taps(runner.model, model.hf_text_config.num_hidden_layers, self._buffers)
        prepare_inputs = runner._prepare_inputs

        def prepare_and_arm(scheduler_output: Any, num_scheduled_tokens: Any, *rest: Any, **more: Any) -> Any:
            prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *rest, **more)
            self._arm(num_scheduled_tokens)
            return prepared

        runner._prepare_inputs = prepare_and_arm  # the only place that knows the batch's row order

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step and collect the rows it staged."""
        self._follower.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            extra = request.sampling_params.extra_args if request.sampling_params else None
            self._follower.admit(request.req_id, extra, len(request.prompt_token_ids or ()))
        self._buffers.count = 0
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self._buffers.count:
            self._follower.take_rows(self._buffers.rows())
        self._buffers.count = 0
        return output

    def _arm(self, num_scheduled_tokens: Any) -> None:
        batch = self.model_runner.input_batch
        requests = []
        for number, count in enumerate(num_scheduled_tokens):
            start = int(batch.num_computed_tokens_cpu[number])
            tokens = batch.token_ids_cpu[number, start : start + int(count)].astype(np.int32)
            requests.append((batch.req_ids[number], start, tokens))
        self._buffers.arm(self._follower.plan_step(requests))

    def millpond_confirm(self, finished: list[tuple[str, int]]) -> str | None:
        """Write requests of which the client received so many tokens; returns what went wrong, if anything did."""
        try:
            for capture_id, n_tokens in finished:
                self._sink.put(self._follower.confirm(capture_id, n_tokens))
        except CaptureFailed as error:
            return str(error)
        return self._sink.error

    def millpond_commit(self) -> tuple[int, int, str | None]:
        """Commit everything confirmed: rows and prompts committed in all, and what went wrong, if anything did."""
        rows, prompts = self._sink.commit()
        return rows, prompts, self._sink.error
