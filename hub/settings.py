"""The settings of the gateway and the executor: one TOML file. Docs: docs/gateway.md."""

from __future__ import annotations

import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from millpond.store.errors import InvalidInput


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Weights(_Section):
    """Where capture workers find a model (`[models.NAME]`, a name of the policy file)."""

    path: str
    """Folder of the weights, as the workers see it."""
    adapters: dict[str, str] = {}
    """Name to folder of the LoRA adapters that jobs may name."""


class JupyterHub(_Section):
    """The gateway is a service of a JupyterHub, which sets the environment variables JUPYTERHUB_* (`[jupyterhub]`)."""

    cache_seconds: int = Field(default=10, ge=0, le=300)
    """How long the Hub's word on a token holds; a deleted token works so long."""


class Settings(_Section):
    """The whole file. Relative paths are relative to its folder."""

    lake: str
    """Folder or URL of the lake."""
    database: str
    """sqlite:///FILE or postgresql+psycopg://..."""
    policy: Path
    """The policy file."""
    listen: str = "127.0.0.1:8910"
    """HOST:PORT, or unix:PATH."""
    certificate: Path | None = None
    """PEM file of the certificate with which the gateway serves HTTPS; needed where `listen` is not of this machine."""
    key: Path | None = None
    """PEM file of the certificate's key."""
    origin: str = "http://127.0.0.1:8910"
    """Where browsers find the gateway: scheme, host and port. Posts from other origins are refused. https, but on loopback."""
    tls_proxy: bool = False
    """A proxy before `listen` terminates TLS: the gateway may listen without a certificate where others reach it."""
    tokens: Path | None = None
    """The token file; made by `millpond token new`."""
    jupyterhub: JupyterHub | None = None
    """In place of a token file."""
    dictionary: Path | None = None
    """What both sides prime the text model with; without it no text leaves."""
    models: dict[str, Weights] = {}
    """By their names in the policy file."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Dask workers that the executor starts; 0 runs passes in its own process."""
    lease_seconds: float = Field(default=60.0, ge=1, le=3600)
    """A job whose executor was silent for so long is taken over by another."""
    poll_seconds: float = Field(default=0.05, ge=0.01, le=60)
    """How often an idle executor looks for a job."""
    max_queued: int = Field(default=100, ge=1)
    """Jobs of one user that may wait."""
    max_running: int = Field(default=4, ge=1)
    """Jobs of one user that run at a time."""
    max_project_queued: int = Field(default=400, ge=1)
    """Jobs of one project that may wait."""
    max_project_running: int = Field(default=16, ge=1)
    """Jobs of one project that run at a time."""
    max_user_bytes: int = Field(default=4 << 30, ge=1)
    """Bytes of prompts, labels and jobs that one user may bring into all projects."""
    max_project_bytes: int = Field(default=16 << 30, ge=1)
    """Bytes that the members of one project may bring into it."""
    memory_bytes: int | None = Field(default=None, ge=1 << 28)
    """Memory of each process of an executor, beyond which its job fails; by default three quarters of the machine's."""

    @field_validator("origin")
    @classmethod
    def _origin(cls, given: str) -> str:
        parts = urlsplit(given)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
            raise ValueError("give scheme, host and port, such as https://hub.example.org")
        return given

    @model_validator(mode="after")
    def _one_way_in(self) -> Settings:
        if (self.tokens is None) == (self.jupyterhub is None):
            raise ValueError("give either tokens, a token file, or a section [jupyterhub]")
        return self

    @model_validator(mode="after")
    def _both_files(self) -> Settings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("give both certificate and key, or neither")
        return self

    @model_validator(mode="after")
    def _encrypted(self) -> Settings:
        """Cookies, tokens and results cross in the clear on loopback only; https is what `__Host-` cookies need."""
        parts = urlsplit(self.origin)
        if parts.scheme == "http" and not _loopback(parts.hostname or ""):
            raise ValueError(f"origin is {self.origin!r}: plain http is for loopback only; give https")
        if parts.scheme == "http" and (self.certificate is not None or self.tls_proxy):
            raise ValueError(f"origin is {self.origin!r} but TLS is terminated before or by the gateway; give https")
        host = self.listen.rpartition(":")[0].strip("[]")
        open_to_others = not self.listen.startswith("unix:") and not _loopback(host)
        if open_to_others and self.certificate is None and not self.tls_proxy:
            raise ValueError(
                f"listen is {self.listen!r} without a certificate: give certificate and key, listen on loopback or a "
                "socket, or declare with tls_proxy = true that a proxy before it terminates TLS"
            )
        return self


def _loopback(host: str) -> bool:
    """Whether `host` is this machine: by address, or by a name that browsers resolve to it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def read_settings(path: Path) -> Settings:
    """The settings in the TOML file `path`.

    Raises:
        InvalidInput: it cannot be read, or a field is unknown or not possible.
    """
    try:
        found = Settings.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the settings {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"settings {path}: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}") from error
    folder = path.resolve().parent
    changes: dict[str, object] = {
        name: folder / value
        for name in ("policy", "tokens", "dictionary", "certificate", "key")
        if (value := getattr(found, name)) is not None
    }
    if "://" not in found.lake:
        changes["lake"] = str(folder / found.lake)
    return found.model_copy(update=changes)
