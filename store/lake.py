"""A lake: a folder of runs."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError

from millpond.store.dtypes import check_dtype
from millpond.store.errors import InvalidInput, RunExists, RunNotFound
from millpond.store.files import read_json, remove_tree, sync_folder, write_json
from millpond.store.hooks import hook_sort_key, parse_hook
from millpond.store.manifest import FORMAT_VERSION, RunSpec, check_run_name, read_record

if TYPE_CHECKING:
    from millpond.store.run import Run

_MARKER = "millpond.json"


def open_lake(path: str | os.PathLike[str], *, create: bool = False) -> Lake:
    """Open the lake in the folder `path`.

    Args:
        path: a local folder; URLs of object stores are not supported yet.
        create: make the lake if the folder is missing or empty.

    Raises:
        InvalidInput: there is no lake, or it cannot be made.
    """
    text = os.fspath(path)
    if "://" in text:
        if not text.startswith("file://"):
            raise InvalidInput(f"lake {text!r} is a URL; only local folders and file:// are supported so far")
        text = text.removeprefix("file://")
    folder = Path(text)
    marker = folder / _MARKER
    try:
        if marker.is_file():
            found = read_json(marker)
            if found.get("format") != "millpond-lake" or found.get("version") != FORMAT_VERSION:
                raise InvalidInput(
                    f"{marker} says format {found.get('format')!r} version {found.get('version')!r}; "
                    f"this Millpond reads 'millpond-lake' version {FORMAT_VERSION}"
                )
            return Lake(folder)
        if not create:
            raise InvalidInput(f"{text!r} is not a lake (it has no {_MARKER}); capture into it first or check the path")
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_new(folder):
            raise InvalidInput(f"{text!r} is neither a lake nor empty; name an empty or new folder")
        (folder / "runs").mkdir(exist_ok=True)
        write_json(marker, {"format": "millpond-lake", "version": FORMAT_VERSION})
    except OSError as error:
        raise InvalidInput(
            f"lake {text!r} cannot be used: {error.strerror}; name a folder that you may write"
        ) from error
    return Lake(folder)


def _is_new(folder: Path) -> bool:
    """Whether nothing is in `folder`, or only what creating a lake leaves when it is interrupted."""
    left = [path for path in folder.iterdir() if not path.name.startswith(f".{_MARKER}.")]
    return not left or (left == [folder / "runs"] and not any(left[0].iterdir()))


class Lake(Mapping[str, "Run"]):
    """The runs in one folder: `lake["name"]` opens one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def runs(self) -> list[str]:
        """The names of all runs, open and sealed."""
        folder = self.folder / "runs"
        return sorted(path.parent.name for path in folder.glob("*/run.json") if not path.parent.name.startswith("."))

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs())

    def __len__(self) -> int:
        return len(self.runs())

    def __contains__(self, name: object) -> bool:
        return name in self.runs()

    def __getitem__(self, name: str) -> Run:
        from millpond.store.run import open_run

        self._check_held(name)
        return open_run(self.run_folder(name))

    def _check_held(self, name: str) -> None:
        held = self.runs()
        if name not in held:
            raise RunNotFound(
                f"run {name!r} is not in the lake {str(self.folder)!r}, which holds {', '.join(held) or 'no runs'}; "
                "name one of its runs or capture into a new one"
            )

    def spec(self, name: str) -> RunSpec:
        """What was fixed when the run called `name` was created; opens nothing else of it.

        Raises:
            RunNotFound: the lake has no run of that name.
        """
        self._check_held(name)
        return read_record(self.run_folder(name) / "run.json", RunSpec)

    def run_folder(self, name: str) -> Path:
        """The folder of the run called `name`, whether or not it exists."""
        return self.folder / "runs" / check_run_name(name)

    def check_new(self, name: str) -> None:
        """Check that a run called `name` could be created.

        Raises:
            RunExists: the lake has one.
            InvalidInput: the name is not allowed, or the lake cannot be written.
        """
        if self.run_folder(name).exists():
            raise RunExists(
                f"run {name!r} exists in the lake {str(self.folder)!r}; choose another name, "
                f"or remove it with: millpond rm {self.folder} {name}"
            )
        if not os.access(self.folder / "runs", os.W_OK):
            raise InvalidInput(f"lake {str(self.folder)!r} cannot be written; name a folder that you may write")

    def create_run(
        self,
        name: str,
        *,
        hooks: tuple[str, ...],
        d_model: int,
        dtype: str,
        provenance: Mapping[str, Any] | None = None,
        chunk_rows: int = 512,
        shard_rows: int = 32_768,
    ) -> RunSpec:
        """Create an open, empty run.

        Raises:
            RunExists: the lake has a run of that name.
            InvalidInput: an argument cannot be used.
        """
        self.check_new(name)
        if not hooks:
            raise InvalidInput("hooks is empty; name at least one hook point")
        for field, value in {"d_model": d_model, "chunk_rows": chunk_rows, "shard_rows": shard_rows}.items():
            if value < 1:
                raise InvalidInput(f"{field} is {value}; give 1 or more")
        if shard_rows % chunk_rows:
            raise InvalidInput(f"shard_rows {shard_rows} is not a multiple of chunk_rows {chunk_rows}")
        spec = RunSpec.model_validate(
            {
                "id": uuid.uuid4().hex,
                "name": name,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "hooks": tuple(sorted({str(parse_hook(hook)) for hook in hooks}, key=hook_sort_key)),
                "d_model": d_model,
                "dtype": check_dtype(dtype),
                "chunk_rows": chunk_rows,
                "shard_rows": shard_rows,
                "provenance": dict(provenance or {}),
            }
        )
        folder = self.run_folder(name)
        temporary = folder.with_name(f".new-{spec.id}")
        temporary.mkdir()
        try:
            write_json(temporary / "run.json", spec.model_dump(mode="json"))
            temporary.rename(folder)
        except (ValueError, PydanticSerializationError) as error:
            raise InvalidInput(f"provenance of run {name!r} cannot be written as JSON: {error}") from error
        except OSError as error:
            if folder.exists():
                raise RunExists(
                    f"run {name!r} was just created by somebody else in {str(self.folder)!r}; choose another name"
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(folder.parent)
        return spec

    def delete(self, name: str) -> None:
        """Remove a run and everything in it, at once for every reader that opens it later."""
        self._check_held(name)
        remove_tree(self.run_folder(name))

    def __repr__(self) -> str:
        return f"<Lake {str(self.folder)!r}: {len(self)} runs>"

    def _repr_html_(self) -> str:
        from millpond.store.reprs import lake_html

        return lake_html(self)
