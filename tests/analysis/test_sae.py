import json

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.numpy import load_file

from millpond.analysis import BatchTopKSae
from millpond.analysis.sae.config import SaeConfig, default_lr
from millpond.analysis.sae.trainer import Trainer
from millpond.store.errors import InvalidInput


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(n, d=32, features=48, active=3, seed=0):
    """Rows that are sums of few unit directions, about a mean far from 0; the same directions for any seed."""
    rng = np.random.default_rng(99)
    directions = rng.standard_normal((features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng([seed, n])
    on = rng.random((n, features)) < active / features
    rows = (on * (1 + np.abs(rng.standard_normal((n, features))))) @ directions
    return (7 * rows + 100).astype(np.float32), directions


def as_run_gives(x, chunk=512):
    number = da.from_array(np.arange(len(x), dtype=np.int32), chunks=chunk)
    return xr.DataArray(
        da.from_array(x, chunks=(chunk, -1)),
        dims=("row", "d_model"),
        coords={"prompt": ("row", number // 10), "position": ("row", number % 10)},
        attrs={"run": "r", "hook": "blocks.1.hook_resid_post", "model": "m"},
    )


OPTIONS = {"batch_size": 256, "progress": False, "n_threads": 1}
MANY = 100
"""Epochs that no test here uses up."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("sae")
    x, directions = planted(8192)
    sae = BatchTopKSae(64, 3, **OPTIONS).fit(as_run_gives(x), tokens=120_000, out=out, epochs=MANY)
    return sae, directions, out


def test_planted_directions_are_recovered(fitted):
    sae, directions, _ = fitted
    best = (directions @ sae.W_dec_.T).max(axis=1)
    assert best.mean() > 0.95
    result = sae.evaluate(as_run_gives(planted(3000, seed=1)[0]))
    assert result["fvu"] < 0.1
    assert result["l0"] == pytest.approx(3, rel=0.1)
    assert result["dead_latents"] < 0.25  # 48 directions were planted, for 64 latents
    assert result.evidence == {"rows": 3000}
    assert result.provenance["evaluated_on"]["hook"] == "blocks.1.hook_resid_post"


def test_progress_is_recorded(fitted):
    sae, _, out = fitted
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(20, 469, 20), 469]
    assert lines[-1]["tokens"] == 469 * 256 == sae.trained_on_["tokens"]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert set(lines[0]) == {
        "step", "tokens", "loss", "fvu", "l0", "dead", "lr", "tokens_per_second", "seconds_left",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["d_sae"] == 64


def test_bfloat16_selection_trains_as_well():
    x, directions = planted(4096)
    sae = BatchTopKSae(64, 3, encoder_dtype="bfloat16", **OPTIONS).fit(x, tokens=80_000, epochs=MANY)
    assert (directions @ sae.W_dec_.T).max(axis=1).mean() > 0.9


def dead_after(steps, **options):
    """Share of dead latents when half of them start so low that no row activates them."""
    x = torch.from_numpy(planted(4096)[0] - 100) / 10
    config = SaeConfig(64, 3, batch_size=256, dead_tokens=1024, encoder_dtype="float32", **options)
    trainer = Trainer(config, 32, total_steps=400)
    trainer.parameters["b_enc"][:32] = -30.0
    return [trainer.step(x[(i % 16) * 256 : (i % 16 + 1) * 256]).dead for i in range(steps)]


def test_dead_latents_come_back():
    dead = dead_after(200)
    assert dead[4] >= 0.5
    assert dead[-1] < 0.1
    assert dead_after(200, decay=1.0, warmup=0.0)[-1] >= 0.5  # nothing is revived while the learning rate falls


def test_a_stream_of_batches_trains_like_an_array_and_a_short_one_is_refused():
    x, directions = planted(4096)
    batches = [x[i : i + 256] for i in range(0, 4096, 256)]
    sae = BatchTopKSae(64, 3, **OPTIONS).fit((batches[i % 16] for i in range(400)), tokens=80_000)
    assert (directions @ sae.W_dec_.T).max(axis=1).mean() > 0.9
    with pytest.raises(InvalidInput, match="ended after 4,096 of 5,000 rows"):
        BatchTopKSae(64, 3, **OPTIONS).fit(batches, tokens=5000)
    with pytest.raises(InvalidInput, match="tokens is not given"):
        BatchTopKSae(64, 3, **OPTIONS).fit(batches)


def test_same_seed_same_weights():
    x, _ = planted(2048)
    first, second, other = (
        BatchTopKSae(32, 3, seed=seed, **OPTIONS).fit(as_run_gives(x), tokens=4096, epochs=2).W_dec_
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, other)


def test_saved_folder_is_what_saelens_reads(fitted, tmp_path):
    """Layout and forward pass as SAELens 6 defines them for a JumpReLU autoencoder."""
    sae, _, _ = fitted
    folder = sae.save(tmp_path / "sae", context_size=128)
    cfg = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        "W_enc": (32, 64), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,), "threshold": (64,),
    }  # fmt: skip
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}
    expected = {
        "architecture": "jumprelu", "d_in": 32, "d_sae": 64, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    assert {name: cfg[name] for name in expected} == expected
    metadata = cfg["metadata"]
    assert metadata["sae_lens_version"] == "6.54.12"
    assert (metadata["model_name"], metadata["hook_name"]) == ("m", "blocks.1.hook_resid_post")
    assert metadata["context_size"] == 128
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=1), 1, atol=1e-5)

    x = planted(200, seed=3)[0]
    hidden = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    latents = np.maximum(hidden, 0) * (hidden > weights["threshold"])
    np.testing.assert_allclose(sae.encode(x), latents, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x)), latents @ weights["W_dec"] + weights["b_dec"], atol=1e-3)

    again = BatchTopKSae.load(folder)
    np.testing.assert_array_equal(again.encode(x), sae.encode(x))
    assert (again.config, again.trained_on_) == (sae.config, sae.trained_on_)


def test_evaluation_equals_the_definitions(fitted):
    sae, _, _ = fitted
    x = planted(1000, seed=4)[0].astype(np.float64)
    latents = sae.encode(x)
    rebuilt = sae.decode(latents).astype(np.float64)
    result = sae.evaluate(as_run_gives(x.astype(np.float32), chunk=77))
    residual, centred = x - rebuilt, x - x.mean(axis=0)
    expected = {
        "l0": (latents > 0).sum() / 1000,
        "fvu": (residual**2).sum() / (centred**2).sum(),
        "explained_variance": 1 - (residual**2).sum() / (centred**2).sum(),
        "mse": (residual**2).mean(),
        "cosine": ((x * rebuilt).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(rebuilt, axis=1)).mean(),
        "dead_latents": (latents.max(axis=0) == 0).mean(),
    }
    similar = sae.W_dec_ @ sae.W_dec_.T - 2 * np.eye(64)
    expected["decoder_similarity"] = similar.max(axis=1).mean()
    frequency = (latents > 0).mean(axis=0)
    histogram = result.values["frequency_histogram"]
    assert histogram.sum() == 64
    assert histogram[0] == (frequency < 1e-6).sum()
    assert histogram[-3] == ((frequency >= 0.1) & (frequency < 10**-0.5)).sum()
    assert histogram[-4] == ((frequency >= 10**-1.5) & (frequency < 0.1)).sum()
    mean_alone = np.full((1000, 32), x.mean(axis=0), np.float32)
    assert 1 - ((x - mean_alone) ** 2).sum() / (centred**2).sum() == pytest.approx(0, abs=1e-6)
    assert {name: result.values[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(sae.firing_frequency(x.astype(np.float32)), (latents > 0).mean(axis=0), atol=2e-3)


@pytest.mark.parametrize("chunk", [13, 1000])
def test_top_rows_are_the_strongest(fitted, chunk):
    sae, _, _ = fitted
    x = planted(1000, seed=5)[0]
    latents = sae.encode(x)
    found = sae.top_rows(as_run_gives(x, chunk), [5, 40], n=7)
    assert set(found["latent"]) == {5, 40}
    for latent in (5, 40):
        part = found[found["latent"] == latent]
        expected = np.argsort(-latents[:, latent], kind="stable")[:7]
        expected = expected[latents[expected, latent] > 0]
        assert list(part["row"]) == list(expected)
        np.testing.assert_allclose(part["value"], latents[expected, latent], rtol=1e-4)
        assert list(part["rank"]) == list(range(len(expected)))
    assert (found["prompt"] == found["row"] // 10).all()
    assert (found["position"] == found["row"] % 10).all()
    with pytest.raises(InvalidInput, match="0 to 63"):
        sae.top_rows(x, [64])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 100}, "more than the 64 latents"),
        ({"k": 4, "warmup": 0.95}, "at most 1"),
        ({"k": 4, "lr": -1.0}, "lr is -1.0"),
        ({"k": 4, "encoder_dtype": "int8"}, "int8"),
        ({"k": 4, "sparsity": 0.1}, "its L0 is set by k"),
        ({"k": 4, "prefixes": (8, 64)}, "only matryoshka"),
        ({"k": 4, "architecture": "matryoshka", "prefixes": (8, 32)}, "the last is 64"),
        ({"k": None}, "k is not given"),
        ({"k": None, "architecture": "gated", "aux_weight": 0.1}, "gated has no auxiliary loss"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(InvalidInput, match=words):
        SaeConfig(64, **options)


def test_input_that_cannot_be_used_is_refused(fitted, tmp_path):
    sae, _, _ = fitted
    x, _ = planted(512)
    broken = x.copy()
    broken[300, 2] = np.inf
    with pytest.raises(InvalidInput, match="less than one batch of 256"):
        BatchTopKSae(64, 3, **OPTIONS).fit(x[:100], tokens=100)
    with pytest.raises(
        InvalidInput, match=r"chunk 2 of X holds NaN or infinity in 1 rows, first in its row 44 \(row 300"
    ):
        BatchTopKSae(64, 3, **OPTIONS).fit(as_run_gives(broken, 128), tokens=512)
    with pytest.raises(InvalidInput, match="batch 1 holds NaN or infinity in 1 rows, first in its row 44"):
        BatchTopKSae(64, 3, **OPTIONS).fit([broken[:256], broken[256:]], tokens=512)
    with pytest.raises(InvalidInput, match=r"tokens is 1,000, X has 512 rows: give epochs=2"):
        BatchTopKSae(64, 3, **OPTIONS).fit(x, tokens=1000)
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        sae.evaluate(broken)
    with pytest.raises(InvalidInput, match="tokens is 0"):
        BatchTopKSae(64, 3, **OPTIONS).fit(x, tokens=0)
    with pytest.raises(InvalidInput, match="not fitted"):
        BatchTopKSae(64, 3).encode(x)
    with pytest.raises(InvalidInput, match=r"give \(rows, 32\)"):
        sae.encode(x[:, :5])
    with pytest.raises(InvalidInput, match=r"no cfg\.json"):
        BatchTopKSae.load(tmp_path)
    (tmp_path / "cfg.json").write_text('{"architecture": "temporal"}')
    with pytest.raises(InvalidInput, match="'temporal'"):
        BatchTopKSae.load(tmp_path)


def test_default_learning_rate():
    assert default_lr(2**14, 50_000) == pytest.approx(2e-4)
    assert default_lr(2**12, 1_000_000) == pytest.approx(4e-4)
    assert default_lr(2**11, 782) == pytest.approx(4.5e-3, rel=0.01)
    assert default_lr(64, 10) == 1e-2


def test_calibration_moves_the_threshold_of_a_copy_to_the_l0_asked_for(fitted):
    sae, _, _ = fitted
    x = as_run_gives(planted(3000, seed=5)[0])
    before = sae.threshold_
    for l0 in (1, 4, 7.5):
        moved = sae.calibrate(x, l0)
        assert np.count_nonzero(sae.encode(x.values)) != np.count_nonzero(moved.encode(x.values))
        np.testing.assert_allclose(np.count_nonzero(moved.encode(x.values)) / 3000, l0, rtol=0.005)
    np.testing.assert_array_equal(sae.threshold_, before)
    with pytest.raises(InvalidInput, match="l0=1000 cannot be reached"):
        sae.calibrate(x, 1000)
