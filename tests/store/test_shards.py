import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.store.errors import LakeCorrupt
from millpond.store.objects import open_storage
from millpond.store.shards import ArraySpec, ArrayWriter, read_rows


def write(folder, values, chunk_rows, chunks, pieces=(), codec="none"):
    folder = open_storage(folder)
    columns = values.shape[1] if values.ndim == 2 else None
    spec = ArraySpec(values.dtype.name, columns, chunk_rows, chunk_rows * chunks, codec)
    writer = ArrayWriter(folder, spec, {"note": "x"})
    for piece in np.split(values, sorted(pieces)):
        writer.append(piece)
    return spec, writer.finish()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from(["uint16", "float16", "float32", "int32", "int64", "bool"]),
    chunk_rows=st.integers(1, 9),
    chunks=st.integers(1, 4),
    codec=st.sampled_from(["none", "lz4", "zstd"]),
    data=st.data(),
)
def test_other_readers_see_the_same_rows(tmp_path_factory, rows, columns, dtype, chunk_rows, chunks, codec, data):
    folder = tmp_path_factory.mktemp("array") / "a"
    shape = (rows,) if columns is None else (rows, columns)
    values = np.random.default_rng(rows).integers(0, 2**15, shape).astype(dtype)
    pieces = data.draw(st.lists(st.integers(0, rows), max_size=4))
    spec, record = write(folder, values, chunk_rows, chunks, pieces, codec)
    assert np.array_equal(zarr.open_array(str(folder), mode="r")[:], values)
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    assert np.array_equal(tensorstore.open(driver, read=True).result().read().result(), values)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(read_rows(open_storage(folder), spec, start, stop), values[start:stop])
    assert record.rows == rows
    for shard, (size, crc) in enumerate(record.shards):
        content = (folder / spec.shard_path(shard)).read_bytes()
        assert (len(content), google_crc32c.value(content)) == (size, crc)


def test_a_shard_is_rows_then_index_then_checksum(tmp_path):
    values = np.arange(10, dtype=np.int32).reshape(5, 2)
    write(tmp_path / "a", values, 2, 4)
    content = (tmp_path / "a" / "c" / "0" / "0").read_bytes()
    assert content[:40] == values.astype("<i4").tobytes()
    assert content[40:48] == bytes(8)  # the last chunk is filled up
    empty = 2**64 - 1
    index = np.array([0, 16, 16, 16, 32, 16, empty, empty], "<u8").tobytes()
    assert content[48:-4] == index
    assert content[-4:] == google_crc32c.value(index).to_bytes(4, "little")


def test_rows_of_another_type_are_refused(tmp_path):
    writer = ArrayWriter(open_storage(tmp_path / "a"), ArraySpec("uint16", 2, 2, 4))
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((3, 3), np.uint16), np.zeros(3, np.uint16)):
        with pytest.raises(ValueError, match="expected uint16"):
            writer.append(wrong)


def test_missing_and_truncated_shards_are_named(tmp_path):
    spec, _ = write(tmp_path / "a", np.arange(12, dtype=np.int32), 2, 2)
    second, third = (tmp_path / "a" / spec.shard_path(shard) for shard in (1, 2))
    second.write_bytes(second.read_bytes()[:6])
    with pytest.raises(LakeCorrupt, match=r"c/1 ends after 6 of 16 wanted bytes"):
        read_rows(open_storage(tmp_path / "a"), spec, 0, 12)
    third.unlink()
    with pytest.raises(LakeCorrupt, match=r"c/2 is missing"):
        read_rows(open_storage(tmp_path / "a"), spec, 8, 12)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_damaged_compressed_shards_are_named(tmp_path, codec):
    values = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    for place, message in ((0, "cannot be decompressed"), (-30, "damaged index"), (None, "damaged index")):
        folder = tmp_path / str(place)
        spec, _ = write(folder, values, 8, 4, codec=codec)
        shard = folder / "c" / "1" / "0"
        content = bytearray(shard.read_bytes())
        if place is None:
            del content[-100:]
        else:
            content[place : place + 12] = b"\xff" * 12
        shard.write_bytes(content)
        assert np.array_equal(read_rows(open_storage(folder), spec, 3, 32), values[3:32])
        with pytest.raises(LakeCorrupt, match=f"c/1/0 (holds|has) a .*{message}|{message}"):
            read_rows(open_storage(folder), spec, 32, 64)
