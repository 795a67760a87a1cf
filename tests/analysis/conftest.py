import numpy as np
import pytest

from millpond.store.labels import write_token_label
from millpond.store.lake import open_lake
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
    depths = {}
    for number in range(PROMPTS):
        n = int(rng.integers(20, 41))
        depths[number] = rng.integers(0, 4, n) * rng.integers(0, 2, n)
        noise = {hook: rng.standard_normal((n, D)).astype(np.float32) for hook in HOOKS}
        signal = (depths[number] > 0)[:, None] * direction * 0.8
        noise[HOOKS[1]] += signal.astype(np.float32)
        noise[HOOKS[2]] += (0.4 * signal).astype(np.float32)
        tokens = rng.integers(0, 100, n).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, np.arange(n, dtype=np.int32), noise))
    writer.commit()
    run = lake["made-up"]
    write_token_label(run.plan, "depth", depths, "int64")
    write_token_label(run.plan, "inside", {number: depth > 0 for number, depth in depths.items()}, "bool")
    return lake["made-up"]


@pytest.fixture(scope="session")
def parts(run):
    """Its training and test prompts."""
    return run.split(test=0.3, seed=1)
