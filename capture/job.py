"""A whole capture job: from a TOML file to a sealed run whose counts reconcile."""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from millpond.capture.interrupts import held_back
from millpond.capture.plan import CapturePlan, plan_capture
from millpond.store.capture_spec import read_job
from millpond.store.errors import CaptureFailed, InvalidInput, RunExists
from millpond.store.lake import Lake, open_lake
from millpond.store.reprs import human_bytes
from millpond.store.run import Run
from millpond.store.seal import seal_run

if TYPE_CHECKING:
    from millpond.capture.engine import CaptureEngine


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


def run_capture(plan: CapturePlan, *, resume: bool = False, progress: bool = True) -> CaptureSummary:
    """Capture into a new run and seal it.

    A capture that fails removes the run it made. What is interrupted (Ctrl-C, a kill), and what fails
    after every row was stored, leaves an open run with what was committed; `resume` goes on from there.

    Raises:
        CaptureFailed: not every row was captured and stored.
        InvalidInput: the destination cannot be used.
    """
    destination = plan.job.destination
    try:
        lake = open_lake(destination.lake, create=True)
        provenance = _provenance(plan)
        done = _committed(lake, plan, provenance) if resume and destination.run in lake else None
        if done is None:
            _create(lake, plan, provenance)
        folder = lake.run_folder(destination.run)
        with held_back() as check, _only_capture(folder):
            try:
                return _capture_and_seal(plan, folder, done or {}, check, progress)
            except KeyboardInterrupt:
                raise
            except Exception as error:
                if done is None and not isinstance(error, _SealingFailed):
                    lake.delete(destination.run)
                raise
    except (CaptureFailed, InvalidInput):
        raise
    except OSError as error:
        raise CaptureFailed(f"capture into {destination.lake!r} failed: {error.strerror}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CaptureFailed(f"capture failed: {reason}; the engine's messages are above") from error


class _SealingFailed(CaptureFailed):
    """Every row was stored, but the run could not be sealed."""


def _capture_and_seal(
    plan: CapturePlan, folder: Path, done: dict[str, int], check: Callable[[], None], progress: bool
) -> CaptureSummary:
    from millpond.capture.engine import CaptureEngine

    pairs = zip(plan.prompts.ids, plan.prompts.token_ids, strict=True)
    todo = [(prompt_id, tokens) for prompt_id, tokens in pairs if prompt_id not in done]
    started = time.perf_counter()
    engine = CaptureEngine(plan.job, plan.taps, plan.model.context)
    try:
        startup = time.perf_counter() - started
        started = time.perf_counter()
        try:
            tokens, asked = _feed(engine, plan, iter(todo), check, progress)
        except KeyboardInterrupt:
            with suppress(CaptureFailed):
                engine.commit()
            raise
        rows, prompts = engine.commit()
    finally:
        engine.close()
    if (rows, prompts) != (asked, len(todo)):
        raise CaptureFailed(f"{rows} rows of {prompts} prompts were stored, but {asked} of {len(todo)} were asked for")
    seconds = time.perf_counter() - started
    try:
        run = _seal(folder, plan, asked + sum(done.values()))
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _SealingFailed(
            f"every row is stored, but run {folder.name!r} could not be sealed: {reason}; put that right, then: "
            "millpond capture --resume"
        ) from error
    return CaptureSummary(run.name, len(run.prompts), tokens, run.n_rows, run.nbytes, seconds, startup)


@contextmanager
def _only_capture(folder: Path) -> Iterator[None]:
    """Holds the run's capture lock, which the system releases however this process ends.

    Raises:
        InvalidInput: another capture holds it.
    """
    with (folder / "capture.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"run {folder.name!r} is being captured by another process; wait for it to end"
            ) from None
        yield


def _feed(
    engine: CaptureEngine,
    plan: CapturePlan,
    prompts: Iterator[tuple[str, list[int]]],
    check: Callable[[], None],
    progress: bool,
) -> tuple[int, int]:
    """Send the prompts through the engine; returns tokens computed and rows asked for."""
    lengths = {
        prompt_id: len(tokens) for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True)
    }
    per_row = plan.bytes // plan.rows
    tokens = asked = 0
    with tqdm(total=plan.max_tokens, desc="capture", unit="tok", unit_scale=True, disable=not progress) as bar:
        for prompt_id, token_ids in engine.run(prompts, check):
            n_prompt, n_tokens = lengths[prompt_id], len(token_ids)
            computed = n_prompt + max(n_tokens - n_prompt - 1, 0)
            tokens += computed
            asked += len(plan.job.capture.select(n_prompt, 0, computed, np.array(token_ids, np.int32)))
            bar.update(n_tokens)
            bar.set_postfix_str(human_bytes(asked * per_row), refresh=False)
    return tokens, asked


def _committed(lake: Lake, plan: CapturePlan, provenance: dict[str, Any]) -> dict[str, int]:
    """What an interrupted capture of the same job holds: prompt ids and their rows."""
    run = lake[plan.job.destination.run]
    if run.state == "sealed":
        raise RunExists(f"run {run.name!r} is sealed; there is nothing to resume; choose another name")
    if run.hooks != plan.hooks or run.provenance.get("fingerprint") != provenance["fingerprint"]:
        raise InvalidInput(
            f"run {run.name!r} was begun with another job; resume it with that one or choose another name"
        )
    return dict(zip(run.prompts["id"], run.prompts["n_rows"].astype(int), strict=True))


def _create(lake: Lake, plan: CapturePlan, provenance: dict[str, Any]) -> None:
    lake.create_run(
        plan.job.destination.run,
        hooks=plan.hooks,
        d_model=plan.model.d_model,
        dtype=plan.model.dtype,
        chunk_rows=plan.job.destination.chunk_rows,
        shard_rows=plan.job.destination.shard_rows,
        provenance=provenance,
    )


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


def _provenance(plan: CapturePlan) -> dict[str, Any]:
    from millpond.capture.versions import check_vllm_version

    folder = plan.model.folder
    tokenizer = folder / "tokenizer.json"
    weights = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    return {
        "model": "/".join(folder.resolve().parts[-2:]),
        "architecture": plan.model.architecture,
        "n_layers": plan.model.n_layers,
        "weight_bytes": plan.model.weight_bytes,
        "weights_sha256": weights,
        "tokenizer_sha256": _sha256(tokenizer) if tokenizer.is_file() else None,
        "vllm": check_vllm_version(),
        "millpond": version("millpond"),
        "capture": plan.job.model_dump(mode="json"),
        "fingerprint": _fingerprint(plan, weights),
    }


def _fingerprint(plan: CapturePlan, weights: dict[str, str]) -> str:
    """A hash of the model, what is captured and the prompts: equal jobs make equal runs."""
    digest = hashlib.sha256((plan.model.folder / "config.json").read_bytes())
    digest.update(f"{sorted(weights.items())} {plan.model.dtype} {plan.job.capture!r} {plan.job.intervene!r}".encode())
    for prompt_id, tokens in zip(plan.prompts.ids, plan.prompts.token_ids, strict=True):
        digest.update(prompt_id.encode() + b"\0" + np.array(tokens, "<i4").tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
