"""Logs as JSON lines, each with the job that it is about: what every long-running process of the vault writes.

Logs hold names and counts that depend on activations. They are for operators, and leave only through the egress meter.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_JOB: ContextVar[str] = ContextVar("job", default="")
_INHERITED = "MILLPOND_LOGS"
"""Environment variable by which a process's children know that they log as it does."""


@contextmanager
def of_job(job: str) -> Iterator[None]:
    """Records that are written inside, by this thread or task, carry the job's id."""
    token = _JOB.set(job)
    try:
        yield
    finally:
        _JOB.reset(token)


def job_id() -> str:
    """The job that this thread or task works on, or nothing."""
    return _JOB.get()


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time, level, logger, event, the job, and the fields given with `extra`."""

    job = ""
    """The job of records that are written outside `of_job`: where a whole process works for one at a time."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        own = {"message", "asctime", *vars(logging.makeLogRecord({}))}  # with what this process's record factory adds
        fields = {name: value for name, value in vars(record).items() if name not in own}
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **({"job": job_id() or self.job} if job_id() or self.job else {}),
            **fields,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to(stream: TextIO | None = None) -> logging.Handler:
    """Write the events of `millpond` to `stream`, by default standard error, from now on; a process calls it once."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("millpond")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if stream is None:
        os.environ[_INHERITED] = "json"
    return handler


def log_as_parent() -> JsonLines | None:
    """Where the process that started this one has called `log_to`, do the same, once; returns the formatter then."""
    return log_once() if os.environ.get(_INHERITED) == "json" else None


def log_once() -> JsonLines:
    """`log_to` on standard error, unless this process has called it before; returns the formatter."""
    held = [handler.formatter for handler in logging.getLogger("millpond").handlers]
    formatter: logging.Formatter | None = next((one for one in held if isinstance(one, JsonLines)), None)
    if formatter is None:  # on a descriptor of its own: vLLM writes a prefix before every line of sys.stderr's
        formatter = log_to(os.fdopen(os.dup(2), "w", buffering=1)).formatter
    assert isinstance(formatter, JsonLines)
    return formatter
