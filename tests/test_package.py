"""The package as users get it: what a wheel holds, what an import costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("capture", "store", "analysis", "hub")
HEAVY = ("torch", "vllm", "dask", "distributed", "jupyterhub", "transformers", "sklearn", "xarray", "zarr", "pandas")


def imported_by(code: str) -> set[str]:
    """Top-level modules loaded after running `code` in a fresh interpreter."""
    probe = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import millpond",
        "import millpond.capture, millpond.analysis, millpond.hub",
        "import millpond.cli\ntry: millpond.cli.main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    assert imported_by(code) & set(HEAVY) == set()


def test_opening_a_lake_imports_no_torch_and_no_engine() -> None:
    code = "import millpond as mp, tempfile; mp.open(tempfile.mkdtemp(), create=True).runs()"
    assert imported_by(code) & {"torch", "vllm", "distributed", "jupyterhub", "sklearn"} == set()


def test_every_public_name_resolves() -> None:
    import millpond

    for name in millpond.__all__:
        assert getattr(millpond, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = millpond.nothing_like_this


def test_the_version_is_the_packages() -> None:
    import millpond

    assert millpond.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("sqlalchemy", ["ledger", "verify", "--database", "sqlite:///none.db"], "hub"),
        ("bcrypt", ["up", "--demo"], "workspace"),
    ],
)
def test_a_command_whose_packages_are_missing_names_the_extra(package: str, command: list[str], extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None\nfrom millpond.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    needs = f"this command needs {package!r}, which is not installed: pip install 'millpond[{extra}]'"
    assert (done.returncode, done.stderr) == (2, f"millpond: {needs}\n")


@pytest.mark.slow
def test_a_wheel_holds_what_git_tracks(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS, "src"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    links = {f"src/millpond/{room}" for room in ROOMS}
    expected = {"millpond/" + path.removeprefix("src/millpond/") for path in tracked if path not in links}
    assert held == expected
    entry_points = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    assert "vllm.general_plugins" in zipfile.ZipFile(wheel).read(entry_points).decode()
