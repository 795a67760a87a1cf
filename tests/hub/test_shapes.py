from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.hub.bits import BitReader, BitWriter
from millpond.hub.body import (
    BudgetLeft,
    Closed,
    ErrorCode,
    Failure,
    Handles,
    JobStatus,
    Quote,
    ReleasedResult,
    Texts,
    Withheld,
    decode,
    encode,
)  # fmt: skip
from millpond.hub.policy import Disclosure
from millpond.hub.rules import Rule, Verdict
from millpond.hub.shapes import KINDS, Context, result_bytes
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

OWN = Context(Disclosure(), restricted=False)
RESTRICTED = Context(Disclosure(), restricted=True)


def there_and_back(result, context=OWN):
    return decode(encode(ReleasedResult(result), context)).result


@pytest.mark.parametrize(
    ("value", "interval", "sent"),
    [
        (0.873421, None, 0.873),
        (0.873421, (0.86, 0.89), 0.87),  # standard error 0.0077: steps of 0.01
        (0.873421, (0.8733, 0.8735), 0.873),  # never more than three digits
        (0.873421, (0.5, 1.0), 0.8),  # standard error 0.13: steps of 0.2
        (123456.0, None, 123000.0),
        (-0.000123456, None, -0.000123),
        (0.9996, None, 1.0),
        (999.6, None, 1000.0),
        (0.0, None, 0.0),
        (-0.0, None, 0.0),
        (1e-30, None, 0.0),
    ],
)
def test_numbers_keep_what_their_standard_error_supports_and_three_digits_at_most(value, interval, sent):
    result = Result("summary", {"mean": value}, {"mean": interval} if interval else {})
    got = there_and_back(result)["mean"]
    assert got == sent
    assert not math.copysign(1, got) < 0 or sent < 0


def test_nan_is_one_code_whatever_its_payload_and_infinity_is_refused():
    payloads = np.array([0x7FF8000000000000, 0x7FF8DEADBEEF0001, 0xFFF8000000000042], np.uint64).view(np.float64)
    bodies = {encode(ReleasedResult(Result("summary", {"mean": float(value)})), OWN) for value in payloads}
    assert len(bodies) == 1
    assert math.isnan(decode(bodies.pop()).result["mean"])
    with pytest.raises(InvalidInput, match="infinite"):
        encode(ReleasedResult(Result("summary", {"mean": math.inf})), OWN)


@given(values=st.lists(st.floats(-1e11, 1e11), min_size=1, max_size=20), width=st.floats(0, 1e3))
def test_rounding_is_within_half_a_step_and_the_length_tells_nothing(values, width):
    values = np.array(values)
    result = Result("probe-sweep", {"auroc": values, "auroc_low": values - width, "auroc_high": values + width})
    body = encode(ReleasedResult(result), OWN)
    assert len(body) == len(
        encode(ReleasedResult(Result("probe-sweep", {k: v * 0 for k, v in result.values.items()})), OWN)
    )
    sent = decode(body).result["auroc"]
    error = width / 1.96
    top = np.abs(values) + width
    step = np.maximum(error, 10.0 ** (np.floor(np.log10(np.maximum(top, 1e-12))) - 2))
    assert (
        np.abs(sent - values) <= 2.5 * step * 0.5 * 1.03 + 1e-12
    ).all()  # the ladder 1, 2, 5 rounds a step up by 2.5


@pytest.mark.parametrize("k", [None, 3])
def test_vectors_have_six_bits_a_coordinate_and_fewer_where_the_error_says_so(k):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((k, 500) if k else 500)
    result = Result("mean", {"mean": x})
    body = encode(ReleasedResult(result), OWN)
    assert len(body) == 1 + math.ceil((8 + 1 + 36 + 18 * (k or 1) + 6 * x.size + 2) / 8)
    sent = decode(body).result["mean"]
    assert sent.shape == x.shape
    assert np.unique(sent[0] if k else sent).size <= 63
    step = 1.11 * np.abs(x).max(axis=-1, keepdims=True) / 31
    assert (np.abs(sent - x) <= 0.51 * step).all()
    noisy = Result("mean", {"mean": x, "mean_se": np.full(x.shape, np.abs(x).max() / 5)})
    assert np.unique(there_and_back(noisy)["mean"]).size <= (k or 1) * 7  # 3 bits: steps of a third of the largest


def test_counts_of_restricted_prompts_are_suppressed_then_rounded():
    result = Result("confusion", {"table": np.array([[0, 3, 9], [10, 12, 13], [98, 100, 102]])}, {}, {"rows": 447})
    sent = there_and_back(result, RESTRICTED)
    assert sent["table"].tolist() == [[0, 0, 0], [10, 10, 15], [100, 100, 100]]
    assert sent["rows"] == 445
    assert there_and_back(result)["table"].tolist() == result["table"].tolist()


@pytest.mark.parametrize(
    "result",
    [
        Result("weights", {"w": 1.0}),
        Result("summary", {"mean": "secret"}),
        Result("summary", {"mean": np.ones(3)}),
        Result("summary", {"note": 1.0}),
        Result("summary", {"mean": True}),
        Result("mean", {"mean": np.ones((2, 2, 2))}),
        Result("mean", {"mean": np.zeros(4)}),
        Result("mean", {"mean": np.array([1.0, np.nan])}),
        Result("histogram", {"counts": np.array([-1])}),
        Result("histogram", {"counts": np.array([0.5])}),
        Result("histogram", {"counts": np.array([2**41])}),
        Result("latent", {"contexts": np.array([[1, 2, 3]])}),
        Result("latent", {"contexts": np.array([[2**24, 0]])}),
        Result("curve", {"x": np.zeros(70_000)}),
        Result("summary", {"mean": 1.0}, {"mean": (2.0, 1.0)}),
    ],
)
def test_what_may_not_leave_cannot_be_encoded(result):
    with pytest.raises(InvalidInput):
        encode(ReleasedResult(result), OWN)


def test_neither_names_nor_their_order_nor_provenance_are_sent():
    values = {"l0": 12.0, "fvu": 0.25, "mse": 1.5}
    one = Result("sae-evaluation", values, {}, {"rows": 100}, {"hook": "secret"})
    other = Result("sae-evaluation", dict(reversed(values.items())), {}, {"rows": 100}, {"seed": 7})
    assert encode(ReleasedResult(one), OWN) == encode(ReleasedResult(other), OWN)


def test_every_kind_can_be_quoted_and_the_quote_is_exact():
    shapes = {"contexts": (5,), "activations": (5,), "histogram": (32,)}
    result = Result(
        "latent",
        {"density": 0.1, "mean_active": 1.0, "maximum": 9.0, "histogram": np.arange(32), "contexts": np.ones((5, 2), int),
         "activations": np.ones(5)},
        dict.fromkeys(("density", "mean_active", "maximum"), (0.0, 10.0)),
        {"rows": 10, "prompts": 3},
    )  # fmt: skip
    assert len(encode(ReleasedResult(result), OWN)) == result_bytes("latent", shapes)
    lists = "auroc accuracy balanced_accuracy f1 log_loss x y counts means rates scores contexts activations histogram frequency_histogram"
    every = dict.fromkeys(("table", "direction", "mean"), (4, 4)) | dict.fromkeys(lists.split(), (4,))
    for kind in KINDS:
        assert result_bytes(kind, every) > 0
    with pytest.raises(InvalidInput, match="needs the shape"):
        result_bytes("latent", {})


BODIES = [
    Withheld(Verdict("refuse", (Rule.DIFFERENCING, Rule.LABEL_SETS))),
    Withheld(Verdict("review", (Rule.INTERVENED,))),
    Failure(ErrorCode.NOT_FOUND),
    Closed(),
    Quote(123_456),
    BudgetLeft(1000, 3, 64),
    Handles((b"12345678", b"abcdefgh")),
    Texts(b"\x00\xff"),
    JobStatus("running", 7),
    JobStatus("done"),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_bodies_come_back_and_have_one_encoding(body):
    data = encode(body, OWN)
    assert decode(data) == body
    if not isinstance(body, Texts | Handles):
        with pytest.raises(InvalidInput):
            decode(data + b"\0")
        if len(data) > 1:
            with pytest.raises(InvalidInput):
                decode(data[:-1])


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_a_body_or_refused(data):
    with contextlib.suppress(InvalidInput):
        decode(data)


@given(st.lists(st.tuples(st.integers(1, 48), st.data()), max_size=12))
def test_bits_come_back(parts):
    out, expected = BitWriter(), []
    for width, data in parts:
        value = data.draw(st.integers(0, 2**width - 1))
        out.write(value, width)
        expected.append((width, value))
    reader = BitReader(out.done())
    assert [reader.one(width) for width, _ in expected] == [value for _, value in expected]
    reader.check_end()


def test_bits_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match="does not fit 3 bits"):
        BitWriter().write(8, 3)
    reader = BitReader(b"\x01")
    reader.one(4)
    with pytest.raises(InvalidInput, match="after its end"):
        reader.check_end()
