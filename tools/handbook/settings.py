"""The reference of every file that people write, from the classes that check it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from millpond.analysis.jobs import ProbeJob
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.job import SaeJob
from millpond.hub.policy import Policy
from millpond.hub.queue_api import Worker
from millpond.hub.settings import Settings
from millpond.hub.workspace.up_config import UpConfig
from millpond.store.capture_spec import CaptureJob, RequestArgs
from millpond.store.configuration import LakeConfiguration

FILES: dict[str, tuple[type, str]] = {
    "Capture job": (CaptureJob, "`millpond capture job.toml`, `millpond submit`: [capturing](capture.md)."),
    "Request": (
        RequestArgs,
        'What one request to an engine carries: `extra_args["millpond"]`, over HTTP `vllm_xargs`; `mp.capture_params` '
        "makes it.",
    ),
    "Probe job": (ProbeJob, "`millpond probe job.toml`: [probes](probes.md)."),
    "SAE job": (SaeJob, "`millpond sae train job.toml`: [sparse autoencoders](sae.md)."),
    "SAE": (SaeConfig, "The table `[sae]` of an SAE job, and the arguments of `mp.BatchTopKSae` and its kin."),
    "Lake": (
        LakeConfiguration,
        "`lake.json` in the lake; `millpond configure` writes it: [operating a lake](operations.md), [clusters](clusters.md).",
    ),
    "Gateway": (Settings, "`millpond gateway`, `millpond executor`: [the gateway](gateway.md)."),
    "Policy": (Policy, "What may be released, and how many bytes may leave: [what leaves the vault](gate.md)."),
    "Installation on one machine": (UpConfig, "`millpond up lake.toml`: [notebooks](workspace.md)."),
    "Capture workers' tokens": (
        Worker,
        "`[[workers]]`; `millpond queue token` writes it: [jobs and the queue](jobs.md).",
    ),
}


def settings_page() -> str:
    """Every field: its type, its default, what it means."""
    parts = [
        "# Configuration",
        "Files are TOML unless it says otherwise; an unknown field is refused by its name. Secrets (`AWS_*`, "
        "`MILLPOND_TOKEN`, `MILLPOND_WORKER_TOKEN`, passwords) come from the environment only.",
    ]
    for title, (kind, about) in FILES.items():
        parts += [f"## {title}", about]
        for one in sections(kind):
            if one is not kind:
                parts.append(f"### {title}: {one.__name__}")
                parts.append(_about(one))
            parts.append(_table(one))
    return "\n\n".join(parts) + "\n"


def sections(kind: type) -> list[type]:
    """A class and all classes that its fields hold, in the order in which they are met."""
    found = [kind]
    for one in found:
        for annotation in typing.get_type_hints(one, include_extras=True).values():
            found += [part for part in _parts(annotation) if part not in found]
    return found


def fields(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field of a class."""
    told = {}
    for base in reversed(kind.__mro__):
        told.update(_docstrings(base))
    hints = typing.get_type_hints(kind, include_extras=True)
    if issubclass(kind, BaseModel):
        known: dict[str, Any] = dict(kind.model_fields)
    else:
        known = {one.name: one for one in dataclasses.fields(kind)}
    for name, field in known.items():
        parts = [*_parts(hints[name])]
        about = _about(parts[0]) if len(parts) == 1 else ""
        yield name, _type(hints[name]), _default(field), told.get(name) or about


def _table(kind: type) -> str:
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for cells in fields(kind):
        name, what, default, meaning = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        rows.append(f"| `{name}` | {what} | {default} | {meaning} |")
    return "\n".join(rows)


def _about(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _docstrings(kind: type) -> dict[str, str]:
    """The string under each field."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for line, after in zip(tree.body, tree.body[1:], strict=False):
        is_text = (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
            found[line.target.id] = after.value.value  # type: ignore[attr-defined]
    return found


def _parts(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        if issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        if not isinstance(inner, FieldInfo):
            yield from _parts(inner)


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin in (tuple, list, frozenset, set):
        several = inner[:1] if len(set(inner) - {...}) == 1 else inner
        return "list of " + ", ".join(_type(one) for one in several)
    if origin is not None and inner:
        return f"table of {_type(inner[-1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{one.value!r}`" for one in annotation)
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "Path": "path",
        "Any": "anything",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _default(field: Any) -> str:
    if isinstance(field, FieldInfo):
        if field.is_required():
            return "**needed**"
        default, factory = field.default, field.default_factory
    else:
        default, factory = field.default, field.default_factory
    if default in (PydanticUndefined, dataclasses.MISSING):
        if factory is dataclasses.MISSING:
            return "**needed**"
        return "see below" if factory not in (dict, tuple, list) else ""
    if default is None or default == () or default == {} or default == "":
        return ""
    if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):
        return "its defaults"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
