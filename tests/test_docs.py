"""The handbook builds without a warning, loads nothing from elsewhere, and its Python runs."""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import millpond
from millpond import cli
from millpond.capture import metrics as capture_metrics
from millpond.hub import metrics as hub_metrics
from millpond.hub.api import ENDPOINTS
from millpond.hub.kinds import KINDS
from millpond.store import errors
from millpond.store import metrics as store_metrics
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
D = 16


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|icon|preload|preconnect)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
        assert 'class="mermaid"' not in text  # whose script the theme would fetch


def test_every_error_has_an_entry(site):
    text = (site / "errors.html").read_text()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MillpondError)
    ]
    assert len(kinds) > 20
    for kind in kinds:
        assert f'id="{kind.__name__.lower()}"' in text, kind


def test_the_command_line_page_has_every_command(site):
    text = (site / "cli.html").read_text()
    for heading in ("millpond-capture", "millpond-verify", "millpond-budget-plan", "millpond-sae"):
        assert f'id="{heading}"' in text


@pytest.fixture(scope="module")
def handbook():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("handbook.settings"), importlib.import_module("handbook.api")


def test_the_command_line_page_has_every_flag_of_a_command(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "cli.html").read_text()))
    for field in dataclasses.fields(cli._COMMANDS["worker"]):
        assert f"--{field.name.replace('_', '-')}" in text


def test_every_public_name_has_an_entry(site, handbook):
    """Names are taken from the packages; the pages that mkdocstrings makes must hold each, with its signature."""
    _, api = handbook
    names = dict(api.public_names())
    assert {f"millpond.{name}" for name in millpond.__all__} <= set(names)
    pages = {room: (site / "api" / f"{room}.html").read_text() for room in api.ROOMS}
    index = (site / "api" / "index.html").read_text()
    for name, home in names.items():
        room = home.split(".")[1]
        assert f'id="{home}"' in pages[room], name
        assert f'href="{room}.html#{home}"' in index, name
    assert "evaluate" in pages["analysis"]


def test_every_setting_has_an_entry_and_a_meaning(site, handbook):
    settings, _ = handbook
    text = (site / "configuration.html").read_text()
    seen = set()
    for root, _ in settings.FILES.values():
        for kind in settings.sections(root):
            for name, what, _, meaning in settings.fields(kind):
                seen.add((kind.__name__, name))
                assert f"<code>{name}</code>" in text, (kind, name)
                assert meaning or re.fullmatch(r"`'\w+'`", what), (kind, name)  # what tells kinds apart needs none
    assert {("Settings", "lease_seconds"), ("Slurm", "walltime"), ("UpMeter", "cap"), ("SaeConfig", "d_sae")} <= seen


def test_the_http_pages_and_metrics_are_those_of_the_code(site):
    text = html.unescape((site / "http.html").read_text())
    for one in ENDPOINTS:
        if one.path.startswith("/api/"):
            assert f"{one.method} {one.path}" in text, one
    for kind in KINDS:
        assert f"Job: {kind}" in text
    text = (site / "metrics.html").read_text()
    for table in (capture_metrics.HELP, store_metrics.HELP, hub_metrics.HELP):
        for name in table:
            assert f"<code>{name}</code>" in text
    with pytest.raises(KeyError, match="millpond_new"):  # a metric without a text is not written either
        store_metrics.exposition({}, [("millpond_new", "", 1.0)])


def make_run(lake, name, *, layers, prompts, tokens, labels):
    """A sealed run whose token labels are linear in every layer but the first."""
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(layers))
    spec = lake.create_run(name, hooks=hooks, d_model=D, dtype="float32", provenance={"model": "toy"})
    writer = RunWriter(lake.run_folder(name), spec)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((len(labels), D))
    values = {label: {} for label in labels}
    for number in range(prompts):
        marks = rng.integers(0, 2, (len(labels), tokens))
        rows = {hook: rng.standard_normal((tokens, D)).astype(np.float32) for hook in hooks}
        for hook in hooks[1:]:
            rows[hook] += (marks.T @ directions).astype(np.float32)
        for label, mark in zip(labels, marks, strict=True):
            values[label][f"p{number}"] = mark if label == "depth" else mark > 0
        ids = rng.integers(0, 100, tokens).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", ids, tokens, np.arange(tokens, dtype=np.int32), rows))
    writer.commit()
    table = pd.DataFrame({"id": [f"p{n}" for n in range(prompts)], "path": [f"file {n // 2}" for n in range(prompts)]})
    dtypes = {label: "int64" if label == "depth" else "bool" for label in labels}
    seal_run(lake.run_folder(name), prompts=table, token_labels=values, token_label_dtypes=dtypes)


def snippets(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [block for block in blocks if not block.startswith("# needs")]


PAGES = [page for page in (DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))) if snippets(page)]


def test_the_pages_with_python_are_found():
    assert len(PAGES) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mpl.rcParams, "backend", "Agg")
    if page.stem == "tutorial":
        lake = open_lake("demo/lake", create=True)
        make_run(lake, "stdlib-heldout", layers=6, prompts=80, tokens=100, labels=("in_string", "in_comment"))
    else:
        make_run(
            open_lake("lake", create=True), "my-run", layers=3, prompts=40, tokens=20, labels=("in_comment", "depth")
        )
    names: dict[str, object] = {}
    for block in snippets(page):
        exec(compile(block, page.name, "exec"), names)
