"""What an attacker recovers of a row or a weight matrix from released numbers: before the gate, and after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from millpond.hub.body import ReleasedResult, Withheld, decode, encode
from millpond.hub.cohort import distinct_prompts
from millpond.hub.rules import Rule
from millpond.hub.shapes import Context
from millpond.store.result import Result

from .conftest import ADA, LAYER, ask, correlation, measure, run_model

RESID = f"blocks.{LAYER}.hook_resid_post"
LAST = 47
REFUSAL = 16 + 1 + 3
"""Bytes of a refusal: the fixed amount, the type, and a bit a rule."""


def last_rows(vault, prompts):
    return [(prompt, LAST) for prompt in prompts]


def released(door, number, values, evidence, kind="mean"):
    """The verdict, and what the attacker decodes."""
    verdict, sent = door.release(ask(number), Result(kind, values), evidence, ADA)
    body = decode(sent.body)
    return verdict, body.result if isinstance(body, ReleasedResult) else body, sent.charged


def test_differencing_two_means(vault, door):
    x = vault.hooks[RESID][:, LAST]
    n, row = len(x), x[0]
    mean, without = x.mean(0), x[1:].mean(0)
    assert correlation(n * mean - (n - 1) * without, row) > 0.999  # ungated, the row itself

    verdict, first, _ = released(door, 1, {"mean": mean}, measure(vault, RESID, last_rows(vault, range(n))))
    assert verdict.outcome == "pass"
    verdict, second, cost = released(door, 2, {"mean": without}, measure(vault, RESID, last_rows(vault, range(1, n))))
    assert verdict.rules == (Rule.DIFFERENCING,)
    assert isinstance(second, Withheld)
    assert cost == REFUSAL
    # what the one mean says of that row is what it says of any other
    others = [correlation(first["mean"], other) for other in x[1:]]
    assert correlation(first["mean"], row) < np.quantile(others, 0.99)

    # had the rule failed: steps of a standard error leave about n ** -0.25 of the row's own part, 0.25 here
    context = Context(door.ledger.policy.disclosure, restricted=True)
    found = []
    for left_out in range(40):
        pair = [(x, x.mean(0)), (np.delete(x, left_out, 0), np.delete(x, left_out, 0).mean(0))]
        results = [Result("mean", {"mean": m, "mean_se": part.std(0) / len(part) ** 0.5}) for part, m in pair]
        coarse = [decode(encode(ReleasedResult(result), context)).result["mean"] for result in results]
        found.append(correlation(n * coarse[0] - (n - 1) * coarse[1], x[left_out] - mean))
    assert np.median(np.abs(found)) < 0.35


def test_an_approval_does_not_undo_what_was_released_meanwhile(vault, door):
    """A sum waits for a reviewer, the same sum without one prompt passes; approved after that, the two were a row."""
    x = vault.hooks[RESID][:, LAST]
    n = len(x)
    waiting = Result("summary", {"norm": float(np.linalg.norm(x, axis=1).mean())})
    evidence = measure(vault, RESID, last_rows(vault, range(n)))
    verdict, _ = door.release(ask(1), waiting, evidence, ADA)
    assert (verdict.outcome, verdict.rules) == ("review", (Rule.NO_STANDARD_ERROR,))
    others = measure(vault, RESID, last_rows(vault, range(1, n)))
    assert released(door, 2, {"mean": x[1:].mean(0)}, others)[0].outcome == "pass"
    verdict, sent = door.release(ask(1), waiting, evidence, ADA, approved=True)
    assert (verdict.outcome, verdict.rules) == ("refuse", (Rule.DIFFERENCING,))
    assert isinstance(decode(sent.body), Withheld)


def test_one_hot_label_mask(vault, door):
    x = vault.hooks[RESID][:, LAST]
    mask = np.arange(len(x)) == 7
    direction = x[mask].mean(0) - x[~mask].mean(0)
    assert correlation(direction + x[~mask].mean(0), x[7]) > 0.999

    evidence = measure(
        vault, RESID, last_rows(vault, range(len(x))), groups=(mask, ~mask), target="label", label_set="hot"
    )
    verdict, body, cost = released(door, 1, {"direction": direction}, evidence, "direction")
    assert Rule.SMALL_CLASS in verdict.rules
    assert isinstance(body, Withheld)
    assert cost == REFUSAL
    # on one's own prompts a row does not leave either: one row has no spread
    own = replace(evidence, prompts_are="own")
    assert Rule.NO_VARIANCE in released(door, 2, {"direction": direction}, own, "direction")[0].rules


def test_huth_reconstruction_from_many_label_sets(vault, door):
    """As many label vectors as rows: every class mean is a known combination of the rows, so they are solved for."""
    x = vault.hooks[RESID][:, LAST].astype(np.float64)
    n = len(x)
    rng = np.random.default_rng(0)
    signs = np.where(rng.random((n, n)) < 0.5, 1.0, -1.0)
    sums = signs @ x / n
    assert correlation(np.linalg.solve(signs / n, sums), x) > 0.999

    whole = last_rows(vault, range(n))
    solved_signs, solved_sums = [], []
    for number in range(50):
        groups = (signs[number] > 0, signs[number] < 0)
        evidence = measure(vault, RESID, whole, groups=groups, target="label", label_set=str(number))
        verdict, body, _ = released(door, number, {"direction": sums[number]}, evidence, "direction")
        if verdict.outcome == "pass":
            solved_signs.append(signs[number] / n)
            solved_sums.append(body["direction"])
        else:
            assert set(verdict.rules) <= {Rule.LABEL_SETS, Rule.DIFFERENCING}
    assert 0 < len(solved_signs) <= 32
    centred = x - x.mean(0)
    guess = np.linalg.lstsq(np.array(solved_signs), np.array(solved_sums), rcond=None)[0]
    assert correlation(guess - guess.mean(0), centred) < 0.45  # sqrt(32 / 240) is 0.37


def test_ridge_probe_aimed_at_the_next_layers_weights(vault, door):
    hook = f"blocks.{LAYER}.mlp.hook_post"
    inputs = vault.hooks[hook].reshape(-1, 1024).astype(np.float64)
    targets = vault.hooks[f"blocks.{LAYER}.hook_mlp_out"].reshape(-1, 256).astype(np.float64)
    gram = inputs.T @ inputs
    weights = np.linalg.solve(gram + 1e-9 * np.trace(gram) / 1024 * np.eye(1024), inputs.T @ targets)
    true = vault.model.model.layers[LAYER].mlp.down_proj.weight.detach().numpy().T
    assert 1 - ((weights - true) ** 2).sum() / (true**2).sum() > 0.99  # ungated, the weight matrix

    spots = [(prompt, position) for prompt in range(240) for position in range(48)]
    evidence = measure(vault, hook, spots, target="activation", prompts_are="own", parameters=1024 * 256)
    verdict, body, cost = released(door, 1, {"direction": weights[:100]}, evidence, "direction")
    assert verdict.rules == (Rule.ACTIVATION_TARGET,)
    assert (type(body), cost) == (Withheld, REFUSAL)


def test_sybil_prompts(vault, door):
    """One prompt many times, to pass for many."""
    target = vault.tokens[5]
    copies = np.repeat(target[None], 120, 0)
    copies[np.arange(120), np.arange(120) % 40] = np.arange(120) + 50  # one token changed in each
    copies[:, LAST] = target[LAST]
    x = run_model(vault.model, copies)[RESID][:, LAST]
    assert correlation(x.mean(0), vault.hooks[RESID][5, LAST]) > 0.95

    changed = replace(vault, tokens=copies, hooks={RESID: x[:, None].repeat(48, 1)}, clusters=distinct_prompts(copies))
    changed.variance = vault.variance
    verdict, body, cost = released(
        door, 1, {"mean": x.mean(0)}, measure(changed, RESID, last_rows(changed, range(120)))
    )
    assert Rule.TOO_FEW_PROMPTS in verdict.rules
    assert Rule.DOMINANCE in verdict.rules
    assert (type(body), cost) == (Withheld, REFUSAL)

    # the other way round: fresh text after the position that is captured makes prompts distinct, and rows equal
    rng = np.random.default_rng(0)
    padded = np.concatenate([np.repeat(target[None, :8], 120, 0), rng.integers(2, 4096, (120, 40))], axis=1)
    x = run_model(vault.model, padded)[RESID]
    changed = replace(vault, tokens=padded, hooks={RESID: x}, clusters=distinct_prompts(padded))
    changed.variance = vault.variance
    evidence = measure(changed, RESID, [(prompt, 7) for prompt in range(120)])
    assert evidence.prompts == 120
    verdict, body, _ = released(door, 2, {"mean": x[:, 7].mean(0)}, evidence)
    assert {Rule.NO_VARIANCE, Rule.IDENTICAL_ROWS} <= set(verdict.rules)
    assert isinstance(body, Withheld)


@pytest.mark.parametrize("prompts_are", ["own", "restricted"])
def test_token_identity_cohorts_show_embedding_rows(vault, door, prompts_are):
    hook = "blocks.0.hook_resid_pre"
    token = int(np.bincount(vault.tokens.ravel()).argmax())
    embedding = vault.model.model.embed_tokens.weight[token].detach().numpy()
    spots = np.argwhere(vault.tokens == token)
    mean = vault.hooks[hook][spots[:, 0], spots[:, 1]].mean(0)
    assert correlation(mean, embedding) > 0.999

    verdict, body, cost = released(door, 1, {"mean": mean}, measure(vault, hook, spots, prompts_are=prompts_are))
    assert {Rule.NO_VARIANCE, Rule.IDENTICAL_ROWS} <= set(verdict.rules)
    assert (type(body), cost) == (Withheld, REFUSAL)
    # mixed with others until neither rule applies, a person looks at it first
    rng = np.random.default_rng(0)
    rest = np.argwhere(vault.tokens != token)
    mixed = np.concatenate([spots, rest[rng.choice(len(rest), 2 * len(spots), replace=False)]])
    evidence = measure(vault, hook, mixed, prompts_are="own")
    verdict, body, _ = released(door, 2, {"mean": vault.hooks[hook][mixed[:, 0], mixed[:, 1]].mean(0)}, evidence)
    assert (verdict.outcome, verdict.rules) == ("review", (Rule.TOKEN_ONLY,))


def test_steering_turns_the_mlp_into_an_oracle(vault, door):
    """Add a vector that drowns the residual stream, capture the MLP's output: its response to any input."""
    hook = f"blocks.{LAYER}.hook_mlp_out"
    probe = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    made = run_model(vault.model, vault.tokens, lambda x: x + 1e4 * torch.from_numpy(probe))[hook]
    layer = vault.model.model.layers[LAYER]
    with torch.no_grad():
        wanted = layer.mlp(layer.post_attention_layernorm(torch.from_numpy(probe)[None]))[0].numpy()
    mean = made[:, LAST].mean(0)
    assert correlation(mean, wanted) > 0.999

    changed = replace(vault, hooks={hook: made})
    changed.variance = vault.variance
    spots = last_rows(vault, range(240))
    evidence = measure(changed, hook, spots, prompts_are="own", intervened=True)
    verdict, body, cost = released(door, 1, {"mean": mean}, evidence)
    assert {Rule.NO_VARIANCE} <= set(verdict.rules)  # all prompts drowned alike
    assert (type(body), cost) == (Withheld, REFUSAL)
    # a gentler vector leaves the prompts their spread; then a person decides, and what leaves is counted
    made = run_model(vault.model, vault.tokens, lambda x: x + 0.3 * torch.from_numpy(probe))[hook]
    gentle = replace(vault, hooks={hook: made})
    gentle.variance = vault.variance
    evidence = measure(gentle, hook, spots, prompts_are="own", intervened=True)
    verdict, body, _ = released(door, 2, {"mean": made[:, LAST].mean(0)}, evidence)
    assert (verdict.outcome, verdict.rules) == ("review", (Rule.INTERVENED,))
    _, sent = door.release(ask(2), Result("mean", {"mean": made[:, LAST].mean(0)}), evidence, ADA, approved=True)
    assert sent.charged == 16 + len(sent.body)
    assert len(sent.body) < 256 * 6 / 8 + 16


def test_a_patched_row_stays_a_row(vault, door):
    """Patch one stored row into every prompt, then capture: the mean is a function of that row alone."""
    hook = f"blocks.{LAYER}.hook_mlp_out"
    row = torch.from_numpy(vault.hooks[RESID][3, 20])
    made = run_model(vault.model, vault.tokens, lambda x: row.expand_as(x))[hook]
    layer = vault.model.model.layers[LAYER]
    with torch.no_grad():
        wanted = layer.mlp(layer.post_attention_layernorm(row[None]))[0].numpy()
    assert correlation(made[:, LAST].mean(0), wanted) > 0.999
    changed = replace(vault, hooks={hook: made})
    changed.variance = vault.variance
    evidence = measure(changed, hook, last_rows(vault, range(240)), prompts_are="own", intervened=True)
    verdict, body, cost = released(door, 1, {"mean": made[:, LAST].mean(0)}, evidence)
    assert {Rule.NO_VARIANCE, Rule.IDENTICAL_ROWS} <= set(verdict.rules)
    assert (type(body), cost) == (Withheld, REFUSAL)


def test_a_graph_that_returns_a_row_goes_to_review(vault, door):
    """A user's graph may compute anything; what it computed is not a trusted metric."""
    from millpond.hub.graph_jobs import load_graph, measure_graph
    from millpond.hub.trace import trace

    class FirstRow(torch.nn.Module):
        def forward(self, x):
            return {"statistic": x[0] * 1.0}

    module = load_graph(*trace(FirstRow(), 256), 256)
    x = np.ascontiguousarray(vault.hooks[RESID][:, LAST])
    (found,) = measure_graph(module, lambda: [(x, None, np.arange(len(x)))])
    assert correlation(found["means"], x[0]) > 0.999
    evidence = measure(vault, RESID, last_rows(vault, range(240)), prompts_are="own", custom=True)
    verdict, sent = door.release(ask(1), found, evidence, ADA)
    assert (verdict.outcome, verdict.rules) == ("review", (Rule.CUSTOM_OUTPUT,))
    assert sent.charged == REFUSAL
