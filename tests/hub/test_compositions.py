"""Ways around the gate that need two parts of it to be combined."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tests.hub.gatehouse import HOOK, PROMPTS, Gatehouse, probe, rows

from millpond.hub import evidence
from millpond.hub.body import Failure, Handles, Withheld, decode
from millpond.hub.rules import Rule
from millpond.hub.vault import label_mark
from millpond.store.errors import InvalidInput
from millpond.store.expression import Expression


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    with Gatehouse(tmp_path_factory.mktemp("gate")) as found:
        yield found


@pytest.mark.parametrize("kind", ["half numbers", "many numbers"])
def test_groups_of_one_row_are_refused_whatever_the_label_holds(gate, kind):
    numbers = np.arange(PROMPTS * 20)
    values = numbers % 200 + 0.5 if kind == "half numbers" else numbers
    if kind == "half numbers":
        values[7] = 1000.5  # a group of one row
    name = kind.replace(" ", "_")
    gate.lake["shared"].labels.add(label_mark("one") + name, values)
    job = {
        "kind": "expression", "rows": rows(gate.run),
        "expression": {"run": gate.run, "reduce": {"op": "mean", "of": {"op": "activations", "hook": HOOK}, "by": name}},
    }  # fmt: skip
    client = gate.client("ben")
    found = gate.answer(client, gate.do(client, job))
    if kind == "many numbers":
        assert isinstance(found, Failure)
    else:
        assert isinstance(found, Withheld)
        assert set(found.verdict.rules) & {Rule.NO_VARIANCE, Rule.IDENTICAL_ROWS}


def test_a_glob_names_a_hook_of_tokens_as_its_name_does(gate, monkeypatch):
    monkeypatch.setattr(evidence, "TOKEN_HOOKS", (HOOK,))
    client = gate.client("ben")
    handle = gate.do(client, probe(gate.run, test=False, hook="blocks.1.*"))
    made = decode(client.get(f"/api/v1/p/one/jobs/{handle}/made").content)
    found = gate.answer(client, gate.do(client, {"kind": "release", "artifact": made.values[0].hex()}))
    assert isinstance(found, Withheld)
    assert Rule.TOKEN_ONLY in found.verdict.rules


def test_rows_of_one_model_are_not_carried_into_another_models_account(gate):
    others = gate.projects.hold("one", "run", "others", "shared", model="other", detail={"prompts": "own"}).handle.hex()
    client = gate.client("ben")
    answers = []
    for name, run in (("paid", gate.run), ("unpaid", others)):
        patch = {"op": "patch", "hook": HOOK, "run": run, "prompt": "p0"}
        job = {
            "kind": "capture", "model": "m", "name": name, "prompts": [{"id": "a", "text": "b"}], "hooks": [HOOK],
            "interventions": [patch],
        }  # fmt: skip
        answers.append(decode(client.post("/api/v1/p/one/jobs", json={"job": job}).content))
    assert isinstance(answers[0], Handles)
    assert isinstance(answers[1], Failure)


def test_a_short_condition_cannot_fill_the_memory_with_text():
    text = '("%100000000d" + "") % 5 == "b"'
    with pytest.raises(InvalidInput, match="arithmetic needs numbers"):
        Expression(text).evaluate({"position": np.arange(3)})
    limited = (
        "import resource, numpy as np; from millpond.store.expression import Expression; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: Expression({text!r}).evaluate({{'position': np.arange(3)}})\nexcept Exception: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB


def test_a_correlation_with_a_mark_on_one_row_is_a_reviewers_on_restricted_prompts(gate):
    gate.lake["shared"].labels.add(label_mark("one") + "mark", np.arange(PROMPTS * 20) == 77)
    reduce = {
        "op": "correlation", "of": {"op": "norm", "of": {"op": "activations", "hook": HOOK}},
        "other": {"op": "label", "name": "mark"},
    }  # fmt: skip
    job = {
        "kind": "expression", "rows": rows(gate.restricted), "expression": {"run": gate.restricted, "reduce": reduce},
    }  # fmt: skip
    client = gate.client("ben")
    found = gate.answer(client, gate.do(client, job))
    assert isinstance(found, Withheld)
    assert Rule.CUSTOM_OUTPUT in found.verdict.rules
