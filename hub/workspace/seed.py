"""The demo's run, captured in the vault: `python -m millpond.hub.workspace.seed FOLDER EXAMPLE TOKENS`."""

from __future__ import annotations

import sys
from pathlib import Path

from millpond.hub.demo import DemoConfig, capture_demo


def main() -> int:
    """Capture; returns the exit code."""
    folder, example, tokens = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    print(capture_demo(DemoConfig(out=folder, example=example, tokens=tokens)))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
