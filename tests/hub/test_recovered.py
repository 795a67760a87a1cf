"""Cross-entropy recovered in vLLM is what it is in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from millpond.analysis import JumpReluSae, Transcoder
from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.recovered import HuggingFaceModel, cross_entropy_recovered
from millpond.hub.recovered import VllmModel
from millpond.hub.sae_commands import SaeEval
from millpond.store.errors import InvalidInput

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"
HOOK = "blocks.2.hook_resid_post"
PROMPTS = [[0, *range(10, 40)], [0, *range(500, 520)], [0, 7]]
# vLLM changes classes of transformers when it loads a model, so it gets a process of its own
RUN = """
import json, sys
from millpond.analysis.sae.estimator import Sae
from millpond.analysis.sae.recovered import cross_entropy_recovered
from millpond.hub.sae_commands import SaeEval
if __name__ == "__main__":
    model, folder, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    sae = Sae.load(folder)
    with SaeEval(folder, model=model, dtype="float32").opened(sae, longest=max(map(len, prompts))) as engine:
        result = cross_entropy_recovered(sae, engine, prompts)
    print(json.dumps(result.values | result.evidence))
"""


def partly(seed=0):
    """An autoencoder of 200 of 256 orthogonal directions, whose latents fire above a threshold."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((256, 256)))[0].astype(np.float32)[:, :200]
    both = np.concatenate([basis, -basis], axis=1)
    sae = JumpReluSae(400)
    sae.weights_ = SaeWeights(
        "jumprelu", both, np.zeros(400, np.float32), both.T.copy(), np.full(256, 0.01, np.float32),
        threshold=np.full(400, 0.05, np.float32),
    )  # fmt: skip
    sae.trained_on_ = {"hook": HOOK}
    return sae


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vllm_and_transformers_agree(tmp_path):
    sae = partly()
    folder = sae.save(tmp_path / "sae")
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, tmp_path / "run.py", MODEL, folder, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = cross_entropy_recovered(sae, HuggingFaceModel(MODEL), PROMPTS)
    assert found["tokens"] == expected.evidence["tokens"] == 29 + 19
    assert 0.01 < expected["ce_recovered"] < 0.99
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_recovered"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name


def test_what_cannot_be_spliced_is_named_with_the_engine_that_can():
    with pytest.raises(InvalidInput, match="a transcoder of hook 'unknown' cannot be spliced into vLLM"):
        VllmModel(MODEL, Transcoder(8, 2))
    with pytest.raises(InvalidInput, match="--engine transformers"):
        SaeEval(Path("sae"), model=MODEL).opened(Transcoder(8, 2), longest=5)
    with SaeEval(Path("sae"), model=MODEL, engine="transformers").opened(Transcoder(8, 2), longest=5) as model:
        loss, count = model.cross_entropy(PROMPTS, 1, None)
    assert count == 29 + 19
    assert 0 < loss / count < 15
