"""Running prompts through vLLM while its worker captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from millpond.capture.interrupts import blocked
from millpond.capture.versions import check_vllm_version, set_environment
from millpond.store.capture_spec import CaptureJob, CaptureWish, RequestArgs
from millpond.store.errors import CaptureFailed
from millpond.store.positions import PositionFilter

_CONFIRM_EVERY = 16  # requests a call to the worker


class CaptureEngine:
    """A vLLM engine in a process of its own, set up to capture into one run."""

    def __init__(self, job: CaptureJob, hooks: tuple[str, ...], max_model_len: int) -> None:
        check_vllm_version()
        set_environment()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        # Eager, because compilation takes longer than most captures on a CPU and is not proven on a GPU.
        settings: dict[str, Any] = {
            "max_num_seqs": 64,
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "enforce_eager": True,
        }
        if current_platform.is_cpu():
            settings["kv_cache_memory_bytes"] = 1 << 30  # left out, vLLM takes most of the machine's memory
        settings |= job.engine
        settings |= {
            "model": job.model.path,
            "dtype": job.model.dtype,
            "max_model_len": max_model_len,
            "async_scheduling": False,  # the token ids of a step must be known when it is planned
            "worker_cls": "millpond.capture.worker.TapWorker",
            "additional_config": {
                "millpond": {
                    "lake": str(Path(job.destination.lake.removeprefix("file://")).absolute()),
                    "run": job.destination.run,
                    "hooks": list(hooks),
                }
            },
        }
        self.max_num_seqs = int(settings["max_num_seqs"])
        positions = {name: getattr(job.capture, name) for name in PositionFilter.model_fields}
        self._wish = CaptureWish(**positions)
        self._intervene = job.intervene
        self._max_new_tokens = job.capture.max_new_tokens
        with blocked():
            self._engine = LLMEngine.from_engine_args(EngineArgs(**settings))

    def run(
        self, prompts: Iterator[tuple[str, list[int]]], check: Callable[[], None]
    ) -> Iterator[tuple[str, list[int]]]:
        """Capture `prompts` (id and token ids), and yield each id with its tokens, prompt and generated, once it is on its way.

        `check` is called between steps; what it raises ends the capture.
        At most four times `max_num_seqs` requests wait in the engine, however many prompts there are.

        Raises:
            CaptureFailed: the engine, the worker or the lake failed.
        """
        waiting: set[str] = set()
        finished: list[tuple[str, list[int]]] = []
        try:
            while True:
                check()
                for prompt_id, token_ids in islice(prompts, 4 * self.max_num_seqs - len(waiting)):
                    self._add(prompt_id, token_ids)
                    waiting.add(prompt_id)
                if not waiting:
                    break
                for output in self._engine.step():
                    if output.finished:
                        generated = output.outputs[0].token_ids if self._max_new_tokens else []
                        finished.append((output.request_id, [*output.prompt_token_ids, *generated]))
                        waiting.discard(output.request_id)
                if len(finished) >= _CONFIRM_EVERY or not waiting:
                    self._confirm([(prompt_id, len(tokens)) for prompt_id, tokens in finished])
                    yield from finished
                    finished = []
        except CaptureFailed:
            raise
        except Exception as error:
            raise CaptureFailed(f"the engine failed: {_reason(error)}") from error

    def _add(self, prompt_id: str, token_ids: list[int]) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max(self._max_new_tokens, 1),
            detokenize=False,
            extra_args={
                "millpond": RequestArgs(
                    capture=self._wish.model_copy(update={"id": prompt_id}), intervene=self._intervene
                ).model_dump(mode="json", exclude_none=True)
            },
        )
        self._engine.add_request(prompt_id, {"prompt_token_ids": token_ids}, parameters)

    def _confirm(self, finished: list[tuple[str, int]]) -> None:
        if finished:
            answers, *_ = self._engine.collective_rpc("millpond_confirm", args=(finished,))
            for capture_id, _ in finished:
                answer = answers.get(capture_id)
                if answer is None:
                    raise CaptureFailed(f"request {capture_id!r} never reached the worker")
                if answer["error"]:
                    raise CaptureFailed(answer["error"])
            failed = self._engine.collective_rpc("millpond_poll")[0]["failed"]
            for reason in failed.values():
                raise CaptureFailed(reason)

    def commit(self) -> tuple[int, int]:
        """Make everything captured durable and visible: rows and prompts in all.

        Raises:
            CaptureFailed: the lake could not be written.
        """
        (rows, prompts, problem), *_ = self._engine.collective_rpc("millpond_commit")
        if problem:
            raise CaptureFailed(problem)
        return rows, prompts

    def close(self) -> None:
        """End the engine's process."""
        self._engine.engine_core.shutdown()


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
