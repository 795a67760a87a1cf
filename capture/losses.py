"""Losses of prompts in a running engine: as the model is, with a hook reconstructed by an autoencoder, and with it set to 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from millpond.capture.adapters import Adapter
from millpond.capture.engine import CaptureEngine, LossRequest
from millpond.capture.interrupts import held_back
from millpond.capture.plan import ModelFacts
from millpond.capture.prompt_file import read_prompts
from millpond.capture.saes import StoredSae
from millpond.store.artifacts import load_artifact, save_artifact
from millpond.store.capture_spec import RequestArgs
from millpond.store.errors import InvalidInput, PromptTooLong, TooFewPrompts
from millpond.store.interventions import SpliceSae
from millpond.store.lake import Lake, open_lake
from millpond.store.losses import SPLICES, LossJob, StoredRows, has_losses, read_losses, write_losses
from millpond.store.prompt_tokens import prompts_of


def run_losses(
    job: LossJob,
    engine: CaptureEngine,
    model: ModelFacts,
    adapter: Adapter | None,
    job_id: str,
    beat: Callable[[int], None] = lambda done: None,
) -> int:
    """Run the job's prompts three times and keep their losses under its id; returns how many prompts counted.

    A job that was done before, by a worker that was killed before it could say so, is not done again.

    Raises:
        InvalidInput: the engine has no tap at the hook, the autoencoder cannot be spliced there, or nothing is predicted.
        PromptTooLong: a prompt does not fit the engine's context.
        TooFewPrompts: the rows are of fewer prompts than the job must have.
        CaptureFailed: the engine failed.
    """
    lake = open_lake(job.lake)
    if has_losses(lake.storage, job_id):
        return len(read_losses(lake.storage, job_id))
    check_splice(lake, engine, model, job.hook, job.artifact)
    prompts, first = _prompts(job, lake, model)
    longest = max(map(len, prompts))
    if longest >= model.context:
        raise PromptTooLong(
            f"prompts: the longest has {longest:,} tokens; the engine's context has {model.context:,} with the one that it "
            "draws: use shorter prompts"
        )
    if max(map(max, filter(None, prompts)), default=0) >= model.vocab_size:
        raise InvalidInput(f"rows: a token id is not below the model's {model.vocab_size:,}; name rows of this model")
    splices = splices_of(job.hook, job.artifact, keep_nothing(lake, model.d_model), first)
    with held_back() as check:

        def between_steps(done: int) -> None:
            check()
            beat(done)

        table = measure_losses(engine, prompts, splices, first, job_id, adapter, between_steps)
        if table.empty:
            raise InvalidInput(f"prompts: none is longer than {first + 1} tokens, so there is nothing to predict")
        write_losses(lake.storage, job_id, table)
    return len(table)


def measure_losses(
    engine: CaptureEngine,
    prompts: Sequence[Sequence[int]],
    splices: dict[str, SpliceSae | None],
    first_position: int,
    name: str,
    adapter: Adapter | None = None,
    between_steps: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Summed losses in nats of the tokens that follow positions from `first_position` on, a row a prompt, as `store.losses` has them.

    Prompts that have no such token are left out. One splice is done with before the next begins, so that batches are alike.
    """
    long = [number for number, prompt in enumerate(prompts) if len(prompt) >= first_position + 2]
    table = pd.DataFrame({"prompt": long, "tokens": [len(prompts[number]) - first_position - 1 for number in long]})
    table["prompt_tokens"] = [list(prompts[number]) for number in long]
    sums: dict[str, float] = {}
    for splice, edit in splices.items():
        asked = RequestArgs(intervene=() if edit is None else (edit,))

        def requests(splice: str = splice, asked: RequestArgs = asked) -> Iterator[LossRequest]:
            for number in long:
                yield LossRequest(f"{name}:{number}:{splice}", list(prompts[number]), asked, adapter)

        for request, losses in engine.losses(requests(), lambda: between_steps(len(sums) // len(splices))):
            sums[request.request_id] = float(np.sum(losses[first_position:], dtype=np.float64))
        table[splice] = [sums[f"{name}:{number}:{splice}"] for number in long]
    return table


def splices_of(hook: str, sae: str, nothing: str, first_position: int) -> dict[str, SpliceSae | None]:
    """The edit of each of `SPLICES`, by names of artifacts."""
    names = dict(zip(SPLICES, (None, sae, nothing), strict=True))
    return {
        splice: None if artifact is None else SpliceSae(hook=hook, artifact=artifact, first_position=first_position)
        for splice, artifact in names.items()
    }


def keep_nothing(lake: Lake, d_model: int) -> str:
    """The name of an autoencoder in the lake whose reconstruction is 0; kept there when it is first needed.

    Raises:
        InvalidInput: something else has its name.
    """
    name = f"zero-reconstruction-{d_model}"
    zero = np.zeros((d_model, 1), np.float32)
    tensors = {"W_enc": zero, "b_enc": zero[0], "W_dec": zero.T, "b_dec": zero[:, 0]}
    config = {"architecture": "standard", "d_in": d_model, "d_sae": 1, "apply_b_dec_to_input": False}
    try:
        save_artifact(lake, name, "sae", tensors, config=config)
    except InvalidInput:
        held = load_artifact(lake, name)
        if held.config != config or any(values.any() for values in held.arrays().values()):
            raise
    return name


def check_splice(lake: Lake, engine: CaptureEngine, model: ModelFacts, hook: str, artifact: str) -> None:
    """Check that an autoencoder can be spliced in where the engine has a tap.

    Raises:
        InvalidInput: it cannot.
    """
    if hook not in engine.hooks:
        raise InvalidInput(f"hook: this worker has no tap at {hook}; start one with --hooks {hook}")
    if engine.on_device and (hook, artifact) not in engine.saes:
        raise InvalidInput(
            f"artifact: this worker's CUDA graphs do not hold SAE {artifact!r}; measure it with millpond sae eval --model, whose "
            "engine is made for it"
        )
    sae = StoredSae(load_artifact(lake, artifact, "sae"))
    if sae.d_in != model.d_model:
        raise InvalidInput(f"artifact: SAE {artifact!r} is of width {sae.d_in}, the model of {model.d_model}")


def _prompts(job: LossJob, lake: Lake, model: ModelFacts) -> tuple[list[list[int]], int]:
    """The token ids of the job's prompts, and the first position that counts."""
    if job.rows is not None:
        return _stored(job.rows, lake)
    assert job.prompts is not None
    found = read_prompts(job.prompts, model.folder, model.context - 1, model.vocab_size)
    return found.token_ids, job.first_position


def _stored(rows: StoredRows, lake: Lake) -> tuple[list[list[int]], int]:
    view = lake[rows.run]
    view.check_sealed()
    if rows.where is not None:
        view = view.select(where=rows.where)
    if rows.test is not None:
        view = view.split(rows.test, rows.seed, by=rows.by)[rows.part == "test"]
    if len(view.prompts) < max(rows.fewest, 1):
        raise TooFewPrompts(f"rows: fewer than {max(rows.fewest, 1)} prompts are selected; change where")
    return prompts_of(view, rows.bos), int(view.tokens["position"][:1].compute()[0])
