"""Choosing rows of a view by what the index, the labels and the prompt table say of them; reads nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput
from millpond.store.expression import Expression
from millpond.store.lazy import ReadArray, Reader
from millpond.store.objects import PARALLEL_REQUESTS
from millpond.store.rows import Block, RowPlan

if TYPE_CHECKING:
    from millpond.store.run import Run

PositionChoice = str | int | slice | Sequence[int]
Columns = Mapping[str, NDArray[Any]]
Condition = Callable[[Columns], NDArray[np.bool_]]


def mark_prompts(run: Run, prompts: NDArray[np.bool_] | pd.Series[bool] | Sequence[str]) -> NDArray[np.bool_]:
    """Which of `run.prompts` are meant by booleans, one for each, or by ids.

    Raises:
        InvalidInput: they do not fit the view.
    """
    if isinstance(prompts, str):
        raise InvalidInput(f"prompts is {prompts!r}; give a list of ids, or a condition as where=")
    if isinstance(prompts, Sequence) and all(isinstance(one, str) for one in prompts):
        held = run.prompts["id"]
        missing = pd.Index(prompts).difference(pd.Index(held), sort=False)
        if len(missing):
            raise InvalidInput(
                f"prompt {missing[0]!r} is not in this view of run {run.name!r}; give ids of run.prompts"
            )
        return np.asarray(held.isin(prompts))
    if isinstance(prompts, pd.Series) and not prompts.index.equals(run.prompts.index):
        raise InvalidInput("prompts is a Series with another index than run.prompts; reindex it or give an array")
    marks = np.asarray(prompts)
    if marks.dtype != bool or marks.shape != (len(run.prompts),):
        raise InvalidInput(
            f"prompts has data type {marks.dtype} and shape {marks.shape}; give {len(run.prompts)} booleans, one a "
            "prompt, or ids"
        )
    return marks


def draw_prompts(run: Run, fraction: float, seed: int, by: str | None) -> NDArray[np.bool_]:
    """Which of `run.prompts` are in a random sample that keeps the groups of column `by` together, and is not all of them.

    Raises:
        InvalidInput: see `Run.split`.
    """
    if not 0 < fraction < 1:
        raise InvalidInput(f"test is {fraction}; give a fraction between 0 and 1")
    if by is not None and by not in run.prompts:
        raise InvalidInput(
            f"by={by!r} is no column of the prompts; they have {', '.join(map(str, run.prompts.columns))}"
        )
    groups = run.prompts.index.to_series() if by is None else run.prompts[by]
    names = groups.drop_duplicates().to_numpy()
    count = round(len(names) * fraction)
    if not 0 < count < len(names):
        raise InvalidInput(
            f"test={fraction} of {len(names)} {by or 'prompt'}s leaves a part empty; capture more or change test"
        )
    drawn = np.random.default_rng(seed).permutation(len(names))[:count]
    return np.asarray(groups.isin(names[drawn]))


def select_rows(
    run: Run,
    *,
    where: str | None,
    position: PositionChoice | None,
    token_id: int | Sequence[int] | None,
    sample: int | float | None,
    seed: int,
) -> RowPlan:
    """The rows of `run` that satisfy all the conditions given, and of these a random sample."""
    conditions: list[tuple[set[str], Condition]] = []
    if where is not None:
        expression = Expression(where)
        conditions.append((expression.names, expression.evaluate))
    if position is not None and not (isinstance(position, str) and position == "all"):
        conditions.append(({"position", "n_prompt_tokens"}, _position_condition(position)))
    if token_id is not None:
        wanted = np.atleast_1d(np.asarray(token_id))
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
            raise InvalidInput(f"token_id is {token_id!r}; give an integer or a list of integers")
        conditions.append(({"token_id"}, lambda columns: np.isin(columns["token_id"], wanted)))
    plan = run.plan
    by_prompt, by_row = _sources(run, set().union(*(names for names, _ in conditions)))
    if by_row:
        plan = plan.select_rows(_row_marks(plan, conditions, by_prompt, by_row))
    elif conditions:
        number = np.arange(len(plan.chosen))
        columns = {**by_prompt, "": number}
        plan = plan.select_prompts(np.logical_and.reduce([test(columns) for _, test in conditions]))
    return plan if sample is None else plan.select_rows(_sampled(plan, sample, seed))


def _sources(run: Run, names: set[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Reader]]:
    """Where each column comes from: one value for each prompt of the whole run, or a reader of row values."""
    by_prompt: dict[str, NDArray[Any]] = {}
    by_row: dict[str, Reader] = {}
    table, plan = run.prompt_table, run.plan
    for name in sorted(names):
        if name in ("position", "token_id"):
            by_row[name] = ReadArray(plan, name)
        elif name == "prompt":
            by_prompt[name] = np.arange(len(table))
        elif (values := run.labels.by_prompt(name)) is not None:
            by_prompt[name] = values
        elif (reader := run.labels.by_row(name)) is not None:
            by_row[name] = reader
        elif name in table:
            column = table[name].to_numpy()
            by_prompt[name] = column if column.dtype.kind in "biufU" else column.astype(str)
        else:
            known = ["position", "token_id", "prompt", *run.labels, *map(str, table.columns)]
            raise InvalidInput(
                f"{name!r} is no column of run {run.name!r}; name one of {', '.join(dict.fromkeys(known))}"
            )
    return by_prompt, by_row


def _row_marks(
    plan: RowPlan,
    conditions: Sequence[tuple[set[str], Condition]],
    by_prompt: Mapping[str, NDArray[Any]],
    by_row: Mapping[str, Reader],
) -> NDArray[np.bool_]:
    def test(block: Block) -> NDArray[np.bool_]:
        piece = plan.piece(block)
        numbers = piece.prompts()
        columns = {name: values[numbers] for name, values in by_prompt.items()}
        columns |= {name: reader.read(piece) for name, reader in by_row.items()}
        return np.asarray(np.logical_and.reduce([condition(columns) for _, condition in conditions]))

    table = plan.table(plan.spec.shard_rows)
    blocks = [table[number] for number in np.flatnonzero(plan.counts(table))]
    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="millpond-select") as pool:
        marks = list(pool.map(test, blocks))
    return np.concatenate(marks) if marks else np.zeros(0, bool)


def _position_condition(position: PositionChoice) -> Condition:
    def words(columns: Columns) -> NDArray[np.bool_]:
        at, n_prompt = columns["position"], columns["n_prompt_tokens"]
        marks: NDArray[np.bool_] = {
            "prompt": at < n_prompt,
            "generated": at >= n_prompt,
            "last": at == n_prompt - 1,
        }[str(position)]
        return marks

    def span(columns: Columns) -> NDArray[np.bool_]:
        assert isinstance(position, slice)
        at, n_prompt = columns["position"].astype(np.int64), columns["n_prompt_tokens"]
        start = _from_end(position.start or 0, n_prompt)
        marks = (at >= start) & ((at - start) % (position.step or 1) == 0)
        return np.asarray(marks if position.stop is None else marks & (at < _from_end(position.stop, n_prompt)))

    if isinstance(position, str):
        if position not in ("prompt", "generated", "last"):
            raise InvalidInput(
                f"position is {position!r}; give all, prompt, generated, last, a number, numbers or a slice"
            )
        return words
    if isinstance(position, slice):
        if position.step is not None and position.step < 1:
            raise InvalidInput(f"position has the step {position.step}; give 1 or more")
        return span
    wanted = np.atleast_1d(np.asarray(position))
    if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
        raise InvalidInput(f"position is {position!r}; give all, prompt, generated, last, a number, numbers or a slice")

    def numbers(columns: Columns) -> NDArray[np.bool_]:
        at = columns["position"].astype(np.int64)
        marks = np.isin(at, wanted[wanted >= 0])
        return marks | np.isin(at - columns["n_prompt_tokens"], wanted[wanted < 0])

    return numbers


def _from_end(number: int, n_prompt: NDArray[np.int64]) -> Any:
    """As for `PositionFilter`: a negative position counts from the end of the prompt."""
    return number if number >= 0 else np.maximum(n_prompt + number, 0)


def _sampled(plan: RowPlan, sample: int | float, seed: int) -> NDArray[np.bool_]:
    n = plan.n_rows
    if isinstance(sample, bool) or not (
        0 < sample < 1 if isinstance(sample, float) else isinstance(sample, int | np.integer) and 0 < sample <= n
    ):
        raise InvalidInput(f"sample is {sample!r}; give 1 to {n} rows, or a fraction between 0 and 1 as a float")
    rows = round(n * sample) if isinstance(sample, float) else int(sample)
    marks = np.zeros(n, bool)
    marks[np.random.default_rng(seed).choice(n, rows, replace=False, shuffle=False)] = True
    return marks
