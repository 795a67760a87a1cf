"""The vLLM worker that captures and intervenes: `--worker-cls millpond.capture.worker.TapWorker`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from millpond.capture.admission import EngineFacts
from millpond.capture.requests import Following, PlannedEdit, PlannedRead, RequestFollower
from millpond.capture.sink import LakeSink
from millpond.capture.tap import Taps, install_taps
from millpond.capture.versions import check_vllm_version
from millpond.store.capture_spec import read_request_args
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.hooks import match_hooks
from millpond.store.interventions import Patch
from millpond.store.reads import ReadSpec
from millpond.store.segment import RunWriter


def _base_worker() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


class TapWorker(_base_worker()):  # type: ignore[misc]
    """vLLM's own worker, with taps at the hook points named in `additional_config["millpond"]`.

    `additional_config` is part of vLLM's compilation cache key, so a cached graph without these taps
    is never loaded. In a tensor-parallel group every rank intervenes and the first one keeps rows.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and tap it, before anything is compiled or profiled.

        Raises:
            InvalidInput: the engine is set up in a way that capture does not support.
        """
        super().load_model(*args, **kwargs)
        check_vllm_version()
        check_engine(self.vllm_config, v2=getattr(self, "use_v2_model_runner", False))
        self._facts = facts = EngineFacts.of(self.vllm_config)
        runner = self.model_runner
        self._keeps = get_tp_group().rank_in_group == 0
        self._taps = Taps(facts.hooks)
        self._follower = RequestFollower(facts.hooks, facts.d_model, self.vllm_config.model_config.dtype)
        self._sink = LakeSink(self._open_run, facts.queue_bytes, facts.commit_seconds) if self._keeps else None
        self._edit = lru_cache(maxsize=256)(facts.edits.make)
        self._hook_numbers = lru_cache(maxsize=64)(self._numbers_of_run)
        self._reads = lru_cache(maxsize=64)(self._reads_of_run)
        self._planned = lru_cache(maxsize=64)(self._plan_read)
        self._statistics = {"steps": 0, "rows": 0, "bytes": 0, "plan_seconds": 0.0, "take_seconds": 0.0}
        self._run_of: dict[str, str] = {}
        install_taps(runner.model, self.vllm_config.model_config.hf_text_config.num_hidden_layers, self._taps)
        prepare_inputs = runner._prepare_inputs

        def prepare_and_plan(scheduler_output: Any, num_scheduled_tokens: Any, *rest: Any, **more: Any) -> Any:
            prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *rest, **more)
            started = time.perf_counter()
            self._taps.work = self._follower.plan_step(self._batch(num_scheduled_tokens))
            self._statistics["plan_seconds"] += time.perf_counter() - started
            return prepared

        runner._prepare_inputs = prepare_and_plan  # the only place that knows the batch's row order

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step, and take the rows that it kept."""
        self._follower.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            self._admit(request)
        self._taps.work = {}
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self._taps.work = {}
        started = time.perf_counter()
        rows, size = self._follower.take_rows()
        self._statistics["take_seconds"] += time.perf_counter() - started
        self._statistics["steps"] += 1
        self._statistics["rows"] += rows
        self._statistics["bytes"] += size
        return output

    def _batch(self, num_scheduled_tokens: Any) -> Iterator[tuple[str, int, NDArray[np.int32]]]:
        batch = self.model_runner.input_batch
        for number, count in enumerate(num_scheduled_tokens):
            start = int(batch.num_computed_tokens_cpu[number])
            yield batch.req_ids[number], start, batch.token_ids_cpu[number, start : start + int(count)]

    def _admit(self, request: Any) -> None:
        args = read_request_args(request.sampling_params.extra_args) if request.sampling_params else None
        if args is None:
            return
        n_prompt = len(request.prompt_token_ids)
        edits = tuple(
            PlannedEdit(
                self._taps.number[hook],
                intervention,
                self._edit(intervention, hook, n_prompt if isinstance(intervention, Patch) else 0),
            )
            for intervention in args.intervene
            for hook in match_hooks(intervention.hook, self._facts.hooks, "the engine has taps at")
        )
        following = Following(n_prompt, edits=edits)
        if args.capture is not None and args.capture.id is not None and self._keeps:
            following.wish = args.capture
            following.hooks = self._hook_numbers(args.capture.run)
            following.reads = self._reads(args.capture.run)
            self._run_of[args.capture.id] = self._facts.run_spec(args.capture.run).name
        self._follower.admit(request.req_id, following)

    def _numbers_of_run(self, run: str | None) -> tuple[int, ...]:
        return tuple(self._taps.number[hook] for hook in self._facts.run_spec(run).hooks)

    def _reads_of_run(self, run: str | None) -> tuple[PlannedRead, ...]:
        return tuple(map(self._planned, self._facts.run_spec(run).reads))

    def _plan_read(self, read: ReadSpec) -> PlannedRead:
        return PlannedRead(self._taps.number[read.hook], read, self._facts.readers.make(read))

    def _open_run(self, name: str) -> RunWriter:
        assert self._facts.lake is not None  # run_spec has found the run in it
        return RunWriter(self._facts.lake.run_storage(name), self._facts.run_spec(name))

    def millpond_confirm(self, finished: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        """Write requests of which the client received so many tokens.

        Returns:
            For every request that this worker knows: status (`kept` or `failed`), rows and error.
        """
        answers: dict[str, dict[str, Any]] = {}
        if self._sink is None:
            return answers
        for capture_id, n_tokens in finished:
            run = self._run_of.pop(capture_id, None)
            if run is None:
                continue
            try:
                request = self._follower.confirm(capture_id, n_tokens)
            except CaptureFailed as error:
                answers[capture_id] = {"status": "failed", "rows": 0, "error": str(error)}
                continue
            answers[capture_id] = {"status": "kept", "rows": len(request.positions), "error": None}
            self._sink.put(run, capture_id, request)
        return answers

    def millpond_drop(self, capture_ids: list[str]) -> None:
        """Let go of requests that were aborted."""
        for capture_id in capture_ids:
            self._follower.drop(capture_id)
            self._run_of.pop(capture_id, None)

    def millpond_poll(self) -> dict[str, dict[str, Any]]:
        """Since the last call: `committed` requests with their rows, and `failed` ones with the reason."""
        committed, failed = self._sink.poll() if self._sink else ({}, {})
        return {"committed": committed, "failed": failed}

    def millpond_commit(self) -> tuple[int, int, str | None]:
        """Commit everything confirmed: rows and prompts committed in all, and what was lost, if anything was."""
        return self._sink.commit() if self._sink else (0, 0, None)

    def millpond_statistics(self) -> dict[str, float]:
        """Counts and seconds since the start, and this process's CPU seconds."""
        sink = self._sink
        writer = (
            {"wait_seconds": sink.waited, "writer_seconds": sink.busy, "written": sink.written_bytes} if sink else {}
        )
        return {**self._statistics, **writer, "cpu_seconds": time.process_time()}


def check_engine(config: Any, *, v2: bool) -> None:
    """Check that an engine is set up in a way that capture supports.

    Raises:
        InvalidInput: it is not; starting anyway would give wrong or missing rows.
    """
    parallel = config.parallel_config
    if v2:
        raise InvalidInput("vLLM's V2 model runner is not supported yet; set VLLM_USE_V2_MODEL_RUNNER=0")
    if parallel.pipeline_parallel_size > 1:
        raise InvalidInput("pipeline_parallel_size above 1 is not supported yet; use tensor or data parallel workers")
    for name in ("enable_dbo", "enable_expert_parallel"):
        if getattr(parallel, name, False):
            raise InvalidInput(f"{name} is not supported with capture; leave it out")
    if config.scheduler_config.async_scheduling:
        raise InvalidInput("asynchronous scheduling is not supported yet; set async_scheduling to false")
