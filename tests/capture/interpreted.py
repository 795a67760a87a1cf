"""vLLM's second model runner on its CPU build, its Triton kernels run by Triton's own interpreter.

vLLM has that runner for CPUs too, and takes it where Triton has a compiler for them, which the published builds have not.
`TRITON_INTERPRET=1` computes each kernel with numpy in place of compiling it, so all that is missing is a name: vLLM asks
Triton whether it knows of `cpu`.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = "triton_interpreted"


def environment(folder: Path) -> dict[str, str]:
    """What to set for processes that are to take the second runner; makes a package in `folder` that their Triton finds."""
    (folder / _PACKAGE).mkdir()
    for part in ("compiler", "driver"):  # nobody calls them
        (folder / _PACKAGE / f"{part}.py").write_text(f"from triton.backends.nvidia.{part} import *\n")
    metadata = folder / f"{_PACKAGE}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PACKAGE}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[triton.backends]\ncpu = {_PACKAGE}\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": path}
