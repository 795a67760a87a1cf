"""One round of one storage system: `python benchmarks/peers.py SYSTEM FOLDER ROWS` writes rows, reads them cold, and shuffled.

Prints `{"write": ..., "write_cpu": ..., "read_cold": ..., "shuffled": ...}` in seconds. All systems get the same bfloat16
bits and the same sizes of chunk and shard where they have any; nothing is compressed. Every row holds its number, and
each reading is checked for having seen all. A write ends when every file and folder was fsynced: by the system itself
(Millpond, TensorStore) or behind it. `millpond` is a whole sealed run, with checksums, statistics, index and prompt
table; `array` is one array of it, which is what the others write. Shuffled: chunks in random order, 64 of them mixed,
batches of 4,096 rows; Millpond and MDS do that themselves, the others are given chunks to read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

D_MODEL, CHUNK, SHARD, BATCH, MIXED = 2048, 512, 32_768, 4096, 64
HOOK = "blocks.0.hook_resid_post"
Rows = NDArray[Any]
System = tuple[Callable[[], object], Callable[[], Iterable[Rows]], Callable[[], Iterable[Rows]]]
"""Writes; reads in order; reads shuffled."""


@cache
def _bits() -> Rows:
    values = np.random.default_rng(0).standard_normal((2048, D_MODEL)).astype(np.float32)
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), (SHARD, D_MODEL))


def blocks(n_rows: int, size: int = 8192) -> Iterator[Rows]:
    """The rows, in blocks that share their memory; the first two values of each row are its number."""
    for start in range(0, n_rows, size):
        block = _bits()[: min(size, n_rows - start)]
        number = np.arange(start, start + len(block))
        block[:, 0], block[:, 1] = number % 256, number // 256  # as bfloat16 they are finite
        yield block


def mixed(n_rows: int, read: Callable[[int, int], Rows]) -> Iterator[Rows]:
    """Shuffled batches of a system that reads rows `start` to `stop`."""
    rng = np.random.default_rng(0)
    order = rng.permutation(-(-n_rows // CHUNK))
    for first in range(0, len(order), MIXED):
        rows = np.concatenate([read(n * CHUNK, min((n + 1) * CHUNK, n_rows)) for n in order[first : first + MIXED]])
        places = rng.permutation(len(rows))
        for start in range(0, len(rows), BATCH):
            yield rows[places[start : start + BATCH]]


def raw(folder: Path, n_rows: int) -> System:
    """One file; shuffled rows are read in order, as fast as a disk can give them."""
    file = folder / "rows"

    def write() -> None:
        with file.open("wb") as handle:
            for block in blocks(n_rows):
                block.tofile(handle)

    def read() -> Iterator[Rows]:
        buffer = np.empty((SHARD, D_MODEL), np.uint16)
        with file.open("rb", buffering=0) as handle:
            while got := handle.readinto(memoryview(buffer).cast("B")):
                yield buffer[: got // (2 * D_MODEL)]

    return write, read, read


def millpond(folder: Path, n_rows: int) -> System:
    """A sealed run."""
    import pandas as pd

    from millpond.store.lake import open_lake
    from millpond.store.sealed import write_sealed

    prompts = pd.DataFrame({"id": [str(n) for n in range(n_rows // CHUNK)], "sha256": ""})
    prompts = prompts.assign(n_prompt_tokens=CHUNK, n_tokens=CHUNK, n_rows=CHUNK)
    index = np.resize(np.arange(CHUNK, dtype=np.int32), n_rows)
    like = {
        "hooks": (HOOK,),
        "d_model": D_MODEL,
        "dtype": "bfloat16",
        "chunk_rows": CHUNK,
        "shard_rows": SHARD,
        "codec": "none",
    }
    lake = open_lake(folder / "lake", create=True)

    def write() -> None:
        write_sealed(lake, "a", like=like, table=prompts, blocks=lambda n: blocks(n_rows) if n == HOOK else [index])

    def read() -> Iterator[Rows]:
        plan = lake["a"].plan
        return (plan.read_stored(HOOK, block) for block in plan.blocks())

    def shuffled() -> Iterator[Rows]:
        stream = lake["a"].stream(HOOK, BATCH, epochs=1, buffer_rows=MIXED * CHUNK, dtype="bfloat16")
        return (batch.view(np.uint16) for batch in stream)

    return write, read, shuffled


def array(folder: Path, n_rows: int) -> System:
    """Millpond's array of one hook, without a run around it."""
    from millpond.store.objects import open_storage
    from millpond.store.shards import ArraySpec, ArrayWriter, read_rows

    storage, spec = open_storage(folder / "a"), ArraySpec("uint16", D_MODEL, CHUNK, SHARD)

    def write() -> None:
        writer = ArrayWriter(storage, spec)
        for block in blocks(n_rows):
            writer.append(block)
        writer.finish()

    def read() -> Iterator[Rows]:
        return (read_rows(storage, spec, n, min(n + SHARD, n_rows)) for n in range(0, n_rows, SHARD))

    return write, read, lambda: mixed(n_rows, lambda start, stop: read_rows(storage, spec, start, stop))


def zarr_sharded(folder: Path, n_rows: int) -> System:
    """zarr-python."""
    import zarr

    def write() -> None:
        sizes: dict[str, Any] = {"chunks": (CHUNK, D_MODEL), "shards": (SHARD, D_MODEL)}
        array = zarr.create_array(folder / "a", shape=(n_rows, D_MODEL), dtype="uint16", compressors=None, **sizes)
        for number, block in enumerate(blocks(n_rows, SHARD)):
            array[number * SHARD : number * SHARD + len(block)] = block

    def piece(start: int, stop: int) -> Rows:
        return np.asarray(zarr.open_array(folder / "a", mode="r")[start:stop])

    return (
        write,
        lambda: (piece(n, min(n + SHARD, n_rows)) for n in range(0, n_rows, SHARD)),
        lambda: mixed(n_rows, piece),
    )


def tensorstore(folder: Path, n_rows: int) -> System:
    """TensorStore's Zarr v3 driver."""
    import tensorstore as ts

    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "a")}}
    inner = {"chunk_shape": [CHUNK, D_MODEL], "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    grid = {"name": "regular", "configuration": {"chunk_shape": [SHARD, D_MODEL]}}
    metadata = {
        "shape": [n_rows, D_MODEL],
        "data_type": "uint16",
        "chunk_grid": grid,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }

    def write() -> None:
        array = ts.open({**where, "metadata": metadata}, create=True).result()
        for number, block in enumerate(blocks(n_rows, SHARD)):
            array[number * SHARD : number * SHARD + len(block)] = block

    def reader() -> Callable[[int, int], Rows]:
        array = ts.open(where, read=True).result()
        return lambda start, stop: np.asarray(array[start:stop].read().result())

    def read() -> Iterator[Rows]:
        piece = reader()
        return (piece(n, min(n + SHARD, n_rows)) for n in range(0, n_rows, SHARD))

    return write, read, lambda: mixed(n_rows, reader())


def safetensors(folder: Path, n_rows: int) -> System:
    """A file of one tensor for each shard."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    def write() -> None:
        for number, block in enumerate(blocks(n_rows, SHARD)):
            save_file({"rows": block}, folder / f"{number}.safetensors")

    def piece(start: int, stop: int) -> Rows:
        number = start // SHARD
        with safe_open(folder / f"{number}.safetensors", "np") as file:
            return np.asarray(file.get_slice("rows")[start - number * SHARD : stop - number * SHARD])

    return (
        write,
        lambda: (piece(n, min(n + SHARD, n_rows)) for n in range(0, n_rows, SHARD)),
        lambda: mixed(n_rows, piece),
    )


def _arrow(n_rows: int) -> Iterator[Any]:
    import pyarrow as pa

    for block in blocks(n_rows):
        values = pa.array(block.copy().reshape(-1))
        yield pa.record_batch([pa.FixedSizeListArray.from_arrays(values, D_MODEL)], names=["rows"])


def _values(column: Any) -> Rows:
    return np.concatenate([chunk.flatten().to_numpy().reshape(-1, D_MODEL) for chunk in column.chunks])


def datasets(folder: Path, n_rows: int) -> System:
    """Hugging Face datasets: Arrow files, mapped into memory."""
    import pyarrow as pa
    from datasets import Dataset, load_from_disk

    def write() -> None:
        Dataset(pa.Table.from_batches(_arrow(n_rows))).save_to_disk(folder / "a", max_shard_size="128MB")

    def reader() -> Callable[[int, int], Rows]:
        table = load_from_disk(str(folder / "a")).data
        return lambda start, stop: _values(table.slice(start, stop - start)["rows"])

    def read() -> Iterator[Rows]:
        piece = reader()
        return (piece(n, min(n + SHARD, n_rows)) for n in range(0, n_rows, SHARD))

    return write, read, lambda: mixed(n_rows, reader())


def lance(folder: Path, n_rows: int) -> System:
    """Lance."""
    import lance as library
    import pyarrow as pa

    def write() -> None:
        schema = pa.schema({"rows": pa.list_(pa.uint16(), D_MODEL)})
        library.write_dataset(pa.RecordBatchReader.from_batches(schema, _arrow(n_rows)), str(folder / "a.lance"))

    def read() -> Iterator[Rows]:
        for batch in library.dataset(str(folder / "a.lance")).to_batches(batch_size=8192):
            yield batch["rows"].flatten().to_numpy().reshape(-1, D_MODEL)

    def shuffled() -> Iterator[Rows]:
        data = library.dataset(str(folder / "a.lance"))
        return mixed(n_rows, lambda start, stop: _values(data.take(range(start, stop))["rows"]))

    return write, read, shuffled


def mds(folder: Path, n_rows: int) -> System:
    """MosaicML streaming: a sample a row."""
    # the package's own __init__ imports torchvision for its data sets of images, which does not load beside a torch
    # without CUDA; its writer and reader need none of it
    found = importlib.util.find_spec("streaming")
    assert found is not None
    package = sys.modules["streaming"] = ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations or ())
    from streaming.base import MDSWriter, StreamingDataset

    def write() -> None:
        with MDSWriter(out=str(folder / "a"), columns={"row": "bytes"}, size_limit=SHARD * D_MODEL * 2) as out:
            for block in blocks(n_rows):
                for row in block:
                    out.write({"row": row.tobytes()})

    def read(shuffle: bool = False) -> Iterator[Rows]:
        data = StreamingDataset(local=str(folder / "a"), shuffle=shuffle, batch_size=BATCH, num_canonical_nodes=1)
        held = []
        for sample in data:
            held.append(sample["row"])
            if len(held) == BATCH:
                yield np.frombuffer(b"".join(held), np.uint16).reshape(-1, D_MODEL)
                held = []
        if held:
            yield np.frombuffer(b"".join(held), np.uint16).reshape(-1, D_MODEL)

    return write, read, lambda: read(True)


SYSTEMS = {
    "raw": raw,
    "millpond": millpond,
    "array": array,
    "zarr": zarr_sharded,
    "tensorstore": tensorstore,
    "safetensors": safetensors,
    "datasets": datasets,
    "lance": lance,
    "mds": mds,
}


def sync(folder: Path, *, drop: bool = False) -> None:
    """Bring everything below `folder` to the disk, and files on request out of the page cache."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        if drop and path.is_file():
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed_read(read: Callable[[], Iterable[Rows]], n_rows: int) -> float:
    """Wall seconds of a reading that gives each row once."""
    seen = np.zeros(n_rows, bool)
    started = time.perf_counter()
    for rows in read():
        seen[rows[:, 0].astype(np.int64) + rows[:, 1].astype(np.int64) * 256] = True
    took = time.perf_counter() - started
    assert seen.all(), f"{n_rows - int(seen.sum())} rows are missing"
    return took


def main(system: str, folder: Path, n_rows: int) -> None:
    """One round."""
    write, read, shuffled = SYSTEMS[system](folder, n_rows)
    _bits()
    started, cpu = time.perf_counter(), time.process_time()
    write()
    sync(folder)
    found = {"write": time.perf_counter() - started, "write_cpu": time.process_time() - cpu}
    for name, action in {"read_cold": read, "shuffled": shuffled}.items():
        sync(folder, drop=True)
        found[name] = timed_read(action, n_rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
