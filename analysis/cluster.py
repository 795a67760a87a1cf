"""The Dask cluster of a lake: started, reached and scaled as its configuration declares, for as long as a `with` lasts.

A scheduler runs whatever reaches it, so every kind uses TLS, and no address is ever handed out of the vault.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from millpond.analysis.passes import running
from millpond.store.capture_spec import first_problem
from millpond.store.cluster import Address, ClusterSettings, Gateway, Kubernetes, Local, Slurm, TlsFiles
from millpond.store.configuration import read_configuration
from millpond.store.errors import ClusterUnavailable, InvalidInput

if TYPE_CHECKING:
    from millpond.store.lake import Lake


@contextmanager
def lake_cluster(lake: Lake, settings: ClusterSettings | None = None) -> Iterator[Any]:
    """A client of the cluster that `lake` declares, or of `settings`; passes inside the `with` run on it.

    They prefer the workers that `hosts` of the lake's configuration names for what they read.

    Raises:
        ClusterUnavailable: it cannot be started or reached, or has no workers.
    """
    configuration = read_configuration(lake)
    hosts = {f"{lake.url}/{path}": host for path, host in configuration.hosts.items()}
    with open_cluster(settings or configuration.cluster or Local()) as client, running(client, hosts=hosts):
        yield client


def chosen_cluster(
    lake: Lake, *, scheduler: str = "", workers: int | None = None, memory_limit: str = "auto"
) -> AbstractContextManager[Any]:
    """What is asked for, else what the lake declares, else workers of this machine; nothing starts before it is entered.

    Args:
        lake: says which cluster, and which host holds what.
        scheduler: address of a running scheduler.
        workers: so many of this machine, of one thread each; 0 runs passes in this process (the client is None).
        memory_limit: of each of those workers.

    Raises:
        InvalidInput: the arguments contradict each other, or one cannot be used.
    """
    if workers is not None and workers < 0:
        raise InvalidInput(f"workers is {workers}; give 0 or more")
    if scheduler and workers is not None:
        raise InvalidInput(f"scheduler is {scheduler!r} and workers {workers}; give one of the two")
    if workers == 0:
        return running(in_process=True)
    settings = read_configuration(lake).cluster
    try:
        if scheduler:
            settings = Address(address=scheduler)
        elif workers is not None:
            settings = Local(workers=workers, memory=memory_limit)
        elif settings is None:
            settings = Local(memory=memory_limit)
    except ValidationError as error:
        raise InvalidInput(f"{'scheduler' if scheduler else 'workers'}: {first_problem(error)}") from error
    if memory_limit != "auto" and not (isinstance(settings, Local) and settings.memory == memory_limit):
        raise InvalidInput(
            f"memory_limit is {memory_limit!r}, but these workers are not the job's own; leave it out, or give workers"
        )
    return lake_cluster(lake, settings)


def look_around(lake_url: str) -> dict[str, str]:
    """Versions that must be the same on both sides, once the lake was opened there; for `Client.run`.

    Raises:
        MillpondError: the lake cannot be reached from here.
    """
    import platform
    from importlib.metadata import version

    from millpond.store.lake import open_lake

    open_lake(lake_url).runs()
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, **{name: version(name) for name in ("millpond", "dask", "distributed", "numpy")}}


def with_workers(settings: ClusterSettings | None, workers: int) -> ClusterSettings:
    """The same cluster with exactly so many workers, or as many of this machine where none is declared."""
    if settings is None:
        return Local(workers=workers)
    if isinstance(settings, Address):
        return settings
    return settings.model_copy(update={"workers": workers, "minimum": None})


@contextmanager
def open_cluster(settings: ClusterSettings) -> Iterator[Any]:
    """A `distributed.Client` of the declared cluster; what was started for it ends with the `with`.

    Raises:
        ClusterUnavailable: it cannot be started or reached, or has too few workers after `wait_s`.
    """
    with _STARTS[settings.kind](settings) as client:
        wanted = 1 if isinstance(settings, Address) else settings.fewest
        try:
            client.wait_for_workers(wanted, timeout=settings.wait_s)
        except TimeoutError:
            there = len(client.scheduler_info(n_workers=-1)["workers"])
            raise ClusterUnavailable(
                f"the {settings.kind} cluster has {there} of {wanted} workers after {settings.wait_s:g} s; "
                f"{_LOOK[settings.kind]}, or raise wait_s"
            ) from None
        yield client


_LOOK = {
    "local": "look at the messages of the workers above",
    "address": "start workers there",
    "slurm": "look at squeue and at the jobs' logs in shared_folder",
    "kubernetes": "look at kubectl get pods and the operator's log",
    "gateway": "look at the gateway's log and its limits",
}


@contextmanager
def _local(settings: Local) -> Iterator[Any]:
    from distributed import Client, LocalCluster, Security

    with (
        LocalCluster(
            n_workers=settings.fewest,
            threads_per_worker=settings.threads,
            memory_limit=settings.memory,
            resources={"GPU": settings.gpus} if settings.gpus else None,
            security=Security.temporary(),
            protocol="tls://",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if settings.minimum is not None:
            cluster.adapt(minimum=settings.minimum, maximum=settings.workers)
        yield client


@contextmanager
def _address(settings: Address) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(
            settings.address, security=client_security(settings.tls), timeout=settings.wait_s, set_as_default=False
        )
    except (OSError, ValueError, TypeError) as error:  # ValueError, TypeError: Dask without the TLS files it needs
        raise ClusterUnavailable(
            f"scheduler: {settings.address!r} cannot be reached ({error}); check the address and the TLS files"
        ) from error
    with client:
        yield client


def client_security(tls: TlsFiles | None) -> Any:
    """How a client proves who it is; None for Dask's own configuration.

    Raises:
        ClusterUnavailable: a file cannot be read.
    """
    from distributed import Security

    if tls is None:
        return None
    for name, path in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)):
        if not os.access(path, os.R_OK):
            raise ClusterUnavailable(f"tls.{name}: {path!r} cannot be read; check the path and its permissions")
    return Security(tls_ca_file=tls.ca, tls_client_cert=tls.cert, tls_client_key=tls.key, require_encryption=True)


@contextmanager
def _slurm(settings: Slurm) -> Iterator[Any]:
    from distributed import Client, Security

    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ClusterUnavailable("kind slurm needs dask-jobqueue; run: pip install 'millpond[slurm]'") from error
    if shutil.which("sbatch") is None:
        raise ClusterUnavailable(
            "kind slurm needs Slurm's commands, and sbatch is not on the PATH; run this on a login node"
        )
    with (
        _started(
            "slurm",
            "check that shared_folder can be written and that the interface exists",
            lambda: SLURMCluster(**slurm_options(settings), security=Security.temporary()),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if settings.minimum is None:
            cluster.scale(settings.workers)
        else:
            cluster.adapt(minimum=settings.minimum, maximum=settings.workers)
        yield client


def slurm_options(settings: Slurm) -> dict[str, Any]:
    """Arguments of `dask_jobqueue.SLURMCluster`, all but the certificates."""
    directives = list(settings.directives)
    extra = ["--no-dashboard"]
    if settings.gpus:
        directives.append(f"--gpus-per-task={settings.gpus}")
        extra += ["--resources", f"GPU={settings.gpus}"]
    return {
        "cores": settings.threads, "memory": settings.memory, "processes": 1, "queue": settings.partition,
        "account": settings.account, "walltime": settings.walltime, "interface": settings.interface,
        "job_extra_directives": directives, "job_script_prologue": list(settings.prologue),
        "worker_extra_args": extra, "python": settings.python, "job_name": "millpond",
        "log_directory": settings.shared_folder, "shared_temp_directory": settings.shared_folder,
        "protocol": "tls://", "scheduler_options": {"dashboard": False},
    }  # fmt: skip


@contextmanager
def _kubernetes(settings: Kubernetes) -> Iterator[Any]:
    from millpond.analysis.kubernetes import deployed

    with (
        deployed(settings) as address,
        _address(Address(address=address, tls=settings.tls, wait_s=settings.wait_s)) as client,
    ):
        yield client


@contextmanager
def _gateway(settings: Gateway) -> Iterator[Any]:
    try:
        from dask_gateway import BasicAuth, GatewayCluster, JupyterHubAuth, KerberosAuth
    except ImportError as error:
        raise ClusterUnavailable("kind gateway needs dask-gateway; run: pip install 'millpond[gateway]'") from error

    def basic() -> Any:
        return BasicAuth(os.environ.get("DASK_GATEWAY_USER"), os.environ.get("DASK_GATEWAY_PASSWORD"))

    auth: dict[str, Callable[[], Any]] = {"basic": basic, "jupyterhub": JupyterHubAuth, "kerberos": KerberosAuth}
    cluster = _started(
        "gateway",
        f"check {settings.address}, its log and your credentials in the environment",
        lambda: GatewayCluster(
            address=settings.address,
            proxy_address=settings.proxy_address,
            auth=auth[settings.auth](),
            **settings.options,
        ),
    )
    try:
        with cluster, cluster.get_client(set_as_default=False) as client:
            if settings.minimum is None:
                cluster.scale(settings.workers)
            else:
                cluster.adapt(minimum=settings.minimum, maximum=settings.workers)
            yield client
    finally:
        # its destructor closes it once more, on a loop that has ended, and prints a traceback (dask-gateway 2026.3.0)
        cluster.gateway.close = lambda: None


def _started(kind: str, remedy: str, start: Callable[[], Any]) -> Any:
    try:
        return start()
    except Exception as error:  # engines raise what they like
        raise ClusterUnavailable(
            f"the {kind} cluster did not start ({type(error).__name__}: {error}); {remedy}"
        ) from error


_STARTS: dict[str, Callable[[Any], Any]] = {
    "local": _local, "address": _address, "slurm": _slurm, "kubernetes": _kubernetes, "gateway": _gateway,
}  # fmt: skip
