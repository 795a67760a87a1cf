"""Logistic regression probe: scikit-learn's model and objective, fitted out of core."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sklearn.exceptions import ConvergenceWarning

from millpond.analysis.probes.base import ClassProbe
from millpond.analysis.probes.linear import Linear
from millpond.analysis.probes.solver import Options, solve
from millpond.analysis.probes.targets import Design, Problem
from millpond.store.errors import InvalidInput


class LogisticProbe(ClassProbe):
    """L2-regularised logistic regression, binary or multinomial, on activations of any size.

    Same objective as `sklearn.linear_model.LogisticRegression(C=C)`: weighted sum of log-losses plus
    |w|^2 / (2 C), intercept not penalised, and its exact optimum.

    Args:
        C: inverse regularisation strength, or several to choose from by cross-validation (log-loss on left-out prompts).
        fit_intercept: add an intercept.
        standardize: penalise the weights of standardised activations (each dimension divided by its
            standard deviation over the training rows); `coef_` stays on the raw scale.
        class_weight: `balanced`, or a mapping from classes to weights.
        cv: folds, whole prompts together, if there are several C.
        tol: converged when the next step is shorter than this fraction of the weights.
        max_iter: most passes over the rows; one that ends there warns and sets `converged_` False.
        progress: show a bar for passes longer than a second.
    """

    strength: ClassVar[str | None] = "C"
    C_: float

    def __init__(
        self,
        C: float | Sequence[float] = 1.0,
        *,
        fit_intercept: bool = True,
        standardize: bool = False,
        class_weight: Mapping[Any, float] | str | None = None,
        cv: int = 5,
        tol: float = 1e-4,
        max_iter: int = 100,
        progress: bool = True,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.class_weight = class_weight
        self.cv = cv
        self.tol = tol
        self.max_iter = max_iter
        self.progress = progress

    def check_parameters(self) -> None:
        """Raises InvalidInput unless the parameters can be used."""
        for name in ("tol", "max_iter"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; give a number above 0")

    def solve(self, designs: Sequence[Design], problems: Sequence[Problem]) -> list[list[Linear]]:
        """Fit every problem on every design in shared passes; see `millpond.analysis.probes.solver`."""
        options = Options(self.fit_intercept, self.standardize, self.tol, self.max_iter, self.progress)
        return solve(designs, problems, options)

    def _warn(self, found: Linear) -> None:
        trained_on = getattr(self, "trained_on_", {})
        where = f" on {trained_on['hook']}" if "hook" in trained_on else ""
        warnings.warn(
            f"LogisticProbe(C={self.C_}){where} did not reach tol={self.tol} in {found.n_iter} passes "
            f"(max_iter={self.max_iter}); raise max_iter or lower C",
            ConvergenceWarning,
            stacklevel=4,
        )
