"""Random traffic on a real server, with every captured row checked against Hugging Face and the engine killed at times.

python -m tests.capture.soak --minutes 30 --out DIR
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import millpond as mp
from millpond.capture.params import capture_params
from millpond.store.verify import verify_run
from tests.capture.artifacts import INTERCEPT, K, coefficients, dense_codes, make_artifacts
from tests.capture.conftest import D_MODEL, HOOK, N_LAYERS, Reference
from tests.capture.serving import Server

STEERED_LAYER = 2
READ_LAYER = 4
READS = [
    {"read": "probe", "artifact": "lie", "hook": HOOK.format(READ_LAYER)},
    {"read": "sae_topk", "artifact": "topk", "hook": HOOK.format(READ_LAYER)},
]
POSITIONS: dict[str, Any] = {"all": "all", "last": "last", "prompt": "prompt", "generated": "generated", "few": [0, -1]}


@dataclass
class Acknowledged:
    """A captured sample whose client was told that its rows are stored."""

    run: str
    id: str
    tokens: list[int]
    n_prompt: int
    positions: str


@dataclass
class Soak:
    """What happened so far."""

    folder: Path
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    acknowledged: list[Acknowledged] = field(default_factory=list)
    worst: float = 0.0
    """Largest relative error of any request's rows at any layer."""
    worst_read: float = 0.0
    """Largest error of a score or code, over the largest value of the rows that it is computed from."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        rng = np.random.default_rng(self.seed)
        self.vectors = [(3 * rng.standard_normal(D_MODEL)).round(3).tolist() for _ in range(3)]
        self.stem = [0, *rng.integers(2, 4096, 120).tolist()]
        self.reference = Reference(torch.float32)
        self.number = 0
        lake = mp.open(self.folder / "lake", create=True)
        self.sae = make_artifacts(lake, self.folder, D_MODEL)["topk"]

    def serve(self) -> Server:
        """A server with so little room for keys and values that requests are preempted."""
        return Server(
            self.folder,
            "--max-num-batched-tokens",
            "128",
            "--num-gpu-blocks-override",
            "40",
            "--block-size",
            "32",
            "--enable-prefix-caching",
        )

    async def traffic(self, server: Server, seconds: float, kill: bool) -> None:
        """Twelve clients for a while; then, if asked, SIGKILL in the middle of their requests."""
        stop = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=f"{server.url}/v1", timeout=120) as client:

            async def one_client() -> None:
                while time.monotonic() < stop:
                    try:
                        await self.request(client)
                    except httpx.TransportError:
                        self.counts["cut off"] += 1
                        if not kill:
                            raise
                        return

            async def killer() -> None:
                await asyncio.sleep(seconds * 0.9)
                if kill:
                    os.killpg(server.process.pid, signal.SIGKILL)
                    self.counts["SIGKILLs"] += 1

            await asyncio.gather(killer(), *(one_client() for _ in range(12)))

    async def request(self, client: httpx.AsyncClient) -> None:
        """One random request, and what its client was told."""
        draw = self.random
        self.number += 1
        length = draw.randint(1, 220)
        prompt = [*self.stem[: draw.choice([0, 0, 64, 120])], *(draw.randint(2, 4095) for _ in range(length))]
        body: dict[str, Any] = {
            "model": "base",
            "prompt": prompt,
            "max_tokens": draw.choice([1, 1, 4, 30, 80]),
            "n": (n := draw.choice([1, 1, 1, 2, 3])),
            "temperature": draw.choice([0.0, 1.0]) if n == 1 else 1.0,
            "stream": draw.random() < 0.5,
            "ignore_eos": draw.random() < 0.5,
            "return_token_ids": True,
        }
        if draw.random() < 0.3:
            body["stop"] = ["(", "="]
        kind = draw.choice(["captured", "captured", "captured", "read", "plain", "steered", "steered and captured"])
        positions = draw.choice(list(POSITIONS))
        steer = draw.randrange(len(self.vectors))
        run = f"steered-{steer}" if "steered" in kind else "read" if kind == "read" else "plain"
        stored = "captured" in kind or kind == "read"
        if kind != "plain":
            edit = {"op": "add", "hook": HOOK.format(STEERED_LAYER), "vector": self.vectors[steer]}
            wish: dict[str, Any] = {"intervene": [edit] if "steered" in kind else []}
            wish |= {"capture": False} if kind == "steered" else {}
            wish |= {"reads": READS} if kind == "read" else {}
            if stored:
                wish |= {"run": run, "positions": POSITIONS[positions], "id": f"r{self.number}"}
            body["vllm_xargs"] = capture_params(**wish, http=True)
        abort = body["stream"] and draw.random() < 0.2
        generated, told = await self._send(client, body, abort)
        if generated is None:
            self.counts[f"{kind}, aborted"] += 1
            return
        self.counts[kind] += 1
        self.counts["n > 1"] += body["n"] > 1
        if stored:
            assert told is not None
            assert told["status"] == "committed"
            names = [f"r{self.number_of(body)}"] if body["n"] == 1 else list(told["samples"])
            for name, new in zip(names, generated, strict=True):
                self.acknowledged.append(Acknowledged(run, name, [*prompt, *new], len(prompt), positions))

    def number_of(self, body: dict[str, Any]) -> str:
        """The number in the request's own id."""
        return str(json.loads(body["vllm_xargs"]["millpond"])["capture"]["id"][1:])

    async def _send(
        self, client: httpx.AsyncClient, body: dict[str, Any], abort: bool
    ) -> tuple[list[list[int]] | None, dict[str, Any] | None]:
        """Generated tokens of each sample and the answer about its rows; nothing if the client hung up."""
        if not body["stream"]:
            response = await client.post("/completions", json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
            told = (answer["kv_transfer_params"] or {}).get("millpond")
            return [choice["token_ids"] for choice in answer["choices"]], told
        generated: list[list[int]] = [[] for _ in range(body["n"])]
        told, seen = None, 0
        async with client.stream("POST", "/completions", json=body) as response:
            assert response.status_code == 200
            async for event in response.aiter_lines():
                if not event.startswith("data: ") or event == "data: [DONE]":
                    continue
                chunk = json.loads(event.removeprefix("data: "))
                assert "error" not in chunk, event
                for choice in chunk["choices"]:
                    generated[choice["index"]] += choice["token_ids"] or []
                told = (chunk.get("kv_transfer_params") or {}).get("millpond", told)
                seen += 1
                if abort and seen > 1:
                    return None, None
        return generated, told

    def check(self) -> None:
        """Compare every row that was acknowledged since the last check with Hugging Face, and look for strays."""
        lake = mp.open(self.folder / "lake")
        for name in lake.runs():
            run = lake[name]
            ids = run.prompts["id"].tolist()
            assert len(ids) == len(set(ids)), f"{name}: a prompt is stored twice"
            mine = [one for one in self.acknowledged if one.run == name]
            places = {prompt_id: number for number, prompt_id in enumerate(ids)}
            missing = [one.id for one in mine if one.id not in places]
            assert not missing, f"{name}: acknowledged, but not stored: {missing[:5]}"
            if not mine:
                continue
            chosen = np.zeros(len(ids), bool)
            chosen[[places[one.id] for one in mine]] = True
            part = run.select(chosen)
            reads = {key: part.reads[key].compute() for key in part.reads}
            rows = np.stack([part[HOOK.format(layer)].values for layer in range(N_LAYERS)]) if part.hooks else None
            coordinates = part.tokens.compute()
            counts = part.prompts["n_rows"].to_numpy()
            ends = dict(zip(part.prompts["id"], np.cumsum(counts), strict=True))
            starts = dict(zip(part.prompts["id"], np.cumsum(counts) - counts, strict=True))
            steered = int(name.rpartition("-")[2]) if name.startswith("steered") else None
            for one in mine:
                at = slice(starts[one.id], ends[one.id])
                wanted = self._wanted(one, coordinates["position"].values[at], coordinates["token_id"].values[at])
                if not wanted:
                    continue
                if rows is not None:
                    self._compare(one, rows[:, at], wanted, steered)
                for key, read in reads.items():
                    self._compare_read(one, key, read.isel(row=at), wanted)
        self.acknowledged.clear()

    def _wanted(self, one: Acknowledged, positions: np.ndarray, token_ids: np.ndarray) -> list[int]:
        """The positions that were asked for, after checking that they are those that are stored."""
        computed = len(one.tokens) - 1
        wanted = {
            "all": range(computed),
            "prompt": range(one.n_prompt),
            "generated": range(one.n_prompt, computed),
            "last": [one.n_prompt - 1],
            "few": sorted({0, one.n_prompt - 1}),
        }[one.positions]
        assert positions.tolist() == list(wanted), one
        assert token_ids.tolist() == [one.tokens[position] for position in wanted], one
        return list(wanted)

    def _compare(self, one: Acknowledged, rows: np.ndarray, wanted: list[int], steered: int | None) -> None:
        self.counts["rows checked"] += rows.shape[1]
        with self._steering(steered):
            right = self.reference.residuals(one.tokens[:-1])[:, wanted]
        if steered is not None:  # Hugging Face keeps the layer's output as it was before the hook
            right[STEERED_LAYER] += np.array(self.vectors[steered], np.float32)
        error = np.linalg.norm(rows - right, axis=(1, 2)) / np.linalg.norm(right, axis=(1, 2))
        self.worst = max(self.worst, float(error.max()))
        assert error.max() < 1e-3, (one, error)

    def _compare_read(self, one: Acknowledged, name: str, read: Any, wanted: list[int]) -> None:
        """Scores, or codes from the largest on, against what Hugging Face's rows give."""
        right = self.reference.residuals(one.tokens[:-1])[READ_LAYER, wanted]
        if name == "lie":
            values, truth = read["scores"].values, right @ coefficients(D_MODEL).T + INTERCEPT
        else:
            dense = dense_codes(self.sae, right)
            values, truth = read["values"].values, -np.sort(-dense, axis=1)[:, :K]
        self.counts["values read"] += values.size
        error = float(np.abs(values - truth).max() / np.abs(right).max())
        self.worst_read = max(self.worst_read, error)
        assert error < 1e-3, (one, name, error)

    @contextmanager
    def _steering(self, steered: int | None) -> Iterator[None]:
        """Hugging Face's layer with the vector added to what it returns."""
        if steered is None:
            yield
            return
        vector = torch.tensor(self.vectors[steered])
        layer = self.reference.model.model.layers[STEERED_LAYER]
        handle = layer.register_forward_hook(lambda _module, _inputs, output: output + vector)
        try:
            yield
        finally:
            handle.remove()

    def run(self, seconds: float, round_seconds: float) -> None:
        """Rounds of traffic, each checked at its end, until the time is up; every second round ends with a SIGKILL."""
        deadline = time.monotonic() + seconds
        server, number, over = self.serve(), 0, False
        try:
            while not over:
                number += 1
                kill = number % 2 == 1
                asyncio.run(self.traffic(server, round_seconds, kill))
                if kill:
                    server.stop(signal.SIGKILL)
                else:
                    self.counts["preemptions"] += preemptions(server)
                self.check()
                print(
                    f"round {number}: {dict(self.counts)}, worst error {self.worst:.1e}, of reads {self.worst_read:.1e}",
                    flush=True,
                )
                over = time.monotonic() > deadline and not kill
                if kill:
                    server = self.serve()
        finally:
            server.stop(signal.SIGKILL)
        lake = mp.open(self.folder / "lake")
        for name in lake.runs():
            assert verify_run(lake[name]).problems == []


def preemptions(server: Server) -> int:
    """How many there were since the server's start."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    counts = [line.rpartition(" ")[2] for line in lines if line.startswith("vllm:num_preemptions_total")]
    return int(sum(map(float, counts)))


def main() -> None:
    """Run the soak and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millpond-soak-", dir=arguments.out) as folder:
        soak = Soak(Path(folder), arguments.seed)
        soak.run(60 * arguments.minutes, 60)
    print(json.dumps({**soak.counts, "worst relative error": soak.worst, "of reads": soak.worst_read}))


if __name__ == "__main__":
    sys.exit(main())
