"""`millpond worker`: a running engine that takes capture and generation jobs from a queue, one after the other."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from millpond.capture.adapters import Adapter, read_adapter
from millpond.capture.admission import model_hooks
from millpond.capture.engine import CaptureEngine
from millpond.capture.generation import capture_like, run_generation
from millpond.capture.interrupts import held_back
from millpond.capture.job import CaptureSummary, run_capture
from millpond.capture.judging import run_judging
from millpond.capture.lock import LEASE_SECONDS
from millpond.capture.losses import run_losses
from millpond.capture.plan import CapturePlan, ModelFacts, plan_capture, read_model_facts
from millpond.store.capture_spec import CaptureJob, ModelSection, first_problem
from millpond.store.errors import CaptureFailed, InvalidInput, LakeCorrupt, LeaseLost, RunBusy
from millpond.store.generation import GenerationJob, JudgeJob
from millpond.store.hooks import summarize_hooks
from millpond.store.interventions import SpliceSae
from millpond.store.lake import open_lake
from millpond.store.logs import of_job
from millpond.store.losses import LossJob
from millpond.store.objects import open_storage
from millpond.store.posix import LocalStorage
from millpond.store.queue import JobQueue, QueuedJob

logger = logging.getLogger(__name__)
Parsed = TypeVar("Parsed", bound=BaseModel)
KINDS = ("capture", "generate", "judge", "sae_cross_entropy")


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker's engine can do; jobs of other models are left to their workers, others that it cannot do are failed."""

    model: ModelSection
    lake: str
    """Path or URL."""
    hooks: tuple[str, ...]
    """Names or globs of the hook points that are tapped; jobs may keep fewer."""
    engine: dict[str, Any]
    """Further vLLM engine arguments."""
    max_adapters: int = 0
    """LoRA adapters in one batch; 0 refuses jobs with adapters."""
    max_rank: int = 16
    kinds: tuple[str, ...] = ("capture",)
    """Of `KINDS`: the jobs that are taken; a queue's token must allow them."""
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0


def work(
    queue: JobQueue, config: WorkerConfig, *, until_empty: bool = False, told: Callable[[str], None] = print
) -> int:
    """Take jobs until interrupted, or until there are none; returns how many ended well.

    A job whose worker was killed is claimed again when its lease has run out, and goes on where its runs
    stopped. A worker that lost its lease stops the job at once and lets the other one have it.

    Raises:
        InvalidInput: the configuration cannot be used.
        CaptureFailed: the engine died; the job under way is left for another worker.
    """
    job = CaptureJob.model_validate(
        {
            "model": config.model,
            "capture": {"hooks": config.hooks},
            "prompts": {"path": ""},
            "destination": {"lake": config.lake, "run": "none"},
            "engine": config.engine,
        }
    )
    if not config.kinds or not set(config.kinds) <= set(KINDS):
        raise InvalidInput(f"kinds {' '.join(config.kinds)!r}: give some of {', '.join(KINDS)}")
    facts = read_model_facts(job)
    hooks = model_hooks(config.hooks, facts.n_layers, f"hooks: model {config.model.path!r} offers")
    open_lake(config.lake, create=True)
    name, serves = f"{socket.gethostname()}:{os.getpid()}", base_names(config.model)
    engine = CaptureEngine(
        facts,
        open_storage(config.lake).url,
        hooks,
        config.engine,
        max_adapters=config.max_adapters,
        max_rank=config.max_rank,
    )
    told(f"worker {name}: {facts.architecture} is ready")
    ended = 0
    try:
        with held_back() as check:
            while True:
                check()
                claimed = queue.claim(name, set(config.kinds), config.lease_seconds, serves)
                if claimed is not None:
                    engine.tell_job(claimed.id)
                    with of_job(claimed.id):
                        ended += _run(queue, claimed, config, facts, engine, told)
                elif until_empty:
                    return ended
                else:
                    time.sleep(config.poll_seconds)
    finally:
        engine.close()


def base_names(model: ModelSection) -> set[str]:
    """What jobs may call the model that a worker here runs: its folder as given, whole, from here, and behind links."""
    path = Path(model.path)
    folders = (path, path.absolute(), os.path.relpath(path), path.resolve())
    return {model.model_copy(update={"path": str(folder)}).base for folder in folders}


def _run(
    queue: JobQueue,
    claimed: QueuedJob,
    config: WorkerConfig,
    facts: ModelFacts,
    engine: CaptureEngine,
    told: Callable[[str], None],
) -> bool:
    """Run one claimed job and tell the queue; whether it ended well."""
    told(f"job {claimed.id}: attempt {claimed.attempts}")
    try:
        with _heartbeats(queue, claimed, config.lease_seconds) as beat:
            if claimed.kind == "generate":
                result, told_of = _generate(claimed, config, engine, beat)
            elif claimed.kind == "judge":
                result, told_of = _judge(claimed, config, facts, engine, beat)
            elif claimed.kind == "sae_cross_entropy":
                result, told_of = _losses(claimed, config, facts, engine, beat)
            else:
                patience = LEASE_SECONDS + 2 * config.lease_seconds
                done = _capture(_plan(_parsed(CaptureJob, claimed), config, engine), engine, beat, patience)
                result = {
                    name: getattr(done, name) for name in ("prompts", "tokens", "rows", "bytes", "reused", "missed")
                }
                told_of = f"{done.rows:,} rows of {done.prompts:,} prompts in {done.seconds:.1f} s"
        queue.finish(claimed, result)
    except LeaseLost as error:
        told(f"job {claimed.id}: {error}")
        return False
    except (InvalidInput, CaptureFailed, LakeCorrupt) as error:
        reason = " ".join(str(error).split())
        told(f"job {claimed.id}: {reason}")
        if isinstance(error, CaptureFailed):
            engine.check_alive()  # a dead engine is no fault of the job: another worker goes on with it
        with suppress(LeaseLost):
            queue.fail(claimed, f"{type(error).__name__}: {reason}")
        return False
    told(f"job {claimed.id}: finished, {told_of}")
    return True


def _generate(
    claimed: QueuedJob, config: WorkerConfig, engine: CaptureEngine, beat: Callable[[int], None]
) -> tuple[dict[str, Any], str]:
    """Complete the prompts of the claimed job: its result, and what is told of it."""
    job, started = _parsed(GenerationJob, claimed), time.monotonic()
    if job.sampling.temperature > 0 and job.sampling.seed is not None and not engine.takes_seeds:
        raise InvalidInput(
            "sampling.seed: vLLM's CPU engine cannot draw with a seed; leave it out, or temperature at 0"
        )
    plan = _plan(capture_like(job, engine.hooks[0]), config, engine)
    count = run_generation(plan, job.sampling, engine, claimed.id, beat)
    return {"completions": count}, f"{count:,} completions in {time.monotonic() - started:.1f} s"


def _judge(
    claimed: QueuedJob, config: WorkerConfig, facts: ModelFacts, engine: CaptureEngine, beat: Callable[[int], None]
) -> tuple[dict[str, Any], str]:
    """Judge the completions of the claimed job: its result, and what is told of it."""
    job, started = _parsed(JudgeJob, claimed), time.monotonic()
    adapter = _checked(job.model, job.lake, config, engine)
    count = run_judging(job, engine, adapter, facts.context, claimed.id, beat)
    return {"judged": count}, f"{count:,} completions judged in {time.monotonic() - started:.1f} s"


def _losses(
    claimed: QueuedJob, config: WorkerConfig, facts: ModelFacts, engine: CaptureEngine, beat: Callable[[int], None]
) -> tuple[dict[str, Any], str]:
    """Measure what the claimed job's autoencoder costs the model: its result, and what is told of it."""
    job, started = _parsed(LossJob, claimed), time.monotonic()
    adapter = _checked(job.model, job.lake, config, engine)
    count = run_losses(job, engine, facts, adapter, claimed.id, beat)
    return {"prompts": count}, f"{count:,} prompts measured in {time.monotonic() - started:.1f} s"


def _checked(model: ModelSection, lake: str, config: WorkerConfig, engine: CaptureEngine) -> Adapter | None:
    """The adapter of a job, which is for this worker's model and lake."""
    _check_model(model, config)
    _check_lake(lake, config)
    adapter = None if model.adapter is None else read_adapter(model.adapter, "model.adapter")
    if adapter is not None:
        _check_adapter(adapter, engine)
    return adapter


@contextmanager
def _heartbeats(queue: JobQueue, claimed: QueuedJob, lease_seconds: float) -> Iterator[Callable[[int], None]]:
    """Renew the lease in the background; hashing weights and sealing may take longer than it lasts.

    The function that is yielded takes the prompts done so far, and raises LeaseLost once the lease is lost.
    """
    done, ended = 0, threading.Event()
    lost: list[LeaseLost] = []

    def renew() -> None:
        while not ended.wait(lease_seconds / 4):
            try:
                queue.heartbeat(claimed, lease_seconds, {"prompts": done})
            except LeaseLost as error:
                lost.append(error)
                return
            except Exception as error:  # a queue that cannot be reached may come back before the lease runs out
                logger.warning("job %s: no heartbeat: %s", claimed.id, error)

    def beat(prompts: int) -> None:
        nonlocal done
        done = prompts
        if lost:
            raise lost[0]

    thread = threading.Thread(target=renew, name="millpond-heartbeat", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        ended.set()
        thread.join()


def _capture(
    plan: CapturePlan, engine: CaptureEngine, beat: Callable[[int], None], patience_seconds: float
) -> CaptureSummary:
    """Run the job, waiting a while if the run is still held: by a worker that lost its lease, or for one that was killed."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return run_capture(plan, resume=True, keep=True, progress=False, engine=engine, beat=beat)
        except RunBusy:
            if time.monotonic() > deadline:
                raise
            beat(0)
            time.sleep(0.5)


def _parsed(kind: type[Parsed], claimed: QueuedJob) -> Parsed:
    try:
        return kind.model_validate(claimed.spec)
    except ValidationError as error:
        raise InvalidInput(first_problem(error, kind)) from error


def _plan(job: CaptureJob, config: WorkerConfig, engine: CaptureEngine) -> CapturePlan:
    """The job's plan, checked against this worker's engine.

    Raises:
        InvalidInput: it cannot be done here.
    """
    if job.engine:
        raise InvalidInput(f"engine.{min(job.engine)} cannot be set for a running worker; leave [engine] out")
    _check_model(job.model, config)
    _check_lake(job.destination.lake, config)
    plan = plan_capture(job.model_copy(update={"engine": config.engine}), resume=True)
    missing = [hook for hook in plan.taps if hook not in engine.hooks]
    if missing:
        raise InvalidInput(
            f"capture.hooks: this worker has no tap at {missing[0]}, only at {summarize_hooks(engine.hooks)}"
        )
    if engine.on_device and any(isinstance(one, SpliceSae) for one in job.intervene):
        raise InvalidInput(
            "intervene: this worker's CUDA graphs hold no SAE; run the job with millpond capture, whose engine is made for it"
        )
    for target in plan.targets:
        if target.adapter is not None:
            _check_adapter(target.adapter, engine)
    return plan


def _check_model(model: ModelSection, config: WorkerConfig) -> None:
    if Path(model.path).resolve() != Path(config.model.path).resolve() or model.dtype != config.model.dtype:
        raise InvalidInput(
            f"model.path {model.path!r} with dtype {model.dtype!r}: this worker runs {config.model.path!r} with "
            f"{config.model.dtype!r}; start a worker for that model"
        )


def _check_lake(lake: str, config: WorkerConfig) -> None:
    if _place(lake) != _place(config.lake):
        raise InvalidInput(f"destination.lake is {lake!r}; this worker writes {config.lake!r}")


def _check_adapter(adapter: Adapter, engine: CaptureEngine) -> None:
    if adapter.rank > engine.max_rank:
        raise InvalidInput(
            f"adapter {adapter.name!r} has rank {adapter.rank}; this worker takes adapters up to rank "
            f"{engine.max_rank}: start one with --max-adapters and --max-rank"
        )


def _place(lake: str) -> str:
    storage = open_storage(lake)
    return str(storage.path.resolve()) if isinstance(storage, LocalStorage) else storage.url
