"""The gate's speed: a ledger commit, the egress meter's throughput, and how small text that leaves is.

Each is set beside a limit in the same run: SQLite committing one row, the same bytes without the meter, and zstd -19 with
the same dictionary, both as frames and as bare blocks without a header. `python benchmarks/gateway.py --quick` takes a minute.
"""

from __future__ import annotations

import argparse
import ast
import json
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

import zstandard

from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import ModelPolicy, Policy
from millpond.hub.textcode import decode, encode
from millpond.hub.textmodel import TextModel

ROOT = Path(__file__).parents[1]
METER = ROOT / "hub" / "meter.py"
EXAMPLE = ROOT / "examples" / "stdlib_llama"
DICTIONARY = 1_200_000


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
        piece = whole[start : start + characters]
        coded = encode([piece], model)
        assert decode(coded, 1, model) == [piece]
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
        "ledger_p50_ms": round(charge, 3),
        "meter_mb_per_s": round(through),
        "text_ratio_vs_zstd": round(ratios[128], 3),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
