"""The command line's reference: every command's help, as the command prints it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from millpond import cli


def all_commands() -> list[tuple[str, ...]]:
    """Every command's words."""
    commands: list[tuple[str, ...]] = [(name,) for name in cli._COMMANDS]
    return commands + [(group, name) for group, members in cli._GROUPS.items() for name in members]


def command_page() -> str:
    """Every command's help."""
    parts = ["# Command line", "Each command is a dataclass; this is what `--help` prints of it."]
    commands = all_commands()
    with ThreadPoolExecutor() as pool:
        for words, text in zip(commands, pool.map(_help, commands), strict=True):
            parts += [f"## millpond {' '.join(words)}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(words: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "millpond.cli", *words, "--help"]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
