"""Running prompts through vLLM while its worker captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from millpond.capture.adapters import Adapter, engine_rank
from millpond.capture.data_parallel import DataParallelEngines
from millpond.capture.engine_errors import EngineErrors, one_line, with_remedy
from millpond.capture.interrupts import blocked
from millpond.capture.plan import ModelFacts
from millpond.capture.versions import check_vllm_version, set_environment, worker_argument
from millpond.store.capture_spec import RequestArgs
from millpond.store.errors import CaptureFailed, LeaseLost, RunBusy
from millpond.store.generation import Sampling
from millpond.store.interventions import SpliceSae

_CONFIRM_EVERY = 16  # requests a call to the worker


class _Request(Protocol):
    """What the engine must know of any request."""

    @property
    def request_id(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def asked(self) -> RequestArgs: ...
    @property
    def adapter(self) -> Adapter | None: ...
    @property
    def max_new_tokens(self) -> int: ...


_R = TypeVar("_R", bound=_Request)


@dataclass(frozen=True)
class CaptureRequest:
    """One prompt on its way into one run."""

    run: str
    prompt: str
    """Its id in the run."""
    token_ids: list[int]
    asked: RequestArgs
    """What is captured and changed."""
    adapter: Adapter | None = None
    max_new_tokens: int = 0

    @property
    def request_id(self) -> str:
        """Unique in the engine: what is captured has an id there."""
        wish = self.asked.capture
        assert wish is not None
        assert wish.id is not None
        return wish.id


@dataclass(frozen=True)
class GenerateRequest:
    """One completion of one prompt."""

    job: str
    prompt: int
    """The prompt's number."""
    sample: int
    """Which of its completions."""
    token_ids: list[int]
    asked: RequestArgs
    """What is changed, and what is kept under the request's id."""
    sampling: Sampling
    seed: int | None
    adapter: Adapter | None = None
    allowed: tuple[int, ...] | None = None
    """Token ids of which alone are drawn."""

    @property
    def request_id(self) -> str:
        """Unique in the engine."""
        return f"{self.job}:{self.prompt}:{self.sample}"

    @property
    def max_new_tokens(self) -> int:
        """Tokens drawn at most."""
        return self.sampling.max_tokens


@dataclass(frozen=True)
class LossRequest:
    """One prompt whose losses are asked for."""

    request_id: str
    """Unique in the engine."""
    token_ids: list[int]
    asked: RequestArgs
    """What is changed."""
    adapter: Adapter | None = None
    max_new_tokens: ClassVar[int] = 0


class CaptureEngine:
    """A vLLM engine in a process of its own, whose worker captures into the runs it is told of.

    With `data_parallel_size` among the arguments there are so many, each of which writes segments of its own.

    Args:
        model: what runs.
        lake: path or URL of the lake that the runs are in.
        hooks: hook points that are tapped; runs may keep fewer.
        arguments: further vLLM engine arguments.
        max_adapters: LoRA adapters in one batch; 0 leaves LoRA out.
        max_rank: the largest rank of an adapter.
        edits_per_token: most interventions of one request at one hook; 0 leaves them out of CUDA graphs.
        saes: splices that requests may ask for, which are part of CUDA graphs.

    Raises:
        CaptureFailed: it did not start.
    """

    def __init__(
        self,
        model: ModelFacts,
        lake: str,
        hooks: Sequence[str],
        arguments: dict[str, Any],
        *,
        max_adapters: int = 0,
        max_rank: int = 0,
        edits_per_token: int = 1,
        saes: Sequence[SpliceSae] = (),
    ) -> None:
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
        # vLLM 0.32 rewinds a request's generator after each part of its prompt but the last, which ends a CPU engine
        self.takes_seeds = not current_platform.is_cpu()
        if current_platform.is_cpu():
            settings["kv_cache_memory_bytes"] = 1 << 30  # left out, vLLM takes most of the machine's memory
            device: dict[str, Any] = {}
        else:
            device = {
                "edits_per_token": edits_per_token,
                "saes": [{"hook": one.hook, "artifact": one.artifact} for one in saes],
                "latents_per_request": max((len({*one.set_latents, *one.scale_latents}) for one in saes), default=0),
            }
        if max_adapters:
            settings |= {"enable_lora": True, "max_loras": max_adapters, "max_lora_rank": engine_rank(max_rank)}
        settings |= arguments
        settings |= {
            "model": str(model.folder),
            "dtype": model.dtype,  # vLLM's "auto" would run a float32 model in 16 bits
            "max_model_len": model.context,
            **dict([worker_argument()]),
            # no run's name: every setting is part of the compilation cache's key
            "additional_config": {"millpond": {"lake": lake, "hooks": list(hooks), **device}},
        }
        self.hooks = tuple(hooks)
        self.saes = frozenset((one.hook, one.artifact) for one in saes)
        self.on_device = not current_platform.is_cpu()
        self.max_num_seqs = int(settings["max_num_seqs"])
        self.max_adapters = max_adapters
        self.max_rank = engine_rank(max_rank) if max_adapters else 0
        self._adapter_numbers: dict[Path, int] = {}
        self._committed = (0, 0)
        self._errors = EngineErrors()
        try:
            with blocked(), self._errors.heard():
                self._engine = LLMEngine.from_engine_args(EngineArgs(**settings))
        except Exception as error:
            reason = self._reason(error)
            self._errors.close()
            raise CaptureFailed(f"the engine did not start: {reason}") from error
        self._ranks = DataParallelEngines(self._engine)

    def run(
        self, requests: Iterator[CaptureRequest], check: Callable[[], None]
    ) -> Iterator[tuple[CaptureRequest, list[int]]]:
        """Capture `requests`, and yield each with all its tokens once it is on its way to the lake.

        `check` is called between steps; what it raises ends the capture, and the requests under way are forgotten.
        At most four times `max_num_seqs` requests wait in each engine, however many there are.

        Raises:
            CaptureFailed: the engine, the worker or the lake failed.
        """
        wanted = {"temperature": 0.0, "detokenize": False}
        for request, output in self._drive(requests, lambda _: wanted, check):
            yield request, [*request.token_ids, *_received(request, output)]

    def generate(
        self, requests: Iterator[GenerateRequest], check: Callable[[], None]
    ) -> Iterator[tuple[GenerateRequest, str, list[int]]]:
        """Yield each request with its completion and the tokens of that.

        `check` is called between steps; what it raises ends the generation. What requests keep is durable after `commit`.

        Raises:
            CaptureFailed: the engine, the worker or the lake failed.
        """

        def parameters(request: GenerateRequest) -> dict[str, Any]:
            return {
                "temperature": request.sampling.temperature,
                "seed": request.seed,
                "stop": list(request.sampling.stop),
                "allowed_token_ids": None if request.allowed is None else list(request.allowed),
            }

        for request, output in self._drive(requests, parameters, check):
            yield request, output.outputs[0].text, _received(request, output)

    def losses(
        self, requests: Iterator[LossRequest], check: Callable[[], None]
    ) -> Iterator[tuple[LossRequest, list[float]]]:
        """Yield each request with the loss in nats of every token of its prompt but the first.

        `check` is called between steps; what it raises ends it.

        Raises:
            CaptureFailed: the engine failed.
        """
        wanted = {"temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        for request, output in self._drive(requests, lambda _: wanted, check):
            told = zip(request.token_ids[1:], output.prompt_logprobs[1:], strict=True)
            yield request, [-logprobs[token].logprob for token, logprobs in told]

    def _drive(
        self, requests: Iterator[_R], parameters: Callable[[_R], dict[str, Any]], check: Callable[[], None]
    ) -> Iterator[tuple[_R, Any]]:
        """Yield each request with vLLM's output; what it keeps is on its way to the lake by then.

        Args:
            requests: taken as there is room for them.
            parameters: sampling parameters of a request.
            check: called between steps; what it raises ends this, and the requests under way are forgotten.
        """
        waiting: dict[str, _R] = {}
        kept: dict[str, tuple[_R, Any]] = {}
        try:
            while True:
                check()
                for request in islice(requests, self._room - len(waiting)):
                    self._add(request, parameters(request))
                    waiting[request.request_id] = request
                if not waiting:
                    break
                for output in self._engine.step():
                    if output.finished:
                        request = waiting.pop(output.request_id)
                        self._ranks.ended(output.request_id)
                        if request.asked.capture is None:
                            yield request, output
                        else:
                            kept[output.request_id] = (request, output)
                if len(kept) >= _CONFIRM_EVERY or (kept and not waiting):
                    lengths = [len(request.token_ids) + len(_received(request, out)) for request, out in kept.values()]
                    self._confirm(list(zip(kept, lengths, strict=True)))
                    yield from kept.values()
                    kept = {}
        except (CaptureFailed, LeaseLost, RunBusy):
            raise
        except Exception as error:
            raise CaptureFailed(f"the engine failed: {self._reason(error)}") from error
        finally:
            left = [*waiting, *kept]
            if left:
                self._forget(left)

    def _add(self, request: _Request, parameters: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = request.asked
        nothing = asked.capture is None and not asked.intervene
        sampling = SamplingParams(
            max_tokens=max(request.max_new_tokens, 1),  # vLLM always draws one
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=None if nothing else {"millpond": asked.model_dump(mode="json", exclude_none=True)},
            **parameters,
        )
        self._ranks.add(request.request_id, request.token_ids, sampling, self._lora(request.adapter))

    @property
    def _room(self) -> int:
        """Requests that may wait in the engines."""
        return 4 * self.max_num_seqs * self._ranks.count

    def _lora(self, adapter: Adapter | None) -> Any:
        """The request for an adapter as vLLM takes it; None for none."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        folder = adapter.folder.resolve()
        number = self._adapter_numbers.setdefault(folder, len(self._adapter_numbers) + 1)
        return LoRARequest(f"{adapter.name}-{number}", number, str(folder))

    def _confirm(self, pairs: list[tuple[str, int]]) -> None:
        """Tell the worker of ended requests: the capture id of each, and how many tokens it has."""
        answers: dict[str, dict[str, Any]] = {}
        for answer in chain(*self._ranks.call("millpond_confirm", pairs)):
            answers |= answer
        for capture_id, _ in pairs:
            if capture_id not in answers:
                raise CaptureFailed(f"request {capture_id!r} never reached the worker")
            if answers[capture_id]["error"]:
                raise CaptureFailed(answers[capture_id]["error"])
        for answer in chain(*self._ranks.call("millpond_poll")):
            for reason in answer["failed"].values():
                raise CaptureFailed(reason)

    def _forget(self, capture_ids: list[str]) -> None:
        """Abort requests and let the worker drop what it kept of them; nothing if the engine is gone."""
        for capture_id in capture_ids:
            self._ranks.ended(capture_id)
        try:
            self._engine.abort_request(capture_ids)
            self._ranks.call("millpond_drop", capture_ids)
        except Exception:  # noqa: S110 - what ended the capture is already being raised
            pass

    def commit(self) -> tuple[int, int]:
        """Make everything captured durable and visible: rows and prompts since the last call.

        Raises:
            CaptureFailed: the lake could not be written.
        """
        first_workers = [answers[0] for answers in self._ranks.call("millpond_commit")]  # which write
        rows, prompts = (sum(counts) for counts in list(zip(*first_workers, strict=True))[:2])
        before, self._committed = self._committed, (rows, prompts)
        for _, _, problem in first_workers:
            if problem:
                raise CaptureFailed(problem)
        return rows - before[0], prompts - before[1]

    def tell_job(self, job: str) -> None:
        """Let the engine's processes write the id of the job that they work on into their logs.

        Raises:
            CaptureFailed: the engine died.
        """
        self._call("millpond_tell_job", job)

    def check_alive(self) -> None:
        """Check that the engine answers.

        Raises:
            CaptureFailed: it does not.
        """
        self._call("millpond_poll")

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            self._ranks.call(method, *arguments)
        except Exception as error:
            raise CaptureFailed(f"the engine died: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        return self._errors.cause() or with_remedy(one_line(error))

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown()
        self._errors.close()


def _received(request: _Request, output: Any) -> list[int]:
    """The tokens drawn for a request that asked for any."""
    return list(output.outputs[0].token_ids) if request.max_new_tokens else []
