"""The release gate: pure functions from evidence to a verdict. Nothing here reads data, a clock or a database.

The rules are heuristics about whose data and which weights a result shows. What bounds the loss is the charge for every
byte (`release.py`); the rules make those bytes poor value for an attacker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from millpond.hub.policy import Disclosure
from millpond.hub.shapes import KINDS, TEXTS, fields_of, has_standard_errors
from millpond.store.result import Result

Outcome = Literal["pass", "review", "refuse"]

Cohort = Mapping[int, int]
"""Distinct prompt (a near-duplicate cluster) to a hash of the rows that it contributes."""


class Rule(Enum):
    """Why a result was held back: the closed list that a client may be told, by its number."""

    UNKNOWN_KIND = 1
    ACTIVATION_TARGET = 2
    TOO_FEW_ROWS = 3
    NO_VARIANCE = 4
    IDENTICAL_ROWS = 5
    NO_EVIDENCE = 6
    INTERVENED = 7
    CUSTOM_OUTPUT = 8
    TOKEN_ONLY = 9
    TOO_FEW_PROMPTS = 10
    SMALL_CLASS = 11
    RESIDUAL_DOF = 12
    TOO_MANY_PARAMETERS = 13
    DOMINANCE = 14
    DIFFERENCING = 15
    LABEL_SETS = 16
    NO_STANDARD_ERROR = 17
    TEXT = 18


REMEDIES: Mapping[Rule, str] = {
    Rule.UNKNOWN_KIND: "return one of the documented result kinds",
    Rule.ACTIVATION_TARGET: "probe a label; what predicts activations stays in the vault as an artifact",
    Rule.TOO_FEW_ROWS: "use more rows",
    Rule.NO_VARIANCE: "use rows that differ: this cohort is nearly one row repeated",
    Rule.IDENTICAL_ROWS: "use rows that differ: over half of this cohort is one row repeated",
    Rule.NO_EVIDENCE: "the job did not measure its cohort; this is a fault of the vault, report it",
    Rule.INTERVENED: "wait for a reviewer: the run was captured under an intervention",
    Rule.CUSTOM_OUTPUT: "wait for a reviewer, or let a trusted metric, and what was fitted to prompts of your own, report instead",
    Rule.TOKEN_ONLY: "wait for a reviewer: rows of this hook depend on the token alone",
    Rule.TOO_FEW_PROMPTS: "use more distinct prompts; near-duplicates count once",
    Rule.SMALL_CLASS: "use classes with more rows and prompts",
    Rule.RESIDUAL_DOF: "use more rows than parameters",
    Rule.TOO_MANY_PARAMETERS: "use more rows or fewer parameters",
    Rule.DOMINANCE: "use prompts of more equal length",
    Rule.DIFFERENCING: "reuse an earlier cohort exactly, or change it by more prompts",
    Rule.LABEL_SETS: "use labels already used on this cohort",
    Rule.TEXT: "wait for a reviewer, or ask for rates: what a model wrote leaves only if a person lets it",
    Rule.NO_STANDARD_ERROR: "ask for intervals, or wait for a reviewer",
}


@dataclass(frozen=True)
class Evidence:
    """What trusted code measured beside a result; `hub/cohort.py` makes it from rows."""

    prompts_are: Literal["own", "restricted"]
    rows: int
    prompts: int
    """Distinct, near-duplicates counted once."""
    target: Literal["none", "label", "activation"] = "none"
    """Where what was predicted came from."""
    class_rows: tuple[int, ...] = ()
    class_prompts: tuple[int, ...] = ()
    parameters: int = 0
    """Fitted ones."""
    top_prompt_share: float = 1.0
    top_two_share: float = 1.0
    variance_ratio: float | None = None
    """Variance within the cohort over the run's at the hook, the smallest over the cohorts."""
    identical_share: float | None = None
    """Largest share of equal rows, the largest over the cohorts."""
    intervened: bool = False
    """Some rows were captured under an intervention."""
    matched: bool = False
    """The values are shares of completions whose text matched or was judged, and nothing brought in stored rows or an autoencoder."""
    custom: bool = False
    """A user's graph computed the values, not only what a trusted metric measured."""
    token_only: bool = False
    """The hook's rows are a function of the token: `blocks.0.hook_resid_pre`."""
    cohorts: tuple[Cohort, ...] = ()
    """The whole, then each class or group that the result says something about."""
    label_set: str | None = None
    """Digest of the labels used."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier release from the same run has shown."""

    cohorts: tuple[Cohort, ...]
    label_set: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What happens to a result, and every rule that says so."""

    outcome: Outcome
    rules: tuple[Rule, ...] = ()

    def remedies(self) -> str:
        """What to do about it."""
        return "; ".join(f"{rule.name.lower()}: {REMEDIES[rule]}" for rule in self.rules)


@dataclass(frozen=True)
class _Case:
    result: Result
    evidence: Evidence
    earlier: Sequence[Earlier]
    limits: Disclosure
    vector: bool = field(init=False)

    def __post_init__(self) -> None:
        known = self.result.kind in KINDS
        named = {f.name for f in fields_of(self.result.kind) if f.vector} if known else set()
        object.__setattr__(self, "vector", bool(named & set(self.result.values)))


def judge(result: Result, evidence: Evidence, earlier: Sequence[Earlier], limits: Disclosure) -> Verdict:
    """The verdict on `result`: refuse if any refusing rule applies, else review if any other does, else pass."""
    case = _Case(result, evidence, earlier, limits)
    if result.kind == TEXTS:
        return Verdict("review", (Rule.TEXT,))
    if result.kind not in KINDS:
        return Verdict("refuse", (Rule.UNKNOWN_KIND,))
    found = [(outcome, rule) for rule, outcome, applies in _ALWAYS if applies(case)]
    if evidence.prompts_are == "restricted":
        found += [(outcome, rule) for rule, outcome, applies in _RESTRICTED if applies(case)]
    elif result.kind in _OF_LOSSES:
        found += [(outcome, rule) for rule, outcome, applies in _RESTRICTED if rule in _LOSS_RULES and applies(case)]
    for outcome in ("refuse", "review"):
        rules = tuple(rule for said, rule in found if said == outcome)
        if rules:
            return Verdict(outcome, rules)
    return Verdict("pass")


def _intervened(case: _Case) -> bool:
    """Whether values of an intervened computation are shown.

    Shares of completions that match, by their text or by a judge that reads it, are let through on own prompts: what an
    added vector does reaches them only as the tokens that were drawn, so that one is worth a few bits and costs its bytes.
    Means of what is computed under an added vector would be the layer's response to any input; so would a probe's scores of
    it, also as shares over thresholds that somebody chooses.
    """
    passes = case.result.kind == "rates" and case.evidence.matched and case.evidence.prompts_are == "own"
    return case.evidence.intervened and not passes


def _spread(case: _Case) -> bool:
    ratio = case.evidence.variance_ratio
    return ratio is not None and not ratio >= case.limits.min_variance_ratio  # NaN is refused


def _identical(case: _Case) -> bool:
    share = case.evidence.identical_share
    return case.vector and share is not None and not share <= case.limits.max_identical_share


def _small_class(case: _Case) -> bool:
    sizes = (*case.evidence.class_rows, *case.evidence.class_prompts)
    return any(size < case.limits.min_class for size in sizes)


def _differencing(case: _Case) -> bool:
    """Whether some combination of released sums isolates fewer than `min_prompts` prompts.

    Two cohorts that differ in a few prompts are found directly. Longer combinations are found as Audit Expert does
    (Chin and Ozsoyoglu, 1982): prompts that no cohort tells apart form an atom; in the reduced row echelon form of
    cohorts by atoms, a row that holds few prompts is a sum that somebody could compute. An atom alone is in the row
    space exactly if it is a row of that form, so single atoms are found without exception.
    """
    before = [cohort for release in case.earlier for cohort in release.cohorts]
    now = list(case.evidence.cohorts)
    k = case.limits.min_prompts
    for number, cohort in enumerate(now):
        for other in [*before, *now[:number]]:
            if 0 < _difference(cohort, other) < k:
                return True
    return _isolates([*before, *now], k)


def _difference(a: Cohort, b: Cohort) -> int:
    """Prompts whose contribution differs, where the two share any; disjoint cohorts difference nothing."""
    if a.keys().isdisjoint(b):
        return 0
    return sum(1 for prompt in a.keys() | b.keys() if a.get(prompt) != b.get(prompt))


_PRIME = 2_147_483_647


def _isolates(cohorts: Sequence[Cohort], k: int) -> bool:
    cohorts = list({frozenset(cohort.items()): cohort for cohort in cohorts}.values())
    if len(cohorts) < 2:
        return False
    members: dict[tuple[int, int], list[int]] = {}
    for number, cohort in enumerate(cohorts):
        for part in cohort.items():
            members.setdefault(part, []).append(number)
    atoms: dict[tuple[int, ...], set[int]] = {}
    for (prompt, _), where in members.items():
        atoms.setdefault(tuple(where), set()).add(prompt)
    sizes = np.array([len(prompts) for prompts in atoms.values()])
    if not (sizes < k).any():
        return False
    matrix = np.zeros((len(cohorts), len(atoms)), np.int64)
    for column, holders in enumerate(atoms):
        matrix[list(holders), column] = 1
    reduced = _echelon(matrix)
    held = (reduced != 0) @ sizes
    return bool(((held > 0) & (held < k)).any())


def _echelon(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """Reduced row echelon form modulo a prime (whose products fit 64 bits)."""
    rows = matrix.copy()
    top = 0
    for column in range(rows.shape[1]):
        below = np.flatnonzero(rows[top:, column])
        if not len(below):
            continue
        rows[[top, top + below[0]]] = rows[[top + below[0], top]]
        rows[top] = rows[top] * pow(int(rows[top, column]), -1, _PRIME) % _PRIME
        others = np.flatnonzero(rows[:, column])
        others = others[others != top]
        rows[others] = (rows[others] - rows[others, column][:, None] * rows[top]) % _PRIME
        top += 1
        if top == len(rows):
            break
    return rows


def _label_sets(case: _Case) -> bool:
    """Regression coefficients are linear in the labels: as many label sets as rows are the rows (Huth et al., 2023)."""
    if case.evidence.label_set is None or not case.evidence.cohorts:
        return False
    whole = case.evidence.cohorts[0].keys()
    used = {case.evidence.label_set}
    for release in case.earlier:
        if release.label_set is not None and release.cohorts:
            other = release.cohorts[0].keys()
            if 2 * len(whole & other) >= min(len(whole), len(other)):
                used.add(release.label_set)
    return len(used) > case.limits.max_label_sets


_OF_LOSSES = ("sae-cross-entropy",)
_LOSS_RULES = (Rule.TOO_FEW_PROMPTS, Rule.TOO_FEW_ROWS, Rule.DOMINANCE, Rule.NO_STANDARD_ERROR)
"""Rules for restricted prompts that hold for losses of own prompts too: the loss of one token is its logarithm of a probability, of
whatever text somebody chooses. Of many prompts, none of which dominates, rounded to its standard error over them, it is not."""


def _exact(case: _Case) -> bool:
    """Whether a number has no standard error to be rounded to.

    With a hook at 0 every token may have the same loss, the logarithm of the vocabulary, whatever the prompts are.
    """
    result = case.result
    low, high = result.intervals.get("ce_zero", (0.0, 1.0))
    if result.kind in _OF_LOSSES and low == high:
        result = replace(result, values={name: value for name, value in result.values.items() if name != "ce_zero"})
    return not has_standard_errors(result)


_Table = tuple[tuple[Rule, Literal["review", "refuse"], Callable[[_Case], bool]], ...]

_ALWAYS: _Table = (
    (Rule.ACTIVATION_TARGET, "refuse", lambda c: c.evidence.target == "activation"),
    (Rule.TOO_FEW_ROWS, "refuse", lambda c: c.vector and c.evidence.rows < c.limits.min_rows),
    (
        Rule.NO_EVIDENCE,
        "refuse",
        lambda c: c.vector and None in (c.evidence.variance_ratio, c.evidence.identical_share),
    ),
    (Rule.NO_VARIANCE, "refuse", _spread),
    (Rule.IDENTICAL_ROWS, "refuse", _identical),
    (Rule.INTERVENED, "review", _intervened),
    (Rule.CUSTOM_OUTPUT, "review", lambda c: c.evidence.custom),
    (Rule.TOKEN_ONLY, "review", lambda c: c.vector and c.evidence.token_only),
)

_RESTRICTED: _Table = (
    (Rule.TOO_FEW_PROMPTS, "refuse", lambda c: c.evidence.prompts < c.limits.min_prompts),
    (Rule.TOO_FEW_ROWS, "refuse", lambda c: not c.vector and c.evidence.rows < c.limits.min_rows),
    (Rule.NO_EVIDENCE, "refuse", lambda c: not c.evidence.cohorts),
    (Rule.SMALL_CLASS, "refuse", _small_class),
    (Rule.RESIDUAL_DOF, "refuse", lambda c: c.evidence.rows - c.evidence.parameters < c.limits.min_residual_dof),
    (
        Rule.TOO_MANY_PARAMETERS,
        "refuse",
        lambda c: c.evidence.parameters > c.limits.max_parameters_per_row * c.evidence.rows,
    ),
    (
        Rule.DOMINANCE,
        "refuse",
        lambda c: (
            not c.evidence.top_prompt_share <= c.limits.max_top_prompt_share
            or not c.evidence.top_two_share <= c.limits.max_top_two_share
        ),
    ),
    (Rule.DIFFERENCING, "refuse", _differencing),
    (Rule.LABEL_SETS, "refuse", _label_sets),
    (Rule.NO_STANDARD_ERROR, "review", _exact),
)
