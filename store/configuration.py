"""What a lake's owner decides for everybody: quotas, how long things are kept, where analyses run (`lake.json` in the lake)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from millpond.store.capture_spec import first_problem
from millpond.store.cluster import ClusterSettings
from millpond.store.errors import InvalidInput, QuotaExceeded
from millpond.store.files import decode_document, encode_document

if TYPE_CHECKING:
    from millpond.store.lake import Lake

log = logging.getLogger(__name__)

CONFIGURATION = "lake.json"
QUOTA_SECONDS = 60.0
"""A writer looks at the quotas and at what others have written so often,"""
QUOTA_PARTS = 16
"""and whenever it has taken this part of what was left when it looked,"""
QUOTA_BYTES = 1 << 20
"""but not for fewer bytes."""


class LakeConfiguration(BaseModel):
    """Settings of a lake; every field has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quota_bytes: int | None = Field(default=None, ge=0)
    """Most bytes of all runs together; None for no limit."""
    run_quota_bytes: int | None = Field(default=None, ge=0)
    """Most bytes of one run."""
    deletion_grace_s: float = Field(default=7 * 86400, ge=0)
    """How long a removed run can be restored."""
    collection_grace_s: float = Field(default=3600, ge=0)
    """How long readers may go on reading what was superseded, and writers may leave a segment untouched."""
    keep_runs_s: float | None = Field(default=None, gt=0)
    """Sealed runs older than this are removed by `millpond gc`, with the grace period; None keeps them."""
    cluster: ClusterSettings | None = None
    """The Dask cluster that analyses of this lake run on; None for workers on the machine that asks."""
    hosts: dict[str, str] = {}
    """Which host holds what: paths in the lake, such as `runs/NAME` or `runs/NAME/segments/ID`, and a Dask worker's
    address, name, or host. Passes prefer that worker for rows below the longest path that fits."""

    @field_validator("hosts")
    @classmethod
    def _are_paths(cls, value: dict[str, str]) -> dict[str, str]:
        for path, host in value.items():
            if path.startswith("/") or path.endswith("/") or ":" in path or not path or not host:
                raise ValueError(f"{path!r} is no path in the lake, such as runs/NAME, with a host")
        return value


def read_configuration(lake: Lake) -> LakeConfiguration:
    """The configuration of a lake, or the defaults where it has none.

    Raises:
        InvalidInput: it cannot be used.
    """
    try:
        data = lake.storage.get(CONFIGURATION)
    except FileNotFoundError:
        return LakeConfiguration()
    where = f"{lake.url}/{CONFIGURATION}"
    try:
        return LakeConfiguration.model_validate(decode_document(data, where))
    except ValidationError as error:
        raise InvalidInput(f"{where}: {first_problem(error)}") from error


def write_configuration(lake: Lake, configuration: LakeConfiguration) -> None:
    """Replace the configuration of a lake."""
    lake.storage.put(CONFIGURATION, encode_document(configuration.model_dump(mode="json")))


def changed(configuration: LakeConfiguration, given: Mapping[str, Any]) -> LakeConfiguration:
    """A configuration with other values; -1 stands for no limit.

    Raises:
        InvalidInput: a value cannot be used.
    """
    values = {name: None if value == -1 else value for name, value in given.items()}
    try:
        return LakeConfiguration.model_validate({**configuration.model_dump(), **values})
    except ValidationError as error:
        raise InvalidInput(f"lake configuration: {first_problem(error)}") from error


def expire_runs(lake: Lake, *, dry_run: bool = False) -> list[str]:
    """Remove the sealed runs that are older than the configuration keeps them; they can be restored for its grace period."""
    configuration = read_configuration(lake)
    if configuration.keep_runs_s is None:
        return []
    before = lake.storage.now() - configuration.keep_runs_s
    found = []
    for name in lake.runs():
        manifest = f"runs/{name}/manifest.json"
        if lake.storage.exists(manifest) and lake.storage.head(manifest).modified < before:
            found.append(name)
            if not dry_run:
                log.info("expired", extra={"run": name, "keep_runs_s": configuration.keep_runs_s})
                lake.delete(name, grace_s=configuration.deletion_grace_s)
    return found


def used_bytes(lake: Lake, run: str | None = None) -> int:
    """Bytes of all objects of the lake's runs, or of one run; lists them."""
    return sum(entry.size for entry in lake.storage.list("runs" if run is None else f"runs/{run}"))


def check_quota(lake: Lake, more: Mapping[str, int]) -> None:
    """Check that runs of the lake may grow by so many bytes each.

    Raises:
        QuotaExceeded: they may not.
    """
    configuration = read_configuration(lake)
    if configuration.run_quota_bytes is not None:
        for run, more_bytes in more.items():
            _check_run(lake, configuration.run_quota_bytes, run, used_bytes(lake, run) + more_bytes)
    if configuration.quota_bytes is not None:
        _check_lake(lake, configuration.quota_bytes, ", ".join(more), used_bytes(lake), sum(more.values()))


def _check_run(lake: Lake, limit: int, run: str, total: int) -> None:
    if total > limit:
        raise QuotaExceeded(
            f"run {run!r} would have {total:,} bytes, but a run of the lake {lake.url!r} may have {limit:,}; write "
            "fewer rows or hooks, or raise run_quota_bytes: millpond configure"
        )


def _check_lake(lake: Lake, limit: int, run: str, used: int, more: int) -> None:
    if used + more > limit:
        raise QuotaExceeded(
            f"the lake {lake.url!r} has {used:,} bytes, and run {run!r} would add {more:,}, but it may have {limit:,}; "
            "remove runs (millpond rm, then millpond gc) or raise quota_bytes: millpond configure"
        )


class Allowance:
    """What one run of a lake may still grow by, for a writer that adds to it all the time.

    The quotas and what is used are looked up at first, again every `QUOTA_SECONDS`, and whenever one of `QUOTA_PARTS`
    equal parts of what was left is taken: so that many writers together take no more than there is, beside what each
    of them has not committed, however fast they are. Without quotas nothing is listed.
    """

    def __init__(self, lake: Lake, run: str) -> None:
        self._lake, self._run = lake, run
        self._configuration = LakeConfiguration()
        self._used_lake = self._used_run = 0
        self._added = 0
        """By this one, ever."""
        self._looked, self._looked_at, self._step = -math.inf, 0, 0.0
        """When, and after how many bytes of its own; it looks again after so many more."""

    def check(self, more_bytes: int, among: str | None = None) -> None:
        """Check that `more_bytes` may be added to what is stored, and was added by `add` since that was looked up.

        Args:
            more_bytes: not stored, or only below `among`.
            among: a folder of the run.

        Raises:
            QuotaExceeded: they may not.
        """
        total = self._added + more_bytes
        if time.monotonic() - self._looked > QUOTA_SECONDS or total - self._looked_at > self._step:
            self._look(among)
            self._looked_at = total
        found = self._configuration
        if found.run_quota_bytes is not None:
            _check_run(self._lake, found.run_quota_bytes, self._run, self._used_run + more_bytes)
        if found.quota_bytes is not None:
            _check_lake(self._lake, found.quota_bytes, self._run, self._used_lake, more_bytes)

    def look_again(self) -> None:
        """Look up the quotas and what is used at the next check."""
        self._looked = -math.inf

    def add(self, written_bytes: int) -> None:
        """Count what was stored since the last look."""
        self._added += written_bytes
        self._used_lake += written_bytes
        self._used_run += written_bytes

    def _look(self, among: str | None) -> None:
        self._configuration = found = read_configuration(self._lake)
        own = 0 if among is None else used_bytes(self._lake, f"{self._run}/{among}")
        left = [math.inf]
        if found.run_quota_bytes is not None:
            self._used_run = used_bytes(self._lake, self._run) - own
            left.append(found.run_quota_bytes - self._used_run)
        if found.quota_bytes is not None:
            self._used_lake = used_bytes(self._lake) - own
            left.append(found.quota_bytes - self._used_lake)
        self._step = max(min(left) / QUOTA_PARTS, QUOTA_BYTES)
        self._looked = time.monotonic()
