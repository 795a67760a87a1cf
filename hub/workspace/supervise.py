"""Keeps the parts running: in order, each after the one before is ready, started again with longer and longer pauses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from millpond.store.errors import MillpondError

_FIRST_PAUSE, _LONGEST_PAUSE, _WELL = 0.5, 30.0, 60.0
_LOG_BYTES = 10 << 20


class PartFailed(MillpondError):
    """A part did not become ready; its log says why."""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    command: Sequence[str]
    ready: Callable[[], Awaitable[bool]]
    """Asked again and again after a start."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """All of it."""
    patience: float = 60.0
    """Seconds until it must be ready."""
    awaited: bool = True
    """Whether the parts after it wait until it is ready."""


@dataclass
class _Running:
    part: Part
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Runs parts until it is stopped."""

    def __init__(self, parts: Sequence[Part], logs: Path, told: Callable[[str], None] = print) -> None:
        self.logs, self.told = logs, told
        self._running = [_Running(part) for part in parts]
        self._stopping = False

    async def start(self) -> None:
        """Start every part in order; raises PartFailed, with everything stopped again, when one is not ready in time."""
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            for running in self._running:
                began = time.monotonic()
                await self._launch(running)
                if running.part.awaited:
                    await self._until_ready(running)
                    self.told(f"{running.part.name} is ready after {time.monotonic() - began:.1f} s")
                running.task = asyncio.create_task(self._keep(running))
        except BaseException:
            await self.stop()
            raise

    async def _launch(self, running: _Running) -> None:
        log = self.logs / f"{running.part.name}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            running.process = await asyncio.create_subprocess_exec(
                *running.part.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=running.part.environment,
                start_new_session=True,
            )
        running.starts += 1

    async def _until_ready(self, running: _Running) -> None:
        process, part = running.process, running.part
        assert process is not None
        end = time.monotonic() + part.patience
        while not await part.ready():
            if process.returncode is not None:
                raise PartFailed(f"{part.name} ended with code {process.returncode}: {self._last_line(part)}")
            if time.monotonic() > end:
                raise PartFailed(f"{part.name} is not ready after {part.patience:.0f} s: {self._last_line(part)}")
            await asyncio.sleep(0.1)

    def _last_line(self, part: Part) -> str:
        log = self.logs / f"{part.name}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it in {log})"

    async def _keep(self, running: _Running) -> None:
        """Start the part again whenever it ends."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            assert running.process is not None
            code = await running.process.wait()
            if self._stopping:
                return
            pause = _FIRST_PAUSE if time.monotonic() - began > _WELL else min(_LONGEST_PAUSE, pause * 2)
            self.told(f"{running.part.name} ended with code {code}; it starts again in {pause:.1f} s")
            await asyncio.sleep(pause)
            await self._launch(running)
            with contextlib.suppress(PartFailed):
                await self._until_ready(running)
                self.told(f"{running.part.name} is ready again")

    def process(self, name: str) -> asyncio.subprocess.Process:
        """The process of a part; raises KeyError."""
        for running in self._running:
            if running.part.name == name and running.process is not None:
                return running.process
        raise KeyError(name)

    async def stop(self) -> None:
        """End the parts in the opposite order, each with ten seconds to end by itself."""
        self._stopping = True
        for running in reversed(self._running):
            if running.task is not None:
                running.task.cancel()
            process = running.process
            if process is None or process.returncode is not None:
                continue
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                self.told(f"{running.part.name} does not end; killed")
                process.kill()
                await process.wait()
