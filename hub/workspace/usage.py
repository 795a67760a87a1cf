"""How many bytes went from each user's workspace to the browser today, and no more than were allowed.

Bytes are reserved on disk in blocks before they are sent, as the egress meter does: after a crash too many are counted.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

EVENT_BYTES = 16
"""Charged for every message beside its length, for what its time and order may say."""


class Usage:
    """Counts by user and day (UTC)."""

    def __init__(self, path: Path, daily_bytes: int) -> None:
        self.daily_bytes = daily_bytes
        self._block = max(1 << 12, daily_bytes // 256)
        self._spent: dict[tuple[str, str], int] = {}
        self._reserved: dict[tuple[str, str], int] = {}
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS usage (user TEXT, day TEXT, bytes INTEGER NOT NULL, PRIMARY KEY (user, day))"
        )
        for user, day, count in self._database.execute("SELECT user, day, bytes FROM usage WHERE day = ?", (_today(),)):
            self._spent[user, day] = self._reserved[user, day] = count

    def spend(self, user: str, count: int) -> bool:
        """Count `count` bytes and one event; False, and nothing is counted, when they are too many for today."""
        key = (user, _today())
        spent = self._spent.get(key, 0) + count + EVENT_BYTES
        if spent > self.daily_bytes:
            return False
        if spent > self._reserved.get(key, 0):
            self._reserved[key] = min(self.daily_bytes, spent + self._block)
            with self._database:
                self._database.execute(
                    "INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT (user, day) DO UPDATE SET bytes = excluded.bytes",
                    (*key, self._reserved[key]),
                )
        self._spent[key] = spent
        return True

    def spent(self, user: str) -> int:
        """Bytes of today."""
        return self._spent.get((user, _today()), 0)

    def close(self) -> None:
        """Note exactly what was spent."""
        with self._database:
            for (user, day), count in self._spent.items():
                self._database.execute("UPDATE usage SET bytes = ? WHERE user = ? AND day = ?", (count, user, day))
        self._database.close()


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
