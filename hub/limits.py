"""How many jobs users and projects may have, and how long one may run."""

from __future__ import annotations

from dataclasses import dataclass

from millpond.hub.policy import Policy
from millpond.hub.settings import Settings


@dataclass(frozen=True)
class Limits:
    """How many jobs a user and a project may have; the vault's own jobs, of user "", are not limited."""

    queued: int = 200
    """Of a user, waiting at once; `submit` raises TooMany beyond."""
    running: int = 4
    """Of a user, under way at once; further ones wait."""
    project_queued: int = 800
    """Of a project, waiting at once."""
    project_running: int = 16
    """Of a project, under way at once."""
    seconds: float | None = None
    """How long one claim of a job that is submitted here may last."""


def job_limits(settings: Settings, policy: Policy) -> Limits:
    """How many jobs users and projects may have, and how long one may run."""
    return Limits(
        settings.max_queued,
        settings.max_running,
        settings.max_project_queued,
        settings.max_project_running,
        policy.jobs.seconds,
    )
