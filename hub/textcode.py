"""Text that leaves is coded with an arithmetic coder under a small model that both sides build from one public dictionary.

Only the coded bytes are new to the receiver (Greenblatt, 2024). Every step is integer arithmetic, so both sides get the same
bits on any machine. Texts that the model would lengthen are sent as they are.

The code begins with one unlikely bit for what is not this version of the model's: a byte follows then, 0 for plain texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.hub.textmodel import VERSION, State, TextModel
from millpond.store.errors import InvalidInput, TextVersionUnknown

MAX_TEXT = 1 << 20
"""Bytes of one answer's texts."""
_MASK32 = 0xFFFFFFFF
_RARE, _END = 256, 384
"""Of 65536: the chance of anything else than this model's code, and that a text ends before the next byte."""
_PLAIN = 0
"""In place of a model's version."""


def encode(texts: Sequence[str], model: TextModel, limit: int | None = None) -> bytes:
    """`texts` as one string of bytes to send: never more than `most_bytes` of their UTF-8, usually far fewer.

    Args:
        texts: what is sent.
        model: of the dictionary that both sides hold.
        limit: UTF-8 bytes at which texts were cut, so that one as long needs no mark of its end; the receiver must know it.

    Raises:
        InvalidInput: they are longer than `MAX_TEXT` together, or one is longer than `limit`.
    """
    plain = [text.encode() for text in texts]
    if sum(map(len, plain)) > MAX_TEXT:
        raise InvalidInput(f"the texts have {sum(map(len, plain)):,} bytes of at most {MAX_TEXT:,}; send them in parts")
    longest = max(map(len, plain), default=0)
    if limit is not None and longest > limit:
        raise InvalidInput(f"a text has {longest:,} bytes and the limit is {limit:,}; cut it first")
    coded = _Encoder(State(model), limit).run(plain)
    return coded if len(coded) < most_bytes(plain) else _Encoder(None, limit).run(plain)


def most_bytes(texts: Sequence[bytes]) -> int:
    """The most bytes that texts of these lengths can take: their own, and the marks of their ends."""
    return sum(map(len, texts)) + -(-(len(texts) * 8 + sum(map(len, texts)) // 64) // 8) + 7


def decode(data: bytes, count: int, model: TextModel, limit: int | None = None) -> list[str]:
    """The `count` texts that `encode` was given, with a model of the same dictionary; who asked for them knows how many.

    Raises:
        TextVersionUnknown: they were coded under another version of the model.
        InvalidInput: `data` is not what `encode` gives for so many texts with this dictionary and limit.
    """
    decoder = _Decoder(model, limit)
    try:
        texts = [text.decode() for text in decoder.run(data, count)]
    except TextVersionUnknown:
        raise
    except ValueError as error:
        raise InvalidInput(
            f"these {len(data):,} bytes are no texts coded with this dictionary ({error}); use the sender's"
        ) from error
    # the decoder has been through the encoder's bounds, so that only the choice to code plainly must be made again
    again = encode(texts, model, limit) if decoder.plain else decoder.canonical()
    if again != data or (not decoder.plain and len(data) >= most_bytes([text.encode() for text in texts])):
        raise InvalidInput(
            f"these {len(data):,} bytes are not the canonical code of texts; use the sender's dictionary"
        )
    return texts


def _last(low: int, high: int) -> bytes:
    """The shortest bytes inside the last interval; the decoder reads zeros after them."""
    for length in range(5):
        keep = 32 - 8 * length
        value = -(-low >> keep) << keep
        if value <= high:
            return value.to_bytes(4, "big")[:length]
    raise AssertionError("four bytes always reach inside the interval")


class _Encoder:
    """A carryless binary arithmetic coder with 32-bit bounds."""

    def __init__(self, state: State | None, limit: int | None) -> None:
        """Without a model's state texts are coded plainly."""
        self.state, self.limit = state, limit
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

    def run(self, texts: Sequence[bytes]) -> bytes:
        state = self.state
        self._bit(int(state is None), _RARE)
        if state is None:
            self._plain(_PLAIN)
        for text in texts:
            for byte in text:
                self._bit(0, _END)
                if state is None:
                    self._plain(byte)
                    continue
                for shift in range(7, -1, -1):
                    bit = byte >> shift & 1
                    self._bit(bit, state.predict())
                    state.update(bit)
            if len(text) != self.limit:
                self._bit(1, _END)
            if state is not None:
                state.begin()
        return bytes(self.out) + _last(self.low, self.high)

    def _plain(self, byte: int) -> None:
        for shift in range(7, -1, -1):
            self._bit(byte >> shift & 1, 32768)


class _Decoder:
    def __init__(self, model: TextModel, limit: int | None) -> None:
        self.model, self.limit = model, limit
        self.low, self.high = 0, _MASK32
        self.data, self.place, self.value = b"", 0, 0
        self.out = bytearray()
        self.plain = False

    def canonical(self) -> bytes:
        """What the encoder would have written for what was decoded."""
        return bytes(self.out) + _last(self.low, self.high)

    def _bit(self, chance: int) -> int:
        middle = self.low + ((self.high - self.low) * chance >> 16)
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) >> 24 == 0:
            self.out.append(self.high >> 24)
            self.low = self.low << 8 & _MASK32
            self.high = (self.high << 8 & _MASK32) | 255
            following = self.data[self.place] if self.place < len(self.data) else 0
            self.place += 1
            self.value = (self.value << 8 & _MASK32) | following
        return bit

    def run(self, data: bytes, count: int) -> list[bytes]:
        self.data, self.place = data, 4
        self.value = int.from_bytes((data + b"\0\0\0\0")[:4], "big")
        self.plain = bool(self._bit(_RARE))
        state = None if self.plain else State(self.model)
        if state is None and (version := self._byte(None)) != _PLAIN:
            raise TextVersionUnknown(
                f"the texts are coded under version {version} of the model, this side has {VERSION}; install the sender's millpond"
            )
        texts: list[bytes] = []
        total = 0
        while len(texts) < count:
            text = bytearray()
            while len(text) != self.limit and not self._bit(_END):
                text.append(self._byte(state))
                if total + len(text) > 2 * MAX_TEXT or self.place > len(data) + 8:
                    raise ValueError("the code does not end")
            total += len(text) + 1
            texts.append(bytes(text))
            if state is not None:
                state.begin()
        return texts

    def _byte(self, state: State | None) -> int:
        byte = 0
        for _ in range(8):
            bit = self._bit(32768 if state is None else state.predict())
            if state is not None:
                state.update(bit)
            byte = byte << 1 | bit
        return byte
