"""Recomputing a sample of a run's rows with Hugging Face, to say how far the stored ones are from it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from tqdm.auto import tqdm

from millpond.capture.admission import model_hooks
from millpond.capture.edits import Edits
from millpond.capture.hugging_face import HuggingFaceModel
from millpond.capture.provenance import adapter_provenance, model_provenance
from millpond.capture.reference_reads import ReferenceRead
from millpond.store.capture_spec import CaptureJob
from millpond.store.errors import InvalidInput
from millpond.store.hooks import match_hooks
from millpond.store.interventions import Intervention
from millpond.store.run import Run

_ROWS, _READS = 1e-4, 1e-3
"""Largest relative errors in float32; a read is a product, in which rows may cancel."""


@dataclass(frozen=True)
class HookError:
    """How far the stored rows of one hook, or the values of one array of a read, are from Hugging Face's."""

    hook: str
    """Or the name of the array."""
    max_abs: float
    """Largest absolute difference of any value."""
    mean_abs: float
    relative: float
    """Norm of the difference over the norm of what Hugging Face gives."""
    own_relative: float | None
    """The same of Hugging Face's own run in the run's dtype; None where that is float32."""
    limit: float = _ROWS
    """Largest `relative` in float32."""

    @property
    def ok(self) -> bool:
        """Within `limit` in float32, and within twice Hugging Face's own error in a shorter dtype."""
        return self.relative <= (self.limit if self.own_relative is None else 2 * self.own_relative)


@dataclass(frozen=True)
class ReferenceCheck:
    """The error table of a run."""

    prompts: int
    rows: int
    """Rows compared of every hook and read."""
    errors: tuple[HookError, ...]

    @property
    def ok(self) -> bool:
        """Whether every hook is."""
        return all(error.ok for error in self.errors)

    def table(self) -> str:
        """One line a hook, and one an array of a read."""
        lines = [f"{'hook or read':32}{'max abs':>11}{'mean abs':>11}{'relative':>11}{'Hugging Face':>14}"]
        for error in self.errors:
            own = "float32" if error.own_relative is None else f"{error.own_relative:.2e}"
            lines.append(
                f"{error.hook:32}{error.max_abs:11.2e}{error.mean_abs:11.2e}{error.relative:11.2e}{own:>14}"
                f"{'' if error.ok else '  too far'}"
            )
        return "\n".join(lines)


def check_reference(
    run: Run,
    *,
    model: Path | None = None,
    adapter: Path | None = None,
    prompts: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> ReferenceCheck:
    """Recompute the rows of some prompts with Hugging Face in float32 and compare them with the stored ones.

    Args:
        run: open or sealed.
        model: folder of the model, where it is not the one that the run names.
        adapter: likewise of the adapter.
        prompts: how many, drawn at random with `seed`.
        seed: of the draw.
        progress: show a bar.

    Raises:
        InvalidInput: the model is not there or not the same, or the tokens cannot be known.
    """
    import torch

    folder, adapter = _computation(run, model, adapter)
    edits = Edits(run.lake, run.d_model)
    interventions = _interventions(run)
    reads = [ReferenceRead(spec, run.lake, run.d_model, run.dtype) for spec in run.plan.spec.reads]
    hooks = tuple(dict.fromkeys((*run.hooks, *(read.spec.hook for read in reads))))
    stored = _sample(run, prompts, seed)
    truth = HuggingFaceModel(folder, adapter, torch.float32, hooks, interventions, edits)
    own = None
    if run.dtype != "float32":
        own = HuggingFaceModel(folder, adapter, getattr(torch, run.dtype), hooks, interventions, edits)
    tallies: defaultdict[str, _Tally] = defaultdict(_Tally)
    for sample in tqdm(stored, desc="reference", unit="prompt", disable=not progress):
        exact = {hook: x[sample.positions] for hook, x in truth.activations(sample.token_ids, sample.n_prompt).items()}
        theirs = None
        if own is not None:
            theirs = {
                hook: x[sample.positions] for hook, x in own.activations(sample.token_ids, sample.n_prompt).items()
            }
        for hook in run.hooks:
            right = exact[hook].astype(np.float64)
            tallies[hook].add(sample.rows[hook] - right, right, None if theirs is None else theirs[hook] - right)
        for read in reads:
            rows = exact[read.spec.hook]
            rounded = None if theirs is None else read.compare(read.of(theirs[read.spec.hook]), rows)
            for name, found in read.compare(sample.reads[read.spec.name], rows).items():
                tallies[name].add(found.difference, found.truth, None if rounded is None else rounded[name].difference)
    errors = tuple(tally.error(name, _ROWS if name in run.hooks else _READS) for name, tally in tallies.items())
    return ReferenceCheck(len(stored), sum(len(sample.positions) for sample in stored), errors)


@dataclass
class _Tally:
    """The differences of one line of the table."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    squares: float = 0.0
    truth: float = 0.0
    own: float | None = None

    def add(self, difference: NDArray[Any], truth: NDArray[Any], own: NDArray[Any] | None) -> None:
        self.largest = max(self.largest, np.abs(difference).max(initial=0.0))
        self.total += np.abs(difference).sum()
        self.count += difference.size
        self.squares += (difference**2).sum()
        self.truth += (truth**2).sum()
        if own is not None:
            self.own = (self.own or 0.0) + (own**2).sum()

    def error(self, name: str, limit: float) -> HookError:
        norm = float(np.sqrt(self.truth)) or 1.0
        return HookError(
            name,
            float(self.largest),
            float(self.total / max(self.count, 1)),
            float(np.sqrt(self.squares) / norm),
            None if self.own is None else float(np.sqrt(self.own) / norm),
            limit,
        )


def _interventions(run: Run) -> list[tuple[str, Intervention]]:
    """The hook points that the run's requests were intervened at, with what was done there, in order."""
    given = TypeAdapter(list[Intervention]).validate_python(run.provenance.get("interventions") or [])
    if not given:
        return []
    # a server intervenes where it has taps, a job makes taps for its interventions
    taps = run.provenance.get("taps") or model_hooks(["*"], run.provenance["n_layers"])
    where = f"run {run.name!r} was intervened at, but its model has"
    return [(hook, one) for one in given for hook in match_hooks(one.hook, taps, where)]


def _computation(run: Run, model: Path | None, adapter: Path | None) -> tuple[Path, Path | None]:
    """The folders of the model and the adapter, after checking that they are what the run was made with."""
    provenance = run.provenance
    job = provenance.get("capture") or {}
    named = provenance.get("folder") or job.get("model", {}).get("path")
    folder = model or (Path(named) if named else None)
    if folder is None or not (folder / "config.json").is_file():
        raise InvalidInput(f"run {run.name!r}: its model is not at {str(folder)!r}; name its folder with --model")
    found = model_provenance(folder)
    for field in ("config_sha256", "weights_sha256"):
        if field in provenance and found[field] != provenance[field]:
            raise InvalidInput(
                f"model {str(folder)!r} is not the one that run {run.name!r} was made with: {field} differs"
            )
    wanted: Mapping[str, Any] | None = provenance.get("adapter")
    if wanted is None:
        return folder, None
    where = adapter or (Path(wanted["folder"]) if wanted.get("folder") else None)
    if where is None or not where.is_dir():
        raise InvalidInput(f"run {run.name!r}: its adapter is not at {str(where)!r}; name its folder with --adapter")
    if adapter_provenance(wanted["name"], where)["sha256"] != wanted["sha256"]:
        raise InvalidInput(f"adapter {str(where)!r} is not the one that run {run.name!r} was made with")
    return folder, where


@dataclass(frozen=True)
class _Sample:
    """One prompt that has rows."""

    token_ids: list[int]
    """Up to the last row's."""
    n_prompt: int
    positions: NDArray[np.int32]
    rows: dict[str, NDArray[np.float32]]
    reads: dict[str, dict[str, NDArray[Any]]]


def _sample(run: Run, n_prompts: int, seed: int) -> list[_Sample]:
    with_rows = np.flatnonzero((run.prompts["n_rows"] > 0).to_numpy())
    chosen = np.random.default_rng(seed).permutation(with_rows)[:n_prompts]
    marks = np.zeros(len(run.prompts), bool)
    marks[chosen] = True
    part = run.select(marks)
    coordinates = part.tokens.compute()
    values = {hook: part[hook].values for hook in run.hooks}
    reads = {name: {str(key): array.values for key, array in part.reads[name].data_vars.items()} for name in part.reads}
    from_file = prompts_of_job(run)
    taken = []
    end = 0
    columns = part.prompts[["id", "sha256", "n_prompt_tokens", "n_rows"]]
    for prompt_id, digest, n_prompt, count in columns.itertuples(index=False, name=None):
        begin, end = end, end + int(count)
        rows = slice(begin, end)
        positions = coordinates["position"].values[rows]
        tokens = _tokens(run, prompt_id, digest, positions, coordinates["token_id"].values[rows], from_file)
        taken.append(
            _Sample(
                tokens,
                int(n_prompt),
                positions,
                {hook: array[rows] for hook, array in values.items()},
                {name: {key: array[rows] for key, array in arrays.items()} for name, arrays in reads.items()},
            )
        )
    return taken


def _tokens(
    run: Run,
    prompt_id: str,
    digest: str,
    positions: NDArray[np.int32],
    token_ids: NDArray[np.int32],
    from_file: dict[str, list[int]],
) -> list[int]:
    """Every token up to the last row's: those of the rows, and the others from the job's prompt file."""
    last = int(positions[-1])
    known = np.full(last + 1, -1, np.int32)
    prompt = from_file.get(prompt_id, [])
    if hashlib.sha256(np.array(prompt, "<i4").tobytes()).hexdigest() == digest:
        known[: len(prompt)] = prompt[: last + 1]
    known[positions] = token_ids
    if (known < 0).any():
        raise InvalidInput(
            f"run {run.name!r}: prompt {prompt_id!r} was kept at some positions only, and its other tokens are not known: "
            "the prompt file of its job is gone or changed; check a run that keeps all positions"
        )
    return known.tolist()


def prompts_of_job(run: Run) -> dict[str, list[int]]:
    """The tokens of the prompts of the job that made the run, by id; empty where they cannot be read any more."""
    from millpond.capture.plan import read_model_facts
    from millpond.capture.prompt_file import read_prompts

    try:
        job = CaptureJob.model_validate(run.provenance["capture"])
        model = read_model_facts(job.model_copy(update={"engine": {}}))
        # provenance says every field; a column that the job did not name may be missing
        section = job.prompts.model_validate(job.prompts.model_dump(exclude_defaults=True))
        prompts = read_prompts(section, model.folder, model.context, model.vocab_size)
    except (KeyError, ValidationError, InvalidInput):
        return {}
    return dict(zip(prompts.ids, prompts.token_ids, strict=True))
