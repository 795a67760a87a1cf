"""What is found about latents, beside brute force over all activations; pages; jobs; cross-entropy with the example model."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.metrics import f1_score

from millpond.analysis import BatchTopKSae, Sae
from millpond.analysis.sae.autolabel import auto_labels
from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.job import new_sae, read_job
from millpond.analysis.sae.latents import survey
from millpond.analysis.sae.logits import logit_effects, unembedding
from millpond.analysis.sae.page import PageOptions, write_page
from millpond.analysis.sae.recovered import HuggingFaceModel, Splice, cross_entropy_recovered
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake
from millpond.store.prompt_tokens import prompts_of
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"
D, HOOK = 16, "blocks.0.hook_resid_post"


def made_of(weights):
    """An autoencoder with these weights."""
    sae = Sae.__new__(Sae)
    sae.config, sae.d_sae, sae.progress = None, weights.d_sae, False
    sae.weights_, sae.frequency_, sae.trained_on_ = weights, None, {"hook": HOOK}
    return sae


@pytest.fixture(scope="module")
def sae():
    """16 latents, of which the last never fires and the first reads the first dimension."""
    rng = np.random.default_rng(1)
    w_enc = rng.standard_normal((D, 16)).astype(np.float32) * 0.3
    w_enc[:, 0] = np.eye(D)[0]
    b_enc = np.full(16, -0.3, np.float32)
    b_enc[-1] = -1e3
    w_dec = rng.standard_normal((16, D)).astype(np.float32)
    return made_of(SaeWeights("relu", w_enc, b_enc, w_dec, np.zeros(D, np.float32)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """40 prompts of 30 tokens; `first` is whether dimension 0 is large, `depth` a number."""
    lake = open_lake(tmp_path_factory.mktemp("lake"), create=True)
    spec = lake.create_run(
        "r", hooks=(HOOK,), d_model=D, dtype="float32", provenance={"model": "m"}, chunk_rows=64, shard_rows=128
    )
    writer = RunWriter(lake.run_folder("r"), spec)
    rng = np.random.default_rng(0)
    first, depth, ids = {}, {}, []
    for number in range(40):
        x = rng.standard_normal((30, D)).astype(np.float32)
        on = rng.random(30) < 0.2
        x[:, 0] = np.where(on, 3, 0) + 0.1 * rng.standard_normal(30)
        name = f"<p{number}>"
        first[name], depth[name] = on, rng.integers(0, 5, 30)
        ids.append(name)
        tokens = np.arange(30, dtype=np.int32) + 100 * number
        writer.append(CapturedRequest(name, tokens, 30, np.arange(30, dtype=np.int32), {HOOK: x}))
    writer.commit()
    return seal_run(
        lake.run_folder("r"),
        prompts=pd.DataFrame({"id": ids}),
        token_labels={"first": first, "depth": depth},
        token_label_dtypes={"first": "bool", "depth": "int64"},
    )


def brute(sae, run):
    x = run[HOOK].values
    return sae.encode(x), run.labels["first"].values, run.labels["depth"].values


def test_a_survey_is_what_all_activations_say(sae, run):
    acts, first, depth = brute(sae, run)
    labels = {"first": run.labels["first"], "depth": run.labels["depth"]}
    found = survey(sae, run[HOOK], labels, n=5, progress=False)
    np.testing.assert_allclose(found.frequency, (acts > 0).mean(0))
    np.testing.assert_allclose(found.mean, acts.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found.histogram.sum(1), (acts > 0).sum(0))
    for latent in (0, 3):
        inner = np.histogram(acts[:, latent][acts[:, latent] > 0], found.edges)[0]
        np.testing.assert_array_equal(found.histogram[latent][1:-1], inner[1:-1])
        for number, column in enumerate((first, depth)):
            expected = np.corrcoef(acts[:, latent], column)[0, 1]
            assert found.correlation[latent, number] == pytest.approx(expected, abs=1e-5)
            on = column > 0
            difference = acts[on, latent].mean() - acts[~on, latent].mean()
            assert found.mean_difference[latent, number] == pytest.approx(difference, abs=1e-5)
            cuts = [0.0, *found.edges[1:-1]]
            scores = [f1_score(on, (acts[:, latent] > 0) & (acts[:, latent] >= cut)) for cut in cuts]
            assert found.f1[latent, number] == pytest.approx(max(scores))
    assert np.isnan(found.correlation[-1]).all()
    assert found.f1[0, 0] > 0.97
    table = found.table(sae.weights_)
    assert table.loc[0, "label"] == "first"
    rows = sae.W_dec_ / np.linalg.norm(sae.W_dec_, axis=1, keepdims=True)
    similar = rows @ rows.T - 2 * np.eye(16)
    assert [each[0] for each in table["nearest"]] == similar.argmax(1).tolist()


def test_the_strongest_rows_are_one_a_prompt(sae, run):
    acts = brute(sae, run)[0]
    top = survey(sae, run[HOOK], n=5, progress=False).top
    for latent in range(15):
        part = top[top["latent"] == latent]
        best = acts[:, latent].reshape(40, 30)
        prompts = np.argsort(-best.max(1), kind="stable")[:5]
        assert part["prompt"].tolist() == prompts.tolist()
        assert part["row"].tolist() == (30 * prompts + best.argmax(1)[prompts]).tolist()
        np.testing.assert_allclose(part["value"], best.max(1)[prompts], rtol=1e-5)
        assert part["rank"].tolist() == [0, 1, 2, 3, 4]
    assert (top["latent"] != 15).all()


def test_few_latents_that_say_a_label_are_found(sae, run):
    train, test = run.split(0.3, seed=0)
    labels = [{"first": part.labels["first"]} for part in (train, test)]
    found = auto_labels(sae, train[HOOK], labels[0], test[HOOK], labels[1], ks=(1, 3), progress=False)
    assert found["k"].tolist() == [1, 3]
    assert found["latents"][0] == [0]
    assert found["latents"][1][0] == 0
    assert (found["f1"] > 0.97).all()
    assert found["positive"][0] == pytest.approx(test.labels["first"].values.mean())
    none = {"first": np.zeros(len(train), bool)}
    with pytest.raises(InvalidInput, match="one class only"):
        auto_labels(sae, train[HOOK], none, test[HOOK], labels[1], progress=False)


def test_logit_effects_are_those_of_the_model():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((6, 256)).astype(np.float32)
    zeros = np.zeros((256, 6), np.float32)
    sae = made_of(SaeWeights("relu", zeros, np.zeros(6, np.float32), w_dec, np.zeros(256, np.float32)))
    tokens, more, low_tokens, less = logit_effects(sae, unembedding(MODEL), np.array([4, 1]), n=5)
    for at, latent in enumerate((4, 1)):
        direct = model.lm_head(torch.from_numpy(w_dec[latent]) * model.model.norm.weight).detach().numpy()
        direct -= direct.mean()
        assert tokens[at].tolist() == np.argsort(-direct)[:5].tolist()
        assert low_tokens[at].tolist() == np.argsort(direct)[:5].tolist()
        np.testing.assert_allclose(more[at], np.sort(direct)[::-1][:5], rtol=1e-4)
        np.testing.assert_allclose(less[at], np.sort(direct)[:5], rtol=1e-4)


class Nesting(HTMLParser):
    """Complains about tags that do not nest; collects ids, links and texts."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.links, self.marks, self.tags = [], [], [], [], set()
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "mark" in self.stack:
            self.marks.append(data)


def test_a_page_shows_contexts_safely_and_fetches_nothing(sae, run, tmp_path):
    labels = {"first": run.labels["first"]}
    write_page(
        sae, run, tmp_path / "page.html", lambda ids: "".join(f"<{number}>" for number in ids), hook=HOOK,
        labels=labels, options=PageOptions(latents=4, contexts=3, before=2, after=1),
    )  # fmt: skip
    text = (tmp_path / "page.html").read_text()
    page = Nesting(text)
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert page.ids[0] == "l0"
    assert len(page.ids) == 4
    acts = brute(sae, run)[0][:, 0].reshape(40, 30)
    prompt = int(acts.max(1).argmax())
    position = int(acts[prompt].argmax())
    token = 100 * prompt + position
    assert page.marks[0] == f"<{token}>"
    before = "".join(f"&lt;{token - back}&gt;" for back in (2, 1) if position >= back)
    assert f"{before}<mark>&lt;{token}&gt;</mark>" in text
    assert f"&lt;p{prompt}&gt;" in text


@pytest.fixture(scope="module")
def example_model():
    return HuggingFaceModel(MODEL)


PROMPTS = [[0, *range(10, 40)], [0, *range(500, 520)], [0, 7]]


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "blocks.2.hook_mlp_out"])
def test_a_perfect_reconstruction_recovers_all_and_none_nothing(example_model, hook):
    eye = np.eye(256, dtype=np.float32)
    zeros = np.zeros(512, np.float32)
    both = np.concatenate([eye, -eye], axis=1)
    whole = made_of(SaeWeights("relu", both, zeros, both.T.copy(), zeros[:256]))
    result = cross_entropy_recovered(whole, example_model, PROMPTS, hook)
    assert result["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert result["ce_zero"] > result["ce_clean"]
    assert result.evidence == {"tokens": 29 + 19, "prompts": 3}
    nothing = made_of(SaeWeights("relu", both, zeros, 0 * both.T, zeros[:256]))
    assert cross_entropy_recovered(nothing, example_model, PROMPTS, hook)["ce_recovered"] == pytest.approx(0, abs=1e-4)


def test_the_hook_and_the_loss_are_hugging_faces(example_model):
    import torch

    seen = []

    def keep(rows):
        seen.append(rows.copy())
        return rows

    hook = "blocks.2.hook_resid_post"
    _, count = example_model.cross_entropy(PROMPTS[:1], 1, Splice(hook, hook, keep))
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        out = example_model.model(ids, output_hidden_states=True, labels=ids)
    np.testing.assert_array_equal(seen[0], out.hidden_states[3][0, 1:].numpy())
    assert count == 29
    whole, _ = example_model.cross_entropy(PROMPTS[:1], 0, None)
    assert whole / 30 == pytest.approx(float(out.loss), rel=1e-5)
    with pytest.raises(InvalidInput, match="resid_mid cannot be replaced"):
        example_model.cross_entropy(PROMPTS, 1, Splice("blocks.0.hook_resid_mid", "blocks.0.hook_resid_mid", keep))


def test_prompts_come_back_from_a_run(run):
    assert prompts_of(run, limit=2) == [list(range(30)), list(range(100, 130))]


JOB = """
[data]
lake = {lake!r}
run = "r"
hook = "blocks.0.hook_resid_post"
test = 0.25

[sae]
d_sae = 32
k = 3
batch_size = 64
n_threads = 1

[train]
out = {out!r}
epochs = 5
"""


def millpond(*arguments):
    command = [sys.executable, "-m", "millpond.cli", "sae", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_jobs_from_the_command_line(run, tmp_path):
    lake = run.plan.folder.path.parent.parent
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(lake=str(lake), out=str(tmp_path / "out")))
    done = millpond("train", job)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {"cfg.json", "sae_weights.safetensors", "checkpoint.pt", "metrics.jsonl", "job.json"} <= {
        path.name for path in out.iterdir()
    }
    sae = Sae.load(out)
    assert isinstance(sae, BatchTopKSae)
    _, test = open_lake(lake)["r"].split(0.25, 0)
    expected = sae.evaluate(test[HOOK])["fvu"]
    assert json.loads((out / "evaluation.json").read_text())["values"]["fvu"] == pytest.approx(expected)
    assert f"{expected:.4f}" in done.stdout
    again = millpond("train", job)
    assert again.returncode == 2
    assert "holds a checkpoint; give resume=True" in again.stderr
    assert millpond("train", job, "--resume").returncode == 0
    assert f"{expected:.4f}" in millpond("eval", out).stdout
    exported = millpond("export", out, tmp_path / "moved", "--l0", "2")
    assert exported.returncode == 0, exported.stderr
    assert Sae.load(tmp_path / "moved").evaluate(test[HOOK])["l0"] == pytest.approx(2, rel=0.01)
    shown = millpond("show", out, "--tokenizer", MODEL, "--labels", "first", "--latents", "5")
    assert shown.returncode == 0, shown.stderr
    assert len(Nesting((out / "latents.html").read_text()).ids) == 5
    assert len(pd.read_csv(out / "latents.csv")) == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('hook = "blocks.0.hook_resid_post"', ""), "give hook, or hooks"),
        (("d_sae = 32", "d_sae = 2"), "k is 3, more than the 2 latents"),
        (("d_sae = 32", "d_sae = 32\nsize = 4"), "sae.size is no option"),
        (("k = 3", 'k = "3"'), "sae.k is '3': Input should be a valid integer"),
        (("epochs = 5", "epochs = 0"), "train.epochs"),
        (("test = 0.25", "test = 2"), "data.test"),
    ],
)
def test_a_job_that_cannot_be_used_is_refused(tmp_path, change, words):
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(lake="lake", out="out").replace(*change))
    with pytest.raises(InvalidInput, match=words):
        new_sae(read_job(path))


def test_a_label_that_is_no_number_is_refused(sae):
    x = xr.DataArray(da.zeros((10, D), chunks=(5, D), dtype=np.float32), dims=("row", "d_model"))
    with pytest.raises(InvalidInput, match="label 'word' has data type"):
        survey(sae, x, {"word": np.array(["a"] * 10)}, progress=False)
