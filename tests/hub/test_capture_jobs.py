"""A capture from the client's job through a real capture worker to a run that the project probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.hub.gatehouse import Gatehouse, rows

from millpond.capture.worker_jobs import WorkerConfig, work
from millpond.hub.body import ReleasedResult, Withheld, decode
from millpond.hub.executor import Workshop
from millpond.hub.rules import Rule
from millpond.store.capture_spec import ModelSection

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"
HOOKS = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
P = "/api/v1/p/one"


@pytest.mark.slow
def test_a_worker_makes_the_run_that_a_client_asked_for_and_steering_sends_what_it_shows_to_review(tmp_path):
    with Gatehouse(tmp_path, weights=str(MODEL)) as gate:
        ada = gate.client("ada")
        prompts = [{"id": f"q{n}", "text": f"def f{n}(x):\n    return x + {n}\n"} for n in range(30)]
        job = {"kind": "capture", "model": "m", "hooks": list(HOOKS), "positions": {"first_position": 1}}
        plain = gate.submit(ada, job | {"name": "plain", "prompts": prompts})
        push = {"op": "add", "hook": HOOKS[0], "vector": [1.0] * 256, "scale": 3.0}
        steered = gate.submit(ada, job | {"name": "steered", "prompts": prompts, "interventions": [push]})
        queue = Workshop(gate.settings).queue
        config = WorkerConfig(
            ModelSection(path=str(MODEL)),
            Path(gate.settings.lake),
            HOOKS,
            {"enforce_eager": True, "max_model_len": 256},
        )
        assert work(queue, config, until_empty=True, told=lambda _: None) == 2
        found = {}
        for name, handle in (("plain", plain), ("steered", steered)):
            assert gate.wait(ada, handle) == "done"
            (run,) = decode(ada.get(f"{P}/jobs/{handle}/made").content).values
            view = decode(ada.get(f"{P}/runs/{run.hex()}").content)
            assert (view.name, view.state, view.prompts, view.hooks) == (name, "sealed", 30, HOOKS)
            found[name] = run.hex()
        answers = {}
        for name, run in found.items():
            answers[name] = gate.answer(ada, gate.do(ada, {"kind": "statistics", "rows": rows(run), "hook": HOOKS[1]}))
        assert isinstance(answers["plain"], ReleasedResult)
        target = next(name for name in gate.lake if name.endswith("_plain"))
        stored = gate.lake[target][HOOKS[1]].values.astype(np.float64)
        assert answers["plain"].result["norm"] == pytest.approx(np.linalg.norm(stored, axis=1).mean(), rel=0.05)
        assert isinstance(answers["steered"], Withheld)
        assert answers["steered"].verdict.rules == (Rule.INTERVENED,)
