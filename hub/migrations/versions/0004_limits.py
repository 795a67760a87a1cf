"""How long a job may run, and how much of the vault's disk uploads take."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column and the table."""
    op.add_column("jobs", sa.Column("seconds", sa.Double))
    op.create_table(
        "uploads",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Refused: jobs without a limit of time are not gone back to."""
    raise RuntimeError("limits cannot be downgraded; restore a copy of the database")
