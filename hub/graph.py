"""Custom computation without custom code: a user's module as a small JSON graph of allow-listed ATen operators.

The client makes the graph (`trace.py`); here, in the vault, it is validated by dictionary lookup, tried with fake tensors
that have shapes and no storage, and then evaluated operator by operator. Nothing of a user's is unpickled, compiled,
imported or looked up by attribute. Parameters arrive as raw float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from millpond.store.errors import GraphRefused

ROLES = ("loss", "reconstruction", "codes", "scores", "statistic")
"""What an output may be: the loss to train on, what trusted metrics measure, or a statistic, which a reviewer sees first."""
MAX_STATISTIC = 4096
"""Most values of an output `statistic`."""
INPUTS = ("activations", "labels")
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}

_NAMES = (
    "abs.default", "add.Scalar", "add.Tensor", "addmm.default", "amax.default", "amin.default", "argmax.default",
    "bmm.default", "cat.default", "clamp.default", "clamp_min.default", "cos.default", "cumsum.default",
    "div.Scalar", "div.Tensor", "elu.default", "eq.Scalar", "eq.Tensor", "erf.default", "exp.default",
    "expand.default", "expm1.default", "full.default", "full_like.default", "gather.default", "ge.Scalar",
    "ge.Tensor", "gelu.default", "gt.Scalar", "gt.Tensor", "hardtanh.default", "le.Scalar", "le.Tensor",
    "leaky_relu.default", "log.default", "log1p.default", "logical_and.default", "logical_not.default",
    "logical_or.default", "lt.Scalar", "lt.Tensor", "maximum.default", "mean.default", "mean.dim",
    "minimum.default", "mm.default", "mul.Scalar", "mul.Tensor", "native_layer_norm.default", "ne.Scalar",
    "ne.Tensor", "neg.default", "permute.default", "pow.Tensor_Scalar", "reciprocal.default", "relu.default",
    "rsqrt.default", "scatter.src", "scatter.value", "select.int", "sigmoid.default", "sign.default", "sin.default",
    "slice.Tensor", "sort.default", "split_with_sizes.default", "sqrt.default", "squeeze.dims", "sub.Scalar",
    "sub.Tensor", "sum.default", "sum.dim_IntList", "sym_size.int", "tanh.default", "topk.default",
    "unsqueeze.default", "var.correction", "view.default", "where.self", "_log_softmax.default", "_softmax.default",
    "_to_copy.default",
)  # fmt: skip


def _overload(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


OPERATORS: Mapping[str, Any] = {name: _overload(name) for name in _NAMES}
"""Kept out: whatever reads files or memory that it did not write (`from_file`, `empty*`, `as_strided`, `set_`), random
numbers, anything in place, operators of higher order, and everything else that nobody needed."""
_INDEX_FROM = {"topk.default": 1, "sort.default": 1}
_INDEX_KEPT = {"slice.Tensor", "select.int", "unsqueeze.default", "squeeze.dims", "permute.default", "expand.default"}
_INDEX_USED = {"scatter.src", "scatter.value", "gather.default"}


@dataclass(frozen=True)
class GraphLimits:
    """What a graph may be and cost."""

    text_bytes: int = 1 << 20
    nodes: int = 512
    parameters: int = 8_000_000
    elements: int = 1 << 28
    """Of all intermediate values of a batch together."""
    flops: int = 1 << 42
    """Of the forward pass of a batch."""
    max_rows: int = 4096
    """Of a batch."""


@dataclass(frozen=True)
class Graph:
    """A validated graph."""

    inputs: tuple[str, ...]
    parameters: tuple[tuple[tuple[int, ...], bool], ...]
    """Shape, and whether it is trained."""
    nodes: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...]
    outputs: Mapping[str, int]
    """Role to node."""


@dataclass(frozen=True)
class _Ref:
    kind: str
    number: int


def parse_graph(text: str, limits: GraphLimits | None = None) -> Graph:
    """The graph in JSON, its form checked; `dry_run` checks what it does.

    Raises:
        GraphRefused: it is not of that form, too large, or has an operator that is not allowed.
    """
    limits = limits or GraphLimits()
    if len(text) > limits.text_bytes:
        raise GraphRefused(f"the graph has {len(text):,} characters of at most {limits.text_bytes:,}")
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise GraphRefused(f"the graph is not JSON: {type(error).__name__}") from error
    if not isinstance(found, dict) or set(found) != {"version", "inputs", "parameters", "nodes", "outputs"}:
        raise GraphRefused("a graph is an object of version, inputs, parameters, nodes and outputs")
    if found["version"] != 1 or isinstance(found["version"], bool):
        raise GraphRefused("the graph's version is not 1; use the client of this gateway's version")
    inputs, nodes, outputs = found["inputs"], found["nodes"], found["outputs"]
    if inputs not in ([INPUTS[0]], list(INPUTS)):
        raise GraphRefused(f"inputs must be {[INPUTS[0]]} or {list(INPUTS)}")
    parameters = _parameters(found["parameters"], limits)
    if not isinstance(nodes, list) or not 0 < len(nodes) <= limits.nodes:
        raise GraphRefused(f"a graph has 1 to {limits.nodes} nodes")
    reader = _Reader(len(inputs), len(parameters))
    read = tuple(reader.node(number, node) for number, node in enumerate(nodes))
    if not isinstance(outputs, dict) or not outputs or not set(outputs) <= set(ROLES):
        raise GraphRefused(f"outputs must name some of {', '.join(ROLES)}")
    for number in outputs.values():
        if not _is_int(number) or not 0 <= number < len(read):
            raise GraphRefused(f"an output must be the number of a node, below {len(read)}")
    return Graph(tuple(inputs), parameters, read, dict(outputs))


class _Reader:
    """Turns JSON into arguments: numbers, flags, lists of them, data types, and references backwards."""

    def __init__(self, inputs: int, parameters: int) -> None:
        self._counts = {"i": inputs, "p": parameters}

    def node(self, number: int, node: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        if not isinstance(node, list) or len(node) != 3:
            raise GraphRefused(f"node {number} is not [operator, arguments, named arguments]")
        name, arguments, named = node
        self._counts["n"] = number
        if not isinstance(arguments, list) or not isinstance(named, dict):
            raise GraphRefused(f"node {number}: arguments must be a list, named arguments an object")
        if name == "getitem":
            if len(arguments) != 2 or named or not _is_int(arguments[1]) or not 0 <= arguments[1] < 64:
                raise GraphRefused(f"node {number}: getitem takes a node and a place")
            return name, (self.value(number, arguments[0]), arguments[1]), {}
        if not isinstance(name, str) or name not in OPERATORS:
            raise GraphRefused(
                f"node {number}: its operator is not allowed; allowed are getitem, {', '.join(OPERATORS)}"
            )
        known = {argument.name for argument in OPERATORS[name]._schema.arguments} - _DEVICE
        if len(arguments) > 8 or not set(named) <= known:
            raise GraphRefused(f"node {number}: {name} takes {', '.join(sorted(known))}")
        return (
            name,
            tuple(self.value(number, value) for value in arguments),
            {key: self.value(number, value) for key, value in named.items()},
        )

    def value(self, number: int, value: Any, *, inner: bool = False) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if _is_int(value):
            if not -(2**63) <= value < 2**63:
                raise GraphRefused(f"node {number}: an integer does not fit 64 bits")
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise GraphRefused(f"node {number}: a number is not finite")
            return value
        if isinstance(value, list) and not inner and len(value) <= 64:
            return [self.value(number, part, inner=True) for part in value]
        if isinstance(value, dict) and len(value) == 1:
            ((kind, what),) = value.items()
            if kind == "d" and isinstance(what, str) and what in _DTYPES:
                return _DTYPES[what]
            if kind in self._counts and _is_int(what) and 0 <= what < self._counts[kind]:
                return _Ref(kind, what)
        raise GraphRefused(f"node {number}: an argument is neither a number, a data type, a list nor an earlier value")


_DEVICE = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _parameters(found: Any, limits: GraphLimits) -> tuple[tuple[tuple[int, ...], bool], ...]:
    if not isinstance(found, list) or len(found) > limits.nodes:
        raise GraphRefused(f"parameters must be a list of at most {limits.nodes}")
    parameters, total = [], 0
    for number, entry in enumerate(found):
        if not (
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], bool)
        ):
            raise GraphRefused(f"parameter {number} is not [shape, whether it is trained]")
        shape = entry[0]
        if len(shape) > 4 or not all(_is_int(size) and 0 < size <= limits.parameters for size in shape):
            raise GraphRefused(f"parameter {number} has a shape that is not up to four sizes above 0")
        total += math.prod(shape)
        if total > limits.parameters:
            raise GraphRefused(f"the parameters have more than {limits.parameters:,} numbers")
        parameters.append((tuple(shape), entry[1]))
    return tuple(parameters)


class GraphModule(torch.nn.Module):
    """A graph that can be evaluated and trained like any module; `forward` gives its outputs by role."""

    def __init__(self, graph: Graph, values: bytes) -> None:
        super().__init__()
        self.graph = graph
        flat = np.frombuffer(values, "<f4") if len(values) % 4 == 0 else np.empty(0)
        expected = sum(math.prod(shape) for shape, _ in graph.parameters)
        if len(flat) != expected or not np.isfinite(flat).all():
            raise GraphRefused(
                f"the parameters' values must be {expected:,} finite float32 numbers, {4 * expected:,} bytes"
            )
        self.values = torch.nn.ParameterList()
        at = 0
        for shape, trained in graph.parameters:
            count = math.prod(shape)
            start = torch.from_numpy(flat[at : at + count].astype(np.float32)).reshape(shape)
            self.values.append(torch.nn.Parameter(start, requires_grad=trained))
            at += count

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs for a batch: activations (rows, d_model) and, if the graph has them, labels (rows)."""
        results = _evaluate(self.graph, inputs, list(self.values))
        return {role: results[number] for role, number in self.graph.outputs.items()}


def _evaluate(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    watch: Callable[[int, str, tuple[Any, ...], dict[str, Any], Any], None] | None = None,
) -> list[Any]:
    results: list[Any] = []
    pools: dict[str, Sequence[Any]] = {"i": inputs, "p": parameters, "n": results}

    def resolve(value: Any) -> Any:
        if isinstance(value, _Ref):
            return pools[value.kind][value.number]
        return [resolve(part) for part in value] if isinstance(value, list) else value

    for number, (name, arguments, named) in enumerate(graph.nodes):
        given = tuple(resolve(value) for value in arguments)
        if name == "getitem":
            result = given[0][given[1]]
        else:
            result = OPERATORS[name](*given, **{key: resolve(value) for key, value in named.items()})
        if watch is not None:
            watch(number, name, arguments, named, result)
        results.append(result)
    return results


def dry_run(graph: Graph, d_model: int, limits: GraphLimits | None = None) -> None:
    """Evaluate `graph` on fake tensors of the smallest and the largest batch, which costs no memory and shows all shapes.

    Raises:
        GraphRefused: it fails, is too large, indexes with anything but places that topk, sort or argmax found, or an
            output does not have the shape of its role.
    """
    limits = limits or GraphLimits()
    for rows in (2, 3, limits.max_rows):
        _DryRun(graph, rows, d_model, limits).run()


@dataclass
class _DryRun:
    graph: Graph
    rows: int
    d_model: int
    limits: GraphLimits
    elements: int = 0
    bounds: dict[_Ref, int] = field(default_factory=dict)
    """Of values that are places along a dimension: its size."""

    def run(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        number = -1

        def watch(at: int, name: str, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            nonlocal number
            number = at
            self.check(at, name, arguments, named, result)

        with FakeTensorMode():
            inputs = [torch.zeros(self.rows, self.d_model), torch.zeros(self.rows)][: len(self.graph.inputs)]
            values = [torch.zeros(shape) for shape, _ in self.graph.parameters]
            self.shapes = {_Ref("i", n): tuple(t.shape) for n, t in enumerate(inputs)}
            self.shapes |= {_Ref("p", n): tuple(t.shape) for n, t in enumerate(values)}
            counter = FlopCounterMode(display=False)
            try:
                with counter:
                    results = _evaluate(self.graph, inputs, values, watch)
            except GraphRefused:
                raise
            except Exception as error:
                # whatever torch raises for impossible arguments; its text is not passed on
                name = self.graph.nodes[min(number + 1, len(self.graph.nodes) - 1)][0]
                raise GraphRefused(f"node {number + 1}, {name}, cannot be computed on {self.rows} rows") from error
        if counter.get_total_flops() > self.limits.flops:
            raise GraphRefused(
                f"a batch costs {counter.get_total_flops():,} operations of at most {self.limits.flops:,}"
            )
        for role, at in self.graph.outputs.items():
            self.check_output(role, results[at])

    def check(self, at: int, name: str, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements += tensor.numel()
        if self.elements > self.limits.elements:
            raise GraphRefused(
                f"node {at}, {name}: the values of {self.rows} rows have {self.elements:,} elements, "
                f"more than {self.limits.elements:,}"
            )
        here = _Ref("n", at)
        if isinstance(result, torch.Tensor):
            self.shapes[here] = tuple(result.shape)
        source = arguments[0] if arguments and isinstance(arguments[0], _Ref) else None
        given = (
            dict(zip((a.name for a in OPERATORS[name]._schema.arguments), arguments, strict=False))
            if name != "getitem"
            else {}
        )
        given |= named
        if name == "getitem" and source is not None and source.kind == "n":
            maker, made_from, _ = self.graph.nodes[source.number]
            if maker in _INDEX_FROM and arguments[1] == _INDEX_FROM[maker]:
                dim = self._argument(source.number, "dim", -1)
                self.bounds[here] = self._size(made_from[0], dim)
        elif name == "argmax.default" and given.get("dim") is not None:
            self.bounds[here] = self._size(given["self"], given["dim"])
        elif name in _INDEX_KEPT and source in self.bounds:
            self.bounds[here] = self.bounds[source]
        elif name in _INDEX_USED:
            bound = self.bounds.get(given["index"]) if isinstance(given.get("index"), _Ref) else None
            if bound is None or bound > self._size(given["self"], given["dim"]):
                raise GraphRefused(
                    f"node {at}, {name}: index with what topk, sort or argmax found along as long a dimension"
                )

    def check_output(self, role: str, value: Any) -> None:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if shape is None or value.dtype != torch.float32:
            raise GraphRefused(f"output {role} is no float32 tensor")
        fits = {
            "loss": shape == (),
            "reconstruction": shape == (self.rows, self.d_model),
            "scores": shape == (self.rows,),
            "codes": len(shape) == 2 and shape[0] == self.rows,
            "statistic": len(shape) <= 1 and math.prod(shape) <= MAX_STATISTIC,
        }[role]
        if not fits:
            raise GraphRefused(f"output {role} has shape {shape} for {self.rows} rows of width {self.d_model}")

    def _argument(self, node: int, name: str, default: int) -> int:
        operator, arguments, named = self.graph.nodes[node]
        names = [argument.name for argument in OPERATORS[operator]._schema.arguments]
        found = named.get(name, dict(zip(names, arguments, strict=False)).get(name, default))
        return found if isinstance(found, int) and not isinstance(found, bool) else default

    def _size(self, value: Any, dim: Any) -> int:
        if not isinstance(value, _Ref) or not _is_int(dim):
            raise GraphRefused("an index is taken along a dimension that is not given as a number")
        shape = self.shapes[value]
        return shape[dim] if shape else 1
