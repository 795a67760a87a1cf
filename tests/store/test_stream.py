import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.store.errors import InvalidInput

HOOK = "blocks.0.hook_resid_post"


def rows_of(array):
    return sorted(row.tobytes() for row in array)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=10).filter(lambda x: sum(x) > 0),
    chunk_rows=st.integers(1, 9),
    batch_size=st.integers(1, 30),
    buffer_rows=st.integers(1, 60),
    data=st.data(),
)
def test_epochs_are_permutations_and_steps_resume(
    build, tmp_path_factory, lengths, chunk_rows, batch_size, buffer_rows, data
):
    made = build(
        lengths, chunk_rows=chunk_rows, shard_rows=chunk_rows * 2, folder=tmp_path_factory.mktemp("s") / "lake"
    )
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    view = made.run.select(kept)
    expected = made.float32(HOOK)[np.isin(made.prompt, np.flatnonzero(kept))]
    n = len(expected)
    if n < batch_size:
        with pytest.raises(InvalidInput, match=rf"batch_size is {batch_size}; give 1 to {n}"):
            view.stream(HOOK, batch_size)
        return
    stream = lambda start=0: view.stream(HOOK, batch_size, seed=3, epochs=3, buffer_rows=buffer_rows, start_step=start)
    batches = list(stream())
    assert len(batches) == 3 * n // batch_size
    assert {batch.shape for batch in batches} == {(batch_size, 4)}
    laid = np.concatenate(batches)
    for epoch in range(3):
        part = laid[epoch * n : (epoch + 1) * n]
        if len(part) == n:
            assert rows_of(part) == rows_of(expected)
    start = data.draw(st.integers(0, len(batches) + 2))
    resumed = list(stream(start))
    assert len(resumed) == max(len(batches) - start, 0)
    assert all(np.array_equal(a, b) for a, b in zip(resumed, batches[start:], strict=True))


def test_seeds_and_epochs_differ_and_rows_are_mixed(build, tmp_path):
    made = build([40] * 25, chunk_rows=50, shard_rows=200, folder=tmp_path / "lake")
    order = {row.tobytes(): number for number, row in enumerate(made.float32(HOOK))}
    assert len(order) > 990  # the rows tell themselves apart

    def numbers(seed):
        laid = np.concatenate(list(made.run.stream(HOOK, 100, seed=seed, epochs=2, buffer_rows=500)))
        return np.array([order[row.tobytes()] for row in laid])

    zero, again, one = numbers(0), numbers(0), numbers(1)
    assert np.array_equal(zero, again)
    assert (zero != one).mean() > 0.9
    assert (zero[:1000] != zero[1000:]).mean() > 0.9
    # each batch draws on several of the 20 chunks
    assert min(len(set(batch // 50)) for batch in zero.reshape(-1, 100)) >= 5


def test_endless_and_counted(sealed):
    stream = sealed.run.stream(HOOK, 100)
    assert [next(stream).shape for _ in range(5)] == [(100, 4)] * 5  # more than an epoch of 172
    assert stream.step == 5
    assert list(sealed.run.stream(HOOK, 100, epochs=0)) == []


@pytest.mark.parametrize("name", ["seed", "epochs", "start_step"])
def test_negative_arguments(sealed, name):
    with pytest.raises(InvalidInput, match=f"{name} is -1; give 0 or more"):
        sealed.run.stream(HOOK, 10, **{name: -1})


def test_batches_do_not_change_each_other(sealed):
    plain = [batch.copy() for batch in sealed.run.stream(HOOK, 10, epochs=1)]
    changed = []
    for batch in sealed.run.stream(HOOK, 10, epochs=1):
        changed.append(batch.copy())
        batch[:] = np.nan
    assert all(np.array_equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_memory_is_three_buffers_however_long_the_run(build, tmp_path):
    made = build([400] * 60, chunk_rows=100, shard_rows=1000, d_model=128, segment_rows=5000, folder=tmp_path / "lake")
    run, buffer_rows = made.run, 2000
    buffer = buffer_rows * 128 * 4
    for batch in run.stream(HOOK, 300, epochs=1, buffer_rows=buffer_rows):  # imports and caches
        del batch
    tracemalloc.start()
    try:
        for batch in run.stream(HOOK, 300, epochs=1, buffer_rows=buffer_rows):
            del batch
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 10 * buffer < 24_000 * 128 * 4
    assert peak < 3.3 * buffer
