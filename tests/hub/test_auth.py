"""Who is let in: tokens, log-ins, sessions, and what a browser must show for a change."""

from __future__ import annotations

import os
import tomllib
from datetime import UTC, datetime, timedelta

import pytest

from millpond.hub.auth import SESSIONS_OF_ONE, Gatekeeper, Sessions, TokenFile, new_token
from millpond.store.errors import InvalidInput

ORIGIN = "https://hub.example.org"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.toml"


def test_a_token_is_known_by_its_hash_and_forgotten_with_its_line(path):
    token = new_token(path, "ada", ("read", "run"))
    other = new_token(path, "rex", ("review",))
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o77 == 0
    tokens = TokenFile(path)
    found = tokens.identify(token)
    assert (found.user, found.scopes, found.session) == ("ada", {"read", "run"}, False)
    for wrong in (token[:-1], token + "x", token.upper(), "", "é" * 40, "\udc80"):
        assert tokens.identify(wrong) is None
    kept = [part for part in path.read_text().split("[[tokens]]") if '"ada"' not in part]
    path.write_text("[[tokens]]".join(kept))
    assert tokens.identify(token) is None
    assert tokens.identify(other).user == "rex"


def test_a_token_ends_when_it_expires(path):
    clock = [datetime(2030, 1, 1, tzinfo=UTC)]
    token = new_token(path, "ada", ("read",), expires=clock[0] + timedelta(hours=1))
    naive = new_token(path, "ada", ("read",), expires=datetime(2030, 1, 1, 1))
    tokens = TokenFile(path, now=lambda: clock[0])
    assert tokens.identify(token)
    assert tokens.identify(naive)
    clock[0] += timedelta(hours=1)
    assert tokens.identify(token) is None
    assert tokens.identify(naive) is None


@pytest.mark.parametrize(
    "text",
    [
        "tokens = 3",
        "[[tokens]]\nuser = 'ada'\nsha256 = 'abc'\nscopes = ['read']",
        "[[tokens]]\nuser = 'ada'\nsha256 = '{h}'\nscopes = ['root']",
        "[[tokens]]\nuser = 'ada'\nsha256 = '{h}'\nscopes = []",
        "[[tokens]]\nuser = 'a/b'\nsha256 = '{h}'\nscopes = ['read']",
        "[[tokens]]\nuser = 'ada'\nsha256 = '{h}'\nscopes = ['read']\nextra = 1",
        "[[token]]\nuser = 'ada'",
        "[[tokens",
    ],
)
def test_a_token_file_that_cannot_be_used_lets_nobody_in(path, text):
    token = new_token(path, "ada", ("read",))
    tokens = TokenFile(path)
    good = path.read_text()
    path.write_text(text.replace("{h}", "0" * 64) + "\n" + "# longer\n" * 3)
    with pytest.raises(InvalidInput, match="token file"):
        tokens.identify(token)
    with pytest.raises(InvalidInput, match="token file"):
        TokenFile(path)
    path.write_text(good)
    assert tokens.identify(token).user == "ada"


def test_a_log_in_token_opens_the_form_only_and_other_tokens_everything_but_the_form(path):
    bearer, login = new_token(path, "rex", ("review",)), new_token(path, "rex", ("review",), login=True)
    keeper = Gatekeeper(TokenFile(path), ORIGIN)
    assert keeper.identify({"authorization": f"Bearer {bearer}"}, {}).user == "rex"
    assert keeper.identify({"authorization": f"Bearer {login}"}, {}) is None
    assert keeper.sessions.open(bearer) is None
    key = keeper.sessions.open(login)
    assert keeper.cookie == "__Host-millpond"
    assert "Secure" in keeper.cookie_flags
    found = keeper.identify({}, {keeper.cookie: key})
    assert found.session
    # a header that is there is what counts: no falling back to the cookie
    assert keeper.identify({"authorization": "Bearer nonsense"}, {keeper.cookie: key}) is None
    assert keeper.identify({"authorization": "Basic eDp5"}, {keeper.cookie: key}) is None
    assert keeper.identify({}, {keeper.cookie: key + "x"}) is None
    assert keeper.identify({}, {}) is None


def test_a_session_ends_with_its_token_its_time_and_its_log_out(path):
    clock = [0.0]
    login = new_token(path, "rex", ("review",), login=True)
    sessions = Sessions(TokenFile(path), now=lambda: clock[0])
    key, other = sessions.open(login), sessions.open(login)
    assert sessions.identify(key).csrf != sessions.identify(other).csrf
    sessions.close(other)
    assert sessions.identify(other) is None
    clock[0] = 8 * 3600
    assert sessions.identify(key) is None
    fresh = sessions.open(login)
    path.write_text("")
    os.utime(path, ns=(1, 1))
    assert sessions.identify(fresh) is None


def test_nobody_logs_others_out_by_logging_in(path):
    mine, other = new_token(path, "rex", ("review",), login=True), new_token(path, "eve", ("read",), login=True)
    bearer = new_token(path, "eve", ("read",))
    sessions = Sessions(TokenFile(path))
    key = sessions.open(mine)
    theirs = [sessions.open(other) for _ in range(200)]
    assert all(sessions.open(wrong) is None for wrong in ("", "x", bearer, mine[:-1]))
    assert sessions.identify(key).user == "rex"
    alive = [one for one in theirs if sessions.identify(one)]
    assert alive == theirs[-SESSIONS_OF_ONE:]
    assert len(sessions._held) == 1 + SESSIONS_OF_ONE  # whatever strangers and eve try


def test_of_a_browsers_user_and_a_tokens_the_token_counts(path):
    """A browser logged in as a reviewer whose page sends another's token: one account, the token's, and no session."""
    ada, rex = new_token(path, "ada", ("read", "run")), new_token(path, "rex", ("read", "review"), login=True)
    keeper = Gatekeeper(TokenFile(path), ORIGIN)
    cookie = {keeper.cookie: keeper.sessions.open(rex)}
    both = keeper.identify({"authorization": f"Bearer {ada}", "origin": ORIGIN}, cookie)
    assert (both.user, both.scopes, both.session, both.csrf) == ("ada", {"read", "run"}, False, "")
    # the log-in token of the very session is no bearer's, and does not fall back to the session
    assert keeper.identify({"authorization": f"Bearer {rex}"}, cookie) is None


def test_a_browsers_change_needs_its_origin_and_its_secret(path):
    token, login = new_token(path, "rex", ("review",)), new_token(path, "rex", ("review",), login=True)
    keeper = Gatekeeper(TokenFile(path), ORIGIN)
    key = keeper.sessions.open(login)
    me = keeper.identify({}, {keeper.cookie: key})
    mine = {"origin": ORIGIN, "x-csrf-token": me.csrf}
    assert keeper.meant(me, mine)
    assert keeper.meant(me, {"origin": ORIGIN}, form_token=me.csrf)
    for wrong in (
        {}, {"origin": ORIGIN}, {"x-csrf-token": me.csrf}, mine | {"origin": "null"}, mine | {"origin": ORIGIN + ".evil"},
        mine | {"origin": "http://hub.example.org"}, mine | {"x-csrf-token": me.csrf + "x"}, mine | {"x-csrf-token": ""},
        mine | {"x-csrf-token": keeper.identify({}, {keeper.cookie: keeper.sessions.open(login)}).csrf},
    ):  # fmt: skip
        assert not keeper.meant(me, wrong)
    assert keeper.meant(keeper.identify({"authorization": f"Bearer {token}"}, {}), {})  # no cookie, nothing to forge


def test_new_tokens_are_what_was_asked_for(path):
    with pytest.raises(InvalidInput, match="scopes"):
        new_token(path, "ada", ("root",))
    with pytest.raises(InvalidInput, match="user"):
        new_token(path, 'a"\n[[tokens]]', ("read",))
    assert not path.exists()
    new_token(path, "ada", ("run", "read"), expires=datetime(2031, 2, 3, tzinfo=UTC), login=True)
    (entry,) = tomllib.loads(path.read_text())["tokens"]
    del entry["sha256"]
    assert entry == {
        "user": "ada", "scopes": ["read", "run"], "expires": datetime(2031, 2, 3, tzinfo=UTC), "login": True
    }  # fmt: skip
