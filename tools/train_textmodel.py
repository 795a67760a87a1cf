"""Learns `hub/textmodel.npz`: how far the text coder's model believes what it has counted, and how it mixes.

    python tools/train_textmodel.py            # a quarter of an hour of a core; integers, so every machine learns the same
    python tools/train_textmodel.py --share 0.01 --out /tmp/textmodel.npz        # whether it works, in a minute or two

From docstrings of the standard library that the example's corpus does not hold out: pieces of each fifth are coded with the
other four as the dictionary. The file that is kept was learned by the same steps in a compiled copy of the model, with 500
pieces of each fifth a pass. Another file is another code: raise `textmodel.VERSION` with it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from millpond.hub import textmodel
from millpond.hub.textmodel import CONTEXTS, EDGES, INPUTS, SETS, State, TextModel, logistic

ROOT = Path(__file__).parents[1]
FOLDS = 5
PASSES = ((8, 16, 350), (4, 8, 450), (2, 4, 350))
"""Of each how fast weights (of 2^18) and chances (of 2^10) are learned, and pieces of each fold."""


def untaught() -> tuple[Any, ...]:
    """What a model knows that has learned nothing: counts are chances, and all contexts are as good."""
    squash, _ = logistic()
    maps = [[(10 * b + 4) * 65535 // (10 * (a + b) + 8) for a in EDGES for b in EDGES] for _ in range(CONTEXTS)]
    fresh = [[(10 * b + 4) * 65535 // (10 * (a + b) + 8) for a in range(8) for b in range(8)] for _ in range(CONTEXTS)]
    row = [13107] * CONTEXTS + [3000] * CONTEXTS + [0]
    assert len(row) == INPUTS
    final = [[65536 // len(SETS)] * len(SETS) for _ in range(SETS[0])]
    steps = [min(65535, squash[min(4094, max(0, 128 * step - 1))]) for step in range(33)]
    return (
        maps,
        fresh,
        [[list(row) for _ in range(n)] for n in SETS],
        final,
        [(steps * n) + [0] for n in (256, 7 * 256)],
    )


class Learner(State):
    """A state that changes what it was taught, more slowly, and learns the corrections too."""

    def teach(self, taught: tuple[Any, ...], weights: int, chances: int) -> None:
        """Learn on from `taught`, at these rates."""
        self.maps, self.fresh, self.learned, self.final, self.corrections = taught
        self.rates = weights, chances

    def predict(self) -> int:
        """As the model does, and note which corrections were used."""
        for number, row in enumerate(self.rows):
            place = self.node if number == 1 else row + self.bit
            self.weights[number][place] = self.learned[number][place]
        chance = super().predict()
        at, between = (self.total + 2048) >> 7, (self.total + 2048) & 127
        self.used = [row * 33 + at + (between >= 64) for row in (self.node, self.kind * 256 + self.node)]
        return chance

    def update(self, bit: int) -> None:
        """Learn from `bit`."""
        by_weights, by_chances = self.rates
        target = 65535 if bit else 0
        for table, place in zip(self.corrections, self.used, strict=True):
            table[place] += (target - table[place]) >> 6
        for weights, chance in zip(self.chosen, self.chances, strict=True):
            error = ((bit << 16) - chance) * by_weights
            for at, value in zip(self.ats, self.values, strict=True):
                weights[at] += (value * error + (1 << 17)) >> 18
        for tables, states in ((self.maps, self.states), (self.fresh, self.fresh_states)):
            for number, state in states:
                tables[number][state] += ((target - tables[number][state]) * by_chances) >> 10
        self.mix_update(bit)
        self.advance(bit)


def docstrings() -> bytes:
    """Docstrings of files that are not held out, shuffled."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.gateway import prose

    return prose()[0]


def main() -> None:
    """Learn and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the pieces; less is quicker and learns less")
    parser.add_argument("--out", type=Path, default=Path(textmodel.__file__).with_name("textmodel.npz"))
    given = parser.parse_args()
    text, rng, taught = docstrings(), random.Random(3), untaught()
    size, started = len(text) // FOLDS, time.process_time()
    models = [TextModel(text[: fold * size] + text[(fold + 1) * size :]) for fold in range(FOLDS)]
    for by_weights, by_chances, pieces in PASSES:
        coded = plain = 0.0
        for fold, model in enumerate(models):
            own = text[fold * size : (fold + 1) * size]
            for _ in range(max(round(pieces * given.share), 1)):
                length = rng.randrange(64, 400)
                begin = own.rfind(b" ", 0, rng.randrange(len(own) - length)) + 1
                state = Learner(model)
                state.teach(taught, by_weights, by_chances)
                for byte in own[begin : begin + length]:
                    for shift in range(7, -1, -1):
                        bit = byte >> shift & 1
                        chance = state.predict()
                        coded -= np.log2((chance if bit else 65536 - chance) / 65536)
                        state.update(bit)
                plain += length
        print(f"{coded / plain:.4f} bits a byte of {plain:,.0f}, {time.process_time() - started:.0f} CPU s", flush=True)
    maps, fresh, weights, final, (by_node, by_kind) = taught
    np.savez_compressed(
        given.out,
        maps=np.array(maps, np.uint16), fresh=np.array(fresh, np.uint16), final=np.array(final, np.int32),
        weights=np.concatenate([np.array(one, np.int32) for one in weights]),
        by_node=np.array(by_node, np.uint16), by_kind=np.array(by_kind, np.uint16),
    )  # fmt: skip


if __name__ == "__main__":
    main()
