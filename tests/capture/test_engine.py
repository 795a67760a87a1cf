"""What a job's engine is started with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millpond.capture.job import start_engine
from millpond.capture.plan import plan_capture
from millpond.store.capture_spec import read_job
from tests.capture.conftest import MODEL


class _Started(BaseException):
    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # vLLM's imports
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_model_runs_in_the_data_type_of_its_configuration(
    tmp_path: Path,
    write_prompts: Callable[..., Path],
    write_job: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's own "auto" runs a float32 model in 16 bits, and the run was planned in float32."""
    from vllm import LLMEngine

    def started(arguments: Any) -> None:
        raise _Started(arguments)

    monkeypatch.setattr(LLMEngine, "from_engine_args", started)
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((MODEL / "config.json").read_text())
    for dtype in ("float32", "bfloat16"):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        prompts = write_prompts([{"id": "a", "token_ids": [0, 5, 6]}])
        plan = plan_capture(read_job(write_job(prompts, model={"path": str(folder), "dtype": "auto"})))
        with pytest.raises(_Started) as caught:
            start_engine(plan)
        assert str(caught.value.arguments.create_engine_config().model_config.dtype) == f"torch.{plan.model.dtype}"
        assert plan.model.dtype == dtype
