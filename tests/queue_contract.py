"""What every job queue promises: a queue is tested by a subclass whose fixture `queue` makes an empty one."""

from __future__ import annotations

import pytest

from millpond.store.errors import JobNotFound, LeaseLost
from millpond.store.queue import JobQueue

Clock = list[float]


class QueueContract:
    @pytest.fixture
    def clock(self) -> Clock:
        """What the queue takes for the time: its first element."""
        return [1000.0]

    def test_jobs_are_claimed_once_oldest_first_and_by_kind(self, queue: JobQueue, clock: Clock) -> None:
        ids = []
        for kind, number in [("capture", 1), ("other", 2), ("capture", 3)]:
            ids.append(queue.submit(kind, {"number": number}))
            clock[0] += 1
        first = queue.claim("a", {"capture"}, 60)
        second = queue.claim("b", {"capture"}, 60)
        assert first is not None
        assert second is not None
        assert [(first.id, first.spec), (second.id, second.spec)] == [(ids[0], {"number": 1}), (ids[2], {"number": 3})]
        assert queue.claim("c", {"capture"}, 60) is None
        other = queue.claim("c", {"capture", "other"}, 60)
        assert other is not None
        assert (other.id, other.worker, other.attempts) == (ids[1], "c", 1)

    def test_a_job_is_claimed_by_a_worker_of_its_model_only(self, queue: JobQueue, clock: Clock) -> None:
        ids = {}
        for model in ("/models/a:auto", "/models/b:auto", "", "/models/nobody:auto"):
            ids[model] = queue.submit("capture", {}, model=model)
            clock[0] += 1
        of_b = {"/models/b:auto", "b:auto"}  # two names of one model
        first = queue.claim("b", {"capture"}, 30, of_b)
        second = queue.claim("b", {"capture"}, 30, of_b)
        assert first is not None
        assert second is not None
        assert (first.id, first.model) == (ids["/models/b:auto"], "/models/b:auto")
        assert (second.id, second.model) == (ids[""], "")
        assert queue.claim("b", {"capture"}, 30, of_b) is None
        clock[0] += 31  # an ended lease is for workers of the model too
        assert queue.claim("none", {"capture"}, 30) == queue.get(ids[""])
        third = queue.claim("a", {"capture"}, 30, {"/models/a:auto"})
        assert third is not None
        assert third.id == ids["/models/a:auto"]
        assert queue.claim("a", {"capture"}, 30, {"/models/a:auto"}) is None
        again = queue.claim("c", {"capture"}, 30, of_b)
        assert again is not None
        assert (again.id, again.attempts) == (first.id, 2)
        waits = queue.get(ids["/models/nobody:auto"])
        assert (waits.state, waits.attempts, waits.error) == ("queued", 0, None)

    def test_ends_are_kept_and_final(self, queue: JobQueue) -> None:
        good, bad = queue.submit("capture", {}), queue.submit("capture", {})
        claims = {job.id: job for job in (queue.claim("a", {"capture"}, 60), queue.claim("a", {"capture"}, 60)) if job}
        queue.heartbeat(claims[good], 60, {"prompts": 7})
        assert (queue.get(good).state, queue.get(good).progress) == ("claimed", {"prompts": 7})
        queue.finish(claims[good], {"rows": 9})
        queue.fail(claims[bad], "no such model")
        assert (queue.get(good).state, queue.get(good).result) == ("finished", {"rows": 9})
        assert (queue.get(bad).state, queue.get(bad).error) == ("failed", "no such model")
        for end in (lambda: queue.finish(claims[bad], {}), lambda: queue.fail(claims[good], "late")):
            with pytest.raises(LeaseLost):
                end()
        assert queue.get(good).state == "finished"
        assert queue.claim("b", {"capture"}, 60) is None
        with pytest.raises(JobNotFound, match="nowhere"):
            queue.get("nowhere")
        with pytest.raises(JobNotFound):
            queue.get("../lock")

    def test_a_lease_that_ran_out_is_claimed_again_and_the_old_claim_can_do_nothing(
        self, queue: JobQueue, clock: Clock
    ) -> None:
        job_id = queue.submit("capture", {})
        old = queue.claim("dead", {"capture"}, 30)
        assert old is not None
        clock[0] += 29
        queue.heartbeat(old, 30, {})
        clock[0] += 29  # renewed: 58 s after the claim it still holds
        assert queue.claim("b", {"capture"}, 30) is None
        clock[0] += 2
        new = queue.claim("b", {"capture"}, 30)
        assert new is not None
        assert (new.id, new.attempts, new.worker) == (job_id, 2, "b")
        for late in (
            lambda: queue.heartbeat(old, 30, {}),
            lambda: queue.finish(old, {"rows": 1}),
            lambda: queue.fail(old, "x"),
        ):
            with pytest.raises(LeaseLost, match="claim 1 of 'dead'"):
                late()
        queue.finish(new, {"rows": 2})
        assert queue.get(job_id).result == {"rows": 2}

    def test_a_job_that_kills_its_workers_fails_in_the_end(self, queue: JobQueue, clock: Clock) -> None:
        job_id = queue.submit("capture", {})
        for _ in range(5):
            assert queue.claim("victim", {"capture"}, 10) is not None
            clock[0] += 11
        assert queue.claim("victim", {"capture"}, 10) is None
        assert queue.get(job_id).state == "failed"
        assert "5 times" in str(queue.get(job_id).error)
