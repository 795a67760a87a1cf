"""Recomputing a sample of a run's rows with Hugging Face, to say how far the stored ones are from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from tqdm.auto import tqdm

from millpond.capture.adapters import merge_adapter
from millpond.capture.provenance import adapter_provenance, model_provenance
from millpond.store.capture_spec import CaptureJob
from millpond.store.errors import InvalidInput
from millpond.store.hooks import parse_hook
from millpond.store.run import Run


@dataclass(frozen=True)
class HookError:
    """How far the stored rows of one hook are from Hugging Face's."""

    hook: str
    max_abs: float
    """Largest absolute difference of any value."""
    mean_abs: float
    relative: float
    """Norm of the difference over the norm of Hugging Face's rows."""
    own_relative: float | None
    """The same of Hugging Face's own run in the run's dtype; None where that is float32."""

    @property
    def ok(self) -> bool:
        """Within 1e-4 in float32, and within twice Hugging Face's own error in a shorter dtype."""
        return self.relative <= (1e-4 if self.own_relative is None else 2 * self.own_relative)


@dataclass(frozen=True)
class ReferenceCheck:
    """The error table of a run."""

    prompts: int
    rows: int
    """Rows compared of every hook."""
    errors: tuple[HookError, ...]

    @property
    def ok(self) -> bool:
        """Whether every hook is."""
        return all(error.ok for error in self.errors)

    def table(self) -> str:
        """One line a hook."""
        lines = [f"{'hook':32}{'max abs':>11}{'mean abs':>11}{'relative':>11}{'Hugging Face':>14}"]
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

    if not run.hooks:
        raise InvalidInput(f"run {run.name!r} keeps reads and no activations; check a run of the model that keeps rows")
    folder, adapter = _computation(run, model, adapter)
    stored = _sample(run, prompts, seed)
    truth = _Model(folder, adapter, torch.float32, run.hooks)
    own = None if run.dtype == "float32" else _Model(folder, adapter, getattr(torch, run.dtype), run.hooks)
    sums = {hook: np.zeros(5) for hook in run.hooks}  # max, sum of abs, sums of squares: difference, truth, own
    rows = 0
    for token_ids, positions, activations in tqdm(stored, desc="reference", unit="prompt", disable=not progress):
        rows += len(positions)
        expected = truth.activations(token_ids)
        theirs = own.activations(token_ids) if own is not None else {}
        for hook in run.hooks:
            right = expected[hook][positions].astype(np.float64)
            difference = np.abs(activations[hook] - right)
            found = sums[hook]
            found[0] = max(found[0], difference.max(initial=0.0))
            found[1:4] += difference.sum(), (difference**2).sum(), (right**2).sum()
            if theirs:
                found[4] += ((theirs[hook][positions] - right) ** 2).sum()
    errors = tuple(
        HookError(
            hook,
            float(found[0]),
            float(found[1] / max(rows * run.d_model, 1)),
            float(np.sqrt(found[2] / found[3])) if found[3] else 0.0,
            None if own is None else float(np.sqrt(found[4] / found[3])) if found[3] else 0.0,
        )
        for hook, found in sums.items()
    )
    return ReferenceCheck(len(stored), rows, errors)


def _computation(run: Run, model: Path | None, adapter: Path | None) -> tuple[Path, Path | None]:
    """The folders of the model and the adapter, after checking that they are what the run was made with."""
    provenance = run.provenance
    if provenance.get("interventions"):
        raise InvalidInput(
            f"run {run.name!r} holds rows with interventions, which Hugging Face does not make; check a run without"
        )
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


def _sample(
    run: Run, n_prompts: int, seed: int
) -> list[tuple[list[int], NDArray[np.int32], dict[str, NDArray[np.float32]]]]:
    """Token ids, positions and stored rows of some prompts that have rows."""
    with_rows = np.flatnonzero((run.prompts["n_rows"] > 0).to_numpy())
    chosen = np.random.default_rng(seed).permutation(with_rows)[:n_prompts]
    marks = np.zeros(len(run.prompts), bool)
    marks[chosen] = True
    part = run.select(marks)
    coordinates = part.tokens.compute()
    values = {hook: part[hook].values for hook in run.hooks}
    from_file = _prompt_file(run)
    taken = []
    end = 0
    for prompt_id, digest, count in part.prompts[["id", "sha256", "n_rows"]].itertuples(index=False, name=None):
        begin, end = end, end + int(count)
        rows = slice(begin, end)
        positions = coordinates["position"].values[rows]
        tokens = _tokens(run, prompt_id, digest, positions, coordinates["token_id"].values[rows], from_file)
        taken.append((tokens, positions, {hook: array[rows] for hook, array in values.items()}))
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


def _prompt_file(run: Run) -> dict[str, list[int]]:
    """The tokens of the prompts of the job that made the run, by id; empty where they cannot be read any more."""
    from millpond.capture.plan import read_model_facts
    from millpond.capture.prompt_file import read_prompts

    try:
        job = CaptureJob.model_validate(run.provenance["capture"])
        model = read_model_facts(job.model_copy(update={"engine": {}}))
        prompts = read_prompts(job.prompts, model.folder, model.context, model.vocab_size)
    except (KeyError, ValidationError, InvalidInput):
        return {}
    return dict(zip(prompts.ids, prompts.token_ids, strict=True))


class _Model:
    """A Hugging Face model with a recorder at every hook."""

    def __init__(self, folder: Path, adapter: Path | None, dtype: Any, hooks: tuple[str, ...]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        if adapter is not None:
            merge_adapter(self._model, adapter)
        self._hooks = hooks

    def activations(self, token_ids: list[int]) -> dict[str, NDArray[np.float32]]:
        """Every hook's values at every position, (n_tokens, d_model)."""
        import torch

        with torch.no_grad(), _recorded(self._model, self._hooks) as seen:
            self._model(torch.tensor([token_ids]), use_cache=False)
        return {hook: value.reshape(len(token_ids), -1).float().numpy() for hook, value in seen.items()}


@contextmanager
def _recorded(model: Any, hooks: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What passes at each hook during a forward pass."""
    from millpond.capture.hook_points import decoder_layers, find_hook_point

    layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    seen: dict[str, Any] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return record

    def after(name: str) -> Callable[..., None]:
        def record(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return record

    for name in hooks:
        point = find_hook_point(layers, parse_hook(name))
        if point.before:
            handles.append(point.module.register_forward_pre_hook(before(name), with_kwargs=True))
        else:
            handles.append(point.module.register_forward_hook(after(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
