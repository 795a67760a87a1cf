"""Following captured requests through the engine's steps: which tokens are whose, and what is complete."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from millpond.store.capture_spec import CaptureWish, first_problem
from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest


@dataclass
class Following:
    """One captured request that has not been confirmed yet."""

    wish: CaptureWish
    n_prompt: int
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    """Token ids seen, from position 0."""
    seen: int = 0
    """Positions computed so far; recomputing them after a preemption changes nothing."""
    positions: list[NDArray[np.int32]] = field(default_factory=list)
    rows: list[dict[str, NDArray[Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Share:
    """What one request gets of the rows staged in this step."""

    following: Following
    positions: NDArray[np.int32]
    begin: int
    end: int


class RequestFollower:
    """Turns the engine's steps into whole captured requests."""

    def __init__(self, no_rows: dict[str, NDArray[Any]]) -> None:
        self._no_rows = no_rows
        """What a request without wanted rows has: each hook with an array of shape (0, d_model)."""
        self._by_request: dict[str, Following] = {}
        self._by_id: dict[str, Following] = {}
        self._failed: dict[str, str] = {}
        self._shares: list[_Share] = []

    def admit(self, request_id: str, extra_args: dict[str, Any] | None, n_prompt: int) -> None:
        """Follow a new request of the engine, if it asks for capture."""
        asked = (extra_args or {}).get("millpond")
        if asked is None:
            return
        try:
            wish = CaptureWish.model_validate(asked["capture"])
        except (ValidationError, KeyError, TypeError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else repr(error)
            self._failed[request_id] = f"request {request_id}: extra_args['millpond'] is malformed: {reason}"
            return
        if wish.id in self._by_id:
            self._failed[wish.id] = f"request {wish.id!r} was sent twice at once; give each prompt its own id"
            return
        following = Following(wish, n_prompt)
        self._by_request[request_id] = self._by_id[wish.id] = following

    def plan_step(self, batch: list[tuple[str, int, NDArray[np.int32]]]) -> NDArray[np.int64]:
        """The tokens of the coming step to stage.

        Args:
            batch: in row order, each request's id, first position and token ids of this step.
        """
        self._shares = []
        wanted: list[NDArray[np.int64]] = []
        offset = staged = 0
        for request_id, start, tokens in batch:
            following = self._by_request.get(request_id)
            if following is not None:
                stop = start + len(tokens)
                if start > following.seen:
                    self._failed[following.wish.id] = (
                        f"request {following.wish.id!r}: positions {following.seen} to {start - 1} were never computed"
                    )
                positions = following.wish.select(following.n_prompt, following.seen, stop)
                following.tokens.append(tokens[max(following.seen - start, 0) :].copy())
                following.seen = max(following.seen, stop)
                if len(positions):
                    wanted.append(offset + positions.astype(np.int64) - start)
                    self._shares.append(_Share(following, positions, staged, staged + len(positions)))
                    staged += len(positions)
            offset += len(tokens)
        return np.concatenate(wanted) if wanted else np.empty(0, np.int64)

    def take_rows(self, rows: dict[str, NDArray[Any]]) -> None:
        """Hand the rows staged in this step to their requests."""
        for share in self._shares:
            share.following.positions.append(share.positions)
            share.following.rows.append({hook: values[share.begin : share.end] for hook, values in rows.items()})
        self._shares = []

    def forget(self, request_ids: set[str]) -> None:
        """The engine ended these requests; they stay until confirmed or dropped by their capture id."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)

    def confirm(self, capture_id: str, n_tokens: int) -> CapturedRequest:
        """The whole request `capture_id`, of which the client received `n_tokens` prompt and generated tokens.

        Rows that the engine computed past the end are left out. The activations of the last generated
        token are never computed.

        Raises:
            CaptureFailed: rows are missing.
        """
        following = self._by_id.pop(capture_id, None)
        if capture_id in self._failed:
            raise CaptureFailed(self._failed[capture_id])
        if following is None:
            raise CaptureFailed(f"request {capture_id!r} never reached the worker; " + "; ".join(self._failed.values()))
        computed = n_tokens if n_tokens == following.n_prompt else n_tokens - 1
        positions = np.concatenate([np.empty(0, np.int32), *following.positions])
        keep = positions < computed
        expected = following.wish.select(following.n_prompt, 0, computed)
        if not np.array_equal(positions[keep], expected):
            raise CaptureFailed(
                f"request {capture_id!r}: {int(keep.sum())} rows were captured, but {len(expected)} were asked for"
            )
        parts = following.rows or [self._no_rows]
        taken = {hook: np.concatenate([rows[hook] for rows in parts]) for hook in self._no_rows}
        return CapturedRequest(
            id=capture_id,
            token_ids=np.concatenate(following.tokens)[:computed],
            n_prompt_tokens=following.n_prompt,
            positions=positions[keep],
            activations={hook: rows[keep] for hook, rows in taken.items()},
        )
