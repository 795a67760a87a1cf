"""JupyterHub's side of a workspace: asks the spawn helper, and has no right to do any of it itself."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jupyterhub.spawner import Spawner
from traitlets import Unicode

from millpond.hub.workspace.helper import ENVIRONMENT
from millpond.hub.workspace.settings import HUB_PORT, SERVER_PORT
from millpond.store.errors import IsolationFailed


class SpawnFailed(IsolationFailed):
    """No workspace; the hub's page shows why."""

    @property
    def jupyterhub_message(self) -> str:
        """What JupyterHub shows in the browser."""
        return str(self)


class BwrapSpawner(Spawner):  # type: ignore[misc]
    """One workspace a user, made by the helper in bubblewrap."""

    helper = Unicode("/run/millpond/helper/spawn.sock", help="Socket of the spawn helper.").tag(config=True)

    async def _ask(self, **request: object) -> dict[str, Any]:
        try:
            reader, writer = await asyncio.open_unix_connection(self.helper, limit=1 << 18)
        except OSError as error:
            raise IsolationFailed(
                f"the spawn helper does not answer at {self.helper}: {error}; is it running?"
            ) from error
        try:
            writer.write(json.dumps({**request, "user": self.user.name}).encode() + b"\n")
            line = await reader.readline()
        finally:
            writer.close()
        if not line:
            raise IsolationFailed(
                "the spawn helper refused the connection; the hub runs as another user than it expects"
            )
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise IsolationFailed(answer["error"])
        return answer

    async def start(self) -> str:
        """Start the workspace; the address of its server, a unix socket."""
        self.ip, self.port = "127.0.0.1", SERVER_PORT
        self.hub_connect_url = f"http://127.0.0.1:{HUB_PORT}"
        environment = {name: str(value) for name, value in self.get_env().items() if name in ENVIRONMENT}
        try:
            answer = await self._ask(do="start", environment=environment)
        except IsolationFailed as error:
            raise SpawnFailed(str(error)) from None
        return f"http+unix://{quote(str(Path(answer['socket'])), safe='')}"

    async def stop(self, now: bool = False) -> None:
        """Stop it."""
        await self._ask(do="stop", now=now)

    async def poll(self) -> int | None:
        """None while it runs, else its exit code. After a restart of the hub the helper still knows."""
        answer = await self._ask(do="poll")
        return None if answer["running"] else int(answer["code"] or 0)
