"""Folders and batches exchanged with the real SAELens and dictionary_learning, in an environment of their own."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from millpond.analysis import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    ReluSae,
    Sae,
    SkipTranscoder,
    TopKSae,
    Transcoder,
)
from millpond.cli import main
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

ROOT = Path(__file__).parents[2]
D = 24
EXPECTED = {
    "batchtopk": "JumpReLUSAE",
    "matryoshka": "JumpReLUSAE",
    "jumprelu": "JumpReLUSAE",
    "topk": "TopKSAE",
    "relu": "StandardSAE",
    "gated": "GatedSAE",
    "transcoder": "JumpReLUTranscoder",
    "skip": "JumpReLUSkipTranscoder",
    "relu_transcoder": "Transcoder",
}


def peers_python():
    spec = importlib.util.spec_from_file_location("sae_benchmark", ROOT / "benchmarks" / "sae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_environment()


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Our autoencoders, rows, and what the peers made of them."""
    folder = tmp_path_factory.mktemp("saelens")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2048, 40)) * (rng.random((2048, 40)) < 0.1)) @ rng.standard_normal((40, D)) + 3
    x = x.astype(np.float32)
    y = (np.abs(x) @ rng.standard_normal((D, D))).astype(np.float32)
    options = {"batch_size": 256, "n_threads": 1, "progress": False}
    saes = {
        "batchtopk": BatchTopKSae(40, 4, **options).fit(x),
        "matryoshka": MatryoshkaSae(40, 4, **options).fit(x),
        "jumprelu": JumpReluSae(40, bandwidth=0.05, **options).fit(x),
        "topk": TopKSae(40, 4, **options).fit(x),
        "relu": ReluSae(40, **options).fit(x),
        "gated": GatedSae(40, **options).fit(x),
        "transcoder": Transcoder(40, 4, **options).fit(x, y),
        "skip": SkipTranscoder(40, 4, **options).fit(x, y),
        "relu_transcoder": Transcoder(40, architecture="relu", **options).fit(x, y),
    }
    for name, sae in saes.items():
        sae.save(folder / "ours" / name, model_name="gpt2", prepend_bos=True)
    np.save(folder / "x.npy", x[:300])
    lake = open_lake(folder / "lake", create=True)
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    spec = lake.create_run("r", hooks=hooks, d_model=D, dtype="float32", provenance={"model": "m"}, chunk_rows=64)
    writer = RunWriter(lake.run_folder("r"), spec)
    zeros, positions = np.zeros(2048, np.int32), np.arange(2048, dtype=np.int32)
    writer.append(CapturedRequest("p0", zeros, 2048, positions, {hooks[0]: x, hooks[1]: 2 * x}))
    writer.commit()
    seal_run(lake.run_folder("r"), prompts=pd.DataFrame({"id": ["p0"]}), token_labels={}, token_label_dtypes={})
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    script = str(Path(__file__).parent / "saelens_peer.py")
    done = subprocess.run(
        [str(peers_python()), script, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return saes, x[:300], folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_saelens_reads_our_folders_and_gives_the_same_latents(exchanged):
    saes, x, folder, report = exchanged
    assert report["loaded"] == EXPECTED
    for name, sae in saes.items():
        found = np.load(folder / f"{name}.npz")
        latents = sae.encode(x)
        assert (latents > 0).any(), name
        scale = latents.max()
        np.testing.assert_allclose(found["latents"], latents, atol=1e-4 * scale, err_msg=name)
        rebuilt = sae.reconstruct(x)
        np.testing.assert_allclose(found["rebuilt"], rebuilt, atol=1e-4 * np.abs(rebuilt).max(), err_msg=name)


@pytest.mark.slow
def test_we_read_saelens_folders_and_give_the_same_latents(exchanged):
    _, x, folder, _ = exchanged
    names = sorted(path.stem for path in (folder / "theirs").glob("*.npz"))
    assert len(names) == 7
    for name in names:
        found = np.load(folder / "theirs" / f"{name}.npz")
        sae = Sae.load(folder / "theirs" / name)
        latents = sae.encode(x)
        np.testing.assert_allclose(latents, found["latents"], atol=1e-4, err_msg=name)
        rebuilt = sae.reconstruct(x)
        np.testing.assert_allclose(rebuilt, found["rebuilt"], atol=1e-3, err_msg=name)
    assert isinstance(Sae.load(folder / "theirs" / "skip_transcoder"), SkipTranscoder)
    with pytest.raises(InvalidInput, match="no BatchTopKSae"):
        BatchTopKSae.load(folder / "theirs" / "gated")
    with pytest.raises(InvalidInput, match="trained by another library"):
        Sae.load(folder / "theirs" / "topk").fit(x)


@pytest.mark.slow
def test_their_trainers_train_on_our_batches(exchanged):
    report = exchanged[3]
    assert report["saelens_samples"] == report["multi_samples"] == 256
    assert report["saelens_moved"] > 1e-4
    assert report["dictionary_learning"]


@pytest.mark.slow
def test_activations_that_saelens_cached_are_imported_as_they_are(exchanged, tmp_path):
    _, _, folder, report = exchanged
    texts, files = report["cached"]
    assert files > 1  # so their order counts
    theirs = np.load(folder / "cache.npz")
    assert report["version"].startswith("6.")
    hook = "blocks.3.hook_resid_post"
    lake = tmp_path / "lake"
    done = main(
        [
            "import",
            str(lake),
            "cached",
            str(folder / "cache"),
            "--format",
            "saelens",
            "--hooks",
            "model.layers.3",
            hook,
        ]
    )
    assert done == 0
    run = open_lake(lake)["cached"]
    rows, tokens = run[hook].values, run.tokens.compute()
    assert tokens["token_id"].values.reshape(len(texts), -1).tolist() == theirs["token_ids"].tolist() == texts
    assert rows.tobytes() == theirs["rows"].astype(np.float32).tobytes()
    assert tokens["prompt"].values.tolist() == np.repeat(np.arange(len(texts)), len(texts[0])).tolist()
    assert tokens["position"].values.tolist() == list(range(len(texts[0]))) * len(texts)
    np.testing.assert_allclose(
        rows, theirs["hidden"].reshape(rows.shape), rtol=1e-4, atol=1e-4
    )  # of transformers itself


def test_a_saved_folder_comes_back_whole(tmp_path):
    x = np.random.default_rng(0).standard_normal((600, D)).astype(np.float32)
    sae = TopKSae(32, 3, batch_size=128, n_threads=1, progress=False).fit(x)
    again = Sae.load(sae.save(tmp_path))
    assert type(again) is TopKSae
    assert (again.config, again.trained_on_) == (sae.config, sae.trained_on_)
    np.testing.assert_array_equal(again.encode(x), sae.encode(x))
    np.testing.assert_allclose(again.frequency_, np.maximum(sae.frequency_, 1e-10), rtol=1e-5)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"d_sae": 33}))
    with pytest.raises(InvalidInput, match=r"W_dec is \(32, 24\), cfg.json says \(33, 24\)"):
        Sae.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "layer_norm"}))
    with pytest.raises(InvalidInput, match="normalize_activations 'layer_norm'"):
        Sae.load(tmp_path)
