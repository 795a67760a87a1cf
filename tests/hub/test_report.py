import json
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from millpond.analysis import BatchTopKSae, LogisticProbe, PcaReducer
from millpond.analysis.sae.latents import strongest_latents
from millpond.hub.report import CaptureFacts, ReportInputs, SaeFacts, render, write_report
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

D = 16
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
HOOK = HOOKS[1]
EVIL = "<script>alert(1)</script>"
WORDS = [EVIL, "\n    if", *(f" word{number}" for number in range(2, 40))]
RARE_TOKEN = 0


def text(ids):
    return "".join(WORDS[number] for number in ids)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """60 prompts; the label `even` is in layers 1 and 2, and token 0 has a direction of its own, ten times as long."""
    lake = open_lake(tmp_path_factory.mktemp("lake"), create=True)
    folder = lake.run_folder("made-up")
    spec = lake.create_run(
        "made-up",
        hooks=HOOKS,
        d_model=D,
        dtype="float32",
        provenance={"model": "/secret/place/models/toy"},
        chunk_rows=64,
        shard_rows=256,
    )
    rng = np.random.default_rng(0)
    of_label, of_token = np.linalg.qr(rng.standard_normal((D, 2)))[0].T
    writer = RunWriter(folder, spec)
    labels, ids = {}, []
    for number in range(60):
        n = int(rng.integers(60, 90))
        tokens = rng.integers(1, len(WORDS), n).astype(np.int32)
        tokens[rng.integers(20, 50)] = RARE_TOKEN
        even = tokens % 2 == 0
        acts = {}
        for hook in HOOKS:
            acts[hook] = rng.standard_normal((n, D)).astype(np.float32)
            acts[hook] += np.outer(tokens == RARE_TOKEN, 10 * of_token).astype(np.float32)
            if hook != HOOKS[0]:
                acts[hook] += np.outer(even, 2 * of_label).astype(np.float32)
        name = f"p{number}"
        labels[name] = even
        ids.append(name)
        writer.append(CapturedRequest(name, tokens, n, np.arange(n, dtype=np.int32), acts))
    writer.commit()
    prompts = pd.DataFrame({"id": ids, "path": [f"file{number // 2}" for number in range(60)]})
    return seal_run(folder, prompts=prompts, token_labels={"even": labels}, token_label_dtypes={"even": "bool"})


@pytest.fixture(scope="module")
def inputs(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae")
    train, test = run.split(0.4, seed=0, by="path")
    sweep = LogisticProbe(progress=False).sweep(train, test, HOOKS, {"even <tokens>": "even"})
    sae = BatchTopKSae(128, 2, batch_size=256, n_threads=1, progress=False).fit(
        train[HOOK], tokens=60_000, out=out, epochs=50
    )
    frequency = sae.firing_frequency(test[HOOK])
    facts = SaeFacts(
        hook=HOOK,
        evaluation=sae.evaluate(test[HOOK]),
        at_k=sae.calibrate(test[HOOK]).evaluate(test[HOOK]),
        metrics=tuple(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()),
        frequency=frequency,
        latents=strongest_latents(sae, test, HOOK, frequency, text),
        pca_rank=4,
        pca_explained_variance=1 - PcaReducer(4, progress=False).fit(train[HOOK]).fvu(test[HOOK]),
    )
    capture = CaptureFacts(tokens=4321, seconds=2.5, tokens_per_second=1728.4)
    stages = {"capture": 2.5, "probe sweep": 61.25}
    return ReportInputs(run, train, test, capture, sweep, facts, stages, 2, {"numpy": "9.8.7"}, 13)


@pytest.fixture(scope="module")
def page(inputs):
    return render(inputs)


class Page(HTMLParser):
    """Tags, attributes, marked tokens and table rows of a page; complains about tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.stack, self.cells = [], [], [], []
        self.feed(text)
        assert not self.stack

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.stack.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th", "mark"):
            self.cells.append([""]) if tag == "mark" else self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th", "mark"):
            self.cells[-1][-1] += data


def test_the_page_is_well_formed_and_fetches_nothing(page):
    found = Page(page)
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert found.tags.count("svg") == 3
    assert found.links, "figures reuse their glyphs by reference"
    assert all(link.startswith("#") for link in found.links)
    assert not re.search(r"@import|url\((?!#)", page)


def test_what_a_prompt_says_is_escaped(page):
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "even &lt;tokens&gt;" in page


def test_absolute_paths_are_left_out(page):
    assert "/secret" not in page
    assert "models/toy" in page


def test_the_probe_table_says_what_the_sweep_measured(inputs, page):
    table = inputs.sweep.table()
    real = table[~table["control"]].sort_values("auroc").iloc[-1]
    control = table[table["control"]]["auroc"]
    row = next(row for row in Page(page).cells if row[0] == "even <tokens>")
    assert row[1:4] == [
        str(real["layer"]),
        f"{real['auroc']:.4f}",
        f"{real['auroc_low']:.4f} to {real['auroc_high']:.4f}",
    ]
    assert row[4] == f"{control.min():.3f} to {control.max():.3f}"
    assert real["layer"] in (1, 2)
    assert real["auroc"] > 0.85
    assert (table[table["layer"] == 0]["auroc"] < 0.6).all()


def test_the_autoencoder_table_says_what_was_measured(inputs, page):
    rows = {row[0]: row[1:] for row in Page(page).cells}
    for name, result in (("SAE", inputs.sae.evaluation), ("SAE, threshold moved to L0 = k", inputs.sae.at_k)):
        values = result.values
        assert rows[name] == [
            f"{values['l0']:.2f}",
            f"{values['fvu']:.4f}",
            f"{values['explained_variance']:.4f}",
            f"{values['dead_latents']:.2%}",
        ]
    assert float(rows["SAE, threshold moved to L0 = k"][0]) == pytest.approx(2, rel=0.01)
    assert rows["PCA, rank 4"][2] == f"{inputs.sae.pca_explained_variance:.4f}"
    assert rows["tokens computed"] == ["4,321"]
    assert rows["probe sweep"] == ["61.2 s"]
    assert "on 2 CPU cores" in page
    assert "numpy 9.8.7" in page


def test_the_strongest_latent_is_the_planted_one_with_its_own_text(inputs):
    card = inputs.sae.latents[0]
    assert {context.token for context in card.contexts} == {EVIL}
    assert len({context.prompt_id for context in card.contexts}) == 6
    values = [context.value for context in card.contexts]
    assert values == sorted(values, reverse=True)
    prompts, ids = inputs.test.tokens["prompt"].values, inputs.test.tokens["token_id"].values
    for context in card.contexts:
        number = inputs.test.prompts.index[inputs.test.prompts["id"] == context.prompt_id][0]
        whole = text(ids[prompts == number])
        assert context.before + context.token + context.after in whole
        assert len(re.findall(r"\S+", context.after)) == 6


def test_contexts_stay_in_their_prompt(inputs, run):
    for card in inputs.sae.latents:
        for context in card.contexts:
            number = run.prompts.index[run.prompts["id"] == context.prompt_id][0]
            ids = run.tokens["token_id"].values[run.tokens["prompt"].values == number]
            assert context.before + context.token + context.after in text(ids)


@pytest.mark.slow
def test_a_browser_renders_it_without_overflow(inputs, tmp_path):
    path = write_report(inputs, tmp_path / "report.html")
    narrow = path.read_text().replace(
        "</body>", "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    )
    path.with_name("narrow.html").write_text(narrow)
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=500,2000"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    picture = tmp_path / "report.png"
    subprocess.run([*command, f"--screenshot={picture}", path.as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "a blank page has one colour"
    dump = [*command, "--dump-dom", path.with_name("narrow.html").as_uri()]
    dom = subprocess.run(dump, check=True, capture_output=True, timeout=120, text=True).stdout
    assert len(re.findall(r"<figure><svg ", dom)) == 3
    width, window = re.search(r"<title>(\d+)/(\d+)</title>", dom).groups()
    assert int(width) <= int(window)
