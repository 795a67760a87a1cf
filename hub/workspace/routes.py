"""The proxy's table: which server a host and path belong to, kept on disk so that the proxy may restart without the hub."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from millpond.hub.workspace.settings import HUB_PORT, Workspace
from millpond.store.errors import InvalidInput


@dataclass(frozen=True)
class Route:
    """One line of the table."""

    routespec: str
    """`host/path/`, or `/` for everything else."""
    target: str
    """As the hub gave it."""
    data: dict[str, Any]

    @property
    def user(self) -> str | None:
        """Whose notebook server it is, if it is one."""
        return self.data.get("user")

    @property
    def path(self) -> str:
        """The path part, with a slash at its end."""
        return self.routespec[self.routespec.index("/") :]


class Routes:
    """The table."""

    def __init__(self, file: Path, settings: Workspace) -> None:
        self.file, self.settings = file, settings
        self._routes: dict[str, Route] = {}
        if file.exists():
            self._routes = {spec: Route(**route) for spec, route in json.loads(file.read_text()).items()}

    def socket(self, route: Route) -> Path | None:
        """The unix socket behind a route; None for an address of its own, which is the egress meter's."""
        parts = urlsplit(route.target)
        if parts.scheme == "http+unix":
            return Path(unquote(parts.netloc.rpartition(":")[0] if ":" in parts.netloc else parts.netloc))
        return self.settings.hub_socket if parts.port == HUB_PORT else None

    def check(self, route: Route) -> None:
        """Raise InvalidInput unless the route leads to the hub, to a user's own socket, or to the meter."""
        place = self.socket(route)
        if route.user is not None:
            allowed = place == self.settings.zone(route.user) / "server.sock"
        elif route.data.get("service") is not None:
            allowed = place is None and urlsplit(route.target).netloc == self.settings.gateway
        else:
            allowed = route.routespec == "/" and place == self.settings.hub_socket
        if not allowed:
            raise InvalidInput(f"route {route.routespec} to {route.target} is not one of this workspace's")

    def add(self, route: Route) -> None:
        """Add or replace."""
        self.check(route)
        self._routes[route.routespec] = route
        self._save()

    def remove(self, routespec: str) -> None:
        """Remove if it is there."""
        if self._routes.pop(routespec, None) is not None:
            self._save()

    def all(self) -> dict[str, dict[str, Any]]:
        """As the hub wants them."""
        return {spec: asdict(route) for spec, route in self._routes.items()}

    def find(self, host: str, path: str) -> Route | None:
        """The longest route that matches."""
        whole = f"{host}{path}/" if not path.endswith("/") else f"{host}{path}"
        matching = [spec for spec in self._routes if spec != "/" and whole.startswith(spec)]
        return self._routes.get(max(matching, key=len, default="/"))

    def _save(self) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self.all()))
        fresh.replace(self.file)
