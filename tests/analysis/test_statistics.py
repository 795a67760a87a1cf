"""Statistics against NumPy and scikit-learn on the whole rows, which the pass never holds."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from millpond.analysis import statistics
from millpond.analysis.gram import TILE, UpperGram, whole
from millpond.analysis.passes import running
from millpond.analysis.pca import PcaReducer
from millpond.store.errors import HookNotCaptured, InvalidInput, MemoryTooSmall
from millpond.store.lake import open_lake
from millpond.store.segment import CapturedRequest, RunWriter

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
D = 24


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request, tmp_path_factory):
    """A run of 900 rows in three groups, with a massive dimension in the last hook, and its rows as float64."""
    import torch

    rng = np.random.default_rng(5)
    base = rng.standard_normal((900, D)) + 6 * rng.standard_normal((3, D))[rng.integers(0, 3, 900)]
    rows = {
        HOOKS[0]: base,
        HOOKS[1]: base @ rng.standard_normal((D, D)),
        HOOKS[2]: 0.01 * rng.standard_normal((900, D)),
    }
    rows[HOOKS[2]][:, 5] += 300.0
    lake = open_lake(tmp_path_factory.mktemp("lake"), create=True)
    spec = lake.create_run("s", hooks=HOOKS, d_model=D, dtype=request.param, chunk_rows=32, shard_rows=128)
    writer = RunWriter(lake.run_folder("s"), spec)
    stored = {}
    for hook, values in rows.items():
        tensor = torch.from_numpy(values).to(getattr(torch, request.param))
        rows[hook] = tensor.to(torch.float64).numpy()
        stored[hook] = (
            tensor.view(torch.int16).numpy().view(np.uint16) if request.param == "bfloat16" else tensor.numpy()
        )
    for number in range(30):
        some = slice(number * 30, number * 30 + 30)
        tokens = np.arange(30, dtype=np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, 30, tokens, {h: v[some] for h, v in stored.items()}))
    writer.commit()
    return lake["s"], rows


def test_describe_equals_numpy(made):
    run, rows = made
    found = statistics.describe(run, "blocks.*")
    for number, hook in enumerate(HOOKS):
        x = rows[hook]
        np.testing.assert_allclose(found["mean"][number], x.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found["variance"][number], x.var(axis=0), rtol=1e-4)
        np.testing.assert_allclose(found["max_abs"][number], np.abs(x).max(axis=0), rtol=1e-6)
        norms = np.linalg.norm(x, axis=1)
        assert found["mean_norm"][number] == pytest.approx(norms.mean(), rel=1e-6)
        assert found["max_norm"][number] == pytest.approx(norms.max(), rel=1e-6)
    assert np.argwhere(found["massive"]).tolist() == [[2, 5]]
    assert found.evidence == {"rows": 900, "prompts": 30}
    assert found.provenance["hooks"] == list(HOOKS)


def test_what_was_gathered_at_ingest_is_not_read_again(made):
    run, rows = made
    found = statistics.describe(run, HOOKS[:2])
    assert found.provenance["rows_read"] == 0
    for number, hook in enumerate(HOOKS[:2]):
        scale = np.abs(rows[hook]).max()
        np.testing.assert_allclose(found["mean"][number], rows[hook].mean(axis=0), atol=1e-5 * scale)
        np.testing.assert_allclose(found["variance"][number], rows[hook].var(axis=0), rtol=1e-3, atol=1e-7 * scale**2)
        np.testing.assert_allclose(found["max_abs"][number], np.abs(rows[hook]).max(axis=0))
    part = run.select(run.prompts.index < 10)
    assert statistics.describe(part, HOOKS[0]).provenance["rows_read"] == 300


def test_covariance_equals_numpy(made):
    run, rows = made
    for hook in HOOKS:
        found = statistics.covariance(run, hook)
        np.testing.assert_allclose(found["covariance"], np.cov(rows[hook].T), rtol=2e-5, atol=1e-7 * np.var(rows[hook]))
        np.testing.assert_allclose(found["mean"], rows[hook].mean(axis=0), rtol=1e-6, atol=1e-6)


def test_principal_components_of_stored_rows_equal_scikit_learns(made):
    run, rows = made
    found, reference = PcaReducer(3).fit(run[HOOKS[0]]), PCA(3).fit(rows[HOOKS[0]])
    np.testing.assert_allclose(found.explained_variance_, reference.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(np.abs(found.components_ @ reference.components_.T), np.eye(3), atol=1e-4)
    expected = (rows[HOOKS[0]] - reference.mean_) @ found.components_.T
    np.testing.assert_allclose(found.transform(run[HOOKS[0]]), expected, atol=1e-3)


def test_cosine_similarity_equals_numpy(made):
    run, rows = made
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows.values()]
    expected = [[(a * b).sum(axis=1).mean() for b in units] for a in units]
    np.testing.assert_allclose(statistics.layer_similarity(run, "*")["cosine"], expected, atol=1e-6)


def test_cka_equals_its_definition_on_kernels(made):
    run, rows = made
    center = np.eye(900) - 1 / 900
    kernels = [center @ (x @ x.T) @ center for x in rows.values()]
    expected = [[(a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for b in kernels] for a in kernels]
    np.testing.assert_allclose(statistics.cka(run, "*")["cka"], expected, rtol=1e-4)


def test_kmeans_finds_what_scikit_learn_finds(made):
    run, rows = made
    found = statistics.kmeans(run, HOOKS[0], 3, tol=0, seed=2)
    reference = KMeans(3, n_init=5, random_state=0).fit(rows[HOOKS[0]])
    assert found["inertia"] == pytest.approx(reference.inertia_, rel=1e-5)
    assert sorted(found["counts"]) == sorted(np.bincount(reference.labels_))
    order, other = np.argsort(found["centroids"][:, 0]), np.argsort(reference.cluster_centers_[:, 0])
    np.testing.assert_allclose(found["centroids"][order], reference.cluster_centers_[other], atol=1e-3)
    again = statistics.kmeans(run, HOOKS[0], 3, tol=0, seed=2)
    assert again["centroids"].tobytes() == found["centroids"].tobytes()


@pytest.mark.parametrize("coarse", [False, True])
def test_the_upper_tiles_of_a_wide_gram_matrix_make_the_whole(coarse):
    x = np.random.default_rng(0).standard_normal((300, TILE + 70)).astype(np.float32)
    gram = UpperGram(x.shape[1], coarse=coarse)
    for start in range(0, 300, 100):
        gram.update(x[start : start + 100])
    found = whole(gram.result(), x.shape[1])
    np.testing.assert_allclose(found, x.T @ x, rtol=0, atol=2.0 if coarse else 1e-3)
    np.testing.assert_array_equal(found, found.T)


def test_what_cannot_be_computed_is_refused_first(made):
    run, _ = made
    with pytest.raises(HookNotCaptured, match=r"blocks\.7"):
        statistics.describe(run, "blocks.7.hook_resid_post")
    with pytest.raises(InvalidInput, match="k is 0; give 1 to 900"):
        statistics.kmeans(run, HOOKS[0], 0)
    with pytest.raises(InvalidInput, match="names 3 hook points"):
        statistics.covariance(run, "*")
    with pytest.raises(InvalidInput, match="0 rows"):
        statistics.describe(run.select(np.zeros(30, bool)), "*")
    with running(memory_limit=20_000), pytest.raises(MemoryTooSmall, match="needs up to"):
        statistics.cka(run, "*")


def test_values_whose_squares_overflow_are_refused_by_name_or_come_out_right(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.standard_normal((64, D)).astype(np.float32) * np.float32(1e30)
    spec = open_lake(tmp_path, create=True).create_run("s", hooks=HOOKS[:2], d_model=D, dtype="float32")
    writer = RunWriter(open_lake(tmp_path).run_folder("s"), spec)
    tokens = np.arange(64, dtype=np.int32)
    small = rng.standard_normal((64, D)).astype(np.float32)
    writer.append(CapturedRequest("p", tokens, 64, tokens, {HOOKS[0]: large, HOOKS[1]: small}))
    writer.commit()
    run = open_lake(tmp_path)["s"]
    for refused in (
        lambda: statistics.cka(run, "*"),
        lambda: statistics.kmeans(run, HOOKS[0], 3),
        lambda: statistics.covariance(run, HOOKS[0]),
    ):
        with pytest.raises(InvalidInput, match=r"blocks\.0\.hook_resid_post.* so large \(from about 1e17\)"):
            refused()
    units = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (large, small)]
    cosine = statistics.layer_similarity(run, "*")["cosine"]
    assert cosine[0, 1] == pytest.approx((units[0] * units[1]).sum(axis=1).mean(), abs=1e-6)
    assert cosine[0, 0] == pytest.approx(1, abs=1e-6)
