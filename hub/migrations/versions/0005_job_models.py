"""Which base model the worker of a job must run."""

import json
import os

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column, and fill it for the jobs that wait for a worker or are with one."""
    op.add_column("jobs", sa.Column("model", sa.Text, nullable=False, server_default=""))
    jobs = sa.table("jobs", *(sa.column(name, sa.Text) for name in ("id", "kind", "spec", "state", "model")))
    under_way = sa.select(jobs.c.id, jobs.c.kind, jobs.c.spec).where(
        jobs.c.kind.in_(("capture", "generate", "judge")), jobs.c.state.in_(("queued", "claimed"))
    )
    connection = op.get_bind()
    for job, kind, spec in connection.execute(under_way).all():
        given = json.loads(spec)
        model = given.get("work", {}).get(kind, given).get("model")
        if isinstance(model, dict) and "path" in model:
            base = f"{os.path.normpath(model['path'])}:{model.get('dtype', 'auto')}"
            connection.execute(jobs.update().where(jobs.c.id == job).values(model=base))


def downgrade() -> None:
    """Refused: a worker of any model would take every job."""
    raise RuntimeError("the models of jobs cannot be downgraded; restore a copy of the database")
