"""Some of a run's tokens, or one row a prompt made of them, as a view that probes and sweeps take in place of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.probes.inputs import to_memory
from millpond.store.errors import InvalidInput
from millpond.store.rows import Block, RowPlan

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from millpond.store.run import Run

Where = str | Callable[["Run"], Any]
Positions = Literal["all", "prompt", "generated", "last"] | tuple[int, ...] | slice
Pool = Literal["mean", "max", "first", "last"]

_CHUNK_BYTES = 64 << 20
_GAP_ROWS = 64
"""Rows that are not wanted are read along if fewer than this many lie between two that are."""


def select_tokens(
    run: Run,
    *,
    where: Where | None = None,
    positions: Positions = "all",
    pool: Pool | None = None,
    skip_empty: bool = False,
) -> TokenView:
    """The tokens of `run` that `where` and `positions` both choose, pooled to one row a prompt with `pool`.

    Args:
        run: a run or a part of it.
        where: name of a boolean label, or a function of the run that returns one boolean a row.
        positions: `last` is the last prompt token; numbers, and the bounds of a slice, count from 0, or
            from the end of the prompt if negative.
        pool: `mean`, `max`, `first` or `last` of a prompt's chosen rows.
        skip_empty: leave out prompts of which no token is chosen; otherwise they are refused.

    Raises:
        InvalidInput: nothing is chosen, a prompt has no chosen token, or `where` is not boolean.
    """
    if pool not in (None, "mean", "max", "first", "last"):
        raise InvalidInput(f"pool is {pool!r}; give 'mean', 'max', 'first', 'last' or None")
    prompts = to_memory(run.tokens["prompt"])
    place = to_memory(run.tokens["position"])
    n_prompt = run.prompts["n_prompt_tokens"]
    lengths = np.zeros(int(run.prompts.index.max()) + 1 if len(run.prompts) else 0, np.int64)
    lengths[run.prompts.index.to_numpy()] = n_prompt.to_numpy()
    chosen = _at(positions, place, lengths[prompts])
    if where is not None:
        marks = to_memory(where(run) if callable(where) else run.labels[where])
        if marks.dtype != bool or marks.shape != chosen.shape:
            raise InvalidInput(
                f"where gives {marks.dtype} of shape {marks.shape}; give one boolean for each of the {len(chosen):,} rows"
            )
        chosen &= marks
    if not chosen.any():
        raise InvalidInput(f"no token of the {len(run.prompts):,} prompts is chosen; change where or positions")
    empty = len(run.prompts) - len(np.unique(prompts[chosen]))
    if empty and not skip_empty:
        raise InvalidInput(
            f"{empty:,} of {len(run.prompts):,} prompts have no chosen token; change where or positions, or give skip_empty=True"
        )
    how = ", ".join(
        text
        for text in (
            "" if where is None else f"where {where if isinstance(where, str) else getattr(where, '__name__', '?')}",
            "" if isinstance(positions, str) and positions == "all" else f"positions {positions}",
            "" if pool is None else f"{pool} a prompt",
        )
        if text
    )
    return TokenView(run, np.flatnonzero(chosen), prompts, pool, how)


class TokenView:
    """Chosen rows of a run; `view[hook]` is lazy, and reads only stretches that hold chosen rows."""

    def __init__(self, run: Run, rows: NDArray[np.int64], prompts: NDArray[Any], pool: Pool | None, how: str) -> None:
        self.run, self.pool, self.how = run, pool, how
        self._rows = rows
        """Chosen rows, counted in `run`."""
        of_prompt = prompts[rows]
        edges = np.flatnonzero(np.diff(of_prompt)) + 1
        self._starts = np.concatenate([[0], edges]) if pool else np.arange(len(rows))
        """First chosen row of each row of the view."""
        self._prompt = of_prompt[self._starts]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def state(self) -> str:
        """`open` or `sealed`, as the run's."""
        return self.run.state

    @property
    def plan(self) -> RowPlan:
        """The run's plan; its rows are not those of the view."""
        return self.run.plan

    @property
    def hooks(self) -> tuple[str, ...]:
        """The run's hooks."""
        return self.run.hooks

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """The prompts that have a row in the view."""
        return self.run.prompts.loc[np.unique(self._prompt)]

    @property
    def n_rows(self) -> int:
        """Rows of the view."""
        return len(self._starts)

    def __len__(self) -> int:
        return self.n_rows

    def match(self, hooks: str | Iterable[str]) -> tuple[str, ...]:
        """The run's hooks that `hooks` selects."""
        return self.run.match(hooks)

    @property
    def tokens(self) -> xr.Dataset:
        """The row coordinates; of pooled rows, those of the last token."""
        import xarray as xr

        return xr.Dataset(coords=self._coordinates)

    @property
    def labels(self) -> Mapping[str, xr.DataArray]:
        """The run's labels, one value a row of the view."""
        return _Labels(self)

    def __getitem__(self, hook: str) -> xr.DataArray:
        """The activations of `hook`: lazy float32, dimensions (row, d_model).

        Raises:
            HookNotCaptured: the run does not hold `hook`.
        """
        import dask.array
        import xarray as xr
        from dask.base import tokenize
        from dask.highlevelgraph import HighLevelGraph

        whole = self.run[hook]
        pieces = self._pieces
        name = f"millpond-selected-{tokenize(whole.data.name, self._rows, self.pool)}"
        read = _ReadPiece(self._whole_plan, str(whole.attrs["hook"]), self.pool)
        layer = {(name, number, 0): (read, piece) for number, piece in enumerate(pieces)}
        chunks = (tuple(len(piece.starts) for piece in pieces), (whole.shape[1],))
        data = dask.array.Array(HighLevelGraph.from_collections(name, layer), name, chunks, dtype=np.float32)
        return xr.DataArray(
            data, dims=("row", "d_model"), coords=self._coordinates, name=hook, attrs=whole.attrs | {"tokens": self.how}
        )

    def __repr__(self) -> str:
        return f"<TokenView of {self.name!r}: {self.n_rows:,} of {len(self.run):,} rows, {self.how or 'all'}>"

    @cached_property
    def _coordinates(self) -> dict[str, Any]:
        last = self._rows[np.append(self._starts[1:], len(self._rows)) - 1]
        found = {"prompt": ("row", self._prompt)}
        for name in ("position", "token_id"):
            found[name] = ("row", to_memory(self.run.tokens[name])[last])
        return found

    @cached_property
    def _whole_plan(self) -> RowPlan:
        plan = self.run.plan
        return RowPlan(plan.folder, plan.spec, plan.parts, plan.offsets, np.ones_like(plan.chosen))

    @cached_property
    def _stored(self) -> NDArray[np.int64]:
        """Chosen rows, counted in the whole run as it is stored."""
        plan = self.run.plan
        if plan.marks is not None:
            return np.flatnonzero(plan.marks)[self._rows]
        counts = np.diff(plan.row_counts)
        before = np.cumsum(counts) - counts
        prompt = np.searchsorted(np.cumsum(counts), self._rows, "right")
        return np.asarray(plan.offsets[prompt] + self._rows - before[prompt])

    @cached_property
    def _pieces(self) -> list[_Piece]:
        """The view cut into chunks, each in one part and of bounded size; a prompt that is pooled is never cut."""
        plan = self.run.plan
        ends = np.cumsum([part.rows for part in plan.parts])
        part_of = np.searchsorted(ends, self._stored[self._starts], "right")
        limit = max(1, _CHUNK_BYTES // (4 * plan.spec.d_model))
        stops = np.append(self._starts[1:], len(self._rows))
        # a chunk ends at a part's end, or before the read stretch grows past the limit
        pieces, first = [], 0
        extent = self._stored[stops - 1] + 1
        while first < len(self._starts):
            begin = self._stored[self._starts[first]]
            stop = int(np.searchsorted(extent, begin + limit, "right"))
            stop = min(max(stop, first + 1), int(np.searchsorted(part_of, part_of[first], "right")))
            low, high = int(self._starts[first]), int(stops[stop - 1])
            number = int(part_of[first])
            offset = int(ends[number]) - plan.parts[number].rows
            pieces.append(_piece(self._stored[low:high], self._starts[first:stop] - low, number, offset))
            first = stop
        return pieces


class _Labels(Mapping[str, "xr.DataArray"]):
    def __init__(self, view: TokenView) -> None:
        self._view = view

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.run.labels)

    def __len__(self) -> int:
        return len(self._view.run.labels)

    def __getitem__(self, name: str) -> xr.DataArray:
        """The label `name`.

        Raises:
            InvalidInput: it varies over the rows that are pooled.
        """
        import xarray as xr

        view = self._view
        values = to_memory(view.run.labels[name])[view._rows]
        if view.pool in ("mean", "max"):
            lengths = np.diff(np.append(view._starts, len(values)))
            same = values == np.repeat(values[view._starts], lengths)
            if not same.all():
                raise InvalidInput(
                    f"label {name!r} varies inside {int((np.add.reduceat(~same, view._starts) > 0).sum()):,} of "
                    f"{view.n_rows:,} pooled prompts; use a label by prompt, or pool 'first' or 'last'"
                )
        at = np.append(view._starts[1:], len(values)) - 1 if view.pool == "last" else view._starts
        return xr.DataArray(values[at], dims=("row",), coords=view._coordinates, name=name)


@dataclass(frozen=True)
class _Piece:
    """One chunk of a view: what to read, which of the rows read are wanted, and where each row of the view starts."""

    stretches: tuple[Block, ...]
    take: NDArray[np.int64]
    starts: NDArray[np.int64]


class _ReadPiece:
    """Reads one chunk of a view: picklable, and small however many chunks there are."""

    def __init__(self, plan: RowPlan, hook: str, pool: Pool | None) -> None:
        self.plan, self.hook, self.pool = plan, hook, pool

    def __call__(self, piece: _Piece) -> NDArray[Any]:
        read = np.concatenate([self.plan.read(self.hook, block) for block in piece.stretches])
        rows: NDArray[Any] = read[piece.take]
        if self.pool is None:
            return rows
        stops = np.append(piece.starts[1:], len(rows))
        if self.pool == "mean":
            sums = np.add.reduceat(rows.astype(np.float64), piece.starts, axis=0)
            return np.asarray(sums / (stops - piece.starts)[:, None], np.float32)
        if self.pool == "max":
            return np.asarray(np.maximum.reduceat(rows, piece.starts, axis=0))
        return np.asarray(rows[piece.starts if self.pool == "first" else stops - 1])


def _piece(stored: NDArray[np.int64], starts: NDArray[np.int64], part: int, offset: int) -> _Piece:
    cuts = np.flatnonzero(np.diff(stored) > _GAP_ROWS) + 1
    stretches, take, read = [], [], 0
    for rows in np.split(stored, cuts):
        first, stop = int(rows[0]), int(rows[-1]) + 1
        stretches.append(Block(part, first - offset, stop - offset, first))
        take.append(rows - first + read)
        read += stop - first
    return _Piece(tuple(stretches), np.concatenate(take), starts)


def _at(positions: Positions, place: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row is at one of `positions`, given its position and the length of its prompt."""
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise InvalidInput(f"positions is {positions}; give a slice without a step")
        low, high = (
            default if bound is None else np.where(bound < 0, bound + lengths, bound)
            for bound, default in ((positions.start, 0), (positions.stop, np.iinfo(np.int64).max))
        )
        return np.asarray((place >= low) & (place < high))
    if isinstance(positions, tuple | list):
        if not positions or not all(isinstance(one, int) for one in positions):
            raise InvalidInput(f"positions is {positions}; give at least one integer")
        hits = [place == (one + lengths if one < 0 else one) for one in positions]
        return np.asarray(np.logical_or.reduce(hits))
    rules: dict[str, Callable[[], Any]] = {
        "all": lambda: np.ones(len(place), bool),
        "prompt": lambda: place < lengths,
        "generated": lambda: place >= lengths,
        "last": lambda: place == lengths - 1,
    }
    if positions not in rules:
        raise InvalidInput(f"positions is {positions!r}; give {', '.join(rules)}, integers or a slice")
    return np.asarray(rules[positions]())
