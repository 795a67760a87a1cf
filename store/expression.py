"""Conditions on rows, such as `deceptive and position > 0 and source in ["web", "book"]`, evaluated on columns.

The grammar is Python's, but only of names, constants, comparisons, arithmetic and logic: nothing can be
called and no attribute read, so a condition from outside is safe to evaluate.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: np.isin(a, b),
    ast.NotIn: lambda a, b: ~np.isin(a, b),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: lambda a, b: _boolean(a) & _boolean(b),
    ast.BitOr: lambda a, b: _boolean(a) | _boolean(b),
}
LONGEST = 4096
"""Characters of a condition."""


class Expression:
    """A parsed condition: `names` are the columns that it needs, and `evaluate` gives a boolean a row."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidInput(
                f'where is a {type(text).__name__}; write the condition as text, such as "bracket_depth > 1", or keep what '
                "you computed as a label (run.labels.add) and name that"
            )
        self.text = text
        self.names: set[str] = set()
        if len(text) > LONGEST:
            raise self._refuse(f"it has {len(text)} characters, more than {LONGEST}")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refuse(str(getattr(error, "msg", error))) from None
        self._check(self._tree, 0)

    def _refuse(self, why: str) -> InvalidInput:
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        return InvalidInput(
            f"where={shown!r} cannot be used: {why}; write comparisons of columns and constants joined by and, or, not, "
            "such as \"deceptive and position > 0 and source in ['web', 'book']\""
        )

    def _check(self, node: ast.expr, depth: int) -> None:
        if depth > 50:
            raise self._refuse("it is nested too deeply")
        match node:
            case ast.BinOp(left=ast.Name(id=name), op=ast.MatMult(), right=ast.Constant(value=int(version))):
                self.names.add(f"{name}@{version}")
                return
            case ast.BoolOp(values=parts):
                inside = parts
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=part):
                inside = [part]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                inside = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
                inside = [left, *others]
                lists = [other for op, other in zip(ops, others, strict=True) if isinstance(op, ast.In | ast.NotIn)]
                if not all(isinstance(item, ast.List | ast.Tuple | ast.Set) for item in lists):
                    raise self._refuse("'in' needs a list of constants, such as in [1, 2]")
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                if not all(isinstance(_constant(part), bool | int | float | str) for part in parts):
                    raise self._refuse("a list may hold constants only")
                inside = []
            case ast.Name(id=name):
                self.names.add(name)
                return
            case ast.Constant(value=value) if isinstance(value, bool | int | float | str):
                return
            case _:
                raise self._refuse(f"{ast.unparse(node)!r} is not allowed")
        for part in inside:
            self._check(part, depth + 1)

    def evaluate(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """One boolean a value of the columns, which all have the same length.

        Raises:
            InvalidInput: the columns' data types do not fit the condition.
        """
        try:
            found = np.asarray(self._value(self._tree, columns))
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise self._refuse(" ".join(str(error).split())) from None
        if found.dtype != bool:
            raise self._refuse(f"it gives {found.dtype} values, not booleans")
        length = len(next(iter(columns.values())))
        return np.broadcast_to(found, (length,))

    def _value(self, node: ast.expr, columns: Mapping[str, NDArray[Any]]) -> Any:
        match node:
            case ast.BinOp(left=ast.Name(id=name), op=ast.MatMult(), right=ast.Constant(value=int(version))):
                return columns[f"{name}@{version}"]
            case ast.BoolOp(op=op, values=parts):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                values = [_boolean(self._value(part, columns)) for part in parts]
                return join.reduce(np.broadcast_arrays(*values))
            case ast.UnaryOp(op=ast.USub(), operand=part):
                return -self._value(part, columns)
            case ast.UnaryOp(operand=part):
                return ~_boolean(self._value(part, columns))
            case ast.BinOp(left=left, op=op, right=right):
                sides = self._value(left, columns), self._value(right, columns)
                # text takes % and * too, and both make strings of any length from a short condition
                if any(np.asarray(side).dtype.kind not in "biuf" for side in sides):
                    raise TypeError("arithmetic needs numbers")
                return _ARITHMETIC[type(op)](*sides)
            case ast.Compare(left=left, ops=ops, comparators=others):
                held = self._value(left, columns)
                results = []
                for compare, other in zip(ops, others, strict=True):
                    following = self._value(other, columns)
                    _check_comparable(held, following)
                    results.append(np.asarray(_COMPARE[type(compare)](held, following)))
                    held = following
                return np.logical_and.reduce(np.broadcast_arrays(*results))
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return np.array([_constant(part) for part in parts])
            case ast.Name(id=name):
                return columns[name]
            case _:
                return np.asarray(_constant(node))


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _boolean(value: Any) -> NDArray[np.bool_]:
    found = np.asarray(value)
    if found.dtype != bool:
        raise TypeError(f"and, or, not need booleans, not {found.dtype}; compare the column with a value")
    return found


def _check_comparable(a: Any, b: Any) -> None:
    """NumPy answers False to a comparison of text and numbers; a typing error should not select nothing."""
    kinds = [np.asarray(value).dtype.kind for value in (a, b)]
    if len(np.shape(b)) and not np.size(b):
        return
    if ("U" in kinds or "T" in kinds) and not set(kinds) <= {"U", "T"}:
        raise TypeError("it compares text with numbers")
