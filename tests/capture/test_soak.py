"""The soak, and its short version."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.capture.soak import Soak

pytestmark = pytest.mark.slow


def test_random_traffic_with_a_kill_keeps_every_row_right(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=1)
    soak.run(1, round_seconds=10)
    assert soak.counts["SIGKILLs"] == 1
    assert soak.counts["rows checked"] > 500
    assert soak.counts["values read"] > 500
    assert (
        min(soak.counts[kind] for kind in ("captured", "read", "plain", "steered", "steered and captured", "n > 1")) > 0
    )


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_half_an_hour_of_random_traffic_with_kills(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=int(time.time()))
    soak.run(1800, round_seconds=60)
    print(
        f"seed {soak.seed}: {dict(soak.counts)}, worst relative error {soak.worst:.1e}, of reads {soak.worst_read:.1e}"
    )
    assert soak.counts["SIGKILLs"] >= 5
    assert soak.counts["preemptions"] > 0
