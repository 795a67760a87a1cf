"""Every kind of cluster that can run here, for real: this machine, an address over TLS, dask-gateway, Slurm."""

import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from distributed import Security
from tests.analysis.conftest import HOOKS
from tests.analysis.slurm import shell, slurm_host

from millpond import cli
from millpond.analysis.cluster import lake_cluster, open_cluster
from millpond.analysis.passes import AlignedRows, Pass, join, run_pass, running
from millpond.store.cluster import Address, Gateway, Local, TlsFiles, read_cluster_file
from millpond.store.configuration import LakeConfiguration, read_configuration, write_configuration
from millpond.store.errors import ClusterUnavailable, InvalidInput
from millpond.store.lake import open_lake

BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import this module by name to run its functions."""
    root = str(Path(__file__).parents[2])
    monkeypatch.syspath_prepend(root)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def worker_of(state, x, numbers):
    from distributed import get_worker

    time.sleep(state)
    return [(get_worker().address, int(numbers[0]), len(x))]


def gram(state, x):
    return x.T @ x


def workers(client):
    return client.scheduler_info(n_workers=-1)["workers"]


def check_gram(run, client):
    """The bits of a pass on `client` are those in this process."""
    one = Pass(AlignedRows(run[HOOKS[1]].chunk({"row": 61})), gram)
    with running(in_process=True):
        expected = run_pass(one, progress=False)
    assert run_pass(one, progress=False).tobytes() == expected.tobytes()
    rows = np.asarray(run[HOOKS[1]].values, np.float64)
    np.testing.assert_allclose(expected, rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_settings_are_read_kept_in_the_lake_and_refused_by_field(tmp_path, capsys):
    lake = open_lake(tmp_path / "lake", create=True)
    file = tmp_path / "cluster.toml"
    file.write_text(
        '[cluster]\nkind = "slurm"\nworkers = 8\nminimum = 2\nmemory = "16GB"\ngpus = 1\nshared_folder = "/scratch/m"\n'
        '[hosts]\n"runs/a" = "node1"\n'
    )
    assert cli.main(["configure", str(lake.folder), "--cluster", str(file), "--quota-bytes", "5"]) == 0
    found = read_configuration(lake)
    assert (found.cluster.kind, found.cluster.fewest, found.cluster.workers, found.cluster.gpus) == ("slurm", 2, 8, 1)
    assert (found.hosts, found.quota_bytes) == ({"runs/a": "node1"}, 5)
    assert cli.main(["configure", str(lake.folder), "--quota-bytes", "-1"]) == 0
    assert read_configuration(lake).cluster == found.cluster
    for text, words in REFUSED.items():
        file.write_text(text)
        with pytest.raises(InvalidInput, match=words):
            read_cluster_file(file)
        assert cli.main(["configure", str(lake.folder), "--cluster", str(file)]) == 2
    assert read_configuration(lake).cluster == found.cluster
    with pytest.raises(ValueError, match="no path in the lake"):
        LakeConfiguration(hosts={"/runs/a": "x"})
    capsys.readouterr()


def test_the_settings_in_the_docs_can_be_used(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    kinds, hosts = [], {}
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", text, re.S)):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        found = read_cluster_file(file)
        kinds += [found["cluster"].kind] if "cluster" in found else []
        hosts |= found.get("hosts", {})
    assert kinds == ["local", "address", "slurm", "kubernetes", "gateway"]
    LakeConfiguration(hosts=hosts)


REFUSED = {
    "[cluster]\nworkers = 2": "cluster.kind: Field required",
    '[cluster]\nkind = "mesos"': "'local', 'address', 'slurm', 'kubernetes', 'gateway'",
    '[cluster]\nkind = "local"\nworker = 2': "worker: Extra inputs",
    '[cluster]\nkind = "local"\nworkers = 2\nminimum = 3': "minimum 3 is above workers 2",
    '[cluster]\nkind = "local"\nmemory = "4"': "memory: .*such as 4GB",
    '[cluster]\nkind = "address"\naddress = "tcp://10.0.0.1:8786"': "loopback only; run the scheduler with TLS",
    '[cluster]\nkind = "address"\naddress = "10.0.0.1"': "give tls://HOST:PORT",
    '[cluster]\nkind = "gateway"\nworkers = 1\naddress = "http://gateway"': "in the clear; give https",
    '[cluster]\nkind = "slurm"\nworkers = 1\nmemory = "auto"\nshared_folder = "/s"': "what to ask Slurm for",
    '[cluster]\nkind = "slurm"\nworkers = 1\nmemory = "1GB"': "shared_folder: Field required",
    "[cluster": "not TOML",
}


def listening(pids):
    """Addresses that processes listen on, from the kernel's table: hexadecimal, as in /proc/net/tcp."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(descriptor.readlink()))
            except FileNotFoundError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.slow
def test_local_workers_are_on_loopback_over_tls_and_come_and_go(run):
    with open_cluster(Local(workers=2, minimum=1, memory="1GB", gpus=1)) as client:
        assert len(workers(client)) == 1
        assert all(address.startswith("tls://127.0.0.1:") for address in workers(client))
        assert [one["resources"] for one in workers(client).values()] == [{"GPU": 1}]
        pids = [os.getpid(), *client.run(os.getpid).values()]
        assert listening(pids) == {"0100007F"}  # 127.0.0.1
        plain = client.scheduler.address.replace("tls://", "tcp://")  # without a certificate
        with (
            pytest.raises(ClusterUnavailable, match="cannot be reached"),
            open_cluster(Address(address=plain, wait_s=2)),
        ):
            pass
        with running(client):
            check_gram(run, client)
            slow = Pass(AlignedRows(run[HOOKS[0]], range(len(run)), block_bytes=40 * 64), worker_of, 0.3, join)
            places = {address for address, _, _ in run_pass(slow, progress=False)}
        assert len(places) == 2  # a second worker came when tasks waited
        deadline = time.monotonic() + 60
        while len(workers(client)) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(workers(client)) == 1


@contextmanager
def scheduler_and_workers(folder, *hosts):
    """`dask scheduler` and one `dask worker` a host, over TLS with certificates in `folder`, as an operator starts them."""
    security = Security.temporary()
    files = {"ca": security.tls_ca_file, "cert": security.tls_scheduler_cert, "key": security.tls_scheduler_key}
    for name, text in files.items():
        (folder / name).write_text(text)
    tls = [
        "--protocol",
        "tls",
        "--tls-ca-file",
        folder / "ca",
        "--tls-cert",
        folder / "cert",
        "--tls-key",
        folder / "key",
    ]
    about = folder / "scheduler.json"
    log = (folder / "log").open("wb")
    command = [BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    running = [subprocess.Popen([*command, "--scheduler-file", about, *tls], stdout=log, stderr=log)]
    try:
        for host in hosts:
            command = [
                BIN / "dask",
                "worker",
                "--scheduler-file",
                about,
                "--host",
                host,
                "--nthreads",
                "1",
                "--no-nanny",
            ]
            command += ["--no-dashboard", "--memory-limit", "1GB", "--name", f"at-{host}", *tls]
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        while not about.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = TlsFiles(ca=str(folder / "ca"), cert=str(folder / "cert"), key=str(folder / "key"))
        yield Address(address=json.loads(about.read_text())["address"], tls=found, wait_s=60)
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)
        log.close()


@pytest.fixture
def lake(run):
    """The lake of `run`, whose configuration is a test's own."""
    lake = open_lake(Path(run.plan.folder.url).parents[1])
    yield lake
    lake.storage.delete("lake.json")


@pytest.mark.slow
def test_a_scheduler_by_address_and_rows_mapped_where_they_lie(lake, tmp_path):
    run = lake["made-up"]
    (tmp_path / "other").mkdir()
    with scheduler_and_workers(tmp_path, "127.0.0.2", "127.0.0.3") as settings:
        rows = AlignedRows(run[HOOKS[0]], range(len(run)), block_bytes=256 * 64)
        one = Pass(rows, worker_of, 0.05, join)
        for hosts in ({"runs": "127.0.0.2", "runs/made-up": "127.0.0.3"}, {"runs/made-up": "at-127.0.0.2"}):
            write_configuration(lake, LakeConfiguration(cluster=settings, hosts=hosts))
            with lake_cluster(lake) as client:
                client.wait_for_workers(2, timeout=60)
                check_gram(run, client)
                found = run_pass(one, progress=False)
                near = [address for address, _, _ in found if next(reversed(hosts.values()))[-9:] in address]
                assert len(found) == len(rows.blocks) >= 6
                assert len(near) > 0.7 * len(found)  # what an idle worker steals is the rest
        write_configuration(lake, LakeConfiguration(cluster=settings, hosts={"runs": "192.0.2.9"}))
        with lake_cluster(lake):  # that host has no worker: anybody else
            assert len(run_pass(one, progress=False)) == len(rows.blocks)
        stranger = Security.temporary()
        for name, text in {
            "ca": stranger.tls_ca_file,
            "cert": stranger.tls_client_cert,
            "key": stranger.tls_client_key,
        }.items():
            (tmp_path / "other" / name).write_text(text)
        files = {name: str(tmp_path / "other" / name) for name in ("ca", "cert", "key")}
        for tls, words in (
            (TlsFiles(**files), "cannot be reached"),
            (TlsFiles(**files | {"key": "/none"}), "tls.key: '/none'"),
        ):
            with (
                pytest.raises(ClusterUnavailable, match=words),
                open_cluster(settings.model_copy(update={"tls": tls, "wait_s": 2})),
            ):
                pass
    with (
        pytest.raises(ClusterUnavailable, match="cannot be reached"),
        open_cluster(Address(address="tls://127.0.0.1:9", wait_s=1)),
    ):
        pass


GATEWAY = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.SimpleAuthenticator.password = "sesame"
c.DaskGateway.address = "127.0.0.1:{api}"
c.Proxy.address = "127.0.0.1:{proxy}"
c.UnsafeLocalBackend.clusters_directory = "{folder}"
c.LocalClusterConfig.worker_memory = "1 G"
c.LocalClusterConfig.worker_cmd = ["{bin}/dask", "worker"]
c.LocalClusterConfig.scheduler_cmd = ["{bin}/dask", "scheduler"]
c.UnsafeLocalBackend.inherited_environment = ["PATH", "PYTHONPATH"]
"""


@contextmanager
def gateway_server(folder):
    """dask-gateway-server with its local backend; its address and its proxy's."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        api, proxy = one.getsockname()[1], two.getsockname()[1]
    (folder / "config.py").write_text(GATEWAY.format(api=api, proxy=proxy, folder=folder, bin=BIN))
    log = (folder / "log").open("wb")
    command = [BIN / "dask-gateway-server", "-f", folder / "config.py"]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            try:  # through the proxy: there is a moment without its route
                with urlopen(f"http://127.0.0.1:{proxy}/api/health", timeout=5):
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield f"http://127.0.0.1:{proxy}", f"gateway://127.0.0.1:{proxy}"
    finally:
        server.terminate()
        server.wait(60)
        log.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function Gateway:pytest.PytestUnraisableExceptionWarning")
def test_a_cluster_from_dask_gateway(run, tmp_path, monkeypatch):
    with gateway_server(tmp_path) as (address, proxy):
        settings = Gateway(address=address, proxy_address=proxy, workers=2, wait_s=90)
        monkeypatch.setenv("DASK_GATEWAY_USER", "vault")
        monkeypatch.setenv("DASK_GATEWAY_PASSWORD", "wrong")
        with pytest.raises(ClusterUnavailable, match=r"Unauthorized|401"), open_cluster(settings):
            pass
        gc.collect()  # the refused one's destructor complains, in dask-gateway
        monkeypatch.setenv("DASK_GATEWAY_PASSWORD", "sesame")
        with open_cluster(settings) as client, running(client):
            assert len(workers(client)) == 2
            assert all(one.startswith("tls://") for one in workers(client))
            check_gram(run, client)


@pytest.mark.slow
def test_a_probe_sweep_on_slurm(lake, tmp_path):
    """The lake names the cluster, the command is what it always is, and the numbers are those of this process."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "slurm").mkdir()
    file = tmp_path / "cluster.toml"
    file.write_text(
        f'[cluster]\nkind = "slurm"\nworkers = 2\nmemory = "900MB"\ninterface = "lo"\nshared_folder = "{shared}"\n'
        'partition = "vault"\nwalltime = "00:10:00"\nwait_s = 120\n'
    )
    probe = [sys.executable, "-m", "millpond.cli", "probe", "--run", f"{lake.folder}/made-up", "--hooks", "blocks.2.*"]
    probe += ["--label", "inside"]
    write_configuration(lake, LakeConfiguration(**read_cluster_file(file)))
    with slurm_host(tmp_path / "slurm") as environment:
        command = [*probe, "--out", str(tmp_path / "there")]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            jobs = set()
            while process.poll() is None:
                jobs |= set(shell(environment, "squeue", "-h", "-t", "R", "-o", "%i %j").splitlines())
                time.sleep(0.2)
        assert process.returncode == 0
        assert len(jobs) == 2  # two workers, each a job of Slurm's
        assert all(job.endswith(" millpond") for job in jobs)
        deadline = time.monotonic() + 30
        while shell(environment, "squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not shell(environment, "squeue", "-h")  # and none is left
    assert cli.main([*probe[3:], "--out", str(tmp_path / "here"), "--workers", "0"]) == 0
    rows = [(tmp_path / place / "metrics.jsonl").read_bytes() for place in ("there", "here")]
    assert rows[0] == rows[1]
