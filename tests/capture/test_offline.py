"""vLLM's own `LLM` class capturing, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from millpond.store.lake import open_lake
from millpond.store.verify import verify_run
from tests.capture.artifacts import INTERCEPT, coefficients, make_artifacts
from tests.capture.conftest import D_MODEL, HOOK, MODEL, Reference

pytestmark = pytest.mark.slow
READS = [{"read": "probe", "artifact": "lie", "hook": HOOK.format(2)}]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
import millpond as mp

model, lake, reads, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

def start(**settings):
    return LLM(
        model, dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=1 << 27, enforce_eager=True,
        async_scheduling=False, worker_cls="millpond.capture.worker.TapWorker", additional_config={"millpond": settings},
    )

refused = []
for settings in ({"lake": lake, "hooks": ["blocks.9.*"]}, {"lake": model, "hooks": ["blocks.*"]}):
    try:
        start(**settings)
    except mp.MillpondError as error:
        refused.append(str(error))
llm = start(lake=lake, hooks=["blocks.*.hook_resid_post"])
plain = SamplingParams(temperature=0.0, max_tokens=6)

def asked(run, n=1, **more):
    return SamplingParams(temperature=1.0 if n > 1 else 0.0, max_tokens=6, n=n, extra_args=mp.capture_params(run, **more))

kinds = [plain, asked("one", id="a"), asked("one", id="b", n=2), asked("scores", reads=reads, id="c"), plain]
given = [{"prompt_token_ids": prompt} for prompt in prompts]
outputs = llm.generate(given, kinds, use_tqdm=False)
shared = llm.generate(given[:2], asked("shared"), use_tqdm=False)
for wrong in ([asked("one", id="a")], [asked("one", id="z"), asked("one", positions=[500], id="y")]):
    try:
        llm.generate(given[: len(wrong)], wrong, use_tqdm=False)
    except ValueError as error:
        refused.append(str(error))
again = llm.generate(given[:1], asked("one", id="z"), use_tqdm=False)
told = [
    [output.kv_transfer_params, [list(sample.token_ids) for sample in output.outputs]]
    for output in [*outputs, *shared, *again]
]
print("TOLD " + json.dumps([told, refused]))
"""


def test_llm_captures_like_a_server(tmp_path: Path, reference: Reference, python_prompts: list[list[int]]) -> None:
    lake = open_lake(tmp_path / "lake", create=True)
    make_artifacts(lake, tmp_path, D_MODEL)
    prompts = [ids for ids in python_prompts if 5 < len(ids) < 200][:5]
    command = [sys.executable, "-c", SCRIPT, str(MODEL), str(tmp_path / "lake"), json.dumps(READS), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    (outputs, refused) = json.loads(line.removeprefix("TOLD "))
    told = [params and params["millpond"] for params, _ in outputs]
    tokens = [[[*prompts[number], *new] for new in generated] for number, (_, generated) in enumerate(outputs[:5])]
    lengths = [[len(one) - 1 for one in samples] for samples in tokens]
    assert (told[0], told[4]) == (None, None)
    assert told[1] == {"id": "a", "run": "one", "status": "committed", "rows": lengths[1][0]}
    samples = {"b/0": lengths[2][0], "b/1": lengths[2][1]}
    assert told[2] == {
        "id": "b",
        "run": "one",
        "status": "committed",
        "rows": sum(samples.values()),
        "samples": samples,
    }
    assert told[3] == {"id": "c", "run": "scores", "status": "committed", "rows": lengths[3][0]}
    run = lake["one"]
    assert sorted(run.prompts["id"]) == ["a", "b/0", "b/1", "z"]
    for name, ids in {"a": tokens[1][0], "b/0": tokens[2][0], "b/1": tokens[2][1]}.items():
        part = run.select([name])
        right = reference.residuals(ids[:-1])
        assert part.tokens["token_id"].values.tolist() == ids[:-1]
        for layer in range(len(right)):
            rows = part[HOOK.format(layer)].values
            assert np.linalg.norm(rows - right[layer]) < 1e-4 * np.linalg.norm(right[layer])
    scores = reference.residuals(tokens[3][0][:-1])[2] @ coefficients(D_MODEL).T + INTERCEPT
    np.testing.assert_allclose(lake["scores"].reads["lie"]["scores"].values, scores, rtol=0, atol=1e-3)
    assert sorted(lake["shared"].prompts["id"]) == sorted(one["id"] for one in told[5:7])
    words = [
        "'blocks.9.*' selects no hook point",
        "is neither a lake nor empty",
        "'a' is in run 'one' already",
        "positions: 500",
    ]
    assert [word for word, why in zip(words, refused, strict=True) if word not in why] == []
    for name in lake:
        assert verify_run(lake[name]).problems == []
