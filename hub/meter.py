#!/usr/bin/env python3
r"""The egress meter: relays TCP connections into the vault, counts every byte that comes out, and closes at a cap.

It is a program of its own: standard library only, imports nothing of Millpond, takes no commands from anywhere. Run it
as a user of its own, in a network namespace of its own, with the ledger in a folder that only this user may enter; the
vault's namespace gets no other way out. docs/gate.md gives the set-up.

    python3 meter.py --listen 10.0.0.2:443 --to unix:/run/millpond/gateway.sock \
        --ledger /var/lib/millpond-meter/ledger --cap 400000000 --rate 2000000

Counting. A chunk read from the vault costs its length and 16 bytes, and so does the end of a connection that the vault
brought about: a pattern of m such events, each at one of 2**50 nanoseconds, on one of 2**10 connections, with one of
2**18 lengths, carries less than 128 bits an event beside the chunk's own bytes. What the vault does to a client's bytes on
their way in shows nowhere: they are always taken at once, and too many of them end the connection.

The ledger is a text file, one number a line: bytes that may have left so far. The meter adds a block to it, durably, before
it sends the first byte of the block, so that after a crash it counts too many and never too few. A clean end adds nothing.

Exit codes: 0 stopped by a signal, 2 wrong arguments or ledger, 3 the cap is reached (also when started again).
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import selectors
import signal
import socket
import sys
import time

EVENT_BYTES = 16
CHUNK = 1 << 18
MAX_INBOUND = 16 << 20
MAX_ALL_INBOUND = 256 << 20
MAX_CONNECTIONS = 512


class CapReached(Exception):
    """The next byte would be one too many."""


class Ledger:
    """Bytes that may have left, on disk before they leave."""

    def __init__(self, path: str, cap: int) -> None:
        self.cap = cap
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"meter: another meter holds {path}") from None
        with open(path, "rb") as handle:
            data = handle.read()
        lines = data.split(b"\n")
        torn = lines.pop()  # a line cut short by a crash: nothing of its block had left
        values = [int(line) if line.isdigit() else -1 for line in lines]
        if any(after <= before for before, after in zip([-1, *values], values)):  # noqa: B905 - one is longer
            raise SystemExit(f"meter: {path} is not a ledger of rising numbers; restore it, or count by hand what left")
        if torn:
            os.truncate(path, len(data) - len(torn))
        self.reserved = values[-1] if values else 0
        """On disk."""
        self.left = 0
        """Of the last block."""
        self.spent = self.reserved
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def block(self, count: int) -> int:
        """How much to reserve for `count` bytes: a 256th of the cap, within bounds, but not beyond the cap."""
        return min(max(count, min(max(self.cap // 256, 1 << 12), 8 << 20)), self.cap - self.reserved)

    def spend(self, count: int) -> None:
        """Count `count` bytes; when this returns they may leave."""
        if self.spent + count > self.cap:
            self._reserve(self.cap - self.reserved)  # closed for good
            raise CapReached
        if count > self.left:
            self._reserve(self.block(count - self.left))
        self.left -= count
        self.spent += count

    def _reserve(self, block: int) -> None:
        if not block:
            return
        line = b"%d\n" % (self.reserved + block)
        if os.write(self._file, line) != len(line):
            raise SystemExit("meter: the ledger's disk is full")
        os.fdatasync(self._file)
        self.reserved += block
        self.left += block


class Bucket:
    """Bytes a second, with up to a second's worth saved up."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._tokens = rate
        self._last = time.monotonic()

    def wait(self) -> float:
        """Seconds until something may leave."""
        now = time.monotonic()
        self._tokens = min(self.rate, self._tokens + (now - self._last) * self.rate)
        self._last = now
        return max(0.0, -self._tokens / self.rate)

    def take(self, count: int) -> None:
        """Bytes have left; the debt is waited for before the next."""
        self._tokens -= count


class Pipe:
    """A client's connection and the vault's, and the bytes that one of them has not taken yet."""

    def __init__(self, client: socket.socket, vault: socket.socket) -> None:
        self.client, self.vault = client, vault
        self.inward, self.outward = bytearray(), memoryview(b"")
        self.connected = False
        self.client_ended = self.vault_ended = self.told_vault = False


class Meter:
    """The relay: one thread, so that counting and sending cannot interleave."""

    def __init__(self, listener: socket.socket, target: str, ledger: Ledger, bucket: Bucket) -> None:
        self.listener, self.target, self.ledger, self.bucket = listener, target, ledger, bucket
        self.poll = selectors.DefaultSelector()
        self.pipes: set[Pipe] = set()
        self.buffer = memoryview(bytearray(CHUNK))
        self.stopped = False
        self.poll.register(listener, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Relay until the cap is reached (CapReached) or a signal comes."""
        while not self.stopped:
            wait = self.bucket.wait()
            for pipe in self.pipes:
                self._watch(pipe, paused=wait > 0)
            for key, events in self.poll.select(min(wait, 0.05) if wait else 1.0):
                if key.data is None:
                    self._accept()
                elif key.data in self.pipes:
                    self._serve(key.data, key.fileobj, events)

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        if len(self.pipes) >= MAX_CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        try:
            self.pipes.add(Pipe(client, _dial(self.target)))
        except OSError:  # the vault's doing, so it costs
            client.close()
            self.ledger.spend(EVENT_BYTES)

    def _watch(self, pipe: Pipe, paused: bool) -> None:
        """Say which events matter for both ends of `pipe`."""
        client = selectors.EVENT_READ * (not pipe.client_ended) | selectors.EVENT_WRITE * bool(pipe.outward)
        may_read = pipe.connected and not (paused or pipe.outward or pipe.vault_ended)
        vault = selectors.EVENT_READ * may_read | selectors.EVENT_WRITE * (bool(pipe.inward) or not pipe.connected)
        for end, events in ((pipe.client, client), (pipe.vault, vault)):
            known = self.poll.get_map().get(end.fileno())
            if known is None:
                if events:
                    self.poll.register(end, events, pipe)
            elif not events:
                self.poll.unregister(end)
            elif known.events != events:
                self.poll.modify(end, events, pipe)

    def _serve(self, pipe: Pipe, end: object, events: int) -> None:
        try:
            if end is pipe.client:
                if events & selectors.EVENT_READ:
                    self._take_from_client(pipe)
                if events & selectors.EVENT_WRITE and pipe in self.pipes:
                    self._give_to_client(pipe)
            else:
                if events & selectors.EVENT_WRITE:
                    self._give_to_vault(pipe)
                if events & selectors.EVENT_READ and pipe in self.pipes:
                    self._take_from_vault(pipe)
        except BlockingIOError:
            return
        except OSError:
            self._close(pipe, by_vault=end is pipe.vault)

    def _take_from_client(self, pipe: Pipe) -> None:
        count = pipe.client.recv_into(self.buffer)
        if count:
            pipe.inward += self.buffer[:count]
            if len(pipe.inward) > MAX_INBOUND or sum(len(p.inward) for p in self.pipes) > MAX_ALL_INBOUND:
                self._close(pipe, by_vault=True)  # it did not take them
            return
        pipe.client_ended = True
        self._pass_end(pipe)

    def _give_to_vault(self, pipe: Pipe) -> None:
        if not pipe.connected:
            error = pipe.vault.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "the vault refused")
            pipe.connected = True
        if pipe.inward:
            sent = pipe.vault.send(pipe.inward[:CHUNK])
            del pipe.inward[:sent]
        self._pass_end(pipe)

    def _pass_end(self, pipe: Pipe) -> None:
        if pipe.client_ended and pipe.connected and not pipe.inward and not pipe.told_vault:
            pipe.told_vault = True
            pipe.vault.shutdown(socket.SHUT_WR)

    def _take_from_vault(self, pipe: Pipe) -> None:
        room = self.ledger.cap - self.ledger.spent - EVENT_BYTES
        if room <= 0:
            self.ledger.spend(1 + EVENT_BYTES)  # says that the cap is reached
        count = pipe.vault.recv_into(self.buffer[: min(CHUNK, room)])
        if not count:
            pipe.vault_ended = True
            if not pipe.outward:
                self._close(pipe, by_vault=True)
            return
        self.ledger.spend(count + EVENT_BYTES)  # before the first of them is sent
        self.bucket.take(count + EVENT_BYTES)
        sent = 0
        try:
            sent = pipe.client.send(self.buffer[:count])
        except BlockingIOError:
            pass
        except OSError:
            self._close(pipe, by_vault=False)
            return
        if sent < count:
            pipe.outward = memoryview(bytes(self.buffer[sent:count]))

    def _give_to_client(self, pipe: Pipe) -> None:
        if pipe.outward:
            pipe.outward = pipe.outward[pipe.client.send(pipe.outward) :]
        if pipe.vault_ended and not pipe.outward:
            self._close(pipe, by_vault=True)

    def _close(self, pipe: Pipe, by_vault: bool) -> None:
        if by_vault:
            self.ledger.spend(EVENT_BYTES)
        self.pipes.discard(pipe)
        for end in (pipe.client, pipe.vault):
            if end.fileno() in self.poll.get_map():
                self.poll.unregister(end)
            end.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _dial(target: str) -> socket.socket:
    """A connection to the vault, perhaps not yet made."""
    where: str | tuple[str, int]
    if target.startswith("unix:"):
        vault, where = socket.socket(socket.AF_UNIX), target[5:]
    else:
        host, port = _address(target)
        vault, where = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET), (host, port)
    vault.setblocking(False)
    error = vault.connect_ex(where)
    if error not in (0, errno.EINPROGRESS):
        vault.close()
        raise OSError(error, "the vault refused")
    return vault


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main() -> int:
    """Run the meter; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where clients connect")
    parser.add_argument("--to", required=True, metavar="unix:PATH|HOST:PORT", help="where the gateway listens")
    parser.add_argument("--ledger", required=True, metavar="FILE")
    parser.add_argument(
        "--cap", required=True, type=_whole, metavar="BYTES", help="that may leave for ever, by this ledger"
    )
    parser.add_argument("--rate", default=10_000_000, type=_whole, metavar="BYTES", help="that may leave a second")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    host, port = _address(arguments.listen)
    ledger = Ledger(arguments.ledger, arguments.cap)
    if ledger.spent + EVENT_BYTES >= ledger.cap:
        print(f"meter: the cap of {ledger.cap} bytes is reached", file=sys.stderr)
        return 3
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=128) as listener:
        listener.setblocking(False)
        meter = Meter(listener, arguments.to, ledger, Bucket(float(arguments.rate)))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(meter, "stopped", True))
        where = listener.getsockname()
        print(f"meter: {where[0]}:{where[1]} to {arguments.to}, {ledger.spent} of {ledger.cap} bytes spent", flush=True)
        try:
            meter.run()
        except CapReached:
            print(f"meter: closed; the cap of {ledger.cap} bytes is reached", file=sys.stderr)
            return 3
        finally:
            for pipe in list(meter.pipes):
                pipe.client.close()
                pipe.vault.close()
        print(f"meter: stopped, {ledger.spent} of {ledger.cap} bytes spent", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
