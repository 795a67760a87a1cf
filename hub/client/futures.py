"""Jobs in flight: wait for one, many, or none; look at the state when it can have changed, and never in between."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from millpond.hub.body import PROGRESS_STEPS, Handles, JobStatus, ReleasedResult, Texts
from millpond.hub.client.connection import check_released
from millpond.hub.policy import Charges
from millpond.hub.slots import slot_end_ms, slot_of
from millpond.store.errors import Cancelled, GatewayRefused

if TYPE_CHECKING:
    from millpond.hub.client.lake import RemoteLake
    from millpond.hub.kinds.base import Job

T = TypeVar("T")
_MARGIN = 0.005
_PATIENCE, _MOST_PATIENCE = 1 / 8, 20.0
"""A job is looked at again after this part of the time that it has taken, in seconds at most: each look is some 130 bytes on the
wire, whatever it is charged."""
_BUDGET_AGE = 3600.0
_EARLIER = "job"
_MAKERS = ("probe", "sae_train", "capture", _EARLIER)


@dataclass(frozen=True)
class EarlierJob:
    """A job of which only the handle is known."""

    count: int
    """Of its answers."""
    kind: str = _EARLIER

    def answers(self) -> int:
        """How many answers it has."""
        return self.count


class JobFuture(Generic[T]):
    """A job that was submitted. Looking at it costs two bytes a slot in which it could change, however often."""

    def __init__(
        self,
        lake: RemoteLake,
        job: Job | EarlierJob,
        handle: bytes,
        finish: Callable[[Sequence[Any], Sequence[bytes]], T],
        *,
        progress: bool = True,
    ) -> None:
        self.lake = lake
        self.job = job
        self.handle = handle.hex()
        """The job's, by which `lake.job` finds it again."""
        self.progress = progress
        self.charged = 0
        """Bytes that this job has cost so far, at most."""
        self.status = JobStatus("queued")
        """As it was when it was last looked at."""
        self._finish = finish
        self._started = time.monotonic()
        self._ended: float | None = None
        self._due = self._started + _next_look(0.0)
        self._value: list[T] = []

    def done(self) -> bool:
        """Whether it cannot change any more, or waits for a reviewer; looks, if something can have changed."""
        if not self._settled and time.monotonic() >= self._due:
            self.look()
        return self._settled

    def result(self, timeout: float | None = None) -> T:
        """Wait, and give what the job gives.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds; it goes on.
            NotReleased, InReview: the gate holds an answer back; the message names the rules and remedies.
            GatewayRefused: the job failed.
            Cancelled: somebody cancelled it.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with _Line(self) as line:
            while not self.done():
                now = time.monotonic()
                if end is not None and now >= end:
                    raise TimeoutError(
                        f"job {self.handle} is {self.status.state} after {self.elapsed:.0f} s; ask later"
                    )
                line.show()
                time.sleep(max(0.0, min(self._due, end or self._due) - now))
        return self._collect()

    def cancel(self) -> bool:
        """Stop it; whether that came in time."""
        self._saw(self._counted(lambda: self.lake.connection.ask(JobStatus, "DELETE", f"jobs/{self.handle}")))
        return self.status.state == "cancelled"

    def cancelled(self) -> bool:
        """Whether somebody cancelled it, as far as is known."""
        return self.status.state == "cancelled"

    def look(self) -> JobStatus:
        """The state at the end of the last slot."""
        self._saw(self._counted(lambda: self.lake.connection.ask(JobStatus, "GET", f"jobs/{self.handle}")))
        return self.status

    @property
    def elapsed(self) -> float:
        """Seconds since it was submitted, until it ended."""
        return (self._ended or time.monotonic()) - self._started

    @property
    def due(self) -> float:
        """When, by `time.monotonic`, the state can have changed."""
        return self._due

    @property
    def _settled(self) -> bool:
        return self.status.final or self.status.state == "in_review"

    def _saw(self, status: JobStatus) -> None:
        self.status = status
        self._due = self._started + _next_look(time.monotonic() - self._started)
        if self._settled and self._ended is None:
            self._ended = time.monotonic()

    def _counted(self, ask: Callable[[], Any]) -> Any:
        before = self.lake.connection.charged
        try:
            return ask()
        finally:
            self.charged += self.lake.connection.charged - before

    def _collect(self) -> T:
        if self._value:
            return self._value[0]
        if self.status.state == "in_review":
            self.look()  # it may have been decided
        if self.status.state == "cancelled":
            raise Cancelled(f"job {self.handle} was cancelled; submit it again")
        answers = self._counted(self._answers)
        made = self._counted(self._made) if self.job.kind in _MAKERS else ()
        self._value.append(self._finish(answers, made))
        return self._value[0]

    def _answers(self) -> list[Any]:
        ask = self.lake.connection.open
        count = self.job.answers()
        if self.status.state == "failed" or (self.status.state == "refused" and not count):
            check_released([ask("GET", f"jobs/{self.handle}/answers/0")])  # says why
            raise GatewayRefused(
                f"job {self.handle} failed; run the same lines on lake.twin(run), which shows errors in full"
            )
        bodies = [ask("GET", f"jobs/{self.handle}/answers/{number}") for number in range(count)]
        check_released(bodies)
        return [body.result if isinstance(body, ReleasedResult) else body for body in bodies if _answer(body)]

    def _made(self) -> tuple[bytes, ...]:
        return self.lake.connection.ask(Handles, "GET", f"jobs/{self.handle}/made").values

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        while not await asyncio.to_thread(self.done):
            await asyncio.sleep(max(0.0, self._due - time.monotonic()))
        return await asyncio.to_thread(self._collect)

    def line(self) -> str:
        """State, elapsed time, bytes charged, and the budget left as far as this session knows."""
        state = self.status.state
        if state == "running":
            state += f" {self.status.progress}/{PROGRESS_STEPS}"
        left = self.lake.left_text()
        return f"{self.job.kind} {self.handle}: {state}, {self.elapsed:.1f} s, {self.charged:,} bytes charged, {left}"

    def __repr__(self) -> str:
        return f"<JobFuture {self.line()}>"

    def _repr_html_(self) -> str:
        share = (self.status.progress + 1) / PROGRESS_STEPS if self.status.state == "running" else float(self._settled)
        return f"<div>{html.escape(self.line())}<br><progress value='{share:.3f}' max='1'></progress></div>"


def as_completed(futures: Iterable[JobFuture[Any]], timeout: float | None = None) -> Iterator[JobFuture[Any]]:
    """The futures in the order in which they end; each is looked at when its own state can have changed.

    Raises:
        TimeoutError: some take longer than `timeout` seconds.
    """
    waiting = list(futures)
    end = None if timeout is None else time.monotonic() + timeout
    while waiting:
        ready = [future for future in waiting if future.done()]
        yield from ready
        waiting = [future for future in waiting if future not in ready]
        now = time.monotonic()
        if waiting and end is not None and now >= end:
            raise TimeoutError(f"{len(waiting)} of the jobs are not done, such as {waiting[0].handle}; they go on")
        if waiting:
            due = min(future.due for future in waiting)
            time.sleep(max(0.0, min(due, end or due) - now))


class _Line:
    """The status line of a future that somebody waits for, for waits of over a second."""

    def __init__(self, future: JobFuture[Any]) -> None:
        self.future = future
        self.bar: Any = None
        self.since = time.monotonic()

    def __enter__(self) -> _Line:
        return self

    def show(self) -> None:
        if not self.future.progress or time.monotonic() - self.since < 1:
            return
        if self.bar is None:
            from tqdm.auto import tqdm

            self.future.lake.connection.budget(_BUDGET_AGE)
            self.bar = tqdm(total=0, bar_format="{desc}", leave=False)
        self.bar.set_description_str(self.future.line())

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _answer(body: Any) -> bool:
    return isinstance(body, ReleasedResult | Texts)


def _next_look(elapsed: float) -> float:
    """Seconds after submission at which to look again: at the end of a slot, when a state becomes visible."""
    charges = Charges()
    patience = min(elapsed * _PATIENCE, _MOST_PATIENCE)
    number = slot_of(int((elapsed + patience) * 1000), charges)
    return slot_end_ms(number + 1, charges) / 1000 + _MARGIN
