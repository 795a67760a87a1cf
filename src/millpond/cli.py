"""The `millpond` command. Each subcommand is a frozen dataclass: its fields are the flags, their docstrings the help."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import tyro

from millpond.analysis.jobs import ProbeJob, read_probe_job
from millpond.hub.gateway_commands import (
    Executor,
    Gateway,
    ProjectHold,
    ProjectNew,
    ProjectRole,
    ReleaseVerify,
    TokenNew,
)
from millpond.hub.queue_commands import QueueServe, QueueToken
from millpond.hub.sae_commands import SaeCommand
from millpond.hub.workspace.commands import Doctor, Up
from millpond.store.commands import COMMANDS, one_line
from millpond.store.commands import Metrics as MetricsOfLake
from millpond.store.commands import Verify as VerifyStored
from millpond.store.errors import InvalidInput, MillpondError

if TYPE_CHECKING:
    from millpond.hub.ledger import Ledger
    from millpond.store.queue import QueuedJob


_DESCRIPTION = """Activations of language models, next to the GPUs.

Also: millpond ledger (verify, alerts), budget (plan, show, raise, approve), queue (serve, token), token (new),
project (new, role, hold) and release (verify)."""


class _Command(Protocol):
    def run(self) -> int: ...


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
        from millpond.capture.plan import plan_capture
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

        print(open_queue(self.queue).submit("capture", read_job(self.job).model_dump(mode="json", exclude_unset=True)))
        return 0


@dataclass(frozen=True)
class Jobs:
    """List the jobs of a queue."""

    queue: Annotated[str, tyro.conf.Positional]
    """Folder of the queue, or the URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""

    def run(self) -> int:
        """Print one line a job."""
        for job in self._jobs():
            about = job.error or _json(job.result or job.progress)
            print(f"{job.id} {job.kind:8} {job.state:8} attempt {job.attempts} {job.worker or '':24} {about}")
        return 0

    def _jobs(self) -> Sequence[QueuedJob]:
        if "://" not in self.queue:
            from millpond.store.queue import FolderQueue

            return FolderQueue(self.queue).jobs()
        from millpond.hub.database import open_database
        from millpond.hub.queue import SqlQueue

        return SqlQueue(open_database(self.queue, create=False)).jobs()


@dataclass(frozen=True)
class Probe:
    """Fit probes for hooks and labels of a run on a Dask cluster; a killed job is resumed by giving it again."""

    job: Annotated[Path | None, tyro.conf.Positional] = None
    """A TOML file with the settings below; those given as flags come before the file's."""
    settings: Annotated[ProbeJob, tyro.conf.OmitArgPrefixes] = field(default_factory=ProbeJob)
    """What to fit, and where."""

    def run(self) -> int:
        """Run the job."""
        from millpond.analysis.jobs import run_probe_job

        done = run_probe_job(self.settings, progress=sys.stderr.isatty())
        again = f", {done.resumed} hooks from before" if done.resumed else ""
        print(f"{len(done.rows)} probes, controls included{again}; results are in {done.folder}")
        return 0


@dataclass(frozen=True)
class Metrics(MetricsOfLake):
    """Print a lake's state in Prometheus' text format, for node_exporter's textfile collector."""

    config: Path | None = None
    """The gateway's settings: also print the state of jobs, reviews, ledger and budgets."""

    def run(self) -> int:
        """Print the metrics."""
        code = super().run()
        if self.config is not None:
            from millpond.hub.database import open_database
            from millpond.hub.metrics import hub_metrics
            from millpond.hub.policy import read_policy
            from millpond.hub.settings import read_settings

            settings = read_settings(self.config)
            engine = open_database(settings.database)
            print(hub_metrics(engine, read_policy(settings.policy)), end="")
            engine.dispose()
        return code


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
        code = super().run()
        if not self.reference or code:
            return code
        import millpond
        from millpond.capture.reference import check_reference

        lake = millpond.open(self.lake)
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
        import millpond
        from millpond.store.seal import seal_run

        lake = millpond.open(self.lake)
        if lake[self.name].state == "sealed":
            raise InvalidInput(f"run {self.name!r} is sealed already")
        print(seal_run(lake.run_storage(self.name)))
        return 0


@dataclass(frozen=True)
class Demo:
    """The main job on real input: capture the example model, sweep probes, train an SAE, write a report."""

    out: Path = Path("demo")
    """Folder of the demo's lake, results and report."""
    tokens: int = 200_000
    """Tokens to capture."""
    sae_tokens: int = 2_000_000
    """Rows to train the autoencoder on, with repetition."""

    def run(self) -> int:
        """Run the demo and print the report's path."""
        from millpond.hub.demo import DemoConfig, run_demo

        run_demo(DemoConfig(out=self.out, tokens=self.tokens, sae_tokens=self.sae_tokens))
        return 0


@dataclass(frozen=True)
class _LedgerAt:
    """Where the ledger is."""

    database: str
    """URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""
    policy: Path
    """The policy file."""

    def open(self) -> AbstractContextManager[Ledger]:
        """The ledger, closed at the end."""
        from millpond.hub.ledger import Ledger
        from millpond.hub.policy import read_policy

        return closing(Ledger(self.database, read_policy(self.policy)))


@dataclass(frozen=True)
class LedgerVerify:
    """Check every entry's hash, and totals, caps and kept bodies against the entries; the database is only read."""

    database: str
    """URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""
    anchors: Path | None = None
    """File of heads noted earlier, outside the vault; checked, then the head of today is added to it."""

    def run(self) -> int:
        """Print how many entries and bytes there are, and the head."""
        from millpond.hub.chain import read_anchors, verify_chain
        from millpond.hub.database import open_database

        engine = open_database(self.database, create=False)
        try:
            found = verify_chain(engine, read_anchors(self.anchors) if self.anchors else {})
        finally:
            engine.dispose()
        if self.anchors:
            with self.anchors.open("a") as handle:
                handle.write(f"{found.entries} {found.head}\n")
        print(
            f"the ledger is whole: {found.entries:,} entries, {found.charged:,} bytes charged; "
            f"head {found.entries} {found.head}"
        )
        return 0


@dataclass(frozen=True)
class LedgerAlerts(_LedgerAt):
    """List the alerts: budgets at 50, 80 and 95 percent."""

    def run(self) -> int:
        """Print one line an alert."""
        with self.open() as ledger:
            for alert in ledger.alerts():
                print(f"{alert['seq']:>9} {alert['percent']:>3} % of {alert['cap']:,} bytes: {alert['account']}")
        return 0


@dataclass(frozen=True)
class BudgetPlan:
    """Price a plan of work and compare it with a user's week; nothing is spent."""

    plan: Annotated[Path, tyro.conf.Positional]
    """The plan; docs/week.toml is one."""
    policy: Path | None = None
    """The policy file; the defaults without it."""
    model: str | None = None
    """A model of the policy file."""
    parameters: int | None = None
    """In place of a model: how many parameters it has."""

    def run(self) -> int:
        """Print one line an item; 1 if it does not fit."""
        from millpond.hub.budget import price, read_plan
        from millpond.hub.policy import ModelPolicy, Policy, read_policy

        if (self.model is None) == (self.parameters is None) or (self.model and not self.policy):
            raise InvalidInput("give --parameters, or --policy and --model")
        policy = read_policy(self.policy) if self.policy else Policy()
        if self.parameters is not None:
            policy = policy.model_copy(update={"models": {"plan": ModelPolicy(parameters=self.parameters)}})
        cap = policy.cap(self.model or "plan", "user_week")
        items = price(read_plan(self.plan), policy.charges)
        for item in items:
            print(f"{item.bytes:>12,}  {item.times:>4} x {item.what}")
        total = sum(item.bytes for item in items)
        fits = cap is None or total <= cap
        limit = "a public model has no cap" if cap is None else f"a user's week allows {cap:,}"
        print(f"{total:>12,}  bytes at most; {limit}: {'fits' if fits else 'does not fit'}")
        return 0 if fits else 1


@dataclass(frozen=True)
class BudgetShow(_LedgerAt):
    """Show the caps that wait for a second person."""

    def run(self) -> int:
        """Print one line a cap."""
        with self.open() as ledger:
            for change in ledger.waiting():
                print(f"{change.seq:>9} {change.account} to {change.bytes:,} bytes, asked by {change.by}")
        return 0


@dataclass(frozen=True)
class BudgetRaise(_LedgerAt):
    """Ask for another cap, as the system user that you are; a higher one needs somebody else's approval."""

    account: Annotated[str, tyro.conf.Positional]
    """scope:model, such as user_week:llama-8b, or one account's name."""
    bytes: Annotated[int, tyro.conf.Positional]
    """The new cap."""

    def run(self) -> int:
        """Print what happens next."""
        with self.open() as ledger:
            change = ledger.propose_cap(self.account, self.bytes, by=_system_user())
        print("in force" if change is None else f"somebody else: millpond budget approve {change.seq}")
        return 0


@dataclass(frozen=True)
class BudgetApprove(_LedgerAt):
    """Approve a cap that somebody else asked for, as the system user that you are."""

    seq: Annotated[int, tyro.conf.Positional]
    """The entry that asks for it."""

    def run(self) -> int:
        """Put the cap into force."""
        with self.open() as ledger:
            ledger.approve_cap(self.seq, by=_system_user())
        print("in force")
        return 0


def _write_metrics(folder: Path | None) -> None:
    """Let the engines that this process starts write their metrics there."""
    if folder is not None:
        from millpond.capture.metrics import FOLDER

        os.environ[FOLDER] = str(folder.resolve())


def _system_user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


_GROUPS: dict[str, dict[str, Callable[..., _Command]]] = {
    "ledger": {"verify": LedgerVerify, "alerts": LedgerAlerts},
    "budget": {"plan": BudgetPlan, "show": BudgetShow, "raise": BudgetRaise, "approve": BudgetApprove},
    "queue": {"serve": QueueServe, "token": QueueToken},
    "token": {"new": TokenNew},
    "release": {"verify": ReleaseVerify},
    "project": {"new": ProjectNew, "role": ProjectRole, "hold": ProjectHold},
}
"""Commands of two words; the first has no meaning alone."""

_COMMANDS: dict[str, Callable[..., _Command]] = {
    "capture": Capture,
    "serve": Serve,
    "worker": Worker,
    "submit": Submit,
    "jobs": Jobs,
    "probe": Probe,
    "seal": Seal,
    **COMMANDS,
    "verify": Verify,
    "metrics": Metrics,
    "demo": Demo,
    "up": Up,
    "doctor": Doctor,
    "gateway": Gateway,
    "executor": Executor,
    "sae": SaeCommand,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failed run, 2 for input that cannot be used, 130 when interrupted."""
    if arguments is None:
        arguments = sys.argv[1:]
    if list(arguments) == ["--version"]:
        import millpond

        print(f"millpond {millpond.__version__}")
        return 0
    group = arguments[0] if arguments and arguments[0] in _GROUPS else None
    command = tyro.extras.subcommand_cli_from_dict(
        _GROUPS[group] if group else _COMMANDS,
        prog=f"millpond {group}" if group else "millpond",
        args=arguments[1:] if group else arguments,
        description=_DESCRIPTION,
    )
    try:
        if isinstance(command, Probe) and command.job is not None:  # once more, with the file's settings as defaults
            command = replace(command, settings=read_probe_job(command.job))
            command = tyro.cli(Probe, prog="millpond probe", args=arguments[1:], default=command)
        code: int = command.run()
    except InvalidInput as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
        return 2
    except MillpondError as error:
        print(f"millpond: {one_line(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "millpond":
            raise
        print(
            f"millpond: this command needs {error.name!r}, which is not installed: pip install 'millpond[{_extra(command, group)}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            "millpond: interrupted; what was committed is kept, the same command with --resume goes on", file=sys.stderr
        )
        return 130
    return code


def _extra(command: object, group: str | None) -> str:
    """The extra of the distribution that holds what a command needs."""
    home = type(command).__module__.split(".")
    if group is not None or "hub" in home:
        return "workspace" if "workspace" in home else "hub"
    return "analysis" if "analysis" in home or isinstance(command, Probe) else "capture"


def _json(value: dict[str, object]) -> str:
    import json

    return json.dumps(value) if value else ""


if __name__ == "__main__":
    sys.exit(main())
