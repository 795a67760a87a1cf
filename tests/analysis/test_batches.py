import itertools
import time

import dask.array as da
import numpy as np
import pytest

from millpond.analysis.lazy_chunks import StoredBfloat16
from millpond.analysis.sae.batches import ShuffledBatches
from millpond.analysis.sae.drawn import DrawnRows, check_finite
from millpond.store.dtypes import decode, encode_bfloat16
from millpond.store.errors import InvalidInput

N, D, D_RUN = 1000, 4, 16


def numbered(chunk=70):
    """Rows whose values are their number."""
    x = np.repeat(np.arange(N, dtype=np.float32)[:, None], D, axis=1)
    return da.from_array(x, chunks=(chunk, -1))


def rows_of(batches, count):
    taken = list(itertools.islice(batches, count))
    return np.concatenate([batch[0] for batch in taken])[:, 0]


@pytest.mark.parametrize("buffer_bytes", [1 << 20, 300 * 4 * D, 1], ids=["all in memory", "a few chunks", "one chunk"])
@pytest.mark.parametrize("batch_size", [64, 100, 333])
def test_every_row_comes_once_an_epoch(buffer_bytes, batch_size):
    batches = ShuffledBatches([numbered()], batch_size, seed=0, buffer_bytes=buffer_bytes)
    rows = rows_of(batches, 3 * N // batch_size)
    assert all(len(batch[0]) == batch_size for batch in itertools.islice(batches, 5))
    for epoch in range(len(rows) // N):
        np.testing.assert_array_equal(np.sort(rows[epoch * N : (epoch + 1) * N]), np.arange(N))
    assert not np.array_equal(rows[:900], np.arange(900))


def test_the_seed_decides_the_order():
    def order(seed):
        return rows_of(ShuffledBatches([numbered()], 50, seed=seed, buffer_bytes=200 * 4 * D), 40)

    np.testing.assert_array_equal(order(0), order(0))
    assert not np.array_equal(order(0), order(1))


def test_a_small_buffer_mixes_several_chunks():
    batches = ShuffledBatches([numbered(chunk=50)], 50, seed=0, buffer_bytes=2 * 250 * 4 * D)
    first = rows_of(batches, 1)
    assert len(np.unique(first // 50)) > 2


def test_a_batch_may_be_larger_than_a_group():
    batches = ShuffledBatches([numbered(chunk=10)], 700, seed=0, buffer_bytes=1)
    rows = rows_of(batches, 10)
    np.testing.assert_array_equal(np.bincount(rows.astype(int), minlength=N), np.full(N, 7))


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(InvalidInput, match="1,000 rows, less than one batch of 1,001"):
        ShuffledBatches([numbered()], 1001, seed=0, buffer_bytes=1 << 20)


@pytest.mark.parametrize("buffer_bytes", [1 << 20, 300 * 4 * D, 1], ids=["all in memory", "a few chunks", "one chunk"])
@pytest.mark.parametrize("step", [1, 7, 15, 16, 47])
def test_any_step_can_be_reached(buffer_bytes, step):
    batches = ShuffledBatches([numbered()], 64, seed=3, buffer_bytes=buffer_bytes)
    through = rows_of(batches.batches(), step + 20)
    np.testing.assert_array_equal(rows_of(batches.batches(step), 20), through[64 * step :])


@pytest.mark.parametrize("buffer_bytes", [1 << 20, 1], ids=["all in memory", "one chunk"])
def test_ranks_share_the_rows_of_an_epoch(buffer_bytes):
    parts = []
    for rank in range(3):
        batches = ShuffledBatches([numbered(chunk=50)], 10, seed=0, buffer_bytes=buffer_bytes, rank=rank, world=3)
        parts.append(rows_of(batches.batches(), 33)[: 334 if buffer_bytes > 1 else 300])
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)


def test_hooks_stay_aligned_and_others_are_refused():
    doubled = numbered() * 2
    source = ShuffledBatches([numbered(), doubled], 64, seed=0, buffer_bytes=300 * 4 * D)
    for first, second in itertools.islice(source.batches(), 20):
        np.testing.assert_array_equal(second, 2 * first)
    with pytest.raises(InvalidInput, match="1,000 and 900 rows"):
        ShuffledBatches([numbered(), numbered()[:900]], 64, seed=0, buffer_bytes=1)
    with pytest.raises(InvalidInput, match="chunks differ"):
        ShuffledBatches([numbered(), numbered(chunk=50)], 64, seed=0, buffer_bytes=1)


def test_stored_bfloat16_is_decoded_when_it_is_drawn_and_named_when_it_is_not_finite():
    values = np.random.default_rng(0).standard_normal((3, 40, D)).astype(np.float32)
    bits = [encode_bfloat16(part) for part in values]
    rounded = np.concatenate([decode(part, "bfloat16") for part in bits])
    places = np.random.default_rng(1).permutation(120)[:70]
    drawn = DrawnRows([StoredBfloat16(part) for part in bits]).draw(places)
    np.testing.assert_array_equal(drawn, rounded[sorted(places, key=lambda place: place // 40)])
    np.testing.assert_array_equal(
        DrawnRows(bits).draw(places), np.concatenate(bits)[sorted(places, key=lambda place: place // 40)]
    )  # whole numbers of that type are no bfloat16
    check_finite(StoredBfloat16(bits[1]), "chunk 1", 40)
    for bad in (np.nan, np.inf, -np.inf):
        wrong = values[1].copy()
        wrong[7, 2] = bad
        with pytest.raises(InvalidInput, match=r"chunk 1 holds NaN or infinity in 1 rows, first in its row 7 \(row 47"):
            check_finite(StoredBfloat16(encode_bfloat16(wrong)), "chunk 1", 40)


@pytest.mark.parametrize("chosen", [False, True], ids=["whole chunks", "some rows of each chunk"])
def test_batches_stay_as_they_are_when_memory_is_read_into_again(run, parts, chosen):
    view = (parts[0] if chosen else run)["blocks.2.hook_resid_post"]
    wanted = np.asarray(view)
    batches = ShuffledBatches([view], 100, seed=0, buffer_bytes=8 * D_RUN * 300)
    assert len(wanted) > 2 * batches._group_rows  # each epoch fills the memory anew
    taken = []
    for (batch,) in itertools.islice(batches, 3 * len(wanted) // 100):
        taken.append(batch)
        time.sleep(0.01)  # for the group after this one to be read
    rows = np.concatenate(taken)
    first, second = batches.batches(), batches.batches()  # two at once have memory of their own
    for again in taken[:10]:
        np.testing.assert_array_equal(next(first)[0], again)
        np.testing.assert_array_equal(next(second)[0], again)
    first.close()
    np.testing.assert_array_equal(next(batches.batches(7))[0], taken[7])  # in the memory of the first
    for epoch in range(len(rows) // len(wanted)):
        drawn = rows[epoch * len(wanted) : (epoch + 1) * len(wanted)]
        np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], wanted[np.lexsort(wanted.T)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_when_it_is_drawn(bad):
    x = np.zeros((600, D), np.float32)
    x[450, 1] = bad
    rows = DrawnRows([x[:300], x[300:]], [("chunk 7", 1000), ("chunk 3", 2000)])
    assert not rows.draw(np.delete(np.arange(600), 450)).any()
    largest = np.full((300, D), -np.finfo(np.float32).max)
    np.testing.assert_array_equal(DrawnRows([largest], [("chunk 0", 0)]).draw(np.arange(300)), largest)
    with pytest.raises(
        InvalidInput, match=r"chunk 3 holds NaN or infinity in 1 rows, first in its row 150 \(row 2,150 "
    ):
        rows.draw(np.arange(600))
