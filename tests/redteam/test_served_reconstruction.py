"""An attacker with a notebook, a token and nothing else: what comes back over HTTP, and what it would have been ungated."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

import millpond as mp
from millpond.hub.body import ErrorCode, Failure, Withheld, decode
from millpond.hub.policy import Disclosure
from millpond.hub.rules import Rule, Verdict, judge
from millpond.store.errors import GatewayRefused, InReview, NotReleased
from millpond.store.result import Result

from .conftest import LAYER, correlation, measure, run_model, store

RESID = f"blocks.{LAYER}.hook_resid_post"
MLP = f"blocks.{LAYER}.hook_mlp_out"
PRE = "blocks.0.hook_resid_pre"
LAST = 47


def mean(rows, hook=RESID):
    """The released mean of some rows, a vector."""
    return np.ravel((mp.lazy(rows)[hook] * 1.0).mean().compute()["mean"])


@pytest.fixture(scope="module")
def own(served):
    served.project("own", "ada", heldout=("heldout", "own"))
    with served.lake_of("ada", "own") as lake:
        yield lake["heldout"]


@pytest.fixture(scope="module")
def restricted(served):
    served.project("restricted", "ada", heldout=("heldout", "restricted"))
    with served.lake_of("ada", "restricted") as lake:
        yield lake["heldout"]


def test_differencing_two_means(vault, restricted):
    x = vault.hooks[RESID][:, LAST]
    n, row = len(x), x[0]
    assert correlation(n * x.mean(0) - (n - 1) * x[1:].mean(0), row) > 0.999  # ungated, the row itself
    whole = restricted.select(position=LAST)
    released = mean(whole)
    assert correlation(released, x.mean(0)) > 0.99
    before = restricted.lake.connection.charged
    with pytest.raises(NotReleased, match="differencing: reuse an earlier cohort"):
        mean(restricted.select(position=LAST, where="prompt != 0"))
    assert restricted.lake.connection.charged - before < 16 + 4 + 25 + 60  # a refusal, a handle, a few slots
    # what the one mean says of the target is what it says of any other row
    assert correlation(released, row) < np.quantile([correlation(released, other) for other in x[1:]], 0.99)


def test_one_hot_label_masks(vault, own, restricted):
    x = vault.hooks[RESID][:, LAST]
    mask = np.arange(len(x)) == 7
    assert correlation(x[mask].mean(0) - x[~mask].mean(0) + x[~mask].mean(0), x[7]) > 0.999
    hot = {f"p{number}": int(number == 7) for number in range(len(x))}
    for run, rule in ((own, "no_variance|identical"), (restricted, "small_class")):
        run.labels.add("hot", hot)
        rows = run.select(position=LAST)
        probe = mp.MassMeanProbe(progress=False).fit(rows[RESID], rows.labels["hot"])
        with pytest.raises(NotReleased, match=rule):
            probe.release()
        with pytest.raises(NotReleased, match=rule):
            (mp.lazy(rows)[RESID] * 1.0).groupby("hot").mean().compute()
        assert "coef_" not in vars(probe)


def test_sybil_prompts(vault, served):
    target = vault.tokens[5]
    copies = np.repeat(target[None], 120, 0)
    copies[np.arange(120), np.arange(120) % 40] = np.arange(120) + 50
    copies[:, LAST] = target[LAST]
    rng = np.random.default_rng(0)
    padded = np.concatenate([np.repeat(target[None, :8], 120, 0), rng.integers(2, 4096, (120, 40))], axis=1)
    for name, tokens in (("copies", copies), ("padded", padded)):
        made = run_model(vault.model, tokens)
        store(served.lake, name, tokens, {RESID: made[RESID]})
        at = LAST if name == "copies" else 7
        assert correlation(made[RESID][:, at].mean(0), vault.hooks[RESID][5, at]) > 0.95
    served.project("sybil", "ada", copies=("copies", "restricted"), padded=("padded", "own"))
    with served.lake_of("ada", "sybil") as lake:
        with pytest.raises(NotReleased, match="too_few_prompts"):
            mean(lake["copies"].select(position=LAST))
        with pytest.raises(NotReleased, match=r"no_variance.*identical_rows"):
            mean(lake["padded"].select(position=7))


def test_token_identity_cohorts_show_embedding_rows(vault, own):
    token = int(np.bincount(vault.tokens.ravel()).argmax())
    spots = np.argwhere(vault.tokens == token)
    embedding = vault.model.model.embed_tokens.weight[token].detach().numpy()
    assert correlation(vault.hooks[PRE][spots[:, 0], spots[:, 1]].mean(0), embedding) > 0.999
    with pytest.raises(NotReleased, match=r"no_variance.*identical_rows"):
        mean(own.select(token_id=token), PRE)
    with pytest.raises(InReview, match="token_only: wait for a reviewer"):
        mean(own.select(where="position % 2 == 0"), PRE)


def test_an_intervened_run_is_released_by_a_reviewer_only(vault, served):
    direction = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    drowned = run_model(vault.model, vault.tokens, lambda x: x + 1e4 * torch.from_numpy(direction))[MLP]
    gentle = run_model(vault.model, vault.tokens, lambda x: x + 0.3 * torch.from_numpy(direction))[MLP]
    layer = vault.model.model.layers[LAYER]
    with torch.no_grad():
        answer = layer.mlp(layer.post_attention_layernorm(torch.from_numpy(direction)[None]))[0].numpy()
    assert correlation(drowned[:, LAST].mean(0), answer) > 0.999  # ungated: the MLP's response to any input
    edit = [{"op": "add", "hook": f"blocks.{LAYER}.hook_resid_mid"}]
    for name, rows in (("drowned", drowned), ("gentle", gentle)):
        store(served.lake, name, vault.tokens, {MLP: rows}, intervene=edit)
    served.project("steering", "ada", drowned=("drowned", "own"), gentle=("gentle", "own"))
    with served.lake_of("ada", "steering") as lake:
        with pytest.raises((NotReleased, InReview), match=r"intervened|no_variance"):
            mean(lake["drowned"].select(position=LAST), MLP)
        with pytest.raises(InReview, match="intervened: wait for a reviewer"):
            mean(lake["gentle"].select(position=LAST), MLP)
        with pytest.raises(InReview, match="intervened"):
            lake["gentle"].statistics(MLP)


def test_a_probe_cannot_be_aimed_at_activations(served, own):
    """A target is a label by name; a hook is none, and values sent as a label are the attacker's own."""
    with served.http(served.local.add_token("ada", "read", "run")) as http:
        for label in (MLP, RESID, "activations", "token_id"):
            rows = {"run": own.view.handle}
            job = {"kind": "probe", "estimator": {"name": "RidgeProbe"}, "hook": RESID, "label": label, "train": rows}
            answer = http.post("/api/v1/p/own/jobs", json={"job": job})
            body = decode(answer.content)
            assert isinstance(body, Failure)
            assert body.code in (ErrorCode.BAD_REQUEST, ErrorCode.NOT_FOUND)
            assert len(answer.content) == 2


def test_graph_then_score_pays_for_every_bit_and_shows_no_restricted_row(vault, own, restricted):
    """A graph that leaves out a coordinate, scored on two rows: its mean squared error is that coordinate's mean square."""
    rows = vault.hooks[RESID][0, [5, 6]]

    class Pick(torch.nn.Module):
        def __init__(self, place):
            super().__init__()
            mask = torch.ones(256)
            mask[place] = 0
            self.mask = torch.nn.Parameter(mask, requires_grad=False)

        def forward(self, x):
            return {"reconstruction": x * self.mask}

    class Show(torch.nn.Module):
        def forward(self, x):
            return {"statistic": x.mean(0)}

    pair = own.select(where="prompt == 0", position=[5, 6])
    before, found = own.lake.connection.charged, []
    for place in range(4):
        (result,) = own.lake.graph(Pick(place), pair[RESID])
        found.append((float(result["mse"]) * 256) ** 0.5)
    cost = (own.lake.connection.charged - before) / 4
    # on one's own prompts scalars may leave: three digits for the price of a whole answer
    assert np.allclose(found, np.sqrt(np.square(rows[:, :4]).mean(axis=0)), rtol=0.01)
    assert cost > 60
    assert 1_000_000 / cost * 10 / 8 < 25_000  # a week of nothing else: bytes of secret in it
    with pytest.raises(NotReleased, match="too_few_prompts"):
        restricted.lake.graph(Pick(0), restricted.select(where="prompt == 0", position=[5, 6])[RESID])
    with pytest.raises(InReview, match="custom_output"):
        own.lake.graph(Show(), own[RESID])
    with pytest.raises((NotReleased, InReview)):
        restricted.lake.graph(Show(), restricted.select(where="prompt == 0")[RESID])


def test_as_many_label_sets_as_rows(vault, restricted):
    """Huth et al. (2023): every class mean is a known combination of rows; the number of label sets is capped."""
    places = [20, 21, 22, 23]  # enough rows for the parameters of a direction
    x = vault.hooks[RESID][:, places].astype(np.float64).mean(axis=1)
    n, rng = len(x), np.random.default_rng(0)
    signs = np.where(rng.random((n, n)) < 0.5, 1.0, -1.0)
    assert correlation(np.linalg.solve(signs / n, signs @ x / n), x) > 0.999
    kept, refusals = [], []
    for number in range(34):
        restricted.labels.add("signs", {f"p{prompt}": int(signs[number, prompt] > 0) for prompt in range(n)})
        rows = restricted.select(position=places)
        probe = mp.MassMeanProbe(progress=False).fit(rows[RESID], rows.labels["signs"])
        try:
            kept.append((signs[number], np.ravel(probe.release()["direction"])))
        except NotReleased as error:
            refusals.append(str(error))
    assert 0 < len(kept) <= 32
    assert len(refusals) >= 2
    assert all("label_sets" in text or "differencing" in text for text in refusals)
    sums = np.array([direction for _, direction in kept])
    guess = np.linalg.lstsq(np.array([sign for sign, _ in kept]), sums, rcond=None)[0]
    assert abs(correlation(guess - guess.mean(0), x - x.mean(0))) < 0.45


def test_a_refusal_does_not_tell_whether_somebodys_prompt_is_there(vault, served, restricted):
    """A condition that no prompt meets must not look different from one that a single prompt meets, or nineteen."""
    limits = Disclosure()
    rules = [
        judge(
            Result("summary", {"mean": 1.0}), measure(vault, RESID, [(p, LAST) for p in range(count)]), (), limits
        ).rules
        for count in (1, 5, 19)
    ]
    assert len(set(rules)) == 3  # told in full, the rules are a count; and of no rows there is no verdict at all
    found = []
    with served.http(served.local.add_token("ada", "read", "run")) as http:
        for kind in ("statistics", "probe"):
            for where in ("prompt > 5000", "prompt == 3", "prompt < 5", "prompt < 19"):
                job = {"kind": kind, "hook": RESID}
                rows = {"run": restricted.view.handle, "where": where}
                if kind == "statistics":
                    job |= {"rows": rows}
                else:
                    job |= {"estimator": {"name": "MassMeanProbe"}, "label": "twos", "train": rows}
                    restricted.labels.add("twos", {f"p{number}": number % 2 for number in range(240)})
                (handle,) = decode(http.post("/api/v1/p/restricted/jobs", json={"job": job}).content).values
                while not (status := decode(http.get(f"/api/v1/p/restricted/jobs/{handle.hex()}").content)).final:
                    time.sleep(0.02)
                answer = http.get(f"/api/v1/p/restricted/jobs/{handle.hex()}/answers/0")
                made = http.get(f"/api/v1/p/restricted/jobs/{handle.hex()}/made")
                found.append((status, answer.status_code, answer.content, made.content))
    assert len(set(found)) == 1
    assert decode(found[0][2]) == Withheld(Verdict("refuse", (Rule.TOO_FEW_PROMPTS,)))


def test_what_a_probe_of_others_rows_says_of_ones_own_is_judged_by_the_rows_it_was_fitted_to(vault, served, restricted):
    """Laundering: fitted to a restricted row, evaluated on single own rows, whose losses are equations for that row."""
    x = vault.hooks[RESID][:, LAST].astype(np.float64)
    hot = np.arange(len(x)) == 7
    w = x[hot].mean(0) - x[~hot].mean(0)
    mine = vault.hooks[RESID][:, :40:2].reshape(-1, 256).astype(np.float64)
    z = mine @ w / np.abs(mine @ w).max() * 5
    losses = np.logaddexp(0, -z), np.logaddexp(0, z)  # log loss of a single row whose label is 1, and 0
    shown = [np.array([float(f"{value:.3g}") for value in loss]) for loss in losses]
    guess = np.linalg.lstsq(mine, shown[1] - shown[0], rcond=None)[0]
    assert correlation(guess, w) > 0.9  # ungated: a direction that the gate refuses to release

    served.project("laundry", "ada", others=("heldout", "restricted"))
    store(served.lake, "bench", vault.tokens, {RESID: vault.hooks[RESID]})
    edit = [{"op": "add", "hook": f"blocks.{LAYER}.hook_resid_mid"}]
    store(served.lake, "edited", vault.tokens, {RESID: vault.hooks[RESID]}, intervene=edit)
    for name in ("bench", "edited"):
        served.local.projects.hold("laundry", "run", name, name, model="m", detail={"prompts": "own"})
    with served.lake_of("ada", "laundry") as lake:
        bench, edited, others = lake["bench"], lake["edited"], lake["others"]
        for run in (bench, edited, others):
            run.labels.add("hot", {f"p{number}": int(number == 7) for number in range(240)})
            run.labels.add("twos", {f"p{number}": number % 2 for number in range(240)})
        last = others.select(position=LAST)
        probe = mp.MassMeanProbe(progress=False).fit(last[RESID], last.labels["hot"])
        single = bench.select(where="prompt < 2", position=5)
        with pytest.raises(NotReleased, match="small_class"):
            probe.evaluate(single[RESID], single.labels["twos"])
        sae = mp.BatchTopKSae(d_sae=32, k=2, batch_size=64, progress=False).fit(
            others.select(where="prompt < 20", position=LAST)[RESID], tokens=640
        )
        with pytest.raises(NotReleased, match="too_few_rows"):
            sae.latents(bench[RESID], [0])
        with pytest.raises(NotReleased, match="too_few_rows"):
            sae.evaluate(bench[RESID])
        # the same with an intervened run of one's own: what is fitted to it waits as it does itself
        probe = mp.MassMeanProbe(progress=False).fit(edited[RESID], edited.labels["twos"])
        with pytest.raises(InReview, match="intervened"):
            probe.evaluate(bench[RESID], bench.labels["twos"])
        # and what is fitted to enough of others' prompts may be evaluated on one's own
        probe = mp.MassMeanProbe(progress=False).fit(others[RESID], others.labels["twos"])
        assert 0 <= probe.evaluate(bench[RESID], bench.labels["twos"])["auroc"] <= 1


def test_a_withheld_answer_says_the_rules_and_nothing_else(served, restricted):
    with served.http(served.local.add_token("ada", "read", "run")) as http:
        bodies = []
        for prompt in (3, 4):
            rows = {"run": restricted.view.handle, "where": f"prompt == {prompt}"}
            job = {"kind": "statistics", "rows": rows, "hook": RESID}
            (handle,) = decode(http.post("/api/v1/p/restricted/jobs", json={"job": job}).content).values
            while not decode(http.get(f"/api/v1/p/restricted/jobs/{handle.hex()}").content).final:
                pass
            bodies.append(http.get(f"/api/v1/p/restricted/jobs/{handle.hex()}/answers/0").content)
    assert bodies[0] == bodies[1]
    assert isinstance(decode(bodies[0]), Withheld)
    with pytest.raises(GatewayRefused, match="not found"):
        restricted.lake.connection.open("GET", f"jobs/{'0' * 16}/answers/0")
