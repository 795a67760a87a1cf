"""A queue's server in this process, on a Unix socket."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The address of `app` on a Unix socket, whose path is short enough for one."""
    folder = Path(tempfile.mkdtemp(prefix="mq", dir="/tmp"))
    server = uvicorn.Server(uvicorn.Config(app, uds=str(folder / "queue"), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"unix:{folder / 'queue'}"
    finally:
        server.should_exit = True
        thread.join()
        shutil.rmtree(folder)
