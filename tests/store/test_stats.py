from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from millpond.store import stats
from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.planes import Scratch
from millpond.store.stats import SKETCH_ROWS, HookStatistics, block_rows, pack_statistics, unpack_statistics

BLOCK_ROWS = block_rows(7)


def check(found, rows):
    """Against NumPy in float64 over all rows at once."""
    rows = rows.astype(np.float64)
    assert found.count == len(rows)
    scale = np.sqrt((rows**2).mean())
    assert np.allclose(found.mean, rows.mean(0), rtol=1e-6, atol=1e-6 * scale)
    assert np.allclose(found.variance, rows.var(0), rtol=1e-5)
    assert found.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-6)
    assert found.max_norm == pytest.approx(np.linalg.norm(rows, axis=1).max(), rel=1e-6)
    assert np.array_equal(found.max_abs, np.abs(rows).max(0))


def as_bfloat16(rows):
    """Stored rows, cut off to bfloat16, and their values."""
    stored = (rows.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32)


def without_numba():
    return patch.object(stats, "compiled_pass", lambda: None)


def sample(n, d=7, seed=0, dtype="uint16"):
    """Stored rows with one far mean, one constant and one tiny dimension, and their values."""
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    rows[:, 1] = rows[:, 1] + 900
    rows[:, 2] = 3
    rows[:, 3] *= 1e-3
    if dtype == "uint16":
        return as_bfloat16(rows)
    stored = rows.astype(dtype)
    return stored, stored.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    d=st.sampled_from([6, 7]),
    sizes=st.lists(st.integers(0, 2 * BLOCK_ROWS + 3), min_size=1, max_size=6).filter(lambda x: sum(x) > 1),
    parts=st.integers(1, 4),
    dtype=st.sampled_from(["uint16", "float16", "float32"]),
    numba=st.booleans(),
)
def test_moments_are_those_of_all_rows_however_they_come(d, sizes, parts, dtype, numba):
    stored, values = sample(sum(sizes), d, dtype=dtype)
    pieces = np.split(stored, np.cumsum(sizes)[:-1])
    total, scratch = HookStatistics(d), Scratch()
    with nullcontext() if numba else without_numba():
        for part in range(parts):
            one = HookStatistics(d, part, scratch)
            for piece in pieces[part::parts]:
                one.update(piece)
            total.merge(HookStatistics.from_bytes(one.to_bytes()))
    check(total, values)
    assert HookStatistics.from_bytes(total.to_bytes()).to_bytes() == total.to_bytes()


def test_a_drift_does_not_drown_the_variance():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4 * BLOCK_ROWS, 3)).astype(np.float32)
    rows[2 * BLOCK_ROWS :] += 30_000
    found, late = HookStatistics(3), HookStatistics(3)
    found.update(rows)
    late.update(rows[:BLOCK_ROWS])
    late.update(rows[2 * BLOCK_ROWS :])
    check(found, rows)
    assert np.allclose(late.variance, np.delete(rows, np.s_[BLOCK_ROWS : 2 * BLOCK_ROWS], 0).astype(float).var(0))


def test_the_compiled_pass_and_numpy_agree():
    assert stats.compiled_pass() is not None
    rows = np.random.default_rng(5).standard_normal((5000, 9)) * np.arange(9)
    rows[0, 3] = 4000  # as the first token of a text often has
    rows[4990:, 4] = -2e19  # whose squares are beyond float32
    stored, values = as_bfloat16(rows)
    found = []
    for way in (nullcontext(), without_numba()):
        one = HookStatistics(9, key=11)
        with way:
            for piece in np.split(stored, [1, 65, 70, 70, 900, 4096, 4999]):
                one.update(piece)
        check(one, values)
        found.append(one)
    assert np.allclose(found[0].covariance_factor, found[1].covariance_factor, rtol=1e-4, atol=1e-3)


def test_rows_that_leave_the_first_ones_far_behind_keep_their_variance():
    rows = np.full((64, 2), 30_000.0)
    rows[0], rows[1:, 1] = 1, 20_000 + 128.0 * np.arange(63)
    stored, values = as_bfloat16(rows)
    found, later = HookStatistics(2), HookStatistics(2)
    found.update(stored[:1])
    found.update(stored[1:])
    check(found, values)
    later.merge(found)
    later.update(stored[:7])  # and those merged into others stay as they are
    found.update(stored)
    check(later, np.concatenate([values, values[:7]]))
    check(found, np.concatenate([values, values]))


def test_one_hook_takes_rows_of_several_types():
    stored, values = sample(700)
    found = HookStatistics(7)
    for rows in (stored[:100], values[100:300], stored[300:301], values[301:500].astype(np.float16), stored[500:]):
        found.update(rows)
    check(found, np.concatenate([values[:301], values[301:500].astype(np.float16), values[500:]]))


def test_large_finite_values_do_not_overflow():
    rows = np.full((3, 2), 3e19, np.float32)
    found = HookStatistics(2)
    found.update(rows)
    assert found.max_norm == pytest.approx(3e19 * np.sqrt(2))
    assert np.isfinite(found.variance).all()
    far = HookStatistics(1)
    far.update(np.array([[1e25], [-1e25]], np.float32))  # whose squares are beyond float32
    assert far.variance == pytest.approx(1e50)


def test_the_sketch_is_unbiased_within_its_stated_error():
    rng = np.random.default_rng(2)
    spectrum = np.array([8, 4, 2, 1, 1, 0.5, 0.5, 0.1])
    rows = (rng.standard_normal((3000, 8)) * spectrum + 50).astype(np.float32)
    centred = rows - rows.mean(0, dtype=np.float64)
    gram = centred.T @ centred / len(rows)
    errors, mean = [], np.zeros((8, 8))
    for key in range(200):
        first, second = HookStatistics(8, 2 * key), HookStatistics(8, 2 * key + 1)
        first.update(rows[:1234])
        second.update(rows[1234:])
        first.merge(second)
        assert first.covariance_factor.shape == (SKETCH_ROWS, 8)
        estimate = first.covariance_factor.T @ first.covariance_factor
        errors.append(((estimate - gram) ** 2).sum())
        mean += estimate / 200
    assert np.mean(errors) < 2 / SKETCH_ROWS * np.trace(gram) ** 2
    assert np.linalg.norm(mean - gram) < 3 * np.sqrt(2 / SKETCH_ROWS / 200) * np.trace(gram)
    # 200 unbiased estimates average out; the centre and the merge would show as a bias of 2,500 an entry


def test_few_rows_are_sketched_exactly():
    rows = np.random.default_rng(3).standard_normal((SKETCH_ROWS, 5)).astype(np.float32)
    found = HookStatistics(5)
    found.update(rows)
    # one row a bucket: only the centring, whose weights are random signs, separates the sketch from the rows
    uncentred = found.covariance_factor * np.sqrt(len(rows)) + np.outer(found._weights, found.mean)
    assert np.allclose(uncentred.T @ uncentred, rows.astype(float).T @ rows, rtol=1e-5, atol=1e-4)


def test_massive_dimensions():
    rows = np.random.default_rng(4).standard_normal((100, 50)).astype(np.float32)
    rows[0, 7], rows[5, 31] = 4000, -2500
    found = HookStatistics(50)
    found.update(rows)
    assert found.massive_dimensions().dimensions.tolist() == [7, 31]
    assert found.massive_dimensions().maximum.tolist() == [4000, 2500]
    assert found.massive_dimensions(times=3000).dimensions.tolist() == [7]
    assert "massive dimensions [7, 31]" in repr(found)


def test_no_rows():
    found = HookStatistics(3)
    found.merge(HookStatistics(3))
    assert (found.count, found.mean_norm, found.variance.tolist()) == (0, 0, [0, 0, 0])
    assert HookStatistics.from_bytes(found.to_bytes()).count == 0


def test_the_file_is_safetensors_and_what_is_not_is_refused():
    stored, values = sample(500)
    one = HookStatistics(7)
    one.update(stored)
    data = pack_statistics({"blocks.0.hook_resid_post": one, "blocks.1.hook_mlp_out": HookStatistics(7)})
    assert np.array_equal(load(data)["blocks.0.hook_resid_post/maximum"], np.abs(values).max(0))
    check(unpack_statistics(data)["blocks.0.hook_resid_post"], values)
    for broken in (b"", data[:40], data[:-9], data.replace(b'"F64"', b'"Q64"')):
        with pytest.raises(LakeCorrupt):
            unpack_statistics(broken)
    with pytest.raises(InvalidInput, match="upgrade"):
        unpack_statistics(data.replace(b'"version": "1"', b'"version": "2"'))


@pytest.mark.parametrize("wrong", [np.zeros((2, 4), np.float32), np.zeros(3, np.float32), np.zeros((2, 3), np.int32)])
def test_rows_of_another_kind_are_refused(wrong):
    with pytest.raises(InvalidInput, match="give uint16, float16 or float32 of shape"):
        HookStatistics(3).update(wrong)
