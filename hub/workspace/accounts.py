"""Accounts of a local installation: NativeAuthenticator, and the first users that `millpond up` prints."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bcrypt
from jupyterhub.handlers.login import LoginHandler
from nativeauthenticator import NativeAuthenticator
from nativeauthenticator.handlers import LoginHandler as NativeLoginHandler
from nativeauthenticator.orm import UserInfo
from tornado.escape import url_escape
from tornado.httputil import url_concat
from traitlets import Unicode

from millpond.hub.workspace.settings import is_user

_WORDS = "amber birch cedar delta ember fjord grove heron inlet juniper kelp lark maple north otter pond quartz reed spruce teal"


class _Login(NativeLoginHandler):  # type: ignore[misc]
    """NativeAuthenticator 1.3's page, in the two ways in which JupyterHub 6 calls it differently."""

    post = LoginHandler.post  # its own counts with statsd, which the hub no longer has

    def _render(self, login_error: str | None = None, username: str | None = None, sync: bool = False, **_: Any) -> Any:
        ask = {"next": self.get_argument("next", "")}
        return self.render_template(
            "native-login.html",
            sync=sync,
            next=url_escape(ask["next"]),
            username=username,
            login_error=login_error,
            custom_html=self.authenticator.custom_html,
            login_url=self.settings["login_url"],
            enable_signup=self.authenticator.enable_signup,
            two_factor_auth=self.authenticator.allow_2fa,
            authenticator_login_url=url_concat(self.authenticator.login_url(self.hub.base_url), ask),
            xsrf=self.xsrf_token.decode("ascii"),
        )


class LocalAuthenticator(NativeAuthenticator):  # type: ignore[misc]
    """Passwords in the hub's own database; who signs up waits for an administrator's approval."""

    first_accounts = Unicode("", help="File of names and bcrypt hashes of accounts to make when they are missing.").tag(
        config=True
    )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.first_accounts and Path(self.first_accounts).exists():
            for name, hashed in json.loads(Path(self.first_accounts).read_text()).items():
                if self.get_user(name) is None:
                    self.db.add(UserInfo(username=name, password=hashed.encode(), is_authorized=True))
            self.db.commit()

    def validate_username(self, username: str) -> bool:
        """Names that are also labels of a domain name, and nobody else's origin."""
        return is_user(username) and bool(super().validate_username(username))

    def get_handlers(self, app: Any) -> list[tuple[str, Any]]:
        """NativeAuthenticator's pages."""
        return [(path, _Login if path == r"/login" else handler) for path, handler in super().get_handlers(app)]


def new_accounts(file: Path, names: Iterable[str]) -> dict[str, str]:
    """Add accounts that the file does not have, with random passwords; returns the new ones' passwords."""
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    made = {name: _password() for name in names if name not in known}
    if made:
        hashed = {name: bcrypt.hashpw(word.encode(), bcrypt.gensalt()).decode() for name, word in made.items()}
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({**known, **hashed}, indent=1))
        fresh.chmod(0o600)
        if file.exists():
            os.chown(fresh, file.stat().st_uid, file.stat().st_gid)
        fresh.replace(file)
    return made


def _password() -> str:
    """Three words and a number: 2**33 possibilities, ten failed guesses an hour."""
    words = _WORDS.split()
    return "-".join([*(secrets.choice(words) for _ in range(3)), str(secrets.randbelow(1_000_000))])
