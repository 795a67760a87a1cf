"""The hub's database: SQLite with a write-ahead log, or PostgreSQL, brought to the newest schema when it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATION_LOCK = 7_061_998
"""Any number: two processes that open a new PostgreSQL database must not both migrate it."""


def open_database(url: str, *, create: bool = True) -> sa.Engine:
    """An engine for `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.

    With `create`, the database is made or migrated to the newest schema; without, it is left as it is.

    With SQLite, a transaction takes the write lock when it begins, unless its engine has the option `write=False`.

    Raises:
        InvalidInput: the URL is neither, or without `create` the file is not there.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise InvalidInput(f"database {url!r}: {error}; give sqlite:///FILE or postgresql+psycopg://...") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        engine = sa.create_engine(parsed, isolation_level="READ COMMITTED", pool_pre_ping=True)
    elif backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        if not create and not Path(parsed.database or "").is_file():
            raise InvalidInput(f"there is no database {parsed.database}; give the gateway's")
        engine = _sqlite(parsed)
    else:
        raise InvalidInput(f"database {url!r} is not supported; give sqlite:///FILE or postgresql+psycopg://...")
    if create:
        _migrate(engine)
    return engine


def _sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": 60})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # or sqlite3 would begin transactions by itself
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("write", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def revision(connection: sa.Connection) -> str | None:
    """The schema that a database has; None before its first migration."""
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def newest_revision() -> str:
    """The schema that this Millpond works with."""
    from alembic.script import ScriptDirectory

    newest = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert newest is not None
    return newest


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _migrate(engine: sa.Engine) -> None:
    from alembic import command

    config = _alembic()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
