"""Runs vLLM engines one after another in a process of their own: `python -m tests.capture.engine_runs PLAN.json`.

vLLM changes classes of transformers when it loads a model, so references are never computed in its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 26,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}


@dataclass
class Ask:
    """One request."""

    tokens: list[int]
    millpond: dict[str, Any] | str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    abort_after: int | None = None
    """Steps of the engine after which the request is aborted."""


@dataclass
class EngineRun:
    """One engine and the requests it gets, all at once; more follow when those are done."""

    model: str
    lake: str
    hooks: list[str]
    dtype: str
    rounds: list[list[Ask]]
    engine: dict[str, Any] = field(default_factory=dict)
    run: str | None = "run"
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Further ones of Millpond's."""
    asynchronous: bool = False
    """Schedule a step before the tokens of the one before it are known."""


@dataclass
class Answer:
    """What became of one request."""

    tokens: list[list[int]]
    """Generated, one list a sample."""
    cached: int
    """Prompt tokens read from the prefix cache."""
    kept: list[dict[str, Any]]
    """What the worker says of each sample."""


@dataclass
class Outcome:
    """What became of one engine."""

    rounds: list[list[Answer]]
    statistics: dict[str, float]
    preemptions: int


def run_engines(runs: list[EngineRun], folder: Path, *, own_processes: bool = False) -> list[Outcome]:
    """Run the engines in one new process; `folder` holds its files.

    With `own_processes` each engine gets further ones, as in production; that takes longer to start.
    """
    plan, result = folder / "plan.json", folder / "result.json"
    plan.write_text(json.dumps([asdict(run) for run in runs]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.capture.engine_runs", str(plan), str(result)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_processes))},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [
        Outcome(
            [[Answer(**answer) for answer in answers] for answers in o["rounds"]], o["statistics"], o["preemptions"]
        )
        for o in json.loads(result.read_text())
    ]


def _run(spec: dict[str, Any]) -> Outcome:
    os.environ.update(spec["environment"])
    from vllm import LLM
    from vllm.platforms import current_platform

    from millpond.capture.versions import worker_argument

    if spec["asynchronous"] and current_platform.is_cpu():
        from tests.capture import asynchronous

        asynchronous.allow()
    settings = {
        "model": spec["model"],
        "dtype": spec["dtype"],
        **dict([worker_argument()]),
        "additional_config": {
            "millpond": {"lake": spec["lake"], "run": spec["run"], "hooks": spec["hooks"], **spec["settings"]}
        },
    }
    engine = ENGINE | {"async_scheduling": spec["asynchronous"]} | settings | spec["engine"]
    llm = LLM(**engine)
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == spec["asynchronous"]
    runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    assert runner in (None, str(int(llm.llm_engine.vllm_config.use_v2_model_runner)))
    rounds = [_round(llm, [Ask(**ask) for ask in asks], number) for number, asks in enumerate(spec["rounds"])]
    _, _, error = llm.collective_rpc("millpond_commit")[0]
    assert error is None, error
    statistics = llm.collective_rpc("millpond_statistics")[0]
    preemptions = sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    llm.llm_engine.engine_core.shutdown()
    for name in spec["environment"]:
        del os.environ[name]
    return Outcome(rounds, statistics, preemptions)


def _round(llm: Any, asks: list[Ask], number: int) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for index, ask in enumerate(asks):
        sampling = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False} | ask.sampling
        extra = None if ask.millpond is None else {"millpond": ask.millpond}
        engine.add_request(
            f"r{number}-{index}",
            {"prompt_token_ids": ask.tokens},
            SamplingParams(**sampling, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY),
        )
    finished: dict[str, Any] = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        step += 1
        engine.abort_request([f"r{number}-{i}" for i, ask in enumerate(asks) if ask.abort_after == step])
    return [_answer(llm, ask, finished.get(f"r{number}-{index}")) for index, ask in enumerate(asks)]


def _answer(llm: Any, ask: Ask, output: Any) -> Answer:
    asked = json.loads(ask.millpond) if isinstance(ask.millpond, str) else ask.millpond
    capture_id = ((asked or {}).get("capture") or {}).get("id")
    if output is None or ask.abort_after is not None:
        if capture_id is not None:
            llm.collective_rpc("millpond_drop", args=([capture_id],))
        return Answer([], 0, [])
    kept = []
    for sample in output.outputs if capture_id is not None else []:
        name = f"{capture_id}/{sample.index}" if len(output.outputs) > 1 else capture_id
        generated = len(sample.token_ids) if ask.sampling.get("max_tokens", 1) > 1 else 0
        kept.append(llm.collective_rpc("millpond_confirm", args=([(name, len(ask.tokens) + generated)],))[0].get(name))
    return Answer([list(sample.token_ids) for sample in output.outputs], output.num_cached_tokens or 0, kept)


if __name__ == "__main__":
    from millpond.capture.versions import set_environment

    set_environment()
    outcomes = [_run(spec) for spec in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
