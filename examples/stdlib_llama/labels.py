"""Labels of Python source, worked out with `tokenize` and `ast`: by character, by BPE token and by file.

A string runs from its prefix to its closing quotes. An f-string or t-string is one string to its very end,
replacement fields and nested strings included, on every Python: nothing inside it is a keyword, an
identifier, a number or a bracket. (Python 3.12 began to tokenize the inside; earlier ones do not.)

A blank line or a line that holds only a comment keeps the indentation of the logical line before it:
`tokenize` opens and closes blocks at the next logical line, so a comment between `def f():` and its body has
the level of `def`, and one below the body has the level of the body.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKEN_LABELS: dict[str, type[np.generic]] = {
    "in_string": np.bool_,
    "in_comment": np.bool_,
    "is_keyword": np.bool_,
    "is_identifier": np.bool_,
    "is_number": np.bool_,
    "in_docstring": np.bool_,
    "bracket_depth": np.int16,
    "indentation": np.int16,
}
"""Names and types of the labels that every character and every token has."""

_STRING_STARTS = {"FSTRING_START", "TSTRING_START"}
_STRING_ENDS = {"FSTRING_END", "TSTRING_END"}

Labels = dict[str, NDArray[Any]]


def character_labels(text: str) -> Labels:
    """Return one array a label of `TOKEN_LABELS`, one entry a character of the file `text`.

    `bracket_depth` counts the brackets open at a character, with an opening and a closing bracket both
    inside their own pair. `indentation` is the block level of the character's logical line.
    `in_comment` ends before the line break. Soft keywords (`match`, `type`) are identifiers.
    Raises SyntaxError when `text` is not Python, ValueError when its columns would be ambiguous.
    """
    tree = _parse(text)
    lines = _line_offsets(text)
    labels: Labels = {name: np.zeros(len(text), dtype) for name, dtype in TOKEN_LABELS.items()}
    deeper = np.zeros(len(text) + 1, np.int16)
    strings: list[int] = []
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token in tokens:
        begin, end = (min(lines[row - 1] + column, len(text)) for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name in _STRING_STARTS:
            strings.append(begin)
        elif name in _STRING_ENDS:
            labels["in_string"][strings.pop() : end] = True
        elif strings:
            continue
        elif token.type == tokenize.STRING:
            labels["in_string"][begin:end] = True
        elif token.type == tokenize.COMMENT:
            labels["in_comment"][begin:end] = True
        elif token.type == tokenize.NUMBER:
            labels["is_number"][begin:end] = True
        elif token.type == tokenize.NAME:
            labels["is_keyword" if keyword.iskeyword(token.string) else "is_identifier"][begin:end] = True
        elif token.type == tokenize.OP and token.string in "([{":
            deeper[begin] += 1
        elif token.type == tokenize.OP and token.string in ")]}":
            deeper[end] -= 1
    labels["bracket_depth"] = np.cumsum(deeper, dtype=np.int16)[:-1]
    labels["indentation"] = _indentation(tokens, lines)
    for begin, end in _docstring_spans(tree, text, lines):
        labels["in_docstring"][begin:end] = labels["in_string"][begin:end]
    return labels


def labelled_characters(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Find the character whose label each token takes: its first that is not whitespace, or its first when all are.

    `offsets` are the tokens' character spans in `text`, as `tokenizers` gives them.
    """
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    if (empty := np.flatnonzero(begins >= ends)).size:
        raise ValueError(f"labels: token {empty[0]} spans no character; encode without special tokens")
    spaces = np.fromiter(map(str.isspace, text), np.bool_, len(text))
    candidates = np.where(spaces, len(text), np.arange(len(text)))
    following = np.minimum.accumulate(candidates[::-1])[::-1]
    return np.where(following[begins] < ends, following[begins], begins)


def token_labels(text: str, offsets: Sequence[tuple[int, int]]) -> Labels:
    """Label a whole file's BPE tokens, given their character spans."""
    characters = labelled_characters(text, offsets)
    return {name: values[characters] for name, values in character_labels(text).items()}


def file_labels(path: str, text: str) -> dict[str, bool | str]:
    """Label every prompt of a file by the whole file: whether it has classes and coroutines, and its package.

    The package of `asyncio/locks.py` is `asyncio`, that of the top-level `argparse.py` is `argparse`.
    """
    kinds = {type(node) for node in ast.walk(_parse(text))}
    return {
        "defines_class": ast.ClassDef in kinds,
        "has_async_def": ast.AsyncFunctionDef in kinds,
        "package": PurePosixPath(path).with_suffix("").parts[0],
    }


def _parse(text: str) -> ast.Module:
    if text.startswith("\ufeff") or "\r" in text.replace("\r\n", ""):
        raise ValueError("labels: text has a byte order mark or a lone carriage return; read it with tokenize.open")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the file's affair
        return ast.parse(text)


def _line_offsets(text: str) -> list[int]:
    """Find where each physical line starts, and append the end of the text.

    Only a line feed ends a line for `tokenize` and `ast`; `str.splitlines` knows nine more line ends.
    """
    starts = [0]
    while found := text.find("\n", starts[-1]) + 1:
        starts.append(found)
    return [*starts, len(text)]


def _indentation(tokens: list[tokenize.TokenInfo], lines: list[int]) -> NDArray[np.int16]:
    """Give each character the level of its logical line, which begins where the one before (and its blanks) ended."""
    steps = np.zeros(lines[-1] + 1, np.int16)
    level = line_level = line_begin = 0
    line_begun = False
    for token in tokens:
        if token.type == tokenize.INDENT:
            level += 1
        elif token.type == tokenize.DEDENT:
            level -= 1
        elif token.type in {tokenize.NEWLINE, tokenize.NL}:
            if token.type == tokenize.NEWLINE or not line_begun:
                line_begin, line_begun = lines[token.start[0]], False
        elif not line_begun and token.type not in {tokenize.COMMENT, tokenize.ENDMARKER}:
            steps[line_begin] += level - line_level
            line_level, line_begun = level, True
    return np.cumsum(steps, dtype=np.int16)[:-1]


def _docstring_spans(tree: ast.Module, text: str, lines: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the character spans of the docstrings; `ast` gives columns in UTF-8 bytes."""

    def offset(row: int, byte_column: int) -> int:
        line = text[lines[row - 1] : lines[row]].encode()
        return lines[row - 1] + len(line[:byte_column].decode())

    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        match node.body[0]:
            case ast.Expr(value=ast.Constant(value=str()) as literal):
                assert literal.end_lineno is not None
                assert literal.end_col_offset is not None
                yield offset(literal.lineno, literal.col_offset), offset(literal.end_lineno, literal.end_col_offset)
