"""Position filters against a brute-force reading of their definition."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.store.positions import PositionFilter

KINDS = st.sampled_from(["all", "prompt", "generated", "last"]) | st.lists(st.integers(-8, 12), min_size=1).map(tuple)


def wanted(chosen: PositionFilter, n_prompt: int, position: int) -> bool:
    if position < chosen.first_position:
        return False
    match chosen.positions:
        case "all":
            return True
        case "prompt":
            return position < n_prompt
        case "generated":
            return position >= n_prompt
        case "last":
            return position == n_prompt - 1
    return position in chosen.positions or position - n_prompt in [p for p in chosen.positions if p < 0]


@given(KINDS, st.integers(0, 5), st.integers(1, 8), st.integers(0, 10), st.integers(0, 10))
def test_select_equals_its_definition(kind: object, first: int, n_prompt: int, start: int, length: int) -> None:
    chosen = PositionFilter.model_validate({"positions": kind, "first_position": first})
    expected = [p for p in range(start, start + length) if wanted(chosen, n_prompt, p)]
    assert chosen.select(n_prompt, start, start + length).tolist() == expected


@given(KINDS, st.integers(1, 8), st.lists(st.integers(1, 6), max_size=5))
def test_selecting_step_by_step_selects_the_same(kind: object, n_prompt: int, steps: list[int]) -> None:
    chosen = PositionFilter.model_validate({"positions": kind})
    edges = np.cumsum([0, *steps]).tolist()
    parts = [chosen.select(n_prompt, a, b) for a, b in pairwise(edges)]
    assert np.concatenate([np.empty(0, np.int32), *parts]).tolist() == chosen.select(n_prompt, 0, edges[-1]).tolist()


@pytest.mark.parametrize(("positions", "beyond"), [((0, 4), None), ((5,), 5), ((-3,), None), ((-4,), -4)])
def test_out_of_reach_finds_a_position_that_cannot_be(positions: tuple[int, ...], beyond: int | None) -> None:
    assert PositionFilter(positions=positions).out_of_reach(3, 5) == beyond
