"""The data-parallel engines behind one `LLMEngine`: a request goes to the one with the fewest, a call to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DataParallelEngines:
    """Engines of a dense model, which know nothing of each other.

    vLLM's `LLMEngine` starts all of them and takes in what any of them sends, but sends to the first alone. Whom it sends to is
    an attribute of its client, which is set here before every call.

    Args:
        engine: vLLM's, with an engine process or several.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._client = engine.engine_core
        # they have no names where vLLM is told to run the one engine in this process
        self._names: list[bytes] = getattr(self._client, "core_engines", [b""])
        self._requests: dict[str, int] = {}
        abort = self._client.abort_requests

        def abort_everywhere(request_ids: list[str]) -> None:
            for rank in range(self.count):
                self._turn_to(rank)
                abort(request_ids)

        self._client.abort_requests = abort_everywhere  # a stop string ends a request in the middle of vLLM's own step

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._names)

    def add(self, request_id: str, tokens: Sequence[int], parameters: Any, lora: Any) -> None:
        """Send a request to the engine with the fewest."""
        load = [0] * self.count
        for rank in self._requests.values():
            load[rank] += 1
        rank = self._requests[request_id] = load.index(min(load))
        self._turn_to(rank)
        self._engine.add_request(request_id, {"prompt_token_ids": tokens}, parameters, lora_request=lora)

    def ended(self, request_id: str) -> None:
        """The request has all its tokens, or was aborted."""
        self._requests.pop(request_id, None)

    def call(self, method: str, *arguments: Any) -> list[list[Any]]:
        """What the workers of each engine answer."""
        answers = []
        for rank in range(self.count):
            self._turn_to(rank)
            answers.append(self._engine.collective_rpc(method, args=arguments))
        return answers

    def _turn_to(self, rank: int) -> None:
        self._client.core_engine = self._names[rank]
