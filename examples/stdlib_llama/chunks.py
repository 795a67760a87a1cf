"""Cutting files into prompts of whole logical lines, within a token budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from corpus import logical_line_starts
from tokenizers import Tokenizer

MIN_TOKENS = 16
"""Shorter chunks are dropped."""


@dataclass(frozen=True)
class Chunk:
    """A part of a file: characters `start` to `end`, which are the file's tokens `first` to `last` (exclusive)."""

    start: int
    end: int
    first: int
    last: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, the beginning-of-sequence token included."""
        return 1 + self.last - self.first


def cut_chunks(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Tokenizer, max_tokens: int = 256
) -> list[Chunk]:
    """Pack whole logical lines greedily into chunks of at most `max_tokens`, the leading <|bos|> included.

    `ids` and `offsets` are the encoding of all of `text` without special tokens. A logical line that is too
    long by itself (with the comments and blank lines above it) makes a chunk of its first tokens, and its
    rest belongs to no chunk. Encoding a chunk's characters by themselves gives the same tokens again.
    """
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"chunks: max_tokens is {max_tokens}; it must be at least {MIN_TOKENS}")
    starts = logical_line_starts(text)
    bounds = [*map(int, np.searchsorted([begin for begin, _ in offsets], starts)), len(ids)]
    if any(offsets[bound][0] != start for bound, start in zip(bounds, starts, strict=False)):
        raise ValueError("chunks: a token straddles the start of a line; use the tokenizer of this example")
    chunks = []
    line = 0
    while line < len(starts):
        first = bounds[line]
        following = max(line + 1, bisect_right(bounds, first + max_tokens - 1) - 1)
        last = bounds[following]
        if last - first >= max_tokens:
            last = _cut(text, ids, offsets, tokenizer, first, first + max_tokens - 1)
        chunk = Chunk(starts[line], offsets[last - 1][1], first, last)
        if chunk.n_tokens >= MIN_TOKENS:
            chunks.append(chunk)
        line = following
    return chunks


def _cut(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Tokenizer, first: int, last: int
) -> int:
    """Move `last` back to where the text may end and still encode to the same tokens: never inside a word."""
    start = offsets[first][0]
    while tokenizer.encode(text[start : offsets[last - 1][1]], add_special_tokens=False).ids != list(ids[first:last]):
        last -= 1
    return last
