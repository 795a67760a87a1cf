"""The client against a real gateway, executor and ledger: what works on `mp.open` works on `mp.connect`, and costs what it says."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import millpond as mp
from millpond.hub.client.connection import Connection
from millpond.hub.client.lake import RemoteLake
from millpond.hub.client.texts import TextReader
from millpond.hub.kinds.base import FIRING_BINS
from millpond.hub.ledger import Payer
from millpond.hub.local import LocalVault
from millpond.hub.projection import RunView
from millpond.hub.textcode import encode
from millpond.hub.textmodel import VERSION, TextModel
from millpond.store.errors import (
    ActivationsStayInVault,
    BudgetSpent,
    Cancelled,
    GatewayRefused,
    GatewayUnavailable,
    HookNotCaptured,
    InvalidInput,
    LabelNotFound,
    NotReleased,
    RunNotFound,
    TextVersionUnknown,
)
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

D, PROMPTS, LAYERS = 24, 90, 3
HOOK = "blocks.2.hook_resid_post"


def write_run(lake, name, prompts=PROMPTS, seed=0):
    """`deceptive` is linear in layers 1 and 2, absent from layer 0; `kind` has one value a prompt."""
    rng = np.random.default_rng(seed)
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS))
    provenance = {"model": "toy", "capture": {"capture": {"max_new_tokens": 0}}}
    spec = lake.create_run(name, hooks=hooks, d_model=D, dtype="float32", provenance=provenance, chunk_rows=256)
    writer = RunWriter(lake.run_folder(name), spec)
    direction = rng.standard_normal(D)
    marks = {}
    for number in range(prompts):
        n = int(rng.integers(20, 41))
        mark = rng.random(n) < 0.4
        rows = {hook: rng.standard_normal((n, D)).astype(np.float32) for hook in hooks}
        for hook in hooks[1:]:
            rows[hook] += (mark[:, None] * direction * 0.5).astype(np.float32)
        marks[f"p{number}"] = mark
        tokens = rng.integers(0, 5000, n).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, n, np.arange(n, dtype=np.int32), rows))
    writer.commit()
    table = pd.DataFrame({"id": list(marks), "topic": [f"t{number % 3}" for number in range(prompts)]})
    return seal_run(
        lake.run_folder(name),
        prompts=table,
        prompt_labels=("topic",),
        token_labels={"deceptive": marks},
        token_label_dtypes={"deceptive": "bool"},
    )


@pytest.fixture(scope="module")
def vault():
    with tempfile.TemporaryDirectory(prefix="mpc", dir="/tmp") as folder:
        lake = open_lake(Path(folder) / "lake", create=True)
        write_run(lake, "run-1")
        local = LocalVault(
            Path(folder) / "v", lake.folder, {"m": {"parameters": 8_000_000_000}, "tiny": {"parameters": 8_000_000}}
        )
        with local:
            projects = local.projects
            for project, models in (("probing", ["m"]), ("poor", ["tiny"])):
                projects.create(project, models=models, by="ada")
            projects.hold("probing", "run", "deception", "run-1", model="m", detail={"prompts": "own"})
            projects.hold("probing", "run", "others", "run-1", model="m", detail={"prompts": "restricted"})
            projects.hold("poor", "run", "deception", "run-1", model="tiny", detail={"prompts": "own"})
            local.token = local.add_token("ada", "read", "run")
            local.lake = lake
            local.start()
            yield local


@pytest.fixture
def lake(vault):
    with mp.connect(vault.url, vault.token, "probing") as found:
        yield found


def spent(vault, project="probing", model="m"):
    ledger = vault.ledger()
    try:
        return next(b.spent for b in ledger.balances(Payer("ada", project, (model,))) if b.account.scope == "project")
    finally:
        ledger.close()


def fifteen_lines(lake, name):
    """Section 6 of the architecture."""
    run = lake[name]
    train, test = run.split(test=0.2, seed=0)
    probe = mp.LogisticProbe(progress=False).fit(train[HOOK], train.labels["deceptive"])
    score = probe.score(test[HOOK], test.labels["deceptive"])
    result = probe.evaluate(test[HOOK], test.labels["deceptive"])
    sweep = mp.LogisticProbe(progress=False).sweep(
        train, test, hooks="blocks.*.hook_resid_post", labels="deceptive", controls=("shuffled",)
    )
    sae = mp.BatchTopKSae(d_sae=32, k=4, progress=False)
    sae.fit(train[HOOK], tokens=1_500)
    return probe, score, result, sweep, sae.evaluate(test[HOOK]), sae


def test_the_same_lines_give_the_same_numbers_in_the_vault_and_outside(vault, lake):
    probe, score, result, sweep, measured, sae = fifteen_lines(lake, "deception")
    there = vault.lake["run-1"]
    local = mp.LogisticProbe(progress=False)
    train, test = there.split(test=0.2, seed=0)
    local.fit(train[HOOK], train.labels["deceptive"])
    expected = local.evaluate(test[HOOK], test.labels["deceptive"])
    assert isinstance(score, float)
    for name in ("auroc", "accuracy", "log_loss"):
        low, high = expected.intervals[name]
        step = max((high - low) / 3.92, 1e-3) * 5  # rounded to 1, 2 or 5 times a power of ten above the standard error
        assert result[name] == pytest.approx(expected[name], abs=step / 2 + 1e-9)
        assert result[name] != expected[name]  # it was rounded
    assert result["rows"] == expected.evidence["rows"]  # own prompts: counts are exact
    assert score == result["accuracy"]

    with pytest.raises(ActivationsStayInVault, match=r"probe\.release\(\)"):
        probe.coef_  # noqa: B018
    released = probe.release()
    assert released.kind == "direction"
    cosine = np.dot(probe.coef_[0], local.coef_[0]) / np.linalg.norm(probe.coef_) / np.linalg.norm(local.coef_)
    assert 0.995 < cosine < 1 - 1e-9  # six bits a coordinate
    assert len(np.unique(np.round(probe.coef_[0] / np.abs(probe.coef_[0]).max(), 6))) <= 63

    table = sweep.table()
    assert list(table["hook"].unique()) == list(there.hooks)
    real = table[~table["control"]].set_index("layer")["auroc"]
    assert real[0] < 0.6 < 0.8 < real[2]
    assert (table[table["control"]]["auroc"] - 0.5).abs().max() < 0.1
    assert "AUROC" in sweep.plot().axes[0].get_ylabel()
    assert "blocks.2" in sweep._repr_html_()
    with pytest.raises(ActivationsStayInVault, match="fit the one you want"):
        sweep.best("deceptive")

    assert measured.kind == "sae-evaluation"
    assert 2 < measured["l0"] < 6
    assert measured["frequency_histogram"].sum() == 32
    assert measured["frequency_histogram"].shape == (FIRING_BINS,)
    assert 0 < measured["explained_variance"] < 1
    assert "in the vault" in repr(sae)
    with pytest.raises(ActivationsStayInVault, match="weights"):
        sae.W_dec_  # noqa: B018
    top = sae.top_rows(lake["deception"][HOOK], [0, 1], n=3)
    assert set(top.columns) >= {"latent", "rank", "prompt", "position", "value"}
    assert top["prompt"].between(0, PROMPTS - 1).all()


def test_what_is_here_of_a_remote_run_is_its_shape_and_not_its_values(lake):
    run = lake["deception"]
    column = run[HOOK]
    assert column.shape == (run.n_rows, D)
    assert column.dtype == np.float32
    assert "in the vault" in repr(column)
    assert "deceptive" in run._repr_html_()
    assert "deception" in lake._repr_html_()
    for touch in (
        lambda: np.asarray(column), lambda: column.values, lambda: column[0], lambda: np.asarray(run.labels["deceptive"]),
        lambda: list(column), lambda: column.compute(), lambda: run.stream, lambda: mp.LogisticProbe().predict(column),
        lambda: column.mean("row"), lambda: run.labels["deceptive"].sum(),
    ):  # fmt: skip
        with pytest.raises(ActivationsStayInVault, match="in the vault"):
            touch()
    train, test = run.split(0.2)
    assert train[HOOK].shape == (None, D)
    with pytest.raises(ActivationsStayInVault):
        len(test)
    with pytest.raises(HookNotCaptured):
        run["blocks.9.hook_resid_post"]
    with pytest.raises(LabelNotFound, match="deceptive"):
        run.labels["deceptiv"]
    with pytest.raises(RunNotFound, match="deception"):
        lake["nothing"]
    with pytest.raises(InvalidInput, match="other rows"):
        mp.LogisticProbe().fit(train[HOOK], test.labels["deceptive"])
    with pytest.raises(InvalidInput, match="before you split"):
        train.select(where="deceptive")
    with pytest.raises(InvalidInput, match="where is a ndarray; write the condition as text"):
        run.select(where=np.ones(3, bool))
    with pytest.raises(InvalidInput, match="prompts must be a list of ids"):
        run.select("p1")
    with pytest.raises(InvalidInput, match="sample_weight"):
        mp.LogisticProbe().fit(train[HOOK], train.labels["deceptive"], sample_weight=np.ones(3))


def test_lazy_expressions_and_conditions_run_in_the_vault(vault, lake):
    there = vault.lake["run-1"]
    v = np.random.default_rng(3).standard_normal(D)
    found = (mp.lazy(lake["deception"])[HOOK] @ v).groupby("deceptive").mean().compute()
    expected = (mp.lazy(there)[HOOK] @ v).groupby("deceptive").mean().compute(progress=False)["mean"]
    step = (found["means_high"] - found["means_low"]).max() / 3.92 * 5
    assert np.allclose(found["means"], np.ravel(expected), atol=step)
    some = lake["deception"].select(where="deceptive and topic == 't1'", position=[3, 4, 5, 6])
    counted = (mp.lazy(some)[HOOK] @ v).mean().compute()
    mine = there.select(where="deceptive and topic == 't1'", position=[3, 4, 5, 6])
    assert counted["rows"] == len(mine)
    error = (counted["means_high"] - counted["means_low"])[0] / 3.92  # steps are up to five of them
    assert counted["means"][0] == pytest.approx(float(np.mean(mine[HOOK].values @ v)), abs=5 * error)
    assert error < 3
    summary = lake["deception"].statistics(HOOK)
    assert summary["sd"] == pytest.approx(float(there[HOOK].values.std()), rel=0.05)


def test_labels_that_a_client_adds_are_used(vault, lake):
    run = lake["deception"]
    values = {f"p{number}": int(number % 2) for number in range(PROMPTS)}
    train, test = run.split(0.3, seed=1)
    run.labels.add("odd", values)
    assert "odd" in train.labels
    probe = mp.MassMeanProbe(progress=False).fit(train[HOOK], train.labels["odd"])
    result = probe.evaluate(test[HOOK], test.labels["odd"])
    assert result["auroc"] == pytest.approx(0.5, abs=0.15)
    assert "odd" not in mp.open(vault.lake.folder)["run-1"].labels  # under the project's mark
    with pytest.raises(InvalidInput, match="one for each"):
        run.labels.add("mixed", {"p0": 1, "p1": [1, 2]})


def test_many_futures_are_in_flight_and_end_in_their_own_order(lake):
    train, test = lake["deception"].split(0.2)
    futures = [
        mp.LogisticProbe(C=c, progress=False).submit_fit(
            train[HOOK], train.labels["deceptive"], test=(test[HOOK], test.labels["deceptive"])
        )
        for c in (0.01, 0.1, 1.0, 10.0)
    ]
    done = list(mp.as_completed(futures, timeout=120))
    assert sorted(future.handle for future in done) == sorted(future.handle for future in futures)
    for future in done:
        probe = future.result(timeout=1)
        assert 0.7 < probe.evaluation_["auroc"] <= 1
        assert future.charged < 400
        assert f"{future.charged:,} bytes charged" in repr(future)
        assert "<progress" in future._repr_html_()

    async def both():
        more = [
            mp.MassMeanProbe(progress=False).submit_fit(train[h], train.labels["deceptive"]) for h in train.hooks[:2]
        ]
        return await asyncio.gather(*more)

    assert [type(probe).__name__ for probe in asyncio.run(both())] == ["MassMeanProbe", "MassMeanProbe"]


def test_looking_often_costs_no_more_than_looking_once_a_slot(vault, lake):
    run = lake["deception"]
    future = mp.BatchTopKSae(d_sae=64, k=4, progress=False).submit_fit(run[HOOK], tokens=3_000_000)
    with pytest.raises(TimeoutError, match="ask later"):
        future.result(timeout=0.3)
    before = spent(vault)
    for _ in range(40):
        future.look()
    slots = 2 + math.log1p(future.elapsed)
    assert spent(vault) - before <= 2 * (slots * 32 + 2)
    started = time.monotonic()
    while time.monotonic() < started + 60 and future.look().state not in ("running", "done"):
        time.sleep(0.05)
    future.cancel()
    with pytest.raises(Cancelled, match="submit it again"):
        future.result(timeout=30)


def test_the_quote_bounds_what_a_job_costs_and_the_session_counts_it(vault, lake):
    train, test = lake["deception"].split(0.2, seed=7)
    probe = mp.LogisticProbe(progress=False)
    pair = (test[HOOK], test.labels["deceptive"])
    quote = probe.quote(train[HOOK], train.labels["deceptive"], test=pair)
    before, counted = spent(vault), lake.connection.charged
    future = probe.submit_fit(train[HOOK], train.labels["deceptive"], test=pair)
    future.result()
    cost = spent(vault) - before
    assert cost == lake.connection.charged - counted  # by the client's own count, to the byte
    statuses = cost - (25 + 25) - (quote - 0)  # the handles of the job and of what it made
    assert statuses <= 2 * (future.elapsed * 10 + 2)
    assert 40 < quote < 120
    left = lake.budget()
    assert 0 < left.user_week < 1_000_000
    assert "bytes left" in lake.left_text()


def test_what_is_held_back_names_the_rule_and_the_remedy(lake):
    run = lake["others"]
    few = run.select(prompts=[f"p{number}" for number in range(12)])
    with pytest.raises(NotReleased, match="too_few_prompts: use more distinct prompts"):
        (mp.lazy(few)[HOOK] @ np.ones(D)).mean().compute()
    run.labels.add("constant", {f"p{number}": 1 for number in range(PROMPTS)})
    with pytest.raises(GatewayRefused, match="twin"):
        mp.LogisticProbe(progress=False).fit(run[HOOK], run.labels["constant"])


def test_tokens_projects_and_addresses_that_are_wrong(vault, lake):
    with pytest.raises(GatewayRefused, match="token"):
        mp.connect(vault.url, "nonsense")
    with pytest.raises(InvalidInput, match="probing"):
        mp.connect(vault.url, vault.token)  # ada has two projects
    with pytest.raises(InvalidInput, match="MILLPOND_URL"):
        mp.connect()
    with pytest.raises(GatewayUnavailable, match="Connection refused"):
        mp.connect("http://127.0.0.1:9", "t", "p")
    reader = vault.add_token("ada", "read")
    with mp.connect(vault.url, reader, "probing") as narrow, pytest.raises(GatewayRefused, match="scope"):
        narrow["deception"].statistics(HOOK)
    with pytest.raises(GatewayRefused, match="the token is unknown"):
        mp.connect(vault.url, "nonsense", "probing")
    with pytest.raises(GatewayRefused, match=r"'somebody-elses' is not found.*poor, probing"):
        mp.connect(vault.url, vault.token, "somebody-elses")


def test_names_that_a_run_does_not_have_are_told_with_those_it_has(vault, lake):
    run = lake["deception"]
    with pytest.raises(InvalidInput, match=r"by is 'nope'.*they have id, .*n_tokens"):
        run.split(by="nope")
    with pytest.raises(InvalidInput, match=r"where names 'nope', which is no column or label.*deceptive.*position"):
        run.select(where="position > 1 and nope")
    with pytest.raises(LabelNotFound, match=r"'nope' is not in run 'deception', which has .*deceptive"):
        (mp.lazy(run)[HOOK] @ np.ones(D)).groupby("nope").mean().compute()
    with pytest.raises(HookNotCaptured, match=r"blocks\.9.*holds"):
        mp.LogisticProbe().sweep(*run.split(), hooks="blocks.9.hook_resid_post", labels="deceptive")
    assert run.split(by="topic")[0].rows.split.by == "topic"


def test_a_job_too_dear_is_refused_before_it_is_taken(vault):
    with mp.connect(vault.url, vault.token, "poor") as lake:
        train, test = lake["deception"].split(0.2)
        with pytest.raises(BudgetSpent, match=r"lake\.quote"):
            mp.LogisticProbe(progress=False, C=list(np.geomspace(0.001, 10, 32))).sweep(
                train, test, hooks="blocks.*", labels="deceptive"
            )
        assert lake.jobs() == []


def test_a_module_of_ones_own_is_measured_in_the_vault(lake):
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.down = torch.nn.Parameter(torch.randn(D, 6) * 0.1)

        def forward(self, x):
            codes = torch.relu(x @ self.down)
            made = codes @ self.down.T
            return {"loss": ((made - x) ** 2).sum() / x.shape[0], "reconstruction": made, "codes": codes}

    train, test = lake["deception"].split(0.2)
    untrained, trained = (
        lake.graph(Tied(), train[HOOK], test=test[HOOK], learning_rate=rate, batch_rows=64)[0] for rate in (None, 0.02)
    )
    assert trained.kind == "sae-evaluation"
    assert trained["fvu"] < untrained["fvu"]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # httpcore's, of a socket that is gone
def test_results_arrive_although_the_gateway_is_killed_meanwhile(vault, lake):
    run = lake["deception"]
    future = mp.BatchTopKSae(d_sae=64, k=4, progress=False).submit_fit(run[HOOK], tokens=400_000)
    vault.kill("gateway")
    vault.start()
    sae = future.result(timeout=120)
    assert sae.evaluate(run[HOOK])["rows"] == run.n_rows


def test_a_job_is_found_again_by_its_handle(vault, lake):
    """As after the notebook's server was started anew."""
    run = lake["deception"]
    train, _ = run.split(test=0.2, seed=4)
    probe = mp.LogisticProbe(progress=False)
    future = probe.submit_fit(train[HOOK], train.labels["deceptive"])
    with mp.connect(vault.url, token=vault.token, project="probing") as again:
        assert future.handle in again.jobs()
        answers, made = again.job(future.handle, answers=0).result(timeout=60)
        assert answers == []
        (artifact,) = made
    future.result(timeout=60)
    assert probe.remote_.handle == artifact.handle
    with pytest.raises(InvalidInput, match="16 hexadecimal digits"):
        lake.job("no handle")


def test_a_twin_takes_the_same_lines_and_costs_nothing(vault, lake):
    run = lake["deception"]
    before = spent(vault)
    twin = lake.twin(run, seed=4)
    assert twin["deception"].hooks == run.hooks
    assert len(twin["deception"]) == pytest.approx(run.n_rows, abs=PROMPTS)
    assert not np.allclose(twin["deception"][HOOK].values[:5], vault.lake["run-1"][HOOK].values[:5])
    _, score, result, _, measured, _ = fifteen_lines(twin, "deception")
    assert 0 < score <= 1
    assert result["auroc"] > 0.9  # a label that the twin put there
    assert measured["l0"] > 0
    again = lake.twin(run, seed=4)["deception"][HOOK].values
    assert np.array_equal(again, twin["deception"][HOOK].values)
    assert spent(vault) == before


def test_the_client_imports_nothing_heavy():
    code = (
        "import sys, millpond as mp; mp.connect; mp.as_completed; mp.lazy; mp.LogisticProbe(C=2).get_params(); "
        "print(mp.LogisticProbe(), mp.BatchTopKSae(64, 4)); "
        "print([m for m in ('torch', 'dask', 'distributed', 'zarr', 'sqlalchemy', 'vllm', 'jupyterhub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "LogisticProbe()" in done.stdout
    plain = (
        "import sys, millpond as mp; mp.connect; print([m for m in ('sklearn', 'scipy', 'xarray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_that_is_open_or_generated_does_not_tell_its_rows():
    lake = RemoteLake(Connection("http://127.0.0.1:9", None, "p"), {})
    lake.learn(RunView("ab" * 8, "r", "open", "m", (HOOK,), D, "bfloat16", None, None, ()))
    run = lake._run(lake.view("ab" * 8))
    assert run[HOOK].shape == (None, D)
    assert run.n_prompts is None
    assert "a-secret" not in repr(Connection("http://127.0.0.1:9", "a-secret"))
    with pytest.raises(InvalidInput, match="say how many"):
        mp.BatchTopKSae(8, 2).submit_fit(run[HOOK])


def test_texts_are_read_with_the_gateways_dictionary_only(tmp_path):
    words = "def one(value):\n    return value + 1\n" * 60
    path = tmp_path / "dictionary"
    path.write_text(words)
    texts = ["def two(value):\n    return value + 2\n", "", "zwölf"]
    model = TextModel(words.encode())
    assert TextReader(path, model.sha256, VERSION).decode(encode(texts, model, 40), 3, 40) == texts
    with pytest.raises(InvalidInput, match="get the gateway's file"):
        TextReader(path, "0" * 64, VERSION).check()
    with pytest.raises(InvalidInput, match="MILLPOND_DICTIONARY"):
        TextReader(None, model.sha256, VERSION).check()
    with pytest.raises(TextVersionUnknown, match="version 1 "):
        TextReader(path, model.sha256, 1).check()
    with pytest.raises(InvalidInput, match="ask for rates"):
        TextReader(path, None).check()


@pytest.mark.slow
def test_the_example_runs_the_fifteen_lines_behind_the_meter(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    run = write_run(lake, "run-1")
    script = Path(__file__).parents[2] / "examples" / "remote_probe.py"
    command = [sys.executable, str(script), str(lake.folder), "--tokens", "2000", "--label", "deceptive"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ActivationsStayInVault" in done.stdout
    said = dict(re.findall(r"^(activations|charged|left of the user|the meter).*? ([\d,]+) bytes", done.stdout, re.M))
    counts = {name: int(text.replace(",", "")) for name, text in said.items()}
    assert counts["activations"] == run.nbytes
    assert 500 < counts["charged"] < 2500
    assert counts["charged"] + counts["left of the user"] == 1_000_000
    assert counts["charged"] < counts["the meter"] < 200_000  # framing is the meter's business
