"""What users give a probe, checked before any long work: labels, weights and groups of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, MissingLabels, OneClass, RunOpen

MAX_CLASSES = 4096


def is_lazy(array: Any) -> bool:
    """Whether `array` is a Dask array or a DataArray over one."""
    return hasattr(array, "__dask_graph__") and array.__dask_graph__() is not None


def to_memory(array: Any) -> NDArray[Any]:
    """The values of one label or coordinate a row, computed if they are lazy."""
    return np.asarray(array.compute() if is_lazy(array) else array)


def name_of(array: Any, default: str) -> str:
    """The name of a DataArray or Series, else `default`."""
    name = getattr(array, "name", None)
    return name if isinstance(name, str) and not name.startswith("array-") else default


def source_of(array: Any) -> dict[str, Any]:
    """Run, hook and model that a DataArray of activations says it comes from."""
    wanted = ("run", "run_id", "hook", "model", "tokens")
    return {key: value for key, value in getattr(array, "attrs", {}).items() if key in wanted}


def check_one_hook(X: Any) -> None:
    """Raises InvalidInput if `X` is a run, or stands in for one."""
    if hasattr(X, "hooks") and hasattr(X, "labels"):
        raise InvalidInput("X is a run; give the rows of one of its hooks, run[hook]")


def check_sealed(X: Any) -> None:
    """Raises RunOpen if `X` says that its run may still grow."""
    attributes = getattr(X, "attrs", {})
    if attributes.get("state") == "open":
        raise RunOpen(
            f"run {attributes.get('run')!r} is open, so a fit could not be repeated; finish its capture "
            "(millpond capture --resume) first"
        )


def check_labels(labels: NDArray[Any], name: str) -> None:
    """Raises MissingLabels if a label is NaN, None or infinite, InvalidInput if they are not one a row."""
    if labels.ndim != 1:
        raise InvalidInput(f"{name} has shape {labels.shape}; give one label a row")
    if labels.dtype.kind == "f":
        missing = ~np.isfinite(labels)
    elif labels.dtype.kind == "O":
        missing = np.array([value is None or value != value for value in labels])  # NaN differs from itself
    else:
        return
    if missing.any():
        raise MissingLabels(
            f"Input {name} contains NaN or infinity in {int(missing.sum()):,} of {len(labels):,} rows; leave those rows out"
        )


def class_codes(labels: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The classes among `labels`, in order, and the number of each row's class, as uint8 if they fit.

    Raises:
        OneClass: there is only one.
        InvalidInput: there is no row, or there are more than `MAX_CLASSES`.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) == 0:
        raise InvalidInput(f"{name} has 0 rows; give at least one of each class")
    if len(classes) < 2:
        raise OneClass(
            f"{name} holds one class ({classes[0]}) in {len(labels):,} rows. a probe needs rows of more than one class"
        )
    if len(classes) > MAX_CLASSES:
        raise InvalidInput(
            f"{name} holds {len(classes):,} classes, the limit is {MAX_CLASSES:,}; group them, or use RidgeProbe for numbers"
        )
    return classes, codes.astype(np.uint8 if len(classes) <= 256 else np.uint16)


def codes_of(labels: NDArray[Any], classes: NDArray[Any], name: str) -> NDArray[Any]:
    """The number of each label among the `classes` that a probe was fitted to.

    Raises:
        InvalidInput: a label is none of them.
    """
    codes = np.searchsorted(classes, labels)
    other = classes[np.minimum(codes, len(classes) - 1)] != labels
    if other.any():
        shown = f"{', '.join(map(str, classes[:-1][:5]))} and {classes[-1]}"
        raise InvalidInput(f"{name} holds {labels[other][0]}; the probe was fitted to {shown}")
    return codes.astype(np.uint8 if len(classes) <= 256 else np.uint16)


def class_weights(
    given: Mapping[Any, float] | str | None, classes: NDArray[Any], codes: NDArray[Any], weights: NDArray[Any] | None
) -> tuple[float, ...] | None:
    """Weight of each class; `balanced` is rows / (classes * rows of the class), as scikit-learn has it.

    Raises:
        InvalidInput: `given` is neither `balanced` nor a mapping from classes to numbers of at least 0.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != "balanced":
            raise InvalidInput(
                f"class_weight is {given!r}; give 'balanced', a mapping from classes to weights, or None"
            )
        rows = np.bincount(codes, weights=weights, minlength=len(classes))
        return tuple(float(value) for value in rows.sum() / (len(classes) * np.maximum(rows, 1e-300)))
    known = set(classes.tolist())
    odd = [key for key in given if key not in known]
    if odd:
        raise InvalidInput(
            f"class_weight names the class {odd[0]!r}, which y does not hold; name some of {list(classes)[:5]}"
        )
    found = tuple(float(given.get(value, 1.0)) for value in classes.tolist())
    if not all(np.isfinite(value) and value >= 0 for value in found):
        raise InvalidInput(f"class_weight is {dict(given)}; give numbers of at least 0")
    return found


def sample_weights(given: Any, n_rows: int) -> NDArray[np.float64] | None:
    """One finite weight of at least 0 a row, not all 0.

    Raises:
        InvalidInput: they are not.
    """
    if given is None:
        return None
    weights = to_memory(given).astype(np.float64)
    if weights.ndim == 0:
        weights = np.full(n_rows, float(weights))
    if weights.ndim != 1:
        raise InvalidInput(f"Sample weights must be 1D array or scalar, got {weights.ndim}D array; give one a row")
    if weights.shape != (n_rows,):
        raise InvalidInput(f"sample_weight has shape {weights.shape}; give one weight for each of the {n_rows:,} rows")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InvalidInput("sample_weight holds negative or infinite numbers or NaN; give weights of at least 0")
    if not weights.any():
        raise InvalidInput("every sample_weight is zero; give some rows a weight above 0")
    return weights


def groups_of(X: Any, groups: Any) -> NDArray[Any] | None:
    """The group of each row: what was given, or else the `prompt` coordinate of `X`, or None."""
    if groups is None:
        groups = getattr(X, "coords", {}).get("prompt")
    if groups is None:
        return None
    found = to_memory(groups)
    if found.shape != (int(X.shape[0]),):
        raise InvalidInput(f"groups have shape {found.shape}; give one for each of the {int(X.shape[0]):,} rows")
    return found


def assign_folds(groups: NDArray[Any] | None, n_rows: int, cv: int, seed: int = 0) -> NDArray[np.uint8]:
    """Fold of each row, whole groups together: the groups in random order, each to the fold with fewest rows.

    Raises:
        InvalidInput: `cv` is not from 2 to 255, or there are fewer groups than folds.
    """
    if not 2 <= cv <= 255:
        raise InvalidInput(f"cv is {cv}; give 2 to 255 folds")
    codes, sizes = np.arange(n_rows), np.ones(n_rows, np.int64)
    if groups is not None:
        _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < cv:
        raise InvalidInput(f"cv is {cv}, but the rows have {len(sizes)} groups (prompts); lower cv or capture more")
    order = np.random.default_rng(seed).permutation(len(sizes))
    fold = np.empty(len(sizes), np.uint8)
    if groups is None:
        fold[order] = np.arange(len(sizes)) % cv
        return np.asarray(fold[codes])
    filled = np.zeros(cv, np.int64)
    for group in order:
        smallest = int(filled.argmin())
        fold[group] = smallest
        filled[smallest] += sizes[group]
    return np.asarray(fold[codes])


def strengths_of(
    value: Any, name: str, least: float = 0.0, open_below: bool = True, most: float = np.inf
) -> list[float]:
    """One strength or several, each a number in its range.

    Raises:
        InvalidInput: one is not, or there is none.
    """
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    listed = list(value) if several else [value]
    edge = f"above {least:g}" if open_below else f"of at least {least:g}"
    upto = "" if np.isinf(most) else f" and at most {most:g}"
    try:
        found = [float(one) for one in listed]
        good = bool(found) and all((one > least if open_below else one >= least) and one <= most for one in found)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InvalidInput(f"{name} is {value}; give a number {edge}{upto}, or several of them to choose from")
    return found
