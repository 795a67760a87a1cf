"""The lock-down is checked inside each server, and a spawn fails, with the reason, when anything is not in force."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from millpond.hub.workspace import session as sessions
from millpond.hub.workspace.config import gateway_origin
from millpond.hub.workspace.helper import ENVIRONMENT
from millpond.hub.workspace.sandbox import Sandbox
from millpond.hub.workspace.session import Session
from millpond.hub.workspace.settings import HUB_PORT
from millpond.store.errors import IsolationFailed

pytestmark = pytest.mark.slow


def environment(settings, user):
    origin = settings.origin.replace("//", f"//{user}.")
    values = {
        "API_TOKEN": "t" * 32, "API_URL": f"http://127.0.0.1:{HUB_PORT}/hub/api", "BASE_URL": "/", "CLIENT_ID": f"jupyterhub-user-{user}",
        "HOST": settings.origin, "OAUTH_CALLBACK_URL": f"{origin}/user/{user}/oauth_callback", "USER": user, "SERVER_NAME": "",
        "SERVICE_PREFIX": f"/user/{user}/", "SERVICE_URL": f"http://127.0.0.1:8888/user/{user}/", "DEFAULT_URL": "/lab",
        "OAUTH_ACCESS_SCOPES": "[]", "OAUTH_SCOPES": "[]",
    }  # fmt: skip
    found = {f"JUPYTERHUB_{name}": value for name, value in values.items()}
    assert set(found) <= ENVIRONMENT
    return found


@pytest.fixture
def attempt(front, monkeypatch):
    """Starts a workspace whose sandbox was changed; what the check found, or None when it started."""
    for name in ("zones", "homes", "masks"):
        (front.run_folder / name).mkdir(exist_ok=True)

    async def run(user):
        session = Session(front.settings, user, 53_900)
        try:
            await session.start(environment(front.settings, user))
        except IsolationFailed as error:
            return str(error), session
        await session.stop(now=True)
        return None, session

    def start(change=None, patch=None):
        if change is not None:
            monkeypatch.setattr(
                sessions, "Sandbox", lambda *a, **k: change(Sandbox(*a, **k)) if k.get("seccomp") else Sandbox(*a, **k)
            )
        if patch is not None:
            monkeypatch.setattr(Sandbox, "command", patch(Sandbox.command))
        said, session = front.do(run("sabotage"))
        assert not os.path.ismount(front.run_folder / "homes" / "sabotage")
        assert not front.settings.zone("sabotage").exists()
        assert session._group is not None
        assert session._group.processes() == []
        return said

    yield start
    (front.settings.state / "homes" / "sabotage.img").unlink(missing_ok=True)
    shutil.rmtree(front.run_folder / "masks" / "sabotage", ignore_errors=True)


def without(prefix):
    """A sandbox that lacks some read-only files."""
    return lambda s: dataclasses.replace(s, read={h: i for h, i in s.read.items() if not str(i).startswith(prefix)})


def edited(*changes):
    """bubblewrap's or setpriv's command line with arguments taken out or replaced."""

    def patch(original):
        def command(self, program):
            words = original(self, program)
            if self.seccomp is None:
                return words
            for old, new in changes:
                at = next(i for i in range(len(words)) if words[i : i + len(old)] == list(old))
                words[at : at + len(old)] = new
            return words

        return command

    return patch


def test_untouched_it_starts(attempt):
    assert attempt() is None


def test_every_missing_layer_is_named(attempt):
    """Five at once: the host's network and processes, its load, a writable folder, Lab's page configuration."""

    def change(sandbox):
        less = without("/etc/jupyter/labconfig")(sandbox)
        return dataclasses.replace(less, network=True, masks=(), write={**less.write, Path("/srv"): Path("/srv")})

    said = attempt(change, edited((("--unshare-pid",), [])))
    for found in (
        "network: ",
        "processes: sees",
        "masked files: /proc/loadavg",
        "files: /srv is writable",
        "plugins: on are",
    ):
        assert found in said, said


def test_kept_capabilities_a_missing_filter_and_quota_fail_the_spawn(attempt, monkeypatch):
    def home_without_quota(image, folder):
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, 53_900, 53_900)

    allow_all = bytes.fromhex("060000000000ff7f")  # one statement: return SECCOMP_RET_ALLOW
    monkeypatch.setattr(sessions, "program", lambda: allow_all)
    monkeypatch.setattr(sessions, "make_home", lambda image, quota, uid: False)
    monkeypatch.setattr(sessions, "mount_home", home_without_quota)
    said = attempt(None, edited((("--bounding-set=-all",), [])))
    for found in ("CapBnd", "system calls: unshare is not refused", "home: the home holds"):
        assert found in said, said


def test_a_server_that_does_not_check_is_killed(front, attempt, monkeypatch):
    """Without the trusted configuration the server runs, reports nothing, and is not kept."""
    monkeypatch.setattr(front, "settings", front.settings.model_copy(update={"spawn_seconds": 25.0}))
    said = attempt(without("/etc/jupyter/jupyter_server"))
    assert "did not report within 25 s" in said


def test_root_is_refused(attempt):
    assert "Running as root" in attempt(lambda s: dataclasses.replace(s, uid=0, gid=0))


def test_missing_limits_fail_the_spawn(front, monkeypatch, tmp_path):
    def nothing(*_):
        raise IsolationFailed("no control groups")

    monkeypatch.setattr(sessions, "make_group", nothing)
    session = Session(front.settings, "sabotage", 53_900)
    with pytest.raises(IsolationFailed, match="no control groups"):
        front.do(session.start({}))


def test_the_message_reaches_the_browser(front, bob):
    """JupyterHub's page says why a spawn failed: here the helper has another view of the settings than the hub."""
    image = front.settings.state / "homes" / "bob.img"
    front.do(bob.stop())
    kept = image.with_suffix(".kept")
    image.rename(kept)
    image.write_bytes(b"not a file system" * 4096)
    try:
        running, message = front.do(bob.spawn())
        assert not running
        assert "e2fsck failed" in message or "mount failed" in message
    finally:
        kept.replace(image)
    running, message = front.do(bob.spawn())  # and the home is as it was
    assert running, message
    front.do(bob.open())


def test_a_home_is_kept_and_its_files_configure_nothing(front, ada):
    """What a user leaves in the home is there again, and is not read by the next server."""
    kernel = front.do(ada.kernel())
    front.do(
        ada.run(
            kernel,
            "import os, pathlib\n"
            "for folder in ('.jupyter', '.ipython/profile_default/startup', '.local/share/jupyter', '.local/lib/python3.11/site-packages'):\n"
            "    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)\n"
            "bad = 'c.ServerApp.terminals_enabled = True\\nc.ServerApp.authorizer_class = \"jupyter_server.auth.AllowAllAuthorizer\"'\n"
            "for name in ('jupyter_server_config.py', 'jupyter_config.py'): pathlib.Path('.jupyter', name).write_text('c = get_config()\\n' + bad)\n"
            "pathlib.Path('.jupyter/labconfig').mkdir(exist_ok=True)\n"
            "pathlib.Path('.jupyter/labconfig/page_config.json').write_text('{\"disabledExtensions\": {\"@jupyterlab/terminal-extension:plugin\": false}}')\n"
            "pathlib.Path('.local/lib/python3.11/site-packages/x.pth').write_text('import os; open(\"/tmp/loaded\", \"w\")')\n"
            "pathlib.Path('kept.txt').write_text('kept')\n",
        )
    )
    front.do(ada.stop())
    running, message = front.do(ada.spawn())
    assert running, message
    front.do(ada.open())
    kernel = front.do(ada.kernel())
    said = front.do(ada.run(kernel, "import os; print(open('kept.txt').read(), os.path.exists('/tmp/loaded'))"))
    assert said == "kept False\n"
    assert front.do(ada.ask("GET", "api/terminals"))[0] == 403


def test_a_restart_of_the_hub_cuts_nobody_off(front, ada):
    """A websocket that is open stays open while the hub is gone, and the hub finds the server when it is back."""

    async def steps():
        kernel = await ada.kernel()
        url = f"{ada.mine}/api/kernels/{kernel}/channels"
        async with ada.http.ws_connect(url, headers=ada._headers(), max_msg_size=0) as ws:
            assert await ada.execute(ws, "x = 20; print(x)") == "20\n"
            hub = front.supervisor.process("hub")
            hub.terminate()
            await hub.wait()
            assert await ada.execute(ws, "x += 1; print(x)") == "21\n"
            for _ in range(300):
                await asyncio.sleep(0.2)
                again = front.supervisor.process("hub")
                if again is not hub and again.returncode is None:
                    try:
                        async with ada.http.get(f"{ada.origin}/hub/api/") as page:
                            if page.status == 200:
                                break
                    except OSError:
                        continue
            assert await ada.execute(ws, "x *= 2; print(x)") == "42\n"
        assert (await ada.ask("GET", "api/status"))[0] == 200
        running, message = await ada.spawn()
        assert running, message  # "is already running"

    front.do(steps())


def test_origins_are_apart(front, ada):
    hosts = {front.settings.origin, gateway_origin(front.settings), ada.mine.partition("/user")[0]}
    assert len(hosts) == 3
    names = {cookie.key: cookie["domain"] for cookie in ada.http.cookie_jar if "jupyterhub" in cookie.key}
    assert any(name.startswith("__Host-jupyterhub-hub-login") for name in names)
    assert any(name.startswith("__Host-jupyterhub-user-ada") for name in names)
