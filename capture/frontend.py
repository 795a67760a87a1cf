"""The serving side of capture: what is checked before a request runs, and what its client is told at the end."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millpond.capture.admission import EngineFacts
from millpond.capture.claims import engine_of
from millpond.capture.provenance import adapter_provenance, different_computation
from millpond.capture.settle import Rpc, Settler
from millpond.store.capture_spec import CaptureWish, RequestArgs, read_request_args
from millpond.store.configuration import Allowance
from millpond.store.errors import CaptureFailed, InvalidInput, RunExists
from millpond.store.hooks import match_hooks
from millpond.store.manifest import RunSpec
from millpond.store.reads import ReadSpec


@dataclass
class ServedRun:
    """An open run that requests are captured into."""

    spec: RunSpec
    ids: set[str]
    """Prompt ids that it holds or is about to."""
    allowance: Allowance

    def allow(self, more_bytes: int) -> None:
        """Check the quotas for what is about to be captured, and count it.

        Raises:
            QuotaExceeded: the lake's configuration does not allow it.
        """
        self.allowance.check(more_bytes)
        self.allowance.add(more_bytes)


@dataclass
class Admitted:
    """A checked request that is to be captured."""

    extra: dict[str, Any]
    """What takes the place of the client's `millpond` argument."""
    run: ServedRun
    id: str
    """The prompt's id in the run, as the client knows it."""
    ids: tuple[str, ...]
    """Capture ids, one a sample."""
    prompts: tuple[str, ...]
    """Ids in the run, one a sample."""
    n_prompt: int
    n_tokens: list[int] = field(default_factory=list)
    """Tokens that the client received of each sample."""
    ended: list[str | None] = field(default_factory=list)
    """Why each sample ended."""
    started: bool = False

    @property
    def failed(self) -> str:
        """How a message begins that says why."""
        return f"capture of {self.id!r} into run {self.run.spec.name!r} failed"


class CaptureFrontend:
    """Admits the requests of one engine, or of several equal ones, and reports on them; lives in a process that talks to clients.

    Args:
        facts: what the engine can do.
        provenance: of its model, for the runs that are made for requests.
        rpc: calls the workers of all engines.
        n_engines: data-parallel engines that requests are spread over.
    """

    def __init__(self, facts: EngineFacts, provenance: Mapping[str, Any], rpc: Rpc, n_engines: int = 1) -> None:
        self.facts = facts
        self._n_engines = n_engines
        self._provenance = provenance
        self._settler = Settler(rpc)
        self._runs: dict[str, ServedRun] = {}
        self._adapters: dict[tuple[str, str], dict[str, Any]] = {}

    def admit(
        self,
        extra_args: Mapping[str, Any],
        *,
        n: int,
        max_tokens: int,
        n_prompt: int | None,
        adapter: tuple[str, str] | None,
    ) -> Admitted | dict[str, Any]:
        """Check a request's `millpond` argument.

        Args:
            extra_args: the request's, with `millpond` among them.
            n: samples asked for.
            max_tokens: most tokens generated a sample.
            n_prompt: tokens of the prompt; None where it has none.
            adapter: name and folder of the request's LoRA adapter.

        Returns:
            What to follow; or where nothing is captured, only what takes the argument's place.

        Raises:
            InvalidInput: it cannot be done; the message names the field.
            QuotaExceeded: the lake's configuration does not allow its rows.
        """
        asked = read_request_args(extra_args)
        if asked is None or (asked.capture is None and not asked.intervene):
            raise InvalidInput("millpond: asks for nothing; give capture, intervene or both")
        if n_prompt is None:
            raise InvalidInput("millpond: the prompt is no list of tokens; only text can be captured or intervened in")
        # all that needs no run is checked before one is made
        self.facts.check(asked.model_copy(update={"capture": None}), n_prompt, max_tokens)
        if asked.capture is None:
            return asked.model_dump(mode="json", exclude_none=True)
        wish = asked.capture
        beyond = wish.out_of_reach(n_prompt, n_prompt + max(max_tokens - 1, 0))
        if beyond is not None:
            raise InvalidInput(
                f"millpond.capture.positions: {beyond} is never computed: the prompt has {n_prompt} tokens, at most "
                f"{max_tokens} are generated, and the last one has no activations"
            )
        run = self._run(wish, asked, adapter)
        capture_id = uuid.uuid4().hex  # the engine's own: two runs may hold prompts of one id
        prompt = wish.prompt or wish.id or capture_id
        ids, prompts = (
            (name,) if n == 1 else tuple(f"{name}/{number}" for number in range(n)) for name in (capture_id, prompt)
        )
        for name in prompts:
            if name in run.ids:
                raise InvalidInput(
                    f"millpond.capture.id: {name!r} is in run {run.spec.name!r} already, or is being captured; give every "
                    "prompt its own id, or leave it out"
                )
        rows = len(wish.select(n_prompt, 0, n_prompt))  # of the prompt; what is generated is checked when it is written
        run.allow(n * rows * run.spec.row_bytes())
        names = {"id": capture_id, "prompt": prompt, "run": run.spec.name}
        filled = asked.model_copy(update={"capture": wish.model_copy(update=names)})
        self.facts.check(filled, n_prompt, max_tokens)
        run.ids.update(prompts)
        return Admitted(
            filled.model_dump(mode="json", exclude_none=True), run, prompt, ids, prompts, n_prompt, [0] * n, [None] * n
        )

    def engine_of(self, admitted: Admitted) -> int | None:
        """The engine that has to run a request, where other processes admit requests to several engines too.

        Each process knows the ids that it admitted; ids that clients chose are made unique by the engine that has them.
        """
        minted = admitted.ids[0].partition("/")[0] == admitted.id
        if minted or self._n_engines == 1 or self.facts.clients == 1:
            return None
        return engine_of(admitted.run.spec.name, admitted.id, self._n_engines)

    async def follow(
        self, admitted: Admitted, outputs: AsyncGenerator[Any, None], *, deltas: bool
    ) -> AsyncGenerator[Any, None]:
        """Pass the outputs of an admitted request on; the last one waits until its rows are durable, and says so.

        Args:
            admitted: the request.
            outputs: vLLM's `RequestOutput`s.
            deltas: whether each output holds only new tokens.

        Raises:
            CaptureFailed: none of the request's rows are visible.
        """
        admitted.started = True
        settled = False
        try:
            async with aclosing(outputs) as stream:
                async for output in stream:
                    for sample in output.outputs:
                        count = len(sample.token_ids)
                        before = admitted.n_tokens[sample.index] if deltas else 0
                        admitted.n_tokens[sample.index] = before + count
                        admitted.ended[sample.index] = sample.finish_reason
                    if output.finished:
                        settled = True
                        output.kv_transfer_params = {
                            **(output.kv_transfer_params or {}),
                            "millpond": await self._settle(admitted),
                        }
                    yield output
        finally:
            if not settled:  # aborted, or the client has gone
                self._forget(admitted, admitted.ids)

    def release_unstarted(self, admitted: Admitted) -> None:
        """Let the ids of a request be used again that was admitted but never run."""
        if not admitted.started:
            self.release(admitted, admitted.ids)

    async def _settle(self, admitted: Admitted) -> dict[str, Any]:
        """What the client is told, once every sample that ended by itself is durable."""
        ended = dict(zip(admitted.ids, admitted.ended, strict=True))
        counts = dict(zip(admitted.ids, admitted.n_tokens, strict=True))
        whole = [capture_id for capture_id in admitted.ids if ended[capture_id] not in ("abort", "error")]
        self._forget(admitted, [capture_id for capture_id in admitted.ids if capture_id not in whole])
        results = await asyncio.gather(
            *(self._settler.settle(capture_id, admitted.n_prompt + counts[capture_id]) for capture_id in whole),
            return_exceptions=True,
        )
        rows: dict[str, int] = {}
        engines: set[int] = set()
        failures: list[str] = []
        prompts = dict(zip(admitted.ids, admitted.prompts, strict=True))
        for capture_id, result in zip(whole, results, strict=True):
            if isinstance(result, BaseException):
                failures.append(str(result))
                self.release(admitted, [capture_id])
                admitted.run.allowance.look_again()  # it may be full: the next request is told so before it runs
            else:
                rows[prompts[capture_id]] = result.rows
                engines.add(result.engine)
        if failures:
            kept = f"; of its samples, {', '.join(rows)} are stored" if rows else ""
            raise CaptureFailed(f"{admitted.failed}: {failures[0]}{kept}")
        told = {
            "id": admitted.id,
            "run": admitted.run.spec.name,
            "status": "committed" if len(rows) == len(admitted.ids) else "aborted",
            "rows": sum(rows.values()),
        }
        if self._n_engines > 1 and engines:
            told["engine"] = engines.pop()  # all samples of a request are of one
        return told | ({"samples": rows} if len(admitted.ids) > 1 else {})

    def _forget(self, admitted: Admitted, capture_ids: Sequence[str]) -> None:
        if capture_ids:
            self._settler.drop(capture_ids)
            self.release(admitted, capture_ids)

    def release(self, admitted: Admitted, capture_ids: Sequence[str]) -> None:
        """Let ids of which nothing was stored be used again."""
        for capture_id, prompt in zip(admitted.ids, admitted.prompts, strict=True):
            if capture_id in capture_ids:
                admitted.run.ids.discard(prompt)

    def _run(self, wish: CaptureWish, asked: RequestArgs, adapter: tuple[str, str] | None) -> ServedRun:
        """The destination of a request: made if the lake does not hold it.

        Raises:
            InvalidInput: the run cannot take the request's rows.
        """
        name = wish.run or self.facts.run
        if name is None:
            raise InvalidInput("millpond.capture.run: missing, and the server was started without --run; name a run")
        reads = self.facts.readers.resolve(wish.reads or (), self.facts.hooks)
        hooks = match_hooks(wish.hooks, self.facts.hooks, "capture.hooks: the engine has taps at") if wish.hooks else ()
        if not hooks and not reads:
            hooks = self.facts.hooks
        provenance = {
            **self._provenance,
            "adapter": None if adapter is None else self._adapter(*adapter),
            "interventions": [one.model_dump(mode="json", exclude_none=True) for one in asked.intervene],
        }
        run = self._runs.get(name) or self._load(name, hooks, reads, provenance)
        differs = different_computation(run.spec.provenance, provenance)
        if differs is not None:
            raise InvalidInput(
                f"millpond.capture.run: run {name!r} is of another computation: its {differs} is "
                f"{_short(run.spec.provenance.get(differs))}, the request's {_short(provenance[differs])}; name another run"
            )
        return self._runs.setdefault(name, run)

    def _load(
        self, name: str, hooks: tuple[str, ...], reads: tuple[ReadSpec, ...], provenance: dict[str, Any]
    ) -> ServedRun:
        """The open run called `name`, made now if the lake does not hold it."""
        lake = self.facts.lake
        if lake is None:
            raise InvalidInput("millpond.capture: this server has no lake; start it with --lake")
        with suppress(RunExists):  # made before, or by another server just now
            lake.create_run(
                name,
                hooks=hooks,
                d_model=self.facts.d_model,
                dtype=self.facts.dtype,
                provenance={**provenance, "taps": list(self.facts.hooks)},
                reads=reads,
            )
        run = lake[name]
        if run.state == "sealed":
            raise InvalidInput(f"millpond.capture.run: run {name!r} is sealed and cannot grow; name another run")
        if "fingerprint" in run.provenance:
            raise InvalidInput(
                f"millpond.capture.run: run {name!r} was made by a capture job, which counts its rows and seals it; name "
                "another run"
            )
        ids = {*run.prompts["id"], *run.dropped["id"]}
        return ServedRun(self.facts.run_spec(name), ids, Allowance(lake, name))

    def _adapter(self, name: str, folder: str) -> dict[str, Any]:
        if (name, folder) not in self._adapters:
            self._adapters[name, folder] = adapter_provenance(name, Path(folder))
        return self._adapters[name, folder]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        value = value["name"]
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
