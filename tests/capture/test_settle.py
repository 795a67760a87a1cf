"""Waiting for rows of an engine with several workers: a request is stored when every worker that keeps it says so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millpond.capture.settle import Settler, Stored
from millpond.store.errors import CaptureFailed


class Workers:
    """Scripted answers of two workers, such as two pipeline stages."""

    def __init__(self, confirm: list[dict[str, str | None]], polls: list[list[dict[str, dict[str, Any]]]]) -> None:
        self.confirm = confirm
        self.polls = polls
        self.calls: list[tuple[str, Any]] = []

    async def __call__(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, *arguments))
        await asyncio.sleep(0)
        if method == "millpond_confirm":
            asked = {capture_id for capture_id, _ in arguments[0]}
            return [
                {
                    capture_id: {"status": "failed" if error else "kept", "rows": 3, "error": error, "engine": rank}
                    for capture_id, error in worker.items()
                    if capture_id in asked
                }
                for rank, worker in enumerate(self.confirm)
            ]
        if method == "millpond_poll":
            if not self.polls:
                raise RuntimeError("the engine is gone")
            return self.polls.pop(0)
        return [None, None]


def news(committed: dict[str, int] | None = None, failed: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    return {"committed": committed or {}, "failed": failed or {}}


def settle(workers: Workers, *capture_ids: str) -> list[Any]:
    async def run() -> list[Any]:
        settler = Settler(workers)
        return await asyncio.gather(*(settler.settle(name, 4) for name in capture_ids), return_exceptions=True)

    return asyncio.run(run())


def test_every_worker_that_keeps_a_request_must_commit_it() -> None:
    polls = [[news({"a": 3}), news()], [news({"b": 3}), news()], [news(), news({"a": 3})], [news(), news({"b": 3})]]
    workers = Workers([{"a": None, "b": None}, {"a": None, "b": None}], polls)
    assert [stored.rows for stored in settle(workers, "a", "b")] == [3, 3]
    assert workers.calls[0] == ("millpond_confirm", [("a", 4), ("b", 4)])  # one call for both
    assert polls == []  # a waited for the second worker
    polled = [names for method, *(names,) in workers.calls if method == "millpond_poll"]
    assert polled[0] == ["a", "b"]  # by name: other servers poll the same workers
    assert polled[-1] == ["b"]


def test_a_worker_without_rows_of_the_request_is_not_waited_for() -> None:
    assert settle(Workers([{"a": None}, {}], [[news({"a": 3}), news()]]), "a") == [Stored(3, engine=0)]
    assert settle(Workers([{}, {"a": None}], [[news(), news({"a": 3})]]), "a") == [Stored(3, engine=1)]


@pytest.mark.parametrize(
    ("confirm", "polls", "reason"),
    [
        ([{"a": None}, {"a": "a position is missing"}], [], "a position is missing"),
        ([{}, {}], [], "never reached"),
        ([{"a": None}, {"a": None}], [[news({"a": 3}), news(failed={"a": "disk full"})]], "disk full"),
        ([{"a": None}, {"a": None}], [], "the engine is gone"),
    ],
)
def test_a_request_fails_with_the_first_worker_that_does(
    confirm: list[dict[str, str | None]], polls: list[Any], reason: str
) -> None:
    (found,) = settle(Workers(confirm, polls), "a")
    assert isinstance(found, CaptureFailed)
    assert reason in str(found)


def test_dropped_requests_are_forgotten_before_others_are_confirmed() -> None:
    workers = Workers([{"a": None}], [[news({"a": 3})]])

    async def run() -> Stored:
        settler = Settler(workers)
        settler.drop(["gone"])
        return await settler.settle("a", 4)

    assert asyncio.run(run()).rows == 3
    assert [call[0] for call in workers.calls] == ["millpond_drop", "millpond_confirm", "millpond_poll"]
