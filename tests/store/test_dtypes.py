import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millpond.store.dtypes import check_dtype, decode, encode_bfloat16
from millpond.store.errors import InvalidInput


def check_against_torch(bits):
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = decode(encode_bfloat16(values), "bfloat16")
    theirs = expected.float().numpy()
    nan = np.isnan(values)
    assert np.isnan(ours[nan]).all()
    # bit patterns, so that -0.0 is not 0.0
    assert np.array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


@given(arrays(np.uint32, st.integers(1, 64), elements=st.integers(0, 2**32 - 1)))
def test_any_float32_rounds_as_in_torch(bits):
    check_against_torch(bits)


def test_every_tie_and_edge_rounds_as_in_torch():
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        check_against_torch(upper | np.uint32(lower))


def test_named_values():
    values = np.array([1.0, 1.00390625, 1.01171875, np.inf, -np.inf, 3.4e38, 1e-40, -0.0, np.nan], np.float32)
    # ties go to even: 1 + 2**-8 down to 1, 1 + 3 * 2**-8 up to 1 + 2**-6; 1e-40 is subnormal
    assert encode_bfloat16(values).tolist() == [
        0x3F80, 0x3F80, 0x3F82, 0x7F80, 0xFF80, 0x7F80, 0x0001, 0x8000, 0x7FC0,
    ]  # fmt: skip


def test_float16_decodes_exactly():
    every = np.arange(2**16, dtype=np.uint16)
    ours = decode(every.view(np.float16), "float16")
    theirs = torch.from_numpy(every.view(np.float16)).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_other_dtypes_are_refused():
    with pytest.raises(InvalidInput, match=r"'float8' cannot be stored; use one of bfloat16, float16, float32"):
        check_dtype("float8")
