"""From what the caller gives to a training: one or several autoencoders on one read, here or on Dask's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis.lazy_chunks import LazyChunks
from millpond.analysis.probes.inputs import check_one_hook
from millpond.analysis.sae.batches import GivenBatches, ShuffledBatches, Source, StreamBatches
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.fit import Learner, Trained, train
from millpond.analysis.sae.follow import FollowedBatches, FollowedHook
from millpond.analysis.sae.scaling import Scale, scale_of_moments
from millpond.store.errors import InvalidInput
from millpond.store.lazy import ReadArray
from millpond.store.objects import Storage
from millpond.store.run import open_run
from millpond.store.stream import ActivationStream

if TYPE_CHECKING:
    from millpond.analysis.sae.estimator import Sae


def train_together(
    saes: Mapping[str, Sae],
    X: Any,
    tokens: int | None = None,
    out: str | Path | None = None,
    *,
    hooks: Mapping[str, str | Sequence[str]] | None = None,
    epochs: int = 1,
    resume: bool = False,
    statistics: Mapping[str, Any] | None = None,
    client: Any = None,
    progress: bool = True,
) -> None:
    """Train several autoencoders on the same rows, each batch read once: a sweep over k, d_sae, hooks.

    Args:
        saes: what to train, by name; all with one batch_size, seed and device.
        X: an array or batches as in `Sae.fit`, for all; or several hooks, aligned by row: their arrays by name, or
            `following(run, hooks)`.
        tokens: rows to train each on.
        out: folder of the checkpoint, with a subfolder for each name.
        hooks: with several hooks, those that each autoencoder sees: one, for a transcoder two (in and out),
            for a crosscoder any number.
        epochs: see `Sae.fit`.
        resume: see `Sae.fit`.
        statistics: of the hooks of `X`, by name.
        client: see `Sae.fit`.
        progress: show a bar.

    Raises:
        InvalidInput: as `Sae.fit`; or the autoencoders do not fit together.
    """
    if not saes:
        raise InvalidInput("saes is empty; give at least one autoencoder to train")
    arrays: dict[str, Any] = {"": X}
    if isinstance(X, Mapping):
        arrays = dict(X)
    elif isinstance(X, FollowedBatches):
        arrays = dict(X.by_hook)
    order = list(arrays)
    learners, chosen = [], []
    for name, sae in saes.items():
        wanted = (hooks or {}).get(name, order)
        mine = [wanted] if isinstance(wanted, str) else list(wanted)
        if missing := [hook for hook in mine if hook not in arrays]:
            raise InvalidInput(f"{name!r} is to see {missing[0]!r}; X holds {', '.join(order)}")
        if sae.kind == "sae" and len(mine) != 1:
            raise InvalidInput(f"{name!r} is to see {len(mine)} hooks; name one of {', '.join(order)} for it in hooks")
        if sae.kind == "crosscoder":
            sae.names_ = tuple(mine)  # type: ignore[attr-defined]
            sae.widths_ = tuple(_width(arrays[hook]) for hook in mine)  # type: ignore[attr-defined]
        learner = sae._learner(name, len(mine))
        at = [order.index(hook) for hook in mine]
        outputs = None if learner.outputs is None else tuple(at[number] for number in learner.outputs)
        inputs = tuple(at[number] for number in learner.inputs)
        learners.append(Learner(name, learner.config, inputs, outputs, learner.skip))
        chosen.append([arrays[hook] for hook in mine])
    known = [(statistics or {}).get(name) for name in order]
    given = [X] if isinstance(X, FollowedBatches) else list(arrays.values())
    every = run_training(given, learners, tokens, out, epochs, resume, known, client, progress)
    for sae, trained, mine_arrays in zip(saes.values(), every, chosen, strict=True):
        sae._take(trained, mine_arrays)


def _width(array: Any) -> int:
    return array.width if isinstance(array, FollowedHook) else int(np.shape(array)[1])


@dataclass(frozen=True)
class SourceSpec:
    """What a worker needs to make its own source."""

    arrays: list[Any]
    config: SaeConfig

    def open(self, rank: int = 0, world: int = 1) -> Source:
        """The source of one rank."""
        if not hasattr(self.arrays[0], "shape"):
            if len(self.arrays) > 1:
                raise InvalidInput("several hooks are given as iterables; give one iterable of tuples, or arrays")
            if world > 1:
                raise InvalidInput(
                    "an iterable of batches cannot be shared by workers; give an array such as run[hook]"
                )
            if isinstance(self.arrays[0], FollowedBatches):
                return self.arrays[0]
            if isinstance(self.arrays[0], ActivationStream):
                return StreamBatches(self.arrays[0])
            return GivenBatches(self.arrays[0])
        config = self.config
        return ShuffledBatches(
            self.arrays, config.batch_size, seed=config.seed, buffer_bytes=config.buffer_bytes, rank=rank, world=world
        )


def run_training(
    arrays: list[Any] | Sequence[Any],
    learners: Sequence[Learner],
    tokens: int | None,
    out: str | Path | None,
    epochs: int,
    resume: bool,
    statistics: Sequence[Any],
    client: Any,
    progress: bool,
) -> list[Trained]:
    """Check everything, then train in this process or on the workers of `client`."""
    config = learners[0].config
    for learner in learners[1:]:
        for field in ("batch_size", "seed", "device", "buffer_bytes"):
            if getattr(learner.config, field) != getattr(config, field):
                raise InvalidInput(
                    f"{field} is {getattr(config, field)} for {learners[0].name!r} and {getattr(learner.config, field)} "
                    f"for {learner.name!r}; autoencoders trained together share it"
                )
    if epochs < 1:
        raise InvalidInput(f"epochs is {epochs}; give at least 1")
    arrays = list(arrays)
    for array in arrays:
        check_one_hook(array)
    if len(arrays) == 1 and isinstance(arrays[0], list | tuple):
        arrays[0] = _Listed(arrays[0])
    wanted = _tokens(arrays[0], tokens, epochs)
    spec = SourceSpec(arrays, config)
    scales = _kept(arrays) | {number: _known(one) for number, one in enumerate(statistics) if one is not None}
    folder = None if out is None else Path(out)
    if client is not None:
        from millpond.analysis.sae.parallel import train_on_workers

        return train_on_workers(client, spec, learners, wanted, folder, resume=resume, scales=scales)
    source = spec.open()
    if source.batch_size != config.batch_size:
        learners = [_with_batch(learner, source.batch_size) for learner in learners]
    return train(source, learners, wanted, folder, resume=resume, progress=progress, scales=scales)


class _Listed:
    """Batches in a list: they have a length, but are no array."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        return iter(self._batches)


def _with_batch(learner: Learner, batch_size: int) -> Learner:
    return replace(learner, config=replace(learner.config, batch_size=batch_size))


def _known(statistics: Any) -> Scale:
    """The scale that statistics taken elsewhere give: `mean` (d,) and `variance` (d,) or summed."""
    return scale_of_moments(np.asarray(statistics.mean), float(np.sum(statistics.variance)))


def _kept(arrays: Sequence[Any]) -> dict[int, Scale]:
    """The scales of those arrays that are a whole run's hook, from the statistics kept at ingest; reads no activation."""
    hooks: list[tuple[Storage, str, int] | None] = []
    for array in arrays:
        data = getattr(array, "data", array) if hasattr(array, "dims") else array
        if isinstance(data, ActivationStream):
            hooks += [(data.plan.folder, hook, data.plan.n_rows) for hook in data.hooks]
        else:
            reader = LazyChunks(data).reader if hasattr(data, "__dask_graph__") else None
            hooks.append((reader.run, reader.name, data.shape[0]) if isinstance(reader, ReadArray) else None)
    scales = {}
    for number, known in enumerate(hooks):
        if known is None:
            continue
        folder, hook, n_rows = known
        run = open_run(folder)
        try:
            kept = run.stats[hook]
        except InvalidInput:  # the run was written without
            continue
        if kept.count == run.n_rows == n_rows:  # otherwise the array is a part of the run
            scales[number] = _known(kept)
    return scales


def _tokens(X: Any, tokens: int | None, epochs: int) -> int:
    if tokens is not None and tokens < 1:
        raise InvalidInput(f"tokens is {tokens}; give at least 1")
    if not hasattr(X, "shape"):
        if tokens is None:
            raise InvalidInput(
                "tokens is not given; a stream of batches has no length, so say on how many rows to train"
            )
        return tokens
    rows = int(X.shape[0])
    if tokens is None:
        return max(1, rows * epochs)
    if tokens > rows * epochs:
        raise InvalidInput(
            f"tokens is {tokens:,}, X has {rows:,} rows: give epochs={-(-tokens // max(1, rows))} to use rows "
            "several times, or fewer tokens"
        )
    return tokens
