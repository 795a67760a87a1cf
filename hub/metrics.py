"""The hub's state in Prometheus' text format, read from its database whenever it is asked for.

For the vault's own monitoring: what is waiting and what was released depends on what people do with the model's internals.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import sqlalchemy as sa

from millpond.hub.chain import pairs
from millpond.hub.policy import SCOPES, Policy
from millpond.hub.tables import ACCOUNTS, ANSWERS, CAPS, HEAD, JOBS, REVIEWS
from millpond.store.metrics import Sample, exposition

HELP = {
    "millpond_jobs": "Jobs by kind and state.",
    "millpond_job_oldest_waiting_seconds": "Age of the oldest job of a kind that waits.",
    "millpond_jobs_silent": "Claimed jobs whose lease ran out: their executor or worker is gone.",
    "millpond_answers": "Answers of finished jobs by what the rules said.",
    "millpond_reviews_waiting": "Answers that wait for a reviewer.",
    "millpond_ledger_entries": "Entries of the ledger.",
    "millpond_budget_spent_bytes": "Bytes that left, by model: ever.",
    "millpond_budget_cap_bytes": "Most bytes that may leave, by model and scope.",
}


def hub_metrics(engine: sa.Engine, policy: Policy, *, now: float | None = None) -> str:
    """The metrics, from the database of `open_database`, in the text exposition format 0.0.4."""
    with engine.execution_options(write=False).connect() as connection:
        samples = [
            *_jobs(connection, time.time() if now is None else now),
            *_answers(connection),
            *_budgets(connection, policy),
        ]
    return exposition(HELP, samples)


def _jobs(connection: sa.Connection, now: float) -> Iterator[Sample]:
    count = sa.func.count()
    for kind, state, number in connection.execute(
        sa.select(JOBS.c.kind, JOBS.c.state, count).group_by(JOBS.c.kind, JOBS.c.state).order_by(JOBS.c.kind)
    ):
        yield "millpond_jobs", f'{{kind="{kind}",state="{state}"}}', number
    waiting = sa.select(JOBS.c.kind, sa.func.min(JOBS.c.submitted)).where(JOBS.c.state == "queued")
    for kind, submitted in connection.execute(waiting.group_by(JOBS.c.kind).order_by(JOBS.c.kind)):
        yield "millpond_job_oldest_waiting_seconds", f'{{kind="{kind}"}}', max(0.0, now - submitted)
    silent = sa.select(count).select_from(JOBS).where(JOBS.c.state == "claimed", JOBS.c.lease_until < now)
    yield "millpond_jobs_silent", "", connection.scalar(silent) or 0


def _answers(connection: sa.Connection) -> Iterator[Sample]:
    count = sa.func.count()
    query = sa.select(ANSWERS.c.outcome, count).group_by(ANSWERS.c.outcome).order_by(ANSWERS.c.outcome)
    for outcome, number in connection.execute(query):
        yield "millpond_answers", f'{{outcome="{outcome}"}}', number
    waiting = sa.select(count).select_from(REVIEWS).where(REVIEWS.c.state == "waiting")
    yield "millpond_reviews_waiting", "", connection.scalar(waiting) or 0


def _budgets(connection: sa.Connection, policy: Policy) -> Iterator[Sample]:
    yield "millpond_ledger_entries", "", connection.scalar(sa.select(HEAD.c.seq)) or 0
    spent = pairs(connection, sa.select(ACCOUNTS.c.name, ACCOUNTS.c.spent))
    caps = pairs(connection, sa.select(CAPS.c.account, CAPS.c.bytes))
    for model in policy.models:
        yield "millpond_budget_spent_bytes", f'{{model="{model}"}}', spent.get(f"lifetime:{model}:", 0)
        for scope in SCOPES:
            if f"{scope}:{model}" in caps:
                yield "millpond_budget_cap_bytes", f'{{model="{model}",scope="{scope}"}}', caps[f"{scope}:{model}"]
