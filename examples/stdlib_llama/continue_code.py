"""Let the example model continue a piece of Python: `python examples/stdlib_llama/continue_code.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = '''class Stack:
    """A last-in, first-out stack."""

    def __init__(self, items=None):
'''


def main() -> None:
    """Print the prompt and its greedy continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--tokens", type=int, default=90, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--stdin", action="store_true", help="continue what stands on standard input")
    arguments = parser.parse_args()
    prompt = sys.stdin.read() if arguments.stdin else PROMPT
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=arguments.tokens, do_sample=False, repetition_penalty=1.1)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
