"""The hub's metrics, from a database in which known things happened."""

from __future__ import annotations

import re

from millpond.hub.database import open_database
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.metrics import hub_metrics
from millpond.hub.queue import SqlQueue


def samples(text):
    return dict(re.findall(r"^(millpond_\S+) (\S+)$", text, flags=re.M))


def test_jobs_and_budgets_are_counted(database, policy):
    clock = [1000.0]
    engine = open_database(database)
    queue = SqlQueue(engine, now=lambda: clock[0])
    for number in range(3):
        clock[0] = 1000.0 + number
        queue.submit("probe", {"number": number}, project="p", user=f"u{number}")
    queue.submit("sweep", {}, project="p", user="u0")
    claimed = queue.claim("somebody", ["probe"], lease_seconds=5)
    queue.finish(claimed, {})
    queue.claim("somebody else", ["probe"], lease_seconds=5)
    ledger = Ledger(database, policy)
    (model, *_) = policy.models
    ledger.charge(Payer("ada", "p", (model,)), 123, what="test")
    ledger.close()
    found = samples(hub_metrics(engine, policy, now=1010.0))
    assert found['millpond_jobs{kind="probe",state="finished"}'] == "1"
    assert found['millpond_jobs{kind="probe",state="claimed"}'] == "1"
    assert found['millpond_jobs{kind="probe",state="queued"}'] == "1"
    assert found['millpond_job_oldest_waiting_seconds{kind="probe"}'] == "8"
    assert found["millpond_jobs_silent"] == "1"  # its lease ended at 1007
    assert found["millpond_reviews_waiting"] == "0"
    assert found[f'millpond_budget_spent_bytes{{model="{model}"}}'] == "123"
    assert int(found[f'millpond_budget_cap_bytes{{model="{model}",scope="user_week"}}']) == policy.cap(
        model, "user_week"
    )
    assert int(found["millpond_ledger_entries"]) >= 1
    engine.dispose()
