"""Building the argument by which a request asks for capture and interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from millpond.store.capture_spec import RequestArgs, first_problem
from millpond.store.errors import InvalidInput
from millpond.store.interventions import Intervention


def capture_params(
    run: str | None = None,
    *,
    hooks: str | Sequence[str] | None = None,
    positions: str | Sequence[int] = "all",
    id: str | None = None,  # noqa: A002 - the field's name
    reads: Sequence[Mapping[str, Any]] | None = None,
    intervene: Sequence[Mapping[str, Any] | Intervention] = (),
    capture: bool = True,
    http: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """What a request says to be captured or steered.

    `SamplingParams(extra_args=capture_params(...))` offline; over HTTP
    `client.completions.create(..., extra_body={"vllm_xargs": capture_params(..., http=True)})`.

    Args:
        run: destination; the server's own where it is left out.
        hooks: names or globs, for a run that is made by this request; by default all that the server
            taps, or none if it has reads.
        positions: `all`, `prompt`, `generated`, `last`, or a list.
        id: the prompt's id in the run; minted where it is left out.
        reads: for such a run, what is computed of each row and kept, such as `{"read": "probe", "artifact": "lie", "hook":
            "blocks.3.hook_resid_post"}` or `{"read": "sae_topk", "artifact": "sae", "hook": ..., "k": 32}`; without
            `hooks`, in place of rows.
        intervene: interventions, each an object as docs/capture.md describes or one of `millpond.store.interventions`.
        capture: whether anything is captured at all; False only intervenes.
        http: one JSON string, which is all that `vllm_xargs` takes.
        **more: further fields of the capture, such as `first_position`.

    Raises:
        InvalidInput: a field cannot be used; the server would refuse it.
    """
    asked: dict[str, Any] = {}
    if capture:
        given = {"run": run, "hooks": [hooks] if isinstance(hooks, str) else hooks, "reads": reads, "id": id}
        asked["capture"] = {name: value for name, value in given.items() if value is not None}
        asked["capture"] |= {"positions": positions, **more}
    elif any(value is not None for value in (run, hooks, reads, id)) or more or positions != "all":
        raise InvalidInput("capture=False, but run, hooks, reads, positions, id or another field of a capture is given")
    if intervene:
        asked["intervene"] = [_object(one) for one in intervene]
    if not asked:
        raise InvalidInput("capture=False and no interventions: nothing is asked for")
    try:
        checked = RequestArgs.model_validate(asked)
    except ValidationError as error:
        raise InvalidInput(first_problem(error, RequestArgs)) from error
    if http:
        return {"millpond": checked.model_dump_json(exclude_unset=True)}
    return {"millpond": checked.model_dump(mode="json", exclude_unset=True)}


def _object(given: Any) -> Any:
    """An intervention with its `op`, which nobody sets who names the class."""
    if not isinstance(given, BaseModel):
        return given
    return given.model_dump(mode="json", exclude_unset=True) | {"op": getattr(given, "op", None)}
