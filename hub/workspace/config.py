"""JupyterHub's configuration, made by one call; what would be unsafe is refused here, before anything is started.

# jupyterhub_config.py
from millpond.hub.workspace.config import configure
configure(get_config(), settings)
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from traitlets.config import Config

from millpond.hub.workspace.settings import HUB_PORT, RESERVED, USER, Workspace
from millpond.store.errors import InvalidInput

SERVICE = "gateway"
CLIENT_ID = f"service-{SERVICE}"
SCOPES = {
    "custom:millpond:read": {"description": "See projects, runs and results"},
    "custom:millpond:run": {"description": "Submit jobs", "subscopes": ["custom:millpond:read"]},
    "custom:millpond:review": {"description": "Decide what is released", "subscopes": ["custom:millpond:read"]},
    "custom:millpond:admin": {
        "description": "Manage projects and budgets",
        "subscopes": ["custom:millpond:read", "custom:millpond:run"],
    },
}
_ACCESS = f"access:services!service={SERVICE}"
ROLES: list[dict[str, Any]] = [
    {"name": "researcher", "scopes": [_ACCESS, "custom:millpond:run"], "groups": ["researchers"]},
    {"name": "reviewer", "scopes": [_ACCESS, "custom:millpond:review"], "groups": ["reviewers"]},
    {"name": "project-owner", "scopes": [_ACCESS, "custom:millpond:admin"], "groups": ["owners"]},
    # what the token in a notebook may be used for, also when its user may do more: never to review
    {"name": "server", "scopes": ["users:activity!user", "access:servers!server", _ACCESS, "custom:millpond:run"]},
    {"name": SERVICE, "scopes": ["read:users:name", "read:users:groups", "read:groups"], "services": [SERVICE]},
]


def gateway_origin(settings: Workspace) -> str:
    """The origin of the gateway's pages."""
    scheme, _, host = settings.origin.partition("://")
    return f"{scheme}://{SERVICE}--service.{host}"


def configure(c: Config, settings: Workspace, *, authenticator: Any = None) -> None:
    """Fill `c`. The gateway's token comes from MILLPOND_GATEWAY_TOKEN. `authenticator` is for tests; raises InvalidInput."""
    token = os.environ.get("MILLPOND_GATEWAY_TOKEN", "")
    if len(token) < 32:
        raise InvalidInput("MILLPOND_GATEWAY_TOKEN is missing or shorter than 32 characters; millpond up makes one")
    state = settings.state / "hub"
    hub = c.JupyterHub
    hub.subdomain_host = settings.origin
    hub.bind_url = settings.origin
    hub.hub_bind_url = f"http+unix://{quote(str(settings.hub_socket), safe='')}"
    hub.hub_connect_url = f"http://127.0.0.1:{HUB_PORT}"
    hub.hub_socket_mode = 0o660
    hub.cookie_host_prefix_enabled = True
    # secure: host-prefixed cookies need it, also those that JupyterHub sets without it over http (OAuth's state);
    # browsers keep such cookies for localhost and the names below it
    hub.tornado_settings = {"cookie_options": {"samesite": "Lax", "secure": True}}
    hub.cookie_secret_file = str(state / "cookie_secret")
    hub.db_url = settings.database or f"sqlite:///{state / 'jupyterhub.sqlite'}"
    hub.cleanup_servers = False  # a restart of the hub ends no notebook
    hub.cleanup_proxy = False
    hub.allow_named_servers = False
    hub.admin_access = False
    hub.concurrent_spawn_limit = 4
    hub.load_groups = {name: {"users": list(users)} for name, users in settings.authentication.groups.items()}
    hub.custom_scopes = SCOPES
    hub.load_roles = ROLES
    hub.services = [
        {
            "name": SERVICE,
            "url": f"http://{settings.gateway}",
            "api_token": token,
            "oauth_client_id": CLIENT_ID,
            "oauth_redirect_uri": f"{gateway_origin(settings)}/services/{SERVICE}/oauth_callback",
            "oauth_client_allowed_scopes": sorted(SCOPES),
            "oauth_no_confirm": True,
            "display": False,  # the hub's menu leaves out the port; the link below has it
            "timeout": 1,  # the hub has no network to look whether it answers; the supervisor does
        }
    ]
    link = f'<a href="{gateway_origin(settings)}/services/{SERVICE}/">Budgets, results and reviews</a>'
    hub.template_vars = {"announcement": link}
    hub.proxy_class = "millpond.hub.workspace.proxy.MeteredProxy"
    c.MeteredProxy.socket = str(settings.proxy_socket)
    hub.spawner_class = "millpond.hub.workspace.spawner.BwrapSpawner"
    c.BwrapSpawner.helper = str(settings.helper_socket)
    c.Spawner.start_timeout = int(settings.spawn_seconds) + 10
    c.Spawner.http_timeout = 30
    c.Spawner.default_url = "/lab"
    c.Spawner.disable_user_config = True
    c.Authenticator.admin_users = set(settings.authentication.admins)
    reserved = "|".join(sorted(map(re.escape, RESERVED)))
    c.Authenticator.username_pattern = rf"^(?!(?:{reserved})$)(?!.*--){USER}$"
    _authenticate(c, settings, authenticator)


def _authenticate(c: Config, settings: Workspace, authenticator: Any) -> None:
    how = settings.authentication
    if authenticator is not None:
        c.JupyterHub.authenticator_class = authenticator
        c.Authenticator.allow_all = True
    elif how.kind == "native":
        import nativeauthenticator

        c.JupyterHub.template_paths = [str(Path(nativeauthenticator.__file__).parent / "templates")]
        c.JupyterHub.authenticator_class = "millpond.hub.workspace.accounts.LocalAuthenticator"
        c.Authenticator.allow_all = True  # whom an administrator has authorised: NativeAuthenticator's own list
        native = c.NativeAuthenticator
        native.open_signup = False
        native.check_common_password = True
        native.minimum_password_length = 12
        native.allowed_failed_logins = 5
        native.seconds_before_next_try = 1800
        c.LocalAuthenticator.first_accounts = str(settings.state / "hub" / "accounts.json")
    else:
        if how.authenticator in ("dummy", "null", "native", "pam"):
            raise InvalidInput(f"authentication.authenticator is {how.authenticator!r}; name an OAuthenticator")
        if not any(name.startswith(("allow", "admin")) for name in how.options):
            raise InvalidInput("authentication.options allow nobody; set allowed_users, allowed_groups or allow_all")
        c.JupyterHub.authenticator_class = how.authenticator
        for name, value in how.options.items():
            if "secret" in name:
                raise InvalidInput(
                    f"authentication.options holds {name}; secrets come from the environment (OAUTH_CLIENT_SECRET)"
                )
            c.OAuthenticator[name] = value
