"""Capture in vLLM's API server: admission, confirmation and what responses say.

`install` wraps a few methods in the process that talks to clients; no installed file is touched. Requests
that ask nothing of Millpond pass through unchanged.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from millpond.capture.admission import EngineFacts
from millpond.capture.engine_checks import check_engine
from millpond.capture.frontend import Admitted, CaptureFrontend
from millpond.capture.metrics import offer_to_prometheus
from millpond.capture.provenance import model_provenance
from millpond.store.errors import CaptureFailed, InvalidInput, StorageFailed
from millpond.store.lake import open_lake

_PATIENCE_SECONDS = 15.0  # requests are admitted one after the other, and every client waits meanwhile


def install() -> None:
    """Wrap vLLM's asynchronous engine and, where one is made, its OpenAI endpoints; doing it twice changes nothing."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if not getattr(AsyncLLM.generate, "_millpond", False):
        wrap_method(AsyncLLM, "__init__", _build_frontend)
        wrap_method(AsyncLLM, "generate", _generate)


def _install_endpoints() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    if getattr(OpenAIServingChat.chat_completion_stream_generator, "_millpond", False):
        return
    for request in (CompletionRequest, ChatCompletionRequest):
        wrap_method(request, "to_beam_search_params", _refuse_beams)
    wrap_method(OpenAIServingCompletion, "completion_stream_generator", _stream_completion)
    wrap_method(OpenAIServingCompletion, "request_output_to_completion_response", _completion_response)
    wrap_method(OpenAIServingChat, "chat_completion_stream_generator", _stream_chat)


def wrap_method(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    method._millpond = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def served_facts(vllm_config: Any) -> tuple[EngineFacts, dict[str, Any]] | None:
    """What an engine taps and the provenance of its model; None if it was not set up to capture.

    Raises:
        InvalidInput: it was, but a setting cannot be used.
    """
    if "millpond" not in (vllm_config.additional_config or {}):
        return None
    facts = EngineFacts.of(vllm_config)
    check_engine(vllm_config, on_device=facts.on_device)
    folder = Path(vllm_config.model_config.model)
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"model {str(folder)!r} is no local folder; every run records its hashes: download it and serve its folder"
        )
    if facts.lake_url:
        open_lake(facts.lake_url, create=True)
    facts = replace(facts, patience_seconds=_PATIENCE_SECONDS)
    return facts, model_provenance(folder)


def _build_frontend(original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    served = served_facts(vllm_config)  # before the engine starts: a bad setting ends the start
    _install_endpoints()
    original(self, vllm_config, *args, **kwargs)

    async def rpc(method: str, arguments: tuple[Any, ...]) -> list[Any]:
        # vLLM's own `collective_rpc` asks all data-parallel engines and returns the answers of the first
        engines = await self.engine_core.call_utility_all_async("collective_rpc", method, None, arguments, None)
        return [answer for answers in engines for answer in answers]

    if served is not None:
        self._millpond_frontend = CaptureFrontend(*served, rpc, len(self.engine_core.core_engines))
        offer_to_prometheus()
    else:
        self._millpond_frontend = None


def _generate(
    original: Callable[..., Any], self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Not a coroutine: what is refused here is refused before a streaming response begins."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    if "millpond" not in extra:
        return original(self, prompt, sampling_params, *args, **kwargs)
    from vllm.sampling_params import RequestOutputKind

    frontend: CaptureFrontend | None = self._millpond_frontend
    lora = kwargs.get("lora_request")
    try:
        if frontend is None:
            raise InvalidInput("millpond: this server does not capture; start it with millpond serve")
        admitted = frontend.admit(
            extra,
            n=sampling_params.n,
            max_tokens=sampling_params.max_tokens or 0,
            n_prompt=len(prompt["prompt_token_ids"])
            if isinstance(prompt, dict) and "prompt_token_ids" in prompt
            else None,
            adapter=None if lora is None else (lora.lora_name, lora.lora_path),
        )
    except InvalidInput as error:
        raise _refusal(error) from error
    except StorageFailed as error:
        raise _failure(f"capture failed: the lake cannot be used: {error.strerror}") from error
    filled = admitted.extra if isinstance(admitted, Admitted) else admitted
    # the request's arguments are shared by all its prompts: never change them in place
    sampling_params.extra_args = {**extra, "millpond": filled}
    if isinstance(admitted, Admitted) and (engine := frontend.engine_of(admitted)) is not None:
        if kwargs.get("data_parallel_rank", engine) not in (None, engine):
            frontend.release_unstarted(admitted)
            raise _refusal(
                InvalidInput("millpond.capture.id: its engine follows from it; leave X-data-parallel-rank out")
            )
        kwargs["data_parallel_rank"] = engine
    outputs = original(self, prompt, sampling_params, *args, **kwargs)
    if not isinstance(admitted, Admitted):
        return outputs
    deltas = sampling_params.output_kind == RequestOutputKind.DELTA
    followed = _in_vllms_words(admitted, frontend.follow(admitted, outputs, deltas=deltas))
    weakref.finalize(followed, frontend.release_unstarted, admitted)
    return followed


async def _in_vllms_words(admitted: Admitted, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        async with aclosing(outputs) as stream:
            async for output in stream:
                yield output
    except CaptureFailed as error:
        raise _failure(str(error)) from error
    except (EngineDeadError, EngineGenerateError) as error:
        failure = type(error)()  # vLLM gives all requests one object, and ends the server where it sees this class
        failure.args = (f"{admitted.failed}, and nothing of it is stored: {error}",)
        raise failure from error


def _failure(reason: str) -> Exception:
    from vllm.exceptions import VLLMServerError

    failure: Exception = VLLMServerError(reason)
    return failure


def _refusal(error: InvalidInput) -> Exception:
    from vllm.exceptions import VLLMValidationError

    refusal: Exception = VLLMValidationError(str(error))
    return refusal


def _refuse_beams(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if "millpond" in (self.vllm_xargs or {}):
        raise _refusal(InvalidInput("millpond: cannot be combined with use_beam_search; sample instead"))
    return original(self, *args, **kwargs)


class _Noted:
    """Remembers what the frontend said at the end of each prompt while its outputs pass by."""

    def __init__(self) -> None:
        self.told: dict[int, Any] = {}

    def note(self, number: int, output: Any) -> None:
        told = (output.kv_transfer_params or {}).get("millpond")
        if told is not None:
            self.told[number] = told

    def params(self) -> dict[str, Any]:
        told = [self.told[number] for number in sorted(self.told)]
        return {"kv_transfer_params": {"millpond": told[0] if len(told) == 1 else {"prompts": told}}}


async def _with_last_event(events: AsyncGenerator[str, None], noted: _Noted, **chunk: Any) -> AsyncGenerator[str, None]:
    """A stream's events, and before its end one chunk without choices that says what was captured."""
    async with aclosing(events) as stream:
        async for event in stream:
            if event == "data: [DONE]\n\n" and noted.told:
                yield f"data: {json.dumps({**chunk, 'choices': [], **noted.params()})}\n\n"
            yield event


def _stream_completion(
    original: Callable[..., AsyncGenerator[str, None]],
    self: Any,
    request: Any,
    engine_inputs: Any,
    result_generator: AsyncIterator[tuple[int, Any]],
    request_id: str,
    created_time: int,
    model_name: str,
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[str, None]:
    noted = _Noted()

    async def listen() -> AsyncIterator[tuple[int, Any]]:
        async for number, output in result_generator:
            noted.note(number, output)
            yield number, output

    events = original(self, request, engine_inputs, listen(), request_id, created_time, model_name, *args, **kwargs)
    return _with_last_event(
        events, noted, id=request_id, object="text_completion", created=created_time, model=model_name
    )


def _stream_chat(
    original: Callable[..., AsyncGenerator[str, None]],
    self: Any,
    request: Any,
    result_generator: AsyncIterator[Any],
    request_id: str,
    model_name: str,
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[str, None]:
    noted = _Noted()

    async def listen() -> AsyncIterator[Any]:
        async for output in result_generator:
            noted.note(0, output)
            yield output

    events = original(self, request, listen(), request_id, model_name, *args, **kwargs)
    return _with_last_event(
        events, noted, id=request_id, object="chat.completion.chunk", created=int(time.time()), model=model_name
    )


def _completion_response(original: Callable[..., Any], self: Any, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Say it of every prompt: vLLM answers with the first prompt's parameters only."""
    response = original(self, outputs, *args, **kwargs)
    noted = _Noted()
    for number, output in enumerate(outputs):
        noted.note(number, output)
    if noted.told:
        response.kv_transfer_params = noted.params()["kv_transfer_params"]
    return response
