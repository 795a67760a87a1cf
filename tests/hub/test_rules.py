"""The rules as a table: evidence, and the exact verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from millpond.hub.cohort import cohort, distinct_prompts, identical_share, shares, variance_ratio
from millpond.hub.policy import Disclosure, ModelPolicy, Policy, read_policy
from millpond.hub.rules import REMEDIES, Earlier, Evidence, Rule, Verdict, judge
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

LIMITS = Disclosure()
NUMBER = Result("probe-evaluation", {"auroc": 0.9}, {"auroc": (0.85, 0.95)})
VECTOR = Result("mean", {"mean": np.ones(8)})


def some(prompts, rows=7):
    return dict.fromkeys(prompts, rows)


GOOD = Evidence(
    prompts_are="restricted", rows=1000, prompts=100, target="label", class_rows=(500, 500), class_prompts=(100, 100),
    parameters=17, top_prompt_share=0.02, top_two_share=0.04, variance_ratio=0.9, identical_share=0.001,
    cohorts=(some(range(100)),), label_set="a",
)  # fmt: skip

CASES = [
    (NUMBER, {}, "pass", ()),
    (VECTOR, {}, "pass", ()),
    (Result("weights", {}), {}, "refuse", (Rule.UNKNOWN_KIND,)),
    (NUMBER, {"target": "activation"}, "refuse", (Rule.ACTIVATION_TARGET,)),
    (NUMBER, {"variance_ratio": 0.049}, "refuse", (Rule.NO_VARIANCE,)),
    (NUMBER, {"variance_ratio": float("nan")}, "refuse", (Rule.NO_VARIANCE,)),
    (NUMBER, {"variance_ratio": None}, "pass", ()),
    (VECTOR, {"variance_ratio": None}, "refuse", (Rule.NO_EVIDENCE,)),
    (VECTOR, {"identical_share": 0.51}, "refuse", (Rule.IDENTICAL_ROWS,)),
    (NUMBER, {"identical_share": 0.51}, "pass", ()),
    (NUMBER, {"intervened": True}, "review", (Rule.INTERVENED,)),
    (NUMBER, {"custom": True}, "review", (Rule.CUSTOM_OUTPUT,)),
    (VECTOR, {"token_only": True}, "review", (Rule.TOKEN_ONLY,)),
    (NUMBER, {"token_only": True}, "pass", ()),
    (NUMBER, {"prompts": 19}, "refuse", (Rule.TOO_FEW_PROMPTS,)),
    (NUMBER, {"rows": 99}, "refuse", (Rule.TOO_FEW_ROWS,)),
    (NUMBER, {"class_rows": (991, 9)}, "refuse", (Rule.SMALL_CLASS,)),
    (NUMBER, {"class_prompts": (100, 9)}, "refuse", (Rule.SMALL_CLASS,)),
    (NUMBER, {"parameters": 331}, "refuse", (Rule.TOO_MANY_PARAMETERS,)),
    (NUMBER, {"parameters": 991}, "refuse", (Rule.RESIDUAL_DOF, Rule.TOO_MANY_PARAMETERS)),
    (NUMBER, {"top_prompt_share": 0.11}, "refuse", (Rule.DOMINANCE,)),
    (NUMBER, {"top_two_share": 0.91}, "refuse", (Rule.DOMINANCE,)),
    (NUMBER, {"cohorts": ()}, "refuse", (Rule.NO_EVIDENCE,)),
    (Result("summary", {"mean": 1.0}), {}, "review", (Rule.NO_STANDARD_ERROR,)),
    (Result("summary", {"mean": 1.0}, {"mean": (1.0, 1.0)}), {}, "review", (Rule.NO_STANDARD_ERROR,)),
    (NUMBER, {"intervened": True, "prompts": 3}, "refuse", (Rule.TOO_FEW_PROMPTS,)),
]


@pytest.mark.parametrize(("result", "change", "outcome", "rules"), CASES)
def test_verdicts_on_restricted_prompts(result, change, outcome, rules):
    verdict = judge(result, replace(GOOD, **change), (), LIMITS)
    assert (verdict.outcome, verdict.rules) == (outcome, rules)
    assert all(REMEDIES[rule] in verdict.remedies() for rule in rules)


def test_on_their_own_prompts_people_get_scalars_of_one_prompt_and_never_a_row():
    own = replace(GOOD, prompts_are="own", prompts=1, rows=1, cohorts=(), class_rows=(1,), top_prompt_share=1.0)
    assert judge(Result("summary", {"mean": 1.0}), own, (), LIMITS).outcome == "pass"
    verdict = judge(VECTOR, replace(own, variance_ratio=0.0), (), LIMITS)
    assert verdict.rules == (Rule.TOO_FEW_ROWS, Rule.NO_VARIANCE)
    for change in ({"target": "activation"}, {"intervened": True}, {"custom": True}):
        assert judge(NUMBER, replace(own, **change), (), LIMITS).outcome != "pass"


@pytest.mark.parametrize(
    ("earlier", "now", "refused"),
    [
        ([some(range(100))], some(range(100)), False),  # the same again
        ([some(range(100))], some(range(99)), True),  # less one
        ([some(range(100))], some(range(81)), True),  # less 19
        ([some(range(100))], some(range(80)), False),  # less 20
        ([some(range(100))], {**some(range(99)), 99: 8}, True),  # one prompt with other rows
        ([some(range(100))], some(range(200, 300)), False),  # nothing in common
        # 0..60 + 60..100 - 0..100 leaves nothing; 60..99 instead leaves prompt 99
        ([some(range(100)), some(range(60))], some(range(60, 100)), False),
        ([some(range(100)), some(range(60))], some(range(60, 99)), True),
        # three cohorts, pairwise 40 apart or more, whose sum singles out prompt 200
        (
            [some([*range(40), *range(40, 80)]), some([*range(40, 80), *range(80, 120)])],
            some([*range(80, 120), *range(40), 200]),
            False,
        ),
        (
            [some([*range(80)]), some([*range(40, 120)]), some([*range(80, 120), *range(40)])],
            some([*range(120), 200]),
            True,
        ),
    ],
)
def test_differences_of_releases(earlier, now, refused):
    verdict = judge(NUMBER, replace(GOOD, cohorts=(now,)), [Earlier((cohort,)) for cohort in earlier], LIMITS)
    assert verdict.rules == ((Rule.DIFFERENCING,) if refused else ())


def test_brute_force_agrees_on_what_a_few_sums_give_away():
    """Every combination with coefficients -2 to 2 of up to four random cohorts."""
    import itertools

    rng = np.random.default_rng(0)
    limits = Disclosure(min_prompts=10)
    seen = {True: 0, False: 0}
    for _ in range(60):
        blocks = [range(12 * i, 12 * i + 12) for i in range(5)] + [[100]]
        cohorts = []
        for _ in range(4):
            chosen = rng.random(len(blocks)) < 0.5
            chosen[:3] |= ~chosen[:3].any()
            cohorts.append(some([p for block, take in zip(blocks, chosen, strict=True) if take for p in block]))
        vectors = np.array([[float(p in c) for p in [*range(60), 100]] for c in cohorts])
        exposed = False
        for weights in itertools.product((-2, -1, 0, 1, 2), repeat=4):
            held = (np.array(weights) @ vectors != 0).sum()
            exposed |= 0 < held < 10
        *before, now = cohorts
        verdict = judge(NUMBER, replace(GOOD, cohorts=(now,)), [Earlier((c,)) for c in before], limits)
        assert (Rule.DIFFERENCING in verdict.rules) >= exposed
        seen[exposed] += 1
    assert min(seen.values()) > 5


def test_label_sets_on_overlapping_cohorts_are_counted():
    earlier = [Earlier((some(range(100)),), f"set {i}") for i in range(LIMITS.max_label_sets)]
    assert judge(NUMBER, replace(GOOD, label_set="set 3"), earlier, LIMITS).outcome == "pass"
    assert judge(NUMBER, replace(GOOD, label_set="new"), earlier, LIMITS).rules == (Rule.LABEL_SETS,)
    apart = replace(GOOD, label_set="new", cohorts=(some(range(500, 600)),))
    assert judge(NUMBER, apart, earlier, LIMITS).outcome == "pass"


def test_near_duplicates_count_once_and_different_prompts_apart():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 5000, 80)
    copies = [base.copy() for _ in range(50)]
    for number, copy in enumerate(copies):
        copy[number] = 7  # one token each
    others = [rng.integers(0, 5000, 80) for _ in range(50)]
    clusters = distinct_prompts([*copies, *others])
    assert len(set(clusters[:50])) == 1
    assert len(set(clusters[50:])) == 50
    assert len(set(distinct_prompts([[], [], [1], [1, 2]]))) == 3


def test_cohorts_name_the_rows_of_each_prompt():
    clusters = np.array([5, 5, 9, 5])
    one, two = cohort(clusters, np.array([0, 1, 2, 3])), cohort(clusters[[3, 0, 2, 1]], np.array([3, 0, 2, 1]))
    assert one == two
    assert set(one) == {5, 9}
    assert cohort(clusters[:3], np.array([0, 1, 2]))[5] != one[5]
    assert shares(clusters) == (0.75, 1.0)


def test_spread_and_repetition_of_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 8))
    assert variance_ratio(x, float(x.var(axis=0).sum())) == pytest.approx(1)
    assert variance_ratio(x[:1].repeat(50, 0), 8.0) < 1e-20
    assert identical_share(x) == pytest.approx(0.001)
    assert identical_share(np.concatenate([x[:1].repeat(60, 0), x[:40]])) == pytest.approx(0.61)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("disclosure", "vector_bits", 7), ("disclosure", "digits", 4), ("disclosure", "min_rows", 19),
        ("disclosure", "min_prompts", 9), ("disclosure", "min_variance_ratio", 0.001), ("disclosure", "max_label_sets", 65),
        ("disclosure", "max_top_prompt_share", 0.5), ("charges", "response_bytes", 15), ("charges", "slot_ms", 99),
        ("budgets", "user_week", 0.01), ("budgets", "project", 0.05), ("budgets", "lifetime", 0.5),
        ("disclosure", "no_such_rule", 1),
    ],
)  # fmt: skip
def test_a_policy_file_cannot_go_below_the_floor(tmp_path, section, field, value):
    path = tmp_path / "policy.toml"
    path.write_text(f"[{section}]\n{field} = {value}\n")
    with pytest.raises(InvalidInput, match=field):
        read_policy(path)


def test_a_policy_file_may_be_stricter(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[disclosure]\nvector_bits = 4\n[models.m]\nparameters = 1000\nproject_bytes = 3\n")
    policy = read_policy(path)
    assert policy.disclosure.vector_bits == 4
    assert [policy.cap("m", scope) for scope in ("user_week", "project", "lifetime")] == [0, 3, 50]
    with pytest.raises(InvalidInput, match="has m"):
        policy.cap("n", "project")


@pytest.mark.parametrize("fields", [{"secret_bytes": 501}, {"project_bytes": 11}, {"lifetime_bytes": 126}])
def test_a_model_is_never_worth_more_than_half_a_byte_a_parameter(fields):
    with pytest.raises(ValueError, match="at most"):
        ModelPolicy(parameters=1000, **fields)
    assert Policy(models={"m": ModelPolicy(parameters=1000, secret_bytes=84)}).cap("m", "lifetime") == 8


ENTROPIES = ("ce_clean", "ce_sae", "ce_zero", "ce_recovered")


@pytest.mark.parametrize(
    ("changed", "outcome", "rules"),
    [
        ({}, "pass", ()),
        ({"prompts": 19}, "refuse", (Rule.TOO_FEW_PROMPTS,)),
        ({"rows": 99}, "refuse", (Rule.TOO_FEW_ROWS,)),
        ({"top_prompt_share": 0.11}, "refuse", (Rule.DOMINANCE,)),
        ({"custom": True}, "review", (Rule.CUSTOM_OUTPUT,)),
        ({"intervened": True}, "review", (Rule.INTERVENED,)),
    ],
)
def test_losses_of_own_prompts_are_of_many(changed, outcome, rules):
    own = Evidence("own", rows=100, prompts=20, top_prompt_share=0.1, top_two_share=0.2)
    losses = Result("sae-cross-entropy", dict.fromkeys(ENTROPIES, 2.0), dict.fromkeys(ENTROPIES, (1.9, 2.1)))
    assert judge(losses, replace(own, **changed), (), LIMITS) == Verdict(outcome, rules)
    same = replace(losses, intervals=dict(losses.intervals) | {"ce_zero": (2.0, 2.0)})  # ln(vocabulary), of every token
    assert judge(same, own, (), LIMITS).outcome == "pass"
    exact = replace(losses, intervals={name: losses.intervals[name] for name in ENTROPIES[1:]})
    assert judge(exact, own, (), LIMITS).rules == (Rule.NO_STANDARD_ERROR,)
