"""The ledger's tables, as the migrations in `hub/migrations` make them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, MetaData, Table, Text

METADATA = MetaData()

HEAD = Table(
    "ledger_head",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
)
"""One row: the last entry. Locking it puts all writers in a line."""

ENTRIES = Table(
    "ledger_entries",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
"""Append-only; `detail` is canonical JSON, `hash` is of the other columns."""

ACCOUNTS = Table(
    "ledger_accounts",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("spent", BigInteger, nullable=False),
    Column("closed_at", BigInteger),
)
"""Running totals of the entries, so that a charge need not add them up; `closed_at` is the cap at which it was closed."""

CAPS = Table(
    "ledger_caps",
    METADATA,
    Column("account", Text, primary_key=True),
    Column("bytes", BigInteger, nullable=False),
)
"""Caps in force: by scope and model, `user_week:llama-8b`, or for one account that was raised."""

BODIES = Table(
    "ledger_bodies",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("seq", BigInteger, ForeignKey("ledger_entries.seq"), nullable=False),
    Column("body", LargeBinary, nullable=False),
)
"""What was sent under a key, to be sent again: a job's status in a slot, a project's question."""

SHOWN = Table(
    "ledger_shown",
    METADATA,
    Column("seq", BigInteger, ForeignKey("ledger_entries.seq"), primary_key=True, autoincrement=False),
    Column("run", Text, nullable=False, index=True),
    Column("cohorts", LargeBinary, nullable=False),
)
"""What each release has shown of a run's prompts: `rules.Earlier`, for the differencing rules."""
