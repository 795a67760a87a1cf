"""Which Dask cluster passes run on: the declared setting `cluster` of a lake; `millpond.analysis.cluster` starts it."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsFiles(_Settings):
    """PEM files of one side of a connection; both sides prove who they are."""

    ca: str
    """Certificate of who signed both sides' certificates."""
    cert: str
    """Our certificate."""
    key: str
    """Its key."""


class _Workers(_Settings):
    workers: int = Field(ge=1)
    """Most workers."""
    minimum: int | None = Field(default=None, ge=1)
    """Fewest workers: there are more while tasks wait for one. By default there are always `workers`."""
    wait_s: float = Field(default=600, gt=0)
    """How long to wait for the fewest workers."""

    @model_validator(mode="after")
    def _ordered(self) -> _Workers:
        if self.minimum is not None and self.minimum > self.workers:
            raise ValueError(f"minimum {self.minimum} is above workers {self.workers}; give less")
        return self

    @property
    def fewest(self) -> int:
        """Workers that there always are."""
        return self.workers if self.minimum is None else self.minimum


class _SizedWorkers(_Workers):
    threads: int = Field(default=1, ge=1)
    """Of a worker."""
    memory: str
    """Of a worker, such as `4GB`."""
    gpus: int = Field(default=0, ge=0)
    """Of a worker: asked for where somebody hands them out, and declared to Dask as its resource `GPU`."""

    @field_validator("memory")
    @classmethod
    def _is_bytes(cls, value: str) -> str:
        if value != "auto" and re.fullmatch(r"[1-9]\d*(\.\d+)? ?[kMGT]i?B", value) is None:
            raise ValueError("give a number of bytes with its unit, such as 4GB or 512MiB")
        return value


class Local(_SizedWorkers):
    """Processes of this machine, over TLS on loopback with certificates of their own."""

    kind: Literal["local"] = "local"
    workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    """Most workers; by default one a core."""
    memory: str = "auto"
    """Of a worker; `auto` is an equal share of the machine's."""


class Address(_Settings):
    """A scheduler that somebody else runs."""

    kind: Literal["address"] = "address"
    address: str
    """Such as `tls://scheduler.vault:8786`. Without TLS it must be on loopback: who reaches a scheduler runs code there."""
    tls: TlsFiles | None = None
    """By default as Dask's own configuration says (`distributed.comm.tls`)."""
    wait_s: float = Field(default=20, gt=0)
    """How long to wait for the scheduler and a first worker."""

    @field_validator("address")
    @classmethod
    def _safe(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        host = urlsplit(f"//{rest}").hostname
        if scheme not in ("tls", "tcp") or not host or not rest.rpartition(":")[2].isdigit():
            raise ValueError("give tls://HOST:PORT")
        if scheme == "tcp" and not _is_loopback(host):
            raise ValueError("tcp:// is allowed on loopback only; run the scheduler with TLS and give tls://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _tls_is_used(self) -> Address:
        if self.tls is not None and not self.address.startswith("tls://"):
            raise ValueError("tls files belong to a tls:// address")
        return self


class Slurm(_SizedWorkers):
    """One Slurm job a worker, through dask-jobqueue; the scheduler runs in this process, over TLS."""

    kind: Literal["slurm"] = "slurm"
    shared_folder: str
    """Folder that this host and all nodes see at the same path: certificates and the jobs' logs."""
    partition: str | None = None
    """By default Slurm's."""
    account: str | None = None
    """Who pays."""
    walltime: str = Field(default="01:00:00", pattern=r"^(\d+-)?\d{1,2}:\d\d:\d\d$")
    """After which Slurm ends a worker; what it had not finished is done again by another."""
    interface: str | None = None
    """Network interface between this host and the nodes, such as `ib0`; the same on all."""
    directives: tuple[str, ...] = ()
    """Further `#SBATCH` options, such as `--constraint=nvme`."""
    prologue: tuple[str, ...] = ()
    """Shell lines before the worker starts, such as `module load ...`."""
    python: str | None = None
    """Python of the nodes; by default the path of this one."""

    @model_validator(mode="after")
    def _size_is_given(self) -> Slurm:
        if self.memory == "auto":
            raise ValueError("memory cannot be auto here; say what to ask Slurm for, such as 16GB")
        return self


class Kubernetes(_SizedWorkers):
    """A DaskCluster of the dask-kubernetes operator, over TLS with certificates from a secret."""

    kind: Literal["kubernetes"] = "kubernetes"
    image: str
    """Of scheduler and workers, with Millpond in it (examples/deploy/worker.Dockerfile)."""
    tls: TlsFiles
    """Our own files; our certificate and the pods' must be signed by the same."""
    tls_secret: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    """Secret of the pods with `ca.crt`, `tls.crt` and `tls.key`."""
    namespace: str = Field(default="vault", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Of the vault."""
    operator_namespace: str = Field(default="dask-operator", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Where the operator runs, which may reach the scheduler's web port."""
    environment_secret: str | None = None
    """Secret whose entries become the pods' environment: the lake's AWS_* variables."""
    service_account: str | None = None
    """Of the pods."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes."""

    @model_validator(mode="after")
    def _size_is_given(self) -> Kubernetes:
        if self.memory == "auto":
            raise ValueError("memory cannot be auto here; say what to ask Kubernetes for, such as 16GiB")
        return self


class Gateway(_Workers):
    """A cluster that dask-gateway starts for us; it decides sizes and encrypts."""

    kind: Literal["gateway"] = "gateway"
    address: str = Field(pattern=r"^https?://")
    """Of the gateway's API."""
    proxy_address: str | None = Field(default=None, pattern=r"^(gateway|tls)://")
    """Of the proxy to schedulers; by default the API's host and port."""
    auth: Literal["basic", "jupyterhub", "kerberos"] = "basic"
    """`basic` takes DASK_GATEWAY_USER and DASK_GATEWAY_PASSWORD, `jupyterhub` JUPYTERHUB_API_TOKEN, from the environment."""
    options: dict[str, str | int | float | bool] = {}
    """Cluster options that the gateway's operator offers, such as `worker_cores`."""

    @field_validator("address")
    @classmethod
    def _safe(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme == "http" and not _is_loopback(url.hostname or ""):
            raise ValueError(
                "http:// is allowed on loopback only: the password would travel in the clear; give https://"
            )
        return value


ClusterSettings: TypeAlias = Annotated[Local | Address | Slurm | Kubernetes | Gateway, Field(discriminator="kind")]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _ClusterFile(_Settings):
    cluster: ClusterSettings | None = None
    hosts: dict[str, str] = {}


def read_cluster_file(path: Path) -> dict[str, Any]:
    """The tables `[cluster]` and `[hosts]` of a TOML file, as fields of a lake's configuration; only those it has.

    Raises:
        InvalidInput: the file cannot be read, or a field cannot be used.
    """
    try:
        found = _ClusterFile.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise InvalidInput(f"cluster file {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except ValidationError as error:
        raise InvalidInput(f"cluster file {str(path)!r}: {first_problem(error)}") from error
    except ValueError as error:
        raise InvalidInput(f"cluster file {str(path)!r} is not TOML: {error}") from error
    return {name: getattr(found, name) for name in found.model_fields_set}
