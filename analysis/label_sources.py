"""Where the labels of a sweep come from: names, functions of a run, or values by prompt id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.probes.inputs import check_labels, to_memory
from millpond.store.errors import InvalidInput, MissingLabels, OverlappingGroups, RunOpen, UnknownPrompts

if TYPE_CHECKING:
    from millpond.analysis.selection import TokenView
    from millpond.store.run import Run

    Part = Run | TokenView

LabelSource = Callable[["Run"], Any]
"""Takes a run and returns one value a row, such as `lambda run: run.labels["bracket_depth"] > 0`."""


def named_sources(labels: Any) -> dict[str, Any]:
    """Sources by label name, from one name, several, or a mapping.

    Raises:
        InvalidInput: there are none.
    """
    if isinstance(labels, str):
        return {labels: labels}
    found = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels}
    if not found:
        raise InvalidInput("labels is empty; name at least one label")
    return found


def part_labels(parts: Sequence[Part], name: str, source: Any) -> list[NDArray[Any]]:
    """One value a row of each part.

    Raises:
        InvalidInput: there are more or fewer values than rows.
        UnknownPrompts: values by prompt id name a prompt that no part has.
        MissingLabels: a prompt or a row has no value, or NaN.
    """
    by_prompt = isinstance(source, Mapping) or hasattr(source, "to_dict")
    if by_prompt:
        known = {prompt for part in parts for prompt in part.prompts["id"]}
        given = source if isinstance(source, Mapping) else source.to_dict()
        unknown = [prompt for prompt in given if prompt not in known]
        if unknown:
            raise UnknownPrompts(
                f"label {name!r} names {len(unknown):,} prompts that the parts do not have, such as {unknown[0]!r}; "
                "use the ids in run.prompts['id']"
            )
    found = []
    for part, what in zip(parts, ("training", "test"), strict=False):
        if by_prompt:
            values = _by_prompt(part, given, name)
        else:
            values = to_memory(source(part) if callable(source) else part.labels[source])
        if values.shape != (len(part),):
            raise InvalidInput(
                f"label {name!r} has shape {values.shape}; give one value for each of the {len(part):,} rows"
            )
        check_labels(values, f"label {name!r} of the {what} part")
        found.append(values)
    return found


def _by_prompt(part: Part, given: Mapping[str, Any], name: str) -> NDArray[Any]:
    missing = [prompt for prompt in part.prompts["id"] if prompt not in given]
    if missing:
        raise MissingLabels(
            f"label {name!r} has no value for {len(missing):,} of {len(part.prompts):,} prompts, such as {missing[0]!r}; "
            "give one for each, or select the prompts that have one with run.select"
        )
    table = np.asarray([given[prompt] for prompt in part.prompts["id"]])
    place = np.searchsorted(part.prompts.index.to_numpy(), to_memory(part.tokens["prompt"]))
    return np.asarray(table[place])


def part_groups(part: Part, by: str | None) -> NDArray[Any]:
    """The group of each row: its prompt's number, or its prompt's value in the column `by`."""
    prompts = to_memory(part.tokens["prompt"])
    if by is None:
        return prompts
    place = np.searchsorted(part.prompts.index.to_numpy(), prompts)
    return np.asarray(part.prompts[by].astype(str).to_numpy()[place])


def check_parts(train: Part, test: Part, by: str | None) -> None:
    """Check that both parts may be used together.

    Raises:
        RunOpen: a part may still grow.
        InvalidInput: the prompts have no column `by`.
        OverlappingGroups: the parts share prompts, or groups in `by`.
    """
    for part in (train, test):
        if by is not None and by not in part.prompts:
            raise InvalidInput(
                f"groups={by!r} is no column of the prompts; they have {', '.join(map(str, part.prompts.columns))}"
            )
        if part.state == "open":
            raise RunOpen(
                f"run {part.name!r} is open, so a sweep could not be repeated; finish its capture "
                "(millpond capture --resume) first"
            )
    if train.plan.spec.id == test.plan.spec.id:
        shared = set(train.prompts.index) & set(test.prompts.index)
    else:
        shared = set(train.prompts["sha256"]) & set(test.prompts["sha256"])
    what = "prompts"
    if not shared and by is not None:
        shared, what = set(train.prompts[by]) & set(test.prompts[by]), f"values of {by!r}"
    if shared:
        first = min(map(str, shared))
        raise OverlappingGroups(
            f"training and test part share {len(shared):,} {what}, such as {first}; split with run.split"
            + (f"(by={by!r})" if by is not None else "")
        )
