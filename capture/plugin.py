"""vLLM general plugin: what every engine process must know of captured and steered requests.

vLLM calls `register` in every one of its processes. It wraps a few methods; each wrap does nothing
for requests that ask nothing of Millpond.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from millpond.capture import lora_cpu, numba_names, offline, serving
from millpond.capture.engine_errors import note_errors
from millpond.capture.parent_watch import end_with_parent
from millpond.capture.versions import is_supported_vllm


def register() -> None:
    """Wrap vLLM's request handling, once a process.

    An unknown vLLM is left alone, since it may be serving something else; `TapWorker` refuses to start on it.
    """
    if not is_supported_vllm():
        return
    note_errors()
    end_with_parent()
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.request import Request

    _wrap(Request, "get_skip_reading_prefix_cache", _skip_reading)
    _wrap(EngineCore, "preprocess_add_request", _admit)
    _wrap(ParentRequest, "_get_child_sampling_params", _name_child)
    serving.install()
    offline.install()
    if current_platform.is_cpu():
        lora_cpu.repair()
        numba_names.repair()


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_millpond", False):
        return

    def wrapped(self: Any, *args: Any) -> Any:
        return around(original, self, *args)

    wrapped._millpond = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _asked(parameters: Any) -> Any:
    return (getattr(parameters, "extra_args", None) or {}).get("millpond")


def _skip_reading(original: Callable[..., bool], request: Any) -> bool:
    """A position whose keys and values come from the cache is not computed, so its activations would be missing."""
    if _asked(request.sampling_params) is not None:
        from millpond.store.capture_spec import read_request_args

        args = read_request_args(request.sampling_params.extra_args)
        if args is not None and args.capture is not None:
            return True
    return original(request)


def _admit(original: Callable[..., Any], core: Any, request: Any) -> Any:
    """Refuse what the engine cannot do, and keep the cache of edited computations apart.

    This runs in the engine's own process, so no client can forget it. What it raises fails this one request.
    """
    if "millpond" in (core.vllm_config.additional_config or {}):
        from millpond.store.capture_spec import check_argument_name

        check_argument_name(getattr(request.sampling_params, "extra_args", None))
    if _asked(request.sampling_params) is not None:
        from millpond.capture.admission import EngineFacts
        from millpond.store.capture_spec import read_request_args
        from millpond.store.errors import InvalidInput

        args = read_request_args(request.sampling_params.extra_args)
        if args is not None:
            facts = getattr(core, "_millpond_facts", None)
            if facts is None:
                facts = core._millpond_facts = EngineFacts.of(core.vllm_config)
            if request.prompt_token_ids is None:
                raise InvalidInput("prompt_embeds cannot be captured or intervened in; send tokens")
            if args.capture is not None and args.capture.id is None:
                raise InvalidInput("capture.id is missing; give each prompt its own id")
            facts.check(args, len(request.prompt_token_ids), request.sampling_params.max_tokens or 0)
            if args.salt is not None:
                request.cache_salt = f"{request.cache_salt or ''}\0{args.salt}"
    return original(core, request)


def _name_child(original: Callable[..., Any], parent: Any, index: int) -> Any:
    """Give each of the n samples of one request a capture id of its own, `<id>/<index>`."""
    asked = _asked(parent.sampling_params)
    if asked is None:
        return original(parent, index)
    from millpond.store.capture_spec import read_request_args

    parent.cached_child_sampling_params = None  # vLLM would give every child the same object
    child = copy(original(parent, index))
    args = read_request_args(child.extra_args)
    if args is not None and args.capture is not None and args.capture.id is not None:
        names = {
            "id": f"{args.capture.id}/{index}",
            "prompt": args.capture.prompt and f"{args.capture.prompt}/{index}",
        }
        named = args.model_copy(update={"capture": args.capture.model_copy(update=names)})
        child.extra_args = {**child.extra_args, "millpond": named.model_dump_json(exclude_none=True)}
    return child
