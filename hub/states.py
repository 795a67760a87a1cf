"""What a client is told of a job's state, from the job's history and its reviews; a pure function of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millpond.hub.answers import Review
from millpond.hub.body import PROGRESS_STEPS, JobStatus, TrainingCurve
from millpond.hub.policy import Charges
from millpond.hub.queue import Event, ProjectJob
from millpond.hub.slots import slot_end_ms, slot_of
from millpond.store.errors import TooFewPrompts


def selects_too_few(job: ProjectJob) -> bool:
    """Whether it failed because it selects fewer restricted prompts than a result may show, or none."""
    return (job.error or "").startswith(f"{TooFewPrompts.__name__}:")


def state_at(job: ProjectJob, history: Sequence[Event], reviews: Sequence[Review], ms: int) -> JobStatus:
    """The state `ms` after submission.

    A job that has ended and waits for a reviewer is `in_review` until every answer is decided; then `done`, or `refused`
    if no answer may leave.
    """
    now = job.submitted + ms / 1000
    last = next((event for event in reversed(history) if event.at <= now), None)
    if last is None or last.state == "queued":
        return JobStatus("queued")
    if last.state == "claimed":
        share = last.progress.get("share", 0)
        step = int(share * PROGRESS_STEPS) if isinstance(share, (int, float)) else 0
        return JobStatus("running", min(max(step, 0), PROGRESS_STEPS - 1))
    if last.state == "failed" and selects_too_few(job):
        return JobStatus("refused")
    if last.state != "finished":
        return JobStatus(last.state)
    if any(review.decided is None or review.decided > now for review in reviews):
        return JobStatus("in_review")
    # counted when the job ended: answers, and those that the rules refuse whatever was released before
    result = job.result or {}
    left = int(result.get("answers", 0)) - int(result.get("refused", 0))
    left -= sum(review.state == "denied" for review in reviews)
    return JobStatus("done" if left > 0 or not result.get("answers") else "refused")


def curve_at(job: ProjectJob, history: Sequence[Event], ms: int) -> TrainingCurve:
    """What a training has reached `ms` after submission; without points for jobs that train nothing, or may not show it."""
    now = job.submitted + ms / 1000
    told: Any = next((event.progress.get("curve") for event in reversed(history) if event.at <= now), None)
    return TrainingCurve(tuple(int(code) for code in told or ()))


def settled_at(
    job: ProjectJob, history: Sequence[Event], reviews: Sequence[Review], elapsed_ms: int, charges: Charges
) -> JobStatus:
    """The state at the end of the last slot that has ended `elapsed_ms` after submission."""
    return state_at(job, history, reviews, slot_end_ms(slot_of(elapsed_ms, charges), charges))
