"""The lock-down of JupyterLab, and the check inside every notebook server that it and the kernel's limits are in force.

The server loads this module as an extension. Once everything is loaded it compares what is in force with what was asked for,
and writes one line of JSON to the descriptor that the spawn helper gave it. The helper waits for the line: a server that does
not load this extension, whose configuration was not found, or that misses one check is killed, and the spawn fails.

This is the second layer: a user can start a server of their own in the workspace. What bounds them is the kernel and the meter.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any, cast

from jupyterhub.singleuser.extension import JupyterHubAuthorizer
from tornado.httputil import HTTPServerRequest

from millpond.hub.workspace.zone import SERVER_CHECKS, check_zone

REPORT = "MILLPOND_REPORT_FD"
DISABLED = tuple(
    f"@jupyterlab/{name}"
    for name in (
        "apputils-extension:announcements",
        "apputils-extension:print",
        "docmanager-extension:download",
        "docmanager-extension:open-browser-tab",
        "extensionmanager-extension:plugin",
        "filebrowser-extension:download",
        "filebrowser-extension:open-browser-tab",
        "filebrowser-extension:share-file",
        "lsp-extension:plugin",
        "notebook-extension:copy-output",
        "notebook-extension:export",
        "terminal-extension:plugin",
    )
)
"""Lab's plugins that are off, and cannot be put on by the user; lab/page_config.json repeats them."""
GONE = ("files/a.txt", "files/.ssh/id", "nbconvert/html/a.ipynb", "api/terminals", "terminals/1", "terminals/websocket/1",
        "lsp/status", "lsp/ws/pylsp", "view/a.html", "api/nbconvert", "proxy/80")  # fmt: skip
"""Under the server's address; each either has no handler or is refused by the authorizer."""
EXTENSIONS = frozenset({"jupyterhub", "jupyterlab", "millpond.hub.workspace.lockdown"})
"""Of the server; another one that the environment brings must be named in lab/jupyter_server_config.py."""
_DENIED_RESOURCES = ("nbconvert", "terminals")
_DENIED_HANDLERS = ("jupyter_server.view.handlers.ViewHandler",)
"""Which share their resource's name with what is needed."""


class WorkspaceAuthorizer(JupyterHubAuthorizer):  # type: ignore[misc]
    """JupyterHub's, and nobody may convert notebooks or open terminals."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        """Whether this user may do this."""
        return (
            not _denied(type(handler))
            and resource not in _DENIED_RESOURCES
            and super().is_authorized(handler, user, action, resource)
        )


def _name(handler: type) -> str:
    return f"{handler.__module__}.{handler.__name__}"


def _denied(handler: type) -> bool:
    """Whether the authorizer refuses whatever this handler is asked."""
    return getattr(handler, "auth_resource", None) in _DENIED_RESOURCES or any(
        _name(parent) in _DENIED_HANDLERS for parent in handler.__mro__
    )


def _handler(app: Any, path: str) -> Any:
    """The class that would serve `path`."""
    request = HTTPServerRequest("GET", app.base_url + path, connection=cast("Any", SimpleNamespace(context=None)))
    return app.web_app.find_handler(request).handler_class


def _check_server(app: Any) -> list[str]:
    from jupyter_server.base.handlers import Template404
    from jupyterlab_server.config import get_page_config

    problems = []
    if app.terminals_enabled or app.quit_button or app.allow_root:
        problems.append(
            "configuration: terminals, the quit button or root are on; was lab/jupyter_server_config.py read?"
        )
    if app.config_dir != os.environ.get("JUPYTER_CONFIG_DIR") or os.access(app.config_dir, os.W_OK):
        problems.append(f"configuration: the user may change {app.config_dir}")
    if type(app.authorizer) is not WorkspaceAuthorizer:
        problems.append(f"authorizer: {type(app.authorizer).__name__}")
    for path in GONE:
        handler = _handler(app, path)
        if handler is not Template404 and not _denied(handler):
            problems.append(f"handlers: /{path} is served by {_name(handler)}")
    loaded = {name for name, on in app.extension_manager.extensions.items() if on.enabled}
    if strange := loaded - EXTENSIONS:
        problems.append(
            f"handlers: server extensions {', '.join(sorted(strange))} are on; name them false in the configuration"
        )
    lab = next(iter(app.extension_manager.extension_apps.get("jupyterlab", ())), None)
    if lab is None:
        problems.append("plugins: JupyterLab is not loaded")
    else:
        folders = lab.extra_labextensions_path + lab.labextensions_path
        page = get_page_config(folders, lab.app_settings_dir)
        missing = set(DISABLED) - set(page["disabledExtensions"])
        if missing or lab.extension_manager != "readonly":
            problems.append(f"plugins: on are {sorted(missing)}, the extension manager is {lab.extension_manager!r}")
    if app.contents_manager.allow_hidden or app.contents_manager.files_handler_class is not None:
        problems.append("contents: hidden files or /files are served")
    return problems


def _report(app: Any) -> None:
    descriptor = int(os.environ.pop(REPORT))
    checks, problems = check_zone()
    try:
        problems += _check_server(app)
    except Exception as error:
        problems.append(f"server: {type(error).__name__}: {error}")
    app.log.info("lock-down: %s", "; ".join(problems) or "in force")
    line = json.dumps({"checks": [*checks, *SERVER_CHECKS], "problems": problems}) + "\n"
    os.write(descriptor, line.encode())
    os.close(descriptor)
    if problems:
        app.exit(1)


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "millpond.hub.workspace.lockdown"}]


def _load_jupyter_server_extension(app: Any) -> None:
    app.io_loop.add_callback(_report, app)  # when the loop runs, every extension has been loaded
