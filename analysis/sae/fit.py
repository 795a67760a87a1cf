"""The training loop: batches in, weights in the activations' own units out; one read may feed several autoencoders."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from millpond.analysis.passes import tell_figure
from millpond.analysis.sae import checkpoint
from millpond.analysis.sae.batches import Batch, Source
from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.scaling import Scale, geometric_median, scale_of_rows, unscaled
from millpond.analysis.sae.trainer import StepStats, Trainer, calibrated_threshold
from millpond.store.errors import InvalidInput
from millpond.store.files import write_whole

if TYPE_CHECKING:
    from millpond.analysis.sae.parallel import Group

_CALIBRATED = ("batchtopk", "matryoshka")
"""Architectures that get a threshold after training."""
_CALIBRATION_ROWS = 16_384
_FREE_FIELDS = ("n_threads", "log_every", "checkpoint_every", "device", "buffer_bytes", "tensorboard")
"""Fields that a resumed run may change."""


@dataclass(frozen=True)
class Learner:
    """One of the autoencoders that a read feeds, and which of the source's hooks it sees."""

    name: str
    """Its subfolder; empty for one alone."""
    config: SaeConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] | None = None
    """None for an autoencoder, whose targets are its inputs."""
    skip: bool = False


@dataclass(frozen=True)
class Trained:
    """What came of a learner."""

    weights: SaeWeights
    tokens: int
    frequency: np.ndarray[Any, np.dtype[np.float64]]
    """Share of the last fifth of the rows that activated each latent, (d_sae,)."""
    factors: tuple[float, ...]
    """What each output hook was multiplied with in training."""


def train(
    source: Source,
    learners: Sequence[Learner],
    tokens: int,
    out: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    scales: Mapping[int, Scale] | None = None,
    group: Group | None = None,
) -> list[Trained]:
    """Train every learner on `tokens` rows of `source` and return their weights.

    Args:
        source: the batches; each worker of a group has its own.
        learners: what to train; they share batch size and device.
        tokens: rows, over all workers.
        out: folder of the checkpoint; of `config.json` and `metrics.jsonl` too, or of a subfolder with
            them for each named learner.
        resume: go on from the checkpoint in `out`, if there is one.
        progress: show a bar.
        scales: of some hooks, where they are known without reading rows.
        group: the workers that train together.

    Raises:
        InvalidInput: `out` holds a checkpoint and `resume` is off, or it is of another training; rows are
            not finite or too few.
    """
    config = learners[0].config
    world = group.world if group else 1
    total_steps = -(-tokens // (config.batch_size * world))
    held = checkpoint.read_checkpoint(out) if out else None
    origin = {"tokens": tokens, **source.describe()}
    if out is not None and held is not None:
        if not resume:
            raise InvalidInput(f"{out} holds a checkpoint; give resume=True (--resume) to go on, or another folder")
        _check_checkpoint(out, held, origin, learners)
    with ExitStack() as stack:
        stack.enter_context(_threads(config.n_threads))
        _keep_freed_memory()
        start = held["step"] if held else 0
        n_opening = max(1, _CALIBRATION_ROWS // source.batch_size)
        stream = source.batches(start)
        opening: list[Batch] = []
        if held:
            every = [Scale.of_state(state) for state in held["scales"]]
        else:
            opening = list(itertools.islice(stream, min(n_opening, total_steps)))
            every = _scales(source, opening, scales or {}, group)
        trainers = [_trainer(learner, source.widths, total_steps, group) for learner in learners]
        if held:
            for trainer, state in zip(trainers, held["learners"], strict=True):
                trainer.load_state(state)
        else:
            _center(learners, trainers, every, opening, group)
        recent: deque[list[Tensor]] = deque(maxlen=n_opening)
        if held and not source.repeatable:
            recent.extend(held["recent"])
        first = group is None or group.rank == 0
        log = stack.enter_context(_Log(learners, tokens, out if first else None, start, progress and first))
        batches = itertools.chain(opening, stream)
        del opening  # the chain lets go of each of its rows
        while trainers[0].steps < total_steps:  # one batch more might have to be waited for
            batch = next(batches, None)
            if batch is None:
                break
            rows = _scaled(batch, every, trainers[0].device)
            if not source.repeatable:
                recent.append(rows)
            stats = [trainer.step(*_seen(learner, rows)) for learner, trainer in zip(learners, trainers, strict=True)]
            log.step(trainers, stats)
            step = trainers[0].steps
            if step % config.checkpoint_every == 0 or step == total_steps:
                if out is not None and first:
                    state = _state(trainers, every, origin, learners, step)
                    state["recent"] = [] if source.repeatable else list(recent)
                    checkpoint.write_checkpoint(out, state)
                source.saved(step)
        if trainers[0].steps < total_steps:
            raise InvalidInput(
                f"X ended after {trainers[0].tokens:,} of {tokens:,} rows; give more batches or lower tokens"
            )
        stream.close()
        if source.repeatable and any(learner.config.architecture in _CALIBRATED for learner in learners):
            again = itertools.islice(source.batches(0), min(n_opening, total_steps))
            recent.extend(_scaled(batch, every, trainers[0].device) for batch in again)
        return [
            _finished(learner, trainer, every, list(recent))
            for learner, trainer in zip(learners, trainers, strict=True)
        ]


def _trainer(learner: Learner, widths: tuple[int, ...], total_steps: int, group: Group | None) -> Trainer:
    d_in = sum(widths[number] for number in learner.inputs)
    d_out = None if learner.outputs is None else sum(widths[number] for number in learner.outputs)
    trainer = Trainer(learner.config, d_in, total_steps, d_out=d_out, skip=learner.skip, group=group)
    if learner.outputs == learner.inputs:  # a crosscoder's encoder starts as its decoder, like an autoencoder's
        trainer.parameters["w_enc"].copy_(trainer.parameters["w_dec"])
    return trainer


def _scales(source: Source, opening: Sequence[Batch], known: Mapping[int, Scale], group: Group | None) -> list[Scale]:
    if not opening:
        raise InvalidInput("X has no batches; give at least one")
    every = []
    for number in range(len(source.widths)):
        if number in known:
            every.append(known[number])
        else:
            every.append(scale_of_rows(np.concatenate([batch[number] for batch in opening])))
    return every if group is None else group.objects_of_first(every)


def _center(
    learners: Sequence[Learner],
    trainers: Sequence[Trainer],
    every: Sequence[Scale],
    opening: Sequence[Batch],
    group: Group | None,
) -> None:
    """Set the decoders' biases to the geometric median, where that is asked for; the mean is 0 already."""
    for learner, trainer in zip(learners, trainers, strict=True):
        if learner.config.center == "geometric_median":
            targets = torch.cat([_target(learner, _scaled(batch, every, trainer.device)) for batch in opening])
            median = geometric_median(targets)
            trainer.parameters["b_dec"].copy_(median if group is None else group.from_first(median))


def _target(learner: Learner, rows: list[Tensor]) -> Tensor:
    seen = _seen(learner, rows)
    return seen[-1]


def _scaled(batch: Batch, every: Sequence[Scale], device: torch.device) -> list[Tensor]:
    return [scale.apply(torch.from_numpy(rows).to(device)) for rows, scale in zip(batch, every, strict=True)]


def _seen(learner: Learner, rows: list[Tensor]) -> tuple[Tensor, ...]:
    """Inputs, and targets where they are others."""

    def joined(numbers: tuple[int, ...]) -> Tensor:
        return rows[numbers[0]] if len(numbers) == 1 else torch.cat([rows[number] for number in numbers], dim=1)

    if learner.outputs is None:
        return (joined(learner.inputs),)
    return joined(learner.inputs), joined(learner.outputs)


def _finished(learner: Learner, trainer: Trainer, every: Sequence[Scale], recent: list[list[Tensor]]) -> Trained:
    config, threshold = learner.config, None
    if config.architecture in _CALIBRATED:
        threshold = calibrated_threshold(trainer, [_seen(learner, rows)[0] for rows in recent])
    outputs = [every[number] for number in (learner.outputs or learner.inputs)]
    weights = unscaled(
        trainer.parameters,
        [every[number] for number in learner.inputs],
        outputs,
        tied=learner.outputs is None,
        architecture=config.architecture,
        k=config.k,
        threshold=threshold,
    )
    frequency = (trainer.fires / max(1, trainer.fire_rows)).cpu().double().numpy()
    return Trained(weights, trainer.tokens, frequency, tuple(scale.factor for scale in outputs))


def _plain(config: SaeConfig) -> dict[str, Any]:
    """The configuration as JSON would give it back."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return fields


def _state(
    trainers: Sequence[Trainer], every: Sequence[Scale], origin: dict[str, Any], learners: Sequence[Learner], step: int
) -> dict[str, Any]:
    return {
        "step": step,
        "source": origin,
        "configs": {learner.name: _plain(learner.config) for learner in learners},
        "scales": [scale.state() for scale in every],
        "learners": [trainer.state() for trainer in trainers],
    }


def _check_checkpoint(out: Path, held: dict[str, Any], origin: dict[str, Any], learners: Sequence[Learner]) -> None:
    names = [learner.name for learner in learners]
    if list(held["configs"]) != names:
        raise InvalidInput(f"{out} holds a checkpoint of {list(held['configs'])}, not of {names}; give another folder")
    if held["source"]["widths"] != origin["widths"]:
        raise InvalidInput(
            f"{out} holds a checkpoint for hooks of width {held['source']['widths']}, X has {origin['widths']}; "
            "give the hooks it was trained on, or another folder"
        )
    for learner in learners:
        checkpoint.check_same(out, "configuration", held["configs"][learner.name], _plain(learner.config), _FREE_FIELDS)
    checkpoint.check_same(out, "stream of rows", held["source"], origin)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, instead of asking the system for cleared pages again.

    The GNU library keeps blocks as large as the largest that was freed, if that is below 32 MiB (`M_MMAP_THRESHOLD` in
    mallopt(3)), and up to twice as much at the end of its heap.
    """
    np.empty((32 << 20) - (1 << 16), np.uint8)


class _Log:
    """Progress bar, and a `metrics.jsonl` for each learner."""

    def __init__(self, learners: Sequence[Learner], tokens: int, out: Path | None, start: int, progress: bool) -> None:
        self.every, self.tokens, self.start = learners[0].config.log_every, tokens, start
        self.files: list[TextIO] = []
        self.boards = [
            _board(out / learner.name) if out is not None and learner.config.tensorboard else None
            for learner in learners
        ]
        for learner in learners:
            if out is None:
                continue
            folder = out / learner.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(
                json.dumps(asdict(learner.config) | {"tokens": tokens}, indent=1) + "\n"
            )
            path = folder / "metrics.jsonl"
            kept = path.read_text().splitlines() if start and path.exists() else []
            # a killed run may have gone on after its checkpoint
            kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= start]
            write_whole(path, "".join(line + "\n" for line in kept).encode())
            self.files.append(path.open("a"))
        self.bar = tqdm(total=tokens, desc="SAE", unit="tok", unit_scale=True, disable=None if progress else True)
        self.started = time.perf_counter()
        self.first: int | None = None

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        for file in self.files:
            file.close()
        for board in self.boards:
            if board is not None:
                board.close()

    def step(self, trainers: Sequence[Trainer], stats: Sequence[StepStats]) -> None:
        """Record a step, if it is one of those to record."""
        trainer, one = trainers[0], stats[0]
        if self.first is None:
            self.first = trainer.tokens - trainer.config.batch_size * trainer.workers
            self.bar.initial = self.first
        self.bar.update(trainer.tokens - self.bar.n if not self.bar.disable else 0)
        if trainer.steps % self.every and trainer.steps < trainer.total_steps:
            return
        self.bar.set_postfix_str(
            f"loss {one.loss:.3f}, FVU {one.fvu:.3f}, L0 {one.l0:.1f}, dead {one.dead:.1%}", refresh=False
        )
        tell_figure(trainer.tokens / self.tokens, one.fvu)
        rate = (trainer.tokens - self.first) / (time.perf_counter() - self.started)
        for board, learning, found in zip(self.boards, trainers, stats, strict=True):
            if board is not None:
                for name, value in asdict(found).items():
                    board.add_scalar(name, value, learning.tokens)
        for file, learning, found in zip(self.files, trainers, stats, strict=False):
            line = {"step": learning.steps, "tokens": learning.tokens, **asdict(found), "tokens_per_second": rate}
            line["seconds_left"] = max(0, self.tokens - trainer.tokens) / rate
            file.write(json.dumps(line) + "\n")
            file.flush()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidInput("tensorboard is not installed; install it, or leave tensorboard off") from error
    return SummaryWriter(str(folder))
