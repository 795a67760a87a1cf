"""`millpond doctor`: does what an installation names answer from this host, and is it fit for use? One check a line.

Run it on each host with what that host uses: the gateway's settings beside gateway and executor, the queue and the model
beside a capture worker, the meter's address where notebooks or clients are.
"""

from __future__ import annotations

import os
import platform
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost, MillpondError

if TYPE_CHECKING:
    from millpond.hub.settings import Settings
    from millpond.store.cluster import ClusterSettings
    from millpond.store.lake import Lake

MOST_SKEW_S = 5.0
"""Between this host's clock and the store's: tokens, leases and certificates of several hosts are compared."""
MOST_ENTRIES = 100_000
"""Of the ledger, that are looked at; a few seconds."""
FEWEST_DAYS = 14
"""That a certificate should still hold."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    ok: bool
    text: str
    """What there is; or what is wrong, and what to do about it."""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.text}"


@dataclass(frozen=True)
class Subject:
    """What to look at; what is None is left out."""

    gateway: Path | None = None
    """The gateway's settings: its lake, database, policy, certificates and cluster."""
    lake: str | None = None
    queue: str | None = None
    model: Path | None = None
    meter: str | None = None
    """Address at which clients find the gateway, behind the meter."""
    cluster: bool = True
    """Look at the cluster that the lake declares; capture workers' hosts need not reach it."""


class Wrong(Exception):
    """A check's bad end; its text names the remedy."""


def examine(subject: Subject) -> Iterator[Finding]:
    """Each finding as soon as it is known."""
    captures = subject.queue is not None or subject.model is not None
    yield _check("this host", lambda: _host(captures=captures))
    settings: list[Settings] = []
    if subject.gateway is not None:
        yield _check("settings", lambda: _settings(subject.gateway, settings))
    url = subject.lake or (settings[0].lake if settings else None)
    lake: list[Lake] = []
    if url is not None:
        yield _check("lake", lambda: _lake(url, lake))
    if lake:
        yield _check("clock", lambda: _clock(lake[0]))
    if settings:
        database = _check("database", lambda: _database(settings[0].database))
        yield database
        if database.ok:
            yield _check("ledger", lambda: _ledger(settings[0].database))
        yield from _certificates({"the gateway": settings[0].certificate})
    if lake and subject.cluster:
        yield from _cluster_of(lake[0], settings[0].workers if settings else 0)
    if subject.model is not None:
        yield _check("model", lambda: _model(subject.model))
    if subject.queue is not None:
        yield _check("queue", lambda: _queue(subject.queue))
    if subject.meter is not None:
        yield _check("meter", lambda: _meter(subject.meter))


def _check(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except (Wrong, MillpondError, OSError) as error:
        return Finding(name, False, " ".join(str(error).split()))


def _host(*, captures: bool) -> str:
    found = [f"Python {platform.python_version()}", f"{len(os.sched_getaffinity(0))} cores", f"{_memory() >> 30} GiB"]
    for name in ("millpond", "distributed", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    from millpond.capture.versions import check_vllm_version, installed_vllm

    try:
        found.append(f"vLLM {check_vllm_version() if captures else installed_vllm()}")
    except InvalidInput as error:
        if captures:
            raise Wrong(str(error)) from error
        found.append("no vLLM")
    return ", ".join([*found, *(_gpus() if captures else ())])


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> Iterator[str]:
    import torch

    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield f"{about.name} of {about.total_memory >> 30} GiB"
    if not torch.cuda.device_count():
        if Path("/proc/driver/nvidia/version").exists():
            raise Wrong(
                f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU; install millpond[capture] with a "
                "torch for this driver, and look at CUDA_VISIBLE_DEVICES"
            )
        yield "no GPU"


def _settings(path: Path | None, found: list[Settings]) -> str:
    from millpond.hub.policy import read_policy
    from millpond.hub.settings import read_settings

    assert path is not None
    settings = read_settings(path)
    policy = read_policy(settings.policy)
    if unknown := sorted(set(settings.models) - set(policy.models)):
        raise Wrong(f"models.{unknown[0]} is not in {settings.policy}; declare its parameters there")
    for file in (settings.certificate, settings.key, settings.dictionary):
        if file is not None and not os.access(file, os.R_OK):
            raise Wrong(f"{file} cannot be read by this user; give it to the gateway's")
    if settings.tokens is not None and settings.tokens.exists() and settings.tokens.stat().st_mode & 0o077:
        raise Wrong(f"{settings.tokens} can be read by others: chmod 600 {settings.tokens}")
    found.append(settings)
    return f"{path}, {len(policy.models)} models in the policy"


def _lake(url: str, found: list[Lake]) -> str:
    from millpond.store.lake import open_lake
    from millpond.store.objects import check_conditional_create

    lake = open_lake(url)
    check_conditional_create(lake.storage)
    found.append(lake)
    return f"{lake.url} answers, of several who create an object one wins, {len(lake.runs())} runs"


def _clock(lake: Lake) -> str:
    before = time.time()
    there = lake.storage.now()
    after = time.time()
    # an S3 server tells whole seconds, cut off
    skew = before - (there + 1) if there + 1 < before else max(there - after, 0.0)
    if skew > MOST_SKEW_S:
        raise Wrong(
            f"this host's clock and that of {lake.url} differ by {skew:.0f} s; run chrony or another NTP client on both"
        )
    return f"less than {skew + 1:.0f} s from the store's"


def _database(url: str) -> str:
    from millpond.hub.database import newest_revision, open_database, revision

    engine = open_database(url, create=False)
    try:
        with engine.execution_options(write=False).connect() as connection:
            held = revision(connection)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Wrong(
            f"{engine.url!r} cannot be used: {reason}; is the server up, and its password in ~/.pgpass?"
        ) from error
    finally:
        engine.dispose()
    newest = newest_revision()
    if held != newest:
        raise Wrong(
            f"{engine.url!r} has schema {held or 'none'}, this Millpond {newest}; back it up, then start the gateway, which "
            "migrates it (or upgrade Millpond, if the database is the newer one)"
        )
    return f"{engine.url!r} answers, schema {held}"


def _ledger(url: str) -> str:
    from millpond.hub.chain import read_head, verify_chain, verify_tail
    from millpond.hub.database import open_database

    engine = open_database(url, create=False)
    started = time.monotonic()
    try:
        with engine.execution_options(write=False).connect() as connection:
            entries, _ = read_head(connection)
        if entries <= MOST_ENTRIES:
            whole = verify_chain(engine, {})
            found = f"whole: {whole.entries:,} entries, {whole.charged:,} bytes charged"
        else:
            count = verify_tail(engine, MOST_ENTRIES)
            found = f"the last {count:,} of {entries:,} entries are whole; millpond ledger verify looks at all, and at the totals"
    finally:
        engine.dispose()
    return f"{found}; took {time.monotonic() - started:.1f} s"


def _certificates(files: dict[str, Path | None]) -> Iterator[Finding]:
    for what, path in files.items():
        if path is not None:
            yield _check(f"certificate of {what}", lambda path=path: _certificate(path))  # type: ignore[misc]


def _certificate(path: Path) -> str:
    from cryptography import x509

    try:
        held = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise Wrong(f"{path} is no PEM certificate: {error}") from error
    return _expiry(held.not_valid_before_utc, held.not_valid_after_utc, str(path))


def _expiry(begins: datetime, ends: datetime, where: str) -> str:
    now = datetime.now(UTC)
    if begins > now:
        raise Wrong(f"{where} holds from {begins:%Y-%m-%d %H:%M} UTC on; look at this host's clock")
    days = (ends - now).total_seconds() / 86400
    if days < FEWEST_DAYS:
        state = "ran out" if days < 0 else "runs out"
        raise Wrong(f"{where} {state} on {ends:%Y-%m-%d %H:%M} UTC; renew it, and restart what serves it")
    return f"{where} holds for {days:.0f} days"


def _cluster_of(lake: Lake, workers: int) -> Iterator[Finding]:
    from millpond.analysis.cluster import with_workers
    from millpond.store.cluster import Local
    from millpond.store.configuration import read_configuration

    try:
        declared = read_configuration(lake).cluster
    except MillpondError as error:
        yield Finding("cluster", False, str(error))
        return
    if declared is None and not workers:
        yield Finding(
            "cluster", True, "none is declared; passes run in the process that asks (millpond configure --cluster)"
        )
        return
    settings = with_workers(declared, workers) if workers else declared or Local()
    tls = getattr(settings, "tls", None)
    if tls is not None:
        yield from _certificates({"the cluster's authority": Path(tls.ca), "this side of the cluster": Path(tls.cert)})
    yield _check("cluster", lambda: _cluster(lake, settings))


def _cluster(lake: Lake, settings: ClusterSettings) -> str:
    """Every worker runs a task that opens the lake."""
    from millpond.analysis.cluster import lake_cluster, look_around

    here = look_around(lake.url)
    with lake_cluster(lake, settings) as client:
        found: dict[str, Any] = client.run(look_around, lake.url, on_error="return")
    for address, told in found.items():
        if isinstance(told, BaseException):
            raise Wrong(
                f"worker {address} cannot do a task with the lake: {type(told).__name__}: {told}; give it the lake's credentials"
            )
        for name, value in told.items():
            if value != here[name]:
                raise Wrong(
                    f"worker {address} has {name} {value}, this host {here[name]}; install the same (tools/locks)"
                )
    if not found:
        raise Wrong(f"the {settings.kind} cluster has no workers; start some")
    return f"{settings.kind}, {len(found)} workers ran a task and reach the lake, with the same versions as here"


def _model(folder: Path | None) -> str:
    from millpond.capture.plan import read_model_facts
    from millpond.store.capture_spec import CaptureJob

    job = CaptureJob.model_validate(
        {
            "model": {"path": str(folder)},
            "capture": {"hooks": ["blocks.*.hook_resid_post"]},
            "prompts": {"path": ""},
            "destination": {"lake": "", "run": "none"},
        }
    )
    facts = read_model_facts(job)
    return f"{folder}: {facts.architecture}, {facts.n_layers} layers, {facts.weight_bytes / 1e9:.1f} GB of weights"


def _queue(address: str | None) -> str:
    """Ask for something that does not exist: only a known token learns that."""
    from millpond.store.http_queue import TOKEN_VARIABLE, HttpQueue, is_address, open_queue
    from millpond.store.queue import QueuedJob

    assert address is not None
    queue = open_queue(address)
    if not is_address(address):
        return f"{address} can be written"
    assert isinstance(queue, HttpQueue)
    try:
        queue.heartbeat(QueuedJob(id="doctor", kind="none", spec={}, submitted=0.0), 1.0, {})
    except (JobNotFound, LeaseLost):
        return f"{address} answers, and knows the token in {TOKEN_VARIABLE}"
    raise Wrong(f"{address} takes a heartbeat of a job that does not exist; is it a queue's address?")


def _meter(address: str | None) -> str:
    import httpx

    assert address is not None
    url = httpx.URL(address)
    if url.scheme not in ("http", "https"):
        raise Wrong(f"{address} is no address; give https://HOST:PORT, as in MILLPOND_URL")
    try:
        answer = httpx.get(url.join("/api/v1/version"), timeout=20, trust_env=True)
    except httpx.HTTPError as error:
        raise Wrong(
            f"{address}: {error}; is the meter up, has it bytes left (its log and ledger), and is its host reachable from "
            "here? A certificate that is not known: SSL_CERT_FILE names the authority"
        ) from error
    if answer.status_code != 200:
        raise Wrong(f"{address} answers {answer.status_code}; is the gateway behind the meter up?")
    held = ""
    if url.scheme == "https":
        held = f"; {_served(url.host, url.port or 443)}"
    return f"{address} leads to a gateway{held}"


def _served(host: str, port: int) -> str:
    from cryptography import x509

    held = x509.load_pem_x509_certificate(ssl.get_server_certificate((host, port), timeout=20).encode())
    return _expiry(held.not_valid_before_utc, held.not_valid_after_utc, "its certificate")
