"""The corpus: the Python standard library's source, split by file into training and held-out parts."""

from __future__ import annotations

import hashlib
import io
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 12
"""A file is held out when the SHA-256 of its path, modulo 100, is below this."""

_SKIPPED_PARTS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class SourceFile:
    """One standard-library file."""

    path: str
    """Path below the standard library's folder, with forward slashes: the file's name in every split."""
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_stdlib(root: Path | None = None) -> list[SourceFile]:
    """Every tokenizable source file of the standard library, in path order.

    Tests are left out because many distributions strip them; `encodings`, `pydoc_data` and
    `_sysconfigdata*` because they are tables, not code.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts) or relative.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            with tokenize.open(path) as handle:
                text = handle.read()
            compile(text, relative.as_posix(), "exec", dont_inherit=True)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text.replace("\f", "")))
    if not files:
        raise SystemExit(f"corpus: no Python source below {root}; install the standard library's .py files")
    return files


def digest(files: list[SourceFile]) -> str:
    """SHA-256 over names and texts: two machines with equal digests train on equal data."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path}\0{len(file.text)}\0".encode())
        total.update(file.text.encode())
    return total.hexdigest()


def logical_line_starts(text: str) -> list[int]:
    """Character offsets at which a logical line may start: bracket depth zero, outside every string.

    These are the beginnings of the physical lines that follow a NEWLINE token, plus offset 0.
    """
    line_offsets = [0]
    for line in text.split("\n"):
        line_offsets.append(line_offsets[-1] + len(line) + 1)
    starts = [0]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE and token.end[0] < len(line_offsets):
            offset = line_offsets[token.start[0]]
            if offset < len(text):
                starts.append(offset)
    return sorted(set(starts))
