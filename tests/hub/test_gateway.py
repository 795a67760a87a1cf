"""The served gateway over loopback: who may do what, what it costs, and that nothing else is said."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
from tests.hub.gatehouse import HOOK, PROMPTS, D, Gatehouse, probe, rows

from millpond.hub.body import (
    BudgetLeft,
    ErrorCode,
    Failure,
    Handles,
    Quote,
    ReleasedResult,
    Withheld,
    decode,
)
from millpond.hub.gateway import create_app
from millpond.hub.ledger import Payer
from millpond.hub.rules import Rule
from millpond.hub.serving import Endpoint, EndpointRoute, Fixed

P = "/api/v1/p/one"
NOBODY = "0123456789abcdef"
STATISTICS = {"kind": "statistics", "hook": HOOK}


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    with Gatehouse(tmp_path_factory.mktemp("gate")) as found:
        yield found


def code(reply):
    body = decode(reply.content)
    assert isinstance(body, Failure), body
    return body.code


def test_every_route_declares_its_scope_and_asks_for_it(gate):
    routes = gate.app.routes
    assert routes
    assert all(isinstance(route, EndpointRoute) for route in routes)
    declared = [route.declared for route in routes]
    public = {(one.method, one.path) for one in declared if one.scope == "public"}
    assert public == {
        ("GET", "/api/v1/version"), ("GET", "/api/v1/openapi.json"), ("GET", "/login"), ("POST", "/login"),
        ("GET", "/oauth_callback"), ("GET", "/pages/style.css"), ("GET", "/pages/live.js"), ("GET", "/pages/icon.svg"),
    }  # fmt: skip
    nobody, reader = gate.client(), gate.client("reader")
    for one in declared:
        path = one.path.replace("{project}", "one").replace("{number}", "0")
        for name in ("handle", "job"):
            path = path.replace(f"{{{name}}}", NOBODY)
        if (one.method, one.path) in public or one.page:
            continue
        for client in (nobody, gate.client(Authorization="Bearer nonsense"), gate.client(Cookie="millpond=nonsense")):
            reply = client.request(one.method, path)
            assert (reply.status_code, reply.content) == (403, b"\x02" + bytes([ErrorCode.NOT_ALLOWED.value])), one
        if one.scope != "read":
            body = {"nothing": "json", "json": "{}", "bulk": "{}", "form": ""}[one.takes]
            reply = reader.request(one.method, path, content=None if one.takes == "nothing" else body)
            assert code(reply) == ErrorCode.NOT_ALLOWED, one


def test_a_route_without_a_scope_cannot_be_made(gate):
    with pytest.raises(TypeError):
        Endpoint("GET", "/x", handler=lambda call: Fixed(b""))


def test_a_response_says_nothing_beside_its_body(gate):
    ada = gate.client("ada")
    names = {"content-type", "content-length"}
    for method, path in (
        ("GET", f"{P}/runs"), ("GET", f"{P}/runs/{NOBODY}"), ("GET", "/api/v1/version"), ("GET", "/nowhere"),
        ("POST", f"{P}/jobs"), ("PUT", f"{P}/jobs"), ("HEAD", f"{P}/runs"), ("TRACE", "/"), ("GET", f"{P}/runs/"),
    ):  # fmt: skip
        reply = ada.request(method, path, headers={"Accept-Encoding": "gzip", "X-Forwarded-For": "1.2.3.4"})
        assert set(reply.headers) == names, (method, path)
    assert ada.head(f"{P}/runs").status_code == 404
    browser, _ = gate.browser("ada")  # it guesses types and keeps answers, unless it is told not to
    for path in (f"{P}/runs", f"{P}/runs/{NOBODY}", "/nowhere", "/api/v1/version", "/"):
        headers = browser.get(path).headers
        assert names | {"cache-control", "x-content-type-options"} <= set(headers)
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_a_response_is_one_piece_and_the_connection_is_kept(gate):
    """The meter charges 16 bytes a piece, TLS a record; a new connection costs a handshake."""
    request = (
        f"GET {P}/jobs/{NOBODY} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.tokens['ada']}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as wire:
        for _ in range(5):
            wire.sendall(request)
            whole = wire.recv(65536)
            head, _, body = whole.partition(b"\r\n\r\n")
            assert decode(body) == Failure(ErrorCode.NOT_FOUND)
            assert len(whole) <= 90, head


def test_a_labels_text_cannot_fill_the_memory(gate):
    """Text takes the longest value's room for every row: one of 100 kB for 1,200 rows took 480 MB."""
    ada = gate.client("ada")
    for value in ("x" * 201, "x" * 100_000, ["x" * 300] * 20):
        by = "token" if isinstance(value, list) else "prompt"
        values = {f"p{number}": value for number in range(PROMPTS)}
        reply = ada.post(f"{P}/runs/{gate.run}/labels", json={"name": "long", "by": by, "values": values})
        assert code(reply) == ErrorCode.BAD_REQUEST
    for column in ("x" * 201, {"a": 1}, [1, 2]):
        sent = {"name": "long", "prompts": [{"id": "a", "text": "b", "column": column}]}
        assert code(ada.post(f"{P}/prompts", json=sent)) == ErrorCode.BAD_REQUEST


def test_constants_are_the_same_for_everybody(gate):
    one, other = gate.client().get("/api/v1/version"), gate.client("eve").get("/api/v1/version")
    assert one.content == other.content
    assert set(one.json()) == {"version", "api", "dictionary_sha256", "text_model"}
    spec = gate.client().get("/api/v1/openapi.json").json()
    assert set(spec["paths"]) >= {"/api/v1/p/{project}/jobs", "/api/v1/p/{project}/budget"}
    assert gate.client("ada").get("/api/v1/projects").json() == {"projects": ["one"]}
    assert gate.client("eve").get("/api/v1/projects").json() == {"projects": ["two"]}


def test_what_is_another_projects_and_what_is_not_there_answer_alike(gate):
    """To the byte, the status and the charge, for every route that names something."""
    ada, eve = gate.client("ada"), gate.client("eve")
    job = gate.do(ada, STATISTICS | {"rows": rows(gate.run)})
    trained = gate.do(ada, probe(gate.run, test=False))
    (artifact,) = decode(ada.get(f"{P}/jobs/{trained}/made").content).values

    def ask(client, project, method, path, body=None):
        before = gate.ledger.head()[0]
        reply = client.request(method, f"/api/v1/p/{project}/{path}", json=body)
        (_, what) = _charges(gate, before)
        return reply.status_code, reply.content, dict(reply.headers), what

    mine, ghost = job, NOBODY
    for method, path, body in (
        ("GET", "runs/{}", None), ("GET", "jobs/{}", None), ("GET", "jobs/{}/answers/0", None), ("GET", "jobs/{}/made", None),
        ("DELETE", "jobs/{}", None), ("POST", "runs/{}/labels", {"name": "x", "by": "prompt", "values": {"p0": 1}}),
    ):  # fmt: skip
        named = gate.run if path.startswith("runs") else mine
        foreign, absent = (ask(eve, "two", method, path.format(one), body) for one in (named, ghost))
        assert foreign == absent
        assert foreign[0] == 404
    for body in (
        lambda one: {"job": STATISTICS | {"rows": rows(one)}}, lambda one: {"job": probe(one)},
        lambda one: {"job": {"kind": "release", "artifact": artifact.hex() if one == gate.run else one}},
    ):  # fmt: skip
        for path in ("quote", "jobs"):
            assert ask(eve, "two", "POST", path, body(gate.run)) == ask(eve, "two", "POST", path, body(ghost))
    # projects themselves: one that is not there, one that eve is no member of
    for method, path in (
        ("GET", "runs"),
        ("GET", "budget"),
        ("GET", f"runs/{gate.run}"),
        ("GET", "jobs"),
        ("GET", f"jobs/{job}"),
    ):
        assert ask(eve, "one", method, path) == ask(eve, "nothing", method, path)


def _charges(gate, after):
    """Bytes and kinds charged since entry `after`, without whose they are."""
    import sqlalchemy as sa

    from millpond.hub.tables import ENTRIES

    with gate.engine.connect() as connection:
        found = connection.execute(sa.select(ENTRIES.c.kind, ENTRIES.c.detail).where(ENTRIES.c.seq > after)).all()
    details = [json.loads(detail) for kind, detail in found if kind == "charge"]
    return sum(one["bytes"] for one in details), [(one["bytes"], one["what"]) for one in details]


def test_roles_decide_inside_a_project(gate):
    rex, ben = gate.client("rex"), gate.client("ben")
    assert isinstance(decode(rex.get(f"{P}/runs").content), Handles)
    assert (
        code(rex.post(f"{P}/jobs", json={"job": probe(gate.run)})) == ErrorCode.NOT_ALLOWED
    )  # a reviewer runs nothing
    assert code(ben.get(f"{P}/reviews")) == ErrorCode.NOT_ALLOWED  # no scope
    assert isinstance(decode(ben.post(f"{P}/quote", json={"job": probe(gate.run)}).content), Quote)


def test_two_projects_share_a_run_and_not_their_labels(gate):
    ada, eve = gate.client("ada"), gate.client("eve")
    values = {f"p{number}": number % 2 for number in range(PROMPTS)}
    assert decode(
        ada.post(f"{P}/runs/{gate.run}/labels", json={"name": "odd", "by": "prompt", "values": values}).content
    ) == Handles(())
    seen = decode(ada.get(f"{P}/runs/{gate.run}").content)
    assert seen.labels == ("odd", "source", "true")
    assert decode(eve.get(f"/api/v1/p/two/runs/{gate.run_two}").content).labels == ("source", "true")
    for name in ("odd", f"p{'0' * 12}_odd"):
        assert (
            code(eve.post("/api/v1/p/two/quote", json={"job": probe(gate.run_two, label=name)}))
            == ErrorCode.BAD_REQUEST
        )
    tokens = {f"p{number}": [number % 3] * 20 for number in range(PROMPTS)}
    assert decode(
        ada.post(f"{P}/runs/{gate.run}/labels", json={"name": "third", "by": "token", "values": tokens}).content
    ) == Handles(())
    for bad in (
        {"name": "x", "by": "token", "values": values}, {"name": "x", "by": "prompt", "values": tokens},
        {"name": "x", "by": "prompt", "values": {"p0": 1}}, {"name": "x y", "by": "prompt", "values": values},
        {"name": "x", "by": "prompt", "values": values | {"nobody": 1}}, {"name": "x", "by": "token", "values": tokens | {"p0": [1]}},
    ):  # fmt: skip
        if bad["values"] == {"p0": 1}:
            continue  # a label may cover some prompts
        assert code(ada.post(f"{P}/runs/{gate.run}/labels", json=bad)) == ErrorCode.BAD_REQUEST, bad["name"]


BODIES = {
    "nothing": b"", "no JSON": b"{job", "a list": b"[]", "NaN": b'{"job": NaN}', "infinity": b'{"job": -Infinity}',
    "a float too large": b'{"job": 1e999}', "an integer too long": b'{"job": ' + b"9" * 10_000 + b"}",
    "deep": b'{"job": ' + b"[" * 200 + b"]" * 200 + b"}", "deeper": b"[" * 100_000,
    "half a surrogate": b'{"job": "\\ud800"}', "NUL": b'{"job": {"kind": "a\\u0000"}}', "no UTF-8": b'{"job": "\xff"}',
    "two objects": b"{}{}", "an unknown field": b'{"job": {}, "also": 1}', "an unknown kind": b'{"job": {"kind": "shell"}}',
    "a byte order mark": b"\xef\xbb\xbf{}",
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_job_costs_an_error_and_echoes_nothing(gate, name):
    before = gate.spent()
    reply = gate.client("ada").post(f"{P}/jobs", content=BODIES[name], headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.content) == (400, b"\x02" + bytes([ErrorCode.BAD_REQUEST.value]))
    assert gate.spent() - before == 18


def test_what_is_too_large_is_not_read(gate):
    ada = gate.client("ada")
    before = gate.spent()
    reply = ada.post(f"{P}/reviews/{NOBODY}/0", content=b" " * ((1 << 20) + 1))
    assert code(reply) == ErrorCode.TOO_LARGE
    assert gate.spent() - before == 18
    assert code(ada.request("GET", f"{P}/runs", content=b"x")) == ErrorCode.TOO_LARGE
    with socket.create_connection(("127.0.0.1", gate.port)) as raw:  # a length that is only claimed
        head = f"POST {P}/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.tokens['ada']}\r\nContent-Length: 99999999999\r\n\r\n"
        raw.sendall(head.encode())
        raw.settimeout(10)
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_large_bodies_are_read_of_somebody_known_and_two_at_a_time(gate):
    def send(token):
        raw = socket.create_connection(("127.0.0.1", gate.port))
        raw.settimeout(10)
        head = f"POST {P}/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 60000000\r\n\r\n"
        raw.sendall(head.encode() + b"{")
        return raw

    with send("nobody's") as raw:  # answered although almost nothing of its body was sent
        assert raw.recv(4096).startswith(b"HTTP/1.1 403")
    slow = [send(gate.tokens["ada"]) for _ in range(4)]  # more than two of hers at once
    try:
        assert gate.client("ben").post(f"{P}/quote", json={"job": {}}).status_code == 400  # keep nobody else waiting
        assert gate.client("ada").get(f"{P}/runs").status_code == 200  # nor her own small requests
    finally:
        for raw in slow:
            raw.close()
    assert gate.client("ada").post(f"{P}/quote", json={"job": {}}).status_code == 400  # room again


def test_a_job_is_priced_done_charged_and_repeated_for_the_fixed_amount(gate):
    ada = gate.client("ada")
    job = probe(gate.run, name="LogisticProbe", C=0.5)
    quoted = decode(ada.post(f"{P}/quote", json={"job": job}).content).bytes
    handle = gate.do(ada, job)
    before = gate.spent()
    reply = ada.get(f"{P}/jobs/{handle}/answers/0")
    body = decode(reply.content)
    assert isinstance(body, ReleasedResult)
    assert body.result["auroc"] == pytest.approx(0.983, abs=0.02)
    assert body.result["rows"] == 15 * 20
    assert gate.spent() - before == len(reply.content) + 16 <= quoted
    before = gate.spent()
    assert ada.get(f"{P}/jobs/{handle}/answers/0").content == reply.content
    assert gate.client("ben").get(f"{P}/jobs/{handle}/answers/0").content == reply.content  # a member's, too
    assert gate.spent() - before == 32
    again = gate.do(ada, job)  # the same question is the same answer
    before = gate.spent()
    assert ada.get(f"{P}/jobs/{again}/answers/0").content == reply.content
    assert gate.spent() - before == 16
    for number in ("1", "00000000", "x", "-1", "0x0"):
        assert code(ada.get(f"{P}/jobs/{handle}/answers/{number}")) == ErrorCode.NOT_FOUND
    assert decode(ada.get(f"{P}/jobs").content).values.count(bytes.fromhex(handle)) == 1
    assert bytes.fromhex(handle) not in decode(gate.client("ben").get(f"{P}/jobs").content).values


def test_a_job_that_waits_has_no_answer_and_looking_costs_two_bytes_a_slot(gate):
    ada = gate.client("ada")
    handle = gate.submit(ada, STATISTICS | {"rows": rows(gate.run, where="position > 3")})
    assert code(ada.get(f"{P}/jobs/{handle}/answers/0")) == ErrorCode.UNAVAILABLE
    assert decode(ada.get(f"{P}/jobs/{handle}/made").content) == Handles(())
    assert decode(ada.delete(f"{P}/jobs/{handle}").content).state in ("queued", "cancelled")
    assert gate.wait(ada, handle) == "cancelled"
    before = gate.spent()
    for _ in range(50):
        assert decode(ada.get(f"{P}/jobs/{handle}").content).state == "cancelled"
    assert gate.spent() == before
    assert code(ada.get(f"{P}/jobs/{handle}/answers/0")) == ErrorCode.JOB_FAILED
    assert gate.work() == 0


def test_a_job_that_fails_says_only_that(gate):
    ada = gate.client("ada")
    handle = gate.submit(ada, STATISTICS | {"rows": rows(gate.run, where="position > 1000")})
    gate.work()
    assert gate.wait(ada, handle) == "failed"
    assert ada.get(f"{P}/jobs/{handle}/answers/0").content == b"\x02" + bytes([ErrorCode.JOB_FAILED.value])


def test_restricted_prompts_are_judged_and_refusals_name_their_rules(gate):
    ada = gate.client("ada")
    mean = {"op": "mean", "of": {"op": "project", "of": {"op": "activations", "hook": HOOK}, "directions": [[1.0] * D]}}
    job = {
        "kind": "expression",
        "rows": rows(gate.restricted, where="prompt < 12"),
        "expression": {"run": gate.restricted, "reduce": mean},
    }
    handle = gate.do(ada, job)
    assert gate.wait(ada, handle) == "refused"
    body = gate.answer(ada, handle)
    assert isinstance(body, Withheld)
    assert Rule.TOO_FEW_PROMPTS in body.verdict.rules
    first = gate.do(ada, job | {"rows": rows(gate.restricted, where="prompt < 50")})
    assert isinstance(gate.answer(ada, first), ReleasedResult)
    second = gate.do(ada, job | {"rows": rows(gate.restricted, where="prompt < 53")})  # the first and three prompts
    held = gate.answer(ada, second)
    assert isinstance(held, Withheld)
    assert Rule.DIFFERENCING in held.verdict.rules


def test_a_review_needs_the_scope_a_browser_and_somebody_else(gate):
    ada, rex = gate.client("ada"), gate.client("rex")
    mean = {
        "op": "mean",
        "of": {"op": "multiply", "left": {"op": "activations", "hook": HOOK}, "right": {"op": "label", "name": "true"}},
    }
    handle = gate.do(
        ada, {"kind": "expression", "rows": rows(gate.run), "expression": {"run": gate.run, "reduce": mean}}
    )
    assert gate.wait(ada, handle) == "in_review"
    assert gate.answer(ada, handle).verdict.rules == (Rule.CUSTOM_OUTPUT,)
    assert decode(rex.get(f"{P}/reviews").content).values == (bytes.fromhex(handle),)
    path, yes = f"{P}/reviews/{handle}/0", {"decision": "approved"}
    assert code(rex.post(path, json=yes)) == ErrorCode.NOT_ALLOWED  # a token, with the scope and the role
    browser, csrf = gate.browser("rex")
    for headers in ({}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": csrf, "Origin": "http://127.0.0.1:1"}):
        assert code(browser.post(path, json=yes, headers=headers)) == ErrorCode.NOT_ALLOWED
    own, own_csrf = gate.browser("ada")
    assert code(own.post(path, json=yes, headers={"X-CSRF-Token": own_csrf})) == ErrorCode.NOT_ALLOWED  # one's own
    for wrong in ({"decision": "maybe"}, {}, {"decision": "approved", "by": "ada"}):
        assert code(browser.post(path, json=wrong, headers={"X-CSRF-Token": csrf})) == ErrorCode.BAD_REQUEST
    assert gate.wait(ada, handle) == "in_review"
    kept, shown = gate.app.state.gateway.look(
        gate.app.state.gateway.gatekeeper.identify({}, dict(browser.cookies)), "one", handle, 0
    )
    assert shown.charged == len(shown.body) + 16  # looking at the payload is charged, to the reviewer
    assert kept.evidence.custom
    assert decode(browser.post(path, json=yes, headers={"X-CSRF-Token": csrf}).content) == Handles(())
    assert code(browser.post(path, json=yes, headers={"X-CSRF-Token": csrf})) == ErrorCode.NOT_FOUND  # decided
    decided = ("queued", "running", "in_review")  # seen at the end of the slot
    assert gate.wait(ada, handle, past=decided) == "done"
    before = gate.spent()
    reply = ada.get(f"{P}/jobs/{handle}/answers/0")
    expected = (gate.rows[HOOK] * gate.marks[:, None]).mean(axis=0)
    found = decode(reply.content).result["mean"]
    assert np.abs(found - expected).max() < 1.05 * np.abs(expected).max() / 31
    assert gate.spent() - before == len(reply.content) + 16

    denied = gate.do(
        ada,
        {
            "kind": "expression",
            "rows": rows(gate.run, where="position > 0"),
            "expression": {"run": gate.run, "reduce": mean},
        },
    )
    browser.post(f"{P}/reviews/{denied}/0", json={"decision": "denied"}, headers={"X-CSRF-Token": csrf})
    assert gate.wait(ada, denied, past=decided) == "refused"
    assert gate.answer(ada, denied).verdict.outcome == "refuse"


def test_logging_in_needs_the_page_and_its_token(gate):
    page = gate.client().get("/login?next=/x%22%3E%3Cscript%3E")
    assert page.status_code == 200
    assert b'x"><script>' not in page.content
    assert "default-src 'none'" in page.headers["content-security-policy"]
    outside, inside = gate.client(Origin="http://evil.example"), gate.client(Origin=gate.origin)
    login, bearer = {"token": gate.logins["rex"]}, {"token": gate.tokens["rex"]}
    for client, form in ((outside, login), (inside, bearer), (inside, {}), (gate.client(), login)):
        reply = client.post("/login", data=form)
        assert reply.status_code == 403
        assert "set-cookie" not in reply.headers
    for target in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", "/ok\r\nx: y"):
        reply = inside.post("/login", params={"next": target}, data=login)
        assert reply.headers["location"] == "/"
    browser, csrf = gate.browser("rex")
    assert isinstance(decode(browser.get(f"{P}/runs").content), Handles)
    assert browser.post("/logout", data={"csrf_token": "x"}).status_code == 403
    assert browser.post("/logout", data={"csrf_token": csrf}).headers["location"] == "/login"
    assert browser.get(f"{P}/runs").status_code == 403


def test_what_is_left_is_shown_in_steps_and_dear_jobs_are_refused_first(tmp_path):
    with Gatehouse(tmp_path, parameters=8_000_000) as gate:  # 1,000 bytes a week
        ada = gate.client("ada")
        left = decode(ada.get(f"{P}/budget").content)
        assert left == BudgetLeft(1000, 64, 64)
        sweep = {
            "kind": "sweep", "estimator": {"name": "MassMeanProbe"}, "hooks": ["*"], "labels": ["true"] * 8,
            "train": rows(gate.run, "train"), "test": rows(gate.run, "test"),
        }  # fmt: skip
        assert decode(ada.post(f"{P}/quote", json={"job": sweep}).content).bytes > 1000
        before = gate.spent()
        reply = ada.post(f"{P}/jobs", json={"job": sweep})
        assert (reply.status_code, code(reply)) == (402, ErrorCode.OVER_BUDGET)
        assert gate.spent() - before == 18
        assert decode(ada.get(f"{P}/jobs").content) == Handles(())
        for _ in range(60):
            last = ada.get(f"{P}/runs")
        assert last.content == b"\x03"  # the notice that the budget is spent, to whatever is asked
        assert gate.ledger.balances(Payer("ada", "one", ("m",)))[0].spent <= 1000
        assert gate.client("ben").get(f"{P}/runs").status_code == 200  # a week of his own


def test_a_token_beside_another_users_session_acts_and_pays_as_its_own_user(gate):
    """The account is one: the token's. Neither the session's role nor its budget is used."""
    browser, csrf = gate.browser("rex")
    job = gate.submit(gate.client("ada"), STATISTICS | {"rows": rows(gate.run)})
    headers = {"Authorization": f"Bearer {gate.tokens['ben']}", "X-CSRF-Token": csrf, "Origin": gate.origin}

    def weeks():
        return [gate.ledger.balances(Payer(user, "one", ("m",)))[0].spent for user in ("ben", "rex")]

    before = weeks()
    assert code(browser.get(f"{P}/reviews", headers=headers)) == ErrorCode.NOT_ALLOWED  # Rex may, Ben may not
    reply = browser.post(f"{P}/reviews/{job}/0", headers=headers, json={"decision": "approved"})
    assert code(reply) == ErrorCode.NOT_ALLOWED
    assert decode(browser.get(f"{P}/jobs", headers=headers).content) == Handles(())  # Ben has none; Rex may not submit
    submitted = decode(
        browser.post(f"{P}/jobs", headers=headers, json={"job": STATISTICS | {"rows": rows(gate.run)}}).content
    )
    assert isinstance(submitted, Handles)
    assert gate.app.state.gateway.queue.get(submitted.values[0].hex()).user == "ben"
    after = weeks()
    assert (after[0] > before[0], after[1]) == (True, before[1])
    headers["Authorization"] = "Bearer nonsense"
    assert code(browser.get(f"{P}/jobs", headers=headers)) == ErrorCode.NOT_ALLOWED
    assert isinstance(decode(browser.get(f"{P}/reviews").content), Handles)  # the session itself goes on


def test_plain_http_is_for_loopback_and_cookies_are_bound_to_their_host(tmp_path):
    from millpond.hub.settings import Settings

    common = {"lake": "l", "database": "d", "policy": "p", "tokens": "t"}
    tls = {"certificate": tmp_path / "c", "key": tmp_path / "k"}
    https = {"origin": "https://hub.example.org"}
    for good in (
        {}, {"listen": "127.0.0.1:1"}, {"listen": "[::1]:1", "origin": "http://[::1]:1"}, {"listen": "unix:/run/x"},
        {"origin": "http://gateway.localhost:8000"}, https, https | {"listen": "unix:/run/x"},
        https | tls | {"listen": "0.0.0.0:443"}, https | {"listen": "10.0.0.1:80", "tls_proxy": True},
    ):  # fmt: skip
        Settings.model_validate(common | good)
    for bad, said in (
        ({"origin": "http://hub.example.org"}, "loopback only"), ({"origin": "http://10.0.0.1:80", "tls_proxy": True}, "loopback"),
        ({"origin": "http://127.0.0.1.example.org"}, "loopback only"), (tls, "https"), ({"tls_proxy": True}, "https"),
        (https | {"listen": "0.0.0.0:80"}, "without a certificate"), (https | {"listen": "[::]:80"}, "without a certificate"),
        (https | {"listen": "hub.example.org:80"}, "without a certificate"), ({"listen": "0.0.0.0:80"}, "without a certificate"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Settings.model_validate(common | bad)
    with Gatehouse(tmp_path) as plain:
        cookie = (
            plain.client(Origin=plain.origin).post("/login", data={"token": plain.logins["rex"]}).headers["set-cookie"]
        )
        assert cookie.startswith("millpond=")
        gatekeeper = plain.app.state.gateway.gatekeeper
        served = type(gatekeeper)(gatekeeper.tokens, "https://hub.example.org")
        plain.app.state.gateway.gatekeeper = served
        reply = plain.client(Origin=served.origin).post("/login", data={"token": plain.logins["rex"]})
        name, _, rest = reply.headers["set-cookie"].partition("=")
        assert name == "__Host-millpond"
        assert rest.partition("; ")[2].split("; ") == ["Path=/", "HttpOnly", "SameSite=Lax", "Secure"]  # no Domain
        assert served.state_cookie.startswith("__Host-")


def test_settings_say_what_is_wrong(tmp_path):
    from millpond.hub.settings import read_settings
    from millpond.store.errors import InvalidInput

    gate = Gatehouse(tmp_path)
    good = gate.config.read_text()
    for change, said in (
        (good.replace("tokens = ", "token = "), "token"), (good.replace('tokens = "tokens.toml"\n', ""), "tokens"),
        (good.replace(gate.origin, gate.origin + "/path"), "origin"), ("lake = ", "cannot be read"),
        ('cookies = "x"\n' + good, "cookies"),
    ):  # fmt: skip
        gate.config.write_text(change)
        with pytest.raises(InvalidInput, match=said):
            read_settings(gate.config)
    gate.config.write_text(good)
    (tmp_path / "policy.toml").write_text("")
    with pytest.raises(InvalidInput, match="has no models"):
        create_app(read_settings(gate.config))
    gate.ledger.close()
    gate.engine.dispose()


def test_the_commands_make_tokens_projects_roles_and_holdings(tmp_path, capsys):
    from millpond.cli import main
    from millpond.hub.auth import TokenFile

    gate = Gatehouse(tmp_path)
    config = ["--config", str(gate.config)]
    assert main(["token", "new", "zoe", "--scope", "read", "review", "--tokens", str(tmp_path / "tokens.toml")]) == 0
    assert TokenFile(tmp_path / "tokens.toml").identify(capsys.readouterr().out.strip()).scopes == {"read", "review"}
    assert main(["project", "new", "three", "--models", "m", "--owner", "zoe", *config]) == 0
    assert main(["project", "role", "three", "ben", "researcher", *config]) == 0
    assert gate.projects.members("three") == (("ben", "researcher"), ("zoe", "owner"))
    assert main(["project", "role", "three", "ben", "none", *config]) == 0
    assert gate.projects.members("three") == (("zoe", "owner"),)
    assert main(["project", "hold", "three", "shared", "--model", "m", *config]) == 0
    (held,) = gate.projects.held("three", "run")
    assert capsys.readouterr().out.strip() == held.handle.hex()
    assert (held.name, held.target, held.detail) == ("shared", "shared", {"prompts": "restricted"})
    for wrong in (
        ["project", "new", "four", "--models", "nobody", "--owner", "zoe"], ["project", "role", "nothing", "ben", "reader"],
        ["project", "hold", "three", "nothing", "--model", "m"], ["release", "verify", "0" * 16],
    ):  # fmt: skip
        assert main([*wrong, *config]) == 2
    assert main(["token", "new", "zoe", "--expires", "soon"]) == 2
    gate.ledger.close()
    gate.engine.dispose()


def test_names_that_are_not_there_are_refused_at_submission_as_those_of_others_are(gate):
    ada, eve = gate.client("ada"), gate.client("eve")
    values = {f"p{number}": number % 2 for number in range(PROMPTS)}
    eve.post(f"/api/v1/p/two/runs/{gate.run_two}/labels", json={"name": "hers", "by": "prompt", "values": values})
    mark = next(name for name in gate.lake["shared"].labels if name.endswith("_hers"))
    split = {"test": 0.25, "seed": 1}
    for run in (gate.run, gate.restricted):
        refused = [
            ada.post(f"{P}/{path}", json={"job": STATISTICS | {"rows": rows(run) | wrong}})
            for path in ("jobs", "quote")
            for wrong in (
                {"where": "nope > 0"}, {"where": "hers > 0"}, {"where": f"{mark} > 0"}, {"where": "true and hers@1 > 0"},
                {"where": "sha256 == 'x'"}, {"split": split | {"by": "nope"}, "part": "test"},
                {"split": split | {"by": "hers"}, "part": "test"}, {"split": split | {"by": mark}, "part": "test"},
            )
        ]  # fmt: skip
        assert {(reply.status_code, reply.content) for reply in refused} == {(400, refused[0].content)}
        assert code(refused[0]) == ErrorCode.BAD_REQUEST
        for right in ({"where": "true and source == 's1'"}, {"split": split | {"by": "source"}, "part": "test"}):
            reply = ada.post(f"{P}/quote", json={"job": STATISTICS | {"rows": rows(run) | right}})
            assert isinstance(decode(reply.content), Quote), right
    assert isinstance(
        decode(
            eve.post(
                "/api/v1/p/two/quote", json={"job": STATISTICS | {"rows": rows(gate.run_two, where="hers")}}
            ).content
        ),
        Quote,
    )
