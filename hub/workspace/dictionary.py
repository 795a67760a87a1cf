"""The text that completions are coded with: public, the same file for the gateway and for every workspace."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path

from millpond.hub.textmodel import MAX_DICTIONARY
from millpond.store.errors import InvalidInput

INSIDE = Path("/etc/millpond/dictionary")
"""Where a workspace has it."""
_EACH = 500_000


def make_dictionary(state: Path, given: Path | None) -> Path:
    """The dictionary in the state folder: the operator's, else one of Python's standard library, which is made once and kept.

    Raises:
        InvalidInput: the operator's cannot be read or is too large.
    """
    file = state / "dictionary"
    if given is not None:
        try:
            data = given.read_bytes()
        except OSError as error:
            raise InvalidInput(f"dictionary {str(given)!r} cannot be read: {error.strerror}; check the path") from error
        if len(data) > MAX_DICTIONARY:
            raise InvalidInput(
                f"dictionary {str(given)!r} has {len(data):,} bytes of at most {MAX_DICTIONARY:,}; cut it"
            )
        file.write_bytes(data)
    elif not file.exists():  # of another Python it would be another, which clients that hold the old one could not use
        file.write_bytes(standard_library())
    file.chmod(0o644)
    return file


def standard_library(each: int = _EACH) -> bytes:
    """About `each` bytes of docstrings of Python's standard library, and as many of its code, which comes last."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [path.relative_to(folder) for path in folder.rglob("*.py")]
    kept = [path for path in found if not {"site-packages", "test", "tests"} & set(path.parts)]
    files = sorted(kept, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())  # of every part some
    prose, code = bytearray(), bytearray()
    for path in files:
        if len(prose) >= each and len(code) >= each:
            break
        try:
            text = (folder / path).read_text()
            nodes = ast.walk(ast.parse(text))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files that show what is refused
        if len(code) < each:
            code += text.encode()[:40_000] + b"\n"
        if len(prose) < each:
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
            prose += "".join(f"{one}\n" for one in texts if one).encode()
    return bytes(prose[:each] + code[:each])
