"""A run, or the part of it that some prompts make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import HookNotCaptured, InvalidInput, RunOpen
from millpond.store.hooks import match_hooks, summarize_hooks
from millpond.store.manifest import Manifest
from millpond.store.objects import Storage, as_storage
from millpond.store.rows import RowPlan
from millpond.store.snapshot import Snapshot, load_snapshot

if TYPE_CHECKING:
    import xarray as xr

    from millpond.store.labels import Labels
    from millpond.store.stream import ActivationStream


def open_run(where: Storage | str | os.PathLike[str], version: int | None = None) -> Run:
    """Open the run at `where`, its folder or URL, as it is now; what is committed later is seen by opening it again.

    With `version`, an open run as it was when that manifest version was made.
    """
    snapshot = load_snapshot(as_storage(where), version)
    offsets = np.concatenate([[0], np.cumsum(snapshot.n_rows)]).astype(np.int64)
    plan = RowPlan(snapshot.run, snapshot.spec, snapshot.parts, offsets, snapshot.visible)
    return Run(plan, snapshot)


class Run:
    """Activations of one capture campaign, with their tokens, prompts and labels.

    Opening a run and looking at it reads no activation. `run[hook]` is lazy; `run.split` and
    `run.select` give the same kind of object over some of the prompts.
    """

    def __init__(self, plan: RowPlan, snapshot: Snapshot) -> None:
        self.plan = plan
        self.snapshot = snapshot
        self.manifest = snapshot.manifest

    @property
    def version(self) -> int:
        """The manifest version that this view is pinned to; 0 before the first compaction, and when sealed."""
        return self.snapshot.version.number

    @property
    def _prompts(self) -> pd.DataFrame:
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

    @property
    def nbytes(self) -> int:
        """Bytes of the stored activations of all hooks."""
        return self.n_rows * self.plan.spec.activation_array.row_bytes * len(self.hooks)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt, its index the number that the `prompt` coordinate holds."""
        return self._prompts[self.plan.chosen]

    @cached_property
    def labels(self) -> Labels:
        """Labels by name, one value a row each."""
        from millpond.store.labels import Labels

        return Labels(self.plan, self._prompts, self.manifest.prompt_labels if self.manifest else ())

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

        names = self.match(hook) if isinstance(hook, str) else ()
        if len(names) != 1:
            raise HookNotCaptured(
                f"{hook!r} names {len(names)} hook points; name one: run {self.name!r} holds {summarize_hooks(self.hooks)}"
            )
        return activations(self.plan, names[0]).assign_attrs(state=self.state)

    @property
    def tokens(self) -> xr.Dataset:
        """The row coordinates `prompt`, `position` and `token_id` alone, lazy."""
        import xarray as xr

        from millpond.store.lazy import coordinates

        return xr.Dataset(coordinates(self.plan))

    def select(self, prompts: NDArray[np.bool_] | pd.Series[bool]) -> Run:
        """The part of the run whose prompts `prompts` marks, one boolean for each row of `run.prompts`.

        Raises:
            InvalidInput: `prompts` is not that.
        """
        if isinstance(prompts, pd.Series) and not prompts.index.equals(self.prompts.index):
            raise InvalidInput("prompts is a Series with another index than run.prompts; reindex it or give an array")
        marks = np.asarray(prompts)
        if marks.dtype != bool or marks.shape != (len(self.prompts),):
            raise InvalidInput(
                f"prompts has data type {marks.dtype} and shape {marks.shape}; give {len(self.prompts)} booleans, one a prompt"
            )
        chosen = self.plan.chosen.copy()
        chosen[np.flatnonzero(chosen)] = marks
        plan = RowPlan(self.plan.folder, self.plan.spec, self.plan.parts, self.plan.offsets, chosen)
        return Run(plan, self.snapshot)

    def split(self, test: float = 0.2, seed: int = 0, by: str | None = None) -> tuple[Run, Run]:
        """Split by prompt into a training and a test part, never by token.

        Args:
            test: fraction of the prompts, or of the groups, that goes into the test part.
            seed: of the random choice.
            by: a column of `run.prompts`, such as the document; its groups are kept together.

        Raises:
            InvalidInput: `test` is not between 0 and 1, a part would be empty, or there is no column `by`.
        """
        if not 0 < test < 1:
            raise InvalidInput(f"test is {test}; give a fraction between 0 and 1")
        if by is not None and by not in self.prompts:
            raise InvalidInput(
                f"by={by!r} is no column of the prompts; they have {', '.join(map(str, self.prompts.columns))}"
            )
        groups = self.prompts.index.to_series() if by is None else self.prompts[by]
        names = groups.drop_duplicates().to_numpy()
        n_test = round(len(names) * test)
        if not 0 < n_test < len(names):
            raise InvalidInput(
                f"test={test} of {len(names)} {by or 'prompt'}s leaves a part empty; capture more or change test"
            )
        chosen = np.random.default_rng(seed).permutation(len(names))[:n_test]
        in_test = groups.isin(names[chosen]).to_numpy()
        return self.select(~in_test), self.select(in_test)

    def stream(
        self,
        hook: str,
        batch_size: int = 4096,
        *,
        seed: int = 0,
        epochs: int | None = None,
        buffer_rows: int = 65_536,
        start_step: int = 0,
    ) -> ActivationStream:
        """Shuffled batches of `hook` for a trainer: float32 arrays (batch_size, d_model).

        Whole chunks are read in random order and mixed in a buffer of about `buffer_rows` rows, so
        memory is bounded by three such buffers. The batches depend on the arguments alone;
        `start_step` goes on exactly after that many batches. The last batch of an epoch is filled
        from the next epoch; with `epochs` given, an incomplete last batch is left out.

        Raises:
            HookNotCaptured: the run does not hold `hook`.
            InvalidInput: the view has fewer rows than a batch.
        """
        from millpond.store.stream import ActivationStream

        return ActivationStream(
            self.plan,
            self[hook].attrs["hook"],
            batch_size,
            seed=seed,
            epochs=epochs,
            buffer_rows=buffer_rows,
            step=start_step,
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
