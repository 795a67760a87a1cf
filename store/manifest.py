"""What a run records about itself: its specification, its commits, and the manifest that seals it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from millpond.store.dtypes import STORED_AS
from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.files import decode_document, encode_document
from millpond.store.objects import Storage
from millpond.store.reads import ReadSpec
from millpond.store.shards import ArrayRecord, ArraySpec

FORMAT_VERSION: Literal[2] = 2
READ_VERSIONS = (1, 2)
"""A version 1 document is one of version 2 that lacks the fields with defaults; see docs/format.md."""
INDEX_ARRAYS = {"prompt": "int32", "position": "int32", "token_id": "int32"}
"""The row coordinates stored beside the activations, and their data types."""

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_run_name(name: str) -> str:
    """`name`, if a run may be called so.

    Raises:
        InvalidInput: otherwise.
    """
    if not is_run_name(name):
        raise InvalidInput(
            f"run name {name!r} is not allowed; use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return name


def is_run_name(name: str) -> bool:
    """Whether a run may be called `name`."""
    return _RUN_NAME.fullmatch(name) is not None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSpec(_Record):
    """What is fixed when a run is created (`run.json`)."""

    format: Literal["millpond-run"] = "millpond-run"
    version: Literal[1, 2] = FORMAT_VERSION
    id: str
    """Random; distinguishes runs of the same name in time."""
    name: str
    created: str
    """UTC, ISO 8601."""
    hooks: tuple[str, ...]
    d_model: int = Field(gt=0)
    dtype: Literal["bfloat16", "float16", "float32"]
    """Of the activations; bfloat16 is stored as its bits in uint16."""
    chunk_rows: int = Field(default=512, gt=0)
    shard_rows: int = Field(default=32_768, gt=0)
    codec: Literal["none", "lz4", "zstd"] = "none"
    """How the activations' chunks are compressed; the index never is."""
    provenance: dict[str, Any] = {}
    """Model, revision, weight bytes, tokenizer, versions and the capture's configuration."""
    reads: tuple[ReadSpec, ...] = ()
    """What is kept of each row beside or in place of activations; the document lacks the field where there are none."""

    @model_serializer(mode="wrap")
    def _without_no_reads(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.reads:
            del fields["reads"]  # so that a Millpond without reads opens the run
        return fields

    @property
    def activation_array(self) -> ArraySpec:
        """The shape of every hook's array."""
        return ArraySpec(STORED_AS[self.dtype], self.d_model, self.chunk_rows, self.shard_rows, self.codec)

    def row_array(self, dtype: str) -> ArraySpec:
        """The shape of a one-dimensional array with one value a row."""
        return ArraySpec(dtype, None, self.chunk_rows, self.shard_rows)

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of a segment or of the sealed data, by name."""
        index = {name: self.row_array(dtype) for name, dtype in INDEX_ARRAYS.items()}
        return dict.fromkeys(self.hooks, self.activation_array) | self.read_arrays() | index

    def read_arrays(self) -> dict[str, ArraySpec]:
        """The arrays of all reads, by name."""
        found: dict[str, ArraySpec] = {}
        for read in self.reads:
            found |= read.arrays(self.dtype, self.chunk_rows, self.shard_rows)
        return found

    def row_bytes(self, hooks: Sequence[str] | None = None) -> int:
        """Bytes of one row of `hooks`, by default all, and of every read."""
        of_hooks = self.activation_array.row_bytes * len(self.hooks if hooks is None else hooks)
        return of_hooks + sum(array.row_bytes for array in self.read_arrays().values())


class ArrayChecksums(_Record):
    """An array as it was when it was committed."""

    rows: int
    shards: tuple[tuple[int, int], ...]
    """Bytes and crc32c of each shard file, in order."""

    @classmethod
    def of(cls, record: ArrayRecord) -> ArrayChecksums:
        """The checksums that a writer reported."""
        return cls(rows=record.rows, shards=record.shards)


class LabelRecord(ArrayChecksums):
    """One version of a label as it was when it was added (`label.json`); of a table `rows` counts the values."""

    dtype: Literal["bool", "int64", "float32", "str"]
    by: Literal["prompt", "token"] = "token"
    data: str = ""
    """The array or table, below the label's folder; format 1 kept the array beside this record."""
    table: tuple[int, int] | None = None
    """Bytes and crc32c of a table of values by prompt id; None for an array of the sealed run's rows."""
    created: str = ""
    """UTC, ISO 8601."""
    source: str = ""
    """Where the values come from, in the words of whoever added them."""


class Part(_Record):
    """Rows that became visible together: a committed segment, or the data of a sealed run."""

    path: str
    """Folder below the run's."""
    rows: int
    prompts: int
    arrays: dict[str, ArrayChecksums]
    prompt_table: tuple[int, int]
    """Bytes and crc32c of `prompts.parquet`."""
    statistics: tuple[int, int] | None = None
    """Bytes and crc32c of `statistics.safetensors`, if there is one."""


class Manifest(_Record):
    """What seals a run (`manifest.json`): nothing of the run changes after it was written, but labels may be added."""

    format: Literal["millpond-manifest"] = "millpond-manifest"
    version: Literal[1, 2] = FORMAT_VERSION
    run: RunSpec
    sealed: str
    """UTC, ISO 8601."""
    data: Part
    prompt_labels: tuple[str, ...] = ()
    """Columns of the prompt table that are labels; the others are metadata."""
    counts: dict[str, int] = {}
    """What the capture asked for and what was stored."""


_R = TypeVar("_R", bound=BaseModel)


def encode_record(record: BaseModel) -> bytes:
    """The document of a record."""
    return encode_document(record.model_dump(mode="json"))


def read_record(storage: Storage, path: str, record: type[_R]) -> _R:
    """The record in the document `path`.

    Raises:
        FileNotFoundError: it is missing.
        InvalidInput: a newer Millpond wrote it.
        LakeCorrupt: it is not such a record.
    """
    return decode_record(storage.get(path), record, f"{storage.url}/{path}")


def decode_record(data: bytes, record: type[_R], where: str) -> _R:
    """The record in a document; `where` names it in errors."""
    value = decode_document(data, where)
    version = value.get("version", FORMAT_VERSION)
    if version not in READ_VERSIONS:
        raise InvalidInput(
            f"{where} has format version {version!r}; this Millpond reads versions 1 to {FORMAT_VERSION}: upgrade Millpond"
        )
    try:
        return record.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise LakeCorrupt(
            f"{where} is no {record.__name__}: {field}: {first['msg']}; restore it or delete the run"
        ) from error
