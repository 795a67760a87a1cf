"""Attempts to leave a workspace, executed in a kernel of a server that JupyterHub spawned. docs/workspace.md has the table.

Every attempt is a piece of Python that prints WON when it got what it wanted. What it is after is really there: the victims
below are checked from the outside first, so that an attempt cannot fail for want of a target.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import SECRET

pytestmark = pytest.mark.slow

HELP = '''
import ctypes, errno, json, os, signal, socket, struct, subprocess, sys, time, urllib.error, urllib.request
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    """A system call that should be refused; WON when it is not."""
    ctypes.set_errno(0)
    result = libc.syscall(number, *arguments)
    print("WON" if result != -1 else "refused: " + errno.errorcode[ctypes.get_errno()])
def connect(host, port):
    """A TCP connection; WON when somebody answers."""
    try:
        socket.create_connection((host, port), 3).close(); print("WON")
    except OSError as error: print("refused:", error)
def read(path):
    try: print("WON" if open(path, "rb").read(1 << 16) else "empty")
    except OSError as error: print("refused:", error)
def write(path, data=b"x"):
    try:
        with open(path, "wb", buffering=0) as handle: handle.write(data)
        print("WON")
    except OSError as error: print("refused:", error)
def hub(method, path, body=None):
    """The hub's API with the notebook's token; WON unless it says no."""
    request = urllib.request.Request(os.environ["JUPYTERHUB_API_URL"] + path, method=method, data=json.dumps(body or {}).encode() if method != "GET" else None,
        headers={"Authorization": "token " + os.environ["JUPYTERHUB_API_TOKEN"], "Content-Type": "application/json"})
    try: print("WON", urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as error: print("WON" if error.code < 400 else f"refused: {error.code}")
'''


@pytest.fixture(scope="module")
def victims(front, bob, tmp_path_factory):
    """What attempts are after: a readable lake, bob's notebook, listening services, a host process, an abstract socket."""
    lake = Path("/tmp") / f"mpt-lake-{os.getpid()}"
    lake.mkdir(mode=0o755)
    (lake / "rows").write_text(SECRET)
    (lake / "rows").chmod(0o644)
    kernel = front.do(bob.kernel())
    front.do(bob.run(kernel, f"open('secret.txt', 'w').write({SECRET!r})"))
    service = socket.create_server(("0.0.0.0", 0), backlog=64)
    hidden = socket.socket(socket.AF_UNIX)
    hidden.bind(f"\0mpt-{os.getpid()}")
    hidden.listen(16)
    sleeper = subprocess.Popen(["setpriv", "--reuid", "53100", "--clear-groups", "sleep", "600"], cwd="/")
    outside = socket.gethostbyname(socket.gethostname())
    found = {
        "LAKE": str(lake / "rows"),
        "BOB": str(front.settings.state / "homes" / "bob.img"),
        "BOB_HOME": str(front.run_folder / "homes" / "bob" / "secret.txt"),
        "STATE": str(front.settings.state),
        "RUN": str(front.run_folder),
        "PORT": service.getsockname()[1],
        "PUBLIC": int(front.settings.listen.rpartition(":")[2]),
        "METER": int(front.settings.gateway.rpartition(":")[2]),
        "HOST": outside,
        "PID": sleeper.pid,
        "ABSTRACT": f"\0mpt-{os.getpid()}",
    }
    socket.create_connection(("127.0.0.1", found["PORT"]), 3).close()
    probe = ["setpriv", "--reuid", "65534", "--clear-groups", "cat", found["LAKE"]]
    assert subprocess.run(probe, capture_output=True, text=True, check=True).stdout == SECRET
    yield found
    sleeper.kill()
    sleeper.wait()
    service.close()
    hidden.close()
    (lake / "rows").unlink()
    lake.rmdir()


ATTEMPTS = {
    # files
    "read the lake": "read(LAKE)",
    "read another home's image": "read(BOB)",
    "read another home": "read(BOB_HOME)",
    "list other homes": "print('WON' if os.listdir('/home') != ['ada'] else 'only mine')",
    "read the hub's database": "read(STATE + '/hub/jupyterhub.sqlite')",
    "read the hub's cookie secret": "read(STATE + '/hub/cookie_secret')",
    "read through another process's root": "read('/proc/1/root' + LAKE)",
    "read the system's shadow file": "read('/etc/shadow')",
    "read kernel memory": "read('/proc/kcore'); read('/dev/mem'); read('/dev/kmsg'); read('/dev/vda'); read('/dev/loop0')",
    "make a device node": "call({'x86_64': 133, 'aarch64': 33}[os.uname().machine], *((b'/tmp/d', 0o60666, 7 << 8) if os.uname().machine == 'x86_64' else (-100, b'/tmp/d', 0o60666, 7 << 8)))",
    "write the trusted configuration": "write('/etc/jupyter/jupyter_server_config.py'); write('/etc/jupyter/labconfig/page_config.json')",
    "write the environment": "write(sys.prefix + '/lib/x.py'); write('/usr/bin/x')",
    "open a file by its handle": "call({'x86_64': 304, 'aarch64': 265}[os.uname().machine], -100, 0, 0)",
    "hard-link out of the home": "\ntry: os.link('/etc/passwd', 'x'); print('WON')\nexcept OSError as error: print('refused:', error)",
    # processes
    "see host processes": "print('WON' if len([p for p in os.listdir('/proc') if p.isdigit()]) > 12 or os.path.exists(f'/proc/{PID}/cmdline') and b'sleep' in open(f'/proc/{PID}/cmdline', 'rb').read() else 'only mine')",
    "signal a process of the same number outside": "\ntry: os.kill(PID, 9); print('WON')\nexcept OSError as error: print('refused:', error)",
    "read init's environment": "read('/proc/1/environ')",
    "write init's memory": "\ntry: os.open('/proc/1/mem', os.O_RDWR); print('WON')\nexcept OSError as error: print('refused:', error)",
    "trace a process": "call({'x86_64': 101, 'aarch64': 117}[os.uname().machine], 16, os.getppid(), 0, 0)",
    "read a process's memory": "call({'x86_64': 310, 'aarch64': 270}[os.uname().machine], os.getppid(), 0, 0, 0, 0, 0)",
    "take another process's descriptor": "call(438, os.pidfd_open(os.getppid()), 0, 0)",
    "protect myself from the memory killer": "write('/proc/self/oom_score_adj', b'-500')",
    # environment
    "find secrets in the environment": "print('WON' if any(w in (k + v).upper() for k, v in os.environ.items() for w in ('AWS_', 'POSTGRES', 'SECRET', 'PASSWORD', 'GATEWAY_TOKEN')) else 'none')",
    "inherit descriptors": "print('WON' if [f for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}') and os.readlink(f'/proc/self/fd/{f}').startswith('/') and not os.readlink(f'/proc/self/fd/{f}').startswith(('/dev/', '/proc/', '/home/ada', '/tmp', os.path.dirname(sys.prefix)))] else 'none')",
    # network
    "connect to a service on this machine": "connect('127.0.0.1', PORT)",
    "connect to it at the machine's address": "connect(HOST, PORT)",
    "connect to the proxy": "connect('127.0.0.1', PUBLIC)",
    "go round the relay to the meter": "connect('127.0.0.1', METER)",
    "go round the meter to the gateway": "\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect(RUN + '/gate/gateway.sock'); print('WON')\nexcept OSError as error: print('refused:', error)",
    "reach the spawn helper": "\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect(RUN + '/helper/spawn.sock'); print('WON')\nexcept OSError as error: print('refused:', error)",
    "reach the proxy's routes": "\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect(RUN + '/proxy/api.sock'); print('WON')\nexcept OSError as error: print('refused:', error)",
    "reach an abstract socket": "\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect(ABSTRACT); print('WON')\nexcept OSError as error: print('refused:', error)",
    "connect to the metadata address": "connect('169.254.169.254', 80)",
    "connect outside": "connect('1.1.1.1', 443)",
    "connect outside with IPv6": "connect('2606:4700:4700::1111', 443)",
    "resolve a name": "\ntry: socket.getaddrinfo('example.org', 80); print('WON')\nexcept OSError as error: print('refused:', error)",
    "send a datagram": "\ntry: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)); print('WON')\nexcept OSError as error: print('refused:', error)",
    "make a raw socket": "\ntry: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print('WON')\nexcept OSError as error: print('refused:', error)",
    "make a packet socket": "\ntry: socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('WON')\nexcept OSError as error: print('refused:', error)",
    "talk to the hypervisor": "\ntry: socket.socket(40, socket.SOCK_STREAM); print('WON')\nexcept OSError as error: print('refused:', error)",
    "use the kernel's cryptography sockets": "\ntry: socket.socket(38, socket.SOCK_SEQPACKET); print('WON')\nexcept OSError as error: print('refused:', error)",
    "add an address": "print('WON' if subprocess.run(['/usr/sbin/ip', 'link', 'add', 'x', 'type', 'dummy'], capture_output=True).returncode == 0 else 'refused')",
    # privileges
    "mount": "call({'x86_64': 165, 'aarch64': 40}[os.uname().machine], b'none', b'/tmp', b'tmpfs', 0, 0)",
    "mount with the new calls": "call(430, b'tmpfs', 0); call(428, -100, b'/', 1)",
    "make a user namespace": "call({'x86_64': 272, 'aarch64': 97}[os.uname().machine], 0x10000000)",
    "clone into a user namespace": "call({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)",
    "clone3 into a user namespace": "call(435, struct.pack('<11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)",
    "enter a namespace": "call({'x86_64': 308, 'aarch64': 268}[os.uname().machine], os.open('/proc/self/ns/net', 0), 0)",
    "change the root": "call({'x86_64': 161, 'aarch64': 51}[os.uname().machine], b'/tmp')",
    "load a program into the kernel": "call({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)",
    "load a module": "call({'x86_64': 175, 'aarch64': 105}[os.uname().machine], 0, 0, b'')",
    "use kernel keyrings": "call({'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -3, 0, 0, 0)",
    "count performance events": "call({'x86_64': 298, 'aarch64': 241}[os.uname().machine], 0, 0, -1, -1, 0)",
    "use userfaultfd": "call({'x86_64': 323, 'aarch64': 282}[os.uname().machine], 0)",
    "use io_uring": "call(425, 8, 0)",
    "become root": "call({'x86_64': 105, 'aarch64': 146}[os.uname().machine], 0)",
    "become root by a set-user-id program": "out = subprocess.run('cp /bin/sh /tmp/s; chmod u+s /tmp/s; /tmp/s -p -c id; echo | su -c id', shell=True, capture_output=True, text=True).stdout; print('WON' if 'uid=0' in out else 'refused')",
    "change the kernel's settings": "write('/proc/sys/kernel/core_pattern', b'|/tmp/x'); write('/proc/sysrq-trigger', b'b')",
    "use the other architecture's calls": "out = subprocess.run([sys.executable, '-c', 'import ctypes; print(ctypes.CDLL(None).syscall(0x40000000 | 39))'], capture_output=True, text=True); print('WON' if out.returncode == 0 and out.stdout.strip() != '-1' else 'killed')",
    "push characters into a terminal": "\nimport fcntl, pty, termios\ntry: fcntl.ioctl(pty.openpty()[1], termios.TIOCSTI, b'x'); print('WON')\nexcept OSError as error: print('refused:', error)",
    # the machine's load, a channel that no budget counts
    "watch the machine's load": "print('WON' if open('/proc/loadavg').read() != '0.00 0.00 0.00 1/1 1\\n' or open('/proc/meminfo').read().split()[1] != '1048576' or os.path.exists('/sys/class') or os.listdir('/proc/pressure') else 'masked')",
    # the hub
    "list the hub's users": "hub('GET', '/users')",
    "read another user": "hub('GET', '/users/bob')",
    "start another user's server": "hub('POST', '/users/bob/server')",
    "stop another user's server": "hub('DELETE', '/users/bob/server')",
    "make a token with more rights": "hub('POST', '/users/ada/tokens', {'scopes': ['custom:millpond:review']})",
    "make another user's token": "hub('POST', '/users/bob/tokens')",
    "join the reviewers": "hub('POST', '/groups/reviewers/users', {'users': ['ada']})",
    "read the services": "hub('GET', '/services'); hub('GET', '/services/gateway')",
    "change the proxy's routes": "hub('GET', '/proxy'); hub('PATCH', '/proxy', {'ip': '127.0.0.1'})",
    "stop the hub": "hub('POST', '/shutdown')",
    "become an administrator": "hub('PATCH', '/users/ada', {'admin': True})",
}


def test_controls_succeed_outside(victims):
    """What cannot be reached from inside can be reached from here, with an ordinary user's rights."""
    code = (
        HELP
        + f"connect('127.0.0.1', {victims['PORT']}); connect('127.0.0.1', {victims['METER']}); read({victims['LAKE']!r})"
    )
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", "/usr/bin/python3", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["WON"] * 3
    assert Path(victims["BOB"]).exists()


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_fails(cell, victims, name):
    assignments = "".join(f"{key} = {value!r}\n" for key, value in victims.items())
    said = cell(assignments + HELP + ATTEMPTS[name])
    assert said.strip(), "the cell said nothing"
    assert "WON" not in said
    assert "Traceback" not in said, said


def test_the_two_ways_out_that_are_meant_to_be_open(front, cell):
    """The hub's API for oneself, and the gateway through the meter, which counts it."""
    ledger = front.settings.state / "meter" / "ledger"
    before = ledger.read_text()
    said = cell(
        "import os, urllib.request\n"
        "for i in range(3): print(urllib.request.urlopen(os.environ['MILLPOND_URL'] + f'/{i}' + 'x' * 5000).read())\n"
        "r = urllib.request.Request(os.environ['JUPYTERHUB_API_URL'] + '/user', headers={'Authorization': 'token ' + os.environ['JUPYTERHUB_API_TOKEN']})\n"
        "print(urllib.request.urlopen(r).status)"
    )
    assert said.count("the gate") == 3
    assert "200" in said
    assert int(ledger.read_text().split()[-1]) >= int((before.split() or ["0"])[-1])
    assert ledger.read_text().strip()


def test_disk_fill_stops_at_the_quota(front, cell):
    said = cell(
        "import os\n"
        "n = 0\n"
        "for place in ('/home/ada', '/tmp', '/dev/shm'):\n"
        "    try:\n"
        "        with open(place + '/fill', 'wb', buffering=0) as f:\n"
        "            for i in range(300): n = f.write(b'x' * 1_000_000)\n"
        "        print('WON')\n"
        "    except OSError as error: print(os.strerror(error.errno), os.path.getsize(place + '/fill') // 1_000_000)\n"
        "    finally: os.unlink(place + '/fill')\n",
    )
    assert "WON" not in said
    sizes = [int(line.split()[-1]) for line in said.strip().splitlines()]
    assert sizes[0] <= 32
    assert sizes[1] <= 68
    assert sizes[2] <= 68


def test_fork_bomb_stays_inside(front, ada):
    kernel = front.do(ada.kernel())
    said = front.do(
        ada.run(
            kernel,
            "import os, signal, time\n"
            "children = []\n"
            "try:\n"
            "    while len(children) < 2000:\n"
            "        pid = os.fork()\n"
            "        if not pid: time.sleep(20); os._exit(0)\n"
            "        children.append(pid)\n"
            "    print('WON')\n"
            "except OSError as error: print(error.errno, len(children))\n"
            "finally:\n"
            "    for pid in children: os.kill(pid, signal.SIGKILL)\n"
            "    for pid in children: os.waitpid(pid, 0)\n",
        )
    )
    assert "WON" not in said
    code, count = map(int, said.split())
    assert code == 11  # EAGAIN
    assert 50 < count < front.settings.limits.processes


def test_memory_bomb_ends_the_kernel_and_nothing_else(front, ada, bob):
    kernel, other = front.do(ada.kernel()), front.do(bob.kernel())
    said = front.do(ada.run(kernel, "x = []\nwhile len(x) < 64: x.append(b'x' * (64 << 20))\nprint('WON')", 30))
    assert "WON" not in said
    assert "the kernel ended" in said
    assert front.do(bob.run(other, "print(6 * 7)")) == "42\n"
    for _ in range(50):
        if front.do(ada.ask("GET", "api/status"))[0] == 200:
            return
        time.sleep(0.2)
    raise AssertionError("ada's server did not outlive her kernel")


def test_log_flood_stops_at_a_megabyte(front, cell):
    """What a kernel writes to the server's own output is kept, up to a limit."""
    cell(
        "import subprocess; subprocess.run('for i in 1 2 3 4; do head -c 1000000 /dev/zero > /proc/2/fd/1; done', shell=True)"
    )
    assert (front.settings.state / "logs" / "workspace-ada.log").stat().st_size <= 1 << 20


def test_connection_flood_leaves_the_gateway_to_others(front, cell, bob):
    """One user may hold so many connections and no more, so the meter's are not all taken."""
    said = cell(
        "import os, socket, urllib.parse\n"
        "where = urllib.parse.urlsplit(os.environ['MILLPOND_URL'])\n"
        "flood = []\n"
        "for i in range(400):\n"
        "    s = socket.create_connection((where.hostname, where.port), 3); s.settimeout(0.5); s.sendall(b'GET / HTTP/1.1\\r\\n'); flood.append(s)\n"
        "import time; time.sleep(1)\n"
        "def held(s):\n"
        "    s.setblocking(False)\n"
        "    try: return s.recv(1) != b''\n"
        "    except BlockingIOError: return True\n"
        "    except OSError: return False\n"
        "print(sum(map(held, flood)))\n"
        "for s in flood: s.close()\n"
    )
    assert int(said) <= front.settings.limits.connections
    kernel = front.do(bob.kernel())
    said = front.do(
        bob.run(kernel, "import os, urllib.request; print(urllib.request.urlopen(os.environ['MILLPOND_URL']).read())")
    )
    assert "the gate" in said


def test_the_limits_are_set(front, cell):
    """Of the control groups that the kernel of a notebook is in; version 1 or 2."""
    limits = front.settings.limits
    found = {}
    for file in ("memory.limit_in_bytes", "memory.max", "pids.max", "cpu.cfs_quota_us", "cpu.max"):
        for path in Path("/sys/fs/cgroup").glob(f"**/{front.run_folder.name}/ada/{file}"):
            found[file] = path.read_text().split()[0]
    assert found.get("memory.limit_in_bytes", found.get("memory.max")) == str(limits.memory)
    assert found["pids.max"] == str(limits.processes)
    assert found.get("cpu.cfs_quota_us", found.get("cpu.max")) == "100000"
    assert json.loads(cell("import os, json; print(json.dumps(os.getpid()))")) < 1000
