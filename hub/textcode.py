"""Text that leaves is coded with an arithmetic coder under a small model that both sides build from one public dictionary.

Only the coded bytes are new to the receiver (Greenblatt, 2024). Every step is integer arithmetic, so both sides get the same
bits on any machine. Texts that the model would lengthen are sent as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.hub.textmodel import State, TextModel
from millpond.store.errors import InvalidInput

MAX_TEXT = 1 << 20
"""Bytes of one answer's texts."""
_MASK32 = 0xFFFFFFFF
_RARE, _END = 256, 384
"""Of 65536: the chance that texts are plain, and that a text ends before the next byte."""


def encode(texts: Sequence[str], model: TextModel) -> bytes:
    """`texts` as one string of bytes to send: never more than `most_bytes` of their UTF-8, usually far fewer.

    Raises:
        InvalidInput: they are longer than `MAX_TEXT` together.
    """
    plain = [text.encode() for text in texts]
    if sum(map(len, plain)) > MAX_TEXT:
        raise InvalidInput(f"the texts have {sum(map(len, plain)):,} bytes of at most {MAX_TEXT:,}; send them in parts")
    coded = _Encoder(model).run(plain, modelled=True)
    return coded if len(coded) < most_bytes(plain) else _Encoder(model).run(plain, modelled=False)


def most_bytes(texts: Sequence[bytes]) -> int:
    """The most bytes that texts of these lengths can take: their own, and the marks of their ends."""
    return sum(map(len, texts)) + -(-(len(texts) * 8 + sum(map(len, texts)) // 64) // 8) + 6


def decode(data: bytes, count: int, model: TextModel) -> list[str]:
    """The `count` texts that `encode` was given, with a model of the same dictionary; who asked for them knows how many.

    Raises:
        InvalidInput: `data` is not what `encode` gives for so many texts with this dictionary.
    """
    try:
        texts = [text.decode() for text in _Decoder(model).run(data, count)]
    except ValueError as error:
        raise InvalidInput(
            f"these {len(data):,} bytes are no texts coded with this dictionary ({error}); use the sender's"
        ) from error
    if encode(texts, model) != data:
        raise InvalidInput(
            f"these {len(data):,} bytes are not the canonical code of texts; use the sender's dictionary"
        )
    return texts


class _Encoder:
    """A carryless binary arithmetic coder with 32-bit bounds."""

    def __init__(self, model: TextModel) -> None:
        self.state = State(model, model.dictionary)
        self.low, self.high = 0, _MASK32
        self.out = bytearray()

    def _bit(self, bit: int, chance: int) -> None:
        middle = self.low + ((self.high - self.low) * chance >> 16)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) >> 24 == 0:
            self.out.append(self.high >> 24)
            self.low = self.low << 8 & _MASK32
            self.high = (self.high << 8 & _MASK32) | 255

    def run(self, texts: Sequence[bytes], *, modelled: bool) -> bytes:
        self._bit(int(not modelled), _RARE)
        for text in texts:
            for byte in text:
                self._bit(0, _END)
                for shift in range(7, -1, -1):
                    bit = byte >> shift & 1
                    self._bit(bit, self.state.predict() if modelled else 32768)
                    if modelled:
                        self.state.update(bit)
            self._bit(1, _END)
        # the shortest bytes inside the last interval; the decoder reads zeros after them
        for length in range(5):
            keep = 32 - 8 * length
            value = -(-self.low >> keep) << keep
            if value <= self.high:
                return bytes(self.out) + value.to_bytes(4, "big")[:length]
        raise AssertionError("four bytes always reach inside the interval")


class _Decoder:
    def __init__(self, model: TextModel) -> None:
        self.state = State(model, model.dictionary)
        self.low, self.high = 0, _MASK32
        self.data, self.place, self.value = b"", 0, 0

    def _bit(self, chance: int) -> int:
        middle = self.low + ((self.high - self.low) * chance >> 16)
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) >> 24 == 0:
            self.low = self.low << 8 & _MASK32
            self.high = (self.high << 8 & _MASK32) | 255
            following = self.data[self.place] if self.place < len(self.data) else 0
            self.place += 1
            self.value = (self.value << 8 & _MASK32) | following
        return bit

    def run(self, data: bytes, count: int) -> list[bytes]:
        self.data, self.place = data, 4
        self.value = int.from_bytes((data + b"\0\0\0\0")[:4], "big")
        modelled = not self._bit(_RARE)
        texts: list[bytes] = []
        total = 0
        while len(texts) < count:
            text = bytearray()
            while not self._bit(_END):
                byte = 0
                for _ in range(8):
                    bit = self._bit(self.state.predict() if modelled else 32768)
                    if modelled:
                        self.state.update(bit)
                    byte = byte << 1 | bit
                text.append(byte)
            total += len(text) + 1
            if total > 2 * MAX_TEXT or self.place > len(data) + 8:
                raise ValueError("the code does not end")
            texts.append(bytes(text))
        return texts
