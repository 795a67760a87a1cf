"""What Millpond does in one vLLM worker: which hooks it taps, which rows are whose, and where they go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from millpond.capture.admission import EngineFacts
from millpond.capture.claims import PromptClaims
from millpond.capture.device_requests import DeviceFollower
from millpond.capture.device_saes import DeviceSplice, LatentEdits
from millpond.capture.device_tap import DeviceTaps
from millpond.capture.engine_checks import check_attention, check_engine
from millpond.capture.metrics import FOLDER, MetricsFile, capture_metrics
from millpond.capture.requests import BankedEdit, BankedSplice, Following, PlannedEdit, PlannedRead, RequestFollower
from millpond.capture.sink import LakeSink
from millpond.capture.stages import Confirmed, gather_stages
from millpond.capture.tap import Taps, install_taps, tapped_hooks
from millpond.capture.versions import check_vllm_version
from millpond.store.capture_spec import RequestArgs, read_request_args
from millpond.store.errors import CaptureFailed
from millpond.store.hooks import match_hooks
from millpond.store.interventions import Patch, SpliceSae
from millpond.store.logs import log_as_parent
from millpond.store.reads import ReadSpec
from millpond.store.segment import RunWriter
from millpond.store.stats import compile_pass

_ROOM_FOR_GENERATED = 64
"""Generated tokens of a request that there is room for from its beginning; most requests may generate more than they do."""


class Tapping:
    """Taps the model that a worker has loaded, before anything is compiled, profiled or recorded.

    In a tensor-parallel group every rank intervenes and the first one keeps rows. Of a pipeline each stage keeps
    the rows of its own layers, and the first writes them all.

    Args:
        worker: vLLM's, with `vllm_config` and a `model_runner` that holds the model.

    Raises:
        InvalidInput: the engine is set up in a way that capture does not support.
    """

    def __init__(self, worker: Any) -> None:
        check_vllm_version()
        config = worker.vllm_config
        self._facts = facts = EngineFacts.of(config)
        check_engine(config, on_device=facts.on_device)
        if worker.device.type == "cpu":  # elsewhere vLLM chooses among kernels by the size
            check_attention(config)
        self._runner = runner = worker.model_runner
        model = runner.get_model()  # without what records its graphs
        self._v2 = bool(worker.use_v2_model_runner)
        self._keeps = get_tp_group().rank_in_group == 0
        self._pipeline = get_pp_group()
        n_layers = config.model_config.hf_text_config.num_hidden_layers
        self._taps = taps = Taps(tapped_hooks(model, n_layers, facts.hooks))
        dtype = config.model_config.dtype
        self._follower: RequestFollower
        if facts.on_device:
            taps.device = DeviceTaps(
                len(taps.hooks),
                facts.staging_rows,
                facts.max_tokens,
                facts.d_model,
                dtype,
                facts.edits_per_token,
                facts.bank_rows,
                worker.device,
                self._device_splices(worker.device),
            )
            taps.device.warm_up()
            # what vLLM measured while it loaded the model leaves this out of the memory for keys and values
            runner.model_memory_usage = getattr(runner, "model_memory_usage", 0) + taps.device.nbytes
            self._follower = DeviceFollower(taps.hooks, facts.d_model, dtype, taps.device)
        else:
            self._follower = RequestFollower(taps.hooks, facts.d_model, dtype)
        writes = self._keeps and self._pipeline.rank_in_group == 0
        if writes:
            compile_pass()
        self._sink = LakeSink(self._open_run, facts.queue_bytes, facts.commit_seconds) if writes else None
        self._edit = lru_cache(maxsize=256)(facts.edits.make)
        self._rows = lru_cache(maxsize=256)(facts.edits.rows)
        self._hook_numbers = lru_cache(maxsize=64)(self._numbers_of_run)
        self._reads = lru_cache(maxsize=64)(self._reads_of_run)
        self._planned = lru_cache(maxsize=64)(self._plan_read)
        self._statistics = {"steps": 0, "rows": 0, "bytes": 0, "plan_seconds": 0.0, "take_seconds": 0.0}
        self._run_of: dict[str, str] = {}
        self._claims = PromptClaims() if facts.clients > 1 and self._sink is not None else None
        self._engine = config.parallel_config.data_parallel_index
        self._failed: dict[str, int] = {}
        self._input_ids: Any = None
        self._rank = int(worker.rank)
        self._log = log_as_parent()
        folder = os.environ.get(FOLDER)
        self._metrics = MetricsFile(Path(folder), self.metrics) if folder and self._keeps else None
        install_taps(model, n_layers, taps)
        self._follow_row_order(worker)

    def _device_splices(self, device: torch.device) -> list[tuple[int, DeviceSplice]]:
        """Those at hook points of this worker, which are numbered in this order."""
        facts, number = self._facts, self._taps.number
        here = [(hook, artifact) for hook, artifact in facts.saes if hook in number]
        self._splices = {splice: place for place, splice in enumerate(here)}
        return [
            (
                number[hook],
                DeviceSplice(facts.edits.sae(artifact), facts.max_tokens, facts.latents_per_request, device),
            )
            for hook, artifact in here
        ]

    def _follow_row_order(self, worker: Any) -> None:
        """Plan each step where the runner has put the batch into row order; only it knows that order."""
        name = "prepare_inputs" if self._v2 else "_prepare_inputs"
        prepare = getattr(self._runner, name)

        def prepare_and_plan(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            started = time.perf_counter()
            self._plan(rows_v2(prepared) if self._v2 else rows_v1(self._runner, *args, **kwargs), prepared)
            self._statistics["plan_seconds"] += time.perf_counter() - started
            return prepared

        setattr(self._runner, name, prepare_and_plan)
        if self._pipeline.world_size > 1 and not self._pipeline.is_first_rank and worker.device.type == "cpu":
            _make_room_for_the_stage_before(self._runner)

    def _plan(self, rows: list[tuple[str, int, int]], prepared: Any) -> None:
        ids = prepared.input_ids if self._v2 else self._runner.input_ids.gpu
        if isinstance(self._follower, DeviceFollower):
            self._input_ids = ids
            self._follower.load_step(rows)
        else:
            self._taps.work = self._follower.plan_step(_with_tokens(rows, ids.numpy()))

    def before_step(self, scheduler_output: Any) -> None:
        """Take in the step's new requests, before the runner sees them."""
        self._follower.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            args = read_request_args(request.sampling_params.extra_args) if request.sampling_params else None
            if args is not None:
                self._admit(request.req_id, request.prompt_token_ids, args, request.sampling_params.max_tokens or 1)
        self._taps.work = {}
        self._input_ids = None

    def after_step(self) -> None:
        """Take the rows that the step kept."""
        self._taps.work = {}
        started = time.perf_counter()
        if not isinstance(self._follower, DeviceFollower):
            rows, size = self._follower.take_rows()
        elif self._input_ids is not None:
            rows, size = self._follower.send_rows(self._input_ids)
        else:
            rows = size = 0
        self._statistics["take_seconds"] += time.perf_counter() - started
        self._statistics["steps"] += 1
        self._statistics["rows"] += rows
        self._statistics["bytes"] += size

    def _admit(self, request_id: str, prompt: list[int], args: RequestArgs, max_new: int) -> None:
        n_prompt = len(prompt)
        edits: list[PlannedEdit] = []
        banked: list[BankedEdit] = []
        splices: list[BankedSplice] = []
        for intervention in args.intervene:
            length = n_prompt if isinstance(intervention, Patch) else 0
            for hook in match_hooks(intervention.hook, self._facts.hooks, "the engine has taps at"):
                number = self._taps.number.get(hook)
                if number is None:
                    continue  # another pipeline stage has it
                if self._facts.on_device and isinstance(intervention, SpliceSae):
                    place = self._splices[hook, intervention.artifact]
                    splices.append(BankedSplice(place, intervention, LatentEdits.of(intervention)))
                elif self._facts.on_device:
                    nth = sum(edit.hook == number for edit in banked)
                    banked.append(BankedEdit(number, intervention, self._rows(intervention, hook, length), nth))
                else:
                    edits.append(PlannedEdit(number, intervention, self._edit(intervention, hook, length)))
        following = Following(n_prompt, edits=tuple(edits), banked=tuple(banked), splices=tuple(splices))
        following.see(0, np.array(prompt, np.int32))
        if args.capture is not None and args.capture.id is not None and self._keeps:
            run = self._run_of[args.capture.id] = self._facts.run_spec(args.capture.run).name
            name = args.capture.prompt or args.capture.id
            if self._claims is None or self._claims.take(args.capture.id, run, name):
                following.wish = wish = args.capture
                ends = n_prompt + min(max_new - 1, _ROOM_FOR_GENERATED)
                following.expected = len(wish.select(n_prompt, 0, n_prompt, following.tokens)) + len(
                    wish.select(n_prompt, n_prompt, ends)
                )
                following.hooks = self._hook_numbers(args.capture.run)
                following.reads = self._reads(args.capture.run)
            else:
                reason = f"{name!r} is in run {run!r} already, or is being captured; give every prompt its own id"
                self._follower.fail(args.capture.id, reason)
        self._follower.admit(request_id, following)

    def _numbers_of_run(self, run: str | None) -> tuple[int, ...]:
        number = self._taps.number
        return tuple(number[hook] for hook in self._facts.run_spec(run).hooks if hook in number)

    def _reads_of_run(self, run: str | None) -> tuple[PlannedRead, ...]:
        reads = self._facts.run_spec(run).reads
        return tuple(self._planned(read) for read in reads if read.hook in self._taps.number)

    def _plan_read(self, read: ReadSpec) -> PlannedRead:
        return PlannedRead(self._taps.number[read.hook], read, self._facts.readers.make(read))

    def _open_run(self, name: str) -> RunWriter:
        assert self._facts.lake is not None  # run_spec has found the run in it
        return RunWriter(self._facts.lake.run_storage(name), self._facts.run_spec(name))

    def confirm(self, finished: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        """Write requests of which the client received so many tokens.

        Returns:
            For every request that this worker writes: status (`kept` or `failed`), rows, error and the engine's
            data-parallel rank.
        """
        if not self._keeps:
            return {}
        mine: dict[str, Confirmed] = {}
        runs: dict[str, str] = {}
        for capture_id, n_tokens in finished:
            run = self._run_of.pop(capture_id, None)
            if run is None:
                continue
            runs[capture_id] = run
            try:
                mine[capture_id] = self._follower.confirm(capture_id, n_tokens)
            except CaptureFailed as error:
                mine[capture_id] = error
                self._failed[run] = self._failed.get(run, 0) + 1
        whole = gather_stages(self._pipeline, mine)
        if self._sink is None:
            return {}
        answers: dict[str, dict[str, Any]] = {}
        for capture_id, request in whole.items():
            if isinstance(request, CaptureFailed):
                answer = {"status": "failed", "rows": 0, "error": str(request)}
                self._release([capture_id])
            else:
                answer = {"status": "kept", "rows": len(request.positions), "error": None}
                self._sink.put(runs[capture_id], capture_id, request)
            answers[capture_id] = {**answer, "engine": self._engine}
        return answers

    def drop(self, capture_ids: list[str]) -> None:
        """Let go of requests that were aborted."""
        for capture_id in capture_ids:
            self._follower.drop(capture_id)
            self._run_of.pop(capture_id, None)
        self._release(capture_ids)

    def _release(self, capture_ids: Iterable[str]) -> None:
        if self._claims is not None:
            for capture_id in capture_ids:
                self._claims.release(capture_id)

    def poll(self, capture_ids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """See `LakeSink.poll`: `committed` requests with their rows, and `failed` ones with the reason."""
        committed, failed = self._sink.poll(capture_ids) if self._sink else ({}, {})
        self._release(failed)
        if self._claims is not None:
            for capture_id in committed:
                self._claims.keep(capture_id)
        return {"committed": committed, "failed": failed}

    def commit(self) -> tuple[int, int, str | None]:
        """Commit everything confirmed: rows and prompts committed in all, and what was lost, if anything was."""
        committed = self._sink.commit() if self._sink else (0, 0, None)
        if self._metrics is not None:  # perhaps the last time that somebody asks
            self._metrics.write()
        return committed

    def tell_job(self, job: str) -> None:
        """Whose requests follow: its id goes into every log record of this process."""
        if self._log is not None:
            self._log.job = job

    def metrics(self) -> str:
        """What is counted here in Prometheus' text format; from any thread."""
        counts = None if self._sink is None else self._sink.counts()
        return capture_metrics(self._rank, self.statistics(), [*self._run_of.values()], {**self._failed}, counts)

    def statistics(self) -> dict[str, float]:
        """Counts and seconds since the start, and this process's CPU seconds."""
        found = {**self._statistics, "cpu_seconds": time.process_time()}
        if self._sink is not None:
            sink = self._sink
            found |= {"wait_seconds": sink.waited, "writer_seconds": sink.busy, "written": sink.written_bytes}
        if isinstance(self._follower, DeviceFollower):
            found["ring_wait_seconds"] = self._follower.ring.waited
        return found


def rows_v1(runner: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> list[tuple[str, int, int]]:
    """Each request's id, first position and number of tokens, in the order of vLLM's first model runner."""
    batch = runner.input_batch
    counts = num_scheduled_tokens.tolist()
    starts = batch.num_computed_tokens_cpu[: len(counts)].tolist()
    return list(zip(batch.req_ids, starts, counts, strict=False))


def rows_v2(batch: Any) -> list[tuple[str, int, int]]:
    """The same from what the second model runner's `prepare_inputs` returns."""
    starts, counts = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
    return list(zip(batch.req_ids, starts, counts, strict=True))


def _with_tokens(
    rows: list[tuple[str, int, int]], ids: NDArray[np.int32]
) -> Iterator[tuple[str, int, NDArray[np.int32]]]:
    offset = 0
    for request_id, start, count in rows:
        yield request_id, start, ids[offset : offset + count]
        offset += count


def _make_room_for_the_stage_before(runner: Any) -> None:
    """Where an eager CPU engine skips its warm-up, nobody makes the buffer that later pipeline stages receive into."""
    if getattr(runner, "intermediate_tensors", True) is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=torch.device("cpu")
        )
