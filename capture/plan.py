"""Checking a capture job before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millpond.capture.adapters import Adapter, engine_rank, read_adapter
from millpond.capture.admission import EngineFacts, model_hooks, naming
from millpond.capture.prompt_file import Prompts, read_prompts
from millpond.capture.versions import check_vllm_version, set_environment
from millpond.store.capture_spec import CaptureJob
from millpond.store.dtypes import STORED_AS, check_dtype
from millpond.store.errors import InvalidInput, RunExists, RunNotFound, StorageFailed
from millpond.store.hooks import hook_sort_key, summarize_hooks
from millpond.store.interventions import Intervention, Patch
from millpond.store.lake import open_lake
from millpond.store.manifest import check_run_name
from millpond.store.objects import Storage, open_storage
from millpond.store.posix import LocalStorage
from millpond.store.reads import ReadSpec
from millpond.store.reprs import human_bytes, read_text

_SET_BY_MILLPOND = ("model", "dtype", "worker_cls", "worker_extension_cls", "additional_config")
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_COUNTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", *_PARALLEL)
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")  # as vLLM finds them
_PATIENCE_SECONDS = 10.0  # for a store to answer while a job is checked


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
class Target:
    """One run of a job: all its prompts through one adapter, or through the model without any."""

    run: str
    adapter: Adapter | None


@dataclass(frozen=True)
class CapturePlan:
    """A checked job, before anything was written."""

    job: CaptureJob
    targets: tuple[Target, ...]
    """The runs that the job makes."""
    model: ModelFacts
    hooks: tuple[str, ...]
    reads: tuple[ReadSpec, ...]
    taps: tuple[str, ...]
    """Hooks that are kept, read or intervened at."""
    prompts: Prompts
    rows: int
    """Rows asked of every hook of each run; with generation, the most there can be."""
    max_tokens: int
    """Prompt tokens, and the most that generation may add, of each run."""
    missed: tuple[int, ...]
    """For each intervention, the prompts that lack a position it names, or have no token that it is made at."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all hooks and reads."""
        arrays = [array for read in self.reads for array in read.arrays(self.model.dtype, 1, 1).values()]
        of_hook = self.model.d_model * np.dtype(STORED_AS[self.model.dtype]).itemsize
        return of_hook * len(self.hooks) + sum(array.row_bytes for array in arrays)

    @property
    def bytes(self) -> int:
        """Bytes of activations and reads of all runs."""
        return self.rows * self.row_bytes * len(self.targets)

    def seconds(self) -> float:
        """A rough estimate of the time: the model's arithmetic at a third of this machine's matrix speed, and the start."""
        parameters = self.model.weight_bytes / np.dtype(STORED_AS[self.model.dtype]).itemsize
        side = 1024
        a = np.ones((side, side), np.float32)
        a @ a
        started = time.perf_counter()
        a @ a
        speed = 2 * side**3 / (time.perf_counter() - started)
        return 20 + 3 * 2 * parameters * self.max_tokens * len(self.targets) / speed

    def summary(self) -> str:
        """What the job will do, in one line a fact."""
        most = "at most " if self.job.capture.max_new_tokens else ""
        return "\n".join(
            [
                f"model    {self.model.architecture}, {self.model.n_layers} layers, d_model {self.model.d_model}, {self.model.dtype}",
                *([f"hooks    {len(self.hooks)}: {summarize_hooks(self.hooks)}"] if self.hooks else []),
                *(f"read     {read_text(read)}" for read in self.reads),
                f"prompts  {len(self.prompts.ids):,}, {self.prompts.n_tokens:,} tokens",
                *(f"missed   {told}" for told in told_misses(self.missed, len(self.prompts.ids))),
                f"rows     {most}{self.rows:,} a hook, {most}{human_bytes(self.bytes)} in all",
                f"runs     {', '.join(target.run for target in self.targets)}",
                f"time     about {self.seconds():.0f} s",
            ]
        )


def told_misses(missed: Sequence[int], n_prompts: int) -> list[str]:
    """In words, which interventions miss how many of the prompts."""
    return [
        f"intervene.{number}: {count:,} of {n_prompts:,} prompts lack some or all of its positions"
        for number, count in enumerate(missed)
        if count
    ]


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
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    for path in weights:
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InvalidInput(f"{path} is no safetensors file ({error}); copy or save the model again") from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config()
        n_layers, d_model = int(text.num_hidden_layers), int(text.hidden_size)
        context, vocab_size = int(text.max_position_embeddings), int(text.vocab_size)
        if min(n_layers, d_model, context, vocab_size) < 1:
            raise ValueError("a size is not positive")
    except Exception as error:  # transformers raises a dozen kinds of errors here
        raise InvalidInput(
            f"model folder {job.model.path!r}: config.json cannot be used: {' '.join(str(error).split())}"
        ) from error
    dtype = str(getattr(text, "dtype", None) or "float32") if job.model.dtype == "auto" else job.model.dtype
    return ModelFacts(
        folder=folder,
        n_layers=n_layers,
        d_model=d_model,
        context=_check_engine(job, context, any(getattr(text, name, None) for name in _EXPERTS)),
        vocab_size=vocab_size,
        dtype=check_dtype(dtype.removeprefix("torch.")),
        weight_bytes=sum(path.stat().st_size for path in weights),
        architecture=(config.architectures or [type(config).__name__])[0],
    )


def _check_engine(job: CaptureJob, context: int, has_experts: bool) -> int:
    """The longest sequence that the engine of `job` will take, in tokens, after checking its other arguments."""
    if not job.engine:
        return context
    check_vllm_version()
    set_environment()
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name, value in job.engine.items():
        if name in _SET_BY_MILLPOND:
            raise InvalidInput(f"engine.{name} is set by Millpond; leave it out (model and dtype belong into [model])")
        if name not in known:
            raise InvalidInput(f"engine.{name} is no engine argument of this vLLM; check its name")
        if name.startswith("data_parallel_") and name != "data_parallel_size":
            raise InvalidInput(f"engine.{name} cannot be set: a job's engines run on one machine; leave it out")
        if name == "speculative_config":
            raise InvalidInput("engine.speculative_config cannot be combined with capture yet; leave it out")
        if name in _COUNTS:
            limit = context if name == "max_model_len" else 1024 if name in _PARALLEL else 1 << 20
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise InvalidInput(f"engine.{name} is {value!r}; give a whole number from 1 to {limit}")
        if name == "data_parallel_size" and value > 1 and has_experts:
            raise InvalidInput(
                f"engine.{name} is {value}: engines of a mixture of experts compute every step together, which capture does not "
                "support; leave it out, and start several captures, which may share the lake"
            )
    return int(job.engine.get("max_model_len", context))


def plan_capture(job: CaptureJob, *, resume: bool = False) -> CapturePlan:
    """Check everything that can be checked before the model is loaded; writes nothing.

    Raises:
        InvalidInput: a field of the job, the model, a prompt or the destination cannot be used.
    """
    model = read_model_facts(job)
    hooks = model_hooks(job.capture.hooks, model.n_layers, f"capture.hooks: model {job.model.path!r} offers")
    new = job.capture.max_new_tokens
    if new >= model.context:
        raise InvalidInput(
            f"capture.max_new_tokens is {new}; the model's context has {model.context} tokens: give less"
        )
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
        known = np.array(tokens, np.int32) if computed == len(tokens) else None  # generated ones are not
        rows += len(job.capture.select(len(tokens), 0, computed, known))
    if rows == 0:
        raise InvalidInput(
            f"capture.positions {job.capture.positions!r} from position {job.capture.first_position} selects no token of any prompt"
        )
    if prompts.token_labels and new:
        raise InvalidInput(
            "prompts.token_labels name prompt tokens only; set capture.max_new_tokens to 0 or leave them out"
        )
    targets = _targets(job)
    facts = _facts(job, model)
    for number, name in enumerate(job.destination.reuse):
        if facts.lake is None or name not in facts.lake:
            held = ", ".join(facts.lake.runs()[:10]) if facts.lake is not None else ""
            raise RunNotFound(
                f"destination.reuse.{number}: lake {job.destination.lake!r} has no run {name!r}; it holds {held or 'no runs yet'}: "
                "leave it out or name another"
            )
    reads = facts.readers.resolve(job.capture.reads, facts.hooks)
    taps = {*hooks, *(read.hook for read in reads), *_check_interventions(job, facts, model.n_layers, prompts)}
    missed = tuple(_missed(intervention, prompts, max(new - 1, 0)) for intervention in job.intervene)
    ordered = tuple(sorted(taps, key=hook_sort_key))
    plan = CapturePlan(
        job, targets, model, hooks, reads, ordered, prompts, rows, prompts.n_tokens + len(prompts.ids) * new, missed
    )
    _check_destination(plan, resume)
    return plan


def _facts(job: CaptureJob, model: ModelFacts) -> EngineFacts:
    """An engine with a tap at every hook point of the model, and the job's lake if there is one."""
    every = model_hooks(["*"], model.n_layers)
    storage = _destination(job)
    try:
        lake = storage.url if storage.exists("millpond.json") else None
    except StorageFailed as error:
        raise InvalidInput(f"destination.lake {job.destination.lake!r} cannot be used: {error}") from error
    return EngineFacts(lake, None, every, model.d_model, model.dtype, 0, 0, None)


def _check_interventions(job: CaptureJob, facts: EngineFacts, n_layers: int, prompts: Prompts) -> set[str]:
    """The hooks that are intervened at, after checking that every intervention can be made."""
    taps = set()
    more = max(job.capture.max_new_tokens - 1, 0)
    for number, intervention in enumerate(job.intervene):
        where = f"model {job.model.path!r} offers"
        with naming(f"intervene.{number}"):
            for hook in model_hooks([intervention.hook], n_layers, where):
                taps.add(hook)
                for tokens in prompts.token_ids if isinstance(intervention, Patch) else prompts.token_ids[:1]:
                    facts.edits.make(intervention, hook, len(tokens))
            if not any(len(intervention.select(len(ids), 0, len(ids) + more)) for ids in prompts.token_ids):
                raise InvalidInput(
                    f"positions {intervention.positions!r} from position {intervention.first_position} are of no token of any prompt"
                )
    return taps


def _missed(intervention: Intervention, prompts: Prompts, more: int) -> int:
    """Prompts that an intervention misses, wholly or in part, if each generates `more` computed tokens."""
    if intervention.token_ids is None:
        lengths = Counter(map(len, prompts.token_ids))
        return sum(count for length, count in lengths.items() if intervention.misses(length, length + more))
    unknown = [-1] * more
    return sum(
        intervention.misses(len(ids), len(ids) + more, np.array([*ids, *unknown], np.int32))
        for ids in prompts.token_ids
    )


def _targets(job: CaptureJob) -> tuple[Target, ...]:
    """The runs of a job.

    Raises:
        InvalidInput: an adapter cannot be used, or a run is named twice.
    """
    asked = [("model.adapter", job.destination.run, job.model.adapter)]
    asked += [(f"paired.{number}.adapter", paired.run, paired.adapter) for number, paired in enumerate(job.paired)]
    names = [run for _, run, _ in asked]
    for name in names:
        check_run_name(name)
        if names.count(name) > 1:
            raise InvalidInput(f"run {name!r} is named twice by destination.run and paired; give each its own name")
    targets = []
    for field, run, folder in asked:
        adapter = None if folder is None else read_adapter(folder, field)
        if adapter is not None:
            engine_rank(adapter.rank)
        targets.append(Target(run, adapter))
    return tuple(targets)


def _destination(job: CaptureJob) -> Storage:
    """The objects of the job's lake, whether or not there is one.

    Raises:
        InvalidInput: it is no folder and no S3 URL.
    """
    given = job.destination.lake
    if not given or "\0" in given or given.startswith("memory://"):
        raise InvalidInput(f"destination.lake is {given!r}; give a folder or s3://bucket/prefix")
    try:
        if given.startswith("s3"):
            return open_storage(given, retry_timeout_s=_PATIENCE_SECONDS)
        return open_storage(given)
    except InvalidInput as error:
        raise InvalidInput(f"destination.lake: {error}") from error


def _check_runs(plan: CapturePlan, resume: bool) -> None:
    lake = open_lake(plan.job.destination.lake)  # refuses what is no lake
    for target in plan.targets:
        if resume and target.run in lake:
            continue
        if target.run in lake and lake[target.run].state == "open":
            raise RunExists(
                f"run {target.run!r} exists in the lake {lake.url!r} and is open; go on with it if this job began it: millpond "
                f"capture JOB --resume; or choose another name, or remove it with: millpond rm {lake.url} {target.run}"
            )
        lake.check_new(target.run)


def _check_destination(plan: CapturePlan, resume: bool) -> None:
    destination = plan.job.destination
    if destination.shard_rows % destination.chunk_rows:
        raise InvalidInput(
            f"destination.shard_rows {destination.shard_rows} is not a multiple of chunk_rows {destination.chunk_rows}"
        )
    storage = _destination(plan.job)
    if not isinstance(storage, LocalStorage):
        if any(True for _ in storage.list()):
            _check_runs(plan, resume)
        return
    folder = storage.path
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_runs(plan, resume)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InvalidInput(f"destination {destination.lake!r} cannot be written; name a folder that you may write")
    free = shutil.disk_usage(existing).free
    needed = 2 * plan.bytes
    if free < needed:
        raise InvalidInput(
            f"destination {destination.lake!r} has {human_bytes(free)} free, but {human_bytes(plan.bytes)} of activations need "
            f"{human_bytes(needed)} while the run is sealed; free space or capture less"
        )
