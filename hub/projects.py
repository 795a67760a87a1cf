"""Projects: who belongs to them, with which role, and what they hold.

Whatever belongs to another project, or to none, is answered in the same way: it is not held.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from millpond.hub.projection import new_handle
from millpond.hub.tables import HELD, MEMBERS, PROJECTS
from millpond.store.errors import InvalidInput, NotHeld, NotPermitted

Role = Literal["reader", "researcher", "reviewer", "owner"]
Right = Literal["read", "run", "review", "manage"]
HeldKind = Literal["run", "artifact", "prompts"]

RIGHTS: Mapping[Role, frozenset[Right]] = {
    "reader": frozenset({"read"}),
    "researcher": frozenset({"read", "run"}),
    "reviewer": frozenset({"read", "review"}),
    "owner": frozenset({"read", "run", "review", "manage"}),
}
"""What each role may do in its project; a scope of the caller's credential may take some of it away."""


@dataclass(frozen=True)
class Held:
    """Something that a project's members may name."""

    handle: bytes
    """Random, 8 bytes."""
    project: str
    kind: HeldKind
    name: str
    """The project's own, unique among what it holds of the kind."""
    target: str
    """Where it is in the vault: a run's or an artifact's name in the lake, a file of prompts."""
    model: str
    """In the policy file."""
    detail: Mapping[str, Any]


class Projects:
    """The projects of a database, from `open_database`."""

    def __init__(self, engine: sa.Engine, *, now: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self._now = now
        self._reader = engine.execution_options(write=False)

    def create(self, name: str, *, models: Iterable[str], by: str) -> None:
        """Make a project that may use `models` of the policy file; `by` becomes its owner.

        Raises:
            InvalidInput: the name cannot be used or is taken, or there is no model.
        """
        check_name("project", name)
        check_name("user", by)
        names = sorted(set(models))
        if not names:
            raise InvalidInput(f"project {name!r} has no models; name each that its answers may depend on")
        row = {"name": name, "models": json.dumps(names), "created": self._now(), "by": by}
        try:
            with self.engine.begin() as connection:
                connection.execute(PROJECTS.insert().values(row))
                self._add(connection, name, by, "owner", by)
        except sa.exc.IntegrityError as error:
            raise InvalidInput(f"project {name!r} exists already; choose another name") from error

    def of(self, user: str) -> tuple[str, ...]:
        """The projects that `user` is a member of, by name."""
        query = sa.select(MEMBERS.c.project).where(MEMBERS.c.user == user).order_by(MEMBERS.c.project)
        with self._reader.connect() as connection:
            return tuple(connection.scalars(query))

    def all(self) -> tuple[str, ...]:
        """Every project, by name: for administrators."""
        with self._reader.connect() as connection:
            return tuple(connection.scalars(sa.select(PROJECTS.c.name).order_by(PROJECTS.c.name)))

    def models(self, project: str) -> tuple[str, ...]:
        """The models that the project may use; none for a project that is not there."""
        with self._reader.connect() as connection:
            found = connection.scalar(sa.select(PROJECTS.c.models).where(PROJECTS.c.name == project))
        return () if found is None else tuple(json.loads(found))

    def role(self, project: str, user: str) -> Role | None:
        """The role of `user`; None for a stranger, and where there is no such project."""
        with self._reader.connect() as connection:
            return _role(connection, project, user)

    def may(self, project: str, user: str, right: Right) -> bool:
        """Whether the role of `user` has `right`."""
        role = self.role(project, user)
        return role is not None and right in RIGHTS[role]

    def members(self, project: str) -> tuple[tuple[str, Role], ...]:
        """The members and their roles, by name."""
        query = sa.select(MEMBERS.c.user, MEMBERS.c.role).where(MEMBERS.c.project == project).order_by(MEMBERS.c.user)
        with self._reader.connect() as connection:
            return tuple((user, role) for user, role in connection.execute(query))

    def set_role(self, project: str, user: str, role: Role | None, *, by: str, admin: bool = False) -> None:
        """Give `user` a role, or with None take it away; for owners, and for administrators of the installation.

        Raises:
            NotPermitted: `by` is neither.
            InvalidInput: there is no such role or project, or nobody would own the project.
        """
        check_name("user", user)
        if role is not None and role not in RIGHTS:
            raise InvalidInput(f"role {role!r} does not exist; give one of {', '.join(get_args(Role))}")
        with self.engine.begin() as connection:
            # locks the project: of two owners who leave at once, the second sees that it is the last
            there = sa.select(PROJECTS.c.name).where(PROJECTS.c.name == project).with_for_update()
            found = connection.execute(there).first() is not None
            if not admin and _role(connection, project, by) != "owner":
                raise NotPermitted(f"{by!r} does not own project {project!r}; ask an owner")
            if not found:
                raise InvalidInput(f"project {project!r} does not exist; create it first")
            here = (MEMBERS.c.project == project, MEMBERS.c.user == user)
            connection.execute(MEMBERS.delete().where(*here))
            if role is not None:
                self._add(connection, project, user, role, by)
            owners = sa.select(MEMBERS.c.user).where(MEMBERS.c.project == project, MEMBERS.c.role == "owner")
            if connection.execute(owners).first() is None:
                raise InvalidInput(f"{user!r} is the last owner of {project!r}; name another owner first")

    def hold(
        self,
        project: str,
        kind: HeldKind,
        name: str,
        target: str,
        *,
        model: str,
        detail: Mapping[str, Any] | None = None,
        connection: sa.Connection | None = None,
    ) -> Held:
        """Give a project a handle of `target`; with `connection`, in that transaction, such as a job's end.

        Raises:
            InvalidInput: the project is not there, or holds something of that kind and name already.
        """
        check_name(kind, name)
        if kind not in get_args(HeldKind):
            raise InvalidInput(f"kind {kind!r} cannot be held; give one of {', '.join(get_args(HeldKind))}")
        held = Held(new_handle(), project, kind, name, target, model, dict(detail or {}))
        row = held.__dict__ | {"detail": json.dumps(held.detail), "at": self._now()}
        opened: AbstractContextManager[sa.Connection]
        opened = self.engine.begin() if connection is None else nullcontext(connection)
        with opened as inside:
            if inside.scalar(sa.select(PROJECTS.c.name).where(PROJECTS.c.name == project)) is None:
                raise InvalidInput(f"project {project!r} does not exist; create it first")
            try:
                with inside.begin_nested():
                    inside.execute(HELD.insert().values(row))
            except sa.exc.IntegrityError as error:
                raise InvalidInput(f"project {project!r} holds {kind} {name!r} already; choose another name") from error
        return held

    def find(self, project: str, kind: HeldKind, handle: bytes) -> Held:
        """What `project` holds under `handle`.

        Raises:
            NotHeld: nothing; the text is the same whether or not another project does.
        """
        here = (HELD.c.project == project, HELD.c.kind == kind, HELD.c.handle == handle)
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(HELD).where(*here)).first()
        if row is None:
            raise NotHeld(f"project {project!r} holds no {kind} of that handle; list what it holds")
        return _held(row)

    def named(self, project: str, kind: HeldKind, name: str) -> Held:
        """What `project` holds under `name`.

        Raises:
            NotHeld: nothing.
        """
        here = (HELD.c.project == project, HELD.c.kind == kind, HELD.c.name == name)
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(HELD).where(*here)).first()
        if row is None:
            raise NotHeld(f"project {project!r} holds no {kind} of that name; list what it holds")
        return _held(row)

    def held(self, project: str, kind: HeldKind) -> tuple[Held, ...]:
        """Everything of `kind` that `project` holds, oldest first."""
        query = sa.select(HELD).where(HELD.c.project == project, HELD.c.kind == kind)
        with self._reader.connect() as connection:
            return tuple(_held(row) for row in connection.execute(query.order_by(HELD.c.at, HELD.c.name)))

    def _add(self, connection: sa.Connection, project: str, user: str, role: Role, by: str) -> None:
        row = {"project": project, "user": user, "role": role, "at": self._now(), "by": by}
        connection.execute(MEMBERS.insert().values(row))


def check_name(what: str, value: str) -> None:
    """Raises InvalidInput unless `value` can name a project, a user or something held."""
    if not re.fullmatch(r"[\w.@+-](?:[\w.@+ -]{0,126}[\w.@+-])?", value):
        raise InvalidInput(
            f"{what} {value!r} is not allowed; use 1 to 128 letters, digits, '.', '_', '@', '+', '-' and inner spaces"
        )


def _role(connection: sa.Connection, project: str, user: str) -> Role | None:
    here = (MEMBERS.c.project == project, MEMBERS.c.user == user)
    found: Role | None = connection.scalar(sa.select(MEMBERS.c.role).where(*here))
    return found


def _held(row: sa.Row[Any]) -> Held:
    return Held(bytes(row.handle), row.project, row.kind, row.name, row.target, row.model, json.loads(row.detail))
