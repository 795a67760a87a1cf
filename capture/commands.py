"""`millpond capture`, `serve`, `worker`, `submit`, `verify` and `seal`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from millpond.store.commands import Verify as VerifyStored
from millpond.store.errors import InvalidInput


@dataclass(frozen=True)
class Capture:
    """Capture the activations of a file of prompts into a new run, as a TOML file says."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file; docs/capture.md describes it."""
    dry_run: bool = False
    """Check everything and print tokens, bytes and an estimate of the time; write nothing."""
    resume: bool = False
    """Go on with the open run that an interrupted capture of the same job left."""
    metrics: Path | None = None
    """Folder for the engine's capture metrics in Prometheus' text format; the handbook describes them."""

    def run(self) -> int:
        """Run the job."""
        _write_metrics(self.metrics)
        from millpond.capture.job import run_capture
        from millpond.capture.plan import plan_capture, told_misses
        from millpond.store.capture_spec import read_job
        from millpond.store.reprs import human_bytes

        plan = plan_capture(read_job(self.job), resume=self.resume)
        print(plan.summary(), flush=True)
        if self.dry_run:
            return 0
        done = run_capture(plan, resume=self.resume)
        print(
            f"run {done.run_name!r} is sealed: {done.rows:,} rows asked = {done.rows:,} stored, of {done.prompts:,} prompts; "
            f"{human_bytes(done.bytes)} in {done.seconds:.1f} s, {done.tokens_per_second:,.0f} tokens/s "
            f"(engine start {done.startup_seconds:.0f} s)"
        )
        for told in told_misses(done.missed, done.prompts):
            print(told)
        return 0


@dataclass(frozen=True)
class Serve:
    """Serve a model over the OpenAI API, capturing and steering the requests that ask for it."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of the model."""
    vllm: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Arguments of `vllm serve`, after `--`: `-- --port 8000 --max-model-len 4096`."""
    lake: str = "lake"
    """Where the runs are; made if it is missing."""
    hooks: tuple[str, ...] = ("blocks.*.hook_resid_post",)
    """Hook points that are tapped: names or globs."""
    run_name: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Run of the requests that name none."""
    commit_seconds: float = 1.0
    """Rows are committed at most this long after their request has ended."""
    saes: tuple[str, ...] = ()
    """HOOK=ARTIFACT of each SAE that requests may splice in; needed on a GPU, where it is part of CUDA graphs."""
    metrics: Path | None = None
    """Folder for the capture metrics, which are part of `/metrics` anyway."""

    def run(self) -> int:
        """Become `vllm serve`."""
        _write_metrics(self.metrics)
        from millpond.capture.vllm_cli import serve_command

        command = serve_command(
            self.model,
            lake=self.lake,
            hooks=self.hooks,
            run=self.run_name,
            commit_seconds=self.commit_seconds,
            arguments=self.vllm,
            saes=self.saes,
        )
        os.execv(command[0], command)  # noqa: S606 - vLLM's server takes this process's place


@dataclass(frozen=True)
class Worker:
    """Run an engine that takes capture and generation jobs from a queue."""

    queue: str
    """Folder of the queue, made if it is missing; or http://HOST:PORT or unix:/PATH of `millpond queue serve`, with
    the worker's token in MILLPOND_WORKER_TOKEN."""
    model: str
    """Folder of the model."""
    lake: str
    """Folder or URL of the lake that the jobs' runs go to."""
    dtype: str = "auto"
    """As in a job file."""
    hooks: tuple[str, ...] = ("blocks.*.hook_resid_post",)
    """Hook points that are tapped: names or globs; jobs may keep fewer."""
    engine: str = "{}"
    """Further vLLM engine arguments, a JSON object."""
    max_adapters: int = 0
    """LoRA adapters in one batch; 0 refuses jobs with adapters."""
    max_rank: int = 16
    """Largest rank of an adapter."""
    kinds: tuple[str, ...] = ("capture",)
    """Kinds of jobs that are taken: capture, generate or both."""
    lease: float = 60.0
    """Seconds after which a worker without a heartbeat loses its job to another."""
    until_empty: bool = False
    """End when the queue is empty."""
    metrics: Path | None = None
    """Folder for the engine's capture metrics in Prometheus' text format, for node_exporter's textfile collector."""

    def run(self) -> int:
        """Take jobs."""
        _write_metrics(self.metrics)
        import json

        from pydantic import ValidationError

        from millpond.capture.worker_jobs import WorkerConfig, work
        from millpond.store.capture_spec import ModelSection, first_problem
        from millpond.store.http_queue import open_queue
        from millpond.store.logs import log_to

        log_to()
        try:
            model = ModelSection.model_validate({"path": self.model, "dtype": self.dtype})
            arguments = json.loads(self.engine)
        except ValidationError as error:
            raise InvalidInput(f"--{first_problem(error)}") from error
        except ValueError as error:
            raise InvalidInput(f"--engine is {self.engine!r}; give a JSON object ({error})") from error
        if not isinstance(arguments, dict):
            raise InvalidInput(f"--engine is {self.engine!r}; give a JSON object")
        config = WorkerConfig(
            model,
            self.lake,
            self.hooks,
            arguments,
            self.max_adapters,
            self.max_rank,
            self.kinds,
            lease_seconds=self.lease,
        )
        work(open_queue(self.queue), config, until_empty=self.until_empty, told=lambda text: print(text, flush=True))
        return 0


@dataclass(frozen=True)
class Submit:
    """Queue a capture job for `millpond worker`."""

    queue: Annotated[str, tyro.conf.Positional]
    """Folder of the queue, or its address as for `millpond worker`, with a token that may submit."""
    job: Annotated[Path, tyro.conf.Positional]
    """The job file, without [engine]."""

    def run(self) -> int:
        """Queue the job and print its id."""
        from millpond.store.capture_spec import read_job
        from millpond.store.http_queue import open_queue

        job = read_job(self.job)
        spec = job.model_dump(mode="json", exclude_unset=True)
        print(open_queue(self.queue).submit("capture", spec, model=job.model.base))
        return 0


@dataclass(frozen=True)
class Verify(VerifyStored):
    """Check every byte, count and value of a lake's runs against their manifests."""

    reference: bool = False
    """Recompute rows and reads of some prompts with Hugging Face too, and print how far the stored ones are from them."""
    model: Path | None = None
    """With --reference: the model's folder, where it is not where the run says."""
    adapter: Path | None = None
    """With --reference: likewise of the LoRA adapter."""
    prompts: int = 8
    """With --reference: how many prompts."""

    def run(self) -> int:
        """Print one line a run and one a problem; 1 if there is any."""
        if self.prompts < 1:
            raise InvalidInput(f"--prompts is {self.prompts}; give 1 or more")
        for name, given in {"model": self.model, "adapter": self.adapter}.items():
            if given is not None and not self.reference:
                raise InvalidInput(
                    f"--{name} is for the check against Hugging Face; give --reference too, or leave it out"
                )
        code = super().run()
        if not self.reference or code:
            return code
        from millpond.capture.reference import check_reference
        from millpond.store.lake import open_lake

        lake = open_lake(self.lake)
        close = True
        for name in self.names or lake.runs():
            check = check_reference(
                lake[name],
                model=self.model,
                adapter=self.adapter,
                prompts=self.prompts,
                progress=sys.stderr.isatty(),
            )
            print(f"{name}: {check.rows:,} rows of {check.prompts} prompts against Hugging Face in float32:")
            print("\n".join(f"  {line}" for line in check.table().splitlines()))
            close = close and check.ok
        return 0 if close else 1


@dataclass(frozen=True)
class Seal:
    """Seal an open run, such as one that a server captured into: it stays as it is from then on."""

    lake: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the lake."""
    name: Annotated[str, tyro.conf.Positional]
    """The run."""

    def run(self) -> int:
        """Seal the run."""
        from millpond.store.lake import open_lake
        from millpond.store.seal import seal_run

        lake = open_lake(self.lake)
        if lake[self.name].state == "sealed":
            raise InvalidInput(f"run {self.name!r} is sealed already")
        print(seal_run(lake.run_storage(self.name)))
        return 0


def _write_metrics(folder: Path | None) -> None:
    """Let the engines that this process starts write their metrics there."""
    if folder is not None:
        from millpond.capture.metrics import FOLDER

        os.environ[FOLDER] = str(folder.resolve())
