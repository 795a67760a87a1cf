"""Take the handbook's pictures anew: the pages' tests' gateway and browser, and the demo's report. Light scheme.

    make screenshots          # after make demo; or: python tools/screenshots.py --demo demo

Needs Chromium and what the tests need. Pictures are reduced to 128 colours; the script refuses to write a large one.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Browser  # noqa: E402
from tests.hub.test_pages import fill, log_in, press, probe_job, reduced, serve_site, submit  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH = 1000
MOST_BYTES = 150_000


class Camera:
    """Pictures of a browser's tab."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self.browser, self.folder = browser, folder
        browser.dark(False)

    def take(self, name: str, height: int = 700, top: int = 0) -> None:
        """The page from `top` to `height` below it, or to its end."""
        bottoms = "[...document.body.children].map(part => part.getBoundingClientRect().bottom)"
        end = int(self.browser.js(f"Math.max(...{bottoms}) + scrollY")) + 20
        clip = {"x": 0, "y": top, "width": WIDTH, "height": min(height, end - top), "scale": 1}
        found = self.browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        reduced_ = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(reduced_, "PNG", optimize=True)
        if reduced_.tell() > MOST_BYTES:
            raise SystemExit(
                f"screenshots: {name}.png has {reduced_.tell():,} bytes; at most {MOST_BYTES:,}: take less of it"
            )
        (self.folder / f"{name}.png").write_bytes(reduced_.getvalue())
        print(f"{name}.png {reduced_.tell():,} bytes", flush=True)


def take_pages(camera: Camera) -> None:
    """The gateway's pages, as a researcher, a reviewer and an administrator meet them."""
    browser = camera.browser
    with serve_site() as site:
        browser.go(f"{site.origin}/login")
        camera.take("page-login", 420)
        log_in(browser, site, "ada")
        camera.take("page-runs")
        sweep = _sweep(site)
        browser.go(f"{site.origin}/p/deception/submit")
        fill(browser, "#job", json.dumps(sweep, indent=1))
        press(browser, "button[value=quote]")
        camera.take("page-submit", 720)
        site.vault.kill("executor")
        press(browser, "button[value=submit]")
        state = "document.querySelector('[data-state]')?.textContent"
        browser.wait_for(f"{state} == 'queued'")
        camera.take("page-job")
        site.vault.start()
        browser.go(browser.js("location.href"))
        browser.wait_for(f"{state} == 'done'")
        press(browser, "ol a")
        camera.take("page-answer", 900)
        waits = submit(browser, site, reduced(site, "mean"))
        browser.call("Network.clearBrowserCookies")
        log_in(browser, site, "bob")
        browser.go(f"{site.origin}/p/deception/reviews/{waits}/0")
        camera.take("page-review", 900)
        browser.call("Network.clearBrowserCookies")
        log_in(browser, site, "ada")
        browser.go(f"{site.origin}/p/deception/budget")
        camera.take("page-budget")
        browser.go(f"{site.origin}/audit")
        camera.take("page-audit")


def _sweep(site: Any) -> dict[str, Any]:
    job = probe_job(site, kind="sweep", hooks=["blocks.*.hook_resid_post"], labels=["deceptive"], control=False)
    return {name: value for name, value in job.items() if name != "label"}


def take_demo(camera: Camera, demo: Path) -> None:
    """The demo's report, and a page of the latents of its autoencoder."""
    camera.browser.go((demo / "report.html").resolve().as_uri())
    camera.take("report", 900)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "latents.html"
        _write_latents(demo, page)
        camera.browser.go(page.as_uri())
        camera.take("latents", 900)


def _write_latents(demo: Path, page: Path) -> None:
    from tokenizers import Tokenizer

    import millpond as mp
    from millpond.analysis.sae.page import PageOptions, write_page

    model = ROOT / "examples" / "stdlib_llama" / "model"
    sae = mp.Sae.load(demo / "sae")
    run = mp.open(demo / "lake")["stdlib-heldout"]
    _, test = run.split(test=0.1, by="path")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    hook = "blocks.3.hook_resid_post"
    decode = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
    labels = {name: test.labels[name] for name in ("in_string", "in_comment")}
    write_page(sae, test, page, decode, hook=hook, labels=labels, model=model, options=PageOptions(latents=8))


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of make demo")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    browser = Browser()
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=700, deviceScaleFactor=1, mobile=False)
        camera = Camera(browser, arguments.out)
        take_pages(camera)
        take_demo(camera, arguments.demo)
    finally:
        browser.close()


if __name__ == "__main__":
    main()
