"""A worker's lease while it is busy with something long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from millpond.capture.worker_jobs import _heartbeats
from millpond.store.errors import LeaseLost
from millpond.store.queue import FolderQueue


def test_a_lease_outlasts_long_work_and_its_loss_is_told(tmp_path: Path) -> None:
    queue = FolderQueue(tmp_path)
    queue.submit("capture", {})
    claimed = queue.claim("a", {"capture"}, 2)
    assert claimed is not None
    with _heartbeats(queue, claimed, 2) as beat:
        beat(5)
        time.sleep(3)
        assert queue.claim("b", {"capture"}, 2) is None
        assert queue.get(claimed.id).progress == {"prompts": 5}
    time.sleep(2.2)
    second = queue.claim("b", {"capture"}, 60)
    assert second is not None
    with _heartbeats(queue, claimed, 2) as beat:
        time.sleep(1)
        with pytest.raises(LeaseLost):
            beat(6)
    queue.finish(second, {})
