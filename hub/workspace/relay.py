"""Relays byte streams between sockets: standard library only, since it also runs inside every workspace.

    python relay.py [--connections N] LISTEN=TARGET ... [-- COMMAND ...]

LISTEN is `fd:N` (a listening socket that was inherited) or `tcp:HOST:PORT`; TARGET is `unix:PATH` or `tcp:HOST:PORT`. With a
command the relay lives as long as the command, passes SIGTERM on to it and ends with its exit code; the descriptors named in
MILLPOND_PASS_FDS go to the command too. At most N connections are open at a time, further ones are closed at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys

CHUNK = 1 << 16


def address(text: str) -> tuple[str, str, int]:
    """`tcp:127.0.0.1:80` as ("tcp", "127.0.0.1", 80); `unix:/a` as ("unix", "/a", 0); `fd:5` as ("fd", "", 5)."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return kind, rest, 0
    if kind == "fd" and rest.isdigit():
        return kind, "", int(rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        return kind, host, int(port)
    raise SystemExit(f"relay: {text!r} is no address; give fd:N, unix:/PATH or tcp:HOST:PORT")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()


class Relay:
    """Passes every connection on to its target."""

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self._open = 0
        self._servers: list[asyncio.Server] = []

    async def listen(self, listen: str, target: str) -> None:
        """Start to serve one pair."""
        kind, host, port = address(listen)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(reader, writer, address(target))

        if kind == "fd":
            listener = socket.socket(fileno=port)
            listener.setblocking(False)
            start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
            self._servers.append(await start(serve, sock=listener))
        elif kind == "tcp":
            self._servers.append(await asyncio.start_server(serve, host, port))
        else:
            raise SystemExit(f"relay: cannot listen at {listen!r}; give fd:N or tcp:HOST:PORT")

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, str, int]
    ) -> None:
        if self._open >= self.connections:
            writer.transport.abort()
            return
        self._open += 1
        try:
            kind, host, port = target
            try:
                far_reader, far_writer = (
                    await asyncio.open_unix_connection(host)
                    if kind == "unix"
                    else await asyncio.open_connection(host, port)
                )
            except OSError:
                writer.transport.abort()
                return
            try:
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            finally:
                far_writer.close()
                writer.close()
        finally:
            self._open -= 1


async def _main() -> int:
    parser = argparse.ArgumentParser(description="Relay connections.")
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("pairs", nargs="+", metavar="LISTEN=TARGET")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    relay = Relay(arguments.connections)
    for pair in arguments.pairs:
        listen, _, target = pair.partition("=")
        await relay.listen(listen, target)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    if not command:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await stopped.wait()
        return 0
    pass_fds = [int(text) for text in os.environ.pop("MILLPOND_PASS_FDS", "").split(",") if text]
    child = await asyncio.create_subprocess_exec(*command, pass_fds=pass_fds)
    for descriptor in pass_fds:
        os.close(descriptor)  # so that its reader sees the end when the command closes it
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, child.terminate)
    code = await child.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
