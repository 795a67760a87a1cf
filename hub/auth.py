"""Who is asking: tokens and browser sessions, of a token file or of a JupyterHub, and what they may do."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from millpond.store.errors import InvalidInput

Scope = Literal["read", "run", "review", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SESSION_SECONDS = 8 * 3600
_HUB_PREFIX = "custom:millpond:"
SESSIONS_OF_ONE = 16
"""That a user may have; a further one ends that user's oldest, and nobody else's."""


@dataclass(frozen=True)
class Identity:
    """Who is asking."""

    user: str
    scopes: frozenset[str]
    session: bool = False
    """Whether it is a browser that logged in here; a token, which a program may hold, never is one."""
    csrf: str = ""
    """What a session's posts must carry."""


class Tokens(Protocol):
    """Who a token stands for."""

    def identify(self, token: str, *, login: bool = False) -> Identity | None:
        """The user, or None. With `login`, of a browser that logs in or has logged in with `token`."""
        ...


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    expires: datetime | None = None
    login: bool = False
    """It opens the log-in form and nothing else; a token without it opens everything but the form."""


class TokenFile:
    """Tokens by their SHA-256 in a TOML file, read again when it changes: a deleted line holds at once."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] | None = None) -> None:
        """Read the file.

        Raises:
            InvalidInput: it cannot be read or holds something else.
        """
        self._path = path
        self._now = now or (lambda: datetime.now(UTC))
        self._entries: tuple[_Entry, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._read()

    def identify(self, token: str, *, login: bool = False) -> Identity | None:
        """See `Tokens`. Every entry is compared, in constant time each."""
        self._read()
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        found: _Entry | None = None
        for entry in self._entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None or found.login != login:
            return None
        if found.expires is not None and _aware(found.expires) <= self._now():
            return None
        return Identity(found.user, frozenset(found.scopes))

    def _read(self) -> None:
        try:
            facts = self._path.stat()
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if seen == self._seen:
                return
            values = tomllib.loads(self._path.read_text())
            if set(values) - {"tokens"}:
                raise InvalidInput(
                    f"token file {self._path}: it holds {min(set(values) - {'tokens'})!r}, not [[tokens]]"
                )
            self._entries = TypeAdapter(tuple[_Entry, ...]).validate_python(values.get("tokens", ()))
            self._seen = seen
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self._entries, self._seen = (), None
            raise InvalidInput(f"the token file {self._path} cannot be read: {error}") from error
        except ValidationError as error:
            self._entries, self._seen = (), None
            first = error.errors(include_url=False, include_input=False)[0]
            raise InvalidInput(
                f"token file {self._path}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error


def new_token(
    path: Path, user: str, scopes: tuple[str, ...], *, expires: datetime | None = None, login: bool = False
) -> str:
    """A new random token, whose hash is added to the token file `path`, made if it is missing.

    Raises:
        InvalidInput: the user's name or a scope is not possible.
    """
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    try:
        entry = _Entry.model_validate({"user": user, "sha256": digest, "scopes": scopes, "expires": expires})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    lines = ["[[tokens]]", f'user = "{entry.user}"', f'sha256 = "{digest}"']
    lines.append(f"scopes = [{', '.join(f'{chr(34)}{scope}{chr(34)}' for scope in SCOPES if scope in entry.scopes)}]")
    if expires is not None:
        lines.append(f"expires = {_aware(expires).isoformat(timespec='seconds')}")
    if login:
        lines.append("login = true")
    path.touch(mode=0o600, exist_ok=True)
    with path.open("a") as handle:
        handle.write("\n".join(lines) + "\n\n")
    return token


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class HubTokens:
    """Tokens that a JupyterHub knows. The service's environment says where it is; see docs/gateway.md for its roles."""

    def __init__(self, *, cache_seconds: int = 10) -> None:
        """Read the environment.

        Raises:
            InvalidInput: this process was not started as a JupyterHub service.
        """
        import os

        from jupyterhub.services.auth import HubOAuth

        if not os.environ.get("JUPYTERHUB_API_TOKEN"):
            raise InvalidInput("JUPYTERHUB_API_TOKEN is not set; let JupyterHub start the gateway as its service")
        self.oauth: Any = HubOAuth(cache_max_age=cache_seconds)
        self._caches = cache_seconds > 0  # an age of 0 would mean for ever

    def identify(self, token: str, *, login: bool = False) -> Identity | None:
        """See `Tokens`. A browser's token must be one that the Hub gave in a log-in: it has a session there."""
        model = self.oauth.user_for_token(token, use_cache=self._caches)
        if model is None or model.get("kind") != "user" or not self.oauth.check_scopes(self.oauth.access_scopes, model):
            return None
        if login and not model.get("session_id"):
            return None
        held = [scope.partition("!")[0] for scope in model.get("scopes", ())]
        scopes = {scope.removeprefix(_HUB_PREFIX) for scope in held if scope.startswith(_HUB_PREFIX)}
        return Identity(str(model["name"]), frozenset(scopes & set(SCOPES)))

    def login_url(self, next_path: str) -> tuple[str, str]:
        """Where a browser logs in, and the state that must come back with it."""
        from urllib.parse import urlencode

        verifier, challenge, _ = self.oauth.generate_pkce_code_challenge()
        state = str(self.oauth.generate_state(next_path, code_verifier=verifier))
        query = urlencode({"state": state, "code_challenge": challenge, "code_challenge_method": "S256"})
        return f"{self.oauth.login_url}&{query}", state

    def finish(self, code: str, state: str) -> tuple[str, str] | None:
        """The token for a code that the Hub sent a browser back with, and where it was going; None if it is not valid."""
        next_path, verifier = self.oauth.get_next_url(state), self.oauth.get_code_verifier(state)
        self.oauth.clear_oauth_state(state)
        try:
            return str(self.oauth.token_for_code(code, code_verifier=verifier)), str(next_path)
        except Exception:  # whatever the Hub's client raises: tornado's errors, which are no part of its interface
            return None


@dataclass(frozen=True)
class _Session:
    user: str
    token: str
    csrf: str
    until: float


class Sessions:
    """Browsers that have logged in. Kept in memory: a restart logs everybody out."""

    def __init__(self, tokens: Tokens, *, now: Callable[[], float] = time.monotonic) -> None:
        self._tokens = tokens
        self._now = now
        self._held: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def open(self, token: str) -> str | None:
        """A new session of the user that `token` logs in, as its cookie's value; None if it logs nobody in."""
        identity = self._tokens.identify(token, login=True)
        if identity is None:
            return None
        key, until = secrets.token_urlsafe(32), self._now() + SESSION_SECONDS
        with self._lock:
            for old in [name for name, one in self._held.items() if one.until <= self._now()]:
                del self._held[old]
            mine = [name for name, one in self._held.items() if one.user == identity.user]
            for old in mine[: max(0, len(mine) + 1 - SESSIONS_OF_ONE)]:
                del self._held[old]
            self._held[_digest(key)] = _Session(identity.user, token, secrets.token_urlsafe(32), until)
        return key

    def identify(self, key: str) -> Identity | None:
        """Whose session it is, asked anew of the tokens: a token that was taken back ends its sessions."""
        with self._lock:
            found = self._held.get(_digest(key))
        if found is None or found.until <= self._now():
            return None
        identity = self._tokens.identify(found.token, login=True)
        return identity and Identity(identity.user, identity.scopes, session=True, csrf=found.csrf)

    def close(self, key: str) -> None:
        """Log out."""
        with self._lock:
            self._held.pop(_digest(key), None)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


class Gatekeeper:
    """Who a request is from, and whether a change that it asks for is meant by that user."""

    def __init__(self, tokens: Tokens, origin: str) -> None:
        self.tokens = tokens
        self.sessions = Sessions(tokens)
        self.origin = origin
        secure = origin.startswith("https://")
        self.cookie = "__Host-millpond" if secure else "millpond"
        self.state_cookie = f"{self.cookie}-state"
        """Of a log-in that the Hub has not answered yet."""
        self.cookie_flags = "Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")

    def identify(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> Identity | None:
        """The user. A request with an Authorization header is a program's, whatever cookies it has."""
        given = headers.get("authorization")
        if given is not None:
            scheme, _, token = given.partition(" ")
            known = scheme.lower() in ("bearer", "token") and bool(token)
            return self.tokens.identify(token.strip()) if known else None
        key = cookies.get(self.cookie)
        return self.sessions.identify(key) if key else None

    def meant(self, identity: Identity, headers: Mapping[str, str], form_token: str = "") -> bool:
        """Whether a change is the user's own: always for a token, for a browser with its origin and its CSRF token."""
        if not identity.session:
            return True
        given = headers.get("x-csrf-token") or form_token
        return headers.get("origin") == self.origin and hmac.compare_digest(
            given.encode("utf-8", "replace"), identity.csrf.encode()
        )
