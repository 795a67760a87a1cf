"""Training and measuring a user's graph, so that only trusted metrics, or what a reviewer has seen, come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from millpond.analysis.metrics import evaluate_scores
from millpond.hub.graph import Graph, GraphLimits, GraphModule, dry_run, parse_graph
from millpond.store.errors import GraphRefused, InvalidInput
from millpond.store.result import Result

Batch = tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.int64]]
"""Rows (rows, d_model), their labels if the graph takes them, and the number of each row's prompt."""


def load_graph(text: str, values: bytes, d_model: int, limits: GraphLimits | None = None) -> GraphModule:
    """The module that a client's graph describes, checked in every way.

    Raises:
        GraphRefused: it is not allowed.
    """
    graph = parse_graph(text, limits)
    dry_run(graph, d_model, limits)
    return GraphModule(graph, values)


def train_graph(module: GraphModule, batches: Iterable[Batch], *, learning_rate: float) -> int:
    """Adam (Kingma and Ba, 2015) on the graph's own loss, a step a batch; returns the number of steps.

    The loss is the user's, so its values are nobody's to see: measure the module instead.

    Raises:
        GraphRefused: it has no loss, nothing to train, or stopped being finite.
    """
    trained = [value for value in module.parameters() if value.requires_grad]
    if "loss" not in module.graph.outputs or not trained:
        raise GraphRefused("training needs an output `loss` and a parameter that is trained")
    if not 0 < learning_rate < 1e3:
        raise InvalidInput(f"learning_rate is {learning_rate}; give a number above 0")
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    steps = 0
    for batch in batches:
        loss = _forward(module, batch)["loss"]
        if not torch.isfinite(loss) or not loss.requires_grad:
            raise GraphRefused("the loss is not finite, or does not depend on what is trained")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def measure_graph(module: GraphModule, batches: Callable[[], Iterable[Batch]]) -> list[Result]:
    """What trusted metrics say of the module's outputs; a `statistic` is the mean over rows of what the graph gives.

    Only results of kind `group-means` hold values that the user's graph computed: their evidence must say `custom`.

    Raises:
        GraphRefused: an output is not finite.
    """
    totals = _Totals(module.graph)
    for batch in batches():
        outputs = _forward(module, batch)
        for role, value in outputs.items():
            if not torch.isfinite(value).all():
                raise GraphRefused(f"output {role} is not finite")
        totals.add(batch, outputs)
    return totals.results()


def _forward(module: GraphModule, batch: Batch) -> dict[str, torch.Tensor]:
    rows, labels, _ = batch
    inputs = [torch.from_numpy(np.ascontiguousarray(rows))]
    if "labels" in module.graph.inputs:
        if labels is None:
            raise InvalidInput("the graph takes labels; name some")
        inputs.append(torch.from_numpy(np.ascontiguousarray(labels)))
    try:
        outputs: dict[str, torch.Tensor] = module(*inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        raise GraphRefused(f"the graph cannot be computed on a batch of {len(rows)} rows") from error
    return outputs


class _Totals:
    def __init__(self, graph: Graph) -> None:
        self.roles = set(graph.outputs)
        self.rows = 0
        self.prompts: set[int] = set()
        self.residual = self.square = self.cosine = self.active = 0.0
        self.total: NDArray[np.float64] | float = 0.0
        self.fired: NDArray[np.int64] | int = 0
        self.statistic: NDArray[np.float64] | float = 0.0
        self.scores: list[NDArray[np.float64]] = []
        self.labels: list[NDArray[np.float64]] = []
        self.groups: list[NDArray[np.int64]] = []

    def add(self, batch: Batch, outputs: dict[str, torch.Tensor]) -> None:
        rows, labels, prompts = batch
        wide = rows.astype(np.float64)
        self.rows += len(rows)
        self.prompts.update(np.unique(prompts).tolist())
        if "reconstruction" in outputs:
            made = outputs["reconstruction"].numpy().astype(np.float64)
            norms = np.linalg.norm(wide, axis=1) * np.linalg.norm(made, axis=1)
            self.residual += float(((wide - made) ** 2).sum())
            self.square += float((wide**2).sum())
            self.total = self.total + wide.sum(axis=0)
            self.cosine += float(((wide * made).sum(axis=1) / np.maximum(norms, 1e-30)).sum())
        if "codes" in outputs:
            fired = outputs["codes"].numpy() != 0
            self.active += float(fired.sum())
            self.fired = self.fired + fired.sum(axis=0)
        if "statistic" in outputs:
            self.statistic = self.statistic + len(rows) * np.atleast_1d(outputs["statistic"].numpy().astype(np.float64))
        if "scores" in outputs and labels is not None:
            self.scores.append(outputs["scores"].numpy().astype(np.float64))
            self.labels.append(labels.astype(np.float64))
            self.groups.append(prompts)

    def results(self) -> list[Result]:
        if not self.rows:
            raise InvalidInput("there are no rows to measure on")
        evidence = {"rows": self.rows, "prompts": len(self.prompts)}
        found = []
        values: dict[str, float] = {}
        if "reconstruction" in self.roles:
            variance = self.square - float(np.sum(np.asarray(self.total) ** 2)) / self.rows
            fvu = self.residual / variance if variance > 0 else float("nan")
            width = np.asarray(self.total).size
            values |= {"fvu": fvu, "explained_variance": 1 - fvu, "mse": self.residual / (self.rows * width)}
            values["cosine"] = self.cosine / self.rows
        if "codes" in self.roles:
            values |= {"l0": self.active / self.rows, "dead_latents": float(np.mean(np.asarray(self.fired) == 0))}
        if values:
            found.append(Result("sae-evaluation", values, {}, evidence))
        if self.scores:
            measured = evaluate_scores(*(np.concatenate(p) for p in (self.scores, self.labels, self.groups)))
            found.append(Result("probe-evaluation", measured.values, measured.intervals, measured.evidence))
        if "statistic" in self.roles:
            found.append(Result("group-means", {"means": np.asarray(self.statistic) / self.rows}, {}, evidence))
        return found
