"""Taking rows from runs that hold them already, in place of computing them again.

A row depends on its token, the tokens before it and the computation (model, adapter, interventions). So
a prompt's rows are those of any stored request that begins with the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.capture.plan import CapturePlan
from millpond.capture.provenance import different_computation
from millpond.store.dtypes import encode_bfloat16
from millpond.store.errors import InvalidInput
from millpond.store.hooks import summarize_hooks
from millpond.store.lake import Lake
from millpond.store.objects import Storage
from millpond.store.run import Run, open_run
from millpond.store.segment import CapturedRequest, RunWriter

_COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class _Match:
    """A prompt, and the stored request that holds its rows."""

    prompt_id: str
    token_ids: NDArray[np.int32]
    """Prompt and generated tokens; -1 where a generated one is not known because no row of it is wanted."""
    n_prompt: int
    source: int
    """Number of the stored prompt."""
    positions: NDArray[np.int32]
    """Wanted ones."""
    rows: NDArray[np.int64]
    """Where the wanted positions are among the stored prompt's rows."""


def reuse_rows(
    lake: Lake, plan: CapturePlan, storage: Storage, provenance: Mapping[str, Any], todo: list[tuple[str, list[int]]]
) -> dict[str, int]:
    """Copy the rows of those prompts of `todo` into the open run in `storage` that the job's `reuse` runs hold.

    Returns:
        Rows copied of each prompt that is done with.

    Raises:
        InvalidInput: a run named for reuse is of another model, dtype or other hooks.
    """
    writer = RunWriter(storage, open_run(storage).plan.spec)
    done: dict[str, int] = {}
    for name in plan.job.destination.reuse:
        run = lake[name]
        if _usable(run, plan, provenance):
            left = [(prompt_id, tokens) for prompt_id, tokens in todo if prompt_id not in done]
            for request in _copies(run, plan, list(_matches(run, plan, left))):
                writer.append(request)
                done[request.id] = len(request.positions)
    writer.commit()
    return done


def _usable(run: Run, plan: CapturePlan, provenance: Mapping[str, Any]) -> bool:
    """Whether `run` is of the same computation; another adapter or other interventions only make it useless here."""
    differs = different_computation(run.provenance, provenance)
    if differs not in (None, "adapter", "interventions"):
        raise InvalidInput(
            f"destination.reuse: run {run.name!r} is of another model: its {differs} differs; leave it out"
        )
    if not set(plan.reads) <= set(run.plan.spec.reads):
        raise InvalidInput(
            f"destination.reuse: run {run.name!r} does not have all of capture.reads; it has "
            f"{', '.join(run.reads) or 'none'}: leave it out"
        )
    if run.dtype != plan.model.dtype or not set(plan.hooks) <= set(run.hooks):
        raise InvalidInput(
            f"destination.reuse: run {run.name!r} holds {run.dtype} of {summarize_hooks(run.hooks)}, the job asks for "
            f"{plan.model.dtype} of {summarize_hooks(plan.hooks)}; leave it out"
        )
    return differs is None


def _matches(run: Run, plan: CapturePlan, todo: list[tuple[str, list[int]]]) -> Iterator[_Match]:
    new = plan.job.capture.max_new_tokens
    if new and run.provenance.get("capture", {}).get("capture", {}).get("max_new_tokens") != new:
        return  # its generated tokens may end elsewhere
    coordinates = run.tokens.compute()
    positions, token_ids = coordinates["position"].values, coordinates["token_id"].values
    counts = run.prompts["n_rows"].to_numpy(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    stored: dict[str, int] = {digest: number for number, digest in enumerate(run.prompts["sha256"])}
    if not new:
        lengths = {len(tokens) for _, tokens in todo}
        for number in range(len(counts)):
            rows = slice(starts[number], starts[number + 1])
            if np.array_equal(positions[rows], np.arange(counts[number])):  # every token is known, from the first
                stored |= dict.fromkeys(_prefix_digests(token_ids[rows], lengths), number)
    for prompt_id, tokens in todo:
        ours = np.array(tokens, "<i4")
        source = stored.get(hashlib.sha256(ours.tobytes()).hexdigest())
        if source is None:
            continue
        rows = slice(starts[source], starts[source + 1])
        known = ours
        if new:
            known = np.full(int(run.prompts["n_tokens"].iloc[source]), -1, np.int32)
            known[positions[rows]] = token_ids[rows]
            known[: len(ours)] = ours
        wanted = plan.job.capture.select(len(ours), 0, len(known), known)
        at = np.searchsorted(positions[rows], wanted)
        held = positions[rows]
        if len(wanted) == 0 or (at[-1] < len(held) and np.array_equal(held[at], wanted)):
            yield _Match(prompt_id, known, len(ours), source, wanted, at.astype(np.int64))


def _prefix_digests(tokens: NDArray[np.int32], lengths: Iterable[int]) -> Iterator[str]:
    data, digest, at = tokens.astype("<i4"), hashlib.sha256(), 0
    for length in sorted(lengths):
        if length > len(data):
            return
        digest.update(data[at:length].tobytes())
        at = length
        yield digest.hexdigest()


def _copies(run: Run, plan: CapturePlan, matches: list[_Match]) -> Iterator[CapturedRequest]:
    """The matched prompts with their rows, read in groups of about 64 MB."""
    counts = run.prompts["n_rows"].to_numpy(np.int64)
    row_bytes = 4 * run.d_model * len(plan.hooks) + sum(
        array.row_bytes for array in run.plan.spec.read_arrays().values()
    )
    wanted = [read.arrays(run.dtype, 1, 1) for read in plan.reads]
    while matches:
        size = 0
        group: list[_Match] = []
        while matches and (not group or size < _COPY_BYTES):
            group.append(matches.pop())
            size += int(counts[group[-1].source]) * row_bytes
        chosen = np.zeros(len(counts), bool)
        chosen[[match.source for match in group]] = True
        part = run.select(chosen)
        starts = np.concatenate([[0], np.cumsum(counts * chosen)])
        values = {hook: _stored(part[hook].values, run.dtype) for hook in plan.hooks}
        reads = {name: _raw(part, name) for arrays in wanted for name in arrays}
        for match in group:
            rows = starts[match.source] + match.rows
            yield CapturedRequest(
                id=match.prompt_id,
                token_ids=match.token_ids,
                n_prompt_tokens=match.n_prompt,
                positions=match.positions,
                activations={hook: array[rows] for hook, array in values.items()},
                reads={name: array[rows] for name, array in reads.items()},
            )


def _raw(part: Run, name: str) -> NDArray[Any]:
    """All rows of one array of a view, as they are stored."""
    array = part.plan.spec.arrays()[name]
    return np.concatenate([piece.read(name, array) for span in part.plan.spans for piece in span])


def _stored(rows: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Exact: the values were read from this dtype."""
    return encode_bfloat16(rows) if dtype == "bfloat16" else rows.astype(dtype)
