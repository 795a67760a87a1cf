"""The queue in a folder: the contract, many processes, and kills."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.queue_contract import Clock, QueueContract

from millpond.store.errors import InvalidInput
from millpond.store.queue import FolderQueue


class TestFolderQueue(QueueContract):
    @pytest.fixture
    def queue(self, tmp_path: Path, clock: Clock) -> FolderQueue:
        return FolderQueue(tmp_path / "queue", now=lambda: clock[0])


WORK = """
import os, sys, time
from pathlib import Path
from millpond.store.queue import FolderQueue
folder, start = Path(sys.argv[1]), float(sys.argv[2])
queue = FolderQueue(folder)
time.sleep(max(start - time.time(), 0))
while (job := queue.claim(str(os.getpid()), {"n"}, 60)) is not None:
    with (folder / "log").open("a") as log:
        log.write(f"{job.spec['n']}\\n")
    queue.finish(job, {})
"""


def test_many_processes_share_a_folder(tmp_path: Path) -> None:
    queue = FolderQueue(tmp_path)
    for number in range(60):
        queue.submit("n", {"n": number})
    command = [sys.executable, "-c", WORK, str(tmp_path), str(time.time() + 2)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(60))
    assert {job.state for job in queue.jobs()} == {"finished"}


HANG = """
import sys, time
from millpond.store.queue import FolderQueue
assert FolderQueue(sys.argv[1]).claim("hung", {"n"}, 0.2) is not None
print("claimed", flush=True)
time.sleep(600)
"""


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    queue = FolderQueue(tmp_path)
    job_id = queue.submit("n", {"n": 0})
    with subprocess.Popen([sys.executable, "-c", HANG, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        process.kill()
    time.sleep(0.3)
    again = queue.claim("b", {"n"}, 60)
    assert again is not None
    assert (again.id, again.attempts) == (job_id, 2)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="file"):
        FolderQueue(tmp_path / "file")
