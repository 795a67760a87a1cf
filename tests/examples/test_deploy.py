"""The containers' files as far as they can be checked without an engine: linters, schemas, and what they name."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_dockerfiles_pass_the_linter():
    assert len(DOCKERFILES) == 3
    done = subprocess.run([BIN / "hadolint", *DOCKERFILES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_file_satisfies_its_schema():
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_there_and_not_ignored(path):
    text = path.read_text()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in re.findall(r"^COPY (?!--from)(.*)", text, re.M) for source in shlex.split(line)[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source == name or source.startswith(f"{name}/") for name in allowed)
    locks = set(re.findall(r"locks/([a-z]+)\.txt", text)) | {
        extra
        for words in re.findall(r'EXTRAS="([^"]*)"|for extra in ([a-z0-9 ]+);', text)
        for extra in " ".join(words).split()
    }
    assert locks
    assert all((ROOT / "tools" / "locks" / f"{extra}.txt").exists() for extra in locks)
    assert re.search(r"^USER \d+:\d+$", text, re.M)


def test_services_name_what_is_declared_and_only_the_meter_joins_the_zones():
    services = COMPOSE["services"]
    for name, service in services.items():
        for kind in ("networks", "secrets", "configs"):
            used = [one["source"] if isinstance(one, dict) else one for one in service.get(kind, [])]
            assert set(used) <= set(COMPOSE[kind]), name
        volumes = [text.split(":")[0] for text in service.get("volumes", []) if not text.startswith("$")]
        assert set(volumes) <= set(COMPOSE["volumes"]), name
        assert service["cap_drop"] == ["ALL"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
    assert COMPOSE["networks"]["vault"]["internal"]
    in_vault = {name for name, service in services.items() if "vault" in service["networks"]}
    assert in_vault == {"database", "dask-scheduler", "dask-worker", "capture", "gateway", "executor"}
    assert all(services[name]["networks"] == ["vault"] and "ports" not in services[name] for name in in_vault)
    socket = {
        name for name, service in services.items() if any("socket:" in text for text in service.get("volumes", []))
    }
    assert socket == {"gateway", "meter"}


def test_commands_are_ones_that_exist():
    from distributed.cli import dask_scheduler, dask_worker

    for name, program in (("dask-scheduler", dask_scheduler.main), ("dask-worker", dask_worker.main)):
        command = COMPOSE["services"][name]["command"]
        with pytest.MonkeyPatch.context() as patch:
            for parameter in program.params:  # the certificates are the containers'
                patch.setattr(parameter.type, "exists", False, raising=False)
            assert program.make_context(command[1], list(command[2:])).params["protocol"] == "tls"
    arguments = [
        text.replace("${MILLPOND_CAP_BYTES:?bytes that may ever leave}", "1")
        for text in COMPOSE["services"]["meter"]["command"]
    ]
    help_text = subprocess.run(
        [sys.executable, ROOT / "hub" / "meter.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(flag in help_text for flag in arguments if flag.startswith("--"))
