"""When a job's state becomes visible: at the ends of slots, whose lengths grow with the time since it was submitted.

A state that is looked at costs a byte a slot in which it could change, however often it is looked at. Because slots
grow, a job of T seconds has about (1 + ln(T / T0)) / growth of them, and its end is seen at most `slot_growth` of T late.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from millpond.hub.policy import Charges


def slot_of(elapsed_ms: int, charges: Charges) -> int:
    """The number of the last slot that has ended `elapsed_ms` after submission; 0 in the first slot, when nothing has."""
    number = 0
    for number, end in enumerate(_ends(charges), start=1):
        if end > elapsed_ms:
            return number - 1
    return number


def slot_end_ms(number: int, charges: Charges) -> int:
    """When slot `number`, from 1, ends, in ms after submission; 0 for slot 0."""
    return next(islice(_ends(charges), number - 1, None)) if number else 0


def slots_in(seconds: float, charges: Charges) -> int:
    """The most slots that a job lasting `seconds` can be looked at in: it ends inside the last."""
    return slot_of(int(seconds * 1000), charges) + 2


def _ends(charges: Charges) -> Iterator[int]:
    end = 0
    while True:
        end += max(charges.slot_ms, int(end * charges.slot_growth))
        yield end
