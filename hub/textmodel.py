"""The model under the text coder: chances of the next bit, from a dictionary and the text so far, in integers alone.

As in lpaq (Mahoney, 2005), predictions are mixed of how often each bit followed the last one to seven bytes, the word with
up to two before it, and the two bytes before the last; and of what followed the longest earlier match.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal, localcontext
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

MAX_DICTIONARY = 4 << 20
_ORDERS = (1, 2, 3, 4, 5, 6, 7)
_CONTEXTS = len(_ORDERS) + 5
"""Order 0, the orders, the word, with one and with two words before it, and the two bytes before the last."""
_MASK32 = 0xFFFFFFFF
_MULTIPLIER = 0x2C1B3C6D
_TRAIN = 24_000
"""The dictionary's last bytes, on which the weights are learned while they are not in the counts."""
_MATCH_MIN = 6
_MAPS = 16 * 16


class TextModel:
    """The state that both sides start a text from, made once from the dictionary (seconds) and then only read."""

    def __init__(self, dictionary: bytes = b"") -> None:
        if len(dictionary) > MAX_DICTIONARY:
            raise InvalidInput(f"the dictionary has {len(dictionary):,} bytes of at most {MAX_DICTIONARY:,}; cut it")
        self.dictionary = dictionary
        self.bits = min(22, max(12, (64 * len(dictionary)).bit_length()))
        """Of a table's index: about eight slots a byte of the dictionary."""
        cut = max(0, len(dictionary) - _TRAIN) if len(dictionary) > 2 * _TRAIN else len(dictionary)
        self.maps = [[_first_guess(state) for state in range(_MAPS)] for _ in range(_CONTEXTS)]
        self.match_map = [49152] * 32
        self.weights = [[14000] * (_CONTEXTS + 1) for _ in range(9 * 8 + 256)]
        self.counts, self.matches = _count(dictionary[:cut], self.bits)
        if cut < len(dictionary):
            state = State(self, dictionary[:cut])
            for byte in dictionary[cut:]:
                for shift in range(7, -1, -1):
                    state.predict()
                    state.update(byte >> shift & 1)
            self.maps, self.match_map, self.weights = state.maps, state.match_map, state.weights
            self.counts, self.matches = _count(dictionary, self.bits)

    @cached_property
    def sha256(self) -> str:
        """The dictionary's; client and vault compare it when they connect."""
        return hashlib.sha256(self.dictionary).hexdigest()


@cache
def _logistic() -> tuple[list[int], list[int]]:
    """65536 / (1 + exp(-x / 256)) for x from -2047 to 2047, and its inverse over 4096 levels; exact, hence decimal."""
    with localcontext() as context:
        context.prec = 30
        squash = [int(65536 / (1 + (Decimal(-x) / 256).exp())) for x in range(-2047, 2048)]
    stretch, x = [], 0
    for level in range(4096):
        while x < 4094 and squash[x] < level * 16 + 8:
            x += 1
        stretch.append(x - 2047)
    return squash, stretch


_SEEN = (
    [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 9]
    + [10] * 8
    + [11] * 16
    + [12] * 24
    + [13] * 64
    + [14] * 64
    + [15] * 64
)
"""A count, up to 255, as one of 16 levels."""


def _first_guess(state: int) -> int:
    """Of the chance (of 65536) that the next bit is 1, from the levels of both counts."""
    zeros, ones = state >> 4, state & 15
    return (2 * ones + 1) * 65535 // (2 * (zeros + ones + 1))


def _count(text: bytes, bits: int) -> tuple[list[Any], dict[int, int]]:
    """How often a 0 and a 1 followed each context (high and low byte), and where each six bytes were last seen."""
    size = 1 << bits
    data = np.frombuffer(text, np.uint8)
    if not len(data):
        return [_flat(np.zeros(size, np.uint16)) for _ in range(_CONTEXTS)], {}
    follows = np.stack([(data >> np.uint8(7 - level)) & 1 for level in range(8)]).astype(np.int64)
    nodes = np.stack([(1 << level) | (data.astype(np.uint64) >> np.uint64(8 - level)) for level in range(8)])
    tables = []
    for key in _all_hashes(data):
        places = _slots(key, nodes, bits).astype(np.int64) * 2 + follows
        pairs = np.bincount(places.ravel(), minlength=2 * size)
        zeros, ones = pairs[0::2], pairs[1::2]
        most = np.maximum(np.maximum(zeros, ones), 255)
        tables.append(_flat(((zeros * 255 // most) << 8 | (ones * 255 // most)).astype(np.uint16)))
    if len(text) < _MATCH_MIN:
        return tables, {}
    ends = np.append(_hash_of_last(data, _MATCH_MIN)[_MATCH_MIN:], _next_hash(data, _MATCH_MIN))
    return tables, dict(zip(ends.tolist(), range(_MATCH_MIN, len(text) + 1), strict=True))


def _flat(table: NDArray[np.uint16]) -> Any:
    """The same numbers, which plain indexing reads several times as fast as an array's."""
    return memoryview(table)  # type: ignore[arg-type]


def _slots(key: NDArray[np.uint64], node: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    mixed = (key + node * np.uint64(0x9E3779B1)) & np.uint64(_MASK32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(_MULTIPLIER) & np.uint64(_MASK32)
    return np.asarray(mixed >> np.uint64(32 - bits))


def _hash_of_last(data: NDArray[np.uint8], order: int) -> NDArray[np.uint64]:
    """For each place the hash of the `order` bytes before it (zeros before the beginning)."""
    total = np.full(len(data), order, np.uint64)
    padded = np.concatenate([np.zeros(order, np.uint8), data]).astype(np.uint64)
    for back in range(order, 0, -1):
        total = (
            (total + padded[order - back : order - back + len(data)] + np.uint64(1)) * np.uint64(_MULTIPLIER)
        ) & np.uint64(_MASK32)
    return total


def _next_hash(data: NDArray[np.uint8], order: int) -> np.uint64:
    return np.uint64(_hash(bytes(data[-order:]).rjust(order, b"\0"), order))


def _hash(tail: bytes, order: int) -> int:
    total = order
    for byte in tail:
        total = (total + byte + 1) * _MULTIPLIER & _MASK32
    return total


def _is_word(byte: int) -> bool:
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte == 95 or byte > 127


def _all_hashes(data: NDArray[np.uint8]) -> list[NDArray[np.uint64]]:
    keys = [np.zeros(len(data), np.uint64)] + [_hash_of_last(data, order) for order in _ORDERS]
    words = np.zeros((3, len(data)), np.uint64)
    tracker = _Words()
    for place, byte in enumerate(data.tolist()):
        words[:, place] = tracker.word, tracker.pair, tracker.triple
        tracker.add(byte)
    padded = np.concatenate([np.zeros(3, np.uint8), data]).astype(np.uint64)
    skip = np.full(len(data), 9, np.uint64)
    for offset in (0, 1):
        skip = (skip + padded[offset : offset + len(data)] + np.uint64(1)) * np.uint64(_MULTIPLIER) & np.uint64(_MASK32)
    return [*keys, *words, skip]


class _Words:
    """Hashes of the word being written, and of it with the word before."""

    def __init__(self) -> None:
        self.current = self.previous = 0
        self.before = 0
        self.word = self.pair = self.triple = 77

    def add(self, byte: int) -> None:
        if _is_word(byte):
            self.current = (self.current + byte + 1) * _MULTIPLIER & _MASK32
        elif self.current:
            self.before, self.previous, self.current = self.previous, self.current, 0
        self.word = (self.current + 77) if _is_word(byte) else (self.previous * 3 + byte + 991) & _MASK32
        self.pair = (self.word * 0x2545F491 + self.previous) & _MASK32
        self.triple = (self.pair * 0x2545F491 + self.before) & _MASK32


class State:
    """The model while a text goes through it: predictions bit by bit, learning from each."""

    def __init__(self, model: TextModel, before: bytes) -> None:
        self.squash, self.stretch = _logistic()
        self.tables = model.counts
        self.shift = 32 - model.bits
        self.new: list[dict[int, int]] = [{} for _ in range(_CONTEXTS)]
        self.matches, self.new_matches = model.matches, dict[int, int]()
        self.maps = [list(values) for values in model.maps]
        self.match_map = list(model.match_map)
        self.weights = [list(values) for values in model.weights]
        self.text = bytearray(before)
        self.words = _Words()
        for byte in before[-256:]:
            self.words.add(byte)
        self.node = 1
        self.match_at = self.match_length = 0
        self._next_byte()

    def _next_byte(self) -> None:
        text = self.text
        self.keys = [0]
        tail = bytes(text[-7:]).rjust(7, b"\0")
        for order in _ORDERS:
            self.keys.append(_hash(tail[7 - order :], order))
        self.keys += [self.words.word, self.words.pair, self.words.triple, _hash(tail[4:6], 9)]
        if self.match_length and self.match_at < len(text) - 1 and text[self.match_at] == text[-1]:
            self.match_at += 1
            self.match_length += 1
        else:
            self.match_length = 0
        if len(text) >= _MATCH_MIN:
            key = self.keys[_MATCH_MIN]
            if not self.match_length:
                found = self.new_matches.get(key) or self.matches.get(key)
                if found is not None and found < len(text):
                    self.match_at = found
                    self.match_length = _common_end(text, found)
            self.new_matches[key] = len(text)

    def predict(self) -> int:
        """The chance of a 1, from 32 to 65504 of 65536."""
        node = self.node
        mix = node * 0x9E3779B1
        slots, states, inputs, longest = [], [], [], 0
        for number in range(_CONTEXTS):
            slot = (self.keys[number] + mix) & _MASK32
            slot = ((slot ^ (slot >> 15)) * _MULTIPLIER & _MASK32) >> self.shift
            counts = self.new[number].get(slot)
            if counts is None:
                counts = self.tables[number][slot]
            slots.append(slot)
            state = _SEEN[counts >> 8] << 4 | _SEEN[counts & 255]
            states.append((counts, state))
            if counts:
                inputs.append(self.stretch[self.maps[number][state] >> 4])
                if number < 8:
                    longest = number
            else:
                inputs.append(0)
        self.expected = -1
        if self.match_length:
            byte = self.text[self.match_at] | 256
            level = node.bit_length() - 1
            if byte >> (8 - level) == node:
                self.expected = byte >> (7 - level) & 1
                self.match_slot = min(31, self.match_length)
                guess = self.stretch[self.match_map[self.match_slot] >> 4]
                inputs.append(guess if self.expected else -guess)
            else:
                self.match_length = 0
                inputs.append(0)
        else:
            inputs.append(0)
        self.chosen = (self.weights[longest * 8 + node.bit_length() - 1], self.weights[72 + node])
        self.chances = []
        both = 0
        for chosen in self.chosen:
            total = 0
            for weight, value in zip(chosen, inputs, strict=True):
                total += weight * value
            total = min(2047, max(-2047, total >> 16))
            both += total
            self.chances.append(self.squash[total + 2047])
        total = both >> 1
        self.slots, self.states, self.inputs = slots, states, inputs
        self.chance = min(65504, max(32, self.squash[min(2047, max(-2047, total)) + 2047]))
        return self.chance

    def update(self, bit: int) -> None:
        """Learn that the bit just predicted was `bit`."""
        target = 65535 if bit else 0
        for chosen, chance in zip(self.chosen, self.chances, strict=True):
            error = (bit << 16) - chance
            for place, value in enumerate(self.inputs):
                chosen[place] += (value * error + (1 << 15)) >> 16
        for number in range(_CONTEXTS):
            counts, state = self.states[number]
            if counts:
                values = self.maps[number]
                values[state] += (target - values[state]) >> 6
            zeros, ones = counts >> 8, counts & 255
            if bit:
                ones = min(255, ones + 1)
                if zeros > 2:
                    zeros = (zeros + 3) >> 1
            else:
                zeros = min(255, zeros + 1)
                if ones > 2:
                    ones = (ones + 3) >> 1
            self.new[number][self.slots[number]] = zeros << 8 | ones
        if self.expected >= 0:
            hit = 65535 if self.expected == bit else 0
            self.match_map[self.match_slot] += (hit - self.match_map[self.match_slot]) >> 6
        self.node = self.node << 1 | bit
        if self.node > 255:
            byte = self.node & 255
            self.node = 1
            self.text.append(byte)
            self.words.add(byte)
            self._next_byte()


def _common_end(text: bytearray, end: int) -> int:
    """How many bytes before `end` equal the last of `text`, up to 32."""
    length = 0
    while length < min(32, end) and text[end - 1 - length] == text[-1 - length]:
        length += 1
    return length
