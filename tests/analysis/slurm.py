"""A Slurm cluster of one host: Debian's munged, slurmctld and slurmd, with everything they write in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGURATION = """
ClusterName=millpond
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=vault Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm_host(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and its kin reach the cluster."""
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS}
    if missing := [name for name, found in programs.items() if found is None]:
        raise RuntimeError(f"{', '.join(missing)}: not installed; run: make test (or apt-get install slurmctld slurmd)")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = {"controller_port": one.getsockname()[1], "node_port": two.getsockname()[1]}
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    files = [f"--{name}={folder / ('munge.' + name.removesuffix('-file'))}" for name in names]
    commands = [
        [programs["munged"], "--foreground", "--force", *files],
        [programs["slurmctld"], "-D", "-i", "-f", configuration],
        [programs["slurmd"], "-D", "-f", configuration, "-N", host],
    ]
    running = []
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.out").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            if len(running) == 1:
                wait_for(lambda: (folder / "munge.socket").exists(), folder, running)
        wait_for(lambda: "idle" in shell(environment, "sinfo", "-h", "-o", "%T"), folder, running)
        yield environment
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "squeue")


def shell(environment: dict[str, str], *command: str) -> str:
    """What a command prints; its errors are not ours."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(condition, folder: Path, running: list[subprocess.Popen[bytes]]) -> None:
    """Until `condition()`; the logs, if a daemon ends or it takes more than a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in running):
            logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.[lo]*")))
            raise RuntimeError(f"Slurm did not start:\n{logs}")
        time.sleep(0.1)
