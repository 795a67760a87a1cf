"""Uvicorn's HTTP protocol with one write a response: the meter charges each piece, and TLS wraps each in a record."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class _Joined:
    """A transport that holds what is written until the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send it, with all that follows at once."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        """Send what is held, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class OneWrite(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection whose head and body leave together."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See the base class."""
        super().connection_made(_Joined(transport))
