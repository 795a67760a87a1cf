"""A model as judge: it reads each completion of a job in a template and chooses among declared answers.

The answer is the likeliest of the choices' first tokens, and nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from millpond.capture.adapters import Adapter
from millpond.capture.engine import CaptureEngine, GenerateRequest
from millpond.capture.interrupts import held_back
from millpond.capture.prompt_file import read_texts
from millpond.store.capture_spec import RequestArgs
from millpond.store.errors import InvalidInput, PromptTooLong
from millpond.store.generation import JudgeJob, Question, Sampling, has_judged, read_completions, write_judged
from millpond.store.objects import open_storage

_ONE_TOKEN = Sampling(max_tokens=1)


def run_judging(
    job: JudgeJob,
    engine: CaptureEngine,
    adapter: Adapter | None,
    context: int,
    job_id: str,
    beat: Callable[[int], None] = lambda done: None,
) -> int:
    """Judge the completions that are kept under the job's id and keep what was chosen; returns how many there are.

    Args:
        job: the question.
        engine: runs the judge.
        adapter: that the judge has.
        context: tokens that the engine takes.
        job_id: of the generation.
        beat: called between steps with the number of completions judged.

    Raises:
        InvalidInput: choices cannot be told apart by their first tokens.
        PromptTooLong: a completion in its template does not fit the judge's context.
        CaptureFailed: the engine failed.
    """
    from transformers import AutoTokenizer

    storage = open_storage(job.lake)
    table = read_completions(storage, job_id)
    if has_judged(storage, job_id):
        return len(table)
    tokenizer = AutoTokenizer.from_pretrained(Path(job.model.path), local_files_only=True)
    answers = first_tokens(tokenizer, job)
    prompts = read_texts(job.prompts)
    written = zip(table["prompt"].tolist(), table["text"].tolist(), strict=True)
    asked = [job.ask(prompts[prompt], text) for prompt, text in written]
    token_ids = tokenizer(asked)["input_ids"]
    longest = max(map(len, token_ids))
    if longest >= context:
        raise PromptTooLong(
            f"judge: a completion in its template has {longest:,} tokens; the judge's context has {context:,} with the answer: "
            "shorten the template, or generate fewer tokens"
        )

    def requests() -> Iterator[GenerateRequest]:
        rows = zip(table["prompt"].tolist(), table["sample"].tolist(), token_ids, strict=True)
        for prompt, sample, ids in rows:
            yield GenerateRequest(job_id, prompt, sample, ids, RequestArgs(), _ONE_TOKEN, None, adapter, answers)

    chosen: list[dict[str, int]] = []
    with held_back() as check:

        def between_steps() -> None:
            check()
            beat(len(chosen))

        for request, _, (token,) in engine.generate(requests(), between_steps):
            chosen.append({"prompt": request.prompt, "sample": request.sample, "choice": answers.index(token)})
        write_judged(storage, job_id, pd.DataFrame(chosen).sort_values(["prompt", "sample"]))
    return len(chosen)


def first_tokens(tokenizer: Any, question: Question) -> tuple[int, ...]:
    """The first token of each choice, as it follows the template's last text.

    Raises:
        InvalidInput: two are the same, or a choice changes how the text before it is cut into tokens.
    """
    before: list[int] = tokenizer(question.end, add_special_tokens=False)["input_ids"]
    found = []
    for choice in question.choices:
        whole: list[int] = tokenizer(question.end + choice, add_special_tokens=False)["input_ids"]
        if whole[: len(before)] != before or len(whole) == len(before):
            raise InvalidInput(
                f"judge.choices: {choice!r} runs into the template's end {question.end[-20:]!r} in the judge's tokens; "
                "end the template without a space and begin the choices with one"
            )
        found.append(whole[len(before)])
    if len(set(found)) < len(found):
        raise InvalidInput(
            f"judge.choices: {', '.join(map(repr, question.choices))} begin with tokens {found} of the judge's; give choices "
            "whose first tokens differ"
        )
    return tuple(found)
