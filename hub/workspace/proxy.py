"""The hub's side of the proxy: routes are told to the program in proxy_server.py, which the hub neither starts nor stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
from jupyterhub.proxy import Proxy
from traitlets import Unicode


class MeteredProxy(Proxy):  # type: ignore[misc]
    """Adds, removes and lists the routes of the proxy program, over a unix socket that only hub and proxy can reach."""

    socket = Unicode("/run/millpond/proxy/api.sock", help="Where the proxy program takes routes.").tag(config=True)
    should_start = False

    async def _ask(self, method: str, **parameters: Any) -> Any:
        connector = aiohttp.UnixConnector(self.socket)
        timeout = aiohttp.ClientTimeout(total=10)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, "http://proxy/routes", json=parameters) as answer,
        ):
            answer.raise_for_status()
            return await answer.json()

    async def add_route(self, routespec: str, target: str, data: Mapping[str, Any]) -> None:
        """Send what matches `routespec` to `target` from now on."""
        await self._ask("PUT", routespec=self.validate_routespec(routespec), target=target, data=dict(data))

    async def delete_route(self, routespec: str) -> None:
        """Forget a route; one that is not there is no error."""
        await self._ask("DELETE", routespec=self.validate_routespec(routespec))

    async def get_all_routes(self) -> dict[str, Any]:
        """All routes by their specification."""
        routes: dict[str, Any] = await self._ask("GET")
        return routes
