import subprocess
import sys

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from millpond.analysis.passes import AlignedRows, InMemory, Pass, join, run_pass, run_passes
from millpond.store.errors import InvalidInput


def moments(state, x, y):
    return {"n": len(x), "sum": (x * state).sum(axis=0, dtype=np.float64), "pair": (y.sum(), float(x[:, 0] @ y))}


def numbers_of(state, x, numbers):
    assert len(x) == len(numbers)
    return [numbers]


class CountedReads:
    """A lazy array's source that counts how often each block of rows is read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim
        self.reads = []

    def __getitem__(self, index):
        found = self.values[index]
        if len(found):  # Dask asks for no rows to learn the data type
            self.reads.append(index[0].start)
        return found


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return rng.standard_normal((1000, 6)).astype(np.float32), rng.integers(0, 2, 1000)


@pytest.mark.parametrize("chunks", [(1000,), (1,) * 1000, (333, 333, 334), (999, 1)])
@pytest.mark.parametrize("block_bytes", [1, 24 * 100, 1 << 26])
def test_statistics_equal_the_whole_arrays(table, chunks, block_bytes):
    x, y = table
    if block_bytes == 1 and len(chunks) == 1000:
        x, y, chunks = x[:40], y[:40], (1,) * 40
    rows = AlignedRows(
        xr.DataArray(da.from_array(x, chunks=(chunks, (3, 3))), dims=("row", "d_model")),
        da.from_array(y, chunks=(chunks,)),
        block_bytes=block_bytes,
    )
    found = run_pass(Pass(rows, moments, 2.0))
    assert found["n"] == len(x)
    np.testing.assert_allclose(found["sum"], 2 * x.astype(np.float64).sum(axis=0), atol=1e-3)
    assert found["pair"] == (y.sum(), pytest.approx(float(x[:, 0] @ y), abs=1e-3))


def test_row_numbers_follow_the_blocks(table):
    x, _ = table
    rows = AlignedRows(da.from_array(x, chunks=(70, 6)), range(1000), block_bytes=24 * 150)
    assert len(rows.blocks) > 3
    parts = run_pass(Pass(rows, numbers_of, None, join))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(1000))


def test_each_row_is_read_once_and_passes_may_run_together(table):
    x, y = table
    source = CountedReads(x)
    lazy = da.from_array(source, chunks=(100, 6), asarray=False, name=False)
    first, second = run_passes(
        [Pass(AlignedRows(lazy, y), moments, 1.0), Pass(AlignedRows(x, InMemory(y)), moments, 3.0)]
    )
    assert sorted(source.reads) == list(range(0, 1000, 100))
    np.testing.assert_allclose(first["sum"] * 3, second["sum"], rtol=1e-5)


def test_result_is_the_same_to_the_last_bit_however_tasks_are_scheduled(table):
    import dask

    x, y = table
    rows = AlignedRows(da.from_array(x, chunks=(17, 6)), y, block_bytes=24 * 17)
    found = [run_pass(Pass(rows, moments, 1 / 3))["sum"] for _ in range(5)]
    with dask.config.set(scheduler="synchronous"):
        found.append(run_pass(Pass(rows, moments, 1 / 3))["sum"])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_head_reads_the_first_rows(table):
    x, y = table
    rows = AlignedRows(da.from_array(x, chunks=(100, 6)), y).head(30)
    assert run_pass(Pass(rows, moments, 1.0))["n"] == 30


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((np.zeros((3, 2)), np.zeros(4)), "3 and 4 rows"),
        ((np.zeros((0, 2)),), "0 rows"),
        ((da.zeros((8, 2), chunks=(4, 2)), da.zeros(8, chunks=2)), "row chunks differ: 4 rows x 2 and 2 rows x 4"),
        ((da.zeros((8, 2), chunks=(4, 2))[da.zeros(8, chunks=4) == 0],), "compute_chunk_sizes"),
        ((range(0, 8, 2),), "step 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, words):
    with pytest.raises(InvalidInput, match=words):
        AlignedRows(*arrays)


def test_importing_the_room_imports_nothing_heavy():
    code = (
        "import sys, millpond.analysis as a; assert 'LogisticProbe' in dir(a);"
        "print([m for m in ('torch', 'dask', 'distributed', 'sklearn', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    import millpond.analysis

    with pytest.raises(AttributeError, match="RidgeProb"):
        millpond.analysis.RidgeProb  # noqa: B018
