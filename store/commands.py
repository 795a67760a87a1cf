"""The lake's subcommands of `millpond`: each is a frozen dataclass whose fields are the flags, their docstrings the help."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from millpond.store.errors import InvalidInput, LakeCorrupt, MillpondError

if TYPE_CHECKING:
    from millpond.store.run import Run

LakeUrl = Annotated[str, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class _OneLake:
    lake: LakeUrl
    """Folder or URL of the lake."""


@dataclass(frozen=True)
class _OneRun(_OneLake):
    name: Name
    """The run."""


@dataclass(frozen=True)
class _SomeRuns(_OneLake):
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The runs; by default every one that this is for."""


@dataclass(frozen=True)
class Ls(_OneLake):
    """List the runs of a lake."""

    def run(self) -> int:
        """Print one line a run; `filling` is a copy or an import that is being written, or was interrupted."""
        from millpond.store.commits import is_unfilled
        from millpond.store.lake import open_lake
        from millpond.store.reprs import human_bytes

        lake = open_lake(self.lake)
        readable = True
        for name in lake.runs():
            try:
                run = lake[name]
            except LakeCorrupt as error:
                print(f"{name:32} {one_line(error)}")
                readable = False
                continue
            dropped = f" ({run.n_dropped_rows:,} rows dropped)" if run.n_dropped_rows else ""
            state = "filling" if run.state == "open" and is_unfilled(run.plan.folder) else run.state
            print(
                f"{name:32} {state:7} {len(run.prompts):>9,} prompts {run.n_rows:>13,} rows "
                f"{len(run.hooks):>3} hooks {human_bytes(run.nbytes):>10}{dropped}"
            )
        return 0 if readable else 1


@dataclass(frozen=True)
class Show(_OneRun):
    """Show what a run holds and where it came from."""

    stats: bool = False
    """Print each hook's statistics, as they were gathered while it was written."""

    def run(self) -> int:
        """Print the run's facts, who followed it and how far, and its provenance."""
        from millpond.store.follow import consumers, position
        from millpond.store.lake import open_lake
        from millpond.store.retention import read_retention

        run = open_lake(self.lake)[self.name]
        list(run.labels)  # looked up, so that they are shown too
        print(run)
        folder = run.plan.folder
        for name in consumers(folder):
            at = position(folder, name)
            print(f"  consumer {name}: used {at.rows:,} rows of {at.prompts:,} prompts in {at.views:,} views")
        retention = read_retention(folder)
        if retention is not None:
            print(f"  retention: until used by {', '.join(retention.consumed_by)}, and {retention.grace_s:,.0f} s")
        if self.stats:
            for hook, found in run.stats.items():
                print(f"  {hook}: {found!r}")
        print("  provenance:")
        for line in json.dumps(run.provenance, indent=2).splitlines()[1:-1]:
            print("  " + line)
        return 0


@dataclass(frozen=True)
class Verify(_SomeRuns):
    """Check every byte, count and value of a lake's runs against their manifests."""

    def run(self) -> int:
        """Print one line a run and one a problem; 1 if there is any."""
        from millpond.store.lake import open_lake
        from millpond.store.reprs import human_bytes
        from millpond.store.verify import verify_run

        lake = open_lake(self.lake)
        whole = True
        for name in self.names or lake.runs():
            try:
                found = verify_run(lake[name], progress=sys.stderr.isatty())
            except LakeCorrupt as error:
                print(f"{name}: {one_line(error)}")
                whole = False
                continue
            verdict = "whole" if found.ok else f"{len(found.problems)} problems"
            dropped = f" ({found.dropped_rows:,} more were used and dropped)" if found.dropped_rows else ""
            print(
                f"{name}: {verdict}; {found.rows:,} rows{dropped}, {found.prompts:,} prompts, "
                f"{found.files} files, {human_bytes(found.bytes)} checked"
            )
            for problem in found.problems:
                print(f"  {problem}")
            whole = whole and found.ok
        return 0 if whole else 1


@dataclass(frozen=True)
class Gc(_OneLake):
    """Remove what nobody can see any more: abandoned segments, superseded files, used rows, runs past their grace period."""

    grace: float | None = None
    """Seconds for which things are kept; by default as the lake is configured."""
    dry_run: bool = False
    """Print what would be removed."""

    def run(self) -> int:
        """Print one line a run with something to remove; 1 if one cannot be read."""
        from millpond.store.configuration import expire_runs, read_configuration
        from millpond.store.lake import open_lake
        from millpond.store.reprs import human_bytes

        lake = open_lake(self.lake)
        for name in expire_runs(lake, dry_run=self.dry_run):
            print(f"{name}: {'would be' if self.dry_run else ''} removed, older than keep_runs_s".replace("  ", " "))
        grace = read_configuration(lake).collection_grace_s if self.grace is None else self.grace
        readable = True
        for name, found in lake.collect(grace_s=grace, dry_run=self.dry_run).items():
            if found.problem is not None:
                print(f"{name}: {one_line(found.problem)}")
                readable = False
            elif found.paths:
                what = "would free" if self.dry_run else "freed"
                print(f"{name}: {what} {human_bytes(found.bytes)} in {len(found.paths)} places")
        return 0 if readable else 1


@dataclass(frozen=True)
class Compact(_SomeRuns):
    """Fold the commits of open runs into manifest versions, so that they open fast."""

    def run(self) -> int:
        """Print one line a run; 1 if one cannot be read."""
        from millpond.store.compaction import compact
        from millpond.store.lake import open_lake

        lake = open_lake(self.lake)
        readable = True
        for name in self.names or lake.runs():
            try:
                run = lake[name]
                if self.names or run.state == "open":
                    print(f"{name}: {compact(run.plan.folder)} commits folded")
            except LakeCorrupt as error:
                print(f"{name}: {one_line(error)}")
                readable = False
        return 0 if readable else 1


@dataclass(frozen=True)
class Rm(_OneRun):
    """Remove a run: it vanishes at once, and `millpond gc` removes its bytes when the grace period is over."""

    grace: float | None = None
    """Seconds in which `millpond restore` brings it back; by default as the lake is configured; 0 removes it now."""

    def run(self) -> int:
        """Remove the run."""
        from millpond.store.configuration import read_configuration
        from millpond.store.lake import open_lake

        lake = open_lake(self.lake)
        grace = read_configuration(lake).deletion_grace_s if self.grace is None else self.grace
        lake.delete(self.name, grace_s=grace)
        kept = f"; millpond restore brings it back for {grace:,.0f} s" if grace > 0 else ""
        print(f"removed run {self.name!r}{kept}")
        return 0


@dataclass(frozen=True)
class Retain(_OneRun):
    """Say which rows of an open run need not be kept: those that its consumers (`Run.follow`) have used."""

    consumed_by: tuple[str, ...] = ()
    """Rows that all of these consumers have used are dropped; without any name, all that are left are kept."""
    grace: float | None = None
    """Seconds for which readers may go on reading dropped rows; by default as the lake is configured."""

    def run(self) -> int:
        """Set the run's retention."""
        from millpond.store.configuration import read_configuration
        from millpond.store.lake import open_lake

        lake = open_lake(self.lake)
        grace = read_configuration(lake).collection_grace_s if self.grace is None else self.grace
        lake.retain(self.name, self.consumed_by or None, grace_s=grace)
        kept = f"until used by {', '.join(self.consumed_by)}, and {grace:,.0f} s" if self.consumed_by else "all of them"
        print(f"rows of run {self.name!r} are kept: {kept}")
        return 0


@dataclass(frozen=True)
class Restore(_OneRun):
    """Bring back a removed run whose grace period is not over."""

    def run(self) -> int:
        """Restore the run."""
        from millpond.store.lake import open_lake

        open_lake(self.lake).restore(self.name)
        print(f"restored run {self.name!r}")
        return 0


@dataclass(frozen=True)
class Cp(_OneRun):
    """Copy a sealed run, or some rows of any run, into a new run of the same or another lake."""

    target_lake: LakeUrl
    """Folder or URL of the lake that gets the copy; made if it is missing."""
    target_name: Name
    """The new run."""
    where: str | None = None
    """Copy only the rows that satisfy this condition, such as "deceptive and position > 0"."""
    hooks: tuple[str, ...] = ()
    """Names or globs of the hooks to copy; all by default."""

    def run(self) -> int:
        """Copy the run."""
        from millpond.store.lake import open_lake

        view = open_lake(self.lake)[self.name]
        if self.where is not None:
            view = view.select(where=self.where)
        target = open_lake(self.target_lake, create=True)
        hooks = view.match(self.hooks) if self.hooks else view.hooks
        made = view.materialise(self.target_name, lake=target, hooks=hooks)
        print(f"wrote run {made.name!r}: {made.n_rows:,} rows of {len(made.hooks)} hooks")
        return 0


@dataclass(frozen=True)
class Import:
    """Make a run from activations that another tool stored."""

    lake: LakeUrl
    """Folder or URL of the lake; made if it is missing."""
    name: Name
    """The new run."""
    path: Annotated[Path, tyro.conf.Positional]
    """A file, or a folder of files."""
    format: Literal["saelens", "safetensors", "numpy"]
    """`saelens`: the Arrow files of its cache runner; `numpy`: .npy or .npz."""
    hooks: dict[str, str] = field(default_factory=dict)
    """Array names and the hook points they are, as in `--hooks acts blocks.12.hook_resid_post`."""
    rows_are: Literal["prompts", "tokens"] | None = None
    """What the rows of two-dimensional arrays are."""
    prompts: Path | None = None
    """A Parquet file with a column `id` and metadata of the prompts, in order."""
    model: str = ""
    """Name of the model."""

    def run(self) -> int:
        """Import the run."""
        import pandas as pd

        from millpond.store.importing import import_run
        from millpond.store.lake import open_lake

        try:
            prompts = None if self.prompts is None else pd.read_parquet(self.prompts)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"prompts file {str(self.prompts)!r} cannot be read as Parquet: {error}") from error
        made = import_run(
            open_lake(self.lake, create=True),
            self.name,
            self.path,
            self.format,
            hooks=self.hooks,
            rows_are=self.rows_are,
            prompts=prompts,
            model=self.model,
        )
        print(
            f"wrote run {made.name!r}: {made.n_rows:,} rows of {len(made.hooks)} hooks, {len(made.prompts):,} prompts"
        )
        return 0


@dataclass(frozen=True)
class Export(_OneRun):
    """Write a run's rows as files of other tools. They are activations: keep them inside the vault."""

    out: Annotated[Path, tyro.conf.Positional]
    """New folder."""
    format: Literal["safetensors", "parquet", "numpy"]
    """Parquet and NumPy have no bfloat16: such rows become float32."""
    where: str | None = None
    """Only the rows that satisfy this condition."""
    hooks: tuple[str, ...] = ()
    """Names or globs; all hooks by default."""

    def run(self) -> int:
        """Export the rows."""
        from millpond.store.exporting import export_run
        from millpond.store.lake import open_lake

        view: Run = open_lake(self.lake)[self.name]
        if self.where is not None:
            view = view.select(where=self.where)
        files = export_run(view, self.out, self.format, hooks=view.match(self.hooks) if self.hooks else None)
        print(f"wrote {view.n_rows:,} rows into {len(files)} files in {self.out}")
        return 0


@dataclass(frozen=True)
class Configure(_OneLake):
    """Show or change a lake's quotas, retention and cluster; only what is given changes."""

    quota_bytes: int | None = None
    """Most bytes of all runs together; -1 for no limit."""
    run_quota_bytes: int | None = None
    """Most bytes of one run; -1 for no limit."""
    deletion_grace_s: float | None = None
    """How long a removed run can be restored."""
    collection_grace_s: float | None = None
    """How long superseded files and abandoned segments are kept."""
    keep_runs_s: float | None = None
    """Age at which `millpond gc` removes sealed runs; -1 keeps them."""
    cluster: Path | None = None
    """TOML file with the tables `[cluster]` and `[hosts]` (docs/clusters.md): where analyses of this lake run."""

    def run(self) -> int:
        """Print the configuration."""
        from millpond.store.cluster import read_cluster_file
        from millpond.store.configuration import changed, read_configuration, write_configuration
        from millpond.store.lake import open_lake

        lake = open_lake(self.lake)
        given = {
            name: value for name, value in vars(self).items() if name not in ("lake", "cluster") and value is not None
        }
        if self.cluster is not None:
            given |= read_cluster_file(self.cluster)
        configuration = read_configuration(lake)
        if given:
            configuration = changed(configuration, given)
            write_configuration(lake, configuration)
        for name, value in configuration.model_dump().items():
            shown = json.dumps(value) if isinstance(value, dict) else value
            print(f"{name:20} {'none' if value in (None, {}) else shown}")
        return 0


@dataclass(frozen=True)
class Metrics(_OneLake):
    """Print a lake's state in Prometheus' text format, for node_exporter's textfile collector."""

    def run(self) -> int:
        """Print the metrics."""
        from millpond.store.lake import open_lake
        from millpond.store.metrics import metrics

        print(metrics(open_lake(self.lake)), end="")
        return 0


COMMANDS = {
    "ls": Ls,
    "show": Show,
    "verify": Verify,
    "gc": Gc,
    "compact": Compact,
    "rm": Rm,
    "restore": Restore,
    "retain": Retain,
    "cp": Cp,
    "import": Import,
    "export": Export,
    "configure": Configure,
    "metrics": Metrics,
}
"""By the names they have in the shell."""


def one_line(error: MillpondError) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: " + " ".join(str(error).split())
