"""A headless Chromium, driven over the DevTools protocol's pipe: what a person with a keyboard does, and what it asks for."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {"Tab": 9, "Enter": 13, "Space": 32}


class Browser:
    """One tab of a browser with a profile of its own."""

    def __init__(self) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            raise RuntimeError("Chromium is not installed; run: make test (or apt-get install chromium)")
        self._profile = tempfile.mkdtemp(prefix="chrome", dir="/tmp")
        command_in, self._write = os.pipe()
        self._read, answers_out = os.pipe()
        # fmt: off
        arguments = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,900",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank",
        ]
        # fmt: on
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{command_in} 4>&{answers_out}', "bash", *arguments],
            pass_fds=(command_in, answers_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_in)
        os.close(answers_out)
        self._number = 0
        self._data = b""
        self._session: str | None = None
        self._loads = 0
        self.requests: list[str] = []
        """Addresses that anything in the tab asked for."""
        self.complaints: list[str] = []
        """What the console said: scripts' errors, and what the content security policy stopped."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            found = self._next(deadline)
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])

    def go(self, url: str) -> None:
        """Open an address and wait until it is loaded."""
        before = self._loads
        self.call("Page.navigate", url=url)
        self.wait_loaded(before)

    def wait_loaded(self, before: int | None = None) -> None:
        """Wait for the next page, or the one after `before` loads."""
        before = self._loads if before is None else before
        deadline = time.monotonic() + 30
        while self._loads <= before:
            self._next(deadline)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self) -> str:
        """What a reader sees."""
        return str(self.js("document.body.innerText"))

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        """Wait until an expression is true, also while pages are replaced."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.js(expression):
                    return
            except RuntimeError:
                pass  # the page is being replaced
            assert time.monotonic() < deadline, f"never came true: {expression}\n{self.text()}"
            time.sleep(0.1)

    def press(self, key: str, *, loads: bool = False) -> None:
        """A key; with `loads`, wait for the page that it opens."""
        before = self._loads
        about: dict[str, Any] = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", "Space": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        if loads:
            self.wait_loaded(before)

    def write(self, text: str) -> None:
        """Type into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, selector: str) -> None:
        """Press Tab until the element has the focus, as a keyboard's user does."""
        for _ in range(60):
            if self.js(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab")
        raise AssertionError(f"Tab never reaches {selector}\n{self.text()}")

    def screenshot(self, path: Path) -> None:
        """The tab as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def dark(self, dark: bool) -> None:
        """Prefer the dark or the light scheme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def scripts(self, allowed: bool) -> None:
        """Switch scripts on or off, from the next page on."""
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._data:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._data += part
        line, _, self._data = self._data.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        params = found.get("params", {})
        match found.get("method"):
            case "Page.loadEventFired":
                self._loads += 1
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded" if params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
        return found
