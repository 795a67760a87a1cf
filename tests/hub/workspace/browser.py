"""A browser without a window: logs in, starts servers and runs cells, with the cookies and headers that a browser sends."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import uuid
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL


class Loopback(AbstractResolver):
    """As browsers do: every name below localhost is this machine."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    async def close(self):
        pass


class Browser:
    """One person's session."""

    def __init__(self, origin: str, user: str, password: str) -> None:
        self.origin, self.user, self.password = origin, user, password
        host = urlsplit(origin).netloc
        self.mine = f"http://{user}.{host}/user/{user}"
        secure = [URL(f"http://{name}") for name in (host, f"{user}.{host}", f"gateway--service.{host}")]
        jar = aiohttp.CookieJar(treat_as_secure_origin=secure)
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=Loopback()),
            cookie_jar=jar,
            timeout=aiohttp.ClientTimeout(total=120),
        )

    async def close(self) -> None:
        await self.http.close()

    def cookie(self, url: str, name: str) -> str:
        """The value of a cookie that would be sent to `url`."""
        for key, morsel in self.http.cookie_jar.filter_cookies(URL(url)).items():
            if key == name:
                return str(morsel.value)
        raise KeyError(name)

    async def login(self) -> None:
        url = f"{self.origin}/hub/login"
        async with self.http.get(url) as page:
            form = await page.text()
        token = re.search(r'name="_xsrf" value="([^"]+)"', form).group(1)
        fields = {"username": self.user, "password": self.password, "_xsrf": token}
        async with self.http.post(url, data=fields, headers={"Origin": self.origin}) as page:
            assert page.status == 200, (page.status, (await page.text())[:300])
            assert "/hub/login" not in page.url.path, "the password was refused"

    async def spawn(self) -> tuple[bool, str]:
        """Start the server and wait; whether it runs, and the last event's message."""
        token = self.cookie(f"{self.origin}/hub/", "_xsrf")
        headers = {"Origin": self.origin, "X-XSRFToken": token}
        start = f"{self.origin}/hub/api/users/{self.user}/server"
        async with self.http.post(start, headers=headers, json={}) as answer:
            assert answer.status in (201, 202, 400, 500), (answer.status, await answer.text())
            if answer.status == 201:
                return True, ""
            if answer.status >= 400:
                text = await answer.text()
                if "already running" in text:
                    return True, ""
                if "pending" not in text:
                    return False, text
        last = {}
        async with self.http.get(f"{start}/progress", headers=headers) as events:
            async for line in events.content:
                if line.startswith(b"data:"):
                    last = json.loads(line[5:])
                    if last.get("ready") or last.get("failed"):
                        break
        return bool(last.get("ready")), str(last.get("message"))

    async def stop(self) -> None:
        token = self.cookie(f"{self.origin}/hub/", "_xsrf")
        headers = {"Origin": self.origin, "X-XSRFToken": token}
        url = f"{self.origin}/hub/api/users/{self.user}/server"
        for _ in range(100):
            async with self.http.delete(url, headers=headers) as answer:
                if answer.status in (204, 404) or (answer.status == 400 and "not running" in await answer.text()):
                    return
            await asyncio.sleep(0.2)
        raise AssertionError("the server does not stop")

    async def open(self) -> None:
        """Open Lab, which takes the browser through the hub's OAuth."""
        async with self.http.get(f"{self.mine}/lab") as page:
            assert page.status == 200, (page.status, page.url, (await page.text())[:300])

    def _headers(self) -> dict[str, str]:
        origin = URL(self.mine).origin()
        return {
            "Origin": str(origin),
            "X-XSRFToken": self.cookie(f"{self.mine}/lab", "_xsrf"),
            "Sec-Fetch-Site": "same-origin",
        }

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """One request to the notebook server; `path` is sent as it is spelled."""
        url = URL(f"{self.mine}/{path}", encoded=True)
        async with self.http.request(method, url, headers=self._headers(), allow_redirects=False, **options) as answer:
            return answer.status, await answer.read()

    async def kernel(self) -> str:
        status, body = await self.ask("POST", "api/kernels", json={"name": "python3"})
        assert status == 201, (status, body)
        return str(json.loads(body)["id"])

    async def run(self, kernel: str, code: str, seconds: float = 60) -> str:
        """Run a cell; what it printed, and its traceback if it failed."""
        url = URL(f"{self.mine}/api/kernels/{kernel}/channels", encoded=True)
        async with self.http.ws_connect(url, headers=self._headers(), max_msg_size=0) as ws:
            return await self.execute(ws, code, seconds)

    @staticmethod
    async def execute(ws: aiohttp.ClientWebSocketResponse, code: str, seconds: float = 60) -> str:
        message = uuid.uuid4().hex
        header = {
            "msg_id": message,
            "msg_type": "execute_request",
            "username": "",
            "session": uuid.uuid4().hex,
            "version": "5.3",
            "date": "",
        }
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        await ws.send_json(
            {"header": header, "parent_header": {}, "metadata": {}, "channel": "shell", "content": content}
        )
        said = ""
        async with asyncio.timeout(seconds):
            async for raw in ws:
                if raw.type != aiohttp.WSMsgType.TEXT:
                    continue
                reply = json.loads(raw.data)
                if reply["msg_type"] == "status" and reply["content"]["execution_state"] in ("restarting", "dead"):
                    return said + "\n<the kernel ended>"
                if reply["parent_header"].get("msg_id") != message:
                    continue
                if reply["msg_type"] == "stream":
                    said += reply["content"]["text"]
                elif reply["msg_type"] == "error":
                    said += "\n".join(reply["content"]["traceback"])
                elif reply["msg_type"] == "status" and reply["content"]["execution_state"] == "idle":
                    return said
        return said + f"\n<closed {ws.close_code}>"
