"""Write `tools/locks/<extra>.txt`: every package of an extra with its version and the hashes of its files.

`python tools/lock.py` brings the files in step with pyproject.toml and keeps versions that still fit; `--upgrade` takes
the newest. For Python 3.11 on Linux x86-64; all extras are resolved together, so any of them can share an environment.
The index is whatever pip and uv are configured to use and is not written down. To install:
`pip install --require-hashes -r tools/locks/hub.txt`, then Millpond itself with `pip install --no-deps .`
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "tools" / "locks"
CORE = "core"
NOT_LOCKED = {"dev", "capture-cpu"}
"""`dev` is for tests; the CPU build of vLLM names packages that fit no CPU torch (install.py removes them)."""
PYTHON, GLIBC = (3, 11), range(5, 29)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC)] + ["manylinux2014_x86_64", "linux_x86_64"]


def requirements() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for: without any extra (`core`), and for each that is locked, the core included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: [Requirement(text) for text in texts] for name, texts in project["optional-dependencies"].items()}
    core = [Requirement(text) for text in project["dependencies"]]

    def expand(extra: str) -> list[Requirement]:
        found = []
        for one in extras[extra]:
            if canonicalize_name(one.name) == project["name"]:
                found += [inner for name in sorted(one.extras) for inner in expand(name)]
            else:
                found.append(one)
        return found

    return {CORE: core} | {name: [*core, *expand(name)] for name in sorted(set(extras) - NOT_LOCKED)}


def read_lock(extra: str) -> dict[str, str]:
    """The versions in a lock file, by package."""
    lines = (LOCKS / f"{extra}.txt").read_text().splitlines()
    pins = [line.split()[0].split("==") for line in lines if line and line[0] not in "# "]
    return {canonicalize_name(name): version for name, version in pins}


def compile_lock(wanted: list[Requirement], constraints: dict[str, str], upgrade: bool) -> list[dict[str, Any]]:
    """The packages that uv chooses for `wanted`."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if uv is None:
        raise SystemExit("lock: uv is missing; run: pip install uv")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted.in").write_text("\n".join(map(str, wanted)) + "\n")
        pins = "" if upgrade else "\n".join(f"{package}=={version}" for package, version in constraints.items())
        (folder / "constraints.txt").write_text(pins + "\n")
        command = [uv, "pip", "compile", "wanted.in", "--constraints", "constraints.txt", "--format", "pylock.toml"]
        command += ["--python-version", ".".join(map(str, PYTHON)), "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--quiet", "--no-header", "--output-file", "pylock.toml"]
        if subprocess.run(command, cwd=folder, check=False).returncode:
            raise SystemExit("lock: the extras do not fit together, or the versions kept no longer do: --upgrade")
        packages: list[dict[str, Any]] = tomllib.loads((folder / "pylock.toml").read_text())["packages"]
        return packages


def hashes_of(package: dict[str, Any], tags: frozenset[Tag]) -> list[str]:
    """Of the wheels that fit, or of the source where none does."""
    wheels = []
    for wheel in package.get("wheels", []):
        filename = wheel.get("name") or wheel["url"].rpartition("/")[2]
        if parse_wheel_filename(filename.replace("%2B", "+"))[3] & tags:
            wheels.append(wheel["hashes"]["sha256"])
    return sorted(set(wheels)) or [package["sdist"]["hashes"]["sha256"]]


def write_lock(extra: str, packages: list[dict[str, Any]]) -> None:
    """One package a line, its hashes below."""
    tags = frozenset([*cpython_tags(PYTHON, platforms=PLATFORMS), *compatible_tags(PYTHON, "cp311", PLATFORMS)])
    what = "Millpond without extras" if extra == CORE else f"millpond[{extra}]"
    lines = [f"# {what}: Python 3.11, Linux x86-64. Made by tools/lock.py; do not edit."]
    for package in sorted(packages, key=lambda package: str(package["name"])):
        hashes = [f"    --hash=sha256:{value}" for value in hashes_of(package, tags)]
        lines.append(" \\\n".join([f"{package['name']}=={package['version']}", *hashes]))
    (LOCKS / f"{extra}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Make every lock file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade
    LOCKS.mkdir(exist_ok=True)
    extras = requirements()
    kept: dict[str, str] = {}
    for extra in extras:
        if (LOCKS / f"{extra}.txt").exists():
            kept |= read_lock(extra)
    everything = compile_lock([one for wanted in extras.values() for one in wanted], kept, upgrade)
    chosen = {str(package["name"]): str(package["version"]) for package in everything}
    for stale in LOCKS.glob("*.txt"):
        if stale.stem not in extras:
            stale.unlink()
    for extra, wanted in extras.items():
        packages = compile_lock(wanted, chosen, upgrade=False)
        write_lock(extra, packages)
        print(f"lock: {extra}: {len(packages)} packages")


if __name__ == "__main__":
    main()
