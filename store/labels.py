"""Label columns of a run: by prompt in its table, by token as row arrays added beside the activations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, LabelNotFound, LakeCorrupt
from millpond.store.lazy import block_array, coordinates
from millpond.store.manifest import ArrayChecksums, LabelRecord, encode_record, read_record
from millpond.store.objects import Storage
from millpond.store.rows import Block, RowPlan
from millpond.store.shards import ArraySpec, ArrayWriter, read_rows

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_NAME = re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII)
_STORED_DTYPES = {"b": "bool", "i": "int64", "u": "int64", "f": "float32"}


def check_label_name(name: str) -> str:
    """`name`, if a label column may be called so.

    Raises:
        InvalidInput: otherwise.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"label name {name!r} is not allowed; use 1 to 128 letters, digits and '_', starting with a letter"
        )
    return name


def label_dtype(name: str, dtype: np.dtype[Any]) -> str:
    """The data type in which a token label of NumPy type `dtype` is stored.

    Raises:
        InvalidInput: labels of that type cannot be stored.
    """
    if dtype.kind not in _STORED_DTYPES:
        raise InvalidInput(f"token label {name!r} has data type {dtype}; use booleans, integers or floats")
    return _STORED_DTYPES[dtype.kind]


def write_token_label(plan: RowPlan, name: str, values: Mapping[int, NDArray[Any]], dtype: str) -> None:
    """Store a token label of a whole run: `values[prompt number]` holds one value a token, from position 0.

    Raises:
        InvalidInput: the run has the label, or a prompt has too few values for its rows, or of another type.
    """
    folder = plan.folder / f"labels/{check_label_name(name)}/1"
    if folder.exists("label.json"):
        raise InvalidInput(f"label {name!r} exists in run {plan.spec.name!r}; choose another name")
    writer = ArrayWriter(folder, plan.spec.row_array(dtype), {"millpond:label": name})
    try:
        for block in plan.blocks():
            prompts = plan.prompt_numbers(block)
            positions = plan.read("position", block)
            out = np.empty(len(prompts), dtype)
            edges = np.flatnonzero(np.diff(prompts)) + 1
            for rows in np.split(np.arange(len(prompts)), edges):
                of_prompt = values[int(prompts[rows[0]])]
                if not np.can_cast(of_prompt.dtype, dtype, "same_kind"):
                    raise InvalidInput(
                        f"label {name!r} of prompt number {int(prompts[rows[0]])} has data type {of_prompt.dtype}, "
                        f"which {dtype} cannot hold; give {dtype} values"
                    )
                last = int(positions[rows].max())
                if last >= len(of_prompt):
                    raise InvalidInput(
                        f"label {name!r} has {len(of_prompt)} values for prompt number {int(prompts[rows[0]])}, "
                        f"whose rows reach position {last}; give one value a token"
                    )
                out[rows] = of_prompt[positions[rows]]
            writer.append(out)
        checksums = ArrayChecksums.of(writer.finish())
        record = LabelRecord(**checksums.model_dump(), dtype=dtype)  # type: ignore[arg-type] # pydantic checks it
        if not folder.create("label.json", encode_record(record)):
            raise InvalidInput(
                f"label {name!r} was just added to run {plan.spec.name!r} by somebody else; choose another name"
            )
    except BaseException:
        writer.close()
        plan.folder.delete_tree(f"labels/{name}")
        raise


class _ReadTokenLabel:
    def __init__(self, plan: RowPlan, folder: Storage, spec: ArraySpec) -> None:
        self.plan, self.folder, self.spec = plan, folder, spec

    def __call__(self, block: Block) -> NDArray[Any]:
        first = block.first
        return read_rows(self.folder, self.spec, first, first + block.stop - block.start)[self.plan.mask(block)]


class _ReadPromptLabel:
    def __init__(self, plan: RowPlan, values: NDArray[Any]) -> None:
        self.plan, self.values = plan, values

    def __call__(self, block: Block) -> NDArray[Any]:
        labels: NDArray[Any] = self.values[self.plan.read("prompt", block)]
        return labels


class Labels(Mapping[str, "xr.DataArray"]):
    """The labels of a run by name, each lazy and with one value a row."""

    def __init__(self, plan: RowPlan, prompts: pd.DataFrame, prompt_labels: tuple[str, ...]) -> None:
        self._plan = plan
        self._prompts = prompts
        self._prompt_labels = prompt_labels

    @property
    def token_labels(self) -> tuple[str, ...]:
        """Names of the labels with a value a token."""
        found = (entry.path.split("/") for entry in self._plan.folder.list("labels"))
        return tuple(sorted(path[1] for path in found if path[2:] == ["1", "label.json"]))

    @property
    def prompt_labels(self) -> tuple[str, ...]:
        """Names of the labels with a value a prompt."""
        return self._prompt_labels

    def __iter__(self) -> Iterator[str]:
        return iter((*self.token_labels, *self.prompt_labels))

    def __len__(self) -> int:
        return len(self.token_labels) + len(self.prompt_labels)

    def __getitem__(self, name: str) -> xr.DataArray:
        import xarray as xr

        plan = self._plan
        if name in self._prompt_labels:
            values = self._prompts[name].to_numpy()
            if values.dtype == object or values.dtype.kind not in "biufU":
                values = values.astype(str)
            data = block_array(plan, _ReadPromptLabel(plan, values), f"label-{name}", values.dtype)
        elif name in self.token_labels:
            folder = plan.folder / f"labels/{name}/1"
            record = read_record(folder, "label.json", LabelRecord)
            if record.rows != plan.offsets[-1]:
                raise LakeCorrupt(
                    f"label {name!r} has {record.rows} values, but run {plan.spec.name!r} has {plan.offsets[-1]} rows; "
                    "a label of an open run does not grow with it: add it again after sealing"
                )
            spec = plan.spec.row_array(record.dtype)
            data = block_array(plan, _ReadTokenLabel(plan, folder, spec), f"label-{name}", np.dtype(record.dtype))
        else:
            raise LabelNotFound(
                f"label {name!r} is not in run {plan.spec.name!r}, which has {', '.join(self) or 'none'}; name one of these"
            )
        return xr.DataArray(data, dims=("row",), coords=coordinates(plan), name=name)

    def __repr__(self) -> str:
        return f"<Labels by token: {', '.join(self.token_labels) or 'none'}; by prompt: {', '.join(self.prompt_labels) or 'none'}>"
