"""The model under the text coder: chances of the next bit, from a dictionary and the texts so far, in integers alone.

As in paq8 (Mahoney, 2005), predictions are mixed of how often each bit followed a context: the last bytes, the word and words
before it, the column and the kinds of the last characters. What followed a context in the dictionary is counted exactly, in
sorted lists; what followed it in the texts so far is counted beside. How far counts, and predictions, are to be believed was
learned once, from other texts than are coded (`tools/train_textmodel.py`), and is learned on while texts are coded.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache, cached_property
from operator import itemgetter, mul
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

VERSION = 2
"""Of the code: both sides must have the same."""
MAX_DICTIONARY = 4 << 20
ORDERS = 8
"""Contexts of the last bytes: one to six, eight and twelve of them."""
CONTEXTS = 14
"""None; the orders; the word, with the one and with the three before it; the column; kinds of the last eight characters."""
_WORDS = range(ORDERS + 1, ORDERS + 4)
INPUTS = 2 * CONTEXTS + 1
SETS = (72, 256, 224, 384, 2048)
"""Weights of the mixers: each picks one row by what else is known."""
EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 25, 33, 49, 65, 97, 129, 193, 385, 769, 2049, 8193)
"""A count's level is the last of these that it reaches."""
MOST_COUNTED = 16_383
_NEW = 7  # the most that is counted in the texts so far, of each bit
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
_P1, _P2 = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_A, _B, _C, _D, _E = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3
_SMALL = (
    512  # an error of the weights that is not learned from: most bits are foreseen, and learning is most of the work
)
_BEGIN = 32
"""A text begins as after a space."""


class TextModel:
    """The state that both sides start from, made once from the dictionary (seconds) and then only read."""

    def __init__(self, dictionary: bytes = b"") -> None:
        if len(dictionary) > MAX_DICTIONARY:
            raise InvalidInput(f"the dictionary has {len(dictionary):,} bytes of at most {MAX_DICTIONARY:,}; cut it")
        self.dictionary = dictionary
        self.keys, self.followers = _sorted_contexts(dictionary)

    @cached_property
    def sha256(self) -> str:
        """The dictionary's; client and vault compare it when they connect."""
        return hashlib.sha256(self.dictionary).hexdigest()


@cache
def _learned() -> tuple[list[list[int]], list[list[int]], list[list[list[int]]], list[list[int]], list[list[int]]]:
    """What was learned: chances by counts in the dictionary and in the texts, the mixers' weights, corrections of the outcome."""
    with np.load(Path(__file__).with_name("textmodel.npz"), allow_pickle=False) as held:
        weights = np.split(held["weights"], np.cumsum(SETS)[:-1])
        return (
            held["maps"].tolist(), held["fresh"].tolist(), [one.tolist() for one in weights], held["final"].tolist(),
            [held["by_node"].tolist(), held["by_kind"].tolist()],
        )  # fmt: skip


@cache
def logistic() -> tuple[list[int], list[int]]:
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


@cache
def levels() -> bytes:
    """The level of each count up to `MOST_COUNTED`."""
    counts = np.arange(MOST_COUNTED + 1)
    return bytes((np.searchsorted(EDGES, counts, "right") - 1).astype(np.uint8))


def _sorted_contexts(dictionary: bytes) -> tuple[list[Sequence[int]], list[bytes]]:
    """Of each context the keys of all places of the dictionary, sorted, and the bytes there, sorted within a key."""
    history = History()
    found = np.empty((CONTEXTS, len(dictionary)), np.uint64)
    block: list[list[int]] = []
    for place, byte in enumerate(dictionary):
        block.append(history.keys())
        history.add(byte)
        if len(block) == 4096 or place + 1 == len(dictionary):
            found[:, place + 1 - len(block) : place + 1] = np.array(block, np.uint64).T
            block = []
    data = np.frombuffer(dictionary, np.uint8)
    keys: list[Sequence[int]] = []
    followers = []
    for one in found:
        ordered = np.sort(one << np.uint64(8) | data)
        keys.append(_flat((ordered >> np.uint64(8)).astype(np.uint32)))
        followers.append(ordered.astype(np.uint8).tobytes())
    return keys, followers


def _flat(values: NDArray[np.uint32]) -> Any:
    """The same numbers, which plain indexing reads several times as fast as an array's."""
    return memoryview(values)  # type: ignore[arg-type]


_WORD = bytes(48 <= b <= 57 or 65 <= b <= 90 or 97 <= b <= 122 or b == 95 or b > 127 for b in range(256))
_KIND = bytes(
    1 if 97 <= b <= 122 or b > 127 or b == 95 else 2 if 65 <= b <= 90 else 3 if 48 <= b <= 57
    else {32: 4, 10: 5, 46: 6, 44: 6}.get(b, 0)
    for b in range(256)
)  # fmt: skip
"""Letters, capitals, digits, space, end of line, stops, all others."""


class History:
    """What contexts are made of: the last bytes, words, the column and kinds of characters."""

    __slots__ = ("_between", "_column", "_in_word", "_kinds", "_last16", "_words")

    def __init__(self) -> None:
        self._last16 = self._between = self._column = self._kinds = 0
        self._words = [0, 0, 0, 0]
        self._in_word = False
        self.add(_BEGIN)

    def add(self, byte: int) -> None:
        """The next byte."""
        self._last16 = (self._last16 << 8 | byte) & ((1 << 128) - 1)
        words = self._words
        if _WORD[byte]:
            if not self._in_word:
                words.insert(0, 0)
                words.pop()
                self._between, self._in_word = 0, True
            words[0] = (words[0] + (byte | 32 if 65 <= byte <= 90 else byte) + 1) * _P1 & _MASK64
        else:
            if self._in_word:
                self._between, self._in_word = 0, False
            self._between = (self._between + byte + 1) * _P1 & _MASK64
        self._column = 0 if byte == 10 else min(self._column + 1, 100)
        self._kinds = (self._kinds << 3 | _KIND[byte]) & 0xFFFFFF

    @property
    def last(self) -> int:
        """The last byte."""
        return self._last16 & 255

    def keys(self) -> list[int]:
        """The contexts' keys of 32 bits, in the order of `CONTEXTS`."""
        last8, word = self._last16 & _MASK64, self._words
        here = word[0] * _A + self._between * _B
        last = last8 & 255
        return [
            0,
            *[((last8 & (1 << 8 * order) - 1) + (order << 56)) * _P1 >> 32 & _MASK32 for order in range(1, 7)],
            (last8 + _A) * _P1 >> 32 & _MASK32,
            (last8 * _P2 + (self._last16 >> 64 & _MASK32)) * _P1 >> 32 & _MASK32,
            here * _P1 >> 32 & _MASK32,
            (here + word[1] * _C + _D) * _P1 >> 32 & _MASK32,
            (here + word[1] * _D + word[2] * _E + word[3] * _C) * _P1 >> 32 & _MASK32,
            (self._column * 4 + (2 if last == 32 else _WORD[last]) + _B) * _P1 >> 32 & _MASK32,
            (self._kinds + _E) * _P1 >> 32 & _MASK32,
        ]


class State:
    """The model while texts go through it: predictions bit by bit, learning from each."""

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self.squash, self.stretch = logistic()
        self.levels = levels()
        maps, fresh, self.learned, final, self.corrections = _learned()
        self.maps, self.fresh, self.final = ([list(row) for row in table] for table in (maps, fresh, final))
        self.weights: list[dict[int, list[int]]] = [{} for _ in SETS]
        self.seen: list[dict[int, int]] = [{} for _ in range(CONTEXTS)]
        """Of each context its keys and nodes in the texts so far, and what was counted: zeros, and ones in the low byte."""
        self.begin()

    def begin(self) -> None:
        """A text begins. What was learned and counted stays."""
        self.history = History()
        self._next_byte()

    def _next_byte(self) -> None:
        self.keys = self.history.keys()
        self.node, self.bit = 1, 0
        self.low, self.high = [0] * CONTEXTS, [0] * CONTEXTS
        self.found: list[int] = []
        longest = words = 0
        for number, (key, keys) in enumerate(zip(self.keys, self.model.keys, strict=True)):
            low = bisect_left(keys, key)
            if low < len(keys) and keys[low] == key:
                self.low[number], self.high[number] = low, bisect_right(keys, key, low)
                self.found.append(number)
                if 1 <= number <= ORDERS:
                    longest = number
                elif number in _WORDS:
                    words = number - ORDERS
        self.known = [number for number in range(CONTEXTS) if self.keys[number] << 8 | 1 in self.seen[number]]
        kind = _KIND[self.history.last]
        counts = [self.levels[min(self.high[order] - self.low[order], MOST_COUNTED)] for order in (4, 2)]
        self.rows = [longest * 8, 1, words * 56 + kind * 8, min(5, counts[0] // 2) * 64 + min(7, counts[1] // 3) * 8]
        self.rows.append(self.history.last * 8)
        self.kind = kind

    def predict(self) -> int:
        """The chance of a 1, from 32 to 65504 of 65536."""
        stretch, level, node = self.stretch, self.levels, self.node
        ats, values = [INPUTS - 1, 0], [256, 0]  # never one alone, of which itemgetter would make no tuple
        states: list[tuple[int, int]] = []
        middle = (node << 8 - self.bit) & 255 | 128 >> self.bit
        self.middles = []
        for number in self.found:
            low, high = self.low[number], self.high[number]
            cut = bisect_left(self.model.followers[number], middle, low, high)
            zeros, ones = cut - low, high - cut
            if zeros > MOST_COUNTED:
                zeros = MOST_COUNTED
            if ones > MOST_COUNTED:
                ones = MOST_COUNTED
            state = level[zeros] * len(EDGES) + level[ones]
            ats.append(number)
            values.append(stretch[self.maps[number][state] >> 4])
            states.append((number, state))
            self.middles.append(cut)
        fresh = []
        for number in self.known:
            counted = self.seen[number].get(self.keys[number] << 8 | node)
            if counted is not None:
                state = min(counted >> 8, _NEW) << 3 | min(counted & 255, _NEW)
                ats.append(CONTEXTS + number)
                values.append(stretch[self.fresh[number][state] >> 4])
                fresh.append((number, state))
        self.ats, self.values, self.states, self.fresh_states = ats, values, states, fresh
        pick = itemgetter(*ats)
        self.chosen, self.outs, self.chances = [], [], []
        final, total = self.final[self.rows[0] + self.bit], 0
        for number, row in enumerate(self.rows):
            place = node if number == 1 else row + self.bit
            weights = self.weights[number].get(place)
            if weights is None:
                weights = self.weights[number][place] = list(self.learned[number][place])
            out = sum(map(mul, pick(weights), values)) >> 16
            out = -2047 if out < -2047 else 2047 if out > 2047 else out
            self.chosen.append(weights)
            self.outs.append(out)
            self.chances.append(self.squash[out + 2047])
            total += final[number] * out
        self.total = total = min(2047, max(-2047, total >> 16))
        self.mixed = self.squash[total + 2047]
        at, between = (total + 2048) >> 7, (total + 2048) & 127
        chance = 2 * self.mixed
        for table, row in zip(self.corrections, (node, self.kind * 256 + node), strict=True):
            place = row * 33 + at
            chance += (table[place] * (128 - between) + table[place + 1] * between) >> 7
        return min(65504, max(32, chance >> 2))

    def update(self, bit: int) -> None:
        """Learn that the bit just predicted was `bit`."""
        target = 65535 if bit else 0
        inputs = list(zip(self.ats, self.values, strict=True))
        for weights, chance in zip(self.chosen, self.chances, strict=True):
            error = (bit << 16) - chance
            if -_SMALL < error < _SMALL:
                continue
            for at, value in inputs:
                weights[at] += (value * error + (1 << 13)) >> 14
        for number, state in self.states:
            values = self.maps[number]
            values[state] += (target - values[state]) >> 5
        for number, state in self.fresh_states:
            values = self.fresh[number]
            values[state] += (target - values[state]) >> 5
        self.mix_update(bit)
        self.advance(bit)

    def mix_update(self, bit: int) -> None:
        """Learn how far each mixer is to be believed."""
        final, error = self.final[self.rows[0] + self.bit], (bit << 16) - self.mixed
        for number, out in enumerate(self.outs):
            final[number] += (out * error + (1 << 17)) >> 18

    def advance(self, bit: int) -> None:
        """Go on to the next bit, and after eight of them to the next byte."""
        side = self.low if bit else self.high
        for number, cut in zip(self.found, self.middles, strict=True):
            side[number] = cut
        self.found = [number for number in self.found if self.high[number] > self.low[number]]
        self.node, self.bit = self.node << 1 | bit, self.bit + 1
        if self.bit == 8:
            self._count(self.node & 255)
            self.history.add(self.node & 255)
            self._next_byte()

    def _count(self, byte: int) -> None:
        """Count the byte that followed the contexts; what the newer bits contradict is forgotten by half."""
        for key, seen in zip(self.keys, self.seen, strict=True):
            for shift in range(7, -1, -1):
                place = key << 8 | (256 | byte) >> (shift + 1)
                counted = seen.get(place, 0)
                zeros, ones = counted >> 8, counted & 255
                if byte >> shift & 1:
                    ones, zeros = min(255, ones + 1), zeros if zeros <= 2 else (zeros + 2) >> 1
                else:
                    zeros, ones = min(255, zeros + 1), ones if ones <= 2 else (ones + 2) >> 1
                seen[place] = zeros << 8 | ones
