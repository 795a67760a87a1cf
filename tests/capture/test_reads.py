"""Reads while vLLM runs: equal to what the stored rows and Hugging Face's give, batched with everything else.

A read is computed from the row as the run would keep it, so it differs from what is computed of the stored row only by
the order in which float32 products are summed: 1e-5 of the largest score. Codes are then rounded once to the run's data
type, half a unit in the last place. Which of two latents closer than that comes first is not determined.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import millpond as mp
from millpond.capture.edits import Edits
from millpond.capture.job import run_capture_file
from millpond.capture.plan import plan_capture
from millpond.capture.provenance import model_provenance
from millpond.capture.reads import Readers
from millpond.cli import main
from millpond.store.artifacts import load_artifact, save_artifact, save_probe
from millpond.store.capture_spec import read_job
from millpond.store.errors import InvalidInput
from millpond.store.lake import Lake, open_lake
from millpond.store.reads import ReadProbe, ReadSaeTopk
from millpond.store.run import Run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run
from tests.capture.artifacts import D_SAE, INTERCEPT, check_codes, coefficients, dense_codes, make_artifacts
from tests.capture.conftest import D_MODEL as EXAMPLE_D_MODEL
from tests.capture.conftest import MODEL
from tests.capture.engine_runs import Ask, EngineRun, Outcome, run_engines
from tests.capture.models import D_MODEL, VOCABULARY, Inside, make_model

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
COEF = coefficients(D_MODEL)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(3, VOCABULARY, int(n)).tolist() for n in (1, 150, 70, 33, 90, 5, 64, 120)]
FILTERS: list[dict[str, Any]] = [{}, {"positions": "generated"}, {"positions": "last"}, {"every": 3}]
READS: list[dict[str, Any]] = [
    {"read": "probe", "artifact": "lie", "hook": HOOKS[1]},
    {"read": "sae_topk", "artifact": "topk", "hook": HOOKS[2], "k": 5},
    {"read": "sae_topk", "artifact": "jump", "hook": "blocks.1.hook_out", "k": 16, "name": "threshold"},
]


class Captured:
    """The same requests into runs that keep rows and reads, reads alone and rows alone, in two data types."""

    def __init__(self, folder: Path) -> None:
        model = make_model("Llama", folder / "model", seed=3)
        self.inside = Inside(model, torch.float32)
        self.lake = open_lake(folder / "lake", create=True)
        self.saes = make_artifacts(self.lake, folder, D_MODEL)
        engines = []
        for dtype in ("float32", "bfloat16"):
            asked = [(ReadProbe if read["read"] == "probe" else ReadSaeTopk).model_validate(read) for read in READS]
            specs = Readers(self.lake, D_MODEL, dtype, Edits(self.lake, D_MODEL).sae).resolve(asked, HOOKS)
            kinds: dict[str, tuple[tuple[str, ...], Any]] = {
                "both": ((HOOKS[1], HOOKS[2]), specs),
                "reads": ((), specs),
                "rows": ((HOOKS[0],), ()),
            }
            for kind, (hooks, reads) in kinds.items():
                size = {"d_model": D_MODEL, "chunk_rows": 16, "shard_rows": 64}
                self.lake.create_run(f"{kind}-{dtype}", hooks=hooks, dtype=dtype, reads=reads, **size)  # type: ignore[arg-type]
            asks = [
                Ask(
                    tokens,
                    {"capture": {"id": f"{kind}{number}", "prompt": f"p{number}", "run": f"{kind}-{dtype}"}
                     | FILTERS[number % len(FILTERS)]},
                    {"max_tokens": 40},
                )
                for number, tokens in enumerate(PROMPTS)
                for kind in kinds
            ]  # fmt: skip
            # so few blocks that requests are preempted, and prefill in chunks
            settings = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 12, "block_size": 32}
            engines.append(EngineRun(str(model), str(self.lake.folder), HOOKS, dtype, [asks], settings))
        engines[1].settings = {"device_taps": True, "staging_rows": 96}  # as on a GPU: read when the rows arrive
        self.outcomes: dict[str, Outcome] = dict(
            zip(("float32", "bfloat16"), run_engines(engines, folder), strict=True)
        )
        self.kinds = list(kinds)

    def by_prompt(self, run: Run) -> Run:
        """The whole run, after checking that it holds every prompt once."""
        assert sorted(run.prompts["id"]) == [f"p{number}" for number in range(len(PROMPTS))]
        assert verify_run(run).problems == []
        return run


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    return Captured(tmp_path_factory.mktemp("reads"))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_reads_are_those_of_the_stored_rows(captured: Captured, dtype: str, rounding: float) -> None:
    assert captured.outcomes[dtype].preemptions > 0
    both = captured.by_prompt(captured.lake[f"both-{dtype}"])
    rows = {hook: both[hook].values for hook in both.hooks}
    scores = rows[HOOKS[1]].astype(np.float64) @ COEF.T + INTERCEPT
    found = both.reads["lie"]["scores"].values
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    assert found.dtype == np.float32
    check_codes(both.reads["topk"], dense_codes(captured.saes["topk"], rows[HOOKS[2]]), rounding)
    threshold = both.reads["threshold"]
    assert (threshold["active"].values > 16).any()  # some rows have more codes than are kept, and say so
    assert (threshold["active"].values < 16).any()
    check_codes(threshold, dense_codes(captured.saes["jump"], rows[HOOKS[1]]), rounding)
    assert both.reads["topk"]["indices"].dtype == np.uint16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_reads_alone_holds_the_same(captured: Captured, dtype: str) -> None:
    """To the last bit but for the sums' order: its requests were in other batches at times."""
    both, alone = captured.lake[f"both-{dtype}"], captured.by_prompt(captured.lake[f"reads-{dtype}"])
    assert alone.hooks == ()
    assert alone.nbytes == len(alone) * (2 * 4 + 21 * (2 + (2 if dtype == "bfloat16" else 4)) + 2 * 4)
    first = both.to_xarray().load()
    order = [both.prompts["id"].tolist().index(name) for name in alone.prompts["id"]]
    prompts = first["prompt"].values
    at = np.concatenate([np.flatnonzero(prompts == number) for number in order])
    for name in ("lie.scores", "topk.values", "threshold.values"):
        read, _, array = name.partition(".")
        np.testing.assert_allclose(
            alone.reads[read][array].values,
            first[name].values[at],
            rtol=2**-5 if dtype == "bfloat16" else 1e-4,  # a few of its steps: other batches round otherwise
            atol=1e-4,
        )
    assert np.array_equal(alone.tokens["token_id"].values, first["token_id"].values[at])


@pytest.mark.slow
def test_reads_are_those_of_hugging_face(captured: Captured) -> None:
    """With vLLM's and Hugging Face's float32 rows, which differ by 1e-6 of their norm."""
    run = captured.lake["reads-float32"]
    tokens = run.tokens.compute()
    answers = captured.outcomes["float32"].rounds[0]
    for number, prompt in enumerate(PROMPTS):
        (place,) = np.flatnonzero(run.prompts["id"] == f"p{number}")
        mine = tokens["prompt"].values == place
        ids = [*prompt, *answers[number * len(captured.kinds) + captured.kinds.index("reads")].tokens[0]][:-1]
        positions = tokens["position"].values[mine]
        wanted = {0: range(len(ids)), 1: range(len(prompt), len(ids)), 2: [len(prompt) - 1], 3: range(0, len(ids), 3)}
        assert positions.tolist() == list(wanted[number % 4])
        assert tokens["token_id"].values[mine].tolist() == [ids[position] for position in positions]
        truth = {
            hook: values[positions].numpy() for hook, values in captured.inside.values(ids).items() if hook in HOOKS
        }
        scores = truth[HOOKS[1]] @ COEF.T + INTERCEPT
        np.testing.assert_allclose(run.reads["lie"]["scores"].values[mine], scores, rtol=0, atol=1e-3)
        dense = dense_codes(captured.saes["topk"], truth[HOOKS[2]])
        best = -np.sort(-dense, axis=1)[:, :5]
        np.testing.assert_allclose(run.reads["topk"]["values"].values[mine], best, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Artifacts for the example model, good and bad."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = open_lake(folder / "lake", create=True)
    make_artifacts(made, folder, EXAMPLE_D_MODEL)
    save_probe(made, "narrow", COEF, INTERCEPT)
    save_artifact(made, "no-tensors", "probe", {"weights": COEF})
    config = {"architecture": "topk", "k": D_SAE + 1, "d_in": EXAMPLE_D_MODEL, "d_sae": D_SAE}
    save_artifact(made, "broken", "sae", load_artifact(made, "topk", "sae").arrays(), config=config)
    save_artifact(made, "crosscoder", "sae", {"W_enc": COEF}, config={"architecture": "topk_crosscoder"})
    return made


def sae(artifact: str, /, **more: Any) -> dict[str, Any]:
    return {"read": "sae_topk", "artifact": artifact, "hook": "blocks.4.hook_resid_post", **more}


def probe(artifact: str, /, **more: Any) -> dict[str, Any]:
    return {"read": "probe", "artifact": artifact, "hook": "blocks.4.hook_resid_post", **more}


def job_file(folder: Path, lake: Lake, **capture: Any) -> Path:
    prompts, path = folder / "prompts.jsonl", folder / "job.toml"
    prompts.write_text('{"id": "a", "token_ids": [0, 5, 6]}\n{"id": "b", "token_ids": [0, 7]}\n')
    job: dict[str, dict[str, Any]] = {
        "model": {"path": str(MODEL), "dtype": "bfloat16"},
        "prompts": {"path": str(prompts)},
        "destination": {"lake": str(lake.folder), "run": "run"},
        "capture": {key: value for key, value in capture.items() if key != "reads"},
    }
    sections = [(f"[{name}]", values) for name, values in job.items()]
    sections += [("[[capture.reads]]", read) for read in capture.get("reads", [])]
    lines = [[head, *(f"{key} = {json.dumps(value)}" for key, value in values.items())] for head, values in sections]
    path.write_text("\n".join(line for section in lines for line in section))
    return path


@pytest.mark.parametrize(
    ("reads", "words"),
    [
        ([probe("nobody")], ["capture.reads.0.artifact", "'nobody'", "lie", "save it first"]),
        ([probe("lie"), probe("topk", name="x")], ["capture.reads.1.artifact", "'topk' is a sae", "a probe"]),
        ([probe("narrow")], ["capture.reads.0.artifact", "64 dimensions", "256"]),
        ([probe("no-tensors")], ["capture.reads.0.artifact", "'no-tensors' holds weights", "save_probe"]),
        ([probe("lie"), probe("lie")], ["capture.reads.1.name", "'lie' is taken"]),
        ([probe("lie", name="a/b")], ["capture.reads.0", "name", "'a/b'"]),
        ([probe("lie", hook="blocks.9.hook_resid_post")], ["capture.reads.0.hook", "blocks.9", "blocks.{0..5}"]),
        ([probe("lie", hook="blocks.*.hook_resid_post")], ["capture.reads.0.hook", "6 hook points", "name one"]),
        ([probe("lie", k=3)], ["capture.reads.0", "k", "Extra inputs"]),
        ([{"read": "mean", "artifact": "lie", "hook": "x"}], ["capture.reads.0", "'mean'", "'sae_topk'"]),
        ([sae("topk", k=9)], ["capture.reads.0.k is 9", "at most 8 active", "8 or less"]),
        ([sae("jump", k=97)], ["capture.reads.0.k is 97", "96 latents"]),
        ([sae("jump")], ["capture.reads.0.k is missing", "'jumprelu'", "threshold"]),
        ([sae("topk", k=0)], ["capture.reads.0", "k", "greater than or equal to 1"]),
        ([sae("broken")], ["'broken'", "k"]),
        ([sae("crosscoder", k=2)], ["capture.reads.0.artifact", "'topk_crosscoder'", "export it as"]),
        ([], ["capture.hooks and capture.reads are both empty"]),
    ],
)
def test_a_bad_read_is_refused_by_name(
    reads: list[dict[str, Any]], words: list[str], lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capture", str(job_file(tmp_path, lake, reads=reads))]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert all(word in printed for word in words), printed
    assert lake.runs() == []


def test_a_dry_run_counts_reads(lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path, lake, reads=[probe("lie"), sae("jump", k=7)], positions="last")
    assert main(["capture", str(job), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 a hook, 80 B in all" in printed  # 2 rows x (2 scores x 4 + 7 x (2 + 2) + 4)
    assert "read     lie (2 scores, at blocks.4.hook_resid_post)" in printed
    assert "hooks" not in printed


def test_parameters_carry_reads() -> None:
    reads = [probe("lie"), sae("topk")]
    assert mp.capture_params("r", reads=reads)["millpond"]["capture"]["reads"] == reads
    assert json.loads(mp.capture_params("r", reads=reads, http=True)["millpond"])["capture"]["reads"] == reads
    for wrong in ({"reads": []}, {"reads": [{"read": "probe"}]}, {"capture": False, "reads": reads}):
        with pytest.raises(InvalidInput, match="reads"):
            mp.capture_params(**wrong)  # type: ignore[call-overload]


def test_stored_reads_are_reused_with_their_rows(lake: Lake, tmp_path: Path) -> None:
    """Every prompt is held already, so that no engine starts."""
    hook = "blocks.4.hook_resid_post"
    asked = [probe("lie"), sae("jump", k=7)]
    plan = plan_capture(read_job(job_file(tmp_path, lake, hooks=[hook], reads=asked)))
    size = {"d_model": EXAMPLE_D_MODEL, "dtype": "bfloat16", "provenance": model_provenance(MODEL)}
    spec = lake.create_run("source", hooks=(hook,), reads=plan.reads, **size)  # type: ignore[arg-type]
    writer, put = RunWriter(lake.run_storage("source"), spec), {}
    for key, tokens in (("long", [0, 5, 6, 9]), ("b", [0, 7])):
        n = len(tokens)
        arrays = {name: (n, array.columns or 1) for name, array in spec.read_arrays().items()}
        values = {
            name: RNG.integers(0, D_SAE, shape).astype(spec.arrays()[name].dtype) for name, shape in arrays.items()
        }
        values["jump.active"] = values["jump.active"][:, 0]
        rows = {hook: RNG.integers(0, 1 << 14, (n, EXAMPLE_D_MODEL)).astype(np.uint16)}
        put[key] = values
        writer.append(CapturedRequest(key, np.array(tokens, np.int32), n, np.arange(n, dtype=np.int32), rows, values))
    writer.commit()
    job = job_file(tmp_path, lake, hooks=[hook], reads=asked)
    job.write_text(job.read_text().replace('run = "run"', 'run = "again"\nreuse = ["source"]'))
    done = run_capture_file(job, progress=False)
    assert (done.reused, done.rows) == (2, 5)
    run = lake["again"]
    assert verify_run(run).problems == []
    assert np.array_equal(run.select(["a"]).reads["lie"]["scores"].values, put["long"]["lie.scores"][:3])
    assert np.array_equal(run.select(["b"]).reads["jump"]["indices"].values, put["b"]["jump.indices"])
    fewer = [probe("lie", name="other")]
    other = job_file(tmp_path, lake, hooks=[hook], reads=fewer)
    other.write_text(other.read_text().replace('run = "run"', 'run = "third"\nreuse = ["source"]'))
    with pytest.raises(InvalidInput, match=r"'source' does not have all of capture\.reads; it has lie, jump"):
        run_capture_file(other, progress=False)
    for name in ("source", "again"):
        lake.delete(name)
