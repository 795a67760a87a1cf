"""The commands `millpond sae train | show | export`; `hub.sae_commands` has `eval`, which may start vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.sae.job import SaeJob
    from millpond.store.result import Result


@dataclass(frozen=True)
class SaeTrain:
    """Train an autoencoder, transcoder or crosscoder, as a TOML file says."""

    job: Annotated[Path, tyro.conf.Positional]
    """The job file; docs/sae.md describes it."""
    resume: bool = False
    """Go on from the checkpoint of an interrupted training of the same job."""

    def run(self) -> int:
        """Train, and print the evaluation."""
        from millpond.analysis.sae.job import read_job, run_job

        job = read_job(self.job)
        sae, result = run_job(job, resume=self.resume)
        print_result(result)
        print(f"{sae!r} is in {job.train.out}")
        return 0


@dataclass(frozen=True)
class SaeShow:
    """Write a page of latents with the text that activates them, and a table of all latents."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `millpond sae train` wrote."""
    tokenizer: Path
    """The model's `tokenizer.json`, or its folder."""
    labels: tuple[str, ...] = ()
    """Labels of the run to set latents beside."""
    model: Path | None = None
    """Folder of the model's weights, for the effect of latents on logits."""
    latents: int = 100
    """Latents on the page."""
    out: Path | None = None
    """The page; `latents.html` in the folder by default. The table is beside it, with the ending .csv."""

    def run(self) -> int:
        """Write both and print their paths."""
        from tokenizers import Tokenizer

        from millpond.analysis.sae.autolabel import auto_labels
        from millpond.analysis.sae.estimator import Sae
        from millpond.analysis.sae.job import parts
        from millpond.analysis.sae.page import PageOptions, write_page

        job = job_of(self.folder)
        if job.kind == "crosscoder":
            raise InvalidInput(f"{self.folder} holds a crosscoder; pages are made of autoencoders and transcoders")
        sae = Sae.load(self.folder)
        train, test = parts(job)
        path = self.tokenizer / "tokenizer.json" if self.tokenizer.is_dir() else self.tokenizer
        tokenizer = Tokenizer.from_file(str(path))
        hook = str(job.data.hook)
        labels = [{name: part.labels[name] for name in self.labels} for part in (train, test)]
        auto = auto_labels(sae, train[hook], labels[0], test[hook], labels[1]) if self.labels else None
        page = self.out or self.folder / "latents.html"
        table = write_page(
            sae, test, page, lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)), hook=hook,
            labels=labels[1], model=self.model, auto=auto, options=PageOptions(latents=self.latents),
        )  # fmt: skip
        table.to_csv(page.with_suffix(".csv"))
        print(page)
        print(page.with_suffix(".csv"))
        return 0


@dataclass(frozen=True)
class SaeExport:
    """Write a trained autoencoder in SAELens' layout, its threshold set anew if wished."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `millpond sae train` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    l0: float | None = None
    """Active latents a row on the held-out part that the threshold is to give; as trained by default."""

    def run(self) -> int:
        """Write the folder and print its path."""
        from millpond.analysis.sae.estimator import Sae
        from millpond.analysis.sae.job import parts, rows_of

        if self.out.exists() and any(self.out.iterdir()):
            raise InvalidInput(f"{self.out} is not empty; give a new folder")
        sae = Sae.load(self.folder)
        if self.l0 is not None:
            job = job_of(self.folder)
            if job.kind == "crosscoder":
                raise InvalidInput("l0 is set for autoencoders and transcoders; leave it out for a crosscoder")
            sae = sae.calibrate(rows_of(job, parts(job)[1])[0], self.l0)
        print(sae.save(self.out))
        return 0


def job_of(folder: Path) -> SaeJob:
    """The job that was trained into `folder`.

    Raises:
        InvalidInput: `folder` holds none.
    """
    from millpond.analysis.sae.job import read_job

    if not (folder / "job.json").is_file():
        raise InvalidInput(f"{folder} holds no job.json; give a folder that millpond sae train wrote")
    return read_job(folder / "job.json")


def print_result(result: Result) -> None:
    """Its single values, one a line."""
    for name, value in result.values.items():
        if isinstance(value, float):
            print(f"{name:22} {value:.4f}")
    print(f"{'rows':22} {next(iter(result.evidence.values())):,}")
