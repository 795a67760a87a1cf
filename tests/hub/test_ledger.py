from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond.hub.chain import entry_hash
from millpond.hub.database import open_database
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import ModelPolicy, Policy
from millpond.store.errors import BudgetSpent, InvalidInput, LedgerCorrupt

ADA = Payer("ada", "deception", ("tiny",))
CAP = 1000  # tiny: 8e6 parameters, 4e6 bytes, 2.5e-4 of them
NOTICE = 17


def spent(ledger, payer=ADA):
    return [balance.spent for balance in ledger.balances(payer)]


def test_caps_are_the_fractions_of_half_a_byte_a_parameter(database, policy):
    ledger = Ledger(database, policy)
    assert [balance.cap for balance in ledger.balances(Payer("ada", "p", ("m",)))] == [10**6, 4 * 10**7, 4 * 10**8]
    assert [balance.cap for balance in ledger.balances(Payer("ada", "p", ("open",)))] == [None] * 3
    ledger.close()


def test_a_charge_counts_in_every_budget_of_every_model_and_others_keep_theirs(database, policy):
    ledger = Ledger(database, policy)
    ledger.charge(Payer("ada", "p", ("m", "open")), 100, what="x")
    ledger.charge(Payer("bob", "p", ("m",)), 30, what="x")
    ledger.charge(Payer("ada", "q", ("m",)), 7, what="x")
    assert spent(ledger, Payer("ada", "p", ("m", "open"))) == [107, 130, 137, 100, 100, 100]
    found = ledger.verify()
    assert (found.entries, found.charged, found.head) == (
        6 + 3,
        137,
        ledger.head()[1],
    )  # six caps: public models have none
    ledger.close()


def test_a_budget_closes_at_its_cap_and_stays_closed_for_smaller_charges(database, policy):
    ledger = Ledger(database, policy)
    ledger.charge(ADA, 900, what="x")
    with pytest.raises(BudgetSpent):
        ledger.charge(ADA, CAP - 900 - NOTICE + 1, what="x")  # the notice would not fit any more
    assert spent(ledger)[0] == 900 + NOTICE
    with pytest.raises(BudgetSpent):
        ledger.charge(ADA, 1, what="x")  # or each refusal would say how long the answer was
    assert spent(ledger)[0] == 900 + NOTICE
    assert ledger.charge(Payer("bob", "deception", ("tiny",)), 50, what="x").charged == 50
    assert ledger.verify().charged == 900 + NOTICE + 50
    ledger.close()


def test_a_week_ends_and_lifetime_does_not(database, policy):
    now = [datetime(2026, 11, 22, 23, 59, tzinfo=UTC)]
    ledger = Ledger(database, policy, now=lambda: now[0])
    ledger.charge(ADA, 600, what="x")
    now[0] += timedelta(minutes=2)  # Monday
    ledger.charge(ADA, 600, what="x")
    assert spent(ledger) == [600, 1200, 1200]
    ledger.close()


def test_alerts_are_written_once_at_50_80_and_95_percent(database, policy):
    ledger = Ledger(database, policy)
    for _ in range(19):
        ledger.charge(ADA, 51, what="x")
    found = [(a["percent"], a["spent"]) for a in ledger.alerts() if a["account"].startswith("user_week")]
    assert found == [(50, 510), (80, 816), (95, 969)]
    ledger.close()


def test_one_person_lowers_a_cap_and_two_raise_it(database, policy):
    ledger = Ledger(database, policy)
    assert ledger.propose_cap("user_week:tiny", 500, by="ada") is None
    assert ledger.balances(ADA)[0].cap == 500
    change = ledger.propose_cap("user_week:tiny", 900, by="ada")
    assert ledger.waiting() == (change,)
    with pytest.raises(InvalidInput, match="somebody else"):
        ledger.approve_cap(change.seq, by="ada")
    assert ledger.balances(ADA)[0].cap == 500
    ledger.approve_cap(change.seq, by="bob")
    assert ledger.balances(ADA)[0].cap == 900
    with pytest.raises(InvalidInput, match="no cap that still waits"):
        ledger.approve_cap(change.seq, by="bob")
    with pytest.raises(InvalidInput, match="from 0 to 4,000"):  # the floor: 1e-3 of 4e6 bytes
        ledger.propose_cap("user_week:tiny", 4001, by="ada")
    with pytest.raises(InvalidInput, match="no capped budget"):
        ledger.propose_cap("user_week:open", 10, by="ada")
    ledger.close()


def test_a_raised_cap_opens_a_closed_budget_of_one_user(database, policy):
    ledger = Ledger(database, policy)
    with pytest.raises(BudgetSpent):
        ledger.charge(ADA, 2000, what="x")
    account = ledger.accounts(ADA)[0].name
    ledger.approve_cap(ledger.propose_cap(account, 3000, by="bob").seq, by="eve")
    assert ledger.charge(ADA, 2000, what="x").charged == 2000
    assert ledger.balances(Payer("bob", "p", ("tiny",)))[0].cap == CAP
    ledger.verify()
    ledger.close()


def test_a_policy_file_alone_lowers_caps_and_does_not_raise_them(database, policy):
    Ledger(database, policy).close()
    for fraction, cap in ((1e-3, 1000), (1e-4, 400), (2.5e-4, 400)):
        changed = policy.model_copy(update={"budgets": policy.budgets.model_copy(update={"user_week": fraction})})
        ledger = Ledger(database, changed)
        assert ledger.balances(ADA)[0].cap == cap
        ledger.close()


@pytest.mark.parametrize(
    "change", ["UPDATE ledger_entries SET detail = '{}'", "DELETE FROM ledger_entries", "DELETE FROM ledger_bodies"]
)
def test_the_database_refuses_to_change_entries(database, policy, change):
    ledger = Ledger(database, policy)
    with ledger.writing() as writer:
        writer.charge(ADA, 10, what="x", body=b"x", key="k")
    engine = open_database(database)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(sa.text(change))
    engine.dispose()
    ledger.close()


def test_what_is_kept_under_a_key_is_what_was_sent(database, policy):
    ledger = Ledger(database, policy)
    with ledger.writing() as writer:
        writer.charge(ADA, 20, what="x", body=b"first", key="k")
    assert ledger.known("k").body == b"first"
    assert ledger.known("k").charged == 0
    assert ledger.known("other") is None
    ledger.verify()
    ledger.close()


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "a\nb"])
def test_names_that_could_be_mistaken_for_others_are_refused(name):
    for fields in ((name, "p", ("m",)), ("u", name, ("m",)), ("u", "p", (name,))):
        with pytest.raises(InvalidInput):
            Payer(*fields)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://h/x", "nonsense"])
def test_databases_that_cannot_hold_a_ledger_are_refused(url, policy):
    with pytest.raises(InvalidInput, match="sqlite:///FILE"):
        Ledger(url, policy)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 400), min_size=1, max_size=25))
def test_what_is_sent_never_exceeds_the_cap(counts, new_database, policy):
    """Against a plain sum in Python."""
    ledger = Ledger(new_database(), policy)
    total, closed = 0, False
    for count in counts:
        try:
            total += ledger.charge(ADA, count, what="x").charged
            assert not closed
        except BudgetSpent:
            assert closed or total + count + NOTICE > CAP
            closed = True
    assert spent(ledger) == [total + NOTICE * closed] * 3
    assert total + NOTICE * closed <= CAP
    assert ledger.verify().charged == total + NOTICE * closed
    ledger.close()


WORKER = """
import os, random, sys
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import ModelPolicy, Policy
from millpond.store.errors import BudgetSpent
url, out, seed = sys.argv[1:4]
ledger = Ledger(url, Policy(models={"tiny": ModelPolicy(parameters=80_000_000)}))
rng = random.Random(int(seed))
handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
print("ready", flush=True)
try:
    while True:
        sent = ledger.charge(Payer(rng.choice("ab"), "p", ("tiny",)), rng.randrange(20, 200), what="x")
        os.write(handle, b"%d %d\\n" % (sent.seq, sent.charged))   # what leaves
except BudgetSpent:
    print("closed", flush=True)
"""


def test_processes_killed_at_random_never_send_above_the_cap_or_without_a_record(database, tmp_path):
    cap = 10_000  # a user's week: two users, so 20,000 for the project, whose own cap is 400,000
    rng, processes, files = random.Random(0), [], []
    deadline = time.monotonic() + 240
    closed = 0
    while closed < 2 and time.monotonic() < deadline:
        while len(processes) < 3:
            files.append(tmp_path / f"sent-{len(files)}")
            command = [sys.executable, "-c", WORKER, database, files[-1], str(len(files))]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        time.sleep(rng.uniform(0.5, 2) if len(files) < 5 else 2)
        victim = processes.pop(rng.randrange(3))
        victim.send_signal(signal.SIGKILL)
        closed += "closed" in victim.communicate()[0]
    for process in processes:
        process.kill()
        process.communicate()
    sent = [tuple(map(int, line.split())) for file in files if file.exists() for line in file.read_text().splitlines()]
    ledger = Ledger(database, Policy(models={"tiny": ModelPolicy(parameters=80_000_000)}))
    charged = ledger.verify().charged
    engine = open_database(database)
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT seq, detail FROM ledger_entries WHERE kind = 'charge'")).all()
    engine.dispose()
    recorded = {seq: json.loads(detail)["bytes"] for seq, detail in rows}
    assert len(sent) > 50
    assert len({seq for seq, _ in sent}) == len(sent)
    assert all(recorded[seq] == count for seq, count in sent)  # nothing left without a record
    assert sum(count for _, count in sent) <= charged <= 2 * cap
    assert max(balance.spent for user in "ab" for balance in ledger.balances(Payer(user, "p", ("tiny",)))[:1]) <= cap
    assert closed >= 2
    ledger.close()


def open_for_tampering(url):
    """As somebody with the database's own rights: the triggers fall first."""
    engine = open_database(url)
    with engine.begin() as connection:
        for table in ("ledger_entries", "ledger_bodies", "ledger_shown"):
            if engine.dialect.name == "sqlite":
                for change in ("update", "delete"):
                    connection.execute(sa.text(f"DROP TRIGGER {table}_no_{change}"))
            else:
                connection.execute(sa.text(f"DROP TRIGGER {table}_append_only ON {table}"))
    return engine


TAMPERING = {
    "lower a charge": [
        "UPDATE ledger_entries SET detail = replace(detail, '\"bytes\":300', '\"bytes\":3') WHERE kind = 'charge'"
    ],
    "lower a total": ["UPDATE ledger_accounts SET spent = 3"],
    "reopen": ["UPDATE ledger_accounts SET closed_at = 999999"],
    "raise a cap": ["UPDATE ledger_caps SET bytes = 999999999"],
    "forget an entry": ["DELETE FROM ledger_entries WHERE seq = 8"],
    "forget the last": ["DELETE FROM ledger_entries WHERE seq = (SELECT max(seq) FROM ledger_entries)"],
    "other bytes": ["UPDATE ledger_bodies SET body = CAST('other' AS KIND)"],
    "other cohorts": ["UPDATE ledger_shown SET cohorts = CAST('[]' AS KIND)"],
}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampering_is_found(database, policy, how):
    ledger = Ledger(database, policy)
    with ledger.writing() as writer:
        writer.charge(ADA, 300, what="x", body=b"body", key="k", shown=("run", b"[null,[]]"))
    ledger.charge(ADA, 300, what="x")
    ledger.charge(ADA, 100, what="x")
    ledger.verify()
    engine = open_for_tampering(database)
    kind = "BLOB" if engine.dialect.name == "sqlite" else "BYTEA"
    with engine.begin() as connection:
        for statement in TAMPERING[how]:
            connection.exec_driver_sql(statement.replace("KIND", kind))
    with pytest.raises(LedgerCorrupt):
        ledger.verify()
    engine.dispose()
    ledger.close()


def test_a_ledger_rewritten_whole_is_found_by_a_head_noted_elsewhere(database, policy):
    ledger = Ledger(database, policy)
    for count in (300, 300, 100):
        ledger.charge(ADA, count, what="x")
    seq, digest = ledger.head()
    engine = open_for_tampering(database)
    with engine.begin() as connection:  # a consistent chain in which less was spent
        rows = connection.execute(sa.text("SELECT seq, at, kind, detail FROM ledger_entries ORDER BY seq")).all()
        before = "0" * 64
        for number, at, kind, detail in rows:
            text = detail.replace('"bytes":300,', '"bytes":3,').replace('"spent":600', '"spent":6')
            new = entry_hash(number, at, kind, text, before)
            connection.execute(
                sa.text("UPDATE ledger_entries SET detail=:d, previous=:p, hash=:h WHERE seq=:s"),
                {"d": text, "p": before, "h": new, "s": number},
            )
            before = new
        connection.execute(sa.text("UPDATE ledger_head SET hash = :h"), {"h": before})
        connection.execute(sa.text("UPDATE ledger_accounts SET spent = 106"))
    assert ledger.verify().charged == 106  # by itself it looks whole
    with pytest.raises(LedgerCorrupt, match="rewritten"):
        ledger.verify({seq: digest})
    with pytest.raises(LedgerCorrupt, match="was noted earlier"):
        ledger.verify({seq + 5: digest})
    engine.dispose()
    ledger.close()
