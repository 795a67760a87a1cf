"""Batch jobs: a probe sweep with its settings in a TOML file, its results in a folder, resumable after a kill."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.run import Run

_ESTIMATORS = {"logistic": "LogisticProbe", "ridge": "RidgeProbe", "mass-mean": "MassMeanProbe", "lda": "LdaProbe"}


@dataclass(frozen=True)
class ProbeJob:
    """A sweep of probes over hooks and labels of one run."""

    run: str = ""
    """The run, as its lake's folder, a slash and its name."""
    hooks: tuple[str, ...] = ()
    """Hook points or globs, such as `blocks.*.hook_resid_post`."""
    label: tuple[str, ...] = ()
    """Labels of the run."""
    out: str = ""
    """Folder of the results; made if it is missing."""
    estimator: Literal["logistic", "ridge", "mass-mean", "lda"] = "logistic"
    """Kind of probe."""
    strengths: tuple[float, ...] = ()
    """Of C for `logistic`, alpha for `ridge`, shrinkage for `lda`; the estimator's own default where none is given."""
    cv: int = 0
    """Folds of whole prompts to choose the strength by; 0 compares strengths on the test part."""
    test: float = 0.2
    """Fraction of the prompts that probes are evaluated on."""
    split_by: str = ""
    """Column of the prompts whose groups are kept together in the split; by default each prompt is a group."""
    seed: int = 0
    """Of the split, the shuffled controls and the intervals."""
    control: bool = True
    """Also fit each label with its values shuffled, and score a random direction."""
    scheduler: str = ""
    """Address of a running Dask scheduler, in place of the cluster that the lake's configuration declares."""
    workers: int | None = None
    """Workers of one thread to start on this machine instead; 0 runs in this process. One a core where neither
    this nor the lake says anything."""
    memory_limit: str = "auto"
    """Memory of each of those workers, such as `4GB`; by default an equal share of the machine's."""


@dataclass(frozen=True)
class ProbeJobDone:
    """What a job did."""

    folder: Path
    rows: tuple[dict[str, Any], ...]
    """One record a probe."""
    resumed: int
    """Hooks that an earlier, interrupted run of the job had finished."""


def read_probe_job(path: Path) -> ProbeJob:
    """The settings in the TOML file `path`; what it leaves out has its default. A list of one may be its value alone.

    Raises:
        InvalidInput: the file cannot be read, or a field is unknown or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    from millpond.store.capture_spec import first_problem

    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"job file {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise InvalidInput(f"job file {str(path)!r} is not TOML: {error}") from error
    known = [one.name for one in dataclasses.fields(ProbeJob)]
    for name, value in values.items():
        if name not in known:
            raise InvalidInput(f"job file {str(path)!r}: {name}: unknown field; use some of {', '.join(known)}")
        if name in ("hooks", "label", "strengths") and not isinstance(value, list):
            values[name] = [value]
    try:
        return TypeAdapter(ProbeJob).validate_python(values)
    except ValidationError as error:
        raise InvalidInput(f"job file {str(path)!r}: {first_problem(error)}") from error


def check_job(job: ProbeJob) -> None:
    """Raises InvalidInput if a needed setting is missing or one cannot be used whatever the run holds."""
    for name in ("run", "hooks", "label", "out"):
        if not getattr(job, name):
            raise InvalidInput(f"{name} is missing; give it in the job file or as --{name}")
    if job.estimator not in _ESTIMATORS:
        raise InvalidInput(f"estimator is {job.estimator!r}; use one of {', '.join(_ESTIMATORS)}")


def run_probe_job(job: ProbeJob, *, progress: bool = True) -> ProbeJobDone:
    """Run the job, or what an interrupted run of the same job left, and write its folder.

    That holds `job.toml` (the resolved settings), `metrics.jsonl` (one line a probe, as hooks are finished),
    `hooks/<hook>.json` and `.npz` (records and weights of a finished hook), and at the end `result.json` and
    `layers.png`, the main metric by layer. A hook's bytes are read by its own passes only, so working hook by hook costs no read.

    Raises:
        InvalidInput: a setting cannot be used, or the folder holds another job.
        RunOpen: the run may still grow.
        MemoryTooSmall: a worker cannot hold what a pass needs.
    """
    from importlib import import_module

    from millpond.analysis.cluster import chosen_cluster
    from millpond.analysis.sweep import CONTROLS
    from millpond.store.files import write_whole

    check_job(job)
    lake, run = _open(job)
    cluster = chosen_cluster(lake, scheduler=job.scheduler, workers=job.workers, memory_limit=job.memory_limit)
    run.check_sealed()
    hooks = run.match(job.hooks)
    missing = [label for label in job.label if label not in run.labels]
    if missing:
        run.labels[missing[0]]  # raises LabelNotFound
    train, test = run.split(test=job.test, seed=job.seed, by=job.split_by or None)
    folder = Path(job.out)
    _claim(folder, job, run)
    probe = getattr(import_module("millpond.analysis"), _ESTIMATORS[job.estimator])(progress=progress)
    done = [hook for hook in hooks if (folder / "hooks" / f"{hook}.json").exists()]
    with cluster:
        for hook in hooks:
            if hook in done:
                continue
            swept = probe.sweep(
                train, test, hook, list(job.label), list(job.strengths) or None, cv=job.cv or None,
                controls=CONTROLS if job.control else (), groups=job.split_by or None, seed=job.seed,
            )  # fmt: skip
            _save_hook(folder, hook, swept)
            _write_metrics(folder, hooks)
    rows = _write_metrics(folder, hooks)
    result = {"rows": rows, "provenance": _provenance(job, run)}
    _plot(rows, json.loads((folder / "hooks" / f"{hooks[0]}.json").read_text()), folder / "layers.png")
    write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return ProbeJobDone(folder, tuple(rows), len(done))


def _open(job: ProbeJob) -> tuple[Lake, Run]:
    from millpond.store.lake import open_lake

    url, _, name = job.run.rstrip("/").rpartition("/")
    if not url:
        raise InvalidInput(f"run is {job.run!r}; give its lake's folder, a slash and its name, such as lake/stdlib")
    lake = open_lake(url)
    return lake, lake[name]


def _claim(folder: Path, job: ProbeJob, run: Run) -> None:
    """Make the folder the job's, or check that it is."""
    from millpond.store.files import write_whole

    settings = folder / "job.toml"
    wanted = _toml(job, run)
    if settings.exists():
        if _what_counts(settings.read_text()) != _what_counts(wanted):
            raise InvalidInput(f"out: {str(folder)!r} holds the results of another job; name another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"out: {str(folder)!r} is not empty and holds no job; name a new or empty folder")
    (folder / "hooks").mkdir(parents=True, exist_ok=True)
    write_whole(settings, wanted.encode())


def _toml(job: ProbeJob, run: Run) -> str:
    """The settings as TOML: its strings, numbers, booleans and lists are written like JSON's."""
    values = dataclasses.asdict(job).items()
    lines = [f"{name} = {json.dumps(value)}" for name, value in values if value is not None]
    return "\n".join([f"# millpond probe, run id {run.plan.spec.id}", *lines, ""])


def _what_counts(text: str) -> list[str]:
    """What decides the results: all but where they are computed."""
    where = ("scheduler", "workers", "memory_limit", "out")
    return [line for line in text.splitlines() if line.partition(" = ")[0] not in where]


def _save_hook(folder: Path, hook: str, swept: Any) -> None:
    """Records and weights of one hook; the records come last, because they mark the hook as finished."""
    import io

    import numpy as np

    from millpond.store.files import write_whole

    arrays: dict[str, Any] = {}
    for (_, label, strength), probe in swept.probes.items():
        name = f"{label}|{strength:g}"
        arrays[f"{name}|coef"], arrays[f"{name}|intercept"] = probe.coef_, probe.intercept_
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write_whole(folder / "hooks" / f"{hook}.npz", packed.getvalue())
    about = {"rows": list(swept.rows), "main": dict(swept.main), "strength": swept.provenance["strength"]}
    write_whole(folder / "hooks" / f"{hook}.json", json.dumps(about, indent=1).encode())


def _write_metrics(folder: Path, hooks: tuple[str, ...]) -> list[dict[str, Any]]:
    from millpond.store.files import write_whole

    rows: list[dict[str, Any]] = []
    for hook in hooks:
        path = folder / "hooks" / f"{hook}.json"
        if path.exists():
            rows += json.loads(path.read_text())["rows"]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def _provenance(job: ProbeJob, run: Run) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "job": dataclasses.asdict(job), "run": run.name, "run_id": run.plan.spec.id, "rows": run.n_rows,
        "prompts": len(run.prompts), "millpond": version("millpond"),
    }  # fmt: skip


def _plot(rows: list[dict[str, Any]], about: Mapping[str, Any], path: Path) -> None:
    from millpond.analysis.sweep import Sweep

    Sweep(tuple(rows), {}, {}, {}, {"strength": about["strength"]}, about["main"]).plot().savefig(path, dpi=120)
