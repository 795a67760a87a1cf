"""Every hook point of every decoder family against Hugging Face, and the table of errors for the docs.

`python -m tests.capture.test_hook_points docs/hook-points.md` writes the table.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from millpond.store.hooks import parse_hook
from millpond.store.lake import open_lake
from tests.capture.engine_runs import Ask, EngineRun, run_engines
from tests.capture.models import D_MODEL, FAMILIES, VOCABULARY, Inside, make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Errors:
    """Of one kind of hook point over all layers, relative to the largest value there."""

    max: float
    mean: float


def measure(folder: Path) -> dict[tuple[str, str], dict[str, Errors]]:
    """Errors by (family, dtype) and kind; `Hugging Face` stands for its own bfloat16 instead of ours."""
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (4, 48)).tolist()
    prompts = [prompt[:length] for prompt, length in zip(prompts, (5, 17, 48, 1), strict=True)]
    truth: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
    runs = []
    for family in FAMILIES:
        model = make_model(family, folder / family / "model")
        for dtype in DTYPES:
            inside = Inside(model, getattr(torch, dtype))
            truth[family, dtype] = [inside.values(prompt) for prompt in prompts]
            hooks = sorted(truth[family, dtype][0])
            lake = open_lake(folder / family / dtype, create=True)
            lake.create_run("run", hooks=tuple(hooks), d_model=D_MODEL, dtype=dtype, chunk_rows=16, shard_rows=64)
            asks = [Ask(prompt, {"capture": {"id": str(number)}}) for number, prompt in enumerate(prompts)]
            # vLLM's attention for DeepSeek has no float32 on a CPU; switched off, it computes the same without the trick
            environment = {"VLLM_MLA_DISABLE": "1"} if family.startswith("DeepSeek") else {}
            runs.append(
                EngineRun(
                    str(model), str(lake.folder), hooks, dtype, [[asks[0], asks[1]], asks[2:]], environment=environment
                )
            )
    run_engines(runs, folder)
    errors: dict[tuple[str, str], dict[str, Errors]] = {}
    for (family, dtype), values in truth.items():
        run = open_lake(folder / family / dtype)["run"]
        assert sorted(run.prompts["id"]) == [str(number) for number in range(len(prompts))]
        order = [int(name) for name in run.prompts["id"]]
        ours = {hook: torch.from_numpy(run[hook].values) for hook in run.hooks}
        exact = truth[family, "float32"]
        errors[family, dtype] = _errors(ours, {hook: torch.cat([exact[i][hook] for i in order]) for hook in ours})
        if dtype == "bfloat16":
            theirs = {hook: torch.cat([part[hook].float() for part in values]) for hook in ours}
            errors[family, "Hugging Face"] = _errors(
                theirs, {hook: torch.cat([p[hook] for p in exact]) for hook in ours}
            )
    return errors


def _errors(values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Errors]:
    found: dict[str, list[tuple[float, float]]] = {}
    for hook, right in truth.items():
        difference = (values[hook] - right).abs() / right.abs().max()
        found.setdefault(parse_hook(hook).kind, []).append((float(difference.max()), float(difference.mean())))
    return {
        kind: Errors(max(worst for worst, _ in parts), float(np.mean([mean for _, mean in parts])))
        for kind, parts in found.items()
    }


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Errors]]:
    return measure(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_point_equals_hugging_face(family: str, errors: dict[tuple[str, str], dict[str, Errors]]) -> None:
    kinds = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"}
    assert set(errors[family, "float32"]) == (kinds - {"resid_mid"} if "parallel" in family else kinds)
    for kind, found in errors[family, "float32"].items():
        assert found.max < 1e-5, kind
    for kind, found in errors[family, "bfloat16"].items():
        assert found.mean <= 2 * errors[family, "Hugging Face"][kind].mean, kind


def table(errors: dict[tuple[str, str], dict[str, Errors]]) -> str:
    """The errors as a Markdown table."""
    lines = [
        "| family | hook | float32 max | float32 mean | bfloat16 max | bfloat16 mean | Hugging Face's bfloat16 mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for kind in errors[family, "float32"]:
            ours, half, theirs = (errors[family, name][kind] for name in ("float32", "bfloat16", "Hugging Face"))
            lines.append(
                f"| {family} | `{kind}` | {ours.max:.1e} | {ours.mean:.1e} | {half.max:.1e} | {half.mean:.1e} | {theirs.mean:.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        text = table(measure(Path(scratch)))
    page = Path(sys.argv[1])
    before, mark, _ = page.read_text().partition("<!-- table -->\n")
    page.write_text(before + mark + text + "\n")
    print(text)
