"""On the client: a torch module as the JSON graph that `graph.py` checks in the vault."""

from __future__ import annotations

import json
import operator
import warnings
from typing import Any

import numpy as np
import torch

from millpond.hub.graph import OPERATORS, ROLES
from millpond.store.errors import GraphRefused

_SKIPPED = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}


def trace(module: torch.nn.Module, d_model: int, *, labels: bool = False) -> tuple[str, bytes]:
    """The graph of `module` and its parameters' values as float32.

    `module` takes activations (rows, d_model) and, with `labels`, labels (rows) as float32, and returns a dict of some of
    `loss`, `reconstruction`, `codes`, `scores`, `statistic`. The number of rows stays open.

    Raises:
        GraphRefused: it cannot be exported, or uses an operator that the vault does not allow.
    """
    rows = torch.export.Dim("rows", min=2)
    examples: tuple[torch.Tensor, ...] = (torch.zeros(7, d_model),) + ((torch.zeros(7),) if labels else ())
    shapes = tuple({0: rows} for _ in examples)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own parts
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False).run_decompositions()
    except Exception as error:  # torch raises many types
        raise GraphRefused(f"the module cannot be exported: {type(error).__name__}: {error}") from error
    tree = program.call_spec.out_spec
    roles = tree.context if tree is not None and tree.type is dict else ()
    if not roles or not set(roles) <= set(ROLES):
        raise GraphRefused(f"the module must return a dict of some of {', '.join(ROLES)}")
    return _Writer(program, len(examples)).write(list(roles))


class _Writer:
    def __init__(self, program: Any, inputs: int) -> None:
        self.program = program
        self.inputs = inputs
        self.names: dict[str, dict[str, int]] = {}
        self.parameters: list[tuple[list[int], bool]] = []
        self.values: list[bytes] = []
        self.nodes: list[Any] = []

    def write(self, roles: list[str]) -> tuple[str, bytes]:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise GraphRefused("the module changes a buffer or an input; write it without")
        seen_inputs = 0
        outputs: dict[str, int] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in signature.user_inputs:
                    self.names[node.name] = {"i": seen_inputs}
                    seen_inputs += 1
                else:
                    self.parameter(node.name, signature)
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                outputs = {role: self.output(value) for role, value in zip(roles, node.args[0], strict=True)}
        graph = {
            "version": 1,
            "inputs": ["activations", "labels"][: self.inputs],
            "parameters": self.parameters,
            "nodes": self.nodes,
            "outputs": outputs,
        }
        return json.dumps(graph, separators=(",", ":"), allow_nan=False), b"".join(self.values)

    def parameter(self, name: str, signature: Any) -> None:
        target = signature.inputs_to_parameters.get(name) or signature.inputs_to_buffers.get(name)
        trained = name in signature.inputs_to_parameters
        value = self.program.state_dict.get(target, self.program.constants.get(target)) if target else None
        if value is None:
            target = signature.inputs_to_lifted_tensor_constants.get(name)
            value = self.program.constants.get(target)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            raise GraphRefused(f"{target or name} is no floating-point tensor; keep others out of the module")
        self.names[name] = {"p": len(self.parameters)}
        self.parameters.append((list(value.shape), trained and value.requires_grad))
        self.values.append(value.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes())

    def call(self, node: Any) -> None:
        if node.target is operator.getitem:
            name = "getitem"
        else:
            name = str(node.target).removeprefix("aten.")
            if name not in OPERATORS:
                raise GraphRefused(f"{node.target} is not allowed; allowed are {', '.join(OPERATORS)}")
        named = {key: self.value(value) for key, value in node.kwargs.items() if key not in _SKIPPED}
        self.names[node.name] = {"n": len(self.nodes)}
        self.nodes.append([name, [self.value(value) for value in node.args], named])

    def output(self, value: Any) -> int:
        reference = self.names.get(getattr(value, "name", ""), {})
        if "n" not in reference:
            raise GraphRefused("an output is an input or a parameter itself; compute something")
        return reference["n"]

    def value(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.names[value.name]
        if isinstance(value, (list, tuple)):
            return [self.value(part) for part in value]
        if isinstance(value, torch.dtype):
            return {"d": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, np.generic):
            return value.item()
        raise GraphRefused(f"an argument of type {type(value).__name__} cannot be sent")
