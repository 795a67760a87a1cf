"""The Python reference: a page a room, with every name that `millpond` and the rooms' packages export."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

ROOMS = {
    "store": ("Lake and runs", "The lake: what opens, what is read, what a result is."),
    "capture": ("Capture", "What a request to an engine carries, and captures from Python."),
    "analysis": ("Analysis", "Probes, sparse autoencoders, expressions: here, and the same through the gateway."),
    "hub": ("Client of the gateway", "What `mp.connect()` gives, and what it returns."),
}
EXPORTING = ("millpond", *(f"millpond.{room}" for room in ROOMS), "millpond.hub.client")
"""Packages whose `__all__` is public."""
FURTHER = {
    "store": (
        "millpond.store.segment.RunWriter",
        "millpond.store.segment.CapturedRequest",
        "millpond.store.artifacts",
        "millpond.store.logs",
    ),
    "capture": ("millpond.capture.job.run_capture", "millpond.capture.plan.plan_capture"),
    "analysis": ("millpond.analysis.cluster", "millpond.analysis.statistics"),
    "hub": ("millpond.hub.client.run.RemoteRun",),
}
"""What people in the vault also use, by the module it is in."""


def public_names() -> Iterator[tuple[str, str]]:
    """Every exported name as its users write it, and where it is defined."""
    for package in EXPORTING:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if inspect.ismodule(found):  # a function that is called like its module
                found = getattr(found, name)
            yield f"{package}.{name}", f"{found.__module__}.{found.__qualname__}"


def api_pages() -> Iterator[tuple[str, str]]:
    """File name and text of each page."""
    names: dict[str, list[str]] = {}
    for name, home in public_names():
        names.setdefault(home, []).append(name)
    table = ["| name | |", "|---|---|"]
    for room, (title, about) in ROOMS.items():
        mine = [home for home in names if home.startswith(f"millpond.{room}.")]
        parts = [f"# {title}", about]
        for home in mine:
            shortest = min(names[home], key=len).replace("millpond.", "mp.", 1)
            parts.append(f"::: {home}")
            table.append(f"| [`{shortest}`]({room}.md#{home}) | {_first_line(home)} |")
        parts += [f"::: {home}" for home in FURTHER[room]]
        yield f"api/{room}.md", "\n\n".join(parts) + "\n"
    pages = ", ".join(f"[{title}]({room}.md)" for room, (title, _) in ROOMS.items())
    intro = f"`import millpond as mp` imports nothing heavy; a name is imported when it is used. {pages}."
    yield (
        "api/index.md",
        f"# Python\n\n{intro} Errors have [a page of their own](../errors.md).\n\n" + "\n".join(table) + "\n",
    )


def _first_line(home: str) -> str:
    module, _, name = home.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return (inspect.getdoc(found) or "").partition("\n")[0].replace("|", "\\|")
