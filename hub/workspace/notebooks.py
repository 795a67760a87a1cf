"""The example notebooks: py:percent sources in the repository, .ipynb in a new user's home."""

from __future__ import annotations

from pathlib import Path


def sources() -> list[Path]:
    """The sources, of the checkout that this package belongs to; none in an installation without examples."""
    return sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.py"))


def write_notebooks(folder: Path) -> None:
    """Write every example as a notebook without outputs."""
    import jupytext

    folder.mkdir(parents=True, exist_ok=True)
    for source in sources():
        notebook = jupytext.reads(source.read_text(), fmt="py:percent")
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        (folder / f"{source.stem}.ipynb").write_text(jupytext.writes(notebook, fmt="ipynb"))
