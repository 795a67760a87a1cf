"""Which addresses of a notebook server the proxy passes on: a list of what Lab needs, compared before anything is decoded.

What is not listed is refused, so another spelling of `/files/x` is not a way round: `%66iles`, `files%2Fx`, `//files`, `./files`
and `FILES` are simply not in the list. Static files come from the trusted installation, never from the user's server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

_TAIL = r"(?:/[^?#\\]*)?"
_ALLOWED = re.compile(
    "|".join(
        (
            r"/?",
            r"/lab",
            rf"/lab/(?:tree|workspaces|doc){_TAIL}",
            rf"/lab/api/(?:settings|translations|workspaces){_TAIL}",
            r"/api/?",
            r"/api/(?:status|me)",
            r"/api/events/subscribe",
            rf"/api/(?:contents|kernels|kernelspecs|sessions){_TAIL}",
            rf"/kernelspecs{_TAIL}",
            r"/(?:oauth_callback|login|logout)",
        )
    )
)
_STATIC = (
    # under the server's address, under the environment's folder
    ("/static/lab/", "share/jupyter/lab/static"),
    ("/lab/extensions/", "share/jupyter/labextensions"),
    ("/lab/api/themes/", "share/jupyter/lab/themes"),
)


def is_plain(path: str) -> bool:
    """Whether a path means one thing only: no empty, `.` or `..` part, no encoded slash, backslash or control character."""
    if not path.startswith("/") or not path.isascii() or "\\" in path:
        return False
    decoded = unquote(path)
    if any(character in decoded for character in "\\\x00\r\n\x7f") or decoded.count("/") != path.count("/"):
        return False
    parts = decoded.split("/")[1:]
    return all(part not in ("", ".", "..") for part in parts[:-1]) and parts[-1] not in (".", "..")


def is_allowed(path: str) -> bool:
    """Whether a notebook server may be asked for `path`, raw and relative to the server's address."""
    return is_plain(path) and _ALLOWED.fullmatch(path) is not None


@dataclass(frozen=True)
class TrustedFiles:
    """Lab's and the notebook server's own files, in the trusted installation."""

    prefix: Path
    """The Python environment."""
    server: Path
    """jupyter_server's `static` folder."""

    def covers(self, path: str) -> bool:
        """Whether `path` is one of these files' addresses, existing or not."""
        return any(path.startswith(start) for start, _ in _STATIC) or path.startswith("/static/")

    def find(self, path: str) -> Path | None:
        """The file that `path` names, if there is one inside the folders."""
        if not is_plain(path):
            return None
        roots = [(start, self.prefix / place) for start, place in _STATIC] + [("/static/", self.server)]
        for start, root in roots:
            if path.startswith(start):
                file = (root / unquote(path[len(start) :])).resolve()
                return file if file.is_relative_to(root.resolve()) and file.is_file() else None
        return None
