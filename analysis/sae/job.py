"""Training jobs from TOML files: what `millpond sae` runs."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput
from millpond.store.files import write_whole

if TYPE_CHECKING:
    from millpond.analysis.sae.estimator import Sae
    from millpond.store.result import Result
    from millpond.store.run import Run


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(_Section):
    """Which rows."""

    lake: str
    """The lake's folder."""
    run: str
    """Its name."""
    hook: str | None = None
    """Of an autoencoder, and the input of a transcoder."""
    hook_out: str | None = None
    """The output of a transcoder."""
    hooks: tuple[str, ...] = ()
    """Of a crosscoder: names or globs."""
    test: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the prompts, or of the groups, that is kept for evaluation."""
    split_by: str | None = None
    """Column of the prompt table whose groups stay together."""
    seed: int = 0
    """Of the split."""

    @model_validator(mode="after")
    def _one_kind(self) -> DataSection:
        if bool(self.hook) == bool(self.hooks):
            raise ValueError("give hook, or hooks for a crosscoder")
        if self.hook_out and self.hooks:
            raise ValueError("hook_out belongs to hook, not to hooks")
        return self


class TrainSection(_Section):
    """How long, and where to."""

    out: str
    """Folder of the checkpoint, `metrics.jsonl` and the trained autoencoder."""
    tokens: int | None = Field(default=None, gt=0)
    """Rows to train on; by default all of the training part, `epochs` times."""
    epochs: int = Field(default=1, gt=0)
    """Passes over the training part; `tokens` comes before it."""
    workers: int = Field(default=0, ge=0)
    """Dask workers that train together, of the cluster that the lake declares or, where it declares none, of this machine;
    0 trains in this process."""


class SaeJob(_Section):
    """A whole job. `sae` holds the fields of `SaeConfig`; `skip = true` gives a transcoder a linear skip connection."""

    data: DataSection
    sae: dict[str, Any]
    """Fields of `SaeConfig`, below."""
    train: TrainSection
    kind: Literal["sae", "transcoder", "crosscoder"] = "sae"
    """By default what `data` asks for."""

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, values: Any) -> Any:
        data = values.get("data") if isinstance(values, dict) else None
        if isinstance(data, dict) and "kind" not in values:
            kind = "crosscoder" if data.get("hooks") else "transcoder" if data.get("hook_out") else "sae"
            return values | {"kind": kind}
        return values


def read_job(path: Path) -> SaeJob:
    """The job in the TOML (or, beside results, JSON) file `path`.

    Raises:
        InvalidInput: the file is missing, cannot be read, or a field cannot be used.
    """
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InvalidInput(f"job file {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise InvalidInput(f"job file {str(path)!r} is not TOML: {error}") from error
    try:
        return SaeJob.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(f"job file {str(path)!r}: {first_problem(error)}") from error


def new_sae(job: SaeJob) -> Sae:
    """The untrained autoencoder that the job describes.

    Raises:
        InvalidInput: a field of `sae` is unknown, of another type, or out of range.
    """
    from dataclasses import fields

    from millpond.analysis.sae.config import SaeConfig
    from millpond.analysis.sae.crosscoder import Crosscoder
    from millpond.analysis.sae.estimator import Sae
    from millpond.analysis.sae.transcoder import SkipTranscoder, Transcoder

    options = dict(job.sae)
    skip = options.pop("skip", False)
    known = [field.name for field in fields(SaeConfig)]
    if unknown := sorted(options.keys() - set(known)):
        raise InvalidInput(f"sae.{unknown[0]} is no option; there are {', '.join(known)}, and skip for transcoders")
    types = get_type_hints(SaeConfig)
    for name, value in options.items():
        try:  # as JSON, in which a list may be a tuple and a string is no number
            options[name] = TypeAdapter(types[name]).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            raise InvalidInput(f"sae.{name} is {value!r}: {error.errors()[0]['msg']}") from error
    if "d_sae" not in options:
        raise InvalidInput("sae.d_sae is missing; give the number of latents")
    if skip and job.kind != "transcoder":
        raise InvalidInput("sae.skip belongs to a transcoder; give data.hook_out, or leave skip out")
    kinds = {"sae": Sae, "transcoder": SkipTranscoder if skip else Transcoder, "crosscoder": Crosscoder}
    return kinds[job.kind](options.pop("d_sae"), options.pop("k", None), **options)


def parts(job: SaeJob) -> tuple[Run, Run]:
    """The training and the evaluation part of the job's run."""
    from millpond.store.lake import open_lake

    data = job.data
    return open_lake(data.lake)[data.run].split(data.test, data.seed, by=data.split_by)


def rows_of(job: SaeJob, part: Run) -> tuple[Any, ...]:
    """The arguments of `fit` and `evaluate` for a part of the run."""
    if job.data.hooks:
        return ({name: part[name] for name in part.match(job.data.hooks)},)
    names = [job.data.hook, job.data.hook_out]
    return tuple(part[name] for name in names if name)


def run_job(job: SaeJob, *, resume: bool = False) -> tuple[Sae, Result]:
    """Train, keep the autoencoder and its evaluation in `train.out`, and return both.

    Raises:
        InvalidInput: as `Sae.fit`.
    """
    from contextlib import ExitStack

    sae, out = new_sae(job), Path(job.train.out)
    train, test = parts(job)
    with ExitStack() as stack:
        client = None
        if job.train.workers:
            from millpond.analysis.cluster import lake_cluster, with_workers
            from millpond.store.configuration import read_configuration
            from millpond.store.lake import open_lake

            lake = open_lake(job.data.lake)
            cluster = with_workers(read_configuration(lake).cluster, job.train.workers)
            client = stack.enter_context(lake_cluster(lake, cluster))
        options: dict[str, Any] = {"tokens": job.train.tokens, "epochs": job.train.epochs, "resume": resume}
        sae.fit(*rows_of(job, train), **options, out=out, client=client)  # type: ignore[misc]
    write_whole(out / "job.json", (job.model_dump_json(indent=1) + "\n").encode())
    sae.save(out)
    return sae, evaluate(sae, rows_of(job, test), out)


def evaluate(sae: Sae, rows: tuple[Any, ...], out: Path) -> Result:
    """Evaluate, and write `evaluation.json` into `out`."""
    result = sae.evaluate(*rows)
    keep_values(out / "evaluation.json", result)
    return result


def keep_values(path: Path, result: Result) -> None:
    """Write a result's values and evidence as JSON."""
    import numpy as np

    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in result.values.items()}
    text = json.dumps({"kind": result.kind, "values": values, "evidence": dict(result.evidence)}, indent=1)
    write_whole(path, (text + "\n").encode())
