"""A view written as a run of its own, with where it came from; and whole runs copied to another lake."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput
from millpond.store.sealed import Check, write_sealed
from millpond.store.shards import check_shards, object_crc32c

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.run import Run


log = logging.getLogger(__name__)


def materialise(view: Run, name: str, *, lake: Lake | None = None, hooks: tuple[str, ...] | None = None) -> Run:
    """See `Run.materialise`."""
    plan, spec = view.plan, view.plan.spec
    lake = view.lake if lake is None else lake  # an empty lake is false
    if lake is None:
        raise InvalidInput(f"run {view.name!r} was not opened from a lake; say into which with lake=")
    hooks = spec.hooks if hooks is None else hooks
    table = view.prompts.reset_index(drop=True)
    table["n_rows"] = _rows_of_prompts(view)
    labels = {label: array for label, array in view.labels.items() if label in view.labels.token_labels}
    by_prompt = {label: view.labels.by_prompt(label) for label in view.labels.prompt_labels}
    for label, values in by_prompt.items():
        assert values is not None
        table[label] = values[plan.chosen]
    selection = {
        "run": spec.name,
        "id": spec.id,
        "state": view.state,
        "version": view.version,
        "prompts": len(table),
        "rows": view.n_rows,
        "of_rows": int(plan.offsets[-1]),
        "labels": {label: view.labels.versions(label)[-1] for label in view.labels},
    }
    run = write_sealed(
        lake,
        name,
        like={
            "hooks": hooks,
            "d_model": spec.d_model,
            "dtype": spec.dtype,
            "chunk_rows": spec.chunk_rows,
            "shard_rows": spec.shard_rows,
            "codec": spec.codec,
            "reads": spec.reads,
            "provenance": {**spec.provenance, "selected_from": selection},
        },
        table=table,
        blocks=lambda array: _blocks(view, array),
        prompt_labels=tuple(by_prompt),
        check=_check(view),
    )
    for label, array in labels.items():
        run.labels.add(label, array.values, by="token", source=f"run {spec.name} ({spec.id})")
    log.info("copied", extra={"run": name, "rows": run.n_rows, "source": spec.name})
    return run


def _check(view: Run) -> Check | None:
    """For a whole sealed run, whose copy has the same bytes unless another program or codec wrote it: then it is read again."""
    plan = view.plan
    if view.manifest is None or plan.marks is not None or not plan.chosen.all():
        return None
    (part,) = view.snapshot.records()

    def check(name: str, shards: Sequence[tuple[int, int]]) -> None:
        recorded = part.arrays[name].shards
        if tuple(shards) != tuple(recorded):
            folder, array = plan.folder / part.path / name, plan.spec.arrays()[name]
            check_shards(name, recorded, [object_crc32c(folder, array.shard_path(n)) for n in range(len(recorded))])

    return check


def _rows_of_prompts(view: Run) -> NDArray[np.int64]:
    plan = view.plan
    if plan.marks is None:
        return np.diff(plan.offsets)[plan.chosen]
    before = np.concatenate([[0], np.cumsum(plan.marks)])
    return np.asarray(np.diff(before[plan.offsets])[plan.chosen], np.int64)


def _blocks(view: Run, name: str) -> Iterator[NDArray[Any]]:
    """The chosen rows of an array as they are stored, a few chunks at a time, read ahead by a thread."""
    plan = view.plan
    rows = max((32 << 20) // plan.spec.activation_array.row_bytes // plan.spec.chunk_rows, 1) * plan.spec.chunk_rows
    table = plan.table(rows)
    wanted = np.flatnonzero(plan.counts(table))
    with ThreadPoolExecutor(2, thread_name_prefix="millpond-copy") as pool:
        ahead = [pool.submit(plan.read_stored, name, table[number]) for number in wanted[:2]]
        for number in [*wanted[2:], None, None][: len(wanted)]:
            block = ahead.pop(0).result()
            if number is not None:
                ahead.append(pool.submit(plan.read_stored, name, table[number]))
            yield block


def copy_run(source: Run, lake: Lake, name: str) -> Run:
    """Copy a sealed run to another name or lake, with the latest version of its labels.

    Raises:
        InvalidInput: the run is a view.
        RunOpen: it is open.
    """
    source.check_sealed()
    if not source.plan.chosen.all() or source.plan.marks is not None:
        raise InvalidInput(f"this is a view of run {source.name!r}; write it with materialise")
    return materialise(source, name, lake=lake)
