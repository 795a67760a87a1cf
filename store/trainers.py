"""Endless batches in the form that other libraries' trainers take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from millpond.store.run import Run


def tensors(run: Run, hook: str, batch_size: int, **options: Any) -> Iterator[torch.Tensor]:
    """Batches (batch_size, d_model) of `hook` as `run.stream` orders them, epoch after epoch."""
    import torch

    for batch in run.stream(hook, batch_size, **options):
        yield torch.from_numpy(batch)


def tensors_by_hook(
    run: Run, hooks: tuple[str, ...], batch_size: int, **options: Any
) -> Iterator[dict[str, torch.Tensor]]:
    """The same rows of several hooks; streams of one seed have one order."""
    streams = [tensors(run, hook, batch_size, **options) for hook in hooks]
    for batches in zip(*streams, strict=True):
        yield dict(zip(hooks, batches, strict=True))
