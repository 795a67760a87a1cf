"""The HTTP API, from the OpenAPI description that the gateway itself serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from millpond.hub.api import openapi


def http_page() -> str:
    """Every method of every path, and every kind of job."""
    described = openapi()
    schemas = described["components"]["schemas"]
    parts = [
        "# HTTP API",
        "The gateway serves this description at `GET /api/v1/openapi.json`. Requests are JSON with a bearer token; answers are "
        "bodies of the closed set, whose first byte is their type ([what leaves the vault](gate.md), "
        "[the gateway](gateway.md)).",
    ]
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            parts += [f"## {method.upper()} {path}", one["summary"], f"Scope: `{one['x-scope']}`."]
            if "requestBody" in one:
                schema = one["requestBody"]["content"]["application/json"]["schema"]
                parts.append(_table(schema, schemas))
    parts += ["# Jobs", "What the field `job` of `quote` and `jobs` takes, by its `kind`."]
    for kind, reference in schemas["Job"]["discriminator"]["mapping"].items():
        schema = schemas[reference.rpartition("/")[2]]
        parts += [f"## Job: {kind}", " ".join(schema.get("description", "").split()), _table(schema, schemas)]
    shown = set(schemas["Job"]["discriminator"]["mapping"].values())
    parts += ["# Parts of jobs", "What the fields above name."]
    for name, schema in sorted(schemas.items()):
        if f"#/components/schemas/{name}" not in shown and name != "Job" and schema.get("properties"):
            parts += [f"## Part: {name}", " ".join(schema.get("description", "").split()), _table(schema, schemas)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    rows = ["| field | type | |", "|---|---|---|"]
    needed = set(schema.get("required", ()))
    for name, one in schema.get("properties", {}).items():
        meaning = " ".join(one.get("description", "").split()).replace("|", "\\|")
        default = (
            f" Default `{one['default']}`."
            if one.get("default") not in (None, "", [], {}) and "const" not in one
            else ""
        )
        mark = "**needed** " if name in needed else ""
        rows.append(f"| `{name}` | {mark}{', '.join(_types(one, schemas))} | {meaning}{default} |")
    return "\n".join(rows)


def _types(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if schemas.get(name, {}).get("properties"):
            yield f"[{name}](#part-{name.lower()})"
        else:
            yield name
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif "enum" in schema:
        yield " or ".join(f"`{value}`" for value in schema["enum"])
    elif several := [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield " or ".join(kind for one in several for kind in _types(one, schemas) if kind != "null")
    elif schema.get("type") == "array":
        items = schema.get("items") or {}
        inner = ", ".join(_types(items, schemas)) if items else "anything"
        yield f"list of {inner}"
    else:
        yield {"string": "text", "number": "number", "object": "object"}.get(
            schema.get("type", ""), schema.get("type", "anything")
        )
