"""The vault's programs on one machine: gateway, executor, queue and capture workers, in a network with no way out.

They share a network namespace that has a loopback interface and nothing else, run as the user who owns the lake, and see the
lake, the weights and their own folder. The gateway's socket is the way in; the egress meter stands before it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from millpond.hub.workspace.config import CLIENT_ID, SERVICE, gateway_origin
from millpond.hub.workspace.dictionary import make_dictionary
from millpond.hub.workspace.parts import answers, listens, python, python_environment, with_hub
from millpond.hub.workspace.sandbox import Sandbox
from millpond.hub.workspace.settings import HUB_PORT, Workspace
from millpond.hub.workspace.supervise import Part
from millpond.hub.workspace.up_config import UpConfig, toml
from millpond.store.errors import InvalidInput, IsolationFailed

_KINDS = ("capture", "generate", "judge", "sae_cross_entropy")
_PROCESSORS = Path("/sys/devices/system")
"""Where vLLM's CPU build finds which cores there are."""


class Vault:
    """Where the vault's programs run, and as whom."""

    def __init__(self, settings: Workspace, config: UpConfig) -> None:
        self.settings, self.config = settings, config
        self.folder = settings.state / "vault"
        self.lake = Path(config.lake)
        self.namespace = f"{settings.run.name}-vault"
        owner = self.lake.stat() if self.lake.exists() else None
        self.uid = settings.vault_uid if owner is None else owner.st_uid
        self.database = f"sqlite:///{self.folder / 'millpond.sqlite'}"
        self.gateway_toml = self.folder / "gateway.toml"
        self._queue = settings.run / "queue" / "queue.sock"

    def prepare(self) -> None:
        """Make the folders, the gateway's settings and the network namespace."""
        for folder in (self.folder, self.folder / "home", self.lake, self._queue.parent):
            folder.mkdir(parents=True, exist_ok=True)
            if folder != self.lake or self.uid == self.settings.vault_uid:
                os.chown(folder, self.uid, self.settings.front_gid)
                folder.chmod(0o700)
        os.chown(self.settings.gateway_socket.parent, self.uid, self.settings.meter_uid)
        assert self.config.policy is not None
        shutil.copyfile(self.config.policy, self.folder / "policy.toml")
        shutil.copyfile(make_dictionary(self.settings.state, self.config.dictionary), self.folder / "dictionary")
        values = {
            "lake": str(self.lake),
            "database": self.database,
            "policy": "policy.toml",
            "dictionary": "dictionary",
            "listen": f"unix:{self.settings.gateway_socket}",
            "origin": gateway_origin(self.settings),
            "workers": self.config.workers,
            "jupyterhub": {"cache_seconds": 10},
        }
        text = toml(values)
        for name, model in self.config.models.items():
            if model.path is not None:
                text += f"[models.{json.dumps(name)}]\npath = {json.dumps(str(model.path))}\n"
        self.gateway_toml.write_text(text)
        for file in (self.gateway_toml, self.folder / "policy.toml", self.folder / "dictionary"):
            os.chown(file, self.uid, self.settings.front_gid)
            file.chmod(0o600)
        self.remove_namespace()
        for command in (["netns", "add", self.namespace], ["-n", self.namespace, "link", "set", "lo", "up"]):
            done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise IsolationFailed(f"ip {' '.join(command)} failed: {done.stderr.strip()}")

    def remove_namespace(self) -> None:
        """Remove the network namespace if it is there."""
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a program of the vault."""
        return python_environment(**{"HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", **more})

    def command(self, name: str, program: list[str], *, read: tuple[Path, ...] = ()) -> list[str]:
        """A command line that runs `program` in the vault."""
        settings = self.settings
        models = [model.path for model in self.config.models.values() if model.path is not None]
        hub, gate = settings.hub_socket.parent, settings.gateway_socket.parent
        writable = (self.folder, self.lake, gate, self._queue.parent)
        sandbox = Sandbox(
            self.uid, settings.front_gid, home=self.folder / "home", network=True, hostname="vault",
            etc=settings.run / "etc" / name, scratch=4 << 30,
            read={path: path for path in (hub, _PROCESSORS, *models, *read)}, write={path: path for path in writable},
        )  # fmt: skip
        return ["ip", "netns", "exec", self.namespace, *sandbox.command(program)]

    def parts(self, token: str) -> list[Part]:
        """Gateway, executor, and, for models that have a worker, the queue's server and the workers."""
        settings, config = self.settings, ["--config", str(self.gateway_toml)]
        path = f"/services/{SERVICE}"
        hub = {
            "JUPYTERHUB_API_TOKEN": token,
            "JUPYTERHUB_API_URL": f"http://127.0.0.1:{HUB_PORT}/hub/api",
            "JUPYTERHUB_BASE_URL": "/",
            "JUPYTERHUB_CLIENT_ID": CLIENT_ID,
            "JUPYTERHUB_HOST": settings.origin,
            "JUPYTERHUB_OAUTH_ACCESS_SCOPES": json.dumps([f"access:services!service={SERVICE}"]),
            "JUPYTERHUB_OAUTH_CALLBACK_URL": f"{gateway_origin(settings)}{path}/oauth_callback",
            "JUPYTERHUB_SERVICE_NAME": SERVICE,
            "JUPYTERHUB_SERVICE_PREFIX": f"{path}/",
        }
        gateway = with_hub(settings, HUB_PORT, python("-m", "millpond.cli", "gateway", *config))
        executor = python("-m", "millpond.cli", "executor", *config)
        version = answers(settings.gateway_socket, f"{path}/api/v1/version", holds='"api"')
        found = [
            Part("gateway", self.command("gateway", gateway), version, self.environment(**hub), patience=90),
            Part("executor", self.command("executor", executor), _started, self.environment(), awaited=False),
        ]
        workers = {name: model for name, model in self.config.models.items() if model.worker}
        if workers:
            found += self._capture(workers.keys())
        return found

    def _capture(self, names: Iterable[str]) -> list[Part]:
        tokens = self.folder / "workers.toml"
        tokens.unlink(missing_ok=True)
        serve = [
            "queue",
            "serve",
            "--database",
            self.database,
            "--workers",
            str(tokens),
            "--listen",
            f"unix:{self._queue}",
        ]
        queue = self.command("queue", python("-m", "millpond.cli", *serve))
        parts = [Part("queue", queue, listens(self._queue), self.environment())]
        for name in names:
            model = self.config.models[name]
            if model.path is None:
                raise InvalidInput(f"models.{name}: worker is true but path is missing; name the folder of the weights")
            arguments = [
                "worker",
                "--queue",
                f"unix:{self._queue}",
                "--model",
                str(model.path),
                "--lake",
                str(self.lake),
            ]
            arguments += ["--engine", json.dumps(model.engine), "--kinds", *_KINDS]
            worker = self.command(f"worker-{name}", python("-m", "millpond.cli", *arguments))
            environment = self.environment(**self._worker(name, tokens))
            parts.append(Part(f"worker-{name}", worker, _started, environment, awaited=False))
        return parts

    def _worker(self, name: str, tokens: Path) -> Mapping[str, str]:
        """A new token of a worker, and its line in the queue's file."""
        from millpond.hub.queue_api import new_worker

        token, worker = new_worker(name, _KINDS)
        with tokens.open("a") as handle:
            handle.write(f"[[workers]]\nname = {json.dumps(worker.name)}\nsha256 = {json.dumps(worker.sha256)}\n")
            handle.write(f"kinds = {json.dumps(sorted(worker.kinds))}\nsubmit = false\n\n")
        os.chown(tokens, self.uid, self.settings.front_gid)
        tokens.chmod(0o600)
        return {"MILLPOND_WORKER_TOKEN": token}

    def make_projects(self) -> None:
        """Make the projects of the configuration, in the vault, as its user."""
        file = self.folder / "projects.json"
        file.write_text(json.dumps({name: p.model_dump(mode="json") for name, p in self.config.projects.items()}))
        os.chown(file, self.uid, self.settings.front_gid)
        command = self.command(
            "projects", python("-m", "millpond.hub.workspace.projects", str(self.gateway_toml), str(file))
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment())
        if done.returncode:
            raise InvalidInput(
                f"the projects cannot be made: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
            )


async def _started() -> bool:
    """For a program that says nothing when it is ready."""
    return True
