"""A run, or the part of it that some prompts or rows make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import HookNotCaptured, RunOpen
from millpond.store.hooks import match_hooks, summarize_hooks
from millpond.store.manifest import Manifest
from millpond.store.objects import Storage, as_storage
from millpond.store.rows import RowPlan
from millpond.store.snapshot import Snapshot, load_snapshot

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray as xr

    from millpond.store.labels import Labels
    from millpond.store.lake import Lake
    from millpond.store.read_views import Reads
    from millpond.store.selection import PositionChoice
    from millpond.store.statistics_files import RunStatistics
    from millpond.store.stream import ActivationStream


def open_run(where: Storage | str | os.PathLike[str], version: int | None = None, *, lake: Lake | None = None) -> Run:
    """Open the run at `where`, its folder or URL, as it is now; what is committed later is seen by opening it again.

    With `version`, an open run as it was when that manifest version was made.
    """
    snapshot = load_snapshot(as_storage(where), version)
    offsets = np.concatenate([[0], np.cumsum(snapshot.n_rows)]).astype(np.int64)
    plan = RowPlan(snapshot.run, snapshot.spec, snapshot.parts, offsets, snapshot.visible)
    return Run(plan, snapshot, lake)


class Run:
    """Activations of one capture campaign, with their tokens, prompts and labels.

    Opening a run and looking at it reads no activation. `run[hook]` is lazy; `run.split` and
    `run.select` give the same kind of object over some of the prompts or rows.
    """

    def __init__(self, plan: RowPlan, snapshot: Snapshot, lake: Lake | None = None) -> None:
        self.plan = plan
        self.lake = lake
        """Which it was opened from, if it was."""
        self.snapshot = snapshot
        self.manifest = snapshot.manifest

    @property
    def version(self) -> int:
        """The manifest version that this view is pinned to; 0 before the first compaction, and when sealed."""
        return self.snapshot.version.number

    @property
    def prompt_table(self) -> pd.DataFrame:
        """One row a stored prompt of the whole run, whatever the view; `run.prompts` is the view's."""
        return self.snapshot.prompts

    @property
    def name(self) -> str:
        """The run's name in its lake."""
        return self.plan.spec.name

    @property
    def state(self) -> Literal["open", "sealed"]:
        """`open` while it may grow, `sealed` when it cannot change."""
        return "open" if self.manifest is None else "sealed"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points held, by layer."""
        return self.plan.spec.hooks

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.plan.spec.d_model

    @property
    def dtype(self) -> str:
        """Data type of the stored activations."""
        return self.plan.spec.dtype

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Model, revision, weight bytes, versions and configuration of the capture."""
        return self.plan.spec.provenance

    @property
    def n_rows(self) -> int:
        """Rows of every hook."""
        return self.plan.n_rows

    def __len__(self) -> int:
        return self.n_rows

    @cached_property
    def dropped(self) -> pd.DataFrame:
        """The prompts whose rows retention took away from the open run, as they were committed; see `Lake.retain`."""
        table: pd.DataFrame = self.prompt_table[self.snapshot.dropped]
        return table

    @property
    def n_dropped_rows(self) -> int:
        """Rows that retention took away: of an open run, or before the run was sealed."""
        if self.manifest is not None:
            return self.manifest.counts.get("rows_dropped", 0)
        return int(self.snapshot.n_rows[self.snapshot.dropped].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored activations of all hooks, and of all reads."""
        return self.n_rows * self.plan.spec.row_bytes()

    @cached_property
    def reads(self) -> Reads:
        """What was read of each row as it was captured, by name: lazy Datasets with the row coordinates."""
        from millpond.store.read_views import Reads

        return Reads(self.plan)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt, its index the number that the `prompt` coordinate holds."""
        return self.prompt_table[self.plan.chosen]

    @cached_property
    def labels(self) -> Labels:
        """Labels by name, one value a row each."""
        from millpond.store.labels import Labels

        captured = self.manifest.prompt_labels if self.manifest else ()
        return Labels(self.plan, self.prompt_table, captured, self.manifest is not None)

    @cached_property
    def stats(self) -> RunStatistics:
        """Statistics of each hook over the whole run, gathered when it was written: no activation is read.

        They are those of the run, so a view has none.
        """
        from millpond.store.statistics_files import RunStatistics

        return RunStatistics(self)

    def match(self, hooks: str | Iterable[str]) -> tuple[str, ...]:
        """The run's hooks that `hooks` (names or globs such as `blocks.*.hook_resid_post`) selects.

        Raises:
            HookNotCaptured: a name or glob selects none.
        """
        return match_hooks(hooks, self.hooks, f"run {self.name!r} holds")

    def __getitem__(self, hook: str) -> xr.DataArray:
        """The activations of `hook`: lazy float32, dimensions (row, d_model), with row coordinates.

        Raises:
            HookNotCaptured: the run does not hold `hook`.
        """
        from millpond.store.lazy import activations

        return activations(self.plan, self._one(hook)).assign_attrs(state=self.state)

    def _one(self, hook: str) -> str:
        if not isinstance(hook, str):
            raise HookNotCaptured(
                f"{hook!r} is no hook point; name one: run {self.name!r} holds {summarize_hooks(self.hooks)}; "
                "run.select(...) chooses rows"
            )
        names = self.match(hook)
        if len(names) != 1:
            raise HookNotCaptured(
                f"{hook!r} names {len(names)} hook points; name one: run {self.name!r} holds {summarize_hooks(self.hooks)}"
            )
        return names[0]

    @property
    def tokens(self) -> xr.Dataset:
        """The row coordinates `prompt`, `position` and `token_id` alone, lazy."""
        import xarray as xr

        from millpond.store.lazy import coordinates

        return xr.Dataset(coordinates(self.plan))

    def select(
        self,
        prompts: NDArray[np.bool_] | pd.Series[bool] | Sequence[str] | None = None,
        *,
        where: str | None = None,
        position: PositionChoice | None = None,
        token_id: int | Sequence[int] | None = None,
        sample: int | float | None = None,
        seed: int = 0,
    ) -> Run:
        """The rows of this view that satisfy every condition given; reads the index and labels that they name, no more.

        Args:
            prompts: one boolean for each row of `run.prompts`, or ids.
            where: a condition on columns of `run.prompts`, labels (`mood@1` for an old version), `prompt`, `position` and
                `token_id`, such as `"deceptive and position > 0 and source in ['web', 'book']"`.
            position: `prompt`, `generated`, `last` (prompt token), a number or numbers (negative ones from the prompt's
                end), or a slice.
            token_id: one, or several.
            sample: a random sample of what is left: a number of rows, or a fraction of them.
            seed: of the sample.

        Raises:
            InvalidInput: a condition does not fit the run.
        """
        from millpond.store.selection import mark_prompts, select_rows

        plan = self.plan
        if prompts is not None:
            chosen = plan.chosen.copy()
            chosen[np.flatnonzero(chosen)] = mark_prompts(self, prompts)
            plan = plan.select_prompts(chosen)
        view = Run(plan, self.snapshot, self.lake)
        if where is position is token_id is sample is None:
            return view
        plan = select_rows(view, where=where, position=position, token_id=token_id, sample=sample, seed=seed)
        return Run(plan, self.snapshot, self.lake)

    def split(self, test: float = 0.2, seed: int = 0, by: str | None = None) -> tuple[Run, Run]:
        """Split by prompt into a training and a test part, never by token.

        Args:
            test: fraction of the prompts, or of the groups, that goes into the test part.
            seed: of the random choice.
            by: a column of `run.prompts`, such as the document; its groups are kept together.

        Raises:
            InvalidInput: `test` is not between 0 and 1, a part would be empty, or there is no column `by`.
        """
        from millpond.store.selection import draw_prompts

        in_test = draw_prompts(self, test, seed, by)
        return self.select(~in_test), self.select(in_test)

    def stream(
        self,
        hooks: str | Iterable[str],
        batch_rows: int = 4096,
        *,
        seed: int = 0,
        epochs: int | None = None,
        buffer_rows: int = 65_536,
        rank: int = 0,
        world: int = 1,
        dtype: str = "float32",
        state: Mapping[str, Any] | None = None,
    ) -> ActivationStream:
        """Shuffled batches for a trainer: arrays (batch_rows, d_model), or a dict of them if `hooks` is not one name.

        Whole chunks are read in random order and mixed in a buffer of `buffer_rows` rows, and at least two chunks;
        memory is bounded by three such buffers. Hooks are aligned by row. The batches depend on the arguments
        alone. The last batch of an epoch is filled from the next one; with `epochs`, an incomplete last batch is left out.

        Args:
            hooks: one name, or names and globs.
            batch_rows: rows a batch.
            seed: of the order.
            epochs: times that every row is given; without end by default.
            buffer_rows: rows that are mixed.
            rank: this trainer's number among `world`, which share the rows of every epoch evenly.
            world: number of trainers.
            dtype: `float32`, or the run's own: bfloat16 batches are `ml_dtypes.bfloat16`, or torch's from `stream.torch()`.
            state: what `stream.state()` returned, to go on exactly after it.

        Raises:
            HookNotCaptured: the run does not hold a hook.
            InvalidInput: an argument cannot be used, or the state is that of another stream.
        """
        from millpond.store.stream import ActivationStream

        names = self._one(hooks) if isinstance(hooks, str) and not set("*?[") & set(hooks) else self.match(hooks)
        return ActivationStream(
            self.plan,
            names,
            batch_rows,
            seed=seed,
            epochs=epochs,
            buffer_rows=buffer_rows,
            rank=rank,
            world=world,
            dtype=dtype,
            state=state,
        )

    def as_data_provider(
        self, hooks: str | Iterable[str], batch_size: int = 4096, *, seed: int = 0, buffer_rows: int = 65_536
    ) -> Iterator[Any]:
        """Endless shuffled batches for other libraries' trainers, as float32 tensors.

        Of one hook: tensors (batch_size, d_model), as `sae_lens.SAETrainer` and
        `dictionary_learning.trainSAE` take. Of several names, or a glob that selects several:
        dictionaries by hook, aligned by row, as `sae_lens.MultiSAETrainer` takes.

        Raises:
            HookNotCaptured: the run does not hold a hook.
            InvalidInput: the view has fewer rows than a batch.
        """
        from millpond.store.trainers import tensors, tensors_by_hook

        names = self.match(hooks)
        options = {"seed": seed, "buffer_rows": buffer_rows}
        if isinstance(hooks, str) and len(names) == 1:
            return tensors(self, names[0], batch_size, **options)
        return tensors_by_hook(self, names, batch_size, **options)

    def follow(
        self,
        consumer: str | None = None,
        *,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
        view_rows: int | None = None,
    ) -> Iterator[Run]:
        """Views of what is new, as the run grows, until it is sealed; every prompt is in exactly one of them.

        Args:
            consumer: a name under which the views are recorded: one counts as used when the next one is asked for.
                Following again under the same name gives the last one again if it was not used, and goes on after it.
                Retention (`Lake.retain`) may drop what was used.
            poll_s: seconds between looks.
            timeout_s: stop after so long without anything new; by default only sealing ends it.
            view_rows: a view ends with the prompt that reaches so many rows; by default it is all that is new.
        """
        from millpond.store.follow import Follower

        follower = Follower(self, consumer, poll_s=poll_s, timeout_s=timeout_s, view_rows=view_rows)

        def views() -> Iterator[Run]:
            for number, view in follower.views():
                yield view
                follower.use(number)

        return views()

    def materialise(self, name: str, *, lake: Lake | None = None, hooks: str | Iterable[str] | None = None) -> Run:
        """Write the rows of this view as a new, sealed run with its metadata, labels and provenance.

        Args:
            name: of the new run.
            lake: where it goes; by default this run's.
            hooks: which hooks are kept; by default all.
        """
        from millpond.store.materialise import materialise

        return materialise(self, name, lake=lake, hooks=None if hooks is None else self.match(hooks))

    def to_dask(self, hook: str, dtype: str = "float32") -> dask.array.Array:
        """The activations of `hook` as a Dask array (row, d_model), at most one task a shard."""
        from millpond.store.lazy import activation_blocks

        return activation_blocks(self.plan, self._one(hook), dtype)

    def to_numpy(self, hook: str, dtype: str = "float32") -> NDArray[Any]:
        """The activations of `hook` in memory, (row, d_model); bfloat16 as `ml_dtypes.bfloat16`."""
        from millpond.store.lazy import read_all

        return read_all(self.plan, self._one(hook), dtype)

    def to_torch(self, hook: str, dtype: str = "float32") -> torch.Tensor:
        """The activations of `hook` as a tensor on the CPU, (row, d_model)."""
        from millpond.store.dtypes import to_torch

        return to_torch(self.to_numpy(hook, dtype))

    def to_xarray(self, hooks: str | Iterable[str] | None = None, dtype: str = "float32") -> xr.Dataset:
        """The hooks as variables of one lazy Dataset, with the row coordinates and every label as coordinates.

        With `hooks` left out, the reads are variables too, `<name>.<array>`.
        """
        from millpond.store.lazy import dataset

        return dataset(self, self.hooks if hooks is None else self.match(hooks), dtype, reads=hooks is None)

    def check_sealed(self) -> Manifest:
        """The manifest.

        Raises:
            RunOpen: the run may still grow.
        """
        if self.manifest is None:
            raise RunOpen(f"run {self.name!r} is open; finish its capture (millpond capture --resume) first")
        return self.manifest

    def __repr__(self) -> str:
        from millpond.store.reprs import run_text

        return run_text(self)

    def _repr_html_(self) -> str:
        from millpond.store.reprs import run_html

        return run_html(self)
