"""The wire form of lazy expressions: a small graph of allowed operations over one run, checked before it runs.

A graph is a tree of columns (one value or several for each row) under one reduction. It is plain data: JSON in, JSON
out, and nothing in it is code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millpond.store.errors import InvalidInput, LabelNotFound

if TYPE_CHECKING:
    from millpond.store.run import Run

MAX_NODES = 64
MAX_DIRECTIONS = 256
MAX_BINS = 4096
MAX_TOP = 1000

Finite = Annotated[float, Field(allow_inf_nan=False)]
Vector = tuple[Finite, ...]


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Activations(_Node):
    """The rows of a hook, d_model values each."""

    op: Literal["activations"] = "activations"
    hook: str


class Label(_Node):
    """A label of numbers or booleans, one value a row."""

    op: Literal["label"] = "label"
    name: str


class Position(_Node):
    """Token position of each row."""

    op: Literal["position"] = "position"


class Constant(_Node):
    """The same number for every row."""

    op: Literal["constant"] = "constant"
    value: Finite


class Project(_Node):
    """Scores of rows along directions: `(of - shift) @ directions.T`, one value for each direction."""

    op: Literal["project"] = "project"
    of: Column
    directions: Annotated[tuple[Vector, ...], Field(min_length=1, max_length=MAX_DIRECTIONS)]
    shift: Vector | None = None


class Norm(_Node):
    """Euclidean norm of each row's values."""

    op: Literal["norm"] = "norm"
    of: Column


class Arithmetic(_Node):
    """Two columns of the same width, or one of them of width 1, combined value by value."""

    op: Literal["add", "subtract", "multiply", "divide"]
    left: Column
    right: Column


class Compare(_Node):
    """1 where the comparison holds, else 0."""

    op: Literal["less", "greater", "equal"]
    left: Column
    right: Column


Column = Annotated[
    Activations | Label | Position | Constant | Project | Norm | Arithmetic | Compare, Field(discriminator="op")
]


class _Reduction(_Node):
    of: Column
    by: str | None = None
    """A label; one value for each of its values."""


class Mean(_Reduction):
    """Mean of each value."""

    op: Literal["mean"] = "mean"


class Variance(_Reduction):
    """Population variance of each value."""

    op: Literal["variance"] = "variance"


class Histogram(_Reduction):
    """Counts in `bins` equal bins from `low` to `high`, by default the smallest and largest value. One value a row."""

    op: Literal["histogram"] = "histogram"
    bins: int = Field(default=64, ge=1, le=MAX_BINS)
    low: Finite | None = None
    high: Finite | None = None


class Quantiles(_Reduction):
    """The smallest value that at least the fraction `q` of the rows does not exceed, within 2^-24 of the range."""

    op: Literal["quantiles"] = "quantiles"
    q: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=99)]


class Correlation(_Reduction):
    """Pearson correlation of two columns of one value a row."""

    op: Literal["correlation"] = "correlation"
    other: Column


class Top(_Reduction):
    """The rows with the largest values, as references: prompt id, position, value. One value a row."""

    op: Literal["top"] = "top"
    n: int = Field(default=10, ge=1, le=MAX_TOP)


Reduction = Annotated[Mean | Variance | Histogram | Quantiles | Correlation | Top, Field(discriminator="op")]


class Expression(_Node):
    """A reduction over one run."""

    version: Literal[1] = 1
    run: str
    reduce: Reduction

    @classmethod
    def from_wire(cls, value: Any) -> Expression:
        """The expression in parsed JSON.

        Raises:
            InvalidInput: it is none; the message names the field.
        """
        from millpond.store.capture_spec import first_problem

        if (depth := _depth(value)) > MAX_NODES:
            raise InvalidInput(f"expression: nested {depth} deep, the limit is {MAX_NODES} operations; split it")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InvalidInput(f"expression: {first_problem(error)}"[:500]) from error

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that are read, each once."""
        found = [node.hook for node in columns_of(self.reduce) if isinstance(node, Activations)]
        return tuple(dict.fromkeys(found))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that are read, each once."""
        found = [node.name for node in columns_of(self.reduce) if isinstance(node, Label)]
        return tuple(dict.fromkeys([*found, *([self.reduce.by] if self.reduce.by else [])]))


for _model in (Project, Norm, Arithmetic, Compare, Mean, Variance, Histogram, Quantiles, Correlation, Top, Expression):
    _model.model_rebuild()


def _depth(value: Any) -> int:
    """Levels of nested objects, counted before anything recurses into them."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for one in level if isinstance(one, dict) for inner in one.values() if isinstance(inner, dict)]
    return depth


def columns_of(reduction: Any) -> list[Any]:
    """Every column node under a reduction or column, parents first."""
    found: list[Any] = []
    todo = [getattr(reduction, name, None) for name in ("other", "of")]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        found.append(node)
        todo += [getattr(node, name, None) for name in ("right", "left", "of")]
    return found


def check_expression(expression: Expression, run: Run) -> None:
    """Check that `expression` can run on `run`: names, widths, sizes.

    Raises:
        HookNotCaptured: the run does not hold a hook.
        LabelNotFound: the run does not have a label.
        InvalidInput: it is about another run, is too large, widths do not fit, or a column cannot be reduced so.
    """
    if expression.run != run.name:
        raise InvalidInput(f"the expression is about run {expression.run!r}, not {run.name!r}; open that run")
    if run.n_rows == 0:  # None: only a vault knows
        raise InvalidInput(f"run {run.name!r} has 0 rows; expressions need at least one")
    nodes = columns_of(expression.reduce)
    if len(nodes) > MAX_NODES:
        raise InvalidInput(f"the expression has {len(nodes)} operations, the limit is {MAX_NODES}; split it")
    for hook in expression.hooks:
        if run.match(hook) != (hook,):
            raise InvalidInput(f"{hook!r} names more than one hook point; name one")
    for label in expression.labels:
        if label not in run.labels:
            raise LabelNotFound(
                f"label {label!r} is not in run {run.name!r}, which has {', '.join(run.labels) or 'none'}"
            )
    reduction = expression.reduce
    width = width_of(reduction.of, run)
    if isinstance(reduction, Correlation) and width_of(reduction.other, run) != 1:
        raise InvalidInput("correlation takes two columns of one value a row; project the second on one direction")
    if not isinstance(reduction, Mean | Variance) and width != 1:
        raise InvalidInput(f"{reduction.op} takes one value a row, not {width}; project on one direction, or use norm")
    if isinstance(reduction, Top) and reduction.by:
        raise InvalidInput("top takes no groupby; multiply the scores by (label.equals(value)) instead")
    if isinstance(reduction, Histogram):
        if (reduction.low is None) != (reduction.high is None):
            raise InvalidInput("histogram: give both low and high, or neither")
        if reduction.low is not None and reduction.high is not None and not reduction.low < reduction.high:
            raise InvalidInput(f"histogram: low is {reduction.low}, high {reduction.high}; low must be smaller")


def width_of(node: Any, run: Run) -> int:
    """Values a row of a column.

    Raises:
        InvalidInput: operands do not fit, or a label is not of numbers.
    """
    if isinstance(node, Activations):
        return run.d_model
    if isinstance(node, Project):
        width = width_of(node.of, run)
        lengths = {len(direction) for direction in node.directions} | ({len(node.shift)} if node.shift else set())
        if lengths != {width}:
            raise InvalidInput(f"project: directions have {sorted(lengths)} values, the rows {width}; give {width}")
        return len(node.directions)
    if isinstance(node, Norm):
        width_of(node.of, run)
        return 1
    if isinstance(node, Arithmetic | Compare):
        left, right = width_of(node.left, run), width_of(node.right, run)
        if left != right and 1 not in (left, right):
            raise InvalidInput(
                f"{node.op}: the operands have {left} and {right} values a row; they must be the same or 1"
            )
        return max(left, right)
    if isinstance(node, Label):
        dtype = run.labels[node.name].dtype
        if np.dtype(dtype).kind not in "biuf":
            raise InvalidInput(
                f"label {node.name!r} has data type {dtype}; only numbers and booleans can be computed with"
            )
    return 1
