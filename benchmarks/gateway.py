"""The gate's speed: the served gateway, a ledger commit, the egress meter's throughput, and how small text that leaves is.

Each is set beside a limit in the same run: SQLite committing one row, the same bytes without the meter, and zstd -19 with
the same dictionary, both as frames and as bare blocks without a header. `python benchmarks/gateway.py --quick` takes a minute.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import zstandard

from millpond.hub.body import Failure, Handles, ReleasedResult
from millpond.hub.body import decode as decode_body
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.local import LocalVault
from millpond.hub.policy import ModelPolicy, Policy
from millpond.hub.textcode import decode, encode
from millpond.hub.textmodel import TextModel
from millpond.store.lake import open_lake
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

ROOT = Path(__file__).parents[1]
METER = ROOT / "hub" / "meter.py"
EXAMPLE = ROOT / "examples" / "stdlib_llama"
DICTIONARY = 1_200_000


HOOK = "blocks.0.hook_resid_post"


def small_lake(folder: Path) -> None:
    """A run of 2,000 rows of 64 numbers."""
    lake = open_lake(folder, create=True)
    provenance = {"capture": {"capture": {"max_new_tokens": 0}}, "interventions": []}
    spec = lake.create_run("r", hooks=(HOOK,), d_model=64, dtype="float32", provenance=provenance)
    writer, rng = RunWriter(lake.run_folder("r"), spec), np.random.default_rng(0)
    for number in range(100):
        rows = rng.standard_normal((20, 64)).astype(np.float32)
        tokens = rng.integers(0, 9999, 20).astype(np.int32)
        writer.append(CapturedRequest(f"p{number}", tokens, 20, np.arange(20, dtype=np.int32), {HOOK: rows}))
    writer.commit()
    seal_run(lake.run_folder("r"), prompts=pd.DataFrame({"id": [f"p{n}" for n in range(100)]}))


class Caller:
    """A client of the served gateway, without the client's own work."""

    def __init__(self, vault: LocalVault, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        transport = httpx.HTTPTransport(uds=str(vault.socket))
        self.http = httpx.Client(
            transport=transport, base_url="http://gate/api/v1/p/bench/", headers=headers, timeout=30
        )

    def ask(self, path: str, payload: object = None) -> object:
        """The body that answers."""
        reply = self.http.get(path) if payload is None else self.http.post(path, json=payload)
        return decode_body(reply.content)

    def submit(self, job: object) -> str:
        """The handle of a job that was taken."""
        found = self.ask("jobs", {"job": job})
        assert isinstance(found, Handles), found
        return found.values[0].hex()

    def state(self, job: str) -> str:
        """Of a job."""
        return str(getattr(self.ask(f"jobs/{job}"), "state", "error"))

    def wait(self, job: str) -> None:
        """Until a job has ended."""
        while self.state(job) in ("queued", "running"):
            time.sleep(0.005)


def served(folder: Path, seconds: float) -> dict[str, float]:
    """Figures of a real gateway and executor: what a status costs, how many requests a second, from submit to result."""
    small_lake(folder / "lake")
    vault = LocalVault(folder / "v", folder / "lake", {"m": {"parameters": 8_000_000_000, "public": True}})
    with vault:
        vault.projects.create("bench", models=["m"], by="ada")
        run = vault.projects.hold("bench", "run", "r", "r", model="m", detail={"prompts": "own"}).handle.hex()
        token = vault.add_token("ada", "read", "run")
        vault.start()
        one = Caller(vault, token)
        job = {"kind": "statistics", "rows": {"run": run}, "hook": HOOK}
        warm = one.submit(job)
        one.wait(warm)
        overhead = []
        for number in range(15):
            started = time.perf_counter()
            mine = one.submit({**job, "rows": {"run": run, "where": f"position > {number % 10}"}})
            one.wait(mine)
            assert isinstance(one.ask(f"jobs/{mine}/answers/0"), ReleasedResult)
            overhead.append(1000 * (time.perf_counter() - started))
        status = milliseconds(lambda: one.ask(f"jobs/{warm}"), 300)
        process = vault.process("gateway")
        cpu = cpu_seconds(process)
        count, errors = mixed(vault, token, run, warm, job, seconds)
        cpu = cpu_seconds(process) - cpu
    return {
        "status_p50_ms": status, "requests_per_s": count / seconds, "errors": errors,
        "submit_overhead_ms": statistics.median(overhead), "cpu_ms": 1000 * cpu / max(1, count),
    }  # fmt: skip


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mixed(
    vault: LocalVault, token: str, run: str, done: str, job: dict[str, object], seconds: float
) -> tuple[int, int]:
    """Requests answered in `seconds` by eight clients at once: statuses, answers, descriptions, budgets, quotes, jobs."""
    counts, errors = [0] * 8, [0] * 8
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        caller, rng = Caller(vault, token), random.Random(number)
        asks = ["status"] * 10 + ["answer"] * 4 + ["run"] * 2 + ["budget"] * 2 + ["quote", "runs"]
        paths = {
            "status": f"jobs/{done}", "answer": f"jobs/{done}/answers/0", "run": f"runs/{run}", "budget": "budget",
            "runs": "runs", "quote": "quote",
        }  # fmt: skip
        while time.perf_counter() < end:
            what = rng.choice(asks)
            found = caller.ask(paths[what], {"job": job} if what == "quote" else None)
            counts[number] += 1
            errors[number] += isinstance(found, Failure)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), sum(errors)


def milliseconds(action: Callable[[], object], count: int) -> float:
    """Median time of `action`."""
    took = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took)


def ledger(folder: Path, count: int) -> tuple[float, float, float]:
    """Median ms of a charge to three budgets, its CPU ms, and median ms of SQLite inserting and syncing one row."""
    book = Ledger(f"sqlite:///{folder / 'ledger.db'}", Policy(models={"m": ModelPolicy(parameters=8_000_000_000)}))
    payer = Payer("ada", "p", ("m",))
    cpu = time.process_time()
    charge = milliseconds(lambda: book.charge(payer, 100, what="x", body=b"x" * 84), count)
    cpu = 1000 * (time.process_time() - cpu) / count
    book.verify()
    book.close()
    plain = sqlite3.connect(folder / "plain.db", isolation_level=None)
    plain.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t (x TEXT)")
    row = milliseconds(lambda: plain.execute("INSERT INTO t VALUES (?)", ("x" * 300,)), count)
    plain.close()
    return charge, cpu, row


def serve(path: Path, size: int) -> None:
    """A vault that answers each connection with `size` bytes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)

    def run() -> None:
        block = b"x" * (1 << 20)
        while True:
            connection, _ = listener.accept()
            with connection:
                for _ in range(size >> 20):
                    connection.sendall(block)

    threading.Thread(target=run, daemon=True).start()


def drain(connection: socket.socket) -> float:
    """MB/s of what comes until the end."""
    buffer, total, started = bytearray(1 << 20), 0, time.perf_counter()
    with connection:
        while count := connection.recv_into(buffer):
            total += count
    return total / 1e6 / (time.perf_counter() - started)


def meter(folder: Path, size: int) -> tuple[float, float]:
    """MB/s through the meter, and straight from the same socket."""
    path = folder / "vault.sock"
    serve(path, size)
    command = [sys.executable, str(METER), "--listen", "127.0.0.1:0", "--to", f"unix:{path}", "--cap", str(1 << 40)]
    command += ["--rate", str(1 << 40), "--ledger", str(folder / "meter")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(":")[2].split()[0])
        through = max(drain(socket.create_connection(("127.0.0.1", port))) for _ in range(3))
        process.terminate()
    straight = []
    for _ in range(3):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        straight.append(drain(connection))
    return through, max(straight)


def prose() -> tuple[bytes, list[str]]:
    """A dictionary and held-out texts: docstrings of the standard library, split by file as the example's corpus is."""
    sys.path.insert(0, str(EXAMPLE))
    from corpus import read_stdlib

    parts: dict[bool, list[str]] = {False: [], True: []}
    for file in read_stdlib():
        for node in ast.walk(ast.parse(file.text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found = ast.get_docstring(node)
                if found and len(found) > 300:
                    parts[file.held_out].append(found)
    random.Random(0).shuffle(parts[False])
    return "\n".join(parts[False]).encode()[:DICTIONARY], parts[True]


def text(characters: int, count: int, model: TextModel, held_out: list[str]) -> tuple[int, int, int, int]:
    """Bytes of `count` held-out pieces, coded one by one: plain, ours, zstd frames, zstd blocks without a header."""
    dictionary = zstandard.ZstdCompressionDict(model.dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    framed = zstandard.ZstdCompressor(level=19, dict_data=dictionary)
    bare = zstandard.ZstdCompressionParameters.from_level(
        19,
        dict_size=len(model.dictionary),
        source_size=characters,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_dict_id=False,
        write_checksum=False,
    )
    blocks = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=bare)
    rng, totals = random.Random(1), [0, 0, 0, 0]
    for _ in range(count):
        whole = rng.choice(held_out)
        start = whole.rfind(" ", 0, rng.randrange(max(1, len(whole) - characters))) + 1
        piece = whole[start : start + characters].encode()[:characters].decode(errors="ignore")
        coded = encode([piece], model, characters)  # as texts are cut: what is as long needs no mark of its end
        assert decode(coded, 1, model, characters) == [piece]
        plain = piece.encode()
        for place, data in enumerate((plain, coded, framed.compress(plain), blocks.compress(plain))):
            totals[place] += len(data)
    return totals[0], totals[1], totals[2], totals[3]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="millpond-gateway-") as name:
        folder = Path(name)
        charge, cpu, row = ledger(folder, 200 if quick else 2000)
        through, straight = meter(folder, (1 << 29) if quick else (1 << 32))
        gateway = served(folder / "g", 10 if quick else 60)
    print(f"status, p50             {gateway['status_p50_ms']:8.2f} ms")
    print(
        f"mixed requests          {gateway['requests_per_s']:8.0f} a second, {gateway['errors']:.0f} errors, 8 clients; "
        f"{gateway['cpu_ms']:.1f} ms of the gateway's CPU each"
    )
    print(f"submit to result, p50   {gateway['submit_overhead_ms']:8.0f} ms")
    print(f"ledger commit, p50      {charge:8.2f} ms     CPU {cpu:.2f} ms; SQLite alone, one row {row:.2f} ms")
    print(f"meter                   {through:8.0f} MB/s   without it            {straight:8.0f} MB/s")
    dictionary, held_out = prose()
    model = TextModel(dictionary)
    ratios = {}
    for characters in (128, 192, 256):
        plain, ours, framed, bare = text(characters, 15 if quick else 60, model, held_out)
        ratios[characters] = framed / ours
        bits = [8 * size / plain for size in (ours, framed, bare)]
        print(
            f"text of {characters} characters  {bits[0]:8.2f} bits/byte   zstd -19 frames {bits[1]:.2f} ({framed / ours:.2f}x), "
            f"bare blocks {bits[2]:.2f} ({bare / ours:.2f}x)"
        )
    record = {
        "status_p50_ms": round(gateway["status_p50_ms"], 2),
        "requests_per_s": round(gateway["requests_per_s"]),
        "errors": int(gateway["errors"]),
        "submit_overhead_ms": round(gateway["submit_overhead_ms"]),
        "ledger_p50_ms": round(charge, 3),
        "meter_mb_per_s": round(through),
        "text_ratio_vs_zstd": round(min(ratios.values()), 3),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
