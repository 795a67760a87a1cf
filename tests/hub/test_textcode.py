from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.hub.textcode import decode, encode, most_bytes
from millpond.hub.textmodel import TextModel
from millpond.store.errors import InvalidInput, TextVersionUnknown

DICTIONARY = b"".join(
    b"The residual stream of layer %d is read by the attention heads of layer %d. " % (i, i + 1) for i in range(60)
)


@pytest.fixture(scope="module")
def model():
    return TextModel(DICTIONARY)


@pytest.fixture(scope="module")
def empty():
    return TextModel()


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=4))
def test_texts_come_back_and_never_take_more_than_the_quote(texts, model):
    coded = encode(texts, model)
    assert decode(coded, len(texts), model) == texts
    assert len(coded) <= most_bytes([text.encode() for text in texts])


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab é", max_size=12), max_size=4), limit=st.integers(0, 6))
def test_texts_that_were_cut_need_no_mark_of_their_end(texts, limit, model):
    cut = [text.encode()[:limit].decode(errors="ignore") for text in texts]
    coded = encode(cut, model, limit)
    assert decode(coded, len(cut), model, limit) == cut
    assert len(coded) <= len(encode(cut, model))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=24))
def test_arbitrary_bytes_are_texts_or_refused_and_have_one_code(data, empty):
    try:
        texts = decode(data, 2, empty)
    except InvalidInput:
        return
    assert encode(texts, empty) == data


def test_noise_is_sent_as_it_is(empty):
    noise = hashlib.shake_128(b"noise").digest(400).hex(" ")
    text = "".join(chr(0x4E00 + b) for b in hashlib.shake_128(b"x").digest(200))
    for sample in (noise, text):
        assert len(encode([sample], empty)) <= most_bytes([sample.encode()])


def test_what_the_dictionary_holds_costs_little_and_another_dictionary_cannot_read_it(model, empty):
    text = "The residual stream of layer 71 is read by the attention heads of layer 72."
    coded = encode([text], model)
    assert len(coded) < len(text) / 6
    assert len(encode([text], empty)) > 3 * len(coded)
    with pytest.raises(InvalidInput, match="dictionary"):
        decode(coded, 1, empty)
    assert model.sha256 == hashlib.sha256(DICTIONARY).hexdigest() != empty.sha256


def test_another_process_codes_the_same_bytes(model):
    """With another hash seed: nothing depends on the order of sets, addresses or floats."""
    texts = ["def residual(self):\n    return self.stream\n", "", "attention heads"]
    code = (
        "from millpond.hub.textcode import encode\nfrom millpond.hub.textmodel import TextModel\n"
        f"print(encode({texts!r}, TextModel({DICTIONARY!r})).hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == encode(texts, model).hex()


def test_the_code_of_a_text_is_this_one(model):
    """A change of the model is a change of the wire format: raise the version with it."""
    digest = hashlib.sha256(encode(["The attention heads of layer 3.", "Nothing."], model)).hexdigest()
    assert digest[:16] == "db33589d59c72057"


def test_the_model_of_another_version_is_named(model):
    """An unlikely bit, then the version: in this code a bit of 1 is the lower half of what is left."""
    with pytest.raises(TextVersionUnknown, match="version 9"):
        decode(bytes([0, 255 - 9, 128]), 1, model)


def test_what_came_before_helps_with_what_follows(model):
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."
    assert len(encode([text] * 5, model)) < 1.3 * len(encode([text], model))


def test_too_much_is_refused(model):
    with pytest.raises(InvalidInput, match="in parts"):
        encode(["x" * (1 << 20), "y"], model)
    with pytest.raises(InvalidInput, match="cut it first"):
        encode(["four"], model, 3)
    with pytest.raises(InvalidInput, match="cut it"):
        TextModel(b"x" * (5 << 20))
