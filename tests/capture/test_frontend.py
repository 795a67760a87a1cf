from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from millpond.capture.admission import EngineFacts
from millpond.capture.frontend import Admitted, CaptureFrontend
from millpond.store.configuration import LakeConfiguration, used_bytes, write_configuration
from millpond.store.errors import CaptureFailed, QuotaExceeded
from millpond.store.lake import Lake, open_lake

HOOK = "blocks.0.hook_resid_post"
D_MODEL, PROMPT = 1024, 100
REQUEST_BYTES = PROMPT * D_MODEL * 2
"""Of the rows of one prompt, in bfloat16."""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(tmp_path / "lake", create=True)


def frontend(lake: Lake) -> CaptureFrontend:
    facts = EngineFacts(
        lake_url=lake.url,
        run="served",
        hooks=(HOOK,),
        d_model=D_MODEL,
        dtype="bfloat16",
        request_bytes=1 << 30,
        queue_bytes=1 << 30,
        commit_seconds=None,
    )

    async def rpc(*_: Any) -> Any:
        raise AssertionError("admission asks no worker")

    return CaptureFrontend(facts, {"model": {"name": "m"}}, rpc)


def admit(served: CaptureFrontend, n: int = 1, prompt: int = PROMPT) -> Admitted:
    asked = {"millpond": '{"capture": {"positions": "prompt"}}'}
    found = served.admit(asked, n=n, max_tokens=4, n_prompt=prompt, adapter=None)
    assert isinstance(found, Admitted)
    return found


def test_a_served_request_beyond_the_quota_is_refused_before_it_runs(lake: Lake) -> None:
    served = frontend(lake)
    admit(served)
    used = used_bytes(lake)
    write_configuration(lake, LakeConfiguration(quota_bytes=used + 3 * REQUEST_BYTES))
    again = frontend(lake)
    admit(again)
    with pytest.raises(QuotaExceeded, match=rf"has {used + REQUEST_BYTES:,} bytes.* would add {3 * REQUEST_BYTES:,}"):
        admit(again, n=3)  # every sample has rows of its own
    admit(again, n=2)
    with pytest.raises(QuotaExceeded, match="millpond configure"):
        admit(again, prompt=1)
    write_configuration(lake, LakeConfiguration(run_quota_bytes=used_bytes(lake, "served") + REQUEST_BYTES - 1))
    with pytest.raises(QuotaExceeded, match=r"run 'served' would have .* a run of the lake .* may have"):
        admit(frontend(lake))


def test_after_a_capture_that_failed_the_quota_is_looked_up_again(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment is more than its rows, and others write too: the writer saw first that nothing more fits."""
    served = frontend(lake)
    write_configuration(lake, LakeConfiguration(quota_bytes=used_bytes(lake) + 100 * REQUEST_BYTES))
    admitted = admit(served)
    lake.run_storage("served").put("segments/s/statistics.safetensors", bytes(100 * REQUEST_BYTES))
    admit(served)  # it has not looked since

    async def refused(*_: Any) -> None:
        raise CaptureFailed("writing to the lake failed")

    monkeypatch.setattr(served._settler, "settle", refused)
    admitted.ended = ["stop"]
    with pytest.raises(CaptureFailed):
        asyncio.run(served._settle(admitted))
    with pytest.raises(QuotaExceeded, match="millpond configure"):
        admit(served)
