"""Bytes over HTTP: many small questions, many clients, a server that is killed; and what else could carry a bit."""

from __future__ import annotations

import itertools
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

import millpond as mp
from millpond.hub.body import Closed, ErrorCode, Failure, Handles, JobStatus, ReleasedResult, decode
from millpond.hub.kinds import parse_job
from millpond.hub.local import LocalVault
from millpond.store.errors import BudgetSpent
from millpond.store.lake import open_lake

from .conftest import LAYER, MODELS, Served, store

RESID = f"blocks.{LAYER}.hook_resid_post"
NOWHERE = "0" * 16
ORIGIN = "http://127.0.0.1:8910"


@pytest.fixture
def small(vault):
    """A server of the test's own, which may be killed, behind a meter of its own."""
    with tempfile.TemporaryDirectory(prefix="mpk", dir="/tmp") as folder:
        lake = open_lake(Path(folder) / "lake", create=True)
        store(lake, "heldout", vault.tokens[:40], {RESID: vault.hooks[RESID][:40]})
        with LocalVault(Path(folder) / "v", lake.folder, MODELS) as local:
            yield Served(local, lake)


def charge_of(content):
    """What the gate says that a body costs."""
    body = decode(content)
    return 0 if isinstance(body, Closed) else len(content) + 16 * (not isinstance(body, JobStatus))


def test_many_tiny_questions_end_at_the_cap_to_the_byte(small):
    """Questions of 18 bytes until nothing comes: the sum is the ledger's, and the meter saw every raw byte."""
    small.project("drip", "eve", "tiny", heldout=("heldout", "own"))
    small.local.start(executor=False, meter_cap=2_000_000)
    token = small.local.add_token("eve", "read", "run")
    host, port = urlsplit(small.local.url).netloc.split(":")
    raw = charged = answers = chunks = 0
    with socket.create_connection((host, int(port))) as wire:
        wire.settimeout(20)
        request = (
            f"GET /api/v1/p/drip/runs/{NOWHERE} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n"
        ).encode()
        body = b""
        for _ in range(400):
            wire.sendall(request)
            data = b""
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
                data += wire.recv(65536)
                chunks += 1
            raw += len(data)
            body = data.partition(b"\r\n\r\n")[2]
            charged += charge_of(body)
            answers += 1
            if isinstance(decode(body), Closed):
                break
    assert isinstance(decode(body), Closed)
    assert answers == 2_000 // 18 + 1 - (2_000 % 18 < 17)
    spent, _ = small.balances("eve", "drip", "tiny")
    assert spent == charged + 17  # and the notice that the budget is spent, once
    assert spent <= 2_000
    # the meter: at least every raw byte and 16 for each piece, at most its next block of a 256th of the cap
    hello = 2_000  # start-up asked for the version
    assert raw + 16 * answers <= small.local.metered <= raw + 16 * chunks + hello + 2_000_000 // 256


def _length(data):
    head = data.partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length:")[2].split(b"\r\n")[0])


def test_the_meter_closes_at_its_own_cap_whatever_the_gateway_would_still_send(small):
    small.project("public", "eve", heldout=("heldout", "own"))
    small.local.start(executor=False, meter_cap=20_000)
    token = small.local.add_token("eve", "read", "run")
    host, port = urlsplit(small.local.url).netloc.split(":")
    received = 0
    for _ in range(300):
        try:
            with socket.create_connection((host, int(port)), timeout=5) as wire:
                head = f"GET /api/v1/p/public/runs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\r\n"
                wire.sendall(head.encode())
                while data := wire.recv(65536):
                    received += len(data)
        except OSError:
            break
    else:
        pytest.fail("the meter never closed")
    assert 10_000 < received <= 20_000
    assert small.local.metered <= 20_000


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # httpcore's, of a socket that is gone
def test_many_clients_and_a_server_that_is_killed_never_pass_the_cap(small):
    """Every answer that arrived is in the ledger, and the ledger never holds more than the cap."""
    small.project("rush", "eve", "drop", heldout=("heldout", "own"))
    small.local.start(executor=False)
    token = small.local.add_token("eve", "read", "run")
    received, closed, stop = [0] * 8, threading.Event(), threading.Event()

    def spend(number):
        while not stop.is_set() and not closed.is_set():
            try:
                with small.http(token) as http:
                    while not stop.is_set():
                        content = http.get(f"/api/v1/p/rush/runs/{NOWHERE}").content
                        received[number] += charge_of(content)
                        if isinstance(decode(content), Closed):
                            closed.set()
                            return
            except httpx.TransportError:
                time.sleep(0.2)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(spend, number) for number in range(8)]
        for _ in range(2):
            time.sleep(0.3)
            small.local.kill("gateway")
            small.local.start(executor=False)
        closed.wait(60)
        stop.set()
        for client in clients:
            client.result(30)
    assert closed.is_set()
    spent, _ = small.balances("eve", "rush", "drop")
    assert sum(received) <= spent <= 3_000
    ledger = small.local.ledger()
    assert ledger.verify().charged == spent
    ledger.close()


def test_a_result_does_not_leave_when_its_budget_is_spent_meanwhile(small):
    small.project("late", "eve", "tiny", heldout=("heldout", "own"))
    small.local.start()
    with small.lake_of("eve", "late") as lake:
        run = lake["heldout"]
        future = mp.LogisticProbe(progress=False)
        run.labels.add("half", {f"p{number}": number % 2 for number in range(40)})
        fitted = future.fit(run[RESID], run.labels["half"])
        with small.http(small.local.add_token("eve", "read", "run")) as http:
            while not isinstance(decode(http.get(f"/api/v1/p/late/runs/{NOWHERE}").content), Closed):
                pass
        with pytest.raises(BudgetSpent):
            fitted.evaluate(run[RESID], run.labels["half"])
    assert small.balances("eve", "late", "tiny")[0] <= 2_000


def test_names_orders_handles_and_errors_carry_nothing_of_another_project(served):
    mine = served.project("mine", "ada", heldout=("heldout", "own"))
    theirs = served.project("theirs", "bob", secret=("heldout", "own"))
    with served.http(served.local.add_token("ada", "read", "run")) as http:
        absent = http.get(f"/api/v1/p/mine/runs/{NOWHERE}")
        answers = [
            http.get(f"/api/v1/p/mine/runs/{theirs['secret'].hex()}"),
            http.get("/api/v1/p/mine/jobs/" + NOWHERE),
            http.get(f"/api/v1/p/theirs/runs/{theirs['secret'].hex()}"),
            http.get("/api/v1/p/theirs/runs"),
            http.get("/api/v1/p/no-such-project/runs"),
            http.get(f"/api/v1/p/theirs/jobs/{NOWHERE}/answers/0"),
        ]
        for answer in answers:
            assert answer.content == absent.content
            assert answer.status_code == absent.status_code == 404
            assert _fixed(answer) == _fixed(absent)
        assert decode(absent.content) == Failure(ErrorCode.NOT_FOUND)
        names = http.get("/api/v1/projects").json()["projects"]
        assert "mine" in names
        assert "theirs" not in names
        listed = decode(http.get("/api/v1/p/mine/runs").content)
        assert listed == Handles((mine["heldout"],))
        # jobs of others are not counted: the list of one's own is empty, and handles are not in order
        assert decode(http.get("/api/v1/p/mine/jobs").content) == Handles(())
        handles = []
        for number in range(6):
            job = {
                "kind": "statistics",
                "rows": {"run": mine["heldout"].hex(), "where": f"position > {number}"},
                "hook": RESID,
            }
            (handle,) = decode(http.post("/api/v1/p/mine/jobs", json={"job": job}).content).values
            handles.append(handle)
        assert len({handle[:4] for handle in handles}) == 6  # random from the first byte on, not counted
        # nothing that was sent comes back
        marker = "canary-4711"
        for path, payload in (
            ("/api/v1/p/mine/jobs", {"job": {"kind": marker}}),
            ("/api/v1/p/mine/quote", {"job": {"kind": "statistics", "rows": {"run": marker}, "hook": marker}}),
            ("/api/v1/p/mine/prompts", {"name": marker, "prompts": [{"id": marker}]}),
        ):
            answer = http.post(path, json=payload)
            assert marker.encode() not in answer.content
            assert marker not in str(answer.headers)
            assert len(answer.content) <= 10


def _fixed(answer):
    return {name: value for name, value in answer.headers.items() if name not in ("date",)}


def test_the_same_question_is_cheap_in_the_project_and_dear_in_another(served):
    """A cached answer must not say that somebody else asked: another project pays, and waits, as if it were the first."""
    for name in ("first", "second"):
        served.project(name, "ada", heldout=("heldout", "own"))
    costs = []
    for name in ("first", "first", "second"):
        with served.lake_of("ada", name) as lake:
            run = lake["heldout"]
            job = parse_job({"kind": "statistics", "rows": {"run": run.view.handle}, "hook": RESID})
            future = lake.submit_job(job, lambda answers, made: answers[0])
            while not future.done():
                time.sleep(0.02)
            before = served.balances("ada", name)[1]
            future.result()
            costs.append(served.balances("ada", name)[1] - before)
    first, again, other = costs
    assert again == 16
    assert first == other > 40  # 60 is its quote, with the fields that it does not have


def test_a_status_is_the_same_all_through_its_slot(served):
    served.project("slots", "ada", heldout=("heldout", "own"))
    with served.lake_of("ada", "slots") as lake, served.http(served.local.add_token("ada", "read", "run")) as http:
        run = lake["heldout"]
        future = mp.BatchTopKSae(d_sae=64, k=4, progress=False).submit_fit(run[RESID], tokens=100_000)
        started = time.monotonic()
        seen = []
        while time.monotonic() - started < 1.2:
            content = http.get(f"/api/v1/p/slots/jobs/{future.handle}").content
            seen.append((time.monotonic() - started, content))
        changes = [at for (_, a), (at, b) in itertools.pairwise(seen) if a != b]
        # states change at ends of slots of 100 ms and at no other time: that is what the charge pays for
        assert all(len(content) == 2 for _, content in seen)
        assert len(changes) <= 12
        offsets = np.mod(changes, 0.1) if changes else np.zeros(1)
        assert np.ptp(offsets) < 0.05 or np.ptp(np.mod(offsets + 0.05, 0.1)) < 0.05
        future.cancel()


def test_tokens_without_scope_expired_of_another_and_of_a_deleted_user(served):
    handles = served.project("locked", "ada", heldout=("heldout", "own"))
    run = handles["heldout"].hex()
    job = {"job": {"kind": "statistics", "rows": {"run": run}, "hook": RESID}}
    refused = Failure(ErrorCode.NOT_ALLOWED)

    def ask(token, method="GET", path="runs", **more):
        with served.http(token) as http:
            return decode(http.request(method, f"/api/v1/p/locked/{path}", **more).content)

    assert ask(None) == refused
    assert ask("x" * 32) == refused
    assert ask(served.local.add_token("ada", "read", expires=datetime.now(UTC) - timedelta(seconds=1))) == refused
    assert isinstance(ask(served.local.add_token("ada", "read")), Handles)
    assert ask(served.local.add_token("ada", "read"), "POST", "jobs", json=job) == refused
    assert ask(served.local.add_token("eve", "read", "run")) == Failure(ErrorCode.NOT_FOUND)  # not a member
    assert ask(served.local.add_token("eve", "read", "run"), "POST", "jobs", json=job) == Failure(ErrorCode.NOT_FOUND)

    gone = served.local.add_token("ada", "read", "run")
    assert isinstance(ask(gone, "POST", "jobs", json=job), Handles)
    path = served.local.folder / "tokens.toml"
    entries = path.read_text().split("[[tokens]]")
    path.write_text("[[tokens]]".join(entries[:-1]))  # the last one, whose user left
    assert ask(gone) == refused


def test_two_vaults_with_other_weights_differ_only_inside_charged_payloads(vault, served):
    """Non-interference: the same session against the real rows and against rows of other weights."""
    rng = np.random.default_rng(9)
    turn = np.linalg.qr(rng.standard_normal((256, 256)))[0].astype(np.float32)
    other = {RESID: (vault.hooks[RESID] @ turn) * 3 + 1}
    store(served.lake, "elsewhere", vault.tokens, other)
    served.project("vault-1", "ada", data=("heldout", "own"))
    served.project("vault-2", "ada", data=("elsewhere", "own"))
    transcripts = [_session(served, name) for name in ("vault-1", "vault-2")]
    assert len(transcripts[0]) == len(transcripts[1])
    differing = 0
    for one, two in zip(*transcripts, strict=True):
        assert one[0] == two[0]  # the question
        assert one[1] == two[1]  # status code and headers, without the date
        assert len(one[2]) == len(two[2])
        if one[2] != two[2]:
            body = decode(one[2])
            assert isinstance(body, ReleasedResult | Handles)  # charged numbers, and random names
            assert one[2][:2] == two[2][:2] or isinstance(body, Handles)
            differing += isinstance(body, ReleasedResult)
    assert differing >= 3


def _session(served, project):
    """(question, framing, body) of every answer but statuses, whose number depends on how busy the machine is."""
    found = []
    with served.http(served.local.add_token("ada", "read", "run")) as http:

        def ask(method, path, **more):
            answer = http.request(method, f"/api/v1/p/{project}/{path}", **more)
            found.append((method, (answer.status_code, _fixed(answer)), answer.content))
            return decode(answer.content)

        (run,) = ask("GET", "runs").values
        rows = {"run": run.hex()}
        labels = {f"p{number}": number % 2 for number in range(240)}
        ask("POST", f"runs/{run.hex()}/labels", json={"name": "half", "by": "prompt", "values": labels})
        jobs = [
            {"kind": "statistics", "rows": rows, "hook": RESID},
            {"kind": "probe", "estimator": {"name": "MassMeanProbe"}, "hook": RESID, "label": "half", "train": rows, "test": rows},
            {"kind": "statistics", "rows": rows | {"where": "prompt == 1"}, "hook": RESID},
            {"kind": "probe", "estimator": {"name": "MassMeanProbe"}, "hook": RESID, "label": "nothing", "train": rows},
            {
                "kind": "expression", "rows": rows,
                "expression": {"run": run.hex(), "reduce": {"op": "mean", "of": {"op": "activations", "hook": RESID}}},
            },
        ]  # fmt: skip
        for job in jobs:
            ask("POST", "quote", json={"job": job})
            taken = ask("POST", "jobs", json={"job": job})
            if not isinstance(taken, Handles):
                continue
            (handle,) = taken.values
            while True:
                status = decode(http.get(f"/api/v1/p/{project}/jobs/{handle.hex()}").content)
                if not isinstance(status, JobStatus) or status.final or status.state == "in_review":
                    break
                time.sleep(0.02)
            found.append(("STATE", (status,), b""))
            ask("GET", f"jobs/{handle.hex()}/answers/0")
            ask("GET", f"jobs/{handle.hex()}/answers/1")
            ask("GET", f"jobs/{handle.hex()}/made")
    return found


def test_a_token_never_approves(served):
    """A self-made token inherits scopes, so approving takes a browser's session; and nobody approves their own."""
    handles = served.project("review", "ada", heldout=("heldout", "own"))
    served.local.projects.set_role("review", "rita", "reviewer", by="ada")
    pre = "blocks.0.hook_resid_pre"
    with served.lake_of("ada", "review") as lake:
        run = lake["heldout"]
        assert run.view.handle == handles["heldout"].hex()
        future = lake.submit(
            "expression",
            {"run": run, "expression": (mp.lazy(run)[pre] * 1.0).mean().expression},
            lambda answers, made: answers[0],
        )
        while not future.done():
            time.sleep(0.02)
        assert future.status.state == "in_review"
        api, page = (f"{base}/p/review/reviews/{future.handle}/0" for base in ("/api/v1", ""))
        yes = {"decision": "approved"}
        for user in ("rita", "ada"):
            with served.http(served.local.add_token(user, "read", "run", "review", "admin")) as http:
                for headers in (
                    {},
                    {"Origin": ORIGIN},
                    {"Origin": ORIGIN, "X-CSRF-Token": "x", "Cookie": "millpond=x"},
                ):
                    assert decode(http.post(api, json=yes, headers=headers).content) == Failure(ErrorCode.NOT_ALLOWED)
                    assert http.post(page, data={"do": "approve", "csrf_token": "x"}, headers=headers).status_code in (
                        303,
                        403,
                    )
        assert future.look().state == "in_review"
        with _browser(served, "ada") as (http, headers):  # asked for it herself
            assert decode(http.post(api, json=yes, headers=headers).content) == Failure(ErrorCode.NOT_ALLOWED)
        with _browser(served, "rita") as (http, headers):
            stolen = headers | {"Origin": "http://ada.localhost:8000"}  # a page of somebody's own
            assert decode(http.post(api, json=yes, headers=stolen).content) == Failure(ErrorCode.NOT_ALLOWED)
            assert decode(http.post(api, json=yes, headers=headers).content) == Handles(())
        assert future.result().kind == "mean"


@contextmanager
def _browser(served, user):
    """A browser that has logged in, and the headers of its own pages' posts."""
    login = served.local.add_token(user, "read", "run", "review", login=True)
    with served.http() as http:
        assert http.post("/login", data={"token": login}, headers={"Origin": ORIGIN}).status_code == 303
        shown = http.get("/")
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', shown.text)
        yield http, {"Origin": ORIGIN, "X-CSRF-Token": csrf[1]}


def test_who_leaves_a_project_meanwhile_gets_nothing_of_it(served):
    """Neither the answer of a job of their own nor its state; and a lesser role loses what it does not have."""
    handles = served.project("leaving", "ada", heldout=("heldout", "own"))
    job = {"kind": "statistics", "rows": {"run": handles["heldout"].hex()}, "hook": RESID}
    with served.http(served.local.add_token("bob", "read", "run")) as http:

        def ask(method, path):
            return http.request(method, f"/api/v1/p/leaving/{path}")

        served.local.projects.set_role("leaving", "bob", "researcher", by="ada")
        (handle,) = decode(http.post("/api/v1/p/leaving/jobs", json={"job": job}).content).values
        mine = f"jobs/{handle.hex()}"
        served.local.projects.set_role("leaving", "bob", "reader", by="ada")
        assert decode(ask("DELETE", mine).content) == Failure(ErrorCode.NOT_ALLOWED)
        served.local.projects.set_role("leaving", "bob", None, by="ada")
        absent = http.get(f"/api/v1/p/no-such-project/{mine}")
        spent = served.balances("bob", "leaving")[1]
        for path in (mine, f"{mine}/answers/0", f"{mine}/made", "jobs", "budget"):
            assert ask("GET", path).content == absent.content
        assert ask("DELETE", mine).content == absent.content
        assert served.balances("bob", "leaving")[1] == spent  # the refusals are not the project's to pay
    with served.lake_of("ada", "leaving") as lake:  # the job went on, and those who stayed have its answer
        future = lake.job(handle.hex(), answers=1)
        assert future.result(timeout=60)


def test_payers_are_the_users_that_tokens_name(served):
    """One user's spending is another's in the project, and in nobody's week but the spender's."""
    served.project("shared", "ada", heldout=("heldout", "own"))
    served.local.projects.set_role("shared", "bob", "researcher", by="ada")
    weeks = [served.balances(user, "shared")[0] for user in ("ada", "bob")]
    with served.lake_of("bob", "shared") as lake:
        lake["heldout"].statistics(RESID)
    assert served.balances("ada", "shared")[0] == weeks[0]
    assert served.balances("bob", "shared")[0] > weeks[1]
    assert served.balances("bob", "shared")[1] == served.balances("ada", "shared")[1] > 0
