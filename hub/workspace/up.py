"""`millpond up`: everything on one machine, supervised, until it is told to stop."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from millpond.hub.workspace.accounts import new_accounts
from millpond.hub.workspace.config import SERVICE, gateway_origin
from millpond.hub.workspace.doctor import diagnose
from millpond.hub.workspace.notebooks import write_notebooks
from millpond.hub.workspace.parts import (
    helper_part,
    hub_part,
    make_folders,
    meter_part,
    proxy_part,
    python,
    secret,
    write_hub_config,
)
from millpond.hub.workspace.settings import Workspace
from millpond.hub.workspace.supervise import Supervisor
from millpond.hub.workspace.up_config import UpConfig
from millpond.hub.workspace.vault import Vault
from millpond.store.errors import InvalidInput, IsolationFailed

SHARED = (
    "vault and workspaces share this machine: load and caches are channels that no budget counts; for secret weights, give "
    "the vault a host of its own (docs/workspace.md)"
)


def say(text: str) -> None:
    """Tell the operator."""
    print(text, flush=True)  # noqa: T201


def settings_of(config: UpConfig) -> Workspace:
    """What the parts read, of what the operator wrote."""
    values = {name: getattr(config.workspace, name) for name in type(config.workspace).model_fields}
    return Workspace(state=config.state, **values)


class Up:
    """One installation that runs."""

    def __init__(self, config: UpConfig, *, demo_tokens: int = 0) -> None:
        """Check the machine and make the folders.

        Raises:
            InvalidInput: another one runs on the same state.
            IsolationFailed: the machine lacks something; each line names the remedy.
        """
        self.config, self.settings = config, settings_of(config)
        self.demo_tokens = demo_tokens
        problems = [line for lines in diagnose(self.settings).values() for line in lines]
        if problems:
            raise IsolationFailed("; ".join(problems))
        self.file = make_folders(self.settings)
        self._lock = (self.settings.state / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInput(f"another millpond up runs on {self.settings.state}; stop it first") from None
        self.vault = Vault(self.settings, config)
        self.vault.prepare()
        self.passwords = self._accounts()
        write_notebooks(self.settings.state / "examples")
        token = secret(self.settings.state / "secrets" / "gateway")
        oauth = {name: os.environ[name] for name in ("OAUTH_CLIENT_SECRET",) if name in os.environ}
        front = [
            meter_part(self.settings, config.meter.cap, config.meter.rate),
            helper_part(self.settings, self.file),
            proxy_part(self.settings, self.file),
            hub_part(self.settings, self.file, write_hub_config(self.settings, self.file), token, oauth),
        ]
        self.supervisor = Supervisor([*front, *self.vault.parts(token)], self.settings.state / "logs", say)

    def _accounts(self) -> Mapping[str, str]:
        """First accounts of a local installation and their passwords; kept for the demo, where they protect nothing."""
        how = self.settings.authentication
        if how.kind != "native":
            return {}
        members = {member for group in how.groups.values() for member in group}
        file = self.settings.state / "hub" / "accounts.json"
        made = new_accounts(file, sorted({*how.admins, *members}))
        if file.exists():
            os.chown(file, self.settings.hub_uid, self.settings.front_gid)
        if not self.demo_tokens:
            return made
        kept = self.settings.state / "secrets" / "demo.json"
        known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        kept.touch(mode=0o600)
        kept.write_text(json.dumps({**known, **made}))
        return {**known, **made}

    async def start(self) -> None:
        """Start everything; when this returns the log-in page answers."""
        self.vault.make_projects()
        await self.supervisor.start()
        say(f"\nMillpond is at {self.settings.origin}")
        groups = self.settings.authentication.groups
        for name, password in self.passwords.items():
            roles = ", ".join(sorted(group for group, members in groups.items() if name in members)) or "administrator"
            say(f"  {name:12} {password:32} {roles}")
        say(f"  budgets, results and reviews: {gateway_origin(self.settings)}/services/{SERVICE}/")
        say(f"  logs: {self.settings.state / 'logs'}")
        say(f"  {SHARED}\n")

    async def seed(self) -> None:
        """The demo's run, once: captured in the vault by the vault's user, then given to the project."""
        done = self.settings.state / "vault" / "seeded"
        if not self.demo_tokens or done.exists():
            return
        from millpond.hub.demo import find_example

        example = find_example(None)
        say(f"capturing the demo's run ({self.demo_tokens:,} tokens); it appears in the project when it is done")
        program = python(
            "-m", "millpond.hub.workspace.seed", str(self.vault.folder), str(example), str(self.demo_tokens)
        )
        log = (self.settings.state / "logs" / "seed.log").open("ab")
        process = await asyncio.create_subprocess_exec(
            *self.vault.command("seed", program, read=(example,)), env=self.vault.environment(), stdout=log, stderr=log
        )
        log.close()
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            raise
        if code:
            say(f"the demo's run could not be captured; {self.settings.state / 'logs' / 'seed.log'} says why")
            return
        await asyncio.to_thread(self.vault.make_projects)
        done.touch()
        say("the demo's run is there")

    async def stop(self) -> None:
        """Stop everything, the vault last."""
        await self.supervisor.stop()
        self.vault.remove_namespace()
        self._lock.close()


async def run_up(config: UpConfig, *, demo_tokens: int = 0) -> None:
    """Run until a signal comes."""
    up = Up(config, demo_tokens=demo_tokens)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        await up.start()
        seeding = asyncio.create_task(up.seed())
        await stopped.wait()
        seeding.cancel()
        say("stopping")
    finally:
        await up.stop()


def demo_config(folder: Path, example: Path, listen: str = "", *, worker: bool = False) -> UpConfig:
    """The demo: the example's model, which is public, a researcher and a reviewer."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.toml"
    policy.write_text("[models.stdlib-llama]\nparameters = 7_300_000\npublic = true\n")
    model = folder / "model"
    if not model.exists():
        shutil.copytree(example / "model", model)
    return UpConfig.model_validate(
        {
            "lake": str(folder / "vault" / "lake"),
            "state": str(folder),
            "policy": str(policy),
            "workers": 0,
            "models": {"stdlib-llama": {"path": str(model), "worker": worker}},
            "projects": {
                "demo": {
                    "models": ["stdlib-llama"],
                    "owner": "ada",
                    "members": {"bob": "reviewer"},
                    "runs": {"stdlib-heldout": "stdlib-heldout"},
                    "prompts": "own",
                }
            },
            "workspace": {
                **({"listen": listen, "origin": f"http://localhost:{listen.rpartition(':')[2]}"} if listen else {}),
                "authentication": {"groups": {"researchers": ["ada", "bob"], "reviewers": ["bob"]}},
            },
        }
    )
