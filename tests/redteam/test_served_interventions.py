"""Interventions as an oracle, from the client through a real capture worker to what comes back: nothing, without a reviewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sqlalchemy as sa
import torch

import millpond as mp
from millpond.hub.local import LocalVault
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.hub.tables import ENTRIES
from millpond.store.artifacts import artifact_names, load_artifact, save_artifact
from millpond.store.errors import InReview, NotReleased
from millpond.store.generation import read_completions
from millpond.store.lake import open_lake
from millpond.store.losses import read_losses
from tests.queue_serving import serving

from .conftest import LAYER, MODELS, ROOT, Served, correlation, store

MODEL = ROOT / "examples" / "stdlib_llama" / "model"
RESID, MID, MLP = (f"blocks.{LAYER}.hook_{end}" for end in ("resid_post", "resid_mid", "mlp_out"))
LAST = "blocks.5.hook_resid_post"
KINDS = ["capture", "generate", "sae_cross_entropy"]
PLACE = 6
PROMPTS = [
    {"id": f"q{n}", "text": f"def function_{n}(left, right):\n    return left + {n} * right\n"} for n in range(110)
]
DISTINCT = [
    {"id": path.stem, "text": path.read_text()[-600:-400]}
    for path in sorted((ROOT / "store").glob("*.py"), key=lambda path: -path.stat().st_size)[:24]
]


@pytest.fixture(scope="module")
def attacker(vault):
    """Gateway, executor and a vLLM worker; the attacker's project holds somebody else's run, of restricted prompts."""
    with tempfile.TemporaryDirectory(prefix="mpi", dir="/tmp") as folder:
        lake = open_lake(Path(folder) / "lake", create=True)
        store(lake, "theirs", vault.tokens, {RESID: vault.hooks[RESID]})
        local = LocalVault(Path(folder) / "v", lake.folder, MODELS)
        with local.settings.open("a") as settings:
            settings.write(f"[models.m]\npath = {json.dumps(str(MODEL))}\n")
        served, sql = Served(local, lake), SqlQueue(local.database)
        token, credential = new_worker("gpu", KINDS)
        with local, serving(create_queue_app(sql, [credential])) as address:
            local.start()
            served.project("oracle", "ada", theirs=("theirs", "restricted"))
            # fmt: off
            command = [
                sys.executable, "-m", "millpond.cli", "worker", "--queue", address, "--model", str(MODEL),
                "--lake", str(lake.folder), "--hooks", RESID, MID, MLP, LAST, "--kinds", *KINDS,
                "--engine", json.dumps({"kv_cache_memory_bytes": 1 << 27, "max_num_batched_tokens": 512}),
            ]
            # fmt: on
            environment = os.environ | {"MILLPOND_WORKER_TOKEN": token}
            with (Path(folder) / "worker.log").open("wb") as log:
                worker = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                with served.lake_of("ada", "oracle") as remote:
                    prompts = remote.prompts("mine", PROMPTS)
                    yield SimpleNamespace(served=served, lake=remote, prompts=prompts, engine=sql.engine)
            finally:
                worker.terminate()
                worker.wait(60)
                sql.engine.dispose()


def captured(attacker, name, hook, *interventions, **options):
    """The client's run, and its rows as the vault has them."""
    run = attacker.lake.capture(
        attacker.prompts, model="m", name=name, hooks=hook, interventions=interventions, **options
    )
    stored = next(one for one in attacker.served.lake.runs() if one.endswith(f"_{name}"))
    return run, np.asarray(attacker.served.lake[stored][hook].values, np.float32)


def held_back(run, hook, match):
    """Means, by whatever cut, and summaries: all are refused or wait."""
    for rows in (run, run.select(where="prompt > 4")):
        with pytest.raises((NotReleased, InReview), match=match):
            (mp.lazy(rows)[hook] * 1.0).mean().compute()
    with pytest.raises((NotReleased, InReview), match=match):
        run.statistics(hook)


def released(attacker):
    """Results that have left."""
    with attacker.engine.connect() as connection:
        details = list(connection.scalars(sa.select(ENTRIES.c.detail).where(ENTRIES.c.kind == "charge")))
    return sum('"ReleasedResult"' in detail or '"Texts"' in detail for detail in details)


@pytest.mark.slow
def test_a_large_vector_makes_the_mlp_answer_to_any_input(vault, attacker):
    direction = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    layer = vault.model.model.layers[LAYER]
    with torch.no_grad():
        wanted = layer.mlp(layer.post_attention_layernorm(torch.from_numpy(direction)[None]))[0].numpy()
    edit = {"op": "add", "hook": MID, "vector": direction.tolist(), "scale": 1e4}
    run, rows = captured(attacker, "drowned", MLP, edit, positions="last")
    assert correlation(rows.mean(0), wanted) > 0.999  # ungated: the MLP's response to any input
    held_back(run, MLP, "intervened|no_variance|identical_rows")
    edit["scale"] = 0.3  # prompts keep their spread, so that no rule of spread applies
    run, _ = captured(attacker, "gentle", MLP, edit, positions="last")
    held_back(run, MLP, "intervened: wait for a reviewer")
    assert released(attacker) == 0


@pytest.mark.slow
def test_a_row_of_restricted_prompts_patched_into_ones_own_stays_there(vault, attacker):
    """The new run is of the attacker's own prompts, so the rules for restricted ones do not hold for it."""
    theirs = attacker.lake["theirs"]
    edit = {
        "op": "patch", "hook": RESID, "run": theirs.view.handle, "prompt": "p3",
        "positions": [PLACE], "source_positions": [20],
    }  # fmt: skip
    run, rows = captured(attacker, "patched", RESID, edit, positions=[PLACE, PLACE + 1])
    target = vault.hooks[RESID][3, 20]
    assert correlation(rows[::2].mean(0), target) > 0.999  # ungated: the row itself
    assert correlation(2 * rows.mean(0) - rows[1::2].mean(0), target) > 0.999
    with pytest.raises(NotReleased, match=r"no_variance.*identical_rows"):
        (mp.lazy(run.select(position=PLACE))[RESID] * 1.0).mean().compute()
    held_back(run, RESID, "intervened|identical_rows")  # half of the rows are the patched one: mixed with others
    # the prompts' spread at another position says how much of it the patched row was: a reviewer's too
    with pytest.raises(InReview, match="intervened"):
        (mp.lazy(run.select(position=PLACE + 1))[RESID] * 1.0).mean().compute()
    assert released(attacker) == 0


@pytest.mark.slow
def test_a_spliced_autoencoder_shows_no_decoder_row_in_activations_or_in_text(vault, attacker):
    sources = attacker.lake.capture(attacker.prompts, model="m", name="sources", hooks=LAST)
    sae = mp.BatchTopKSae(d_sae=64, k=4, batch_size=256, progress=False).fit(sources[LAST], tokens=50_000)
    lake = attacker.served.lake
    (name,) = artifact_names(lake)
    decoder = load_artifact(lake, name).arrays()["W_dec"][7].astype(np.float32)
    edit = {
        "op": "sae", "hook": LAST, "artifact": sae.remote_.handle, "set_latents": {"7": 1e5},
    }  # fmt: skip
    run, rows = captured(attacker, "spliced", LAST, edit, positions="last")
    assert correlation(rows.mean(0), decoder) > 0.999  # ungated: the decoder's row
    held_back(run, LAST, "intervened|no_variance|identical_rows")

    norm, head = vault.model.model.norm, vault.model.lm_head
    with torch.no_grad():
        token = int(head(norm(torch.from_numpy(decoder)[None] * 1e5)).argmax())
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    text = tokenizer.decode([token])
    future = attacker.lake.submit_generate(
        attacker.prompts, model="m", max_tokens=1, score=[text], texts=False, interventions=[edit]
    )
    with pytest.raises(InReview, match="intervened"):
        future.result(timeout=120)
    written = read_completions(lake.storage, future.handle)
    assert written["text"].str.contains(text, regex=False).all()  # ungated: the token that the row stands for, 12 bits
    assert released(attacker) == 0


def logits_of(vault, ids, resid=None):
    """Of the last layer's rows as they are, or of `resid` in place of each."""
    with torch.no_grad():
        out = vault.model(torch.tensor([ids]), output_hidden_states=True)
        if resid is None:
            return out.logits[0]
        return vault.model.lm_head(vault.model.model.norm(torch.from_numpy(resid)[None])).expand(len(ids), -1)


@pytest.mark.slow
def test_losses_are_no_oracle_for_single_logits(vault, attacker):
    """One text's loss is a sum of logarithms of probabilities; under an autoencoder of one's own, of the head's answer to any row."""
    direction = np.random.default_rng(2).standard_normal(256).astype(np.float32)
    tensors = {
        "W_enc": np.zeros((256, 1), np.float32), "b_enc": np.zeros(1, np.float32),
        "W_dec": np.zeros((1, 256), np.float32), "b_dec": direction,
    }  # fmt: skip
    save_artifact(attacker.served.lake, "crafted", "sae", tensors, config={"architecture": "standard", "d_in": 256})
    held = attacker.served.local.projects.hold(
        "oracle", "artifact", "crafted", "crafted", model="m", detail={"kind": "sae", "shape": [256, 1]}
    )
    one = attacker.lake.submit_sae_cross_entropy(held.handle.hex(), PROMPTS[:1], hook=LAST, first_position=0)
    with pytest.raises(NotReleased, match="too_few_prompts"):
        one.result(timeout=240)
    (row,) = read_losses(attacker.served.lake.storage, one.handle).itertuples()
    ids = row.prompt_tokens.tolist()
    for found, resid in ((row.clean, None), (row.sae, direction)):
        logits = logits_of(vault, ids, resid)[:-1].double()
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        assert found == pytest.approx(float(wanted), rel=0.02)  # ungated: what the head says, but for bfloat16
    with pytest.raises(NotReleased, match="too_few_prompts"):  # near-duplicates count once
        attacker.lake.sae_cross_entropy(held.handle.hex(), attacker.prompts, hook=LAST)
    with pytest.raises(InReview, match="custom_output"):
        attacker.lake.sae_cross_entropy(held.handle.hex(), DISTINCT, hook=LAST)
    assert released(attacker) == 0


@pytest.mark.slow
def test_losses_of_restricted_prompts_are_of_many_and_give_no_difference_away(vault, attacker):
    sources = attacker.lake.capture(attacker.prompts, model="m", name="again", hooks=RESID)
    sae = mp.BatchTopKSae(d_sae=64, k=4, batch_size=256, progress=False).fit(sources[RESID], tokens=20_000)
    theirs = attacker.lake["theirs"]
    with pytest.raises(NotReleased):
        attacker.lake.sae_cross_entropy(sae, theirs.select(where="prompt < 19"))
    attacker.lake.sae_cross_entropy(sae, theirs.select(where="prompt < 41"))
    less = attacker.lake.submit_sae_cross_entropy(sae, theirs.select(where="prompt < 40"))
    with pytest.raises(NotReleased, match="differencing"):
        less.result(timeout=240)
    losses = read_losses(attacker.served.lake.storage, less.handle)
    logits = logits_of(vault, vault.tokens[39].tolist())[:-1].double()
    wanted = torch.nn.functional.cross_entropy(logits, torch.from_numpy(vault.tokens[39][1:]).long(), reduction="sum")
    assert losses["clean"].iloc[39] == pytest.approx(float(wanted), rel=0.02)  # ungated: the loss of anybody's prompt
    # a model's loss on others' prompts under what was fitted to them is a reviewer's as well
    fitted = mp.BatchTopKSae(d_sae=64, k=4, batch_size=256, progress=False).fit(theirs[RESID], tokens=20_000)
    with pytest.raises(InReview, match="custom_output"):
        attacker.lake.sae_cross_entropy(fitted, DISTINCT)
    assert released(attacker) == 1
