"""What `millpond doctor` says of an installation that is whole, and of each thing that is not."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.cluster.certificates import Authority
from tests.hub.test_ledger import open_for_tampering
from tests.queue_serving import serving

from millpond.cli import main
from millpond.hub import doctor as doctor_module
from millpond.hub.database import newest_revision, open_database
from millpond.hub.doctor import _expiry, _ledger
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.hub.tables import ENTRIES
from millpond.store.errors import LedgerCorrupt
from millpond.store.http_queue import TOKEN_VARIABLE
from millpond.store.lake import open_lake
from millpond.store.objects import Storage

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"


@pytest.fixture
def folder(tmp_path):
    """An installation whose lake is a folder, with one Dask worker of its own."""
    open_lake(tmp_path / "lake", create=True)
    open_database(f"sqlite:///{tmp_path / 'hub.db'}").dispose()
    (tmp_path / "policy.toml").write_text("[models.m]\nparameters = 8_000_000_000\n")
    (tmp_path / "gateway.toml").write_text(
        f'lake = "lake"\ndatabase = "sqlite:///{tmp_path / "hub.db"}"\npolicy = "policy.toml"\ntokens = "tokens.toml"\n'
        '[models.m]\npath = "nowhere"\n'
    )
    return tmp_path


def doctor(capsys, *flags):
    """The exit code, and the text of each check with whether it went well."""
    code = main(["doctor", *map(str, flags)])
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines:
        name, _, text = line[5:].partition(": ")
        found[name] = (line[:5].strip() == "ok", text)
    assert code == int(not all(ok for ok, _ in found.values()))
    return found


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_whole_installation(folder, capsys, monkeypatch):
    token, worker = new_worker("gpu-1", ["capture"])
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    change(folder / "gateway.toml", "[models.m]", "workers = 1\n[models.m]")
    with serving(create_queue_app(SqlQueue(open_database(f"sqlite:///{folder / 'hub.db'}")), (worker,))) as address:
        found = doctor(capsys, "--gateway", folder / "gateway.toml", "--queue", address, "--model", MODEL)
        monkeypatch.setenv(TOKEN_VARIABLE, "another")
        refused = doctor(capsys, "--queue", address)
    assert list(found) == ["this host", "settings", "lake", "clock", "database", "ledger", "cluster", "model", "queue"]
    assert all(ok for ok, _ in found.values()), found
    assert "vLLM 0.3" in found["this host"][1]
    assert f"schema {newest_revision()}" in found["database"][1]
    assert "1 workers ran a task" in found["cluster"][1]
    assert "6 layers" in found["model"][1]
    assert (refused["queue"][0], "millpond queue token" in refused["queue"][1]) == (False, True)


def test_each_thing_that_is_wrong_is_named_with_a_remedy(folder, capsys, monkeypatch):
    flags = ("--gateway", folder / "gateway.toml")
    with sqlite3.connect(folder / "hub.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0002'")
    certificate, key = Authority(folder, days=1).issue("gateway", "127.0.0.1")
    change(folder / "gateway.toml", "[models.m]", f'certificate = "{certificate}"\nkey = "{key}"\n[models.m]')
    change(folder / "gateway.toml", "[models.m]", 'origin = "https://127.0.0.1:8910"\n[models.m]')
    monkeypatch.setattr(Storage, "now", lambda self: datetime.now(UTC).timestamp() + 40)
    found = doctor(capsys, *flags)
    wrong = {name: text for name, (ok, text) in found.items() if not ok}
    assert set(wrong) == {"clock", "database", "certificate of the gateway"}
    assert "differ by 40 s" in wrong["clock"]
    assert f"schema 0002, this Millpond {newest_revision()}" in wrong["database"]
    assert "start the gateway" in wrong["database"]
    assert "runs out" in wrong["certificate of the gateway"]

    change(folder / "policy.toml", "models.m", "models.other")
    assert "models.m is not in" in doctor(capsys, *flags)["settings"][1]
    shutil.rmtree(folder / "lake")
    found = doctor(capsys, "--lake", folder / "lake", "--meter", "http://127.0.0.1:9", "--model", folder)
    assert {name: ok for name, (ok, _) in found.items()} == {
        "this host": True, "lake": False, "model": False, "meter": False
    }  # fmt: skip
    assert "is the meter up" in found["meter"][1]
    assert "config.json" in found["model"][1]


def test_certificates_are_judged_by_their_days():
    now = datetime.now(UTC)
    assert "holds for 30 days" in _expiry(now - timedelta(1), now + timedelta(30, 60), "c")
    for begins, ends, word in ((-9, -1, "ran out"), (-9, 13, "runs out"), (1, 90, "clock")):
        with pytest.raises(Exception, match=word):
            _expiry(now + timedelta(begins), now + timedelta(ends), "c")


def test_without_flags_it_looks_at_the_machine():
    done = subprocess.run([sys.executable, "-m", "millpond.cli", "doctor"], capture_output=True, text=True)
    assert "loop devices" in done.stdout
    assert "lake" not in done.stdout


def test_the_ledgers_chain_is_looked_at_from_its_end(database, policy, monkeypatch):
    """All of a short one, totals too; of a long one the last entries, and that is said."""
    ledger = Ledger(database, policy)
    for count in range(5):
        ledger.charge(Payer("ada", "p", ("m",)), count, what="x")
    entries, _ = ledger.head()
    assert f"whole: {entries} entries, 10 bytes charged; took 0." in _ledger(database)
    monkeypatch.setattr(doctor_module, "MOST_ENTRIES", 3)
    assert f"the last 3 of {entries} entries are whole; millpond ledger verify looks at all" in _ledger(database)
    engine = open_for_tampering(database)
    with engine.begin() as connection:  # before the tail, and not in it
        connection.execute(ENTRIES.update().where(ENTRIES.c.seq == entries - 3).values(detail="{}"))
    assert "the last 3" in _ledger(database)
    with engine.begin() as connection:
        connection.execute(ENTRIES.delete().where(ENTRIES.c.seq == entries))
    with pytest.raises(LedgerCorrupt, match="head is not entry"):
        _ledger(database)
    with engine.begin() as connection:
        connection.execute(ENTRIES.update().where(ENTRIES.c.seq == entries - 1).values(kind="other"))
    engine.dispose()
    with pytest.raises(LedgerCorrupt, match=f"entry {entries - 1} of the ledger was changed"):
        _ledger(database)
    monkeypatch.undo()
    with pytest.raises(LedgerCorrupt, match=f"entry {entries - 3} of the ledger was changed"):
        _ledger(database)
    ledger.close()
