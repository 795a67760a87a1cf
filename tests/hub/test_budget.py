from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from millpond import cli
from millpond.hub.body import ReleasedResult, Texts, decode, encode
from millpond.hub.budget import price, read_plan
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import Charges, Disclosure, Policy, read_policy
from millpond.hub.shapes import Context
from millpond.hub.textcode import most_bytes
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_policy_is_the_defaults():
    policy = read_policy(DOCS / "policy.toml")
    assert policy.model_copy(update={"models": {}}) == Policy()
    assert policy.cap("example-8b", "user_week") == 1_000_000


def test_a_realistic_week_fits_a_users_megabyte_and_the_docs_show_it(capsys):
    assert cli.main(["budget", "plan", str(DOCS / "week.toml"), "--parameters", "8000000000"]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert printed.strip() in (DOCS / "gate.md").read_text()
    total = int(printed.splitlines()[-1].split()[0].replace(",", ""))
    assert total == sum(int(line.split()[0].replace(",", "")) for line in printed.splitlines()[:-1]) <= 1_000_000


def test_a_plan_that_does_not_fit_says_so(capsys):
    assert cli.main(["budget", "plan", str(DOCS / "week.toml"), "--parameters", "5000000000"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_prices_bound_what_is_really_sent():
    """The week's answers, made and encoded for real."""
    rng = np.random.default_rng(0)
    context, charges = Context(Disclosure(), restricted=False), Charges()
    counts = {"rows": 10**9, "prompts": 10**6}
    sweep = {}
    for name in ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss"):
        sweep |= {name: rng.random(64), f"{name}_low": np.zeros(64), f"{name}_high": np.ones(64)}
    answers = [
        (40, 1, Result("probe-sweep", sweep, {}, counts)),
        (10, 1, Result("direction", {"direction": rng.standard_normal(4096)}, {}, counts | {"positives": 1, "negatives": 2})),
        (5, 1, Result("curve", {"x": np.arange(200.0), "y": np.ones(200), "y_low": np.zeros(200), "y_high": np.ones(200)}, {}, counts)),
        (5, 500, Result(
            "latent",
            {"density": 0.01, "mean_active": 2.0, "maximum": 9.0, "histogram": np.arange(16), "activations": rng.random(10),
             "contexts": rng.integers(0, 10**6, (10, 2))},
            {"density": (0.0, 0.1), "mean_active": (1.0, 3.0), "maximum": (8.0, 10.0)}, counts,
        )),
    ]  # fmt: skip
    prices = price(read_plan(DOCS / "week.toml"), charges)
    for (times, each, result), priced in zip(answers, prices, strict=False):
        body = encode(ReleasedResult(result), context)
        real = times * each * (len(body) + charges.response_bytes)
        assert real <= priced.bytes <= real + times * 700  # beside the answers: the quote, the handle, the statuses
        assert decode(body).result.kind == result.kind
    texts = [b"\xff" * 256] * 20
    assert len(encode(Texts(b"x" * most_bytes(texts)), context)) + 16 <= prices[4].bytes / 30


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[[items]]\nwhat = "x"\nkind = "weights"\n', "kind"),
        ('[[items]]\nwhat = "x"\nkind = "result"\nresult = "mean"\nextra = 1\n', "extra"),
        ("[[items]", "cannot be read"),
    ],
)
def test_plans_that_cannot_be_used_are_refused(tmp_path, text, what):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(InvalidInput, match=what):
        read_plan(tmp_path / "plan.toml")


def test_the_command_line_verifies_a_ledger_and_notes_its_head(database, tmp_path, capsys):
    url = database
    ledger = Ledger(url, read_policy(DOCS / "policy.toml"))
    ledger.charge(Payer("ada", "p", ("example-8b",)), 600_000, what="x")
    ledger.close()
    anchors = tmp_path / "heads"
    for _ in range(2):
        assert cli.main(["ledger", "verify", "--database", url, "--anchors", str(anchors)]) == 0
        assert re.search(r"whole: 5 entries, 600,000 bytes charged", capsys.readouterr().out)
    anchors.write_text(f"5 {'0' * 64}\n")
    assert cli.main(["ledger", "verify", "--database", url, "--anchors", str(anchors)]) == 1
    assert "rewritten" in capsys.readouterr().err
    assert cli.main(["ledger", "verify", "--database", f"sqlite:///{tmp_path / 'none.db'}"]) == 2
    assert not (tmp_path / "none.db").exists()
    at = ["--database", url, "--policy", str(DOCS / "policy.toml")]
    assert cli.main(["ledger", "alerts", *at]) == 0
    assert "50 % of 1,000,000 bytes: user_week:example-8b:ada/" in capsys.readouterr().out
    assert cli.main(["budget", "raise", "user_week:example-8b", "1500000", *at]) == 0
    assert "budget approve 6" in capsys.readouterr().out
    assert cli.main(["budget", "approve", "6", *at]) == 2  # the same system user
    assert "somebody else" in capsys.readouterr().err
