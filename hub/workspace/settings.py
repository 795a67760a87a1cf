"""Everything that the parts of a workspace agree on: addresses, folders, users and limits. Read once, by every part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput

USER = r"[a-z][a-z0-9-]{0,29}[a-z0-9]"
"""Names of users: also a label of a domain name. One of another's origin or of a service's is refused."""
RESERVED = frozenset({"services", "hub", "www", "localhost", "api", "admin-hub", "gateway", "static"})

HUB_PORT, GATEWAY_PORT, SERVER_PORT = 8901, 8910, 8888
"""Inside a workspace, on its own loopback interface."""


def is_user(name: str) -> bool:
    """Whether a user may have this name."""
    return re.fullmatch(USER, name) is not None and name not in RESERVED and "--" not in name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkspaceLimits(_Section):
    """Of one user's workspace."""

    memory: int = Field(default=2 << 30, ge=256 << 20)
    """Bytes."""
    cpus: float = Field(default=1.0, gt=0)
    """Cores."""
    processes: int = Field(default=256, ge=32)
    """Processes and threads."""
    home: int = Field(default=2 << 30, ge=16 << 20)
    """Bytes of the home folder."""
    scratch: int = Field(default=256 << 20, ge=1 << 20)
    """Bytes of /tmp."""
    connections: int = Field(default=64, ge=8)
    """Open at a time."""
    daily_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """That the proxy lets out of a workspace to the browser a day; outputs that carry plots are some 50 kB each."""
    required: bool = True
    """Refuse to start a workspace whose memory, CPU and processes cannot be limited."""


class Authentication(_Section):
    """Who people are: passwords kept by this hub, or an institution's OAuth provider."""

    kind: Literal["native", "oauth"] = "native"
    """Where people's passwords are."""
    authenticator: str = "generic-oauth"
    """With oauth: the name of an OAuthenticator, such as github, google, azuread or generic-oauth."""
    options: dict[str, Any] = {}
    """With oauth: its traits, such as client_id, oauth_callback_url, allowed_groups; the secret comes from the environment."""
    admins: tuple[str, ...] = ()
    """Users who may administer the hub."""
    groups: dict[str, tuple[str, ...]] = {}
    """Members of `researchers`, `reviewers` and `owners`; an OAuth provider that manages groups fills them itself."""

    @model_validator(mode="after")
    def _known(self) -> Authentication:
        for name in (*self.admins, *(member for members in self.groups.values() for member in members)):
            if not is_user(name):
                raise ValueError(f"{name!r} cannot be a user's name; use small letters, digits and single hyphens")
        if strange := set(self.groups) - {"researchers", "reviewers", "owners"}:
            raise ValueError(f"groups {sorted(strange)}; there are researchers, reviewers and owners")
        return self


class Tls(_Section):
    """Of the proxy's public address."""

    certificate: Path
    """PEM file of the certificate."""
    key: Path
    """PEM file of its key."""


class Workspace(_Section):
    """Where everything is. The folders' owners keep the parts apart: docs/workspace.md."""

    state: Path
    """What must outlast a restart: homes, the hub's database, counts."""
    run: Path = Path("/run/millpond")
    """Sockets; short, since a socket's path has at most 107 bytes."""
    origin: str = "http://localhost:8000"
    """Address of the hub; every user and the gateway get an origin of their own below it."""
    listen: str = "127.0.0.1:8000"
    tls: Tls | None = None
    gateway: str = "127.0.0.1:8911"
    """Where the egress meter listens: nothing reaches the gateway but through it."""
    database: str = ""
    """URL of the hub's database; a SQLite file in the state folder when empty."""
    first_uid: int = Field(default=50_000, ge=1000, le=2**31)
    """The hub's; then the proxy's, the meter's, the vault's, the relays', and from 100 on the users'."""
    limits: WorkspaceLimits = WorkspaceLimits()
    authentication: Authentication = Authentication()
    spawn_seconds: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _check(self) -> Workspace:
        check_origin(self.origin, tls=self.tls is not None)
        if not self.state.is_absolute() or not self.run.is_absolute():
            raise ValueError("state and run must be absolute paths")
        if len(str(self.run / "zones" / ("u" * 31) / "hub.sock")) > 100:
            raise ValueError(f"run is {self.run}; its path is too long for sockets, use one like /run/millpond")
        return self

    @property
    def host(self) -> str:
        """`localhost:8000`, as browsers name it."""
        return urlsplit(self.origin).netloc

    @property
    def hub_uid(self) -> int:
        """JupyterHub."""
        return self.first_uid

    @property
    def proxy_uid(self) -> int:
        """The proxy."""
        return self.first_uid + 1

    @property
    def meter_uid(self) -> int:
        """The egress meter, and the group that may reach the gateway's socket."""
        return self.first_uid + 2

    @property
    def vault_uid(self) -> int:
        """Gateway, executor and capture worker."""
        return self.first_uid + 3

    @property
    def relay_uid(self) -> int:
        """What passes bytes on between workspaces and the hub or the meter."""
        return self.first_uid + 4

    @property
    def front_gid(self) -> int:
        """Who may reach the hub's, the proxy's and the workspaces' sockets."""
        return self.first_uid + 10

    @property
    def hub_socket(self) -> Path:
        """JupyterHub's HTTP, API included."""
        return self.run / "hub" / "hub.sock"

    @property
    def proxy_socket(self) -> Path:
        """Where the hub tells the proxy its routes."""
        return self.run / "proxy" / "api.sock"

    @property
    def helper_socket(self) -> Path:
        """Where the hub asks for workspaces."""
        return self.run / "helper" / "spawn.sock"

    @property
    def gateway_socket(self) -> Path:
        """Where the gateway listens; only the meter connects."""
        return self.run / "gate" / "gateway.sock"

    def zone(self, user: str) -> Path:
        """The sockets of one user's workspace."""
        return self.run / "zones" / user


def check_origin(origin: str, *, tls: bool) -> None:
    """Raise ValueError for an address below which users' origins would not be apart."""
    parts = urlsplit(origin)
    host = parts.hostname or ""
    if parts.path or parts.query or parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"origin is {origin!r}; give scheme, host and port, such as https://millpond.example.org")
    if re.fullmatch(r"[0-9.]+", host) or ":" in host:
        raise ValueError(
            f"origin is {origin!r}: an address has no subdomains, so all users would share one origin with the reviewers' "
            "page, and a hostile notebook could approve its own release; use http://localhost:PORT or a name with wildcard DNS"
        )
    local = host == "localhost" or host.endswith(".localhost")
    if not local and parts.scheme != "https":
        raise ValueError(f"origin is {origin!r}: without https the host-prefixed cookies are not kept; use https")
    if tls and parts.scheme != "https":
        raise ValueError(f"origin is {origin!r} but a certificate is configured; use https")


def read_workspace(path: Path) -> Workspace:
    """The settings in a JSON file that `millpond up` wrote."""
    try:
        return Workspace.model_validate_json(path.read_text())
    except ValidationError as error:
        raise InvalidInput(f"{path}: {first_problem(error)}") from error
