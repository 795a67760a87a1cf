"""The pages, in a real browser before a real gateway, executor and meter; and what they say to those who may not look."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from tests.browser import Browser
from tests.queue_serving import serving

import millpond as mp
from millpond.hub.auth import new_token
from millpond.hub.body import JobStatus, TrainingCurve, decode, encode
from millpond.hub.database import open_database
from millpond.hub.ledger import Payer
from millpond.hub.local import LocalVault
from millpond.hub.pages.charts import bar_chart, line_chart
from millpond.hub.pages.jobs import STATES
from millpond.hub.pages.results import lay_out
from millpond.hub.pages.shell import FOLDER, render
from millpond.hub.policy import Disclosure
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.hub.shapes import Context
from millpond.hub.tables import ENTRIES
from millpond.store.lake import open_lake
from millpond.store.result import Result
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "stdlib_llama" / "model"
HOOKS = tuple(f"blocks.{layer}.hook_resid_{end}" for layer, end in ((0, "pre"), (0, "post"), (1, "post"), (2, "post")))
PROMPTS, WIDTH = 60, 16


def write_run(lake, name):
    """Rows whose label is in the later layers only, and all the clearer the later."""
    rng = np.random.default_rng(0)
    provenance = {"model": "toy", "capture": {"capture": {"max_new_tokens": 0}}}
    spec = lake.create_run(name, hooks=HOOKS, d_model=WIDTH, dtype="float32", provenance=provenance)
    writer, marks, direction = RunWriter(lake.run_folder(name), spec), {}, rng.standard_normal(WIDTH)
    for number in range(PROMPTS):
        n = int(rng.integers(15, 30))
        mark = rng.random(n) < 0.5
        rows = {hook: rng.standard_normal((n, WIDTH)).astype(np.float32) for hook in HOOKS}
        for strength, hook in enumerate(HOOKS[2:], start=1):
            rows[hook] += (0.3 * strength * np.outer(mark - 0.5, direction)).astype(np.float32)
        marks[f"p{number}"] = mark
        tokens = rng.integers(0, 5000, n).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, np.arange(n, dtype=np.int32), rows))
    writer.commit()
    seal_run(
        lake.run_folder(name),
        prompts=pd.DataFrame({"id": list(marks)}),
        token_labels={"deceptive": marks},
        token_label_dtypes={"deceptive": "bool"},
    )


@pytest.fixture(scope="module")
def site():
    with serve_site() as found:
        yield found


@contextmanager
def serve_site():
    """A gateway on a socket and the meter before it, whose address is the browsers' origin."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    origin = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="mpp", dir="/tmp") as folder:
        lake = open_lake(Path(folder) / "lake", create=True)
        write_run(lake, "run-1")
        models = {"toy": {"parameters": 8_000_000_000}, "stdlib": {"parameters": 4_000_000, "public": True}}
        vault = LocalVault(Path(folder) / "v", lake.url, models, origin=origin)
        with vault.settings.open("a") as settings:
            settings.write(f'[models.toy]\npath = "{folder}/weights"\n[models.stdlib]\npath = "{MODEL}"\n')
        vault.projects.create("deception", models=["toy", "stdlib"], by="ada")
        vault.projects.set_role("deception", "bob", "reviewer", by="ada")
        vault.projects.create("other", models=["toy"], by="eve")
        run = vault.projects.hold("deception", "run", "ten-k", "run-1", model="toy", detail={"prompts": "own"})
        scopes = {"ada": ("read", "run", "review", "admin"), "bob": ("read", "review"), "eve": ("read", "run")}
        tokens = vault.folder / "tokens.toml"
        logins = {user: new_token(tokens, user, held, login=True) for user, held in scopes.items()}
        with vault:
            vault.start()
            # fmt: off
            command = [
                sys.executable, "-I", str(ROOT / "hub" / "meter.py"), "--listen", f"127.0.0.1:{port}",
                "--to", f"unix:{vault.socket}", "--ledger", f"{folder}/meter", "--cap", "50000000",
            ]
            # fmt: on
            with subprocess.Popen(command) as meter:
                try:
                    wait_for(origin)
                    yield SimpleNamespace(
                        origin=origin, vault=vault, run=run.handle.hex(), logins=logins, lake=lake, folder=Path(folder)
                    )
                finally:
                    meter.terminate()


def wait_for(origin):
    end = time.monotonic() + 30
    while True:
        try:
            assert httpx.get(f"{origin}/api/v1/version").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture
def browser(site):
    browser = Browser()
    yield browser
    browser.close()
    assert [url for url in browser.requests if not url.startswith((site.origin + "/", "about:"))] == []
    assert browser.complaints == []


def log_in(browser, site, user):
    """By keyboard: the field has the focus."""
    browser.go(f"{site.origin}/p/deception")
    browser.wait_for("document.activeElement.id == 'token'")
    browser.write(site.logins[user])
    browser.press("Enter", loads=True)


def fill(browser, selector, text):
    browser.tab_to(selector)
    browser.write(text)


def press(browser, selector):
    browser.tab_to(selector)
    browser.press("Enter", loads=True)


def submit(browser, site, job):
    """Submit a job by the form; returns its id once it has ended."""
    browser.go(f"{site.origin}/p/deception/submit")
    fill(browser, "#job", json.dumps(job))
    press(browser, "button[value=quote]")
    assert "can cost at most" in browser.text()
    press(browser, "button[value=submit]")
    browser.wait_for("document.querySelector('[data-state]') && !document.querySelector('[data-follow]')")
    return browser.js("location.pathname").rpartition("/")[2]


def spent(site, user):
    ledger = site.vault.ledger()
    found = ledger.balances(Payer(user, "deception", ("toy",)))[0].spent
    ledger.close()
    return found


def charged(site):
    ledger = site.vault.ledger()
    found = ledger.verify().charged
    ledger.close()
    return found


def curve_charges(site):
    """What each look at a training curve has cost."""
    engine = open_database(site.vault.database)
    with engine.connect() as connection:
        details = [
            json.loads(one) for one in connection.scalars(sa.select(ENTRIES.c.detail).where(ENTRIES.c.kind == "charge"))
        ]
    engine.dispose()
    return [one["bytes"] for one in details if one["what"] == "TrainingCurve"]


def cost(text):
    return int(re.search(r"This page cost ([\d,]+) bytes", text)[1].replace(",", ""))


def probe_job(site, **more):
    split = {"run": site.run, "split": {"test": 0.25, "seed": 3}}
    rows = {"train": split | {"part": "train"}, "test": split | {"part": "test"}}
    return {"kind": "probe", "estimator": {"name": "LogisticProbe", "params": {}}, **rows, "label": "deceptive"} | more


def reduced(site, op):
    """A vector at the hook whose rows depend on the token alone: it goes to a reviewer."""
    reduce = {"op": op, "of": {"op": "activations", "hook": HOOKS[0]}}
    return {"kind": "expression", "rows": {"run": site.run}, "expression": {"run": site.run, "reduce": reduce}}


@pytest.mark.slow
def test_a_job_from_the_form_to_its_result_by_keyboard_alone(browser, site, tmp_path):
    log_in(browser, site, "ada")
    text = browser.text()
    assert "ten-k" in text
    assert "deceptive" in text
    assert f"{PROMPTS}" in text
    browser.tab_to("a.skip")
    press(browser, "nav a[href$='/submit']")
    job = submit(browser, site, probe_job(site, hook=HOOKS[3]))
    assert browser.js("document.querySelector('[data-state]').textContent") == "done"
    press(browser, "ol a")
    text = browser.text()
    assert "Released" in text
    run = mp.open(site.lake.url)["run-1"]
    train, test = run.split(test=0.25, seed=3)
    probe = mp.LogisticProbe().fit(train[HOOKS[3]], train.labels["deceptive"])
    right = probe.evaluate(test[HOOKS[3]], test.labels["deceptive"])
    row = next(line for line in text.splitlines() if line.startswith("auroc"))
    shown, low, high = map(float, row.split()[1:])
    error = (right.intervals["auroc"][1] - right.intervals["auroc"][0]) / 3.92
    assert abs(shown - right["auroc"]) <= 2.5 * error / 2  # half of the first step of 1, 2, 5 that is not under it
    assert low <= shown <= high
    press(browser, "nav a[href$='/jobs']")
    assert job in browser.text()
    press(browser, "nav a[href$='/budget']")
    assert "Your week" in browser.text()
    assert f"{spent(site, 'ada'):,}" in browser.js(
        "document.querySelector('svg[aria-label*=toy]').closest('figure').querySelector('tbody tr:last-child').textContent"
    )
    for name, dark in (("light", False), ("dark", True)):
        browser.dark(dark)
        browser.screenshot(tmp_path / f"{name}.png")
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 26)"


@pytest.mark.slow
def test_a_sweep_is_drawn_from_the_released_numbers(browser, site):
    log_in(browser, site, "ada")
    job = probe_job(site, kind="sweep", hooks=["blocks.*.hook_resid_post"], labels=["deceptive"], control=False)
    del job["label"]
    submit(browser, site, job)
    press(browser, "ol a")
    chart = "document.querySelector('svg[aria-label=\"Auroc\"]')"
    points = browser.js(f"{chart}.querySelector('polyline').getAttribute('points')").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 3
    assert heights == sorted(heights, reverse=True)  # up is better, and later layers are better
    assert browser.js(f"{chart}.closest('figure').querySelectorAll('tbody tr').length") == 3


@pytest.mark.slow
def test_a_training_is_watched_while_it_goes_on(browser, site, tmp_path):
    """The curve grows at ends of slots, is charged when it is looked at, and is not shown of others' prompts."""
    log_in(browser, site, "ada")
    params = {"d_sae": 64, "k": 4, "batch_size": 128}
    job = {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": params}, "hooks": [HOOKS[3]],
        "rows": {"run": site.run}, "tokens": 800_000,
    }  # fmt: skip
    browser.go(f"{site.origin}/p/deception/submit")
    fill(browser, "#job", json.dumps(job))
    press(browser, "button[value=submit]")
    points = "document.querySelector('polyline.curve').getAttribute('points')"
    browser.wait_for(f"document.querySelector('[data-follow]') && {points}.trim().split(' ').length >= 3")
    early = browser.js(points).split()
    browser.screenshot(tmp_path / "curve.png")
    browser.wait_for("document.querySelector('[data-state]').textContent == 'done'", seconds=120)
    late = browser.js(points).split()
    assert late[: len(early)] == early  # what was shown stays
    assert len(late) == 16
    at = [tuple(map(int, point.split(","))) for point in late]
    assert [x for x, _ in at] == [20 * place + 10 for place in range(16)]
    fvu = [(254 - y) / 200 for _, y in at]
    assert fvu[-1] < fvu[0]
    assert browser.js("document.querySelector('[data-reached]').textContent") == ", ".join(
        f"{value:.4g}" for value in fvu
    )
    paid = curve_charges(site)
    assert 2 <= len(paid) <= 40
    assert set(paid) == {16 + 17}
    theirs = site.vault.projects.hold(
        "deception", "run", "others", "run-1", model="toy", detail={"prompts": "restricted"}
    ).handle.hex()
    with httpx.Client(base_url=site.origin, timeout=30) as http:
        token = new_token(site.vault.folder / "tokens.toml", "ada", ("read", "run"))
        http.headers["authorization"] = f"Bearer {token}"
        sent = http.post("/api/v1/p/deception/jobs", json={"job": job | {"rows": {"run": theirs}, "tokens": 100_000}})
        (handle,) = decode(sent.content).values
        path = f"/api/v1/p/deception/jobs/{handle.hex()}"
        while not decode(http.get(path).content).final:
            time.sleep(0.1)
        assert decode(http.get(path).content).state == "done"
        assert decode(http.get(f"{path}/curve").content) == TrainingCurve(())


@pytest.mark.slow
def test_prompts_from_a_file_become_a_capture_job_that_can_be_cancelled(browser, site):
    log_in(browser, site, "ada")
    browser.go(f"{site.origin}/p/deception/submit")
    fill(browser, "#name", "mine")
    fill(browser, "#prompts", '{"id": "a", "text": "one"}\n{"id": "b"}')
    press(browser, "button[value=capture]")
    assert "line 2 of the prompts" in browser.text()
    assert browser.js("document.getElementById('name').value") == "mine"
    path = site.folder / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "text": "<script>alert(1)</script>", "topic": "x"}\n{"id": "b", "text": "two", "topic": "y"}\n'
    )
    node = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=node, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    browser.wait_for("document.getElementById('prompts').value.includes('topic')")
    press(browser, "button[value=capture]")
    text = browser.text()
    assert "Capture job" in text
    assert "State: queued" in text
    assert str(site.folder) not in text  # the vault's own paths are not shown
    press(browser, "button.danger")
    browser.wait_for("document.querySelector('[data-state]')?.textContent == 'cancelled'")


@pytest.mark.slow
def test_a_capture_from_the_form_becomes_a_run(browser, site):
    """A worker takes it over HTTP, with a token for captures alone."""
    log_in(browser, site, "ada")
    browser.go(f"{site.origin}/p/deception/submit")
    fill(browser, "#name", "captured")
    browser.js("document.getElementById('model').value = 'stdlib'")
    lines = [json.dumps({"id": f"p{n}", "text": "def f(x):\n    return x\n" * (n + 1)}) for n in range(4)]
    fill(browser, "#prompts", "\n".join(lines))
    press(browser, "button[value=capture]")
    token, worker = new_worker("gpu", ["capture"])
    queue = SqlQueue(site.vault.database)
    with serving(create_queue_app(queue, [worker])) as address:
        # fmt: off
        command = [
            sys.executable, "-m", "millpond.cli", "worker", "--queue", address, "--model", str(MODEL), "--lake",
            site.lake.url, "--engine", json.dumps({"kv_cache_memory_bytes": 1 << 27, "max_num_batched_tokens": 512}),
            "--until-empty",
        ]
        # fmt: on
        environment = os.environ | {"MILLPOND_WORKER_TOKEN": token}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    queue.engine.dispose()
    assert done.returncode == 0, done.stdout + done.stderr
    browser.wait_for("document.querySelector('[data-state]')?.textContent == 'done'")
    handle = browser.js("document.querySelector('ul code').textContent")
    press(browser, "nav a[href='/p/deception']")
    row = browser.js(
        "[...document.querySelectorAll('tbody tr')].find(row => row.innerText.includes('captured')).innerText"
    )
    assert handle in row
    run = mp.open(site.lake.url)[next(name for name in mp.open(site.lake.url).runs() if name != "run-1")]
    assert [cell.strip() for cell in row.split("\t")][5:7] == ["4", f"{run.n_rows:,}"]


@pytest.mark.slow
def test_a_reviewer_sees_the_evidence_pays_for_the_payload_and_approves(browser, site):
    job = reduced(site, "mean")
    log_in(browser, site, "ada")
    job_id = submit(browser, site, job)
    assert browser.js("document.querySelector('[data-state]').textContent") == "in review"
    press(browser, "ol a")
    assert "token only" in browser.text()
    browser.go(f"{site.origin}/p/deception/reviews/{job_id}/0")
    assert "somebody else must review it" in browser.text()
    assert browser.js("document.querySelectorAll('button[value=approve]').length") == 0

    browser.call("Network.clearBrowserCookies")
    log_in(browser, site, "bob")
    press(browser, "nav a[href$='/reviews']")
    press(browser, "th a")
    text, before = browser.text(), spent(site, "bob")
    assert "token only" in text
    assert f"{PROMPTS}" in text
    assert "coordinates" not in text
    press(browser, "button[value=view]")
    assert f"{WIDTH} coordinates" in browser.text()
    assert spent(site, "bob") - before == cost(browser.text()) > 0
    press(browser, "button[value=approve]")
    assert "Approved" in browser.text()
    browser.go(f"{site.origin}/p/deception/reviews")
    assert "Nothing waits" in browser.text()

    browser.call("Network.clearBrowserCookies")
    log_in(browser, site, "ada")
    browser.go(f"{site.origin}/p/deception/jobs/{job_id}/answers/0")
    assert f"{WIDTH} coordinates" in browser.text()
    browser.go(f"{site.origin}/audit")
    assert "ReleasedResult" in browser.text()
    assert charged(site) > 0


@pytest.mark.slow
def test_without_scripts_the_main_path_works(browser, site):
    browser.scripts(False)
    log_in(browser, site, "ada")
    browser.go(f"{site.origin}/p/deception/submit")
    assert browser.js("document.getElementById('file').closest('p').hidden")
    fill(browser, "#job", json.dumps({"kind": "statistics", "rows": {"run": site.run}, "hook": HOOKS[1]}))
    press(browser, "form[aria-labelledby=declared] button[value=submit]")
    browser.wait_for("document.querySelector('[data-state]')?.textContent == 'done'")  # the page reloads itself
    press(browser, "ol a")
    assert "Summary" in browser.text()
    assert browser.js("document.querySelectorAll('script').length") == 1


class Person:
    """A browser without a screen: what it sends and gets."""

    def __init__(self, site, user):
        self.client = httpx.Client(base_url=site.origin, headers={"origin": site.origin}, follow_redirects=True)
        page = self.client.post("/login", data={"token": site.logins[user]})
        assert page.status_code == 200, page.text
        self.csrf = re.search(r'name="csrf_token" value="([^"]+)"', page.text)[1]

    def post(self, path, headers=None, **fields):
        return self.client.post(path, data={"csrf_token": self.csrf} | fields, headers=headers or {})


@pytest.fixture
def people(site):
    people = {user: Person(site, user) for user in site.logins}
    yield SimpleNamespace(**people)
    for one in people.values():
        one.client.close()


@pytest.mark.slow
def test_pages_are_charged_to_the_byte_and_say_nothing_to_strangers(site, people):
    ada, bob, eve = people.ada, people.bob, people.eve
    for path in ("", "/jobs", "/budget", "/reviews"):
        before = charged(site)
        page = ada.client.get(f"/p/deception{path}")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert cost(page.text) == charged(site) - before > 0
    theirs, nowhere = eve.client.get("/p/deception"), eve.client.get("/p/nowhere")
    assert (theirs.status_code, theirs.text.replace("deception", "nowhere")) == (404, nowhere.text)
    assert "ten-k" not in theirs.text
    assert "deception" not in eve.client.get("/").text
    assert bob.client.get("/p/deception/submit").status_code == 403
    assert bob.client.get("/audit").status_code == 403
    assert ada.client.get("/p/deception?page=2").status_code == 404
    assert httpx.get(f"{site.origin}/p/deception").headers["location"] == "/login?next=/p/deception"
    again = httpx.post(f"{site.origin}/login", data={"token": "no"}, headers={"origin": site.origin})
    assert (again.status_code, "logs nobody in" in again.text) == (403, True)


@pytest.mark.slow
def test_nothing_is_submitted_or_approved_from_elsewhere(site, people):
    ada, bob = people.ada, people.bob
    job = json.dumps(reduced(site, "variance"))
    assert ada.client.post("/p/deception/submit", data={"do": "submit", "job": job}).status_code == 403
    assert ada.post("/p/deception/submit", {"origin": "http://evil.example"}, do="submit", job=job).status_code == 403
    page = ada.post("/p/deception/submit", do="submit", job=job)
    job_id = page.url.path.rpartition("/")[2]
    end = time.monotonic() + 10
    while "in review" not in ada.client.get(f"/p/deception/jobs/{job_id}").text:
        assert time.monotonic() < end, ada.client.get(f"/p/deception/jobs/{job_id}").text + site.vault.log("executor")
        time.sleep(0.2)
    path = f"/p/deception/reviews/{job_id}/0"
    assert ada.post(path, do="approve").status_code == 403  # her own
    token = new_token(site.vault.folder / "tokens.toml", "bob", ("read", "review"))
    for act in ("approve", "view"):
        program = httpx.post(site.origin + path, data={"do": act}, headers={"authorization": f"Bearer {token}"})
        assert program.status_code == 403  # a token is no session
        assert bob.client.post(path, data={"do": act}).status_code == 403  # no CSRF token
    assert bob.post(path, do="refuse").status_code == 200
    assert "holds it back" in ada.client.get(f"/p/deception/jobs/{job_id}/answers/0").text
    bad = ada.post("/p/deception/submit", do="quote", job='{"kind": "<b>"}')
    assert bad.status_code == 400
    assert "<b>" not in bad.text


def test_the_script_reads_statuses_as_the_gateway_writes_them():
    context = Context(Disclosure(), restricted=True)
    script = (FOLDER / "static" / "live.js").read_text()
    tag = int(re.search(r"const JOB_STATUS = (\d+)", script)[1])
    for code, name in enumerate(STATES.split()):
        state, _, step = name.partition(":")
        data = bytes([tag, code])
        assert decode(data) == JobStatus(state, int(step or 0))
        assert encode(decode(data), context) == data


def test_each_kind_of_result_is_laid_out_once():
    x, y = np.array([1.0, 2, 3]), np.array([3.0, 2, 1])
    shown = {
        result.kind: lay_out(result)
        for result in (
            Result("curve", {"x": x, "y": y, "rows": 7}),
            Result("histogram", {"counts": np.array([5, 0, 10]), "low": -1.0, "high": 2.0}),
            Result("confusion", {"table": np.array([[5, 1], [2, 6]]), "accuracy": 0.8}, {"accuracy": (0.7, 0.9)}),
            Result(
                "latent", {"histogram": y, "contexts": np.array([[3, 4], [1, 0]]), "activations": np.array([2.0, 1])}
            ),
            Result("direction", {"direction": np.ones((2, 5)), "bias": 0.5}),
        )
    }
    assert [figure.rows for figure in shown["curve"].figures] == [[[1, 3], [2, 2], [3, 1]]]
    assert shown["curve"].counts == [("rows", 7)]
    assert shown["histogram"].figures[0].rows == [[-1, 0, 5], [0, 1, 0], [1, 2, 10]]
    assert shown["confusion"].tables[0].rows == [[0, 5, 1], [1, 2, 6]]
    assert [(one.name, one.low, one.high) for one in shown["confusion"].numbers] == [("accuracy", 0.7, 0.9)]
    assert shown["latent"].tables[0].rows == [[3, 4, 2], [1, 0, 1]]
    assert len(shown["latent"].figures) == 1
    assert "2 × 5 coordinates" in shown["direction"].notes[0]
    for page in shown.values():
        text = render("answer.html", project="p", job=SimpleNamespace(id="0", spec={}), number="0", result=page)
        assert page.title.encode() in text.content


def test_links_follow_the_prefix_that_a_hub_gives():
    for path in (FOLDER / "templates").iterdir():
        assert re.findall(r'(?:href|src|action|data-follow)="/[^"]*', path.read_text()) == []


def test_charts_place_points_where_the_numbers_say():
    svg = line_chart([0, 1, np.nan, 1], low=[0, 0.5, 0, 1], high=[0, 1, 1, 1], title="<T>", x_label="x", y_label="y")
    lines = [re.findall(r"[\d.]+", points) for points in re.findall(r'polyline class="curve" points="([^"]*)"', svg)]
    # 640 by 260: x from 64 to 628 over 0..3; y from 220 to 12 over -0.05..1.05
    assert [list(map(float, line)) for line in lines] == [[64, 210.5, 252, 21.5], [628, 21.5]]
    assert svg.count("<polygon") == 1
    assert "&lt;T&gt;" in svg
    bars = bar_chart([1, 2], names=["<a>", "b"], cap=4, title="t", x_label="x", y_label="y")
    heights = [float(height) for height in re.findall(r'rect class="bar"[^>]* height="([\d.]+)"', bars)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.11)
    assert "<a>" not in bars
    assert "style=" not in svg + bars
    assert line_chart([np.nan], title="t", x_label="x", y_label="y") == ""
