"""Waiting until finished requests are durable: confirmed to the workers in batches, then polled for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from millpond.store.errors import CaptureFailed

Rpc = Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]]
"""Calls a method of every worker; returns their answers."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Stored:
    """A request that is durable."""

    rows: int
    engine: int
    """Data-parallel rank of the engine that wrote it."""


@dataclass
class _Waiting:
    done: asyncio.Future[Stored]
    n_tokens: int
    ranks: int = 0
    """Workers that keep rows of the request and have not committed them yet."""
    rows: int = 0
    engine: int = 0


@dataclass
class Settler:
    """A server's finished requests, from the client's last token to the lake.

    A worker answers for the requests it captures rows of, and leaves out the others: every worker that
    keeps a request must commit it. Other servers of the same engines ask for theirs, so news is asked for by name.
    """

    rpc: Rpc
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _new: list[str] = field(default_factory=list)
    _drops: list[str] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def settle(self, capture_id: str, n_tokens: int) -> Stored:
        """What was stored of a request of which the client received so many tokens, once it is durable.

        Raises:
            CaptureFailed: none of its rows are visible.
        """
        waiting = _Waiting(asyncio.get_running_loop().create_future(), n_tokens)
        self._waiting[capture_id] = waiting
        self._new.append(capture_id)
        self._start()
        return await asyncio.shield(waiting.done)

    def drop(self, capture_ids: Iterable[str]) -> None:
        """Let the workers forget aborted requests, soon."""
        self._drops += capture_ids
        self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting or self._drops:
                await self._step()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            for capture_id in list(self._waiting):
                self._fail(
                    capture_id,
                    f"the engine failed before it said whether the rows are durable; the run may hold them: {reason}",
                )
            self._drops.clear()

    async def _step(self) -> None:
        if self._drops:
            drops, self._drops = self._drops, []
            await self.rpc("millpond_drop", (drops,))
        if self._new:
            new, self._new = self._new, []
            pairs = [(capture_id, self._waiting[capture_id].n_tokens) for capture_id in new]
            self._take_confirmations(new, await self.rpc("millpond_confirm", (pairs,)))
        confirmed = [capture_id for capture_id in self._waiting if capture_id not in self._new]
        if confirmed and not self._take_commits(await self.rpc("millpond_poll", (confirmed,))):
            await asyncio.sleep(_POLL_SECONDS)

    def _take_confirmations(self, capture_ids: Sequence[str], answers: list[dict[str, dict[str, Any]]]) -> None:
        for capture_id in capture_ids:
            told = [answer[capture_id] for answer in answers if capture_id in answer]
            failed = [answer["error"] for answer in told if answer["status"] != "kept"]
            if failed or not told:
                self._fail(capture_id, failed[0] if failed else f"request {capture_id!r} never reached a worker")
            else:
                self._waiting[capture_id].ranks += len(told)
                self._waiting[capture_id].engine = told[0]["engine"]

    def _take_commits(self, answers: list[dict[str, dict[str, Any]]]) -> bool:
        """Whether there was any news."""
        news = False
        for answer in answers:
            for capture_id, rows in answer["committed"].items():
                news = True
                if (waiting := self._waiting.get(capture_id)) is not None:
                    waiting.ranks -= 1
                    waiting.rows = rows
            for capture_id, reason in answer["failed"].items():
                news = True
                self._fail(capture_id, reason)
        for capture_id in [name for name, waiting in self._waiting.items() if news and waiting.ranks == 0]:
            if capture_id not in self._new:
                waiting = self._waiting.pop(capture_id)
                waiting.done.set_result(Stored(waiting.rows, waiting.engine))
        return news

    def _fail(self, capture_id: str, reason: str) -> None:
        waiting = self._waiting.pop(capture_id, None)
        if capture_id in self._new:
            self._new.remove(capture_id)
        if waiting is not None and not waiting.done.done():
            waiting.done.set_exception(CaptureFailed(reason))
            waiting.done.exception()  # whoever waited may be gone
