"""A real small model's activations as plain arrays, and the gate with a model worth protecting."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch

import millpond as mp
from millpond.hub.cohort import cohort, distinct_prompts, identical_share, shares, variance_ratio
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.local import LocalVault
from millpond.hub.policy import ModelPolicy, Policy
from millpond.hub.release import Door, Question
from millpond.hub.rules import Evidence
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

ROOT = Path(__file__).parents[2]
LAYER = 3
ADA = Payer("ada", "attack", ("m",))


@dataclass
class Vault:
    """The example model on 240 prompts of 48 tokens, in float32."""

    model: object
    tokens: np.ndarray
    hooks: dict[str, np.ndarray]
    """Hook to rows (prompt, position, width)."""
    clusters: np.ndarray

    def variance(self, hook):
        wide = self.hooks[hook].reshape(-1, self.hooks[hook].shape[-1])
        return float(wide.var(axis=0).sum())


def prompts(tokenizer, count, length):
    sys.path.insert(0, str(ROOT / "examples" / "stdlib_llama"))
    try:
        from corpus import read_stdlib
    finally:
        sys.path.pop(0)
    rows = []
    for file in sorted(read_stdlib(), key=lambda file: file.path[::-1]):
        ids = tokenizer(file.text[:2000], add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    return np.array(rows)


def run_model(model, tokens, change=None):
    """Activations by hook; `change` alters the residual stream before layer `LAYER`."""
    layers, kept = model.model.layers, {}

    def keep(name, part=lambda value: value):
        return lambda module, given, made: kept.__setitem__(name, part(made).detach().numpy())

    handles = [
        model.model.embed_tokens.register_forward_hook(keep("blocks.0.hook_resid_pre")),
        layers[LAYER].mlp.register_forward_hook(keep(f"blocks.{LAYER}.hook_mlp_out")),
        layers[LAYER].mlp.down_proj.register_forward_pre_hook(
            lambda module, given: kept.__setitem__(f"blocks.{LAYER}.mlp.hook_post", given[0].detach().numpy())
        ),
        layers[LAYER].register_forward_hook(
            keep(f"blocks.{LAYER}.hook_resid_post", lambda value: value[0] if isinstance(value, tuple) else value)
        ),
    ]
    if change is not None:
        handles.append(
            layers[LAYER].post_attention_layernorm.register_forward_pre_hook(lambda module, given: (change(given[0]),))
        )
    try:
        with torch.no_grad():
            model(torch.from_numpy(tokens))
    finally:
        for handle in handles:
            handle.remove()
    return kept


@pytest.fixture(scope="session")
def vault():
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = ROOT / "examples" / "stdlib_llama" / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = prompts(tokenizer, 240, 48)
    return Vault(model, tokens, run_model(model, tokens), distinct_prompts(tokens))


@pytest.fixture
def door(tmp_path):
    """The gate in front of a model of 8e9 parameters: 1 MB a week."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", Policy(models={"m": ModelPolicy(parameters=8_000_000_000)}))
    yield Door(ledger)
    ledger.close()


def measure(vault, hook, chosen, *, prompts_are="restricted", groups=(), **more):
    """The evidence that the vault's own code would measure for rows `chosen` (prompt, position) of `hook`."""
    chosen = np.asarray(chosen)
    rows = vault.hooks[hook][chosen[:, 0], chosen[:, 1]]
    clusters = vault.clusters[chosen[:, 0]]
    numbers = chosen[:, 0] * vault.tokens.shape[1] + chosen[:, 1]
    parts = [np.arange(len(chosen)), *[np.flatnonzero(group) for group in groups]]
    top, two = shares(clusters)
    return Evidence(
        prompts_are=prompts_are,
        rows=len(rows),
        prompts=len(set(clusters.tolist())),
        class_rows=tuple(len(part) for part in parts[1:]),
        class_prompts=tuple(len(set(clusters[part].tolist())) for part in parts[1:]),
        top_prompt_share=top,
        top_two_share=two,
        variance_ratio=min(variance_ratio(rows[part], vault.variance(hook)) for part in parts),
        identical_share=max(identical_share(rows[part]) for part in parts),
        token_only=hook == "blocks.0.hook_resid_pre",
        cohorts=tuple(cohort(clusters[part], numbers[part]) for part in parts),
        **more,
    )


def ask(number):
    """A question that was not asked before."""
    return Question("attack", "run", {"number": number})


def correlation(a, b):
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def store(lake, name, tokens, hooks, **provenance):
    """A sealed run of rows (prompt, position, width) by hook; prompts are p0, p1, ..."""
    width = next(iter(hooks.values())).shape[-1]
    record = {"model": "stdlib_llama", "capture": {"capture": {"max_new_tokens": 0}}, **provenance}
    spec = lake.create_run(name, hooks=tuple(hooks), d_model=width, dtype="float32", provenance=record)
    writer = RunWriter(lake.run_folder(name), spec)
    ids = [f"p{number}" for number in range(len(tokens))]
    for number, prompt in enumerate(ids):
        rows = {hook: np.ascontiguousarray(held[number], np.float32) for hook, held in hooks.items()}
        n = tokens.shape[1]
        writer.append(CapturedRequest(prompt, tokens[number].astype(np.int32), n, np.arange(n, dtype=np.int32), rows))
    writer.commit()
    return seal_run(lake.run_folder(name), prompts=pd.DataFrame({"id": ids}))


@dataclass
class Served:
    """A real gateway and executor over lakes of the example model's rows, and who may do what there.

    The model `m` counts as one of 8e9 parameters; `tiny` allows 2,000 bytes a week, and `drop` as many again.
    """

    local: LocalVault
    lake: object

    def lake_of(self, user, project, *scopes):
        """What `user` sees of `project`."""
        token = self.local.add_token(user, *(scopes or ("read", "run")))
        return mp.connect(self.local.url, token, project)

    def http(self, token=None, url=None):
        """A bare session, for what the client would not send."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.HTTPTransport(uds=str(self.local.socket), verify=False) if url is None else None
        return httpx.Client(
            transport=transport, base_url=url or "http://millpond", headers=headers, timeout=60, verify=False
        )

    def balances(self, user, project, model="m"):
        """Bytes spent of the user's week and of the project."""
        ledger = self.local.ledger()
        try:
            return tuple(one.spent for one in ledger.balances(Payer(user, project, (model,))))[:2]
        finally:
            ledger.close()

    def project(self, name, user, model="m", **runs):
        """A project of `user` with runs: name there to (name in the lake, whose prompts)."""
        self.local.projects.create(name, models=[model], by=user)
        return {
            called: self.local.projects.hold(name, "run", called, target, model=model, detail={"prompts": whose}).handle
            for called, (target, whose) in runs.items()
        }


MODELS = {
    "m": {"parameters": 8_000_000_000},
    "tiny": {"parameters": 8_000_000_000, "user_week_bytes": 2_000},
    "drop": {"parameters": 8_000_000_000, "user_week_bytes": 3_000},
}


@pytest.fixture(scope="session")
def served(vault):
    with tempfile.TemporaryDirectory(prefix="mpr", dir="/tmp") as folder:
        lake = open_lake(Path(folder) / "lake", create=True)
        kept = {hook: rows for hook, rows in vault.hooks.items() if rows.shape[-1] == 256}
        store(lake, "heldout", vault.tokens, kept)
        with LocalVault(Path(folder) / "v", lake.folder, MODELS, max_running=8) as local:
            local.start()
            yield Served(local, lake)
