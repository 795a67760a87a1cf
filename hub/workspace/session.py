"""One running workspace: its processes, its limits, its home and its sockets, made by root and taken down again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from millpond.hub.workspace import relay as relay_program
from millpond.hub.workspace import zone as zone_checks
from millpond.hub.workspace.cgroups import Group, Limits, make_group
from millpond.hub.workspace.dictionary import INSIDE
from millpond.hub.workspace.homes import make_home, mount_home, unmount_home
from millpond.hub.workspace.masks import write_masks
from millpond.hub.workspace.sandbox import Sandbox, python_folders, python_path
from millpond.hub.workspace.seccomp import program
from millpond.hub.workspace.settings import GATEWAY_PORT, HUB_PORT, SERVER_PORT, Workspace
from millpond.store.errors import IsolationFailed

_LOG_BYTES = 1 << 20
_FILES = 4096
_PATIENCE = 10.0  # seconds for killed processes to leave their files, groups and output
_ZONE = Path("/zone")


class Session:
    """A workspace of one user, from `start` until `ended` is set."""

    def __init__(self, settings: Workspace, user: str, uid: int) -> None:
        self.settings, self.user, self.uid = settings, user, uid
        self.folder = settings.zone(user)
        self.code: int | None = None
        self.ended = asyncio.Event()
        self._home = settings.run / "homes" / user
        self._group: Group | None = None
        self._processes: list[asyncio.subprocess.Process] = []
        self._watch: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._down: asyncio.Task[None] | None = None
        self._tail = b""

    async def start(self, environment: Mapping[str, str]) -> Path:
        """Start the server and wait until it has reported that every check passes; its socket.

        Raises IsolationFailed, and leaves nothing running or mounted, when it has not after `spawn_seconds`.
        """
        try:
            async with asyncio.timeout(self.settings.spawn_seconds):
                return await self._start(environment)
        except TimeoutError:
            await self.stop(now=True)
            raise IsolationFailed(
                f"the server of {self.user} did not report within {self.settings.spawn_seconds:.0f} s that its lock-down is "
                f"in force; it said: {self._last_words()}"
            ) from None
        except BaseException:
            await self.stop(now=True)
            raise

    async def _start(self, environment: Mapping[str, str]) -> Path:
        settings, limits = self.settings, self.settings.limits
        try:
            self._group = make_group(settings.run.name, self.user, Limits(limits.memory, limits.cpus, limits.processes))
        except IsolationFailed:
            if limits.required:
                raise
        await asyncio.to_thread(self._prepare_home)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        os.chown(self.folder, 0, settings.front_gid)
        self.folder.chmod(0o750)
        server, hub, gate = (self._listen(name) for name in ("server.sock", "hub.sock", "gate.sock"))
        os.chown(self.folder / "server.sock", 0, settings.front_gid)
        (self.folder / "server.sock").chmod(0o660)
        for name in ("hub.sock", "gate.sock"):
            os.chown(self.folder / name, 0, self.uid)
            (self.folder / name).chmod(0o660)
        await self._start_relay(hub, gate)
        report = await self._start_server(server, environment)
        for end in (server, hub, gate):
            end.close()
        self._watch = asyncio.create_task(self._until_the_first_ends())
        await self._in_force(report)
        return self.folder / "server.sock"

    def _prepare_home(self) -> None:
        unmount_home(self._home)
        image = self.settings.state / "homes" / f"{self.user}.img"
        made = make_home(image, self.settings.limits.home, self.uid)
        mount_home(image, self._home)
        examples = self.settings.state / "examples"
        if made:
            (self._home / "lost+found").rmdir()
        if made and examples.is_dir():  # nothing of the user's is on it yet, so no link of theirs can lead us astray
            shutil.copytree(examples, self._home, dirs_exist_ok=True)
            for path in (self._home, *self._home.rglob("*")):
                os.chown(path, self.uid, self.uid)

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / name))
        listener.listen(128)
        return listener

    async def _start_relay(self, hub: socket.socket, gate: socket.socket) -> None:
        settings = self.settings
        sandbox = Sandbox(
            settings.relay_uid,
            settings.front_gid,
            network=True,
            read={settings.hub_socket.parent: settings.hub_socket.parent},
        )
        pairs = [f"fd:{hub.fileno()}=unix:{settings.hub_socket}", f"fd:{gate.fileno()}=tcp:{settings.gateway}"]
        command = sandbox.command(_relay(settings.limits.connections, *pairs))
        self._processes.append(await self._run(command, [hub.fileno(), gate.fileno()], {"PATH": "/usr/bin:/bin"}))

    async def _start_server(self, server: socket.socket, given: Mapping[str, str]) -> int:
        """Start bubblewrap, the inner relay and the server; the descriptor that its report comes from."""
        settings, limits, home = self.settings, self.settings.limits, Path("/home") / self.user
        masks = write_masks(settings.run / "masks" / self.user, limits.memory)
        lab = Path(__file__).parent / "lab"
        read, write = os.pipe()
        report = os.fdopen(write, "wb")
        dictionary = settings.state / "dictionary"
        texts = {dictionary: INSIDE} if dictionary.exists() else {}
        views = [*python_folders(), home, _ZONE]
        environment = {
            **given,
            "HOME": str(home),
            "USER": self.user,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "PYTHONPATH": python_path(),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "JUPYTERHUB_DISABLE_USER_CONFIG": "1",
            "JUPYTER_CONFIG_DIR": "/etc/jupyter",
            "JUPYTER_DATA_DIR": str(home / ".local/share/jupyter"),
            "JUPYTER_RUNTIME_DIR": "/tmp/jupyter",
            "JUPYTER_PREFER_ENV_PATH": "1",
            "JUPYTERLAB_SETTINGS_DIR": str(home / ".jupyter/lab/user-settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / ".jupyter/lab/workspaces"),
            "MILLPOND_URL": f"http://127.0.0.1:{GATEWAY_PORT}/services/gateway",
            "MILLPOND_HOME_BYTES": str(limits.home),
            "MILLPOND_MEMORY_BYTES": str(limits.memory),
            "MILLPOND_PASS_FDS": str(write),
            "MILLPOND_REPORT_FD": str(write),
            "MILLPOND_VIEWS": ":".join(map(str, views)),
            "MPLCONFIGDIR": "/tmp/matplotlib",
            **({"MILLPOND_DICTIONARY": str(INSIDE)} if texts else {}),
        }
        filter_fd = os.memfd_create("seccomp")
        os.write(filter_fd, program())
        os.lseek(filter_fd, 0, os.SEEK_SET)
        sandbox = Sandbox(
            self.uid,
            home=home,
            hostname="workspace",
            read={
                lab / "jupyter_server_config.py": Path("/etc/jupyter/jupyter_server_config.py"),
                lab / "migrated": Path(
                    "/etc/jupyter/migrated"
                ),  # or Jupyter would move a home's old IPython files there
                lab / "page_config.json": Path("/etc/jupyter/labconfig/page_config.json"),
                self.folder / "hub.sock": _ZONE / "hub.sock",
                self.folder / "gate.sock": _ZONE / "gate.sock",
                **texts,
            },
            write={self._home: home},
            scratch=limits.scratch,
            masks=masks,
            etc=settings.run / "masks" / self.user / "etc",
            seccomp=filter_fd,
        )
        pairs = [
            f"fd:{server.fileno()}=tcp:127.0.0.1:{SERVER_PORT}",
            f"tcp:127.0.0.1:{HUB_PORT}=unix:{_ZONE / 'hub.sock'}",
            f"tcp:127.0.0.1:{GATEWAY_PORT}=unix:{_ZONE / 'gate.sock'}",
        ]
        notebook = [sys.executable, "-sP", "-m", "jupyterhub.singleuser"]
        command = sandbox.command([*_relay(512, *pairs), "--", *notebook])
        passed = [server.fileno(), write, filter_fd]
        process = await self._run(command, passed, environment, before=self._confine, output=asyncio.subprocess.PIPE)
        os.close(filter_fd)
        report.close()
        self._processes.append(process)
        self._tasks.append(asyncio.create_task(self._log(process)))
        return read

    def _confine(self) -> None:
        """Between fork and exec."""
        if self._group is not None:
            self._group.enter()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
        Path("/proc/self/oom_score_adj").write_text("600")  # the kernel ends a workspace before anything of ours

    async def _run(
        self,
        command: list[str],
        pass_fds: list[int],
        environment: Mapping[str, str],
        *,
        before: Callable[[], None] | None = None,
        output: int = asyncio.subprocess.DEVNULL,
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT if output == asyncio.subprocess.PIPE else output,
            pass_fds=pass_fds,
            preexec_fn=before,
            env=environment,
            start_new_session=True,
        )

    async def _log(self, process: asyncio.subprocess.Process) -> None:
        """Keep the first megabyte that the server says, so that it cannot fill the disk."""
        left = _LOG_BYTES
        assert process.stdout is not None
        with (self.settings.state / "logs" / f"workspace-{self.user}.log").open("wb", buffering=0) as log:
            while data := await process.stdout.read(1 << 16):
                log.write(data[:left])
                left = max(0, left - len(data))
                self._tail = (self._tail + data)[-2000:]

    async def _end_logs(self) -> None:
        """Let what the server said last be read; a process that outlives it may hold its output open."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_PATIENCE)
            for task in late:
                task.cancel()

    def _last_words(self) -> str:
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-8:]) or "nothing"

    async def _in_force(self, descriptor: int) -> None:
        """Wait for the server's own report that nothing is open."""
        reader = asyncio.StreamReader(limit=1 << 16)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb"))
        line = await reader.readline()
        if not line:
            await self._end_logs()
            raise IsolationFailed(f"the server of {self.user} ended before it reported; it said: {self._last_words()}")
        report = json.loads(line)
        missing = {*zone_checks.CHECKS, *zone_checks.SERVER_CHECKS} - set(report["checks"])
        if missing or report["problems"]:
            found = [*report["problems"], *(f"{name}: not checked" for name in sorted(missing))]
            raise IsolationFailed(f"the lock-down of {self.user}'s workspace is not in force: {'; '.join(found)}")

    async def _until_the_first_ends(self) -> None:
        """Relay and server live and die together."""
        waits = [asyncio.create_task(process.wait()) for process in self._processes]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            self.code = next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()
        await self._take_down()

    async def stop(self, *, now: bool = False) -> None:
        """End the processes, with two seconds to end by themselves unless `now`, and take everything down."""
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if not now and self._group is not None and self._down is None:
            self._group.kill(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._processes[-1].wait(), 2)
        await self._take_down()

    async def _take_down(self) -> None:
        """Once, whoever asks and however often; a caller that is cancelled does not stop it."""
        if self._down is None:
            self._down = asyncio.create_task(self._remove_everything())
        await asyncio.shield(self._down)

    async def _remove_everything(self) -> None:
        if self._group is not None:
            self._group.kill(signal.SIGKILL)
        for process in self._processes:
            if process.returncode is None:
                process.kill()  # bubblewrap's death ends its process namespace
            await process.wait()
        if self.code is None:
            self.code = 0
        await self._end_logs()
        if self._group is not None:
            await asyncio.to_thread(self._group.remove)
        await asyncio.to_thread(self._unmount)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.ended.set()

    def _unmount(self) -> None:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return unmount_home(self._home)
            except IsolationFailed:  # a process that was killed may take a moment to leave
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def _relay(connections: int, *pairs: str) -> list[str]:
    """The command line of a relay."""
    return [sys.executable, "-I", relay_program.__file__, "--connections", str(connections), *pairs]
