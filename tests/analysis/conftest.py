import numpy as np
import pandas as pd
import pytest

from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

D = 16
PROMPTS = 60
HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run whose label `inside` is linear in layer 2's residual stream and absent from layer 0's.

    60 prompts of 20 to 40 tokens; `depth` is an integer from 0 to 3 whose sign of being 0 is `inside`.
    """
    lake = open_lake(tmp_path_factory.mktemp("lake"), create=True)
    spec = lake.create_run(
        "made-up", hooks=HOOKS, d_model=D, dtype="float32", provenance={"model": "toy"}, chunk_rows=64, shard_rows=256
    )
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    writer = RunWriter(lake.run_folder("made-up"), spec)
    depths, inside = {}, {}
    for number in range(PROMPTS):
        n = int(rng.integers(20, 41))
        depth = rng.integers(0, 4, n) * rng.integers(0, 2, n)
        depths[f"p{number}"], inside[f"p{number}"] = depth, depth > 0
        noise = {hook: rng.standard_normal((n, D)).astype(np.float32) for hook in HOOKS}
        signal = (depth > 0)[:, None] * direction * 0.8
        noise[HOOKS[1]] += signal.astype(np.float32)
        noise[HOOKS[2]] += (0.4 * signal).astype(np.float32)
        tokens = rng.integers(0, 100, n).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, np.arange(n, dtype=np.int32), noise))
    writer.commit()
    prompts = pd.DataFrame(
        {
            "id": [f"p{number}" for number in range(PROMPTS)],
            "topic": [f"topic {number % 2}" for number in range(PROMPTS)],
            "path": [f"file {number // 3}" for number in range(PROMPTS)],
        }
    )
    return seal_run(
        lake.run_folder("made-up"),
        prompts=prompts,
        prompt_labels=("topic",),
        token_labels={"depth": depths, "inside": inside},
        token_label_dtypes={"depth": "int64", "inside": "bool"},
    )


@pytest.fixture(scope="session")
def parts(run):
    """Its training and test prompts."""
    return run.split(test=0.3, seed=1)
