import numpy as np
import pytest

from millpond.store.packing import ShardPacker


@pytest.mark.parametrize("seed", range(5))
def test_segments_of_ordinary_prompts_are_filled_to_the_last_row(seed):
    lengths = np.random.default_rng(seed).integers(20, 900, 3000).tolist()
    packer = ShardPacker[int](32_768, 8192)
    segments, current, waited = [], [], 0
    for number, rows in enumerate(lengths):
        queue = [number]
        while queue:
            one = queue.pop(0)
            ready, full = packer.add(sum(lengths[n] for n in current), lengths[one], one)
            current += ready
            waited = max(waited, sum(rows for rows, _ in packer.waiting))
            if full:
                segments.append(current)
                current, queue = [], packer.flush() + queue
    current += packer.flush()
    assert sorted(n for segment in [*segments, current] for n in segment) == list(range(3000))
    sizes = [sum(lengths[n] for n in segment) for segment in segments]
    assert sizes == [32_768] * len(sizes)
    assert len(sizes) > 35
    assert waited <= 8192


def test_lengths_that_never_fit_end_the_segment_all_the_same():
    packer = ShardPacker[int](100, 40)
    written = []
    for number in range(30):
        ready, full = packer.add(7 * len(written), 7, number)
        written += ready
        if full:
            break
    assert written == list(range(len(written)))
    assert full
    assert 100 < 7 * len(written) <= 140 + 7
