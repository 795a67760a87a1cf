"""Capture with vLLM's own `LLM` class: its requests are admitted like a server's, and confirmed as they finish.

`install` wraps three methods of the class, and the start of its engine; requests that ask nothing of Millpond pass through unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from copy import copy
from typing import Any

from millpond.capture.admission import EngineFacts
from millpond.capture.frontend import Admitted, CaptureFrontend
from millpond.capture.serving import served_facts, wrap_method
from millpond.store.capture_spec import check_argument_name
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.lake import open_lake

_CONFIRM_EVERY = 16  # requests a call to the workers


def install() -> None:
    """Wrap `LLM` where this process has imported it; doing it twice changes nothing."""
    module = sys.modules.get("vllm.entrypoints.common.offline")
    if module is None or getattr(module.OfflineInferenceMixin._add_request, "_millpond", False):
        return
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap_method(LLMEngine, "__init__", _start)
    for around in (_add_request, _render_and_add_requests, _run_engine):
        wrap_method(module.OfflineInferenceMixin, around.__name__, around)


class _Captures:
    """The captured requests of one `LLM`."""

    def __init__(self, llm: Any) -> None:
        served = served_facts(llm.llm_engine.vllm_config)
        if served is None:
            raise InvalidInput(
                "millpond: this LLM has no taps; give it worker_cls='millpond.capture.worker.TapWorker', "
                "async_scheduling=False and additional_config={'millpond': {'lake': ..., 'hooks': [...]}}"
            )
        self._rpc = llm.collective_rpc
        self.frontend = CaptureFrontend(*served, self._no_loop)
        self.pending: dict[str, Admitted] = {}
        """By vLLM's number of the request."""
        self._finished: list[tuple[Any, Admitted]] = []
        self._unconfirmed: list[tuple[str, int]] = []
        self._failed: dict[str, str] = {}
        self._rows: dict[str, int] = {}

    async def _no_loop(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        raise AssertionError(f"{method} is called without an event loop")

    def take(self, outputs: list[Any]) -> None:
        """Note what a step finished, and confirm it so that the worker lets go of its rows."""
        for output in outputs:
            admitted = self.pending.pop(output.request_id, None) if output.finished else None
            if admitted is None:
                continue
            self._finished.append((output, admitted))
            for sample in output.outputs:
                name = admitted.ids[sample.index]
                if sample.finish_reason in ("abort", "error"):
                    self._failed[name] = f"the engine ended it with {sample.finish_reason!r}"
                else:
                    self._unconfirmed.append((name, admitted.n_prompt + len(sample.token_ids)))
        if len(self._unconfirmed) >= _CONFIRM_EVERY:
            self._confirm()

    def _confirm(self) -> None:
        told: dict[str, Any] = {}
        for answer in self._rpc("millpond_confirm", args=(self._unconfirmed,)):
            told |= answer
        for name, _ in self._unconfirmed:
            answer = told.get(name, {"error": f"request {name!r} never reached a worker"})
            if answer["error"]:
                self._failed[name] = answer["error"]
        self._unconfirmed = []

    def settle(self) -> None:
        """Make everything that is finished durable, and say so in its outputs.

        Raises:
            CaptureFailed: rows of some requests could not be stored; those of the others are.
        """
        if not self._finished:
            return
        self._confirm()
        self._rpc("millpond_commit")
        for news in self._rpc("millpond_poll"):
            self._rows |= news["committed"]
            self._failed |= news["failed"]
        finished, self._finished = self._finished, []
        failures = [self._tell(output, admitted) for output, admitted in finished]
        lost = [failure for failure in failures if failure is not None]
        self._failed.clear()
        self._rows.clear()
        if lost:
            raise CaptureFailed(
                f"capture of {len(lost)} of {len(finished)} requests failed: {lost[0]}; the others are stored"
            )

    def _tell(self, output: Any, admitted: Admitted) -> str | None:
        """Put what was stored into an output; returns why it was not."""
        names = dict(zip(admitted.ids, admitted.prompts, strict=True))
        missing = [name for name in names if name not in self._rows]
        if missing:
            self.frontend.release(admitted, missing)
            return f"{names[missing[0]]!r}: {self._failed.get(missing[0], 'the worker did not commit it')}"
        rows = {names[name]: self._rows[name] for name in names}
        told = {"id": admitted.id, "run": admitted.run.spec.name, "status": "committed", "rows": sum(rows.values())}
        told |= {"samples": rows} if len(rows) > 1 else {}
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), "millpond": told}
        return None

    def forget(self, numbers: Collection[str]) -> None:
        """Let go of requests that will not finish."""
        left = [self.pending.pop(number) for number in numbers]
        if left:
            self._rpc("millpond_drop", args=([name for admitted in left for name in admitted.ids],))
        for admitted in left:
            self.frontend.release(admitted, admitted.ids)


def _start(original: Callable[..., None], engine: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """A setting that cannot be used ends the start here, in one line, and not in a worker that has loaded the model."""
    if "millpond" in (vllm_config.additional_config or {}):
        facts = EngineFacts.of(vllm_config)
        if facts.lake_url:
            open_lake(facts.lake_url, create=True)
    original(engine, vllm_config, *args, **kwargs)


def _add_request(original: Callable[..., str], llm: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
    extra = getattr(params, "extra_args", None) or {}
    if "millpond" in (llm.llm_engine.vllm_config.additional_config or {}):
        check_argument_name(extra)
    if "millpond" not in extra:
        return original(llm, prompt, params, *args, **kwargs)
    if getattr(llm, "_millpond_captures", None) is None:
        llm._millpond_captures = _Captures(llm)
    captures: _Captures = llm._millpond_captures
    lora = kwargs.get("lora_request")
    admitted = captures.frontend.admit(
        extra,
        n=params.n,
        max_tokens=params.max_tokens or 0,
        n_prompt=len(prompt["prompt_token_ids"]) if "prompt_token_ids" in prompt else None,
        adapter=None if lora is None else (lora.lora_name, lora.lora_path),
    )
    filled = admitted.extra if isinstance(admitted, Admitted) else admitted
    params = copy(params)  # one object may be given for many prompts
    params.extra_args = {**extra, "millpond": filled}
    try:
        request_id = original(llm, prompt, params, *args, **kwargs)
    except BaseException:
        if isinstance(admitted, Admitted):
            captures.frontend.release_unstarted(admitted)
        raise
    if isinstance(admitted, Admitted):
        captures.pending[request_id.rpartition("-")[0] or request_id] = admitted
    return request_id


def _render_and_add_requests(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> Any:
    """Where one request of a call is refused, vLLM aborts those before it."""
    before = getattr(getattr(llm, "_millpond_captures", None), "pending", {}).copy()
    try:
        return original(llm, *args, **kwargs)
    except BaseException:
        captures: _Captures | None = getattr(llm, "_millpond_captures", None)
        if captures is not None:
            captures.forget([number for number in captures.pending if number not in before])
        raise


def _run_engine(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> Any:
    captures: _Captures | None = getattr(llm, "_millpond_captures", None)
    if captures is None or not captures.pending:
        return original(llm, *args, **kwargs)
    engine = llm.llm_engine
    step = engine.step

    def noted() -> list[Any]:
        outputs: list[Any] = step()
        captures.take(outputs)
        return outputs

    engine.step = noted
    try:
        outputs = original(llm, *args, **kwargs)
        captures.settle()
        return outputs
    finally:
        engine.step = step
        captures.forget(list(captures.pending))
