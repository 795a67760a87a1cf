"""MkDocs' hook: pages of the handbook that are made from the code when it is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mkdocs.structure.files

sys.path.insert(0, str(Path(__file__).parent))

from handbook.api import api_pages
from handbook.commands import command_page
from handbook.errors import error_page
from handbook.http import http_page
from handbook.metrics import metrics_page
from handbook.settings import settings_page


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file holds (MkDocs calls this)."""
    made = {
        "cli.md": command_page(),
        "configuration.md": settings_page(),
        "errors.md": error_page(),
        "http.md": http_page(),
        "metrics.md": metrics_page(),
        **dict(api_pages()),
    }
    for name, text in made.items():
        files.append(mkdocs.structure.files.File.generated(config, name, content=text))
    return files
