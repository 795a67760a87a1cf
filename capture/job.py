"""A whole capture job: from a TOML file to a sealed run whose counts reconcile."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from millpond.capture.interrupts import held_back
from millpond.capture.lock import only_capture
from millpond.capture.plan import CapturePlan, Target, plan_capture
from millpond.capture.prompt_file import Prompts
from millpond.capture.provenance import COMPUTATION, adapter_provenance, model_provenance
from millpond.capture.reuse import reuse_rows
from millpond.store.capture_spec import CaptureWish, RequestArgs, read_job
from millpond.store.configuration import check_quota, read_configuration
from millpond.store.errors import CaptureFailed, InvalidInput, LeaseLost, RunBusy
from millpond.store.interventions import SpliceSae
from millpond.store.lake import Lake, open_lake
from millpond.store.objects import Storage, open_storage
from millpond.store.reprs import human_bytes
from millpond.store.run import Run
from millpond.store.seal import seal_run

if TYPE_CHECKING:
    from millpond.capture.engine import CaptureEngine, CaptureRequest


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
    reused: int = 0
    """Prompts whose rows were taken from other runs."""
    missed: tuple[int, ...] = ()
    """For each intervention, the prompts that lack a position it names, or have no token that it is made at."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed, captured and stored a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def run_capture_file(path: Path, *, resume: bool = False, progress: bool = True) -> CaptureSummary:
    """Run the job in the TOML file `path`; see `run_capture`."""
    return run_capture(plan_capture(read_job(path), resume=resume), resume=resume, progress=progress)


def run_capture(
    plan: CapturePlan,
    *,
    resume: bool = False,
    keep: bool = False,
    progress: bool = True,
    engine: CaptureEngine | None = None,
    beat: Callable[[int], None] = lambda prompts: None,
) -> CaptureSummary:
    """Capture into new runs and seal them.

    A capture that fails removes the runs it made. What is interrupted (Ctrl-C, a kill), and what fails
    after every row was stored, leaves open runs with what was committed; `resume` goes on from there.

    Args:
        plan: the checked job.
        resume: go on with open runs of the same job, and take sealed ones as done.
        keep: leave the runs of a capture that fails open, to be resumed.
        progress: show a bar.
        engine: a running one of the plan's model that taps its hooks; started for this job, and ended with it, by default.
        beat: called between two steps with the number of prompts done; what it raises ends the capture like Ctrl-C.

    Raises:
        CaptureFailed: not every row was captured and stored.
        InvalidInput: the destination cannot be used.
    """
    destination = plan.job.destination
    try:
        lake = open_lake(destination.lake, create=True)
        _check_quota(lake, plan, resume)
        with ExitStack() as locks:
            checks = [locks.enter_context(held_back())]
            parts = _take_runs(lake, plan, resume, locks, checks)

            def check() -> None:
                for one in checks:
                    one()

            try:
                return _capture_and_seal(lake, plan, parts, engine, check, beat, progress)
            except (KeyboardInterrupt, LeaseLost, RunBusy):  # the last two: somebody else goes on with the runs
                raise
            except Exception as error:
                if not keep and not isinstance(error, _SealingFailed):
                    for part in parts:
                        if part.made:
                            lake.delete(part.target.run)
                raise
    except (CaptureFailed, InvalidInput, LeaseLost):
        raise
    except OSError as error:
        raise CaptureFailed(f"capture into {destination.lake!r} failed: {error.strerror}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CaptureFailed(f"capture failed: {reason}; the engine's messages are above") from error


class _SealingFailed(CaptureFailed):
    """Every row was stored, but the run could not be sealed."""


@dataclass
class _Part:
    """One run of a job while it is captured."""

    target: Target
    storage: Storage
    provenance: dict[str, Any]
    made: bool
    """Whether this capture made the run."""
    sealed: bool
    done: dict[str, int]
    """Rows of each prompt that the run holds already."""
    asked: int = 0
    """Rows asked for by this capture."""

    def todo(self, prompts: Prompts) -> list[tuple[str, list[int]]]:
        """Ids and tokens of the prompts that the run lacks."""
        if self.sealed:
            return []
        pairs = zip(prompts.ids, prompts.token_ids, strict=True)
        return [(prompt_id, tokens) for prompt_id, tokens in pairs if prompt_id not in self.done]


def _capture_and_seal(
    lake: Lake,
    plan: CapturePlan,
    parts: list[_Part],
    engine: CaptureEngine | None,
    check: Callable[[], None],
    beat: Callable[[int], None],
    progress: bool,
) -> CaptureSummary:
    startup, tokens, own = 0.0, 0, engine is None
    started = time.perf_counter()
    for part in parts:
        if plan.job.destination.reuse and not part.sealed:
            reused = reuse_rows(lake, plan, part.storage, part.provenance, part.todo(plan.prompts))
            part.done |= reused
    todo = {part.target.run: part.todo(plan.prompts) for part in parts}
    n_todo = sum(map(len, todo.values()))
    if n_todo:
        if engine is None:
            before = time.perf_counter()
            engine = start_engine(plan)
            startup = time.perf_counter() - before
        try:
            if not own:
                with suppress(CaptureFailed):
                    engine.commit()  # what a job that was stopped has left does not count here
            try:
                tokens = _feed(engine, plan, parts, todo, check, beat, progress)
            except (KeyboardInterrupt, LeaseLost):
                with suppress(CaptureFailed):
                    engine.commit()
                raise
            rows, prompts = engine.commit()
        finally:
            if own:
                engine.close()
        asked = sum(part.asked for part in parts)
        if (rows, prompts) != (asked, n_todo):
            raise CaptureFailed(f"{rows} rows of {prompts} prompts were stored, but {asked} of {n_todo} were asked for")
    seconds = time.perf_counter() - started - startup
    runs = [lake[part.target.run] if part.sealed else _seal(part, plan) for part in parts]
    return CaptureSummary(
        ", ".join(run.name for run in runs),
        len(plan.prompts.ids),
        tokens,
        sum(run.n_rows for run in runs),
        sum(run.nbytes for run in runs),
        seconds,
        startup,
        sum(len(part.done) for part in parts if plan.job.destination.reuse),
        plan.missed,
    )


def start_engine(plan: CapturePlan) -> CaptureEngine:
    """An engine for one job."""
    from millpond.capture.engine import CaptureEngine

    adapters = [target.adapter for target in plan.targets if target.adapter is not None]
    return CaptureEngine(
        plan.model,
        open_storage(plan.job.destination.lake).url,
        plan.taps,
        plan.job.engine,
        max_adapters=len({adapter.folder.resolve() for adapter in adapters}),
        max_rank=max((adapter.rank for adapter in adapters), default=0),
        edits_per_token=len(plan.job.intervene),
        saes=[one for one in plan.job.intervene if isinstance(one, SpliceSae)],
    )


def _feed(
    engine: CaptureEngine,
    plan: CapturePlan,
    parts: list[_Part],
    todo: dict[str, list[tuple[str, list[int]]]],
    check: Callable[[], None],
    beat: Callable[[int], None],
    progress: bool,
) -> int:
    """Send the prompts through the engine; returns the tokens it computed."""
    by_run = {part.target.run: part for part in parts}
    tokens = rows = prompts = 0

    def between_steps() -> None:
        check()
        beat(prompts)

    with tqdm(
        total=plan.max_tokens * len(parts), desc="capture", unit="tok", unit_scale=True, disable=not progress
    ) as bar:
        for request, token_ids in engine.run(_requests(plan, parts, todo), between_steps):
            n_prompt = len(request.token_ids)
            computed = n_prompt + max(len(token_ids) - n_prompt - 1, 0)
            tokens += computed
            prompts += 1
            asked = len(plan.job.capture.select(n_prompt, 0, computed, np.array(token_ids, np.int32)))
            by_run[request.run].asked += asked
            rows += asked
            bar.update(len(token_ids))
            bar.set_postfix_str(human_bytes(rows * plan.row_bytes), refresh=False)
    return tokens


def _requests(
    plan: CapturePlan, parts: list[_Part], todo: dict[str, list[tuple[str, list[int]]]]
) -> Iterator[CaptureRequest]:
    """The requests of all runs, those of one prompt beside each other so that they share batches."""
    from millpond.capture.engine import CaptureRequest

    section = plan.job.capture
    wish = CaptureWish.model_validate(section.model_dump(exclude={"hooks", "reads", "max_new_tokens"}))
    missing = {part.target.run: dict(todo[part.target.run]) for part in parts}
    for prompt_id in plan.prompts.ids:
        for part in parts:
            token_ids = missing[part.target.run].get(prompt_id)
            if token_ids is not None:
                run = part.target.run
                # paired runs hold the same prompts, so the engine knows them by both names
                named = wish.model_copy(update={"id": f"{run}:{prompt_id}", "prompt": prompt_id, "run": run})
                asked = RequestArgs(capture=named, intervene=plan.job.intervene)
                yield CaptureRequest(run, prompt_id, token_ids, asked, part.target.adapter, section.max_new_tokens)


def _check_quota(lake: Lake, plan: CapturePlan, resume: bool) -> None:
    """Check that all rows fit in the lake, where their number is known and all are kept; what is written is checked anyway."""
    if plan.job.capture.max_new_tokens or plan.job.destination.consumed_by:
        return
    more = {}
    for target in plan.targets:
        held = lake[target.run].n_rows if resume and target.run in lake else 0
        more[target.run] = max(plan.rows - held, 0) * plan.row_bytes
    check_quota(lake, more)


def _take_runs(
    lake: Lake, plan: CapturePlan, resume: bool, locks: ExitStack, checks: list[Callable[[], None]]
) -> list[_Part]:
    """The runs of all targets, each held by this capture; if one cannot be had, those that were made are removed again.

    Args:
        lake: where they are.
        plan: of the job.
        resume: take those that an interrupted capture of the same job left.
        locks: ends the capture's hold on them.
        checks: gets what checks that they are still held.
    """
    parts: list[_Part] = []
    with ExitStack() as undo:
        for target in plan.targets:
            part = _part(lake, plan, target, resume)
            checks.append(locks.enter_context(only_capture(part.storage)))
            if part.made:  # only what is held is removed: another capture may go on with it
                undo.callback(lake.delete, target.run)
                if plan.job.destination.consumed_by:
                    grace = read_configuration(lake).collection_grace_s
                    lake.retain(target.run, plan.job.destination.consumed_by, grace_s=grace)
            parts.append(part)
        undo.pop_all()
    return parts


def _part(lake: Lake, plan: CapturePlan, target: Target, resume: bool) -> _Part:
    """The run of one target: made, or what an interrupted capture of the same job left of it."""
    provenance = _provenance(plan, target)
    storage = lake.run_storage(target.run)
    if not resume or target.run not in lake:
        destination = plan.job.destination
        lake.create_run(
            target.run,
            hooks=plan.hooks,
            d_model=plan.model.d_model,
            dtype=plan.model.dtype,
            chunk_rows=destination.chunk_rows,
            shard_rows=destination.shard_rows,
            provenance=provenance,
            reads=plan.reads,
        )
        return _Part(target, storage, provenance, made=True, sealed=False, done={})
    run = lake[target.run]
    if (run.hooks, run.plan.spec.reads) != (plan.hooks, plan.reads) or run.provenance.get("fingerprint") != provenance[
        "fingerprint"
    ]:
        raise InvalidInput(
            f"run {run.name!r} was begun with another job; resume it with that one or choose another name"
        )
    captured = pd.concat([run.prompts, run.dropped])
    done = dict(zip(captured["id"], captured["n_rows"].astype(int), strict=True))
    return _Part(target, storage, provenance, made=False, sealed=run.state == "sealed", done=done)


def _seal(part: _Part, plan: CapturePlan) -> Run:
    prompts = plan.prompts
    try:
        return seal_run(
            part.storage,
            prompts=prompts.table,
            prompt_labels=plan.job.prompts.prompt_labels,
            token_labels=prompts.token_labels,
            token_label_dtypes=prompts.token_label_dtypes,
            expected_rows=part.asked + sum(part.done.values()),
        )
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _SealingFailed(
            f"every row is stored, but run {part.target.run!r} could not be sealed: {reason}; put that right, then: "
            "millpond capture --resume"
        ) from error


def _provenance(plan: CapturePlan, target: Target) -> dict[str, Any]:
    adapter = target.adapter
    found: dict[str, Any] = {
        **model_provenance(plan.model.folder),
        "n_layers": plan.model.n_layers,
        "adapter": None if adapter is None else adapter_provenance(adapter.name, adapter.folder),
        "interventions": [one.model_dump(mode="json", exclude_none=True) for one in plan.job.intervene],
        "interventions_missed": list(plan.missed),
        "paired": [other.run for other in plan.targets if other is not target],
        "capture": plan.job.model_dump(mode="json"),
    }
    return {**found, "fingerprint": _fingerprint(plan, found)}


def _fingerprint(plan: CapturePlan, provenance: dict[str, Any]) -> str:
    """A hash of the model, what is captured and the prompts: equal jobs make equal runs."""
    computation = {name: provenance[name] for name in COMPUTATION}
    capture = plan.job.capture.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps([computation, plan.model.dtype, capture], sort_keys=True).encode())
    for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True):
        digest.update(prompt_id.encode() + b"\0" + np.array(tokens, "<i4").tobytes())
    return digest.hexdigest()
