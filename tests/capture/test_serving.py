"""Capture over the OpenAI API, as a client sees it, against Hugging Face."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

import millpond as mp
from millpond.capture.metrics import SECONDS
from millpond.capture.vllm_cli import memory_arguments
from millpond.cli import main
from millpond.store.errors import InvalidInput
from millpond.store.run import Run
from millpond.store.verify import verify_run
from tests.capture.conftest import HOOK, N_LAYERS, Reference
from tests.capture.serving import Server, make_adapter, merge_by_hand

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {"first": make_adapter(folder / "first", 4, 1), "second": make_adapter(folder / "second", 8, 2)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> Iterator[Server]:
    lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
    lora += [f"{name}={folder}" for name, folder in adapters.items()]
    running = Server(tmp_path_factory.mktemp("serve"), "--max-num-batched-tokens", "64", "--max-num-seqs", "8", *lora)
    yield running
    running.stop()


def prompt_rows(run: Run, prompt_id: str) -> tuple[list[int], list[int], np.ndarray]:
    """Positions, token ids and rows of every layer (n_layers, n_rows, d_model) of one prompt."""
    part = run.select((run.prompts["id"] == prompt_id).to_numpy())
    coordinates = part.tokens.compute()
    rows = np.stack([part[HOOK.format(layer)].values for layer in range(N_LAYERS)])
    return coordinates["position"].values.tolist(), coordinates["token_id"].values.tolist(), rows


def assert_rows(rows: np.ndarray, truth: np.ndarray) -> None:
    error = np.linalg.norm(rows - truth, axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))
    assert error.max() < 1e-4


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["kv_transfer_params"]["millpond"]
    return found


def test_a_mixed_crowd_gets_its_own_rows(server: Server, reference: Reference, python_prompts: list[list[int]]) -> None:
    """Plain and captured, streamed and not, n > 1, stop strings, several runs and positions: all in the same batches."""

    async def crowd() -> list[tuple[str, str, Any, list[int], list[list[int]], dict[str, Any]]]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)

        async def one(number: int, ids: list[int]) -> tuple[str, str, Any, list[int], list[list[int]], dict[str, Any]]:
            run, positions = [("live", "all"), ("crowd-last", "last"), ("crowd-generated", "generated")][number % 3]
            n, stream = 1 + number % 2, number % 4 == 0
            extra = {"vllm_xargs": mp.capture_params(run, id=f"c{number}", positions=positions, http=True)}
            if number % 5 == 4:
                extra = {}
            response: Any = await client.completions.create(
                model="base",
                prompt=ids,
                n=n,
                max_tokens=12,
                temperature=1.0,
                stop=["="] if number % 3 == 0 else None,
                stream=stream,
                extra_body={**extra, "return_token_ids": True},
            )
            generated: list[list[int]] = [[] for _ in range(n)]
            answer: dict[str, Any] = {}
            chunks = [chunk async for chunk in response] if stream else [response]
            for chunk in chunks:
                for choice in chunk.choices:
                    generated[choice.index] += choice.token_ids or []
                answer = (getattr(chunk, "kv_transfer_params", None) or {}).get("millpond", answer)
            return f"c{number}", run, positions, ids, generated, answer

        async with client:
            prompts = [ids for ids in python_prompts if len(ids) > 1]
            return await asyncio.gather(*(one(number, ids) for number, ids in enumerate(prompts)))

    answers = asyncio.run(crowd())
    stopped = 0
    for capture_id, run_name, positions, ids, generated, answer in answers:
        if int(capture_id[1:]) % 5 == 4:
            assert answer == {}
            continue
        assert (answer["id"], answer["run"], answer["status"]) == (capture_id, run_name, "committed")
        run = mp.open(server.lake)[run_name]
        names = [capture_id] if len(generated) == 1 else [f"{capture_id}/{k}" for k in range(len(generated))]
        stored = 0
        for name, new in zip(names, generated, strict=True):
            stopped += len(new) < 12
            tokens = [*ids, *new]
            computed = len(tokens) - 1
            wanted = {
                "all": range(computed),
                "last": [len(ids) - 1],
                "generated": range(len(ids), computed),
            }[positions]
            at, token_ids, rows = prompt_rows(run, name)
            assert at == list(wanted)
            assert token_ids == [tokens[position] for position in wanted]
            if at:
                assert_rows(rows, reference.residuals(tokens[:computed])[:, list(wanted)])
            stored += len(at)
        assert answer["rows"] == stored
    assert stopped > 0  # the stop string cut some of them
    for name in ("live", "crowd-last", "crowd-generated"):
        assert verify_run(mp.open(server.lake)[name]).problems == []


def test_chat_and_several_prompts_are_told_what_was_stored(server: Server, reference: Reference) -> None:
    chat = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 3, "return_token_ids": True}
    response = server.post(chat, millpond={"run": "chat", "id": "plain"}, path="chat/completions")
    assert told(response) == {"id": "plain", "run": "chat", "status": "committed", "rows": told(response)["rows"]}
    body = response.json()
    tokens = body["prompt_token_ids"] + body["choices"][0]["token_ids"]
    at, token_ids, rows = prompt_rows(mp.open(server.lake)["chat"], "plain")
    assert (len(at), token_ids) == (told(response)["rows"], tokens[:-1])
    assert_rows(rows, reference.residuals(tokens[:-1]))
    events = server.post(
        {**chat, "stream": True}, millpond={"run": "chat", "id": "streamed"}, path="chat/completions"
    ).text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    last = json.loads(events[-3].removeprefix("data: "))
    assert (last["choices"], last["object"]) == ([], "chat.completion.chunk")
    assert last["kv_transfer_params"]["millpond"] == told(response) | {"id": "streamed"}
    several = told(server.post({"prompt": ["a", "b = 1"], "max_tokens": 1}, millpond={"run": "several"}))["prompts"]
    table = mp.open(server.lake)["several"].prompts.set_index("id")
    assert {one["id"]: one["rows"] for one in several} == table["n_rows"].to_dict()
    assert len(several) == 2


@pytest.mark.parametrize(
    ("millpond", "words"),
    [
        ({"positions": [500]}, ["positions", "500"]),
        ({"run": "../up"}, ["../up"]),
        ({"hooks": "blocks.1.hook_mlp_out", "run": "new"}, ["capture.hooks", "hook_mlp_out"]),
        ('{"capture": {"positionen": "all"}}', ["capture.positionen", "did you mean 'positions'?"]),
        ('{"capture": {"positions": "some"}}', ["capture.positions", "some"]),
        ("{", ["millpond", "JSON"]),
        ("{}", ["millpond", "nothing"]),
        (
            {"capture": False, "intervene": [{"op": "add", "hook": "blocks.9.hook_resid_post", "vector": "v"}]},
            ["blocks.9"],
        ),
        (
            {"capture": False, "intervene": [{"op": "add", "hook": "blocks.1.hook_resid_post", "vector": [1.0, 2.0]}]},
            ["2 numbers", "256"],
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_wish_is_a_400_that_names_the_field(
    server: Server, millpond: Any, words: list[str], stream: bool
) -> None:
    response = server.post({"prompt": "x = 1", "stream": stream}, millpond=millpond)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert "new" not in mp.open(server.lake)


def test_an_id_is_taken_once_and_beams_are_refused(server: Server) -> None:
    told(server.post({"prompt": "x = 1"}, millpond={"run": "ids", "id": "one"}))
    again = server.post({"prompt": "x = 1"}, millpond={"run": "ids", "id": "one"})
    assert (again.status_code, "'one'" in again.text) == (400, True)
    two = server.post({"prompt": ["x", "y"]}, millpond={"run": "ids", "id": "two"})
    assert (two.status_code, "'two'" in two.text) == (400, True)
    beams = server.post({"prompt": "x = 1", "use_beam_search": True, "n": 2}, millpond={"run": "ids"})
    assert (beams.status_code, "use_beam_search" in beams.text) == (400, True)
    misnamed = server.post({"prompt": "x = 1", "vllm_xargs": {"milpond": "{}"}})
    assert (misnamed.status_code, "did you mean 'millpond'?" in misnamed.text) == (400, True)
    told(server.post({"prompt": "x"}, millpond={"run": "ids", "id": "two"}))  # nothing of the refused one is held
    assert sorted(mp.open(server.lake)["ids"].prompts["id"]) == ["one", "two"]


def test_the_run_of_a_job_is_left_to_it(server: Server) -> None:
    mp.open(server.lake, create=True).create_run(
        "of-a-job", hooks=(HOOK.format(0),), d_model=256, dtype="float32", provenance={"fingerprint": "f"}
    )
    response = server.post({"prompt": "x = 1"}, millpond={"run": "of-a-job", "hooks": [HOOK.format(0)]})
    assert (response.status_code, "made by a capture job" in response.text) == (400, True)
    assert len(mp.open(server.lake)["of-a-job"]) == 0


def test_an_aborted_stream_leaves_nothing(server: Server) -> None:
    """A slow server may see the client leave too late; then the request has ended, and is stored whole."""
    body = {"model": "base", "prompt": "x = 1", "max_tokens": 400, "ignore_eos": True, "stream": True}
    for attempt in range(8):
        name = f"gone-{attempt}"
        xargs = mp.capture_params("aborted", id=name, http=True)
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "vllm_xargs": xargs}, timeout=60
        ) as response:
            next(response.iter_lines())
        while "vllm:num_requests_running{" in (text := httpx.get(f"{server.url}/metrics").text):
            if not any(
                line.startswith("vllm:num_requests_running{") and not line.endswith(" 0.0")
                for line in text.splitlines()
            ):
                break
            time.sleep(0.05)
        told(server.post({"prompt": "y"}, millpond={"run": "aborted", "id": f"stays-{attempt}"}))
        table = mp.open(server.lake)["aborted"].prompts.set_index("id")
        if name not in table.index:
            break
        assert table["n_tokens"][name] == table["n_prompt_tokens"][name] + 399
    else:
        pytest.fail("the server never saw that the client had left")
    assert told(server.post({"prompt": "x = 1"}, millpond={"run": "aborted", "id": name}))["rows"] > 0  # not held


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_write_fails_its_request_and_shows_none_of_its_rows(server: Server, stream: bool) -> None:
    """A run that somebody seals meanwhile takes no more rows."""
    name = f"sealed-{stream}"
    told(server.post({"prompt": "x"}, millpond={"run": name, "id": "before"}))
    assert main(["seal", str(server.lake), name]) == 0
    failed = server.post({"prompt": "x = 1", "stream": stream}, millpond={"run": name, "id": "after"})
    assert failed.status_code == (200 if stream else 500)
    assert "sealed" in failed.text
    assert '"committed"' not in failed.text
    assert mp.open(server.lake)[name].prompts["id"].tolist() == ["before"]
    told(server.post({"prompt": "x"}, millpond={"run": f"{name}-other"}))  # the engine goes on


def test_vllms_metrics_have_what_was_captured(server: Server) -> None:
    """The engine's process counts, the server's process is asked."""

    def value(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"millpond_capture_{name}($|[{{ ])", line))

    time.sleep(1.5 * SECONDS)  # until what other tests wrote is told
    bytes_before = value("written_bytes_total")
    rows = sum(
        told(server.post({"prompt": "x = 1\n" * 5}, millpond={"run": "counted", "id": f"{n}"}))["rows"]
        for n in range(3)
    )
    deadline = time.monotonic() + 30
    while value('committed_rows_total{.*,run="counted"}') < rows and time.monotonic() < deadline:
        time.sleep(0.2)
    assert value('committed_rows_total{.*,run="counted"}') == rows
    assert value('committed_requests_total{.*,run="counted"}') == 3
    assert value("written_bytes_total") - bytes_before == rows * N_LAYERS * mp.open(server.lake)["counted"].d_model * 4
    assert value("open_requests") == 0
    assert value("queue_bytes") == 0
    assert value("cpu_seconds_total") > 0


def test_adapters_and_the_base_share_batches_and_keep_their_rows(
    server: Server, adapters: dict[str, Path], python_prompts: list[list[int]]
) -> None:
    prompts = [ids for ids in python_prompts if 20 < len(ids) < 200][:4]

    async def crowd() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            await asyncio.gather(
                *(
                    client.completions.create(
                        model=model,
                        prompt=ids,
                        max_tokens=1,
                        extra_body={"vllm_xargs": mp.capture_params(f"lora-{model}", id=f"p{number}", http=True)},
                    )
                    for number, ids in enumerate(prompts)
                    for model in ("base", "first", "second")
                )
            )

    asyncio.run(crowd())
    values = {}
    for model in ("base", "first", "second"):
        truth = Reference(torch.float32)
        if model != "base":
            merge_by_hand(truth.model, adapters[model])
        run = mp.open(server.lake)[f"lora-{model}"]
        for number, ids in enumerate(prompts):
            _, token_ids, rows = prompt_rows(run, f"p{number}")
            assert token_ids == ids
            assert_rows(rows, truth.residuals(ids))
            values[model, number] = rows
        adapter = run.provenance["adapter"]
        assert (adapter and adapter["name"]) == (None if model == "base" else model)
    difference = np.abs(values["first", 0] - values["base", 0]).max(axis=(1, 2))
    assert difference.min() > 0.1  # the adapters matter, in every layer
    wrong = server.post({"model": "first", "prompt": "x"}, millpond={"run": "lora-second"})
    assert (wrong.status_code, "adapter" in wrong.text) == (400, True)


def test_without_a_gpu_a_server_leaves_memory_to_others() -> None:
    assert memory_arguments(["model", "--port", "1"]) == ["--kv-cache-memory-bytes", str(2**30)]
    assert memory_arguments(["model", "--kv_cache_memory_bytes=5"]) == []
    assert memory_arguments(["model", "--gpu-memory-utilization", "0.5"]) == []


def test_parameters_are_checked_where_they_are_built() -> None:
    offline = mp.capture_params("r", hooks="blocks.*.hook_resid_post", positions=[0, -1], id="x", first_position=1)
    assert offline == {
        "millpond": {
            "capture": {
                "run": "r",
                "hooks": ["blocks.*.hook_resid_post"],
                "positions": [0, -1],
                "id": "x",
                "first_position": 1,
            }
        }
    }
    over_http = mp.capture_params(
        "r", hooks="blocks.*.hook_resid_post", positions=[0, -1], id="x", first_position=1, http=True
    )
    assert json.loads(over_http["millpond"]) == offline["millpond"]
    for wrong in ({"positions": "some"}, {"nonsense": 1}, {"capture": False}, {"capture": False, "run": "r"}):
        with pytest.raises(InvalidInput):
            mp.capture_params(**wrong)
