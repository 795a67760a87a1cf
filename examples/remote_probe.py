"""Fifteen lines against a gateway: a probe, a sweep and an autoencoder on activations that stay where they are.

    python examples/remote_probe.py demo/lake

Starts a gateway, an executor with Dask workers and the egress meter on a lake of this machine (`make demo` makes one), uses
them as a notebook would, says what that cost in bytes, and ends what it started. The demo's model is public, so its bytes
would only be counted; here they are capped as if it had eight billion private parameters (`--parameters`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import millpond as mp
from millpond.hub.ledger import Payer
from millpond.hub.local import LocalVault

MODEL, PROJECT, USER = "guarded", "probing", "researcher"


def fifteen_lines(name: str, hook: str, label: str, tokens: int) -> None:
    """What a notebook would hold. Its environment says where the gateway is and who asks."""
    lake = mp.connect()
    run = lake[name]
    print(run)
    train, test = run.split(test=0.2, seed=0)
    print(train[hook])

    probe = mp.LogisticProbe().fit(train[hook], train.labels[label])
    print("score", probe.score(test[hook], test.labels[label]))
    print(probe.evaluate(test[hook], test.labels[label]))
    hooks = "blocks." + "*." + hook.rpartition(".")[2]
    sweep = mp.LogisticProbe().sweep(train, test, hooks=hooks, labels=label)
    print(sweep.table()[["hook", "control", "auroc", "auroc_low", "auroc_high"]].to_string(index=False))
    sweep.plot()
    sae = mp.BatchTopKSae(d_sae=8 * run.d_model, k=max(2, run.d_model // 16)).fit(train[hook], tokens=tokens)
    print(sae.evaluate(test[hook]))

    try:
        print(train[hook].values)
    except mp.MillpondError as error:
        print(f"{type(error).__name__}: {error}")
    print(lake.budget())


def main() -> int:
    """Start, use, account, end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lake", help="folder or URL of a lake with a sealed run")
    parser.add_argument("--run", help="a run of it; by default its first")
    parser.add_argument("--hook", help="by default the middle one")
    parser.add_argument("--label", help="by default `in_string`, or the first")
    parser.add_argument("--tokens", type=int, default=200_000, help="rows to train the autoencoder on")
    parser.add_argument("--parameters", type=int, default=8_000_000_000, help="of the model that the budgets protect")
    parser.add_argument("--workers", type=int, default=1, help="Dask workers of the executor")
    arguments = parser.parse_args()

    lake = mp.open(arguments.lake)
    name = arguments.run or lake.runs()[0]
    run = lake[name]
    hook = arguments.hook or run.hooks[len(run.hooks) // 2]
    label = arguments.label or ("in_string" if "in_string" in run.labels else next(iter(run.labels)))
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        where = arguments.lake if "://" in arguments.lake else str(Path(arguments.lake).resolve())
        models = {MODEL: {"parameters": arguments.parameters}}
        with LocalVault(Path(folder), where, models, workers=arguments.workers) as vault:
            vault.projects.create(PROJECT, models=[MODEL], by=USER)
            vault.projects.hold(PROJECT, "run", name, name, model=MODEL, detail={"prompts": "own"})
            token = vault.add_token(USER, "read", "run")
            vault.start(meter_cap=1_000_000)
            os.environ.update(MILLPOND_URL=vault.url, MILLPOND_TOKEN=token, MILLPOND_PROJECT=PROJECT)
            fifteen_lines(name, hook, label, arguments.tokens)
            account(vault, run.nbytes)
    return 0


def account(vault: LocalVault, stored: int) -> None:
    """What has crossed, by both counts."""
    ledger = vault.ledger()
    whole = ledger.verify()
    week, project, _ = ledger.balances(Payer(USER, PROJECT, (MODEL,)))
    ledger.close()
    print(f"\nactivations of the run       {stored:>13,} bytes, all still in the vault")
    print(f"charged by the gateway       {week.spent:>13,} bytes, {whole.entries:,} entries of the ledger, chain whole")
    print(f"left of the user's week      {week.left:>13,} bytes")
    print(f"left of the project          {project.left:>13,} bytes")
    print(
        f"the meter let through at most {vault.metered:>12,} bytes, with headers, framing and what is the same for everybody"
    )


if __name__ == "__main__":
    sys.exit(main())
