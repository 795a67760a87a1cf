"""A sweep reads every byte of a hook once a pass, however many labels and strengths share it."""

from collections import Counter

import numpy as np
import pytest
from tests.analysis.conftest import HOOKS, D

from millpond.analysis import LogisticProbe
from millpond.store import rows as store_rows


@pytest.fixture
def read(monkeypatch):
    """Bytes read of each hook since the start of the test, by hook and row."""
    counted = Counter()
    real = store_rows.read_rows

    def counting(folder, array, start, stop, out=None):
        found = real(folder, array, start, stop, out)
        if folder.name in HOOKS:
            counted[folder.name] += found.nbytes
        return found

    monkeypatch.setattr(store_rows, "read_rows", counting)
    return counted


@pytest.mark.parametrize("labels", [["inside"], ["inside", "deep", "even"]])
@pytest.mark.parametrize("strengths", [[1.0], [0.01, 1.0, 100.0]])
def test_every_byte_is_read_once_a_pass(parts, read, labels, strengths):
    sources = {
        "inside": "inside",
        "deep": lambda part: part.labels["depth"] > 2,
        "even": lambda part: part.tokens["token_id"] % 2 == 0,
    }
    swept = LogisticProbe(progress=False).sweep(
        *parts, "*", {label: sources[label] for label in labels}, C=strengths, n_bootstrap=10, controls=("shuffled",)
    )
    assert len(swept.probes) == len(HOOKS) * len(labels) * len(strengths)

    def stored(part):
        """A view of some prompts reads from the first of them to the last."""
        rows = sum(piece.stop - piece.start for span in part.plan.spans for piece in span)
        return rows * D * np.dtype(np.float32).itemsize

    train, test = map(stored, parts)
    for hook in HOOKS:
        probes = [
            probe for fitted in (swept.probes, swept.controls) for (of, *_), probe in fitted.items() if of == hook
        ]
        steps = max(int(probe.n_iter_[0]) for probe in probes)
        # a first look (one block, here all rows), the moments, each step, and the scores of the test part
        assert read[hook] == train * (1 + 1 + steps) + test
