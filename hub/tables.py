"""The hub's tables, as the migrations in `hub/migrations` make them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, LargeBinary, MetaData, Table, Text

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

PROJECTS = Table(
    "projects",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("models", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("by", Text, nullable=False),
)
"""`models` is a JSON list of names in the policy file."""

MEMBERS = Table(
    "project_members",
    METADATA,
    Column("project", Text, ForeignKey("projects.name"), primary_key=True),
    Column("user", Text, primary_key=True, index=True),
    Column("role", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("by", Text, nullable=False),
)

HELD = Table(
    "project_held",
    METADATA,
    Column("handle", LargeBinary, primary_key=True),
    Column("project", Text, ForeignKey("projects.name"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("at", Double, nullable=False),
)
"""What a project's members may name: handles stand for runs and artifacts of the lake, and for files of prompts."""

NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up only a column of this type."""

JOBS = Table(
    "jobs",
    METADATA,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("project", Text, nullable=False, index=True),
    Column("user", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("submitted", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker", Text),
    Column("lease_until", Double, nullable=False),
    Column("progress", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("seconds", Double),
    Column("model", Text, nullable=False, server_default=""),
)
"""Times are seconds since 1970; `spec`, `progress` and `result` are JSON; `seconds` is how long one claim may last;
`model` is the base model that the worker of the step must run, empty where any will do."""

QUEUE_USERS = Table(
    "queue_users",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("served", Double, nullable=False),
)
"""When a job of each user was last claimed. The row's lock puts those in a line who count the user's jobs; a project has a
row too, of a name that no user can have."""

JOB_EVENTS = Table(
    "job_events",
    METADATA,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("job", Text, ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", Double, nullable=False),
    Column("event", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("progress", Text, nullable=False),
)
"""What happened to each job, oldest first: what it was at the end of a slot is read here."""

UPLOADS = Table(
    "uploads",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("bytes", BigInteger, nullable=False),
)
"""What `user:NAME` and `project:NAME` have brought in: prompts, labels and jobs, none of which a client can delete."""

ANSWERS = Table(
    "answers",
    METADATA,
    Column("job", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("project", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("specification", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("result", LargeBinary, nullable=False),
    Column("evidence", LargeBinary, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("rules", Text, nullable=False),
)
"""What jobs have come to, written in the transaction that ends them and never changed."""

REVIEWS = Table(
    "reviews",
    METADATA,
    Column("job", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("project", Text, nullable=False, index=True),
    Column("user", Text, nullable=False),
    Column("rules", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("asked", Double, nullable=False),
    Column("by", Text),
    Column("decided", Double),
)
"""Answers that a reviewer decides about: waiting, approved or denied."""
