"""The meter as its users run it: a script in a process of its own."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

METER = Path(__file__).parents[2] / "hub" / "meter.py"
EVENT = 16  # what docs/gate.md says a chunk and an end cost


@contextmanager
def meter(folder, *, cap, rate=10**9, serve):
    """A running meter in front of a vault whose every connection is handed to `serve`."""
    path = folder / "vault.sock"
    path.unlink(missing_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as vault:
        vault.bind(str(path))
        vault.listen(64)
        threading.Thread(target=accept, args=(vault, serve), daemon=True).start()
        process = subprocess.Popen(
            [
                *(sys.executable, METER, "--listen", "127.0.0.1:0", "--to", f"unix:{path}"),
                *("--cap", str(cap), "--rate", str(rate), "--ledger", folder / "ledger"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"]},
        )
        try:
            line = process.stdout.readline()
            process.port = int(line.split(":")[2].split()[0]) if line else None
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def accept(vault, serve):
    while True:
        try:
            connection, _ = vault.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def connect(process):
    return socket.create_connection(("127.0.0.1", process.port), timeout=20)


def read_all(connection):
    received = bytearray()
    try:
        while data := connection.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def flood(connection):
    with closing(connection):
        try:
            while True:
                connection.sendall(b"x" * 10_000)
        except OSError:
            pass


def test_it_is_short_and_uses_the_standard_library_only():
    text = METER.read_text()
    assert len(text.splitlines()) <= 400
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    assert names <= set(sys.stdlib_module_names) | {"__future__"}


def test_bytes_pass_unchanged_both_ways_and_are_counted_with_framing(tmp_path):
    payload = os.urandom(3_000_000)

    def echo(connection):
        with closing(connection):
            while data := connection.recv(65_536):
                connection.sendall(data)

    with meter(tmp_path, cap=10_000_000, serve=echo) as process:
        with closing(connect(process)) as client:
            threading.Thread(
                target=lambda: (client.sendall(payload), client.shutdown(socket.SHUT_WR)), daemon=True
            ).start()
            assert read_all(client) == payload
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    counted = int((tmp_path / "ledger").read_text().split()[-1])
    assert len(payload) + 2 * EVENT <= counted  # at least one chunk and the end
    assert counted <= 1.05 * len(payload) + 10_000_000 // 256


@pytest.mark.parametrize("cap", [5_000, 1_000_003])
def test_never_a_byte_more_than_the_cap_leaves_and_it_stays_closed(tmp_path, cap):
    with meter(tmp_path, cap=cap, serve=flood) as process:
        total = 0
        while process.poll() is None and total <= cap:
            try:
                with closing(connect(process)) as client:
                    total += len(read_all(client))
            except OSError:
                break
        assert process.wait(10) == 3
    assert 0 < total <= cap
    with meter(tmp_path, cap=cap, serve=flood) as process:
        assert process.wait(10) == 3  # started again, it lets nothing out


def test_killed_at_any_moment_it_never_forgets_what_left(tmp_path):
    cap, total, starts = 100_000, 0, 0
    while starts < 40:
        with meter(tmp_path, cap=cap, serve=flood) as process:
            starts += 1
            if process.port is None:
                assert process.wait(10) == 3
                break
            with closing(connect(process)) as client:
                while len(data := client.recv(4096)) and len(data) < 10**6:
                    total += len(data)
                    if total % 7 < 3:
                        break
                process.kill()
                total += len(read_all(client))
    assert starts < 40
    assert 0 < total <= cap


def test_ends_of_connections_cost_too(tmp_path):
    """A vault that only hangs up says something with each hang-up."""
    with meter(tmp_path, cap=20 * EVENT, serve=lambda connection: connection.close()) as process:
        ends = 0
        while process.poll() is None and ends < 100:
            try:
                with closing(connect(process)) as client:
                    ends += read_all(client) == b""
            except OSError:
                break
        assert process.wait(10) == 3
    assert ends <= 22  # one was the closing itself, and one may have waited to be accepted


def test_what_a_vault_does_not_read_never_shows_at_the_client(tmp_path):
    """Back-pressure would be a channel that nobody counts."""
    release = threading.Event()
    with meter(tmp_path, cap=10_000_000, serve=lambda connection: release.wait(30)) as process:
        with closing(connect(process)) as client:
            client.settimeout(10)
            client.sendall(b"x" * (8 << 20))  # would block if the vault's pace reached us
        release.set()


def test_the_rate_is_kept(tmp_path):
    import time

    with meter(tmp_path, cap=10**9, rate=1_000_000, serve=flood) as process, closing(connect(process)) as client:
        started, received = time.monotonic(), 0
        while time.monotonic() - started < 2:
            received += len(client.recv(1 << 16))
    # two seconds' worth, one saved up, a chunk in debt, and what the kernel's buffers held
    assert 1_000_000 < received < 4_000_000


def test_two_meters_do_not_share_a_ledger_and_a_spoiled_one_is_refused(tmp_path):
    with meter(tmp_path, cap=10_000, serve=flood), meter(tmp_path, cap=10_000, serve=flood) as second:
        assert second.wait(10) == 1
        assert "another meter" in second.stderr.read()
    (tmp_path / "ledger").write_text("500\n400\n")
    with meter(tmp_path, cap=10_000, serve=flood) as third:
        assert third.wait(10) == 1
        assert "rising" in third.stderr.read()
    (tmp_path / "ledger").write_text("500\n90")  # a line cut short by a crash
    with meter(tmp_path, cap=10_000, serve=flood) as fourth:
        assert fourth.poll() is None
        assert (tmp_path / "ledger").read_text() == "500\n"
