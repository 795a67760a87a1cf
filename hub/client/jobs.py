"""Estimators, columns and labels as the wire models of jobs, checked before anything is sent."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from millpond.hub.client.run import RemoteColumn, RemoteLabel, RemoteRun
from millpond.hub.kinds import parse_job
from millpond.hub.kinds.base import Job
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    pass


def wire(job: Job) -> dict[str, Any]:
    """The job as JSON values, without what was not given."""
    return job.model_dump(mode="json", exclude_unset=True)


def job_of(kind: str, parts: Mapping[str, Any]) -> Job:
    """The job of `kind` from the parts that estimators and expressions give.

    Raises:
        InvalidInput: rows or labels are not of a remote run, do not belong together, or a value cannot be sent.
    """
    makers = {
        "probe": _probe, "evaluate": _evaluate, "sweep": _sweep, "release": _release, "sae_train": _sae_train,
        "latents": _latents, "expression": _expression, "generate": _generate, "sae_cross_entropy": _sae_cross_entropy,
    }  # fmt: skip
    if kind not in makers:
        raise InvalidInput(f"there is no job of kind {kind!r} with these parts; kinds are {', '.join(makers)}")
    return _checked({"kind": kind} | makers[kind](parts))


def capture_job(
    prompts: Any,
    *,
    model: str,
    name: str,
    hooks: str | Sequence[str],
    adapter: str | None = None,
    positions: Any = "all",
    max_new_tokens: int = 0,
    interventions: Sequence[Any] = (),
) -> Job:
    """See `RemoteLake.capture`."""
    given = getattr(prompts, "handle", None)
    sent = given or _plain(prompts)
    chosen = positions if isinstance(positions, Mapping) else {"positions": positions}
    return _checked(
        {
            "kind": "capture",
            "model": model,
            "adapter": adapter,
            "name": name,
            "prompts": sent,
            "hooks": [hooks] if isinstance(hooks, str) else list(hooks),
            "positions": chosen,
            "max_new_tokens": max_new_tokens,
            "interventions": [_edit(one) for one in interventions],
        }
    )


def _generate(parts: Mapping[str, Any]) -> dict[str, Any]:
    """See `RemoteLake.generate`."""
    given = dict(parts)
    prompts, score = given.pop("prompts"), given.pop("score", None)
    sampling = {name: given.pop(name) for name in ("max_tokens", "temperature", "seed", "n", "stop") if name in given}
    if isinstance(score, str):
        score = {"regex": score}
    elif isinstance(score, Mapping):
        probe = getattr(score.get("probe"), "remote_", score.get("probe"))
        handle = getattr(probe, "handle", None)  # of an estimator or an artifact; a handle itself has none
        score = dict(score) if handle is None else {**score, "probe": handle}
    elif isinstance(score, Sequence):
        score = {"contains": list(score)}
    return given | {
        "prompts": getattr(prompts, "handle", None) or _plain(prompts),
        "sampling": {name: value for name, value in sampling.items() if value is not None},
        "score": score,
        "interventions": [_edit(one) for one in given.get("interventions", ())],
    }


def _sae_cross_entropy(parts: Mapping[str, Any]) -> dict[str, Any]:
    """See `RemoteLake.sae_cross_entropy`."""
    given = dict(parts)
    sae, prompts = given.pop("artifact"), given.pop("prompts")
    held = getattr(sae, "remote_", sae)
    if isinstance(prompts, RemoteColumn):
        raise InvalidInput(f"prompts is a hook's activations; give the rows themselves, run {prompts.run.name!r}")
    sent = prompts.rows if isinstance(prompts, RemoteRun) else getattr(prompts, "handle", None) or _plain(prompts)
    return given | {"artifact": getattr(held, "handle", held), "prompts": sent}


def _plain(prompts: Any) -> list[dict[str, Any]]:
    return [{"id": row["id"], "text": row["text"]} for row in prompt_rows(prompts)]


def graph_job(module: Any, data: Any, labels: Any = None, **options: Any) -> Job:
    """See `RemoteLake.graph`."""
    try:
        from millpond.hub.trace import trace
    except ImportError as error:
        raise InvalidInput("tracing a module needs PyTorch on this machine; pip install torch") from error
    column = _column(data)
    test = options.pop("test", None)
    graph, values = trace(module, column.run.d_model, labels=labels is not None)
    return _checked(
        {
            "kind": "graph",
            "graph": graph,
            "values": base64.b64encode(values).decode(),
            "hook": column.hook,
            "label": None if labels is None else _label(column, labels),
            "rows": column.run.rows,
            "test": None if test is None else _same_hook(column, test).run.rows,
            **options,
        }
    )


def prompt_rows(prompts: Any) -> list[dict[str, Any]]:
    """Prompts as mappings with `id` and `text`, numbered where they have no ids.

    Raises:
        InvalidInput: one has no text, or two have one id.
    """
    if hasattr(prompts, "to_dict"):
        prompts = prompts.to_dict("records")
    rows = []
    for number, given in enumerate(_several(prompts)):
        row = {"text": given} if isinstance(given, str) else dict(given)
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise InvalidInput(f"prompt {number} has no text; give texts, or mappings with id and text")
        rows.append(row | {"id": str(row.get("id", number))})
    if len({row["id"] for row in rows}) != len(rows) or not rows:
        raise InvalidInput(f"the {len(rows)} prompts do not have an id each; give ids that differ, or none")
    return rows


def _several(prompts: Any) -> Iterable[Any]:
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidInput(
            f"prompts is a {type(prompts).__name__}; give a list of texts or of mappings with id and text"
        )
    return prompts


def _probe(parts: Mapping[str, Any]) -> dict[str, Any]:
    column, test = _column(parts["data"]), parts.get("test")
    label = _label(column, parts["labels"])
    found = {"estimator": parts["estimator"], "hook": column.hook, "label": label, "train": column.run.rows}
    if test is None:
        return found
    rows = _same_hook(column, test[0])
    if _label(rows, test[1]) != label:
        raise InvalidInput(f"the test label is {test[1].name!r}, not {label!r}; give the same")
    return found | {"test": rows.run.rows}


def _evaluate(parts: Mapping[str, Any]) -> dict[str, Any]:
    column, labels = _column(parts["data"]), parts["labels"]
    return {
        "artifact": parts["artifact"].handle,
        "hook": column.hook,
        "label": None if labels is None else _label(column, labels),
        "rows": column.run.rows,
    }


def _sweep(parts: Mapping[str, Any]) -> dict[str, Any]:
    train, test = (_run(parts[name]) for name in ("train", "test"))
    for run in (train, test):
        run.match(parts["hooks"])
    for name in parts["labels"]:
        if name not in train.labels or name not in test.labels:
            train.labels[name], test.labels[name]
    return {
        "estimator": parts["estimator"],
        "hooks": list(parts["hooks"]),
        "labels": list(parts["labels"]),
        "train": train.rows,
        "test": test.rows,
        "control": parts["control"],
    }


def _release(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"artifact": parts["artifact"].handle}


def _sae_train(parts: Mapping[str, Any]) -> dict[str, Any]:
    column, test, tokens = _column(parts["data"]), parts.get("test"), parts.get("tokens")
    rows = column.run.n_rows
    if tokens is None:
        if rows is None:
            raise InvalidInput("tokens is not given, and only the vault can count these rows; say how many to train on")
        tokens = rows * parts.get("epochs", 1)
    found = {"estimator": parts["estimator"], "hooks": [column.hook], "rows": column.run.rows, "tokens": tokens}
    if test is None:
        return found
    return found | {"test": _same_hook(column, test[0] if isinstance(test, tuple) else test).run.rows}


def _latents(parts: Mapping[str, Any]) -> dict[str, Any]:
    column = _column(parts["data"])
    return {
        "artifact": parts["artifact"].handle,
        "hook": column.hook,
        "rows": column.run.rows,
        "latents": [int(one) for one in parts["latents"]],
        "contexts": parts["contexts"],
    }


def _expression(parts: Mapping[str, Any]) -> dict[str, Any]:
    run = _run(parts["run"])
    for name in parts["expression"].labels:
        run.labels[name]
    return {"rows": run.rows, "expression": parts["expression"].to_wire() | {"run": run.view.handle}}


def _checked(values: dict[str, Any]) -> Job:
    plain = {
        key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value for key, value in values.items()
    }
    return parse_job({key: value for key, value in plain.items() if value is not None})


def _column(data: Any) -> RemoteColumn:
    if not isinstance(data, RemoteColumn):
        raise InvalidInput(f"the rows are a {type(data).__name__}; give a hook of a remote run, such as run[hook]")
    return data


def _run(given: Any) -> RemoteRun:
    if not isinstance(given, RemoteRun):
        raise InvalidInput(f"a {type(given).__name__} was given; give a run of the same remote lake")
    return given


def _same_hook(column: RemoteColumn, other: Any) -> RemoteColumn:
    found = _column(other)
    if found.hook != column.hook:
        raise InvalidInput(f"the test rows are of {found.hook}; give rows of {column.hook}")
    return found


def _label(column: RemoteColumn, labels: Any) -> str:
    """The name of a label of exactly the column's rows."""
    if not isinstance(labels, RemoteLabel):
        raise InvalidInput(
            f"the labels are a {type(labels).__name__}; send them once with run.labels.add(name, values) and give "
            "run.labels[name]"
        )
    if labels.run.rows != column.run.rows:
        raise InvalidInput(f"label {labels.name!r} is of other rows than {column.hook}; take both from the same part")
    return labels.name


def _edit(given: Any) -> Any:
    """An intervention as JSON values; estimators and artifacts by their handles."""
    values = dict(given.model_dump(exclude_unset=True), op=given.op) if hasattr(given, "model_dump") else dict(given)
    for name in ("vector", "artifact", "run"):
        held = getattr(values.get(name), "remote_", values.get(name))
        if isinstance(held, RemoteRun):
            values[name] = held.view.handle
        elif held is not None and hasattr(held, "handle"):
            values[name] = held.handle
    return values
