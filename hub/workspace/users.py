"""Host numbers of users: each name gets one for good, so that a home never changes hands."""

from __future__ import annotations

import json
import pwd
from pathlib import Path

from millpond.hub.workspace.settings import is_user
from millpond.store.errors import InvalidInput, IsolationFailed

MOST = 10_000


class UserNumbers:
    """Name to number, in a file that only root may write."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first = path, first
        self._numbers: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}

    def number(self, name: str) -> int:
        """The number of `name`, given now if it has none; raises InvalidInput for a name that no user may have."""
        if not is_user(name):
            raise InvalidInput(f"{name!r} cannot be a user's name; use small letters, digits and single hyphens")
        if name not in self._numbers:
            number = max(self._numbers.values(), default=self.first - 1) + 1
            if number >= self.first + MOST:
                raise IsolationFailed(f"all {MOST} numbers from {self.first} on are given")
            try:
                account = pwd.getpwuid(number).pw_name
            except KeyError:
                pass
            else:
                raise IsolationFailed(
                    f"number {number} belongs to the system's account {account!r}; set another first_uid"
                )
            numbers = {**self._numbers, name: number}
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(numbers, indent=1) + "\n")
            fresh.chmod(0o600)
            fresh.replace(self.path)
            self._numbers = numbers
        return self._numbers[name]
