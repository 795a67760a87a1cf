"""A direction that a probe found changes what the model writes, and only in the requests that ask for it.

    python examples/steering.py [--out DIR]

Captures the example model on Python files, fits a probe for "inside a comment", keeps its direction in the lake,
and lets the model continue code with the direction added at one layer. Half of each batch is steered; the other
half must be equal, bit for bit, to the same batch with a steering strength of zero.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import millpond as mp
from millpond.capture.job import run_capture_file
from millpond.capture.versions import set_environment
from millpond.store.artifacts import save_artifact

EXAMPLE = Path(__file__).parent / "stdlib_llama"
LAYER = 3
HOOK = f"blocks.{LAYER}.hook_resid_post"
NEW_TOKENS = 48

CODE = [
    "import os\n\n\ndef read(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def main():\n    parser = argparse.ArgumentParser()\n",
    "for name in names:\n    if name in seen:\n        continue\n",
    "def test_empty(self):\n    self.assertEqual(len(self.queue), 0)\n",
    "    try:\n        value = int(text)\n    except ValueError:\n",
    "while True:\n    line = self.file.readline()\n",
    "def __eq__(self, other):\n    return self.x == other.x\n\n",
]


def capture(out: Path) -> mp.Run:
    """A run of the example model on 40,000 tokens of held-out files, with a label for tokens inside comments."""
    prompts = out / "prompts.parquet"
    command = [sys.executable, str(EXAMPLE / "prompts.py"), "--out", str(prompts), "--tokens", "40000"]
    subprocess.run(command, check=True)
    job = out / "job.toml"
    job.write_text(f"""
[model]
path = {json.dumps(str(EXAMPLE / "model"))}
[capture]
hooks = ["{HOOK}"]
first_position = 1
[prompts]
path = {json.dumps(str(prompts))}
token_labels = ["in_comment"]
metadata = ["path"]
[destination]
lake = {json.dumps(str(out / "lake"))}
run = "files"
""")
    run_capture_file(job)
    return mp.open(out / "lake")["files"]


def find_direction(run: mp.Run) -> tuple[np.ndarray, float, float]:
    """The probe's unit direction, its AUROC on held-out files, and the distance between the classes along it."""
    train, test = run.split(test=0.25, seed=0, by="path")
    probe = mp.LogisticProbe().fit(train[HOOK], train.labels["in_comment"])
    found = probe.evaluate(test[HOOK], test.labels["in_comment"])
    direction = probe.coef_[0] / np.linalg.norm(probe.coef_[0])
    along = train[HOOK].values @ direction
    inside = train.labels["in_comment"].values.astype(bool)
    return direction, float(found["auroc"]), float(along[inside].mean() - along[~inside].mean())


def start_engine(lake: Path) -> Any:
    """vLLM, with a tap at the layer that is steered."""
    set_environment()
    from vllm import LLM

    return LLM(
        str(EXAMPLE / "model"),
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        async_scheduling=False,
        disable_log_stats=True,
        worker_cls="millpond.capture.worker.TapWorker",
        additional_config={"millpond": {"lake": str(lake), "hooks": [HOOK]}},
    )


def generate(llm: Any, scale: float) -> list[Any]:
    """Every piece of code continued twice in one batch: steered, and not."""
    from vllm import SamplingParams

    steer = {"op": "add", "hook": HOOK, "vector": "inside-comment", "scale": scale}
    wish = mp.capture_params(capture=False, intervene=[steer])
    fixed = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 1}
    parameters = [SamplingParams(**fixed, extra_args=wish), SamplingParams(**fixed)]
    outputs = llm.generate(
        [code for code in CODE for _ in parameters], [one for _ in CODE for one in parameters], use_tqdm=False
    )
    return [output.outputs[0] for output in outputs]


def in_comments(texts: list[str]) -> float:
    """The share of characters that stand after a # in their line."""
    inside = sum(len(line.partition("#")[2]) + 1 for text in texts for line in text.split("\n") if "#" in line)
    return inside / sum(map(len, texts))


def logprobs(output: Any) -> list[float]:
    """The chosen tokens' log-probabilities."""
    return [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]


def main() -> None:
    """Capture, probe, steer, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the lake; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millpond-steering-") as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run = capture(out)
        direction, auroc, distance = find_direction(run)
        print(f"probe at {HOOK}: AUROC {auroc:.3f} on held-out files; the classes are {distance:.2f} apart along it")
        save_artifact(mp.open(out / "lake"), "inside-comment", "vector", {"vector": direction.astype(np.float32)})
        llm = start_engine(out / "lake")
        zero, texts = generate(llm, 0.0), {}
        shares = {0.0: in_comments([output.text for output in zero[::2]])}
        for times in (1.0, 2.0, 4.0):
            steered = generate(llm, times * distance)
            texts[times] = steered[2].text
            shares[times] = in_comments([output.text for output in steered[::2]])
            for before, after in zip(zero[1::2], steered[1::2], strict=True):
                assert after.token_ids == before.token_ids
                assert logprobs(after) == logprobs(before)  # bit for bit
        print("steering strength (in class distances) -> share of generated characters inside comments")
        for times, share in shares.items():
            print(f"{times:6.1f} {share:8.1%}")
        print(f"\nunsteered:\n{CODE[1]}{zero[2].text}\n\nsteered by 2:\n{CODE[1]}{texts[2.0]}\n")
        print("batchmates: equal, bit for bit, at every strength")


if __name__ == "__main__":
    main()
