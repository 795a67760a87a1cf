"""A whole capture job: from a TOML file to a sealed run whose counts reconcile."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from millpond.capture.prompt_file import Prompts, read_prompts
from millpond.store.capture_spec import CaptureJob, read_job
from millpond.store.dtypes import STORED_AS, check_dtype
from millpond.store.errors import CaptureFailed, InvalidInput, RunExists
from millpond.store.hooks import Hook, match_hooks
from millpond.store.lake import Lake, open_lake
from millpond.store.manifest import check_run_name
from millpond.store.reprs import human_bytes
from millpond.store.run import Run
from millpond.store.seal import seal_run

if TYPE_CHECKING:
    from millpond.capture.engine import CaptureEngine


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says of its model."""

    folder: Path
    n_layers: int
    d_model: int
    context: int
    """Longest sequence, in tokens."""
    vocab_size: int
    dtype: str
    weight_bytes: int
    architecture: str


@dataclass(frozen=True)
class CapturePlan:
    """A checked job, before anything was written."""

    job: CaptureJob
    model: ModelFacts
    hooks: tuple[str, ...]
    prompts: Prompts
    rows: int
    """Rows asked of every hook; with generation, the most there can be."""
    max_tokens: int
    """Prompt tokens, and the most that generation may add."""

    @property
    def bytes(self) -> int:
        """Bytes of activations of all hooks."""
        row = self.model.d_model * np.dtype(STORED_AS[self.model.dtype]).itemsize
        return self.rows * len(self.hooks) * row

    def seconds(self) -> float:
        """A rough estimate of the time: the model's arithmetic at a third of this machine's matrix speed, and the start."""
        parameters = self.model.weight_bytes / np.dtype(STORED_AS[self.model.dtype]).itemsize
        side = 1024
        a = np.ones((side, side), np.float32)
        a @ a
        started = time.perf_counter()
        a @ a
        speed = 2 * side**3 / (time.perf_counter() - started)
        return 20 + 3 * 2 * parameters * self.max_tokens / speed

    def summary(self) -> str:
        """What the job will do, in one line a fact."""
        most = "at most " if self.job.capture.max_new_tokens else ""
        return "\n".join(
            [
                f"model    {self.model.architecture}, {self.model.n_layers} layers, d_model {self.model.d_model}, {self.model.dtype}",
                f"hooks    {len(self.hooks)}: {self.hooks[0]} to {self.hooks[-1]}",
                f"prompts  {len(self.prompts.ids):,}, {self.prompts.n_tokens:,} tokens",
                f"rows     {most}{self.rows:,} a hook, {most}{human_bytes(self.bytes)} in all",
                f"time     about {self.seconds():.0f} s",
            ]
        )


@dataclass(frozen=True)
class CaptureSummary:
    """What a capture job did."""

    run_name: str
    prompts: int
    tokens: int
    """Tokens that the model computed."""
    rows: int
    """Rows stored of every hook."""
    bytes: int
    """Bytes of activations of all hooks."""
    seconds: float
    """From the first request to the last row on disk; the engine's start is not in it."""
    startup_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed, captured and stored a second."""
        return self.tokens / self.seconds


def run_capture_file(path: Path, *, resume: bool = False, progress: bool = True) -> CaptureSummary:
    """Run the job in the TOML file `path`; see `run_capture`."""
    return run_capture(plan_capture(read_job(path), resume=resume), resume=resume, progress=progress)


def read_model_facts(job: CaptureJob) -> ModelFacts:
    """What the job's model folder says.

    Raises:
        InvalidInput: the folder is missing, holds no safetensors model, or its dtype cannot be stored.
    """
    folder = Path(job.model.path)
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"model folder {job.model.path!r} has no config.json; give the path of a Hugging Face model folder "
            "(Millpond downloads nothing)"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise InvalidInput(
            f"model folder {job.model.path!r} has no .safetensors weights; save the model as safetensors"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"model folder {job.model.path!r}: config.json cannot be used: {error}") from error
    text = config.get_text_config()
    dtype = str(getattr(text, "dtype", None) or "float32") if job.model.dtype == "auto" else job.model.dtype
    return ModelFacts(
        folder=folder,
        n_layers=int(text.num_hidden_layers),
        d_model=int(text.hidden_size),
        context=int(job.engine.get("max_model_len", text.max_position_embeddings)),
        vocab_size=int(text.vocab_size),
        dtype=check_dtype(dtype.removeprefix("torch.")),
        weight_bytes=sum(path.stat().st_size for path in weights),
        architecture=(config.architectures or [type(config).__name__])[0],
    )


def plan_capture(job: CaptureJob, *, resume: bool = False) -> CapturePlan:
    """Check everything that can be checked before the model is loaded; writes nothing.

    Raises:
        InvalidInput: a field of the job, the model, a prompt or the destination cannot be used.
    """
    model = read_model_facts(job)
    available = [str(Hook(layer, "resid_post")) for layer in range(model.n_layers)]
    hooks = match_hooks(job.capture.hooks, available, f"model {job.model.path!r} offers")
    new = job.capture.max_new_tokens
    # one token is always sampled, so a prompt-only request still needs room for it
    prompts = read_prompts(job.prompts, model.folder, model.context - max(new, 1), model.vocab_size)
    rows = 0
    for prompt_id, tokens in zip(prompts.ids, prompts.token_ids, strict=True):
        computed = len(tokens) + max(new - 1, 0)
        beyond = job.capture.out_of_reach(len(tokens), computed)
        if beyond is not None:
            raise InvalidInput(
                f"capture.positions: {beyond} is outside prompt {prompt_id!r}, which has {len(tokens)} tokens"
            )
        rows += len(job.capture.select(len(tokens), 0, computed))
    if rows == 0:
        raise InvalidInput(
            f"capture.positions {job.capture.positions!r} from position {job.capture.first_position} selects no token of any prompt"
        )
    if prompts.token_labels and new:
        raise InvalidInput(
            "prompts.token_labels name prompt tokens only; set capture.max_new_tokens to 0 or leave them out"
        )
    plan = CapturePlan(job, model, hooks, prompts, rows, prompts.n_tokens + len(prompts.ids) * new)
    _check_destination(plan, resume)
    return plan


def _check_destination(plan: CapturePlan, resume: bool) -> None:
    destination = plan.job.destination
    if destination.shard_rows % destination.chunk_rows:
        raise InvalidInput(
            f"destination.shard_rows {destination.shard_rows} is not a multiple of chunk_rows {destination.chunk_rows}"
        )
    folder = Path(destination.lake.removeprefix("file://"))
    if (folder / "millpond.json").is_file():
        lake = open_lake(folder)
        if not resume or destination.run not in lake:
            lake.check_new(destination.run)
    check_run_name(destination.run)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise InvalidInput(f"destination {destination.lake!r} cannot be written; name a folder that you may write")
    free = shutil.disk_usage(existing).free
    needed = 2 * plan.bytes
    if free < needed:
        raise InvalidInput(
            f"destination {destination.lake!r} has {human_bytes(free)} free, but {human_bytes(plan.bytes)} of activations need "
            f"{human_bytes(needed)} while the run is sealed; free space or capture less"
        )


def run_capture(plan: CapturePlan, *, resume: bool = False, progress: bool = True) -> CaptureSummary:
    """Capture into a new run and seal it.

    A job that fails removes its run. One that is interrupted (Ctrl-C, a kill) leaves an open run with
    what was committed; `resume` goes on from there.

    Raises:
        CaptureFailed: not every row was captured and stored.
        InvalidInput: the destination cannot be used.
    """
    from millpond.capture.engine import CaptureEngine

    job = plan.job
    lake = open_lake(job.destination.lake, create=True)
    done = _open_destination(lake, plan, resume)
    folder = lake.run_folder(job.destination.run)
    started = time.perf_counter()
    engine: CaptureEngine | None = None
    try:
        engine = CaptureEngine(job, folder, plan.model.context)
        startup = time.perf_counter() - started
        todo = [
            (prompt_id, tokens)
            for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True)
            if prompt_id not in done
        ]
        started = time.perf_counter()
        tokens, asked = _feed(engine, plan, iter(todo), progress)
        rows, prompts = engine.commit()
        if (rows, prompts) != (asked, len(todo)):
            raise CaptureFailed(
                f"{rows} rows of {prompts} prompts were stored, but {asked} of {len(todo)} were asked for"
            )
        seconds = time.perf_counter() - started
        run = _seal(folder, plan, asked + sum(done.values()))
    except KeyboardInterrupt:
        if engine is not None:
            engine.commit()
        raise
    except BaseException as error:
        if not done:
            lake.delete(job.destination.run)
        if isinstance(error, OSError):
            raise CaptureFailed(
                f"capture into {job.destination.lake!r} failed: {error.strerror}; nothing was kept"
            ) from error
        if isinstance(error, CaptureFailed | InvalidInput):
            raise
        raise CaptureFailed(
            f"capture failed: {(str(error).strip().splitlines() or [type(error).__name__])[-1]}"
        ) from error
    finally:
        if engine is not None:
            engine.close()
    return CaptureSummary(run.name, len(run.prompts), tokens, run.n_rows, run.nbytes, seconds, startup)


def _feed(
    engine: CaptureEngine, plan: CapturePlan, prompts: Iterator[tuple[str, list[int]]], progress: bool
) -> tuple[int, int]:
    """Send the prompts through the engine; returns tokens computed and rows asked for."""
    lengths = {
        prompt_id: len(tokens) for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True)
    }
    per_row = plan.bytes // plan.rows
    tokens = asked = 0
    with tqdm(total=plan.max_tokens, desc="capture", unit="tok", unit_scale=True, disable=not progress) as bar:
        for prompt_id, n_tokens in engine.run(prompts):
            n_prompt = lengths[prompt_id]
            computed = n_prompt + max(n_tokens - n_prompt - 1, 0)
            tokens += computed
            asked += len(plan.job.capture.select(n_prompt, 0, computed))
            bar.update(n_tokens)
            bar.set_postfix_str(human_bytes(asked * per_row), refresh=False)
    return tokens, asked


def _open_destination(lake: Lake, plan: CapturePlan, resume: bool) -> dict[str, int]:
    """Create the run, or find what an interrupted one holds: prompt ids and their rows."""
    name = plan.job.destination.run
    if resume and name in lake:
        run = lake[name]
        if run.state == "sealed":
            raise RunExists(f"run {name!r} is sealed; there is nothing to resume; choose another name")
        spec = run.plan.spec
        recorded = spec.provenance.get("fingerprint")
        if spec.hooks != plan.hooks or recorded != _fingerprint(plan):
            raise InvalidInput(
                f"run {name!r} was begun with another job; resume it with that one or choose another name"
            )
        return dict(zip(run.prompts["id"], run.prompts["n_rows"].astype(int), strict=True))
    lake.create_run(
        name,
        hooks=plan.hooks,
        d_model=plan.model.d_model,
        dtype=plan.model.dtype,
        chunk_rows=plan.job.destination.chunk_rows,
        shard_rows=plan.job.destination.shard_rows,
        provenance=_provenance(plan),
    )
    return {}


def _seal(folder: Path, plan: CapturePlan, rows: int) -> Run:
    prompts = plan.prompts
    return seal_run(
        folder,
        prompts=prompts.table,
        prompt_labels=plan.job.prompts.prompt_labels,
        token_labels=prompts.token_labels,
        token_label_dtypes=prompts.token_label_dtypes,
        expected_rows=rows,
    )


def _fingerprint(plan: CapturePlan) -> str:
    """A hash of the model's configuration, what is captured and the prompts: equal jobs make equal runs."""
    digest = hashlib.sha256((plan.model.folder / "config.json").read_bytes())
    digest.update(f"{plan.model.weight_bytes} {plan.model.dtype} {plan.job.capture!r}".encode())
    for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True):
        digest.update(prompt_id.encode() + b"\0" + np.array(tokens, "<i4").tobytes())
    return digest.hexdigest()


def _provenance(plan: CapturePlan) -> dict[str, Any]:
    from millpond.capture.versions import check_vllm_version

    tokenizer = plan.model.folder / "tokenizer.json"
    return {
        "model": "/".join(plan.model.folder.resolve().parts[-2:]),
        "architecture": plan.model.architecture,
        "n_layers": plan.model.n_layers,
        "weight_bytes": plan.model.weight_bytes,
        "weights_sha256": {path.name: _sha256(path) for path in sorted(plan.model.folder.glob("*.safetensors"))},
        "tokenizer_sha256": _sha256(tokenizer) if tokenizer.is_file() else None,
        "vllm": check_vllm_version(),
        "millpond": version("millpond"),
        "capture": plan.job.model_dump(mode="json"),
        "fingerprint": _fingerprint(plan),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
