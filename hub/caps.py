"""Caps of budgets as the ledger's entries tell them: what was asked for, what two people decided, what is in force."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from millpond.hub.chain import pairs
from millpond.hub.tables import CAPS, ENTRIES


@dataclass(frozen=True)
class CapChange:
    """A cap that somebody asked to raise and nobody else has approved yet."""

    seq: int
    account: str
    bytes: int
    by: str


def asked_caps(connection: sa.Connection) -> dict[int, CapChange]:
    """Caps that wait for a second person, by their entry."""
    query = sa.select(ENTRIES.c.seq, ENTRIES.c.kind, ENTRIES.c.detail).where(ENTRIES.c.kind.in_(("cap-asked", "cap")))
    asked: dict[int, CapChange] = {}
    for seq, kind, text in connection.execute(query.order_by(ENTRIES.c.seq)):
        detail = json.loads(text)
        if kind == "cap-asked":
            asked[seq] = CapChange(seq, detail["account"], detail["bytes"], detail["by"])
        else:
            asked.pop(detail.get("asked"), None)
    return asked


def set_by_two(connection: sa.Connection) -> set[str]:
    """Accounts and scopes whose cap two people set last."""
    query = sa.select(ENTRIES.c.detail).where(ENTRIES.c.kind == "cap").order_by(ENTRIES.c.seq)
    last = {entry["account"]: len(entry["by"]) for entry in map(json.loads, connection.scalars(query))}
    return {account for account, people in last.items() if people > 1}


def cap_changes(connection: sa.Connection, asked: Mapping[str, int]) -> list[tuple[int, int]]:
    """What is asked for and in force, of each of `asked`; in force beyond measure where nothing is yet."""
    now = pairs(connection, sa.select(CAPS))
    by_two = set_by_two(connection)
    return [(cap, now.get(account, cap + 1)) for account, cap in asked.items() if account not in by_two]
