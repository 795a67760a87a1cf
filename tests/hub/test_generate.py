"""Generation through a real gateway, queue server, worker and executor: rates by default, texts after a review."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from tests.hub.gatehouse import Gatehouse
from tests.queue_serving import serving

import millpond as mp
from millpond.hub.body import ErrorCode, Failure, Texts, decode
from millpond.hub.executor import Executor, verify_release
from millpond.hub.policy import Disclosure
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.hub.rates import matches, mean, rate, ratio
from millpond.hub.rules import Evidence, Rule, judge
from millpond.hub.settings import Weights
from millpond.hub.shapes import TEXTS
from millpond.store.artifacts import load_artifact
from millpond.store.errors import GatewayRefused, InReview, InvalidInput, NotReleased
from millpond.store.generation import Question, read_completions, read_judged
from millpond.store.losses import read_losses
from millpond.store.result import Result

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "stdlib_llama" / "model"
HOOK = "blocks.2.hook_resid_post"
FILES = sorted((ROOT / "store").glob("*.py"), key=lambda path: -path.stat().st_size)[:24]
PROMPTS = [
    {"id": path.stem, "text": path.read_text()[-600:-400], "kind": ("read", "write", "load", "check")[number % 4]}
    for number, path in enumerate(FILES)
]
PATTERN = r"\b(return|if|self)\b"
STEER = {"op": "add", "hook": HOOK, "vector": [40.0 * (-1) ** n for n in range(256)]}
P = "/api/v1/p/one"
KINDS = ["capture", "generate", "judge", "sae_cross_entropy"]


def test_a_rate_counts_prompts_and_not_completions():
    matched = np.array([True] * 10 + [False] * 10)
    p, low, high = rate(matched, np.repeat(np.arange(4), 5))
    # a ratio estimator's variance of 1/12: as good as three completions
    half = 1.959964 / (1 + 3.841459 / 3) * (0.25 / 3 + 3.841459 / 36) ** 0.5
    assert (p, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)
    none = rate(np.zeros(20, bool), np.repeat(np.arange(4), 5))
    assert none == pytest.approx((0.0, 0.0, 3.841459 / (4 + 3.841459)), abs=1e-6)  # of four prompts, not of twenty
    assert rate(matched, np.arange(20))[2] < high


def test_a_mean_score_has_the_interval_of_a_ratio_over_prompts():
    scores, prompts = np.array([1.0, 2.0, 3.0, 4.0, 10.0]), np.array([0, 0, 1, 1, 2])
    # sums of deviations from 4 by prompt: -5, -1, 6; times 3/2 over 5 squared
    half = 1.959964 * (1.5 * (25 + 1 + 36)) ** 0.5 / 5
    assert mean(scores, prompts) == pytest.approx((4.0, 4.0 - half, 4.0 + half), abs=1e-5)
    one = mean(scores[:2], prompts[:2])
    assert one[0] == 1.5
    assert np.isnan(one[1:]).all()


def test_a_question_is_filled_in_once_and_must_show_what_is_judged():
    question = Question(template="{prompt}|{completion} {x}?", choices=(" yes", " no"))
    assert question.ask("{completion}", "{prompt}") == "{completion}|{prompt} {x}?"
    for wrong in (
        {"template": "{prompt}?", "choices": (" a", " b")},
        {"template": "{completion}", "choices": (" a", " a")},
    ):
        with pytest.raises(ValueError, match=r"completion|same"):
            Question(**wrong)


def test_a_ratio_of_sums_is_a_mean_where_what_divides_is_a_count():
    over, under, prompts = np.array([3.0, 7.0, 2.0, 8.0]), np.array([1.0, 2.0, 1.0, 1.0]), np.array([0, 0, 1, 2])
    # 20 / 5; deviations from 4 * under by prompt: 10 - 12, 2 - 4, 8 - 4
    half = 1.959964 * (1.5 * (4 + 4 + 16)) ** 0.5 / 5
    assert ratio(over, under, prompts) == pytest.approx((4.0, 4.0 - half, 4.0 + half), abs=1e-5)
    assert np.isnan(ratio(over, np.zeros(4), prompts)).all()


def test_an_expression_cannot_hang_the_vault():
    started = time.process_time()
    assert matches(["a" * 100_000 + "b"], regex="(a+)+$").tolist() == [False]
    assert time.process_time() - started < 5
    assert matches(["xay", "XAY", ""], contains=("a", "q")).tolist() == [True, False, False]


def test_rates_of_added_vectors_pass_on_own_prompts_only_and_texts_never():
    limits = Disclosure()
    rates = Result("rates", {"rates": np.array([0.5]), "rates_low": np.array([0.4]), "rates_high": np.array([0.6])}, {})
    steered = {"rows": 400, "prompts": 200, "intervened": True, "top_prompt_share": 0.01, "top_two_share": 0.02}
    assert judge(rates, Evidence("own", matched=True, **steered), (), limits).outcome == "pass"
    assert judge(rates, Evidence("own", matched=False, **steered), (), limits).rules == (Rule.INTERVENED,)
    restricted = Evidence("restricted", matched=True, cohorts=({n: n for n in range(200)},), **steered)
    assert judge(rates, restricted, (), limits).rules == (Rule.INTERVENED,)
    summary = Result("summary", {"mean": 1.0}, {})
    assert judge(summary, Evidence("own", matched=True, **steered), (), limits).rules == (Rule.INTERVENED,)
    scored = Result("probe-rates", dict(rates.values), {})
    assert judge(scored, Evidence("own", matched=True, **steered), (), limits).rules == (Rule.INTERVENED,)
    assert judge(scored, Evidence("own", matched=True, **steered | {"intervened": False}), (), limits).outcome == "pass"
    texts = Result(TEXTS, {"coded": np.zeros(3, np.uint8)}, {})
    assert judge(texts, Evidence("own", rows=400, prompts=200), (), limits).rules == (Rule.TEXT,)


class Worker:
    def __init__(self, folder, address, token):
        # fmt: off
        command = [
            sys.executable, "-m", "millpond.cli", "worker", "--queue", address, "--model", str(MODEL),
            "--lake", str(folder / "lake"), "--hooks", HOOK, "--lease", "4", "--kinds", *KINDS,
            "--engine", json.dumps({"kv_cache_memory_bytes": 1 << 27, "max_num_batched_tokens": 512}),
        ]
        # fmt: on
        self.log = folder / "worker.log"
        with self.log.open("ab") as log:
            environment = os.environ | {"MILLPOND_WORKER_TOKEN": token}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def end(self, number):
        """Whatever ends the worker itself, its engine's processes follow."""
        engine = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(60)
        left = psutil.wait_procs(engine, timeout=60)[1]
        assert engine
        assert not left


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The gateway and what stands behind it; the first worker was killed in the middle of a job."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "words.txt").write_bytes((ROOT / "store" / "lake.py").read_bytes())
    gate = Gatehouse(folder, dictionary="words.txt")
    gate.settings = gate.settings.model_copy(update={"models": {"m": Weights(path=str(MODEL))}})
    sql = SqlQueue(gate.settings.database)
    token, credential = new_worker("gpu", KINDS)
    executor = Executor(gate.settings, told=lambda _: None)
    thread = threading.Thread(target=executor.run)
    with gate, serving(create_queue_app(sql, [credential])) as address:
        worker = Worker(folder, address, token)
        thread.start()
        lake = mp.connect(gate.origin, gate.tokens["ada"], "one", dictionary=folder / "words.txt")
        prompts = lake.prompts("functions", PROMPTS)
        sampling = {"max_tokens": 100, "n": 40, "temperature": 1.0}
        killed = lake.submit_generate(prompts, model="m", score=PATTERN, by="kind", **sampling)
        end = time.monotonic() + 120
        while sql.get(killed.handle).progress.get("prompts", 0) < 20:
            assert worker.process.poll() is None, worker.log.read_text()[-3000:]
            assert time.monotonic() < end, (sql.get(killed.handle), worker.log.read_text()[-3000:])
            time.sleep(0.05)
        worker.end(signal.SIGKILL)
        worker = Worker(folder, address, token)
        try:
            yield SimpleNamespace(gate=gate, sql=sql, lake=lake, prompts=prompts, killed=killed, worker=worker)
        finally:
            worker.end(signal.SIGTERM)
            executor.stop()
            thread.join()
            executor.workshop.engine.dispose()
            sql.engine.dispose()
            lake.close()


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_once_and_the_rates_are_of_what_it_wrote(place):
    made = place.killed.result(timeout=400)
    table = read_completions(place.gate.lake.storage, place.killed.handle)
    assert table.groupby("prompt").size().tolist() == [40] * len(PROMPTS)
    matched = table["text"].map(lambda text: re.search(PATTERN, text) is not None)
    kinds = table["prompt"].map(lambda n: PROMPTS[n]["kind"])
    assert made.groups == ("check", "load", "read", "write")
    expected = [matched.mean(), *(matched[kinds == kind].mean() for kind in made.groups)]
    (kept,) = place.gate.app.state.gateway.answers.of(place.killed.handle)
    assert kept.result.values["rates"].tolist() == pytest.approx(expected)
    steps = (made.table()["high"] - made.table()["low"]) / 2  # a released one is rounded to its standard error
    assert (abs(made.table()["rate"] - expected) < steps).all()
    assert (made.table()["low"] <= made.table()["rate"]).all()
    assert made.table().index.tolist() == ["overall", *made.groups]
    assert made.rates.values["rows"] == len(table)
    events = [event.event for event in place.sql.history(place.killed.handle) if event.event != "heartbeat"]
    assert events == ["submit", "claim", "claim", "hand over", "claim", "finish"]
    assert verify_release(place.gate.settings, place.killed.handle) == [(0, "same")]


@pytest.mark.slow
def test_steering_changes_how_often_the_model_writes_what_matches(place):
    before = place.gate.spent()
    options = {"model": "m", "score": PATTERN, "max_tokens": 40}
    quoted = place.lake.quote("generate", {"prompts": place.prompts, **options})
    plain = place.lake.generate(place.prompts, **options)
    steered = place.lake.generate(place.prompts, interventions=[STEER], **options)
    assert plain.table().loc["overall", "low"] > steered.table().loc["overall", "high"]
    assert quoted == 1 + -(-(8 + 1 + 17 + 40 + 2 * 41) // 8) + 16  # one rate with its interval, two counts
    assert place.gate.spent() - before < 2 * quoted + 400


def transformer():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.slow
def test_a_probe_scores_what_is_written_and_its_rates_and_means_leave(place):
    """The scores are those of a Hugging Face forward pass over prompt and completion."""
    import torch

    run = place.lake.capture(place.prompts, model="m", name="rows", hooks=HOOK)
    run.labels.add("early", {row["id"]: number < 12 for number, row in enumerate(PROMPTS)})
    probe = mp.LogisticProbe().fit(run[HOOK], run.labels["early"])
    options = {"model": "m", "max_tokens": 12, "by": "kind"}
    score = {"probe": probe, "of": "max", "threshold": 2.0}
    before = place.gate.spent()
    quoted = place.lake.quote("generate", {"prompts": place.prompts, "score": score, **options})
    future = place.lake.submit_generate(place.prompts, score=score, **options)
    made = future.result(timeout=240)
    assert place.gate.spent() - before < 2 * quoted + 400
    lake = place.gate.lake
    table = read_completions(lake.storage, future.handle)
    held = place.gate.app.state.gateway.projects.find("one", "artifact", bytes.fromhex(future.job.score.probe))
    artifact = load_artifact(lake, held.target)
    coef, intercept = (artifact.arrays()[name] for name in ("coef", "intercept"))
    model, tokenizer = transformer()
    compared = 0
    for row, prompt in zip(table.itertuples(), PROMPTS, strict=True):
        ids = tokenizer(prompt["text"] + row.text, return_tensors="pt")["input_ids"]
        n = len(row.prompt_tokens)
        if ids[0, :n].tolist() != list(row.prompt_tokens) or ids.shape[1] != n + row.tokens:
            continue  # cut into other tokens than it was written in
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[3]
        scores = hidden[0, n - 1 : -1].float().numpy() @ coef[0] + intercept[0]
        expected = (scores.mean(), scores.max(), scores[-1])
        error = 0.03 * np.abs(scores).max()  # of bfloat16
        assert (row.score_mean, row.score_max, row.score_last) == pytest.approx(expected, abs=error)
        compared += 1
    assert compared > len(PROMPTS) / 2
    (kept,) = place.gate.app.state.gateway.answers.of(future.handle)
    assert kept.result.values["rates"][0] == (table["score_max"] > 2.0).mean()
    assert 0 < kept.result.values["rates"][0] < 1
    assert kept.result.values["scores"][0] == pytest.approx(table["score_max"].mean())
    shown = made.table()
    assert (shown["score_low"] < shown["score"]).all()
    assert (shown["score"] < shown["score_high"]).all()
    assert shown.index.tolist() == ["overall", "check", "load", "read", "write"]
    assert not [name for name in lake if name.startswith("generation-")]
    steered = place.lake.submit_generate(place.prompts, score=score, interventions=[STEER], **options)
    with pytest.raises(InReview, match="intervention"):
        steered.result(timeout=240)
    moved = read_completions(lake.storage, steered.handle)
    assert (moved["score_max"] - table["score_max"]).abs().mean() > 1  # read where the vector was added


@pytest.mark.slow
def test_a_judge_in_the_vault_answers_about_each_completion_and_only_shares_leave(place):
    """Its answers are the likelier of two tokens in a Hugging Face forward pass."""
    import torch

    score = {"template": "{completion}", "choices": ["ations", "("]}
    options = {"model": "m", "max_tokens": 8, "score": score}
    quoted = place.lake.quote("generate", {"prompts": place.prompts, **options})
    assert quoted == 1 + -(-(8 + 1 + 17 + 2 * 40 + 2 * 41) // 8) + 16  # two rates with their intervals, two counts
    future = place.lake.submit_generate(place.prompts, **options)
    made = future.result(timeout=240)
    table = read_completions(place.gate.lake.storage, future.handle)
    chosen = read_judged(place.gate.lake.storage, future.handle)["choice"].to_numpy()
    model, tokenizer = transformer()
    answers = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in score["choices"]]
    sure = 0
    for row, choice in zip(table.itertuples(), chosen, strict=True):
        ids = tokenizer(row.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1, answers].float()
        if abs(float(logits[0] - logits[1])) > 0.25:
            assert choice == int(logits.argmax())
            sure += 1
    assert sure > len(PROMPTS) / 2
    assert made.choices == ("ations", "(")
    assert made.table().index.tolist() == [("ations", "overall"), ("(", "overall")]
    (kept,) = place.gate.app.state.gateway.answers.of(future.handle)
    assert kept.result.values["rates"].tolist() == [float((chosen == 0).mean()), float((chosen == 1).mean())]
    events = [event.event for event in place.sql.history(future.handle) if event.event != "heartbeat"]
    assert events == ["submit", "claim", "hand over", "claim", "hand over", "claim", "finish"]
    steered = place.lake.generate(place.prompts, interventions=[STEER], **options)
    plain, pushed = made.table().loc[("ations", "overall")], steered.table().loc[("ations", "overall")]
    assert plain["high"] < pushed["low"]  # what the model writes then is a syllable again and again
    with pytest.raises(GatewayRefused):  # the choices begin alike
        place.lake.generate(PROMPTS[:1], **options | {
            "score": score | {"choices": [" self.a", " self.b"]}})  # fmt: skip


@pytest.mark.slow
def test_texts_leave_after_a_review_only_and_are_what_is_in_the_vault(place):
    options = {"model": "m", "max_tokens": 30, "texts": True, "n": 2, "temperature": 0.8}
    prompts = PROMPTS[:3]
    future = place.lake.submit_generate(prompts, **options)
    with pytest.raises(InReview):
        future.result(timeout=240)
    browser, csrf = place.gate.browser("rex")
    rex = place.gate.spent("rex")
    seen = browser.post(f"/p/one/reviews/{future.handle}/0", data={"do": "view", "csrf_token": csrf})
    table = read_completions(place.gate.lake.storage, future.handle)
    assert seen.text.count("Completion ") == 6
    assert place.gate.spent("rex") > rex + 30
    before = place.gate.spent()
    path = f"{P}/reviews/{future.handle}/0"
    browser.post(path, json={"decision": "approved"}, headers={"X-CSRF-Token": csrf})
    time.sleep(0.5)
    made = future.result(timeout=30)
    assert [list(one) for one in made.texts] == table.groupby("prompt")["text"].apply(list).tolist()
    assert made.rates is None
    plain = sum(len(text.encode()) for text in table["text"])
    assert 16 < place.gate.spent() - before < plain
    answer = decode(place.gate.client("ada").get(f"{P}/jobs/{future.handle}/answers/0").content)
    assert isinstance(answer, Texts)


@pytest.mark.slow
def test_a_refused_review_sends_nothing(place):
    future = place.lake.submit_generate(PROMPTS[:2], model="m", max_tokens=10, texts=True)
    with pytest.raises(InReview):
        future.result(timeout=240)
    browser, csrf = place.gate.browser("rex")
    path = f"{P}/reviews/{future.handle}/0"
    browser.post(path, json={"decision": "denied"}, headers={"X-CSRF-Token": csrf})
    time.sleep(0.5)
    with pytest.raises(NotReleased, match="text") as error:
        future.result(timeout=30)
    assert not isinstance(error.value, InReview)
    before = place.gate.spent()
    sent = place.gate.client("ada").get(f"{P}/jobs/{future.handle}/answers/0").content
    assert len(sent) < 6
    assert place.gate.spent() - before == len(sent) + 16


@pytest.mark.slow
def test_a_seed_on_a_cpu_engine_fails_the_job_and_not_the_worker(place):
    with pytest.raises(GatewayRefused):
        place.lake.generate(PROMPTS, model="m", max_tokens=5, score="a", temperature=1.0, seed=1)
    assert place.worker.process.poll() is None


@pytest.mark.slow
def test_what_cannot_be_done_is_refused_before_it_is_queued(place):
    jobs = len(place.sql.jobs())
    good = {"model": "m", "max_tokens": 5, "score": "a"}
    for field, wrong in (
        ("regex", {"score": "(a"}),
        ("regex", {"score": "(?=a)b"}),
        ("max_tokens", {"max_tokens": 5000}),
        ("temperature", {"temperature": -1}),
        ("score", {"score": []}),
        ("completion", {"score": {"template": "Good?", "choices": [" yes", " no"]}}),
        ("by", {"by": "kind"}),
        ("texts", {"score": None}),
    ):
        with pytest.raises(InvalidInput, match=field):
            place.lake.generate(PROMPTS, **good | wrong)
    client = place.gate.client("ada")
    job = {"kind": "generate", "model": "m", "prompts": [{"id": "a", "text": "x"}], "sampling": {"max_tokens": 5}}
    job["score"] = {"contains": ["a"]}
    unknown = {"op": "add", "hook": HOOK, "vector": "0" * 16}
    for code, wrong in (
        (ErrorCode.NOT_FOUND, {"interventions": [unknown]}),
        (ErrorCode.BAD_REQUEST, {"model": "other"}),
        (ErrorCode.BAD_REQUEST, {"adapter": "none"}),
        (ErrorCode.NOT_FOUND, {"prompts": "0" * 16}),
        (ErrorCode.BAD_REQUEST, {"prompts": place.prompts.handle, "by": "nothing"}),
        (ErrorCode.BAD_REQUEST, {"texts": True, "text_bytes": 65_536, "sampling": {"max_tokens": 5, "n": 64}}),
    ):
        assert decode(client.post(f"{P}/jobs", json={"job": job | wrong}).content) == Failure(code), wrong
    assert len(place.sql.jobs()) == jobs


# the engine of `millpond sae eval`, which cuts prompts into the batches that the worker cuts them into
COMMAND_LINE = """
import json, sys
from millpond.analysis.sae.estimator import Sae
from millpond.analysis.sae.recovered import cross_entropy_recovered
from millpond.hub.recovered import VllmModel
if __name__ == "__main__":
    model, folder, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    sae = Sae.load(folder)
    with VllmModel(model, sae, dtype="auto", max_num_seqs=64, max_num_batched_tokens=512) as engine:
        result = cross_entropy_recovered(sae, engine, prompts, first_position=0)
    print(json.dumps(result.values | result.evidence))
"""


@pytest.mark.slow
def test_what_an_autoencoder_recovers_is_the_command_lines_number(place, tmp_path):
    run = place.lake.capture(place.prompts, model="m", name="sources", hooks=HOOK)
    sae = mp.BatchTopKSae(d_sae=256, k=16, batch_size=256, lr=3e-3, progress=False).fit(run[HOOK], tokens=40_000)
    before = place.gate.spent()
    quoted = place.lake.quote("sae_cross_entropy", {"artifact": sae, "prompts": run})
    assert quoted == 1 + -(-(8 + 4 * 42 + 2 * 41) // 8) + 16  # four numbers with their intervals, two counts
    future = place.lake.submit_sae_cross_entropy(sae, run)
    found = future.result(timeout=240)
    assert place.gate.spent() - before < 2 * quoted + 200
    (kept,) = place.gate.app.state.gateway.answers.of(future.handle)
    held = place.gate.app.state.gateway.projects.find("one", "artifact", bytes.fromhex(sae.remote_.handle))
    artifact = load_artifact(place.gate.lake, held.target)
    (tmp_path / "cfg.json").write_text(json.dumps(artifact.config))
    (tmp_path / "sae_weights.safetensors").write_bytes(artifact.data)
    (tmp_path / "run.py").write_text(COMMAND_LINE)
    table = read_losses(place.gate.lake.storage, future.handle)
    prompts = [list(map(int, ids)) for ids in table["prompt_tokens"]]
    command = [sys.executable, tmp_path / "run.py", MODEL, tmp_path, json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads(done.stdout.splitlines()[-1])
    assert kept.result.evidence["tokens"] == expected["tokens"] == sum(len(ids) - 1 for ids in prompts)
    assert 0.2 < expected["ce_recovered"] < 1
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_recovered"):
        assert kept.result.values[name] == pytest.approx(expected[name], abs=1e-6), name
        low, high = found.intervals[name]
        assert low <= found[name] <= high
        # rounded to its standard error; at 0 from position 0 on, this model says the same of every token
        assert abs(found[name] - expected[name]) < (0.005 if name == "ce_zero" else (high - low) / 2)
    assert expected["ce_zero"] == pytest.approx(np.log(4096), abs=1e-5)
    events = [event.event for event in place.sql.history(future.handle) if event.event != "heartbeat"]
    assert events == ["submit", "claim", "hand over", "claim", "finish"]
    assert verify_release(place.gate.settings, future.handle) == [(0, "same")]
    # the same texts, sent by themselves, from position 1 on
    sent = place.lake.sae_cross_entropy(sae, place.prompts, model="m")
    assert sent["tokens"] == expected["tokens"] - len(PROMPTS)
    with pytest.raises(NotReleased, match="too_few_prompts"):
        place.lake.sae_cross_entropy(sae, PROMPTS[:19])
    with pytest.raises(GatewayRefused):  # there is no tap
        place.lake.sae_cross_entropy(sae, place.prompts, hook="blocks.0.hook_resid_post")
    with pytest.raises(InvalidInput, match="give the rows themselves"):
        place.lake.sae_cross_entropy(sae, run[HOOK])
