"""The training loop of an autoencoder: batches in, weights in the activations' own units out."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from millpond.analysis.sae.batches import ShuffledBatches
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.train import StepStats, Trainer, input_scale
from millpond.store.errors import InvalidInput

Floats = NDArray[np.float32]

_CALIBRATION_ROWS = 16_384


@dataclass(frozen=True)
class Trained:
    """Weights in the units of the input, in SAELens' shapes."""

    w_enc: Floats
    b_enc: Floats
    w_dec: Floats
    b_dec: Floats
    threshold: float
    tokens: int


def train(X: Any, config: SaeConfig, tokens: int | None, out: Path | None, progress: bool) -> Trained:
    """Train; see `BatchTopKSae.fit`."""
    batches, tokens = _batches(X, config, tokens)
    total_steps = -(-tokens // config.batch_size)
    with ExitStack() as stack:
        stack.enter_context(_threads(config.n_threads))
        stream = iter(batches)
        opening = list(itertools.islice(stream, max(1, _CALIBRATION_ROWS // config.batch_size)))
        if not opening:
            raise InvalidInput("X has no batches; give at least one")
        opening = [_rows(batch) for batch in opening]
        sample = np.concatenate(opening)
        mean, scale = input_scale(sample)
        trainer = Trainer(config, sample.shape[1], total_steps)
        log = stack.enter_context(_Log(config, tokens, out, progress))
        recent: deque[Tensor] = deque(maxlen=len(opening))
        for batch in itertools.chain(opening, stream):
            rows = _rows(batch, sample.shape[1])
            scaled = torch.from_numpy((rows - mean.astype(np.float32)) * np.float32(scale))
            recent.append(scaled)
            log.step(trainer, trainer.step(scaled))
            if trainer.tokens >= tokens:
                break
        if trainer.tokens < tokens:
            raise InvalidInput(
                f"X ended after {trainer.tokens:,} of {tokens:,} rows; give more batches or lower tokens"
            )
        threshold = trainer.calibrated_threshold(list(recent))
    # (x - mean) * scale went in, so weights stay and biases and threshold go back to the input's units
    w_enc, w_dec, b_enc, b_dec = (p.detach().numpy().astype(np.float32) for p in trainer.parameters)
    return Trained(
        np.ascontiguousarray(w_enc.T),
        b_enc / np.float32(scale),
        w_dec,
        (mean + b_dec / scale).astype(np.float32),
        threshold / scale,
        trainer.tokens,
    )


def _batches(X: Any, config: SaeConfig, tokens: int | None) -> tuple[Iterable[Any], int]:
    if hasattr(X, "shape"):
        if len(X.shape) != 2:
            raise InvalidInput(f"X has shape {X.shape}; give (rows, d_model)")
        wanted = int(X.shape[0]) if tokens is None else tokens
        batches = ShuffledBatches(X, config.batch_size, seed=config.seed, buffer_bytes=config.buffer_bytes)
        return batches, _check_tokens(wanted)
    if tokens is None:
        raise InvalidInput("tokens is not given; a stream of batches has no length, so say on how many rows to train")
    return X, _check_tokens(tokens)


def _check_tokens(tokens: int) -> int:
    if tokens < 1:
        raise InvalidInput(f"tokens is {tokens}; give at least 1")
    return tokens


def _rows(batch: Any, width: int | None = None) -> NDArray[np.float32]:
    rows = np.asarray(batch, np.float32)
    if rows.ndim != 2 or width not in (None, rows.shape[1]):
        raise InvalidInput(f"a batch has shape {rows.shape}; give (rows, {width or 'd_model'}), the same for all")
    if not np.isfinite(rows).all():
        raise InvalidInput(f"a batch of {len(rows):,} rows holds NaN or infinity; leave those rows out")
    return rows


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Log:
    """Progress bar and `metrics.jsonl`."""

    def __init__(self, config: SaeConfig, tokens: int, out: Path | None, progress: bool) -> None:
        self.config, self.tokens = config, tokens
        self.file = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(asdict(config) | {"tokens": tokens}, indent=1) + "\n")
            self.file = (out / "metrics.jsonl").open("w")
        self.bar = tqdm(total=tokens, desc="SAE", unit="tok", unit_scale=True, disable=None if progress else True)
        self.started = time.perf_counter()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()

    def step(self, trainer: Trainer, stats: StepStats) -> None:
        self.bar.update(trainer.tokens - self.bar.n if not self.bar.disable else 0)
        if trainer.steps % self.config.log_every and trainer.tokens < self.tokens:
            return
        self.bar.set_postfix_str(f"FVU {stats.fvu:.3f}, L0 {stats.l0:.1f}, dead {stats.dead:.1%}", refresh=False)
        if self.file is not None:
            seconds = time.perf_counter() - self.started
            line = {"step": trainer.steps, "tokens": trainer.tokens, **asdict(stats)}
            line["tokens_per_second"] = trainer.tokens / seconds
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
