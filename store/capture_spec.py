"""What a capture is asked to do: the job file's schema and the wish a single request carries."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millpond.store.errors import InvalidInput
from millpond.store.interventions import Intervention, interventions_hash
from millpond.store.near_names import fields_at, near
from millpond.store.positions import PositionFilter
from millpond.store.reads import Read

ARGUMENT = "millpond"
"""Under this name a request's extra arguments hold what it asks of Millpond."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """Which model runs."""

    path: str
    """Folder with `config.json`, safetensors weights and the tokenizer."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of weights and activations; `auto` is what the model's configuration says."""
    adapter: str | None = None
    """Folder of a LoRA adapter in PEFT's format; the model runs with it."""

    @property
    def base(self) -> str:
        """What a queue knows the base model by: its folder as it is written, and the data type; adapters are swapped."""
        return f"{os.path.normpath(self.path)}:{self.dtype}"


class CaptureSection(PositionFilter):
    """Which activations are kept."""

    hooks: tuple[str, ...] = ()
    """Hook point names or globs, such as `blocks.*.hook_resid_post`; none where only `reads` are kept."""
    reads: tuple[Read, ...] = ()
    """Scores of probes and codes of SAEs that are computed of the same positions and kept."""
    max_new_tokens: int = Field(default=0, ge=0)
    """Tokens generated greedily after each prompt; the last one's activations are never computed."""

    @model_validator(mode="after")
    def _not_empty(self) -> CaptureSection:
        if not self.hooks and not self.reads:
            raise ValueError("capture.hooks and capture.reads are both empty; name at least one hook point or read")
        return self


class PromptsSection(_Section):
    """Where the prompts come from and which of their columns are kept."""

    path: str
    """A `.jsonl`, `.parquet` or `.txt` file (text: one prompt a line), also as `s3://bucket/prefix/file.jsonl`."""
    id: str = "id"
    """Column with a unique id; missing, prompts are numbered."""
    text: str = "text"
    """Column with the text, tokenized with the model's tokenizer and its special tokens."""
    token_ids: str = "token_ids"
    """Column with token ids; where the file has it, the text is not tokenized."""
    metadata: tuple[str, ...] = ()
    """Columns kept in the prompt table."""
    prompt_labels: tuple[str, ...] = ()
    """Columns with one label a prompt."""
    token_labels: tuple[str, ...] = ()
    """Columns with a list of one label a prompt token."""


class DestinationSection(_Section):
    """Where the run goes."""

    lake: str
    """Folder or `s3://bucket/prefix` of the lake; made if it is missing."""
    run: str
    """Name of the new run."""
    chunk_rows: int = Field(default=512, gt=0)
    """Rows of a Zarr chunk: what is compressed and checked together."""
    shard_rows: int = Field(default=32_768, gt=0, le=1 << 24)
    """Rows of an object; a multiple of `chunk_rows`."""
    reuse: tuple[str, ...] = ()
    """Runs of the lake whose rows are taken, not computed again, for prompts that they hold with the same computation."""
    consumed_by: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")], ...] = ()
    """Names under which the run is followed while it is captured: rows that all of them have used are dropped."""


class PairedSection(_Section):
    """A further run of the same prompts through another adapter, or through the model without any."""

    run: str
    """Name of the new run."""
    adapter: str | None = None
    """As in `model`."""


class CaptureJob(_Section):
    """A whole capture job, as its TOML file says it. Relative paths are relative to the working directory."""

    model: ModelSection
    capture: CaptureSection
    prompts: PromptsSection
    destination: DestinationSection
    paired: tuple[PairedSection, ...] = ()
    """Further runs of the same prompts, captured in the same batches and aligned by prompt id and position."""
    intervene: tuple[Intervention, ...] = ()
    """What is done to every prompt's activations while it runs."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, such as `max_num_seqs` or `enforce_eager`."""


class CaptureWish(PositionFilter):
    """What one request wants kept."""

    id: str | None = Field(default=None, min_length=1)
    """The prompt's id, unique within the run; the front end mints one where it is missing."""
    prompt: str | None = Field(default=None, min_length=1)
    """The prompt's id in the run; `id` where it is missing."""
    run: str | None = None
    """Destination run; the engine's own where it is missing."""
    hooks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Must select exactly the run's hooks; for the reader's sake, or to create the run."""
    reads: tuple[Read, ...] | None = Field(default=None, min_length=1)
    """Likewise the run's reads. A run that is created for reads, with no hooks named, keeps no activations."""


class RequestArgs(_Section):
    """What `SamplingParams.extra_args["millpond"]` of one request says."""

    capture: CaptureWish | None = None
    """What is kept; nothing by default."""
    intervene: tuple[Intervention, ...] = ()
    """What is done to the activations, in this order."""

    @property
    def salt(self) -> str | None:
        """What keeps the request's cached keys and values apart from those of other computations."""
        return f"millpond:{interventions_hash(self.intervene)}" if self.intervene else None


def check_argument_name(extra_args: Mapping[str, Any] | None) -> None:
    """Check that nothing is asked of Millpond under another name than its own, which nobody would read.

    Raises:
        InvalidInput: an argument's name is nearly `millpond`.
    """
    for name in extra_args or ():
        if name != ARGUMENT and (near(name, [ARGUMENT]) or name.casefold().startswith(ARGUMENT)):
            raise InvalidInput(f"{name}: no argument has this name; did you mean {ARGUMENT!r}?")


def read_request_args(extra_args: Mapping[str, Any] | None) -> RequestArgs | None:
    """What a request asks of Millpond: an object, or over HTTP (`vllm_xargs`) the same as a JSON string.

    Raises:
        InvalidInput: it asks for something that does not exist.
    """
    asked = (extra_args or {}).get(ARGUMENT)
    if asked is None:
        return None
    try:
        return RequestArgs.model_validate_json(asked) if isinstance(asked, str) else RequestArgs.model_validate(asked)
    except ValidationError as error:
        raise InvalidInput(f"{ARGUMENT}: {first_problem(error, RequestArgs)}") from error


def read_job(path: Path) -> CaptureJob:
    """The capture job in the TOML file `path`.

    Raises:
        InvalidInput: the file is missing, is not TOML, or a field cannot be used.
    """
    try:
        with path.open("rb") as handle:
            values = tomllib.load(handle)
    except OSError as error:
        raise InvalidInput(f"job file {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:  # TOMLDecodeError, or UnicodeDecodeError
        raise InvalidInput(f"job file {str(path)!r} is not TOML: {error}") from error
    try:
        return CaptureJob.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(f"job file {str(path)!r}: {first_problem(error, CaptureJob)}") from error


def first_problem(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first problem of a failed validation, as `field: message (got value)`.

    Where `model`, which was to be made, has no such field, the nearest that it has is named.
    """
    problem = error.errors(include_url=False)[0]
    place, kind, given, context = list(problem["loc"]), problem["type"], problem["input"], problem.get("ctx", {})
    told = problem["msg"].removeprefix("Value error, ")
    tag = str(context.get("discriminator", ""))
    if tag.startswith("'"):  # a field that says of what kind an object is; a function has no name that a user knows
        place.append(tag.strip("'"))
        if kind == "union_tag_not_found":
            kind, told = "missing", "Field required"
        else:
            told, given = f"Input should be one of {context['expected_tags']}", context["tag"]
    elif kind == "extra_forbidden" and model is not None:
        fields = fields_at(model, place[:-1])
        meant = near(str(place[-1]), fields)
        told += f": did you mean {meant!r}?" if meant else f": the fields are {', '.join(sorted(fields))}"
    elif kind in ("tuple_type", "list_type"):
        told = "Input should be a list"
    field = ".".join(map(str, place)) or "value"
    value = repr(given)
    got = "" if kind == "missing" else f" (got {value if len(value) <= 200 else value[:200] + '...'})"
    return f"{field}: {told}{got}"
