"""Write prompts and their labels: `python examples/stdlib_llama/prompts.py --out prompts.parquet`.

One row a prompt: `id` (file and first character), `text`, `token_ids` (with <|bos|> first), `path`, `start`, the
labels of the prompt's file, and one list a token label, as long as `token_ids`. <|bos|> has False and 0.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from chunks import MIN_TOKENS, Chunk, cut_chunks
from corpus import SourceFile, read_stdlib
from labels import TOKEN_LABELS, file_labels, token_labels
from tokenizer import BOS
from tokenizers import Tokenizer
from tqdm.auto import tqdm

HERE = Path(__file__).parent

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "path": pa.string(),
        "start": pa.int32(),
        "defines_class": pa.bool_(),
        "has_async_def": pa.bool_(),
        "package": pa.string(),
        **{name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in TOKEN_LABELS.items()},
    }
)


@dataclass(frozen=True)
class CutFile:
    """An encoded file and those of its chunks that are wanted."""

    file: SourceFile
    ids: list[int]
    offsets: list[tuple[int, int]]
    chunks: list[Chunk]


def cut_file(file: SourceFile, tokenizer: Tokenizer, max_tokens: int) -> CutFile:
    """Encode `file` and cut it into chunks."""
    encoding = tokenizer.encode(file.text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    return CutFile(file, ids, offsets, cut_chunks(file.text, ids, offsets, tokenizer, max_tokens))


def prompt_rows(cut: CutFile, bos: int) -> list[dict[str, Any]]:
    """Make the rows of a file's chunks, labelled in the context of the whole file."""
    of_file = file_labels(cut.file.path, cut.file.text)
    of_tokens = token_labels(cut.file.text, cut.offsets)
    return [
        {
            "id": prompt_id(cut.file, chunk),
            "text": cut.file.text[chunk.start : chunk.end],
            "token_ids": [bos, *cut.ids[chunk.first : chunk.last]],
            "path": cut.file.path,
            "start": chunk.start,
            **of_file,
            **{name: np.insert(values[chunk.first : chunk.last], 0, 0) for name, values in of_tokens.items()},
        }
        for chunk in cut.chunks
    ]


def prompt_id(file: SourceFile, chunk: Chunk) -> str:
    """Name a prompt, the same for every token limit that cuts there."""
    return f"{file.path}:{chunk.start}"


def choose(cuts: list[CutFile], tokens: int) -> list[CutFile]:
    """Keep whole chunks in the order of their ids' SHA-256, a repeatable shuffle, until they hold `tokens` tokens."""
    everything = [(cut.file, chunk) for cut in cuts for chunk in cut.chunks]
    everything.sort(key=lambda pair: hashlib.sha256(prompt_id(*pair).encode()).digest())
    chosen, total = set(), 0
    for file, chunk in everything:
        if total >= tokens:
            break
        chosen.add(prompt_id(file, chunk))
        total += chunk.n_tokens
    kept = [
        CutFile(cut.file, cut.ids, cut.offsets, [chunk for chunk in cut.chunks if prompt_id(cut.file, chunk) in chosen])
        for cut in cuts
    ]
    return [cut for cut in kept if cut.chunks]


def make_table(files: list[SourceFile], tokenizer: Tokenizer, tokens: int, max_tokens: int) -> pa.Table:
    """Make prompts of about `tokens` tokens in all, spread over `files`, in file order."""
    bos = tokenizer.token_to_id(BOS)
    assert bos is not None  # load_tokenizer has checked it
    cuts = [cut_file(file, tokenizer, max_tokens) for file in tqdm(files, desc="cutting", unit="file")]
    chosen = choose(cuts, tokens)
    rows = [row for cut in tqdm(chosen, desc="labelling", unit="file") for row in prompt_rows(cut, bos)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def summary(table: pa.Table) -> str:
    """Count prompts, tokens and labels."""
    n_tokens = len(table["token_ids"].combine_chunks().flatten())
    lines = [f"{table.num_rows:,} prompts, {n_tokens:,} tokens, {len(table['path'].unique())} files"]
    for name in ("defines_class", "has_async_def"):
        lines.append(f"{name:>14}: {table[name].to_numpy().sum():>7,} prompts")
    for name in TOKEN_LABELS:
        values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        largest = f", largest {values.max()}" if values.dtype != bool else ""
        lines.append(f"{name:>14}: {np.count_nonzero(values):>7,} tokens{largest}")
    return "\n".join(lines)


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line and exit with status 2."""
    print(f"prompts: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the example's tokenizer from `folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        fail(f"no tokenizer at {path}; train the model first (train.py) or name its folder with --model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        fail(f"{path} is not a tokenizer ({error}); train the model again")
    if tokenizer.token_to_id(BOS) is None:
        fail(f"{path} has no {BOS} token; name the folder of this example's model with --model")
    return tokenizer


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    parser.add_argument(
        "--model", type=Path, default=HERE / "model", help="folder with tokenizer.json (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="tokens a prompt, <|bos|> included (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens in all (default: %(default)s)")
    parser.add_argument(
        "--split", choices=("held-out", "train"), default="held-out", help="files to cut (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.max_tokens < MIN_TOKENS:
        fail(f"--max-tokens is {arguments.max_tokens}; it must be at least {MIN_TOKENS}")
    if arguments.tokens < 1:
        fail(f"--tokens is {arguments.tokens}; it must be at least 1")
    tokenizer = load_tokenizer(arguments.model)
    if not arguments.out.parent.is_dir():
        fail(f"no folder {arguments.out.parent}; make it first")
    files = [file for file in read_stdlib() if file.held_out == (arguments.split == "held-out")]
    table = make_table(files, tokenizer, arguments.tokens, arguments.max_tokens)
    try:
        pq.write_table(table, arguments.out)
    except OSError as error:
        fail(f"cannot write {arguments.out}: {error}")
    print(summary(table))
    written = len(table["token_ids"].combine_chunks().flatten())
    if written < arguments.tokens:
        print(f"the {arguments.split} files give only {written:,} of the {arguments.tokens:,} tokens asked for")


if __name__ == "__main__":
    main()
