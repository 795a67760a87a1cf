"""What a judge's choices become in its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from millpond.capture.judging import first_tokens
from millpond.store.errors import InvalidInput
from millpond.store.generation import Question

MODEL = Path(__file__).parents[2] / "examples" / "stdlib_llama" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_a_choice_is_its_first_token_as_it_follows_the_template(tokenizer):
    question = Question(template="{completion}\nAnswer:", choices=(" return", " self.x", "."))
    expected = tokenizer.convert_tokens_to_ids(["Ġreturn", "Ġself", "."])
    assert list(first_tokens(tokenizer, question)) == expected


@pytest.mark.parametrize(
    ("end", "choices", "why"),
    [
        ("", (" self.a", " self.b"), "first tokens differ"),
        ("{prompt} ", ("return", "if"), "runs into the template's end"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused_by_name(tokenizer, end, choices, why):
    with pytest.raises(InvalidInput, match=why):
        first_tokens(tokenizer, Question(template=f"{{completion}}{end}", choices=choices))
