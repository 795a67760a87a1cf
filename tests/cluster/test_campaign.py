"""A whole installation on eight hosts, TLS everywhere: S3, a Dask scheduler and two workers, a capture worker, gateway,
egress meter, notebook.

Hosts are network namespaces behind the documented NetworkPolicies. Then hosts are cut off, stopped and killed in the
middle of work: jobs end once, nothing is lost or released twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import read_policy
from tests.cluster.certificates import Authority
from tests.cluster.hosts import Hosts, end
from tests.cluster.test_hosts import APPS

BUCKET, RUN, MODEL, PROJECT, USER = "lake", "made", "guarded", "probing", "researcher"
D, PROMPTS, TOKENS = 64, 200, 100
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4))
WEED = Path(sys.executable).parent / "weed"
WEIGHTS = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"


def wait_for(check, seconds=60.0, what="it"):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Installation:
    """What runs on which host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = Hosts(APPS)
        self.at = self.hosts.addresses
        authority = Authority(folder)
        # the meter relays TLS without ending it, so the gateway's certificate names the meter's address
        named = {name: [address] for name, address in self.at.items()}
        named["gateway"].append(self.at["meter"])
        self.files = {name: authority.issue(name, *addresses) for name, addresses in named.items()}
        self.authority = authority.file
        self.processes = {}
        self.environment = os.environ | {
            "SSL_CERT_FILE": str(self.authority),
            "AWS_ENDPOINT_URL": f"https://{self.at['s3']}:8333",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "OMP_NUM_THREADS": "1",
        }
        for variable, file in (("CA_FILE", self.authority), ("SCHEDULER__CERT", ""), ("WORKER__CERT", "")):
            self.environment.pop(f"DASK_DISTRIBUTED__COMM__TLS__{variable}", file)

    def start(self, name, host, *command):
        log = self.folder / f"{name}.log"
        self.processes[name] = self.hosts.start(host, *map(str, command), log=log, env=self.environment)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name, how=signal.SIGKILL):
        end(self.processes.pop(name), how)

    def python(self, host, code, *arguments, timeout=240.0, **environment):
        done = self.hosts.run(
            host,
            sys.executable,
            "-c",
            textwrap.dedent(code),
            *arguments,
            timeout=timeout,
            env=self.environment | environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def start_s3(self):
        credentials = [{"accessKey": "key", "secretKey": "secret"}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        configuration = self.folder / "s3.json"
        configuration.write_text(
            json.dumps({"identities": [{"name": "vault", "credentials": credentials, "actions": actions}]})
        )
        (self.folder / "s3").mkdir(exist_ok=True)
        certificate, key = self.files["s3"]
        self.start(
            "s3", "s3", WEED, "server", f"-dir={self.folder / 's3'}", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-s3",
            "-s3.port=8333", f"-s3.config={configuration}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256", "-volume.max=32", "-volume.preStopSeconds=1",
        )  # fmt: skip
        look = f"import socket; socket.create_connection(({self.at['s3']!r}, 8333), 2)"
        wait_for(lambda: self.hosts.run("gateway", sys.executable, "-c", look).returncode == 0, what="S3's start")

    def start_scheduler(self):
        certificate, key = self.files["scheduler"]
        self.start(
            "scheduler", "scheduler", sys.executable, "-m", "distributed.cli.dask_scheduler", "--protocol", "tls",
            "--host", self.at["scheduler"], "--port", "8786", "--no-dashboard", "--tls-ca-file", self.authority,
            "--tls-cert", certificate, "--tls-key", key,
        )  # fmt: skip

    def start_worker(self, host):
        certificate, key = self.files[host]
        self.start(
            host, host, sys.executable, "-m", "distributed.cli.dask_worker", f"tls://{self.at['scheduler']}:8786",
            "--host", self.at[host], "--worker-port", "9000:9015", "--no-nanny", "--nthreads", "1", "--no-dashboard",
            "--memory-limit", "2GB", "--name", host, "--tls-ca-file", self.authority, "--tls-cert", certificate,
            "--tls-key", key,
        )  # fmt: skip

    def start_capture(self):
        """A capture worker: it knows S3, the queue's address, its token and its model, and no database."""
        self.environment["MILLPOND_WORKER_TOKEN"] = self.worker_token
        self.start(
            "capture", "capture", sys.executable, "-m", "millpond.cli", "worker", "--queue",
            f"https://{self.at['gateway']}:8911", "--model", WEIGHTS, "--lake", f"s3://{BUCKET}", "--lease", "5",
        )  # fmt: skip

    def start_executor(self):
        self.start("executor", "gateway", sys.executable, "-m", "millpond.cli", "executor", "--config", self.settings)

    @property
    def settings(self):
        return self.folder / "gateway.toml"

    def write_settings(self):
        certificate, key = self.files["gateway"]
        values = {
            "lake": f"s3://{BUCKET}", "database": f"sqlite:///{self.folder / 'hub.db'}", "policy": "policy.toml",
            "tokens": "tokens.toml", "listen": f"{self.at['gateway']}:8910", "certificate": str(certificate),
            "key": str(key), "origin": f"https://{self.at['meter']}:8443", "lease_seconds": 5.0,
        }  # fmt: skip
        self.settings.write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
            + f"[models.{MODEL}]\npath = {json.dumps(str(WEIGHTS))}\n"
        )
        (self.folder / "policy.toml").write_text(f"[models.{MODEL}]\nparameters = 8_000_000_000\n")
        certificate, key = self.files["gateway"]
        cluster = {"address": f"tls://{self.at['scheduler']}:8786"}
        tls = {"ca": str(self.authority), "cert": str(certificate), "key": str(key)}
        (self.folder / "cluster.toml").write_text(
            f'[cluster]\nkind = "address"\naddress = {json.dumps(cluster["address"])}\nwait_s = 60\n[cluster.tls]\n'
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in tls.items())
        )

    def millpond(self, host, *words):
        done = self.hosts.run(
            host, sys.executable, "-m", "millpond.cli", *map(str, words), timeout=120, env=self.environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def notebook(self, code, *arguments, timeout=240.0):
        """Run code as a notebook would: it knows the meter's address, a token, a project, and nothing of the vault."""
        known = {
            "MILLPOND_URL": f"https://{self.at['meter']}:8443",
            "MILLPOND_TOKEN": self.token,
            "MILLPOND_PROJECT": PROJECT,
        }
        return self.python("notebook", code, *arguments, timeout=timeout, **known)

    def balance(self):
        ledger = Ledger(f"sqlite:///{self.folder / 'hub.db'}", read_policy(self.folder / "policy.toml"))
        try:
            ledger.verify()
            return ledger.balances(Payer(USER, PROJECT, (MODEL,)))[0].spent
        finally:
            ledger.close()

    def metered(self):
        return int((self.folder / "meter-ledger").read_text().split()[-1])


MAKE_RUN = f"""
    import numpy as np, pandas as pd
    from botocore.session import Session
    import os
    from millpond.store.lake import open_lake
    from millpond.store.seal import seal_run
    from millpond.store.segment import CapturedRequest, RunWriter
    client = Session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], verify=os.environ["SSL_CERT_FILE"])
    client.create_bucket(Bucket={BUCKET!r})
    lake = open_lake("s3://{BUCKET}", create=True)
    hooks = {HOOKS!r}
    spec = lake.create_run({RUN!r}, hooks=hooks, d_model={D}, dtype="float32",
                           provenance={{"model": "toy"}}, chunk_rows=256, shard_rows=1024)
    where = lake.run_storage({RUN!r})
    writer = RunWriter(where, spec)
    rng = np.random.default_rng(0)
    direction = rng.standard_normal({D})
    marks = {{}}
    for number in range({PROMPTS}):
        mark = rng.integers(0, 2, {TOKENS})
        marks[f"p{{number}}"] = mark > 0
        rows = {{hook: rng.standard_normal(({TOKENS}, {D})).astype(np.float32) for hook in hooks}}
        rows[hooks[2]] += (mark[:, None] * direction * 0.4).astype(np.float32)
        ids = rng.integers(0, 5000, {TOKENS}).astype(np.int32)
        writer.append(CapturedRequest(f"p{{number}}", ids, {TOKENS}, np.arange({TOKENS}, dtype=np.int32), rows))
    writer.commit()
    table = pd.DataFrame({{"id": [f"p{{n}}" for n in range({PROMPTS})]}})
    seal_run(where, prompts=table, token_labels={{"inside": marks}}, token_label_dtypes={{"inside": "bool"}})
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None:
        pytest.skip("network namespaces and their firewalls need root, iproute2 and nftables")
    made = Installation(tmp_path_factory.mktemp("campaign"))
    try:
        made.start_s3()
        made.python("gateway", MAKE_RUN)
        made.write_settings()
        made.millpond("gateway", "configure", f"s3://{BUCKET}", "--cluster", made.folder / "cluster.toml")
        made.start_scheduler()
        for host in ("worker-a", "worker-b"):
            made.start_worker(host)
        made.token = made.millpond("gateway", "token", "new", USER, "--tokens", made.folder / "tokens.toml").strip()
        config = ("--config", made.settings)
        made.millpond("gateway", "project", "new", PROJECT, *config, "--models", MODEL, "--owner", USER)
        made.millpond("gateway", "project", "hold", PROJECT, RUN, *config, "--model", MODEL, "--prompts", "own")
        made.start("gateway", "gateway", sys.executable, "-m", "millpond.cli", "gateway", *config)
        made.start_executor()
        workers = ("--workers", made.folder / "workers.toml")
        made.worker_token = made.millpond("gateway", "queue", "token", "gpu-1", *workers, "--kinds", "capture").strip()
        certificate, key = made.files["gateway"]
        made.start(
            "queue", "gateway", sys.executable, "-m", "millpond.cli", "queue", "serve", "--database",
            f"sqlite:///{made.folder / 'hub.db'}", *workers, "--listen", f"{made.at['gateway']}:8911",
            "--certificate", certificate, "--key", key,
        )  # fmt: skip
        meter = Path(__file__).parents[2] / "hub" / "meter.py"
        made.start(
            "meter", "meter", sys.executable, meter, "--listen", f"{made.at['meter']}:8443", "--to",
            f"{made.at['gateway']}:8910", "--ledger", made.folder / "meter-ledger", "--cap", "2000000", "--rate", "2000000",
        )  # fmt: skip
        look = f"import socket; socket.create_connection(({made.at['meter']!r}, 8443), 2)"
        wait_for(
            lambda: made.hosts.run("notebook", sys.executable, "-c", look).returncode == 0, what="the meter's start"
        )
        yield made
    finally:
        made.hosts.close()


PROBE = f"""
    import sys, millpond as mp
    lake = mp.connect()
    train, test = lake[{RUN!r}].split(test=0.25, seed=int(sys.argv[1]))
    hook = "blocks.2.hook_resid_post"
    probe = mp.LogisticProbe().fit(train[hook], train.labels["inside"])
    print(probe.score(test[hook], test.labels["inside"]))
"""
SUBMIT = f"""
    import sys, millpond as mp
    lake = mp.connect()
    train, test = lake[{RUN!r}].split(test=0.25, seed=int(sys.argv[1]))
    sweep = mp.LogisticProbe().sweep(train, test, hooks="blocks.*.hook_resid_post", labels="inside")
    table = sweep.table()
    real = table[~table["control"]]
    print(*real["auroc"])
"""


def test_a_probe_is_fitted_across_the_hosts_and_paid_for(installed):
    before = installed.balance()
    score = float(installed.notebook(PROBE, "1"))
    assert 0.85 < score <= 1.0  # the planted direction is 0.4 * |N(0, 1)^64| = 3.2 standard deviations long
    spent = installed.balance() - before
    assert 0 < spent < 2000
    assert installed.metered() > spent  # TLS and HTTP framing cross too
    assert "worker-a" in installed.log("scheduler") or "Register worker" in installed.log("scheduler")


def test_the_doctor_finds_nothing_on_any_host(installed):
    """Each host is asked about what it uses, with its own certificates and behind its own firewall."""
    installed.environment["MILLPOND_WORKER_TOKEN"] = installed.worker_token
    told = installed.millpond("gateway", "doctor", "--gateway", installed.settings)
    for line in ("ok   clock", "ok   database", "ok   certificate of the cluster's authority", "2 workers ran a task"):
        assert line in told
    told = installed.millpond(
        "capture", "doctor", "--lake", f"s3://{BUCKET}", "--no-cluster", "--model", WEIGHTS,
        "--queue", f"https://{installed.at['gateway']}:8911",
    )  # fmt: skip
    assert "knows the token" in told
    assert "holds for 30 days" in installed.millpond(
        "notebook", "doctor", "--meter", f"https://{installed.at['meter']}:8443"
    )


def test_the_notebooks_host_reaches_only_the_meter(installed):
    inner = (("s3", 8333), ("scheduler", 8786), ("worker-a", 9000), ("gateway", 8910), ("gateway", 8911))
    code = f"""
        import socket
        for address, port in {[(installed.at[name], port) for name, port in inner]!r}:
            try:
                socket.create_connection((address, port), 0.5)
                print(address, port)
            except OSError:
                pass
    """
    assert installed.python("notebook", code) == ""


def run_sweep_and(installed, seed, harm, mend):
    """Submit a sweep from the notebook's host; `harm` while it runs, `mend` a little later; its AUROCs by layer."""
    import threading

    found = {}
    before = len(jobs(installed, "claimed"))
    thread = threading.Thread(target=lambda: found.update(out=installed.notebook(SUBMIT, str(seed), timeout=400)))
    thread.start()
    wait_for(lambda: len(jobs(installed, "claimed")) > before or not thread.is_alive(), what="the job's start")
    time.sleep(0.5)
    harm()
    assert len(jobs(installed, "claimed")) > before  # it was hit in the middle
    time.sleep(3)
    mend()
    thread.join(400)
    return np.array(list(map(float, found["out"].split())))


def jobs(installed, state):
    with sqlite3.connect(installed.folder / "hub.db", timeout=30) as connection:
        return connection.execute("SELECT id FROM jobs WHERE state = ?", (state,)).fetchall()


def check_sweep(aurocs):
    assert aurocs.shape == (4,)
    assert aurocs[2] > 0.9
    assert np.all(np.abs(aurocs[[0, 1, 3]] - 0.5) < 0.1)


def test_a_cut_off_worker_costs_time_and_nothing_else(installed):
    def cut():
        installed.hosts.cut("worker-b")

    def join():
        installed.hosts.join("worker-b")

    check_sweep(run_sweep_and(installed, 11, cut, join))


def test_s3_may_stop_and_come_back(installed):
    check_sweep(run_sweep_and(installed, 12, lambda: installed.kill("s3"), installed.start_s3))


def test_a_killed_scheduler_and_executor_are_started_again_and_the_job_ends_once(installed):
    spent = installed.balance()

    def harm():
        for name in ("scheduler", "worker-a", "worker-b", "executor"):
            installed.kill(name)

    def mend():
        installed.start_scheduler()
        for host in ("worker-a", "worker-b"):
            installed.start_worker(host)
        installed.start_executor()

    check_sweep(run_sweep_and(installed, 13, harm, mend))
    once = installed.balance() - spent
    # the same question again: the same bytes for the fixed charge, so the answer was charged once before
    check_sweep(np.array(list(map(float, installed.notebook(SUBMIT, "13").split()))))
    assert installed.balance() - spent - once < once


CAPTURE = """
    import millpond as mp
    lake = mp.connect()
    prompts = [{"id": f"p{n}", "text": f"def f{n}(x):\\n    return x + {n}\\n" * (2 + n % 5)} for n in range(600)]
    run = lake.capture(prompts, model="guarded", name="captured", hooks="blocks.*.hook_resid_post")
    print(len(run.hooks), run.n_rows)
"""


def test_a_capture_worker_is_killed_and_another_goes_on(installed):
    """The run has every prompt once, in S3, which only the vault's hosts reach."""
    import threading

    found = {}
    thread = threading.Thread(target=lambda: found.update(out=installed.notebook(CAPTURE, timeout=400)))
    installed.start_capture()
    thread.start()
    wait_for(lambda: jobs(installed, "claimed"), 240, "the capture's start")
    time.sleep(1)
    installed.kill("capture")
    assert jobs(installed, "claimed")  # it was killed in the middle
    installed.start_capture()
    thread.join(400)
    hooks, rows = map(int, found["out"].split())
    assert hooks == 6
    look = f"""
        import millpond as mp
        lake = mp.open("s3://{BUCKET}")
        (name,) = [name for name in lake.runs() if name != {RUN!r}]
        run = lake[name]
        print(run.n_rows, len(run.prompts), run.prompts["id"].nunique(), run.prompts["n_tokens"].sum())
    """
    # the worker's host has nothing of the gateway's but the queue: the prompts came through S3
    with sqlite3.connect(installed.folder / "hub.db", timeout=30) as connection:
        (spec,) = connection.execute("SELECT spec FROM jobs WHERE kind = 'capture'").fetchone()
    assert json.loads(spec)["prompts"]["path"].startswith(f"s3://{BUCKET}/prompts/")
    stored, prompts, distinct, tokens = map(int, installed.python("gateway", look).split())
    assert (stored, prompts, distinct) == (rows, 600, 600)
    assert stored == tokens  # a row a prompt token


def test_nothing_was_lost(installed):
    assert jobs(installed, "claimed") == []
    assert jobs(installed, "failed") == []
    assert "whole" in installed.millpond("gateway", "verify", f"s3://{BUCKET}")
