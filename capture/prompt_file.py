"""Reading prompts with their metadata and labels from JSONL, Parquet or text files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from millpond.store.capture_spec import PromptsSection
from millpond.store.errors import InvalidInput, PromptTooLong, StorageFailed
from millpond.store.labels import check_label_name, label_dtype
from millpond.store.objects import open_storage
from millpond.store.prompts import COLUMNS


@dataclass(frozen=True)
class Prompts:
    """What a capture job reads from its prompt file, checked."""

    ids: list[str]
    token_ids: list[list[int]]
    table: pd.DataFrame
    """`id`, metadata and prompt labels, one row a prompt."""
    token_labels: dict[str, dict[str, NDArray[Any]]]
    """Label name to prompt id to one value a token."""
    token_label_dtypes: dict[str, str]

    @property
    def n_tokens(self) -> int:
        """Prompt tokens in all."""
        return sum(len(ids) for ids in self.token_ids)


def read_prompts(section: PromptsSection, model_folder: Path, max_tokens: int, vocab_size: int) -> Prompts:
    """Read and check the prompts that `section` names.

    Args:
        section: the job file's.
        model_folder: whose tokenizer is used where the file has texts only.
        max_tokens: longest prompt that fits the model's context.
        vocab_size: token ids are below this.

    Raises:
        PromptTooLong: a prompt has more than `max_tokens` tokens.
        InvalidInput: the file or a value in it cannot be used.
    """
    table = _read_table(section)
    if table.empty:
        raise InvalidInput(f"prompt file {section.path!r} has no prompts; give at least one")
    if section.id not in table:
        if "id" in section.model_fields_set:
            raise InvalidInput(
                f"{section.path}: there is no column {section.id!r} (prompts.id); it has {_names(table)}"
            )
        table[section.id] = [f"{number:08d}" for number in range(len(table))]
    ids = [_check_id(value, number, section) for number, value in enumerate(table[section.id], 1)]
    columns = [*section.metadata, *section.prompt_labels]
    if len(set(columns)) < len(columns) or "id" in columns:
        raise InvalidInput(
            f"prompts.metadata and prompts.prompt_labels name a column twice, or 'id': {', '.join(columns)}"
        )
    repeated = pd.Series(ids).duplicated()
    if repeated.any():
        raise InvalidInput(f"{section.path}: id {ids[int(np.argmax(repeated))]!r} occurs twice; ids must be unique")
    for column in (*section.metadata, *section.prompt_labels, *section.token_labels):
        if column not in table:
            raise InvalidInput(f"{section.path}: there is no column {column!r}; it has {_names(table)}")
    for column in columns:
        if column in COLUMNS:
            raise InvalidInput(
                f"{section.path}: column {column!r} is one of Millpond's own ({', '.join(COLUMNS)}); rename it"
            )
    both = set(section.prompt_labels) & set(section.token_labels)
    if both:
        raise InvalidInput(f"{section.path}: column {min(both)!r} cannot be a prompt label and a token label")
    token_ids = _token_ids(table, section, model_folder)
    for prompt_id, tokens in zip(ids, token_ids, strict=True):
        _check_tokens(prompt_id, tokens, max_tokens, vocab_size)
    lengths = [len(tokens) for tokens in token_ids]
    labels = {name: _token_label(table[name], name, ids, lengths) for name in section.token_labels}
    for name in section.prompt_labels:
        check_label_name(name)
        if table[name].isna().any():
            missing = ids[int(np.argmax(table[name].isna()))]
            raise InvalidInput(f"prompt label {name!r} is missing for prompt {missing!r}; give every prompt a value")
    kept = table[columns].copy()
    kept.insert(0, "id", ids)
    for column in columns:
        try:
            kept[[column]].to_parquet(io.BytesIO())
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InvalidInput(
                f"{section.path}: column {column!r} mixes types: {' '.join(map(str, error.args))}"
            ) from error
    return Prompts(
        ids,
        token_ids,
        kept,
        {name: values for name, (values, _) in labels.items()},
        {name: dtype for name, (_, dtype) in labels.items()},
    )


def read_texts(section: PromptsSection) -> list[str]:
    """The prompts' texts, in the file's order.

    Raises:
        InvalidInput: the file cannot be read, or a prompt has no text.
    """
    table = _read_table(section)
    if section.text not in table:
        raise InvalidInput(f"{section.path}: there is no column {section.text!r}; it has {_names(table)}")
    return _texts(table, section)


def _read_table(section: PromptsSection) -> pd.DataFrame:
    path = section.path
    suffix = PurePosixPath(path).suffix
    try:
        if suffix == ".parquet":
            return pd.read_parquet(_open(path))
        if suffix == ".jsonl":
            return _read_jsonl(path)
        if suffix == ".txt":
            with _open_text(path) as handle:
                return pd.DataFrame({section.text: [line for line in handle.read().split("\n") if line.strip()]})
    except FileNotFoundError:
        raise InvalidInput(f"prompt file {path!r} does not exist; check prompts.path") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (InvalidInput, StorageFailed):
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(f"prompt file {path!r} cannot be read: {error}") from error
    raise InvalidInput(f"prompt file {path!r} ends in {suffix!r}; give .jsonl, .parquet or .txt")


def _open(path: str) -> BinaryIO:
    """A local file, or an object by its URL."""
    if "://" not in path:
        return Path(path).open("rb")
    folder, _, name = path.rpartition("/")
    return io.BytesIO(open_storage(folder).get(name))


def _open_text(path: str) -> TextIO:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig")


def _read_jsonl(path: str) -> pd.DataFrame:
    rows = []
    with _open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():  # only an escape can make half of a surrogate pair, which is no text
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise InvalidInput(
                    f"{path}:{number}: {half!r} is half of a surrogate pair, which is no text; write the whole character"
                ) from None
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}:{number}: not JSON ({error}); give one object a line") from None
            if not isinstance(row, dict):
                raise InvalidInput(f"{path}:{number}: {type(row).__name__}, not an object; give one object a line")
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)  # pandas would make floats of integers beside a missing value


def _token_ids(table: pd.DataFrame, section: PromptsSection, model_folder: Path) -> list[list[int]]:
    if section.token_ids in table:
        return [_integers(tokens, number, section) for number, tokens in enumerate(table[section.token_ids], 1)]
    if section.text not in table:
        raise InvalidInput(
            f"{section.path}: there is neither a column {section.text!r} nor {section.token_ids!r}; "
            f"it has {_names(table)}; name one in prompts.text or prompts.token_ids"
        )
    texts = _texts(table, section)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"model folder {str(model_folder)!r} has no usable tokenizer; add its tokenizer.json or give token ids in "
            f"column {section.token_ids!r}"
        ) from error
    encoded: list[list[int]] = tokenizer(texts)["input_ids"]
    return encoded


def _texts(table: pd.DataFrame, section: PromptsSection) -> list[str]:
    texts: list[str] = table[section.text].tolist()
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InvalidInput(f"{section.path}: prompt {number} has no text in column {section.text!r} (got {text!r})")
    return texts


def _names(table: pd.DataFrame) -> str:
    return ", ".join(map(str, table.columns))


def _check_id(value: Any, number: int, section: PromptsSection) -> str:
    if isinstance(value, str | int | np.integer) and not isinstance(value, bool) and str(value):
        return str(value)
    raise InvalidInput(f"{section.path}: prompt {number} has id {value!r}; give a text or an integer, not empty")


def _integers(tokens: Any, number: int, section: PromptsSection) -> list[int]:
    whole = isinstance(tokens, list | np.ndarray) and all(
        isinstance(token, int | np.integer) and not isinstance(token, bool) for token in tokens
    )
    if not whole:
        raise InvalidInput(
            f"{section.path}: prompt {number}: column {section.token_ids!r} holds {str(tokens)[:40]!r}; give lists of integers"
        )
    return [int(token) for token in tokens]


def _check_tokens(prompt_id: str, tokens: Sequence[int], max_tokens: int, vocab_size: int) -> None:
    if not tokens:
        raise InvalidInput(f"prompt {prompt_id!r} has no tokens; give at least one")
    if len(tokens) > max_tokens:
        raise PromptTooLong(
            f"prompt {prompt_id!r} has {len(tokens)} tokens; the model's context leaves room for {max_tokens}; cut the prompt"
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidInput(
            f"prompt {prompt_id!r} has token id {wrong}; the model's vocabulary has ids 0 to {vocab_size - 1}"
        )


def _token_label(
    column: pd.Series[Any], name: str, ids: list[str], lengths: list[int]
) -> tuple[dict[str, NDArray[Any]], str]:
    check_label_name(name)
    values = {}
    for prompt_id, given, length in zip(ids, column, lengths, strict=True):
        try:
            array = np.asarray(given if isinstance(given, np.ndarray) else list(given))
            if array.ndim != 1 or (array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max):
                raise ValueError
        except (TypeError, ValueError):
            raise InvalidInput(
                f"token label {name!r} of prompt {prompt_id!r} is {given!r}; give a list, one value a token"
            ) from None
        if len(array) != length:
            raise InvalidInput(
                f"token label {name!r} of prompt {prompt_id!r} has {len(array)} values, but the prompt has {length} tokens"
            )
        values[prompt_id] = array
    widest = np.result_type(*{array.dtype for array in values.values()})
    return values, label_dtype(name, widest)
