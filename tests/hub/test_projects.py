"""Members and roles, and what a project holds."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from millpond.hub.database import open_database
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.projects import Projects
from millpond.store.errors import InvalidInput, NotHeld, NotPermitted


@pytest.fixture
def projects(database):
    engine = open_database(database)
    projects = Projects(engine, now=lambda: 1000.0)
    projects.create("deception", models=["m", "open"], by="ada")
    projects.create("other", models=["m"], by="eve")
    yield projects
    engine.dispose()


def test_roles_decide_and_strangers_have_none(projects):
    projects.set_role("deception", "bob", "reviewer", by="ada")
    projects.set_role("deception", "rita", "reader", by="ada")
    assert (projects.of("bob"), projects.of("nobody")) == (("deception",), ())
    assert projects.models("deception") == ("m", "open")
    rights = {
        user: "".join(
            right[0] for right in ("read", "run", "review", "manage") if projects.may("deception", user, right)
        )
        for user in ("ada", "bob", "rita", "eve")
    }
    assert rights == {"ada": "rrrm", "bob": "rr", "rita": "r", "eve": ""}
    assert projects.role("nowhere", "ada") is projects.role("deception", "eve") is None
    projects.set_role("deception", "rita", None, by="ada")
    assert projects.members("deception") == (("ada", "owner"), ("bob", "reviewer"))


def test_only_owners_and_administrators_change_roles_and_an_owner_stays(projects):
    projects.set_role("deception", "bob", "researcher", by="ada")
    for by in ("bob", "eve"):
        with pytest.raises(NotPermitted):
            projects.set_role("deception", by, "owner", by=by)
    with pytest.raises(NotPermitted):  # or a stranger would learn which projects there are
        projects.set_role("nowhere", "eve", "owner", by="eve")
    with pytest.raises(InvalidInput, match="last owner"):
        projects.set_role("deception", "ada", "reader", by="ada")
    assert projects.role("deception", "ada") == "owner"
    projects.set_role("deception", "bob", "owner", by="root", admin=True)
    projects.set_role("deception", "ada", None, by="bob")
    assert projects.members("deception") == (("bob", "owner"),)


def test_what_another_project_holds_is_as_absent_as_what_nobody_does(projects):
    mine = projects.hold("deception", "run", "ten-k", "r-1", model="m", detail={"prompts": "own"})
    theirs = projects.hold("other", "run", "ten-k", "r-2", model="m")
    assert projects.find("deception", "run", mine.handle) == projects.named("deception", "run", "ten-k") == mine
    assert (len(mine.handle), mine.detail) == (8, {"prompts": "own"})
    texts = set()
    for kind, handle in (("run", theirs.handle), ("run", b"\0" * 8), ("run", b""), ("artifact", mine.handle)):
        with pytest.raises(NotHeld) as error:
            projects.find("deception", kind, handle)
        texts.add(str(error.value).replace("artifact", "run"))
    assert len(texts) == 1
    assert projects.held("deception", "run") == (mine,)
    with pytest.raises(InvalidInput, match="already"):
        projects.hold("deception", "run", "ten-k", "r-3", model="m")


def test_a_handle_given_at_a_jobs_end_falls_with_it(projects):
    with projects.engine.connect() as connection:
        projects.hold("deception", "artifact", "probe", "a-1", model="m", connection=connection)
        connection.rollback()
    assert projects.held("deception", "artifact") == ()


@pytest.mark.parametrize("name", ["", " a", "a ", "a/b", "a:b", "a\nb", "a\0", "x" * 129])
def test_names_that_could_mislead_are_refused(projects, name):
    with pytest.raises(InvalidInput, match="not allowed"):
        projects.create(name, models=["m"], by="ada")
    with pytest.raises(InvalidInput, match="not allowed"):
        projects.hold("deception", "run", name, "t", model="m")


def test_a_ledger_of_the_first_schema_is_migrated_and_stays_whole(database, policy, monkeypatch):
    with monkeypatch.context() as old:
        upgrade = command.upgrade
        old.setattr(command, "upgrade", lambda config, _: upgrade(config, "0001"))
        ledger = Ledger(database, policy)
        ledger.charge(Payer("ada", "p", ("m",)), 100, what="x")
        ledger.close()
    engine = open_database(database, create=False)
    assert not sa.inspect(engine).has_table("projects")
    engine.dispose()
    engine = open_database(database)
    Projects(engine).create("p", models=["m"], by="ada")
    engine.dispose()
    ledger = Ledger(database, policy)
    assert ledger.verify().charged == 100
    ledger.close()
