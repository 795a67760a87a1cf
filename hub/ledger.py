"""How many bytes left, for whom, of which model: charged before they leave, never above a cap, and never rewritten.

A charge is one transaction: lock the head, look at every cap, add to every account, append an entry to the hash chain.
The caller sends only after it was committed. A crash in between leaves bytes charged and not sent, never the reverse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from millpond.hub.caps import CapChange, asked_caps, cap_changes, set_by_two
from millpond.hub.chain import Whole, entry_hash, pairs, read_head, verify_chain
from millpond.hub.database import open_database
from millpond.hub.policy import SCOPES, Policy
from millpond.hub.tables import ACCOUNTS, BODIES, CAPS, ENTRIES, HEAD, SHOWN
from millpond.store.errors import BudgetSpent, InvalidInput

ALERTS = (50, 80, 95)
"""Percentages of a cap at which an alert is written."""


@dataclass(frozen=True)
class Payer:
    """Who pays: a user for a project, out of the budgets of the models that the answer may depend on."""

    user: str
    project: str
    models: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, value in (("user", self.user), ("project", self.project), *(("model", name) for name in self.models)):
            if not value or any(mark in value for mark in ":/\n"):
                raise InvalidInput(f"{what} {value!r} is not allowed here; use a name without ':', '/' and line ends")
        if not self.models or len(set(self.models)) < len(self.models):
            raise InvalidInput(
                f"models is {self.models}; name each that the answer may depend on once, or all of the vault's"
            )


@dataclass(frozen=True)
class Account:
    """One budget."""

    scope: str
    model: str
    subject: str
    """The user and week, the project, or nothing."""

    @property
    def name(self) -> str:
        """Its key in the database."""
        return f"{self.scope}:{self.model}:{self.subject}"


@dataclass(frozen=True)
class Balance:
    """An account's state."""

    account: Account
    spent: int
    closed_at: int | None
    """The cap at which it was closed; a higher one opens it again."""
    cap: int | None
    """None where it is only metered."""

    @property
    def closed(self) -> bool:
        """Whether nothing more may leave."""
        return self.cap is not None and self.closed_at is not None and self.cap <= self.closed_at

    @property
    def left(self) -> int | None:
        """Bytes that may still leave."""
        if self.cap is None:
            return None
        return 0 if self.closed else max(0, self.cap - self.spent)


@dataclass(frozen=True)
class Sent:
    """What to send now: it is paid for."""

    body: bytes
    charged: int
    seq: int


class Ledger:
    """The ledger in the database at `url`: `sqlite:///FILE` or `postgresql+psycopg://...`."""

    def __init__(self, url: str, policy: Policy, *, now: Callable[[], datetime] | None = None) -> None:
        self.policy = policy
        self._now = now or (lambda: datetime.now(UTC))
        self._engine = open_database(url)
        self._reader = self._engine.execution_options(write=False)
        self._adopt_caps()

    @property
    def notice_bytes(self) -> int:
        """What the notice costs that a budget is spent: a response whose body is one byte."""
        return 1 + self.policy.charges.response_bytes

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def accounts(self, payer: Payer) -> tuple[Account, ...]:
        """The budgets that `payer` draws on now."""
        year, week, _ = self._now().isocalendar()
        subjects = {"user_week": f"{payer.user}/{year}-W{week:02}", "project": payer.project, "lifetime": ""}
        return tuple(Account(scope, model, subjects[scope]) for model in payer.models for scope in SCOPES)

    def balances(self, payer: Payer) -> tuple[Balance, ...]:
        """What `payer` has spent and may spend."""
        with self._reader.connect() as connection:
            return self.read_balances(connection, self.accounts(payer))

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """A transaction that no other writer overlaps, committed durably at its end."""
        with self._engine.begin() as connection:
            # the row's lock on PostgreSQL; SQLite has locked the database with BEGIN IMMEDIATE
            yield Writer(self, connection, read_head(connection, lock=True), self._now())

    def charge(self, payer: Payer, count: int, *, what: str, body: bytes = b"") -> Sent:
        """Charge `count` bytes to all of `payer`'s budgets and return `body` to be sent.

        Raises:
            BudgetSpent: a budget is closed, or is closed now because the charge would exceed it.
        """
        with self.writing() as writer:
            sent = writer.charge(payer, count, what=what, body=body)
        if sent is None:
            raise BudgetSpent(
                "a budget is spent: wait for the next week, or have two people raise the cap (millpond budget)"
            )
        return sent

    def known(self, key: str) -> Sent | None:
        """What was sent under `key`, at no charge."""
        with self._reader.connect() as connection:
            return _kept(connection, key)

    def read_balances(self, connection: sa.Connection, accounts: Sequence[Account]) -> tuple[Balance, ...]:
        """The state of `accounts` in this transaction."""
        names = [account.name for account in accounts]
        rows = connection.execute(sa.select(ACCOUNTS).where(ACCOUNTS.c.name.in_(names)))
        spent = {name: (total, closed_at) for name, total, closed_at in rows}
        scopes = [f"{account.scope}:{account.model}" for account in accounts]
        caps = pairs(connection, sa.select(CAPS).where(CAPS.c.account.in_(names + scopes)))
        return tuple(
            Balance(
                account,
                *spent.get(account.name, (0, None)),
                None if self.policy.model(account.model).public else caps.get(account.name, caps.get(scope)),
            )
            for account, scope in zip(accounts, scopes, strict=True)
        )

    def propose_cap(self, account: str, count: int, *, by: str) -> CapChange | None:
        """Ask for a cap of `count` bytes; a lower one holds at once (None), a higher one when somebody else approves.

        `account` is `scope:model` for all of a scope, or one account's name.

        Raises:
            InvalidInput: no such budget, or more than the policy's floor allows.
        """
        self._check_ceiling(account, count)
        with self.writing() as writer:
            if count <= writer.cap(account):
                writer.set_cap(account, count, [by])
                return None
            return CapChange(
                writer.append("cap-asked", {"account": account, "bytes": count, "by": by}), account, count, by
            )

    def approve_cap(self, seq: int, *, by: str) -> None:
        """Put the cap asked for in entry `seq` into force.

        Raises:
            InvalidInput: nobody asked, it was approved before, or `by` is who asked.
        """
        with self.writing() as writer:
            change = writer.asked().get(seq)
            if change is None:
                raise InvalidInput(f"entry {seq} asks for no cap that still waits; see `millpond budget show`")
            if change.by == by:
                raise InvalidInput(f"{by!r} asked for this cap; somebody else must approve it")
            self._check_ceiling(change.account, change.bytes)
            writer.set_cap(change.account, change.bytes, [change.by, by], asked=seq)

    def waiting(self) -> tuple[CapChange, ...]:
        """Caps that wait for a second person."""
        with self._reader.connect() as connection:
            return tuple(asked_caps(connection).values())

    def alerts(self, since: int = 0) -> list[dict[str, Any]]:
        """Alerts after entry `since`, oldest first: account, percent, spent, cap, seq."""
        query = sa.select(ENTRIES.c.seq, ENTRIES.c.detail).where(ENTRIES.c.kind == "alert", ENTRIES.c.seq > since)
        with self._reader.connect() as connection:
            rows = connection.execute(query.order_by(ENTRIES.c.seq)).all()
        return [{"seq": seq} | json.loads(detail) for seq, detail in rows]

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry; kept elsewhere, it proves later that nothing before it changed."""
        with self._reader.connect() as connection:
            return read_head(connection)

    def verify(self, anchors: Mapping[int, str] | None = None) -> Whole:
        """Check the chain, and the totals, the caps and what was kept against it.

        `anchors` are heads noted earlier. Only they can show that the end of the ledger, or all of it, was replaced.

        Raises:
            LedgerCorrupt: something was changed; the message says what.
        """
        return verify_chain(self._engine, anchors or {})

    def _check_ceiling(self, account: str, count: int) -> None:
        scope, model, *_ = [*account.split(":"), ""]
        if scope not in SCOPES or model not in self.policy.models or self.policy.cap(model, scope) is None:
            raise InvalidInput(
                f"{account!r} is no capped budget; give scope:model[:subject], scope one of {', '.join(SCOPES)}"
            )
        highest = self.policy.ceiling(model, scope)
        if not 0 <= count <= highest:
            raise InvalidInput(f"a {scope} cap of {count:,} bytes for {model!r} is not allowed: from 0 to {highest:,}")

    def _adopt_caps(self) -> None:
        """Take over the policy file's caps. A file, which one person can edit, lowers caps in force and never raises one."""
        asked = {
            f"{scope}:{model}": cap
            for model in self.policy.models
            for scope in SCOPES
            if (cap := self.policy.cap(model, scope)) is not None
        }
        with self._reader.connect() as connection:
            if all(cap >= now for cap, now in cap_changes(connection, asked)):
                return
        with self.writing() as writer:
            writer.adopt(asked)


class Writer:
    """The only writer, for the time of a transaction."""

    def __init__(self, ledger: Ledger, connection: sa.Connection, head: tuple[int, str], now: datetime) -> None:
        self._ledger = ledger
        self._connection = connection
        self._head = head
        self._now = now

    def known(self, key: str) -> Sent | None:
        """What was sent under `key`, at no charge."""
        return _kept(self._connection, key)

    def earlier(self, run: str) -> list[bytes]:
        """What earlier releases have shown of `run`, oldest first."""
        query = sa.select(SHOWN.c.cohorts).where(SHOWN.c.run == run).order_by(SHOWN.c.seq)
        return list(self._connection.scalars(query))

    def charge(
        self,
        payer: Payer,
        count: int,
        *,
        what: str,
        body: bytes,
        key: str | None = None,
        shown: tuple[str, bytes] | None = None,
    ) -> Sent | None:
        """Charge `count` bytes for `body`, and keep it under `key`; None if a budget is closed or too small.

        A budget that is too small is closed then, whatever is asked later: otherwise each refusal would tell, at no
        charge, how long the answer would have been. The notice of it is charged; every budget keeps room for one.
        """
        if count < 0:
            raise InvalidInput(f"a charge of {count} bytes is not possible")
        room = count + self._ledger.notice_bytes
        balances = self._ledger.read_balances(self._connection, self._ledger.accounts(payer))
        if any(balance.closed for balance in balances):
            return None
        if any(balance.cap is not None and balance.spent + room > balance.cap for balance in balances):
            self._close(payer, balances, count)
            return None
        detail: dict[str, Any] = {"bytes": count, "what": what, "sha256": hashlib.sha256(body).hexdigest()}
        if key is not None:
            detail["key"] = key
        if shown is not None:
            detail["shown"] = hashlib.sha256(shown[1]).hexdigest()
        seq = self._spend("charge", payer, balances, detail)
        if key is not None:
            self._connection.execute(BODIES.insert().values(key=key, seq=seq, body=body))
        if shown is not None:
            self._connection.execute(SHOWN.insert().values(seq=seq, run=shown[0], cohorts=shown[1]))
        return Sent(body, count, seq)

    def append(self, kind: str, detail: Mapping[str, Any]) -> int:
        """Add an entry to the chain; returns its number."""
        seq, previous = self._head[0] + 1, self._head[1]
        at = self._now.isoformat(timespec="milliseconds")
        text = json.dumps(detail, sort_keys=True, separators=(",", ":"))
        digest = entry_hash(seq, at, kind, text, previous)
        row = {"seq": seq, "at": at, "kind": kind, "detail": text, "previous": previous, "hash": digest}
        self._connection.execute(ENTRIES.insert().values(row))
        self._connection.execute(HEAD.update().values(seq=seq, hash=digest))
        self._head = (seq, digest)
        return seq

    def cap(self, account: str) -> int:
        """The cap in force: the account's own, else its scope's."""
        scope = ":".join(account.split(":")[:2])
        query = sa.select(CAPS).where(CAPS.c.account.in_((account, scope)))
        caps = pairs(self._connection, query)
        return caps.get(account, caps[scope])

    def set_cap(self, account: str, count: int, by: Sequence[str], **more: int) -> None:
        """Put a cap into force."""
        self.append("cap", {"account": account, "bytes": count, "by": list(by), **more})
        change = CAPS.update().where(CAPS.c.account == account).values(bytes=count)
        if not self._connection.execute(change).rowcount:
            self._connection.execute(CAPS.insert().values(account=account, bytes=count))

    def asked(self) -> dict[int, CapChange]:
        """Caps that wait for a second person, by their entry."""
        return asked_caps(self._connection)

    def adopt(self, caps: Mapping[str, int]) -> None:
        """Put those of `caps` into force that are new or lower than what is in force and not two people's decision."""
        now = pairs(self._connection, sa.select(CAPS))
        by_two = set_by_two(self._connection)
        for account, cap in caps.items():
            if account not in now or (cap < now[account] and account not in by_two):
                self.set_cap(account, cap, ["policy"])

    def _close(self, payer: Payer, balances: Sequence[Balance], count: int) -> None:
        notice = self._ledger.notice_bytes
        # only a cap lowered below what was spent leaves no room for the notice, and that was no secret's doing
        room = all(balance.cap is None or balance.spent + notice <= balance.cap for balance in balances)
        charged = notice if room else 0
        full = {
            balance.account.name: balance.cap
            for balance in balances
            if balance.cap is not None and balance.spent + max(count, charged) + notice > balance.cap
        }
        self._spend("closed", payer, balances, {"bytes": charged, "what": "Closed", "closed": full})
        for name, cap in full.items():
            self._connection.execute(ACCOUNTS.update().where(ACCOUNTS.c.name == name).values(closed_at=cap))

    def _spend(self, kind: str, payer: Payer, balances: Sequence[Balance], detail: dict[str, Any]) -> int:
        names, count = [balance.account.name for balance in balances], detail["bytes"]
        change = ACCOUNTS.update().where(ACCOUNTS.c.name.in_(names)).values(spent=ACCOUNTS.c.spent + count)
        if self._connection.execute(change).rowcount < len(names):
            there = set(self._connection.scalars(sa.select(ACCOUNTS.c.name).where(ACCOUNTS.c.name.in_(names))))
            rows = [{"name": name, "spent": count} for name in names if name not in there]
            self._connection.execute(ACCOUNTS.insert(), rows)
        seq = self.append(kind, detail | {"accounts": names, "user": payer.user})
        for balance in balances:
            after, cap = balance.spent + count, balance.cap
            for percent in ALERTS:
                if cap and 100 * balance.spent < percent * cap <= 100 * after:
                    alert = {"account": balance.account.name, "percent": percent, "spent": after, "cap": cap}
                    self.append("alert", alert)
        return seq


def _kept(connection: sa.Connection, key: str) -> Sent | None:
    row = connection.execute(sa.select(BODIES.c.seq, BODIES.c.body).where(BODIES.c.key == key)).first()
    return None if row is None else Sent(bytes(row[1]), 0, int(row[0]))
