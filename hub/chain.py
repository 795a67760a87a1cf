"""The ledger's hash chain: what an entry's hash covers, and the check of everything in the database against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millpond.hub.tables import ACCOUNTS, BODIES, CAPS, ENTRIES, HEAD, SHOWN
from millpond.store.errors import InvalidInput, LedgerCorrupt

GENESIS = "0" * 64


def entry_hash(seq: int, at: str, kind: str, detail: str, previous: str) -> str:
    """SHA-256 of an entry and, through `previous`, of all before it."""
    return hashlib.sha256("\n".join((str(seq), at, kind, detail, previous)).encode()).hexdigest()


def read_head(connection: sa.Connection, *, lock: bool = False) -> tuple[int, str]:
    """Number and hash of the last entry; with `lock`, nobody else may append before the transaction ends."""
    query = sa.select(HEAD.c.seq, HEAD.c.hash)
    seq, digest = connection.execute(query.with_for_update() if lock else query).one()
    return int(seq), str(digest)


def pairs(connection: sa.Connection, query: sa.Select[Any]) -> dict[str, int]:
    """The rows of a query for a name and a number."""
    return {str(name): int(number) for name, number in connection.execute(query)}


@dataclass(frozen=True)
class Whole:
    """What a ledger holds that agrees with its chain."""

    entries: int
    charged: int
    """Bytes."""
    head: str
    """Hash of the last entry."""


def verify_chain(engine: sa.Engine, anchors: Mapping[int, str]) -> Whole:
    """Check that everything in the database agrees with the chain; see `Ledger.verify`.

    Raises:
        LedgerCorrupt: something does not.
    """
    totals = _Totals()
    noted = dict(anchors)
    previous, count = GENESIS, 0
    with _snapshot(engine) as connection, closing(_links(connection, 0, GENESIS)) as links:
        for seq, kind, detail, digest in links:
            if noted.pop(seq, digest) != digest:
                raise LedgerCorrupt(f"entry {seq} is not the one noted earlier: it was rewritten; restore a copy")
            previous, count = digest, seq
            totals.add(seq, kind, json.loads(detail))
        if noted:
            raise LedgerCorrupt(
                f"the ledger ends at entry {count}; entry {max(noted)} was noted earlier; restore a copy"
            )
        _check_head(connection, count, previous)
        totals.check(connection)
    return Whole(count, totals.charged, previous)


def verify_tail(engine: sa.Engine, most: int) -> int:
    """Check the numbers and hashes of the last `most` entries, but neither what is before them nor the totals.

    Returns how many there were.

    Raises:
        LedgerCorrupt: one was changed or is missing.
    """
    with _snapshot(engine) as connection:
        last = read_head(connection)[0]
        first = max(last - most, 0)
        query = sa.select(ENTRIES.c.hash).where(ENTRIES.c.seq == first)
        previous, count = connection.scalar(query) or GENESIS, first
        for seq, _, _, digest in _links(connection, first, previous):
            previous, count = digest, seq
        _check_head(connection, count, previous)
    return count - first


def _snapshot(engine: sa.Engine) -> sa.Connection:
    """A connection that reads one state of the database, row by row."""
    isolation = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    return engine.execution_options(write=False, **isolation).connect().execution_options(yield_per=1000)


def _links(connection: sa.Connection, after: int, previous: str) -> Generator[tuple[int, str, str, str], None, None]:
    """Number, kind, detail and hash of each entry after number `after`, whose hash is `previous`, once it was checked."""
    query = sa.select(ENTRIES).where(ENTRIES.c.seq > after).order_by(ENTRIES.c.seq)
    with connection.execute(query) as rows:
        for count, (seq, at, kind, detail, before, digest) in enumerate(rows, after + 1):
            if seq != count or before != previous or digest != entry_hash(seq, at, kind, detail, before):
                raise LedgerCorrupt(f"entry {count} of the ledger was changed or is missing; restore a copy")
            yield seq, kind, detail, digest
            previous = digest


def _check_head(connection: sa.Connection, count: int, digest: str) -> None:
    if read_head(connection) != (count, digest):
        raise LedgerCorrupt(f"the ledger's head is not entry {count}, its last; entries were removed; restore a copy")


class _Totals:
    """What the entries say that the other tables hold."""

    def __init__(self) -> None:
        self.charged = 0
        self.spent: dict[str, int] = {}
        self.closed: dict[str, int] = {}
        self.caps: dict[str, int] = {}
        self.bodies: dict[str, tuple[int, str]] = {}
        self.shown: dict[int, str] = {}

    def add(self, seq: int, kind: str, entry: Mapping[str, Any]) -> None:
        if kind in ("charge", "closed"):
            self.charged += entry["bytes"]
            for name in entry["accounts"]:
                self.spent[name] = self.spent.get(name, 0) + entry["bytes"]
            self.closed |= entry.get("closed", {})
            if "key" in entry:
                self.bodies[entry["key"]] = (seq, entry["sha256"])
            if "shown" in entry:
                self.shown[seq] = entry["shown"]
        elif kind == "cap":
            self.caps[entry["account"]] = entry["bytes"]

    def check(self, connection: sa.Connection) -> None:
        accounts = {name: (total, closed) for name, total, closed in connection.execute(sa.select(ACCOUNTS))}
        expected = {name: (total, self.closed.get(name)) for name, total in self.spent.items()}
        _compare("account", accounts, expected)
        _compare("cap of", pairs(connection, sa.select(CAPS)), self.caps)
        bodies = {key: (seq, _sha256(body)) for key, seq, body in connection.execute(sa.select(BODIES))}
        _compare("body kept for", bodies, self.bodies)
        shown = {seq: _sha256(cohorts) for seq, _, cohorts in connection.execute(sa.select(SHOWN))}
        _compare("cohorts of entry", shown, self.shown)


def _compare(what: str, found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> None:
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise LedgerCorrupt(
                f"{what} {key!r} is {found.get(key)} in the database and {expected.get(key)} by the entries; restore a copy"
            )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_anchors(path: Path) -> dict[int, str]:
    """Heads noted in `path`, one `number hash` a line; none if there is no file.

    Raises:
        InvalidInput: a line is not that.
    """
    if not path.exists():
        return {}
    try:
        return {int(seq): digest for seq, digest in (line.split() for line in path.read_text().splitlines())}
    except ValueError as error:
        raise InvalidInput(f"{path} holds a line that is not `number hash`: {error}") from error
