"""An HTTP proxy in front of an S3 server that fails on purpose: 500s, slow replies, resets, lost replies."""

import random
import socket
import threading
from contextlib import suppress


class FaultProxy:
    """Forwards each request on a connection of its own; `faults` maps a kind to its probability."""

    def __init__(self, endpoint, faults=None, seed=0):
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self.target = (host, int(port))
        self.faults = faults or {}
        self.done = dict.fromkeys(("error", "reset", "slow", "lost"), 0)
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self):
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self):
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _pick(self):
        draw = self._random.random()
        for kind, share in self.faults.items():
            if draw < share:
                self.done[kind] += 1
                return kind
            draw -= share
        return None

    def _serve(self, client):
        with suppress(OSError), client:
            request = _message(client)
            kind = self._pick()
            if kind == "error":
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if kind == "reset":  # before the server has seen it
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                return
            if kind == "slow":
                self._closed.wait(1.0)
            with socket.create_connection(self.target) as server:
                head, mark, body = request.partition(b"\r\n\r\n")
                server.sendall(head + b"\r\nConnection: close" + mark + body)
                reply = b""
                while block := server.recv(1 << 16):
                    reply += block
            if kind == "lost":  # the server did it, the client never hears
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                return
            client.sendall(reply)


def _message(client):
    """One request: its head, and as many bytes as it announces."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = client.recv(1 << 16)
        if not block:
            raise OSError
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n" + body
