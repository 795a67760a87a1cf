"""How much of the vault's disk users take: prompts, labels and jobs, counted before they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from millpond.hub.tables import UPLOADS
from millpond.store.errors import QuotaExceeded


class Uploads:
    """What a database, from `open_database`, counts as brought in. Nothing is given back: clients can delete nothing."""

    def __init__(self, engine: sa.Engine, *, per_user: int, per_project: int) -> None:
        """Count.

        Args:
            engine: the hub's database.
            per_user: bytes that a user may bring, into all projects together.
            per_project: bytes that a project's members may bring into it.
        """
        self.engine = engine
        self.per_user = per_user
        self.per_project = per_project

    @contextmanager
    def taking(self, project: str, user: str, count: int) -> Iterator[None]:
        """Count bytes that are written inside; not if what is inside raises. A crash may count too many.

        Raises:
            QuotaExceeded: the user or the project has no room for so many; nothing was written.
        """
        self._add(project, user, count)
        try:
            yield
        except BaseException:
            self._add(project, user, -count)
            raise

    def _add(self, project: str, user: str, count: int) -> None:
        with self.engine.begin() as connection:
            for what, name, allowed in (("user", user, self.per_user), ("project", project, self.per_project)):
                here = UPLOADS.c.name == f"{what}:{name}"
                if connection.execute(sa.select(UPLOADS.c.bytes).where(here)).first() is None:
                    try:
                        with connection.begin_nested():
                            connection.execute(UPLOADS.insert().values(name=f"{what}:{name}", bytes=0))
                    except sa.exc.IntegrityError:  # somebody else's first upload, at once
                        pass
                fits = sa.or_(sa.literal(count < 0), UPLOADS.c.bytes + count <= allowed)
                done = connection.execute(UPLOADS.update().where(here, fits).values(bytes=UPLOADS.c.bytes + count))
                if not done.rowcount:
                    raise QuotaExceeded(
                        f"{what} {name!r} may bring {allowed:,} bytes, and {count:,} more do not fit; reuse what is "
                        f"there, or have the operator raise max_{what}_bytes"
                    )
