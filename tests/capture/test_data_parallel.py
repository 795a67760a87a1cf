"""Two engines and two API servers that fill one run: every row against Hugging Face, every id once."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import millpond as mp
from millpond.capture.claims import PromptClaims, engine_of
from millpond.capture.metrics import SECONDS
from millpond.store.verify import verify_run
from tests.capture.conftest import Reference
from tests.capture.serving import TWO_CORES, Server
from tests.capture.test_serving import assert_rows, prompt_rows, told


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ranks = ["--data-parallel-size", "2", "--api-server-count", "2", "--max-num-batched-tokens", "64"]
    running = Server(tmp_path_factory.mktemp("ranks"), *ranks, environment=TWO_CORES)
    yield running
    running.stop()


def processes(group: int, title: str) -> Iterator[int]:
    """Ids of the processes of a group that are called so."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(folder.name)) == group and title in (folder / "cmdline").read_text():
                yield int(folder.name)


def ask(server: Server, bodies: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[httpx.Response]:
    """All at once, each over a connection of its own: the kernel spreads connections over the API servers."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda one: server.post(one[0], millpond=one[1]), bodies))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_and_servers_fill_one_run_with_their_own_rows(
    server: Server, reference: Reference, python_prompts: list[list[int]]
) -> None:
    prompts = [ids for ids in python_prompts if len(ids) > 1]
    kinds = [{"n": 1 + number % 2, "max_tokens": 6, "temperature": 1.0} for number in range(len(prompts))]
    asked = [
        ({"prompt": ids, "return_token_ids": True, **kind}, {"id": f"p{number}" if number % 3 else None})
        for number, (ids, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
    responses = ask(server, asked)
    run = mp.open(server.lake)["live"]
    engines: Counter[int] = Counter()
    for (body, wish), response in zip(asked, responses, strict=True):
        answer = told(response)
        engines[answer["engine"]] += 1
        assert wish["id"] in (None, answer["id"])
        if wish["id"] is not None:
            assert answer["engine"] == engine_of("live", wish["id"], 2)
        names = [answer["id"]] if body["n"] == 1 else [f"{answer['id']}/{k}" for k in range(body["n"])]
        for name, choice in zip(names, response.json()["choices"], strict=True):
            tokens = [*body["prompt"], *choice["token_ids"]][:-1]
            at, token_ids, rows = prompt_rows(run, name)
            assert (at, token_ids) == (list(range(len(tokens))), tokens)
            assert_rows(rows, reference.residuals(tokens))
        assert answer["rows"] == run.prompts.set_index("id")["n_rows"][names].sum()
    assert min(engines[0], engines[1]) > len(prompts) // 5
    assert len(run.prompts) == sum(body["n"] for body, _ in asked)
    assert verify_run(run).problems == []
    time.sleep(1.5 * SECONDS)
    shown = httpx.get(f"{server.url}/metrics").text  # whichever server answers knows both engines
    committed = re.findall(r'^millpond_capture_committed_rows_total\{pid="(\d+)".*run="live"\} (\S+)$', shown, re.M)
    assert len({pid for pid, _ in committed}) == 2
    assert sum(float(rows) for _, rows in committed) == run.n_rows


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_id_is_taken_once_whichever_server_admits_it(server: Server) -> None:
    bodies = [{"prompt": f"x = {number}", "max_tokens": 4} for number in range(20)]
    for response in ask(server, [(body, {"run": "once"}) for body in bodies]):
        told(response)  # both servers know the run now
    responses = ask(server, [(body, {"run": "once", "id": "same"}) for body in bodies])
    assert [told(one)["id"] for one in responses if one.status_code == 200] == ["same"]
    # one server knew the id; the other asked the engine, and knows it until it has been told
    assert {one.status_code for one in responses} == {200, 400, 500}
    assert all("'same' is in run 'once' already, or is being captured" in one.text for one in responses if one.is_error)
    stored = mp.open(server.lake)["once"].prompts["id"].tolist()
    assert (len(stored), stored.count("same")) == (21, 1)


def test_samples_are_claimed_where_their_request_is_and_given_back() -> None:
    for prompt in ("p", "a/b", "7"):
        assert {engine_of("run", name, 5) for name in (prompt, f"{prompt}/0", f"{prompt}/1/2")} == {
            engine_of("run", prompt, 5)
        }
    assert {engine_of("run", f"p{number}", 3) for number in range(30)} == {0, 1, 2}
    claims = PromptClaims()
    assert claims.take("c0", "run", "p")
    assert claims.take("c0", "run", "p")  # resumed
    assert not claims.take("c1", "run", "p")
    assert claims.take("c2", "other", "p")
    claims.release("c1")  # it never had it
    assert not claims.take("c3", "run", "p")
    claims.release("c0")
    assert claims.take("c4", "run", "p")
    claims.keep("c4")
    claims.release("c4")  # stored: it stays taken
    assert not claims.take("c5", "run", "p")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_that_dies_fails_its_requests_by_name(server: Server) -> None:
    """The last test of this server: vLLM ends all of it when one engine is gone."""
    workers = list(processes(server.process.pid, "VLLM::Worker"))
    assert len(workers) == 2
    answers: dict[str, httpx.Response | httpx.TransportError] = {}

    def one(number: int) -> None:
        body = {"prompt": f"x = {number}", "max_tokens": 400, "ignore_eos": True}
        try:
            answers[f"d{number}"] = server.post(body, millpond={"id": f"d{number}"})
        except httpx.TransportError as error:
            answers[f"d{number}"] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    asked = {**body, "vllm_xargs": mp.capture_params(id="streamed", http=True)}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)  # it runs
        os.kill(workers[0], signal.SIGKILL)
        rest = "".join(lines)
    for thread in threads:
        thread.join()
    assert rest.count("capture of 'streamed' into run 'live' failed, and nothing of it is stored") == 1
    held = set(mp.open(server.lake)["live"].prompts["id"])
    assert "streamed" not in held
    for name, answer in answers.items():
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            assert told(answer)["id"] in held
        elif isinstance(answer, httpx.Response) and "capture of" in answer.text:
            assert f"capture of '{name}' into run 'live' failed" in answer.text
            assert answer.text.count("capture of") == 1  # nothing of other requests
            assert (answer.status_code, name in held) == (500, False)
