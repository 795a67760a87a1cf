"""Memory of captured rows is used again, and never while a view of it lives."""

from __future__ import annotations

import numpy as np
import torch

from millpond.capture.kept_rows import KeptRows, as_computed
from millpond.capture.row_memory import RowMemory

D = 1024
BFLOAT16 = np.dtype(np.uint16)


def address(rows: np.ndarray) -> int:
    return rows.__array_interface__["data"][0]


def test_memory_is_used_again_once_no_view_is_left():
    memory = RowMemory()
    first = memory.array((2, 64, D), BFLOAT16)
    place, view = address(first), first[1, 3:5].view(np.int16)[:, ::2]
    tensor = as_computed(first[0], torch.bfloat16)[:7]
    del first
    assert address(memory.array((2, 64, D), BFLOAT16)) != place  # the view lives
    del view
    assert address(memory.array((2, 64, D), BFLOAT16)) != place  # and so does the tensor
    del tensor
    again = [memory.array((2, 60, D), BFLOAT16) for _ in range(2)]
    assert place in map(address, again)
    assert again[0].shape == (2, 60, D)
    assert not np.shares_memory(*again)


def test_at_most_so_much_is_kept():
    memory = RowMemory(most_bytes=1 << 20)
    held = [memory.array((n, 64, D), BFLOAT16) for n in (2, 2, 2, 2, 2)]
    del held
    memory.array((16, 64, D), BFLOAT16)  # 2 MiB
    assert sum(map(len, memory._free)) <= 1 << 20


def test_rows_stay_when_there_are_more_than_expected():
    rows = np.random.default_rng(0).integers(0, 1 << 16, (3, 500, D)).astype(np.uint16)
    kept = KeptRows(3, 40, D, torch.bfloat16, RowMemory())
    for start, stop in ((0, 40), (40, 41), (41, 41), (41, 300), (300, 500)):
        kept.room(9)[...] = 7  # a step that was planned and never ran
        as_computed(kept.room(stop - start), torch.bfloat16)[...] = as_computed(rows[:, start:stop], torch.bfloat16)
        kept.take(stop - start)
    assert len(kept) == 500
    for number in range(3):
        assert np.array_equal(kept.of(number), rows[number])
