"""A lake of small runs with planted signals, two projects, and a real gateway on loopback with its executor."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import uvicorn

from millpond.hub.auth import new_token
from millpond.hub.body import decode
from millpond.hub.database import open_database
from millpond.hub.executor import Executor
from millpond.hub.gateway import create_app, server_options
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import read_policy
from millpond.hub.projects import Projects
from millpond.hub.settings import read_settings
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

D, PROMPTS = 8, 60
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
HOOK = HOOKS[1]


def write_run(lake, name, *, seed=0, prompts=PROMPTS, interventions=(), same_text=False):
    """`true` moves hook 1 by 3 along the first axis; hook 0 is noise. Rows are 20 a prompt. Returns rows by hook, marks."""
    rng = np.random.default_rng(seed)
    provenance = {"capture": {"capture": {"max_new_tokens": 0}}, "interventions": list(interventions)}
    spec = lake.create_run(name, hooks=HOOKS, d_model=D, dtype="float32", provenance=provenance, chunk_rows=256)
    writer = RunWriter(lake.run_folder(name), spec)
    marks = {f"p{number}": rng.random(20) < 0.5 for number in range(prompts)}
    rows = {hook: rng.standard_normal((prompts, 20, D)).astype(np.float32) for hook in HOOKS}
    for number, mark in enumerate(marks.values()):
        rows[HOOK][number, mark, 0] += 3
        tokens = np.arange(20, dtype=np.int32) + (0 if same_text else 1000 * number)
        here = {hook: rows[hook][number] for hook in HOOKS}
        writer.append(CapturedRequest(f"p{number}", tokens, 20, np.arange(20, dtype=np.int32), here))
    writer.commit()
    table = pd.DataFrame({"id": list(marks), "source": [f"s{number % 4}" for number in range(prompts)]})
    seal_run(
        lake.run_folder(name), prompts=table, prompt_labels=("source",), token_labels={"true": marks},
        token_label_dtypes={"true": "bool"},
    )  # fmt: skip
    return {hook: rows[hook].reshape(-1, D) for hook in HOOKS}, np.concatenate(list(marks.values()))


class Gatehouse:
    """Projects `one` (ada owns it, rex reviews, ben researches) and `two` (eve's) share the run `shared`."""

    def __init__(
        self,
        folder: Path,
        *,
        parameters: int = 8_000_000_000,
        port: int | None = None,
        jupyterhub: bool = False,
        policy: str = "",
        **settings: object,
    ) -> None:
        self.folder = folder
        self.lake = open_lake(folder / "lake", create=True)
        self.rows, self.marks = write_run(self.lake, "shared")
        with socket.create_server(("127.0.0.1", port or 0)) as probe:
            self.port = probe.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        lines = {
            "lake": "lake", "database": f"sqlite:///{folder / 'hub.db'}", "policy": "policy.toml",
            "tokens": "tokens.toml", "listen": f"127.0.0.1:{self.port}", "origin": self.origin, **settings,
        }  # fmt: skip
        if jupyterhub:
            del lines["tokens"]
        self.config = folder / "gateway.toml"
        text = "".join(
            f"{name} = {str(value) if not isinstance(value, str) else chr(34) + value + chr(34)}\n"
            for name, value in lines.items()
        )
        self.config.write_text(
            text + '[models.m]\npath = "nowhere"\n' + "[jupyterhub]\ncache_seconds = 0\n" * jupyterhub
        )
        (folder / "policy.toml").write_text(
            f"{policy}[models.m]\nparameters = {parameters}\n[models.other]\nparameters = 1000000000\n"
        )
        self.tokens = {}
        for user in ("ada", "ben", "rex", "eve"):
            scopes = ("read", "run", "review") if user in ("rex", "ada") else ("read", "run")
            self.tokens[user] = new_token(folder / "tokens.toml", user, scopes)
        self.tokens["reader"] = new_token(folder / "tokens.toml", "ada", ("read",))
        self.logins = {
            user: new_token(folder / "tokens.toml", user, ("read", "run", "review"), login=True)
            for user in ("ada", "rex")
        }
        self.settings = read_settings(self.config)
        self.engine = open_database(self.settings.database)
        self.projects = Projects(self.engine)
        self.projects.create("one", models=["m"], by="ada")
        self.projects.set_role("one", "rex", "reviewer", by="ada")
        self.projects.set_role("one", "ben", "researcher", by="ada")
        self.projects.create("two", models=["m"], by="eve")
        self.run = self.hold("one", "shared")
        self.restricted = self.hold("one", "shared", name="restricted", prompts="restricted")
        self.run_two = self.hold("two", "shared")
        self.ledger = Ledger(self.settings.database, read_policy(self.settings.policy))
        self._clients = []

    def hold(self, project, target, *, name=None, prompts="own"):
        detail = {"prompts": prompts}
        return self.projects.hold(project, "run", name or target, target, model="m", detail=detail).handle.hex()

    def __enter__(self):
        app = create_app(self.settings)
        self.app = app
        self._server = uvicorn.Server(uvicorn.Config(app, **server_options(self.settings)))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        for client in self._clients:
            client.close()
        self._server.should_exit = True
        self._thread.join()
        self.ledger.close()
        self.engine.dispose()

    def client(self, user=None, **headers):
        if user is not None:
            headers["Authorization"] = f"Bearer {self.tokens[user]}"
        found = httpx.Client(base_url=self.origin, headers=headers, timeout=30, trust_env=False)
        self._clients.append(found)
        return found

    def browser(self, user):
        """A logged-in browser and its CSRF token."""
        found = self.client(Origin=self.origin)
        reply = found.post("/login", data={"token": self.logins[user]})
        assert reply.status_code == 303, reply.content
        held = self.app.state.gateway.gatekeeper.sessions._held.values()
        session = [one for one in held if one.token == self.logins[user]][-1]
        return found, session.csrf

    def work(self):
        """Run every waiting job in this process."""
        executor = Executor(self.settings, told=lambda _: None)
        try:
            return executor.run(until_empty=True)
        finally:
            executor.workshop.engine.dispose()

    def spent(self, user="ada", project="one", model="m"):
        balances = self.ledger.balances(Payer(user, project, (model,)))
        return next(one.spent for one in balances if one.account.scope == "project")

    def submit(self, client, job, project="one"):
        reply = client.post(f"/api/v1/p/{project}/jobs", json={"job": job})
        body = decode(reply.content)
        assert type(body).__name__ == "Handles", body
        return body.values[0].hex()

    def wait(self, client, job, project="one", *, past=("queued", "running")):
        """The first state that is seen after those."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            body = decode(client.get(f"/api/v1/p/{project}/jobs/{job}").content)
            if body.state not in past:
                return body.state
            time.sleep(0.03)
        raise AssertionError("it does not end")

    def answer(self, client, job, number=0, project="one"):
        return decode(client.get(f"/api/v1/p/{project}/jobs/{job}/answers/{number}").content)

    def do(self, client, job, project="one"):
        """Submit, run, wait; the job's handle and its answers."""
        handle = self.submit(client, job, project)
        self.work()
        self.wait(client, handle, project)
        return handle


def rows(run, part=None, where=None):
    split = {"test": 0.25, "seed": 1} if part else None
    return {"run": run, "where": where, "split": split, "part": part}


def probe(run, *, test=True, name="MassMeanProbe", hook=HOOK, label="true", **params):
    return {
        "kind": "probe", "estimator": {"name": name, "params": params}, "hook": hook, "label": label,
        "train": rows(run, "train"), "test": rows(run, "test") if test else None,
    }  # fmt: skip
