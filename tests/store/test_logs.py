"""Logs as JSON lines, with the job that they are about."""

from __future__ import annotations

import io
import json
import logging
import threading

from millpond.store.logs import job_id, log_to, of_job


def test_a_line_carries_the_job_and_the_fields():
    stream = io.StringIO()
    handler = log_to(stream)
    logger = logging.getLogger("millpond.somewhere")
    try:
        logger.info("before")
        with of_job("4f00"):
            logger.info("committed", extra={"rows": 12})
            other = threading.Thread(target=lambda: logger.info("another thread"))
            other.start()
            other.join()
            try:
                raise ValueError("wrong")
            except ValueError:
                logger.exception("failed")
        assert job_id() == ""
    finally:
        parent = logging.getLogger("millpond")
        parent.removeHandler(handler)
        parent.propagate = True
    before, committed, thread, failed = map(json.loads, stream.getvalue().splitlines())
    assert "job" not in before
    assert "job" not in thread  # a thread of its own works for nobody until it says so
    assert (committed["event"], committed["job"], committed["rows"]) == ("committed", "4f00", 12)
    assert committed["logger"] == "millpond.somewhere"
    assert "ValueError: wrong" in failed["error"]
    assert failed["job"] == "4f00"
