"""The demo as a newcomer meets it: `millpond up --demo`, a real browser, the first notebook to its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from millpond.hub.demo import find_example
from millpond.hub.workspace.config import gateway_origin
from millpond.hub.workspace.notebooks import sources
from millpond.hub.workspace.up import Up, demo_config
from millpond.store.generation import read_completions
from millpond.store.lake import open_lake

from .browser import Browser
from .conftest import free_port

pytestmark = pytest.mark.slow


class Demo:
    """`millpond up --demo`, in this process."""

    def __init__(self, folder: Path) -> None:
        config = demo_config(folder, find_example(None), f"127.0.0.1:{free_port()}", worker=True)
        changed = {"run": Path(f"/run/mpd{os.getpid()}"), "first_uid": 56_000, "gateway": f"127.0.0.1:{free_port()}"}
        self.config = config.model_copy(update={"workspace": config.workspace.model_copy(update=changed)})
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.up = Up(self.config, demo_tokens=12_000)
        self.do(self.up.start())
        self.do(self.up.seed(), 300)

    def do(self, work, seconds=120):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self):
        self.do(self.up.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
        shutil.rmtree(self.config.workspace.run, ignore_errors=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    if os.geteuid() != 0 or shutil.which("bwrap") is None:
        pytest.skip("namespaces, users and quotas need root and bubblewrap (make test installs it)")
    demo = Demo(tmp_path_factory.mktemp("demo"))
    try:
        assert (demo.up.settings.state / "vault" / "seeded").exists(), (
            demo.up.settings.state / "logs/seed.log"
        ).read_text()[-2000:]
        yield demo
    finally:
        demo.close()


def log_in(page, demo, user):
    page.goto(demo.up.settings.origin)
    page.fill("input[name=username]", user)
    page.fill("input[name=password]", demo.up.passwords[user])
    page.click("input[type=submit], button[type=submit]")
    page.wait_for_url(f"**/user/{user}/lab**", timeout=90_000)
    page.wait_for_selector(".jp-Launcher, .jp-NotebookPanel", timeout=90_000)


def test_two_people_log_in_and_one_runs_the_first_notebook_to_a_plot(demo):
    from playwright.sync_api import sync_playwright

    shots = Path(os.environ["MILLPOND_SCREENSHOTS"]) if "MILLPOND_SCREENSHOTS" in os.environ else None
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        ada, bob = (chromium.new_context(viewport={"width": 1300, "height": 900}).new_page() for _ in range(2))
        log_in(ada, demo, "ada")
        log_in(bob, demo, "bob")
        assert "//bob.localhost" in bob.url
        assert "//ada.localhost" in ada.url
        ada.goto(f"{ada.url.partition('/lab')[0]}/lab/tree/1_first_look.ipynb")
        ada.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
        ada.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)
        ada.click(".lm-MenuBar-itemLabel:text('Run')")
        ada.click("text=Run All Cells")
        end = time.monotonic() + 180
        while time.monotonic() < end and ada.locator(".jp-OutputArea-output img").count() == 0:
            if ada.locator(
                ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']:has-text('Error')"
            ).count():
                break
            ada.wait_for_timeout(500)
        plots = ada.locator(".jp-OutputArea-output img")
        if plots.count() == 0:
            pytest.fail(ada.locator(".jp-Notebook").inner_text()[-3000:])
        plots.first.scroll_into_view_if_needed()
        width, height = plots.first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert width > 200
        assert height > 100
        if shots:
            ada.screenshot(path=shots / "workspace-notebook.png")
        ada.click(".lm-MenuBar-itemLabel:text('File')")
        menu = ada.locator(".lm-Menu").inner_text()
        assert "Save Notebook" in menu
        for word in ("Download", "Export", "Print", "Terminal"):
            assert word not in menu
        chromium.close()


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_example_notebooks_run_to_their_end(demo, source):
    """Every cell, in a kernel of a spawned server, as nbclient would: the first error fails."""
    cells = [cell for cell in source.read_text().split("# %%")[1:] if not cell.startswith(" [markdown]")]

    async def run():
        browser = Browser(demo.up.settings.origin, "ada", demo.up.passwords["ada"])
        try:
            await browser.login()
            running, message = await browser.spawn()
            assert running, message
            await browser.open()
            kernel = await browser.kernel()
            for cell in cells:
                said = await browser.run(kernel, cell, 180)
                assert "Traceback" not in said, f"{cell}\n{said}"
            await browser.ask("DELETE", f"api/kernels/{kernel}")
        finally:
            await browser.close()

    demo.do(run(), 400)


def test_nothing_of_the_vault_reaches_further_than_the_meter(demo):
    """The gateway, the executor and whatever they start have a loopback interface and no other."""
    for part in ("gateway", "executor"):
        process = demo.up.supervisor.process(part)
        devices = Path(f"/proc/{process.pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        assert "NSpid" in Path(f"/proc/{process.pid}/status").read_text()
    lines = (demo.up.settings.state / "meter" / "ledger").read_text().split()
    assert int(lines[-1]) > 0


def test_secrets_are_in_no_command_line(demo):
    token = (demo.up.settings.state / "secrets" / "gateway").read_text()
    done = subprocess.run(["ps", "-eo", "args", "ww"], capture_output=True, text=True, check=True)
    assert "bwrap" in done.stdout
    assert token not in done.stdout
    for password in json.loads((demo.up.settings.state / "secrets" / "demo.json").read_text()).values():
        assert password not in done.stdout


def test_a_part_that_is_killed_comes_back(demo):
    """The gateway and the proxy; notebooks that run do not notice."""
    for part in ("gateway", "proxy"):
        process = demo.up.supervisor.process(part)
        demo.loop.call_soon_threadsafe(process.kill)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            again = demo.up.supervisor.process(part)
            if again is not process and demo.do(_answers(demo)):
                break
            time.sleep(0.2)
        assert demo.up.supervisor.process(part) is not process


async def _answers(demo):
    from millpond.hub.workspace.parts import answers, listens

    settings = demo.up.settings
    return (
        await listens(settings.listen)()
        and await answers(settings.gateway_socket, "/services/gateway/api/v1/version")()
    )


CAPTURE = """
import millpond as mp

lake = mp.connect()
prompts = [{"id": str(i), "text": f"def f(x):\\n    return x + {i}\\n"} for i in range(40)]
run = lake.capture(prompts, model="stdlib-llama", name="mine", hooks=["blocks.3.hook_resid_post"])
print(run)
"""


def test_a_notebook_captures_a_run_of_its_own(demo):
    """By the capture worker, in the vault; the notebook gets a description."""
    ada = demo.do(_browser(demo))
    try:
        said = demo.do(ada.run(demo.do(ada.kernel()), CAPTURE, 250), 280)
        assert "prompts: 40" in said, said
        assert "in the vault" in said
    finally:
        demo.do(ada.close())


SUBMIT = """
import millpond as mp

run = mp.connect()["stdlib-heldout"]
probe = mp.LogisticProbe()
print(probe.submit_fit(run["blocks.3.hook_resid_post"], run.labels["is_keyword"]).handle)
"""


def test_a_server_that_is_started_anew_finds_the_job_that_ran_meanwhile(demo):
    ada = demo.do(_browser(demo))
    try:
        handle = demo.do(ada.run(demo.do(ada.kernel()), SUBMIT, 120), 130).split()[-1]
        demo.do(ada.stop())
        running, message = demo.do(ada.spawn())
        assert running, message
        demo.do(ada.open())
        again = f"import millpond as mp; print(mp.connect().job({handle!r}, answers=0).result(timeout=120))"
        said = demo.do(ada.run(demo.do(ada.kernel()), again, 150), 160)
        assert "<Artifact" in said, said
    finally:
        demo.do(ada.close())


ASK = """
import torch
import millpond as mp

class Spread(torch.nn.Module):
    def forward(self, x):
        return {"statistic": x.mean(dim=0)}

lake = mp.connect()
future = lake.submit_graph(Spread(), lake["stdlib-heldout"]["blocks.3.hook_resid_post"])
beginnings = ["def read(path):", "class Stack:"]
texts = lake.submit_generate(beginnings, model="stdlib-llama", max_tokens=24, texts=True)
for one in (future, texts):
    try:
        print(one.result(timeout=150))
    except mp.MillpondError as error:
        print(f"{type(error).__name__}={one.handle}=")
"""
READ = """
import json
print(future.result(timeout=60))
print(json.dumps(texts.result(timeout=60).texts))
"""


def test_a_reviewer_approves_in_a_browser_and_the_notebook_has_it(demo):
    """ada's own statistic and texts wait; bob, who opened no notebook of hers, releases them on the gateway's origin.

    The texts come coded with the dictionary that `up` made and both sides hold.
    """
    from playwright.sync_api import sync_playwright

    ada = demo.do(_browser(demo))
    try:
        kernel = demo.do(ada.kernel())
        said = demo.do(ada.run(kernel, ASK, 320), 330)
        waiting = re.findall(r"InReview=([0-9a-f]{16})=", said)
        assert len(waiting) == 2, said
        shots = Path(os.environ["MILLPOND_SCREENSHOTS"]) if "MILLPOND_SCREENSHOTS" in os.environ else None
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = chromium.new_context(viewport={"width": 1100, "height": 800}).new_page()
            log_in(page, demo, "bob")
            reviews = f"{gateway_origin(demo.up.settings)}/services/gateway/p/demo/reviews"
            page.goto(reviews)
            assert page.locator("a:has-text('Answer 0 of')").count() >= 2
            for job in waiting:
                page.goto(f"{reviews}/{job}/0")
                assert "gateway--service.localhost" in page.url
                if shots:
                    page.screenshot(path=shots / "workspace-review.png")
                page.click("button[value=approve]")
                page.wait_for_selector("p.notice.good")
            chromium.close()
        said = demo.do(ada.run(kernel, READ, 150), 160)
        assert "<Result" in said, said
        texts = json.loads(said[said.index("[[") : said.rindex("]]") + 2])
        table = read_completions(open_lake(demo.config.lake).storage, waiting[1])
        assert [text for one in texts for text in one] == table["text"].tolist()
    finally:
        demo.do(ada.close())


async def _browser(demo):
    browser = Browser(demo.up.settings.origin, "ada", demo.up.passwords["ada"])
    await browser.login()
    running, message = await browser.spawn()
    assert running, message
    await browser.open()
    return browser
