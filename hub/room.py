"""Which requests are worked on at once: threads are shared between users, and large bodies do not fill the memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

THREADS = 12
"""Fewer than connections in the database's pool."""
THREADS_OF_ONE = 4
"""That one user's requests may hold; strangers together count as one."""
LARGE_AT_ONCE = 8
"""Large bodies (`serving.MAX_BULK`) that are held in memory at a time."""
LARGE_OF_ONE = 2
READ_SECONDS = 300.0
"""How long a body may take to arrive."""


class Room:
    """Further requests of a user wait for that user's earlier ones; others' pass them."""

    def __init__(self) -> None:
        self.threads = anyio.CapacityLimiter(THREADS)
        self.doors = anyio.CapacityLimiter(THREADS_OF_ONE)
        """For finding out who asks."""
        self._large = anyio.CapacityLimiter(LARGE_AT_ONCE)
        self._users: dict[str, tuple[anyio.CapacityLimiter, anyio.CapacityLimiter]] = {}

    @asynccontextmanager
    async def reading(self, user: str, *, large: bool) -> AsyncIterator[None]:
        """Room for a request's body until it is answered."""
        async with AsyncExitStack() as stack:
            if large:
                await stack.enter_async_context(self._of(user)[1])
                await stack.enter_async_context(self._large)
            yield

    def working(self, user: str) -> anyio.CapacityLimiter:
        """The user's share of the threads."""
        return self._of(user)[0]

    def _of(self, user: str) -> tuple[anyio.CapacityLimiter, anyio.CapacityLimiter]:
        if user not in self._users:
            self._users[user] = anyio.CapacityLimiter(THREADS_OF_ONE), anyio.CapacityLimiter(LARGE_OF_ONE)
        return self._users[user]
