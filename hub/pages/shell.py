"""Templates become pages here: escaped by default, with the headers that every page has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from millpond.hub.body import PROGRESS_STEPS, UNCAPPED
from millpond.hub.pages.charts import number
from millpond.hub.serving import Fixed
from millpond.store.hooks import summarize_hooks

FOLDER = Path(__file__).parent
HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)
STATIC: Mapping[str, str] = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}


def render(template: str, code: int = 200, **values: Any) -> Fixed:
    """The page, with the HTTP status `code`."""
    empty = {"base": "", "user": "", "project": "", "here": "", "admin": False, "csrf": "", "cost": 0}
    text = _templates().get_template(template).render(empty | values)
    return Fixed(text.encode(), "text/html; charset=utf-8", code, HEADERS)


@cache
def static(name: str) -> Fixed:
    """A file of the installation: style, script, icon."""
    headers = (("cache-control", "max-age=3600"),)  # the meter counts every byte, these too
    return Fixed((FOLDER / "static" / name).read_bytes(), STATIC[name], headers=headers)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    templates.globals["steps"] = PROGRESS_STEPS
    templates.filters |= {
        "number": lambda value: f"{value:,}" if isinstance(value, int) else number(float(value)),
        "words": lambda text: str(text).replace("_", " ").replace("-", " "),
        "hooks": summarize_hooks,
        "count_of": lambda value: "–" if value is None else f"{value:,}",
        "when": lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "bytes_left": lambda value: "no cap" if value == UNCAPPED else f"{value:,} bytes",
    }
    return templates
