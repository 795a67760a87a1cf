"""Lazy expressions as people write them: `(lazy(run)[hook] @ v).groupby("label").mean().compute()`.

Operations are recorded as an `expressions.Expression`, checked at once against the run's hooks, labels and width, and
computed by an executor: here, passes over the rows; through a gateway, whoever takes the same wire form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis import expressions as ex
from millpond.analysis.remote import backend_of
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.store.result import Result
    from millpond.store.run import Run

    Executor = Callable[[ex.Expression], Result]


def lazy(run: Run, execute: Executor | None = None) -> LazyRun:
    """The hooks and labels of `run` for lazy expressions.

    Args:
        run: what the expressions are about.
        execute: computes an expression; by default passes over the rows of `run`, or the gateway that it is behind.
    """
    backend = backend_of(run)
    if execute is None and backend is not None:

        def execute(expression: ex.Expression) -> Result:
            parts = {"run": run, "expression": expression}
            return backend.submit("expression", parts, lambda results, made: results[0]).result()

    return LazyRun(run, execute)


@dataclass(frozen=True, repr=False)
class LazyRun:
    """A run whose columns are recorded instead of read."""

    run: Run
    execute: Executor | None = None

    def __getitem__(self, hook: str) -> LazyColumn:
        """The activations of one hook.

        Raises:
            HookNotCaptured: the run does not hold it.
        """
        names = self.run.match(hook)
        if len(names) != 1:
            raise InvalidInput(f"{hook!r} names {len(names)} hook points; name one")
        return LazyColumn(self, ex.Activations(hook=names[0]))

    def label(self, name: str) -> LazyColumn:
        """A label of numbers or booleans as a column."""
        return LazyColumn(self, ex.Label(name=name))

    @property
    def position(self) -> LazyColumn:
        """Token positions as a column."""
        return LazyColumn(self, ex.Position())

    def __repr__(self) -> str:
        return f"<LazyRun {self.run.name!r}: {len(self.run.hooks)} hooks>"


@dataclass(frozen=True, repr=False, eq=False)
class LazyColumn:
    """One or several values for each row, recorded."""

    source: LazyRun
    node: Any
    by: str | None = None

    __array_ufunc__ = None  # NumPy leaves `array @ column` and the like to us, which refuse them

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise InvalidInput("a lazy column has no values here; reduce it, with .mean() or .top(), and .compute() that")

    @property
    def width(self) -> int:
        """Values a row."""
        return ex.width_of(self.node, self.source.run)

    def __matmul__(self, directions: Any) -> LazyColumn:
        """Scores along a direction (d,), or the columns of (d, k)."""
        columns = np.asarray(directions, np.float64)
        return self.project(columns[None] if columns.ndim == 1 else columns.T)

    def project(self, directions: Any, *, shift: Any = None) -> LazyColumn:
        """Scores along each of `directions` (k, d) after subtracting `shift`, or along a `PcaReducer`'s components."""
        if hasattr(directions, "components_"):
            directions, shift = directions.components_, directions.mean_
        rows = np.asarray(directions, np.float64)
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise InvalidInput(f"directions have shape {rows.shape}; give finite numbers (k, {self.width})")
        moved = None if shift is None else tuple(np.asarray(shift, np.float64).ravel().tolist())
        node = _checked(ex.Project, of=self.node, directions=tuple(map(tuple, rows.tolist())), shift=moved)
        return self._column(node)

    def norm(self) -> LazyColumn:
        """Euclidean norm of each row."""
        return self._column(ex.Norm(of=self.node))

    def __add__(self, other: Any) -> LazyColumn:
        return self._with("add", other)

    def __sub__(self, other: Any) -> LazyColumn:
        return self._with("subtract", other)

    def __mul__(self, other: Any) -> LazyColumn:
        return self._with("multiply", other)

    def __truediv__(self, other: Any) -> LazyColumn:
        return self._with("divide", other)

    def __radd__(self, other: Any) -> LazyColumn:
        return self._with("add", other)

    def __rmul__(self, other: Any) -> LazyColumn:
        return self._with("multiply", other)

    def __rsub__(self, other: Any) -> LazyColumn:
        return self._with("multiply", -1.0)._with("add", other)

    def __lt__(self, other: Any) -> LazyColumn:
        return self._with("less", other)

    def __gt__(self, other: Any) -> LazyColumn:
        return self._with("greater", other)

    def equals(self, other: Any) -> LazyColumn:
        """1 where the values are equal, else 0."""
        return self._with("equal", other)

    def groupby(self, label: str) -> LazyColumn:
        """Reduce the rows of each value of `label` apart.

        Raises:
            LabelNotFound: the run does not have the label.
        """
        return LazyColumn(self.source, self.node, label)

    def mean(self) -> LazyResult:
        """Mean of each value."""
        return self._reduce(ex.Mean)

    def variance(self) -> LazyResult:
        """Population variance of each value."""
        return self._reduce(ex.Variance)

    def histogram(self, bins: int = 64, *, low: float | None = None, high: float | None = None) -> LazyResult:
        """Counts in equal bins; from the smallest to the largest value where no limits are given."""
        return self._reduce(ex.Histogram, bins=bins, low=low, high=high)

    def quantiles(self, q: float | Sequence[float]) -> LazyResult:
        """Quantiles by rank, without interpolation."""
        return self._reduce(ex.Quantiles, q=tuple(np.atleast_1d(q).tolist()))

    def correlation(self, other: LazyColumn) -> LazyResult:
        """Pearson correlation with another column of one value a row."""
        return self._reduce(ex.Correlation, other=other.node)

    def top(self, n: int = 10) -> LazyResult:
        """References to the rows with the largest values: prompt ids, positions and values."""
        return self._reduce(ex.Top, n=n)

    def _column(self, node: Any) -> LazyColumn:
        ex.width_of(node, self.source.run)
        return LazyColumn(self.source, node, self.by)

    def _with(self, op: Any, other: Any) -> LazyColumn:
        right = other.node if isinstance(other, LazyColumn) else _checked(ex.Constant, value=other)
        kind = ex.Compare if op in ("less", "greater", "equal") else ex.Arithmetic
        return self._column(kind(op=op, left=self.node, right=right))

    def _reduce(self, kind: Any, **parameters: Any) -> LazyResult:
        reduction = _checked(kind, of=self.node, by=self.by, **parameters)
        expression = ex.Expression(run=self.source.run.name, reduce=reduction)
        ex.check_expression(expression, self.source.run)
        return LazyResult(self.source, expression)

    def __repr__(self) -> str:
        return f"<LazyColumn {self.node.op} of run {self.source.run.name!r}, {self.width} values a row>"


@dataclass(frozen=True, repr=False)
class LazyResult:
    """A reduction that has been recorded and checked."""

    source: LazyRun
    expression: ex.Expression

    def compute(self, *, progress: bool = True) -> Result:
        """Run it."""
        if self.source.execute is not None:
            return self.source.execute(self.expression)
        from millpond.analysis.reductions import execute

        return execute(self.expression, self.source.run, progress=progress)

    def __repr__(self) -> str:
        return f"<LazyResult {self.expression.reduce.op} over run {self.expression.run!r}; .compute() runs it>"


def _checked(kind: Any, **values: Any) -> Any:
    from pydantic import ValidationError

    from millpond.store.capture_spec import first_problem

    try:
        return kind(**values)
    except ValidationError as error:
        raise InvalidInput(f"{kind.__name__.lower()}: {first_problem(error)}"[:500]) from error
