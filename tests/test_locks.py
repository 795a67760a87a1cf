"""The lock files are in step with pyproject.toml, whole, and free of addresses."""

import importlib.util
import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
lock = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lock)
REQUIREMENTS = lock.requirements()


def test_every_extra_has_a_lock_and_no_other():
    assert {path.stem for path in lock.LOCKS.glob("*.txt")} == set(REQUIREMENTS)
    assert {"core", "analysis", "capture", "hub", "slurm"} <= set(REQUIREMENTS)


@pytest.mark.parametrize("extra", REQUIREMENTS)
def test_a_lock_holds_what_pyproject_asks_for(extra):
    pins = lock.read_lock(extra)
    environment = {"python_version": "3.11", "python_full_version": "3.11.0", "sys_platform": "linux"}
    for one in REQUIREMENTS[extra]:
        if one.marker is None or one.marker.evaluate(environment):
            version = pins.get(canonicalize_name(one.name))
            assert version is not None, f"{one} of {extra} is not locked; run: python tools/lock.py"
            assert one.specifier.contains(version, prereleases=True), (
                f"{one} of {extra}: {version}; run: python tools/lock.py"
            )


def test_all_can_share_an_environment_and_every_package_has_a_hash():
    versions = {}
    for extra in REQUIREMENTS:
        text = (lock.LOCKS / f"{extra}.txt").read_text()
        assert "://" not in text
        assert len(re.findall(r"^[a-z0-9].*==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)) == len(
            lock.read_lock(extra)
        )
        for name, version in lock.read_lock(extra).items():
            assert versions.setdefault(name, version) == version
    assert versions["vllm"].startswith("0.32.")
