import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.store.errors import InvalidInput

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


def rows_of(array):
    return sorted(row.tobytes() for row in array)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=10).filter(lambda x: sum(x) > 0),
    chunk_rows=st.integers(1, 9),
    batch_rows=st.integers(1, 30),
    buffer_rows=st.integers(1, 60),
    world=st.integers(1, 4),
    by_row=st.booleans(),
    data=st.data(),
)
def test_epochs_are_shared_out_whole_and_every_step_resumes(
    build, tmp_path_factory, lengths, chunk_rows, batch_rows, buffer_rows, world, by_row, data
):
    made = build(
        lengths, chunk_rows=chunk_rows, shard_rows=chunk_rows * 2, folder=tmp_path_factory.mktemp("s") / "lake"
    )
    if by_row:
        view, kept = made.run.select(where="token_id % 3 > 0"), made.token_id % 3 > 0
    else:
        marks = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
        view, kept = made.run.select(marks), np.isin(made.prompt, np.flatnonzero(marks))
    expected = made.float32(HOOK)[kept]
    n = len(expected)

    def stream(rank, state=None):
        return view.stream(
            HOOK, batch_rows, seed=3, epochs=3, buffer_rows=buffer_rows, rank=rank, world=world, state=state
        )

    if n // world < batch_rows:
        with pytest.raises(InvalidInput, match=rf"batch_rows is {batch_rows}; give 1 to {n // world}"):
            stream(0)
        return
    whole = {rank: list(stream(rank)) for rank in range(world)}
    for epoch in range(3):
        rows = []
        for rank, batches in whole.items():
            share = n * (rank + 1) // world - n * rank // world
            assert len(batches) == 3 * share // batch_rows
            assert {batch.shape for batch in batches} == {(batch_rows, 4)}
            laid = np.concatenate(batches)[epoch * share : (epoch + 1) * share]
            rows += list(laid) if len(laid) == share else []
        if epoch < 2 or all(len(batches) * batch_rows % 3 == 0 for batches in whole.values()):
            left_out = n - len(rows)
            if not left_out:
                assert rows_of(rows) == rows_of(expected)
            assert left_out == 0 or epoch == 2
    rank = data.draw(st.integers(0, world - 1))
    step = data.draw(st.integers(0, len(whole[rank])))
    first = stream(rank)
    for _ in range(step):
        next(first)
    state = json.loads(json.dumps(first.state()))
    resumed = list(stream(rank, state))
    assert len(resumed) == len(whole[rank]) - step
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole[rank][step:], strict=True))


def test_seeds_and_epochs_differ_and_rows_are_mixed(build, tmp_path):
    made = build([40] * 25, chunk_rows=50, shard_rows=200, folder=tmp_path / "lake")
    order = {row.tobytes(): number for number, row in enumerate(made.float32(HOOK))}
    assert len(order) > 990  # the rows tell themselves apart

    def numbers(seed, buffer_rows=500):
        laid = np.concatenate(list(made.run.stream(HOOK, 100, seed=seed, epochs=2, buffer_rows=buffer_rows)))
        return np.array([order[row.tobytes()] for row in laid])

    zero, again, one = numbers(0), numbers(0), numbers(1)
    assert np.array_equal(zero, again)
    assert (zero != one).mean() > 0.9
    assert (zero[:1000] != zero[1000:]).mean() > 0.9
    # each batch draws on several of the 20 chunks, and however small the buffer, on two
    assert min(len(set(batch // 50)) for batch in zero.reshape(-1, 100)) >= 5
    assert min(len(set(batch // 50)) for batch in numbers(0, 1).reshape(-1, 100)) >= 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_hooks_are_aligned_by_row(build, tmp_path, dtype):
    made = build([30] * 9, chunk_rows=8, shard_rows=32, folder=tmp_path / "lake")
    pairs = set()
    for batch in made.run.stream("blocks.*", 16, seed=1, epochs=1, buffer_rows=64, dtype=dtype):
        assert list(batch) == [HOOK, OTHER]
        assert {rows.dtype.name for rows in batch.values()} == {dtype}
        pairs |= {
            (a.astype(np.float32).tobytes(), b.astype(np.float32).tobytes())
            for a, b in zip(*batch.values(), strict=True)
        }
    stored = zip(made.float32(HOOK), made.float32(OTHER), strict=True)
    expected = {(a.tobytes(), b.tobytes()) for a, b in stored}
    assert len(pairs) == 256
    assert pairs <= expected


def test_torch_batches_share_the_order_and_the_bits(sealed):
    import torch
    from torch.utils.data import DataLoader

    plain = list(sealed.run.stream(HOOK, 32, seed=5, epochs=1))
    stream = sealed.run.stream(HOOK, 32, seed=5, epochs=1, dtype="bfloat16")
    tensors = list(DataLoader(stream.torch(), batch_size=None))
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert np.array_equal(torch.cat(tensors).float().numpy(), np.concatenate(plain))
    both = next(iter(sealed.run.stream([HOOK, OTHER], 32, seed=5).torch()))
    assert np.array_equal(both[HOOK].numpy(), plain[0])
    with pytest.raises(InvalidInput, match="use num_workers=0"):
        next(iter(DataLoader(sealed.run.stream(HOOK, 8).torch(), batch_size=None, num_workers=1)))


def test_endless_and_counted(sealed):
    stream = sealed.run.stream(HOOK, 100)
    assert [next(stream).shape for _ in range(5)] == [(100, 4)] * 5  # more than an epoch of 172
    assert stream.state()["step"] == stream.step == 5
    assert list(sealed.run.stream(HOOK, 100, epochs=0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"epochs": -1}, "epochs is -1"),
        ({"buffer_rows": 0}, "buffer_rows is 0; give 1 or more"),
        ({"world": 2, "rank": 2}, "rank is 2; give 0 to 1, world being 2"),
        ({"world": 18}, "batch_rows is 10; give 1 to 9, the rows of this view of 'made' for each of 18 ranks"),
        ({"dtype": "float16"}, "dtype 'float16' is not a view of rows stored as bfloat16; use float32 or bfloat16"),
        ({"state": {"step": 3}}, "give what stream.state.. returned"),
        ({"state": {"step": "3", "stream": "x"}}, "give what stream.state"),
    ],
)
def test_arguments_that_cannot_be_used(sealed, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        sealed.run.stream(HOOK, 10, **arguments)


def test_a_state_of_another_stream_is_refused(sealed):
    run = sealed.run
    state = run.stream(HOOK, 10, seed=1).state()
    run.stream(HOOK, 10, seed=1, epochs=4, state=state)
    run.stream([HOOK, OTHER], 10, seed=1, dtype="bfloat16", state=state)
    for other in (
        lambda: run.stream(HOOK, 10, seed=2, state=state),
        lambda: run.stream(HOOK, 11, seed=1, state=state),
        lambda: run.stream(HOOK, 10, seed=1, buffer_rows=9999, state=state),
        lambda: run.stream(HOOK, 10, seed=1, world=2, state=state),
        lambda: run.split(0.5)[0].stream(HOOK, 10, seed=1, state=state),
        lambda: run.select(position=slice(1, None)).stream(HOOK, 10, seed=1, state=state),
    ):
        with pytest.raises(InvalidInput, match="state is that of another stream"):
            other()


def test_batches_do_not_change_each_other(sealed):
    plain = [batch.copy() for batch in sealed.run.stream(HOOK, 10, epochs=1)]
    changed = []
    for batch in sealed.run.stream(HOOK, 10, epochs=1):
        changed.append(batch.copy())
        batch[:] = np.nan
    assert all(np.array_equal(a, b) for a, b in zip(plain, changed, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batches_that_somebody_holds_are_not_written_over(build, dtype):
    """Memory is used again only when neither a batch nor a view nor a tensor of it is left."""
    made = build([60] * 20, chunk_rows=16, shard_rows=64, d_model=512)
    run = made.run
    stream = {"batch_rows": 100, "epochs": 3, "buffer_rows": 256, "dtype": dtype, "seed": 1}
    copies = [batch.astype(np.float32) for batch in run.stream(HOOK, **stream)]
    assert len(copies) == 36
    assert rows_of(np.concatenate(copies[:12])) == rows_of(made.float32(HOOK))
    kept = list(run.stream(HOOK, **stream))
    views = [batch[7:9] for batch in run.stream(HOOK, **stream)]
    tensors = [tensor[50:] for tensor in run.stream(HOOK, **stream).torch()]
    for copy, whole, view, tensor in zip(copies, kept, views, tensors, strict=True):
        np.testing.assert_array_equal(copy, whole.astype(np.float32))
        np.testing.assert_array_equal(copy[7:9], view.astype(np.float32))
        np.testing.assert_array_equal(copy[50:], tensor.float().numpy())


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
