"""A lake on this machine with random rows of a remote run's schema: nothing of it comes from the vault's activations."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.hub.projection import RunView
    from millpond.store.lake import Lake

_TOKENS = 24
"""Of each prompt, where the description does not say how many rows there are."""
_VOCABULARY = 1000


def make_twin(view: RunView, *, seed: int = 0, max_bytes: int = 64_000_000) -> Lake:
    """A lake in a temporary folder, removed when Python ends, with a sealed run called `view.name`.

    It has the same hooks, width, labels and, up to `max_bytes` of activations, prompts and rows. Each label is a boolean a
    token, true for about half of them and, at every other hook, a direction of the activations, so that probes have something
    to find and something not to.

    Raises:
        InvalidInput: `max_bytes` is too small for a row a prompt.
    """
    import pandas as pd

    from millpond.store.lake import open_lake
    from millpond.store.seal import seal_run
    from millpond.store.segment import CapturedRequest, RunWriter

    rng = np.random.default_rng(seed)
    row_bytes = 4 * view.d_model * len(view.hooks)
    prompts = view.prompts or 64
    tokens = -(-view.rows // prompts) if view.rows else _TOKENS
    most = max_bytes // row_bytes
    if prompts * tokens > most:
        tokens = max(2, min(tokens, most // prompts))
        prompts = min(prompts, most // tokens)
    if prompts < 4:
        raise InvalidInput(f"max_bytes={max_bytes:,} holds {most:,} rows of {row_bytes:,} bytes; allow more")
    folder = tempfile.mkdtemp(prefix="millpond-twin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lake = open_lake(folder, create=True)
    spec = lake.create_run(
        view.name,
        hooks=view.hooks,
        d_model=view.d_model,
        dtype="float32",
        provenance={"model": f"random twin of {view.model}"},
    )
    writer = RunWriter(lake.run_storage(view.name), spec)
    ids = [f"prompt-{number}" for number in range(prompts)]
    directions = {name: rng.standard_normal(view.d_model).astype(np.float32) for name in view.labels}
    values: dict[str, dict[str, NDArray[np.bool_]]] = {name: {} for name in view.labels}
    for prompt in ids:
        held = {hook: rng.standard_normal((tokens, view.d_model), np.float32) for hook in view.hooks}
        for name in view.labels:
            marks = rng.random(tokens) < 0.5
            marks[:2] = (True, False)
            values[name][prompt] = marks
            for hook in view.hooks[::2]:
                held[hook] += marks[:, None] * directions[name]
        ids_of_tokens = rng.integers(0, _VOCABULARY, tokens).astype(np.int32)
        writer.append(CapturedRequest(prompt, ids_of_tokens, tokens, np.arange(tokens, dtype=np.int32), held))
    writer.commit()
    seal_run(
        lake.run_storage(view.name),
        prompts=pd.DataFrame({"id": ids}),
        token_labels=values,
        token_label_dtypes=dict.fromkeys(values, "bool"),
    )
    return lake
