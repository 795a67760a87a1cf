"""`millpond ledger` and `millpond budget`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.ledger import Ledger


@dataclass(frozen=True)
class _LedgerAt:
    """Where the ledger is."""

    database: str
    """URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""
    policy: Path
    """The policy file."""

    def open(self) -> AbstractContextManager[Ledger]:
        """The ledger, closed at the end."""
        from millpond.hub.ledger import Ledger
        from millpond.hub.policy import read_policy

        return closing(Ledger(self.database, read_policy(self.policy)))


@dataclass(frozen=True)
class LedgerVerify:
    """Check every entry's hash, and totals, caps and kept bodies against the entries; the database is only read."""

    database: str
    """URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""
    anchors: Path | None = None
    """File of heads noted earlier, outside the vault; checked, then the head of today is added to it."""

    def run(self) -> int:
        """Print how many entries and bytes there are, and the head."""
        from millpond.hub.chain import read_anchors, verify_chain
        from millpond.hub.database import open_database

        engine = open_database(self.database, create=False)
        try:
            found = verify_chain(engine, read_anchors(self.anchors) if self.anchors else {})
        finally:
            engine.dispose()
        if self.anchors:
            with self.anchors.open("a") as handle:
                handle.write(f"{found.entries} {found.head}\n")
        print(
            f"the ledger is whole: {found.entries:,} entries, {found.charged:,} bytes charged; "
            f"head {found.entries} {found.head}"
        )
        return 0


@dataclass(frozen=True)
class LedgerAlerts(_LedgerAt):
    """List the alerts: budgets at 50, 80 and 95 percent."""

    def run(self) -> int:
        """Print one line an alert."""
        with self.open() as ledger:
            for alert in ledger.alerts():
                print(f"{alert['seq']:>9} {alert['percent']:>3} % of {alert['cap']:,} bytes: {alert['account']}")
        return 0


@dataclass(frozen=True)
class BudgetPlan:
    """Price a plan of work and compare it with a user's week; nothing is spent."""

    plan: Annotated[Path, tyro.conf.Positional]
    """The plan; docs/week.toml is one."""
    policy: Path | None = None
    """The policy file; the defaults without it."""
    model: str | None = None
    """A model of the policy file."""
    parameters: int | None = None
    """In place of a model: how many parameters it has."""

    def run(self) -> int:
        """Print one line an item; 1 if it does not fit."""
        from millpond.hub.budget import price, read_plan
        from millpond.hub.policy import ModelPolicy, Policy, read_policy

        if (self.model is None) == (self.parameters is None) or (self.model and not self.policy):
            raise InvalidInput("give --parameters, or --policy and --model")
        policy = read_policy(self.policy) if self.policy else Policy()
        if self.parameters is not None:
            policy = policy.model_copy(update={"models": {"plan": ModelPolicy(parameters=self.parameters)}})
        cap = policy.cap(self.model or "plan", "user_week")
        items = price(read_plan(self.plan), policy.charges)
        for item in items:
            print(f"{item.bytes:>12,}  {item.times:>4} x {item.what}")
        total = sum(item.bytes for item in items)
        fits = cap is None or total <= cap
        limit = "a public model has no cap" if cap is None else f"a user's week allows {cap:,}"
        print(f"{total:>12,}  bytes at most; {limit}: {'fits' if fits else 'does not fit'}")
        return 0 if fits else 1


@dataclass(frozen=True)
class BudgetShow(_LedgerAt):
    """Show the caps that wait for a second person."""

    def run(self) -> int:
        """Print one line a cap."""
        with self.open() as ledger:
            for change in ledger.waiting():
                print(f"{change.seq:>9} {change.account} to {change.bytes:,} bytes, asked by {change.by}")
        return 0


@dataclass(frozen=True)
class BudgetRaise(_LedgerAt):
    """Ask for another cap, as the system user that you are; a higher one needs somebody else's approval."""

    account: Annotated[str, tyro.conf.Positional]
    """scope:model, such as user_week:llama-8b, or one account's name."""
    bytes: Annotated[int, tyro.conf.Positional]
    """The new cap."""

    def run(self) -> int:
        """Print what happens next."""
        with self.open() as ledger:
            change = ledger.propose_cap(self.account, self.bytes, by=_system_user())
        print("in force" if change is None else f"somebody else: millpond budget approve {change.seq}")
        return 0


@dataclass(frozen=True)
class BudgetApprove(_LedgerAt):
    """Approve a cap that somebody else asked for, as the system user that you are."""

    seq: Annotated[int, tyro.conf.Positional]
    """The entry that asks for it."""

    def run(self) -> int:
        """Put the cap into force."""
        with self.open() as ledger:
            ledger.approve_cap(self.seq, by=_system_user())
        print("in force")
        return 0


def _system_user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
