"""Completions as they come from the gateway: coded under a model that both sides build from one dictionary."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from millpond.store.errors import InvalidInput, TextVersionUnknown

if TYPE_CHECKING:
    from millpond.hub.textmodel import TextModel


class TextReader:
    """The dictionary of this side. It is read when the first text comes."""

    def __init__(self, dictionary: Path | None, expected: str | None, version: int | None = None) -> None:
        self.dictionary = dictionary
        self.expected = expected
        """SHA-256 of the gateway's, as it says when the two meet; None if it sends no texts."""
        self.version = version
        """Of the gateway's model, as it says then."""
        self._model: TextModel | None = None

    def check(self) -> None:
        """Check that texts could be read, before any are asked for.

        Raises:
            InvalidInput: the gateway has no dictionary, or this side none or another.
            TextVersionUnknown: the gateway codes texts under another version of the model.
        """
        self._read()

    def decode(self, coded: bytes, count: int, limit: int | None = None) -> list[str]:
        """The `count` texts of an answer, cut at `limit` bytes.

        Raises:
            InvalidInput: as `check`, or they are no such texts.
        """
        from millpond.hub.textcode import decode

        return decode(coded, count, self._read(), limit)

    def _read(self) -> TextModel:
        if self._model is not None:
            return self._model
        from millpond.hub.textmodel import VERSION, TextModel

        if self.expected is None:
            raise InvalidInput("this gateway has no dictionary, so no texts leave; ask for rates")
        if self.version != VERSION:
            raise TextVersionUnknown(
                f"the gateway codes texts under version {self.version} of the model, this client has {VERSION}; install the "
                "gateway's version of millpond"
            )
        if self.dictionary is None:
            raise InvalidInput(
                "texts are coded with a dictionary; get the gateway's file and set MILLPOND_DICTIONARY, or connect(dictionary=...)"
            )
        try:
            data = self.dictionary.read_bytes()
        except OSError as error:
            raise InvalidInput(
                f"the dictionary {self.dictionary} cannot be read: {error}; set MILLPOND_DICTIONARY"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.expected:
            raise InvalidInput(
                f"the dictionary {self.dictionary} has SHA-256 {found[:12]}..., the gateway's {self.expected[:12]}...; "
                "get the gateway's file"
            )
        self._model = TextModel(data)
        return self._model
