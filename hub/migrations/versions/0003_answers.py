"""What jobs have come to, and what reviewers decided."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "answers",
        sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("specification", sa.Text, nullable=False),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("result", sa.LargeBinary, nullable=False),
        sa.Column("evidence", sa.LargeBinary, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("rules", sa.Text, nullable=False),
    )
    op.create_table(
        "reviews",
        sa.Column("job", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("project", sa.Text, nullable=False, index=True),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("rules", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("asked", sa.Double, nullable=False),
        sa.Column("by", sa.Text),
        sa.Column("decided", sa.Double),
        sa.ForeignKeyConstraint(["job", "number"], ["answers.job", "answers.number"]),
    )


def downgrade() -> None:
    """Refused: answers that were charged for are never thrown away."""
    raise RuntimeError("answers cannot be downgraded; restore a copy of the database")
