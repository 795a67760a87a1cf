"""A real server for the tests: `millpond serve` in a process group of its own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from millpond.capture.params import capture_params
from tests.capture.conftest import MODEL

TWO_CORES = {
    "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2]),
    # vLLM 0.33 gives each data-parallel rank a memory node of its own, unless this is set, to whatever
    "VLLM_CPU_SIM_MULTI_NUMA": "0",
}
"""One core for each of an engine's, or a data-parallel group's, two workers, on a machine with one memory node."""
CHAT_TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"


class Server:
    """`millpond serve` of the example model; `url` answers once the constructor returns."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        hooks: tuple[str, ...] = ("blocks.*.hook_resid_post",),
        lake: str | None = None,
        prefix: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.lake = folder / "lake"
        self.url = f"http://127.0.0.1:{port}"
        (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
        # fmt: off
        command = [
            *prefix, sys.executable, "-m", "millpond.cli", "serve", str(MODEL), "--lake", lake or str(self.lake), "--hooks", *hooks,
            "--run", "live", "--commit-seconds", "0.2", "--",
            "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base", "--dtype", "float32",
            "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "32",
            "--chat-template", str(folder / "chat.jinja"), "--no-enable-log-requests", "--disable-uvicorn-access-log",
            *arguments,
        ]
        # fmt: on
        self.log = folder / "server.log"
        with self.log.open("ab") as log:
            environment = os.environ | dict(environment or {})
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        deadline = time.monotonic() + 480
        while True:
            try:
                if httpx.get(f"{self.url}/health", verify=False).status_code == 200:  # loading certificates is slow
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise AssertionError(self.log.read_text()[-4000:])
            time.sleep(0.2)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server and its engine, as one group."""
        try:
            os.killpg(self.process.pid, how)
        except ProcessLookupError:
            return
        self.process.wait(60)
        while True:  # the engine's processes end after the server
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            time.sleep(0.05)

    def post(self, body: dict[str, Any], *, millpond: Any = None, path: str = "completions") -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=_body(body, millpond), timeout=120)


def _body(body: dict[str, Any], millpond: Any) -> dict[str, Any]:
    asked = {"model": "base", "max_tokens": 4, "temperature": 0.0, **body}
    if isinstance(millpond, str):
        asked["vllm_xargs"] = {"millpond": millpond}
    elif millpond is not None:
        asked["vllm_xargs"] = capture_params(**millpond, http=True)
    return asked


def make_adapter(folder: Path, rank: int, seed: int) -> Path:
    """A random LoRA adapter of the example model in PEFT's format, strong enough to change every layer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    generator = torch.Generator().manual_seed(seed)
    heads = config.hidden_size // config.num_attention_heads
    sizes = {
        "self_attn.q_proj": (config.hidden_size, config.num_attention_heads * heads),
        "self_attn.v_proj": (config.hidden_size, config.num_key_value_heads * heads),
        "mlp.down_proj": (config.intermediate_size, config.hidden_size),
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    import json

    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(MODEL),
                "r": rank,
                "lora_alpha": 2 * rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": [module.rpartition(".")[2] for module in sizes],
            }
        )
    )
    return folder


def merge_by_hand(model: torch.nn.Module, folder: Path) -> None:
    """W + 2 B A: the adapters above have alpha = 2 r."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for key, b in tensors.items():
        if ".lora_B." in key:
            name = key.replace("base_model.model.", "").replace(".lora_B.weight", ".weight")
            parameters[name].data += 2 * b @ tensors[key.replace("lora_B", "lora_A")]
