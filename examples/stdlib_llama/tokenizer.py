"""The example's own byte-level BPE, whose tokens never straddle a line, a quote, a bracket or a comment sign."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOS = "<|bos|>", "<|eos|>"

# Each alternative is one pre-token. Quotes, brackets and '#' stand alone, so that a token lies
# wholly inside or outside a string, a bracket or a comment.
_PRE_TOKENS = r"""\n| ?"{3}| ?'{3}| ?["'#()\[\]{}]| ?[\p{L}_]+| ?\p{N}+| ?[^\s\p{L}\p{N}_"'#()\[\]{}]+|[^\S\n]+(?=[^\S\n]\S)|[^\S\n]+"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the BPE on `texts`; deterministic for equal texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the configuration that transformers and vLLM read."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
