"""Pages of the handbook that are made from the code when it is built: the command line and the errors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import mkdocs.structure.files

from millpond import cli
from millpond.store import errors


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file holds (MkDocs calls this)."""
    for name, text in (("cli.md", command_line()), ("errors.md", error_pages())):
        files.append(mkdocs.structure.files.File.generated(config, name, content=text))
    return files


def command_line() -> str:
    """Every command's help, as the command prints it."""
    parts = ["# Command line", "Each command is a dataclass; this is what `--help` prints of it."]
    commands = [(name,) for name in cli._COMMANDS]
    commands += [(group, name) for group, members in cli._GROUPS.items() for name in members]
    for words in commands:
        parts += [f"## millpond {' '.join(words)}", f"```text\n{_help(words)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(words: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "millpond.cli", *words, "--help"]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def error_pages() -> str:
    """Every error, with what it means."""
    tree = (errors.__doc__ or "").partition("\n\n")[2]
    parts = [
        "# Errors",
        "A message says what was wrong, with which value, what the limit is and what to do. Each begins with the name "
        "by which it is found here. `InvalidInput` and all below it mean that nothing was changed; commands end with 2 for "
        "them and with 1 for the others.",
        f"```text\n{tree.strip()}\n```",
    ]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.MillpondError)]
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        bases = ", ".join(base.__name__ for base in kind.__bases__)
        parts += [f"## {kind.__name__}", f"{inspect.getdoc(kind)}", f"A kind of {bases}."]
    return "\n\n".join(parts) + "\n"
