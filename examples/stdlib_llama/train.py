"""Train the example model from scratch: `python examples/stdlib_llama/train.py`.

Seeded, resumable (interrupt it and run the same command again) and recorded: `metrics.jsonl` beside
the model holds every step's loss, and `training.json` the corpus digest, the configuration and the
held-out losses that the README quotes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import SourceFile, digest, logical_line_starts, read_stdlib
from numpy.typing import NDArray
from tokenizer import BOS, EOS, VOCAB_SIZE, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Config:
    """What decides the trained weights."""

    steps: int = 1400
    batch_size: int = 16
    """Sequences a step."""
    context: int = 512
    """Tokens a sequence, the beginning-of-sequence token included."""
    lr: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.1
    seed: int = 0
    n_layers: int = 6
    d_model: int = 256
    d_mlp: int = 1024
    n_heads: int = 4


@dataclass(frozen=True)
class TokenStream:
    """Files joined by end-of-sequence tokens."""

    ids: Tokens
    starts: Tokens
    """Indices into `ids` at which a logical line starts."""


def encode_files(files: list[SourceFile], tokenizer: Tokenizer) -> TokenStream:
    """Tokenize `files` and find the tokens at which logical lines start."""
    eos = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    starts: list[int] = []
    for file in tqdm(files, desc="tokenizing", unit="file", leave=False):
        encoding = tokenizer.encode(file.text, add_special_tokens=False)
        first_token = {begin: index for index, (begin, _) in reversed(list(enumerate(encoding.offsets)))}
        starts += [len(ids) + first_token[offset] for offset in logical_line_starts(file.text)]
        ids += [*encoding.ids, eos]
    return TokenStream(np.array(ids, np.int64), np.array(starts, np.int64))


def training_batch(stream: TokenStream, config: Config, step: int, bos: int) -> Tensor:
    """The sequences of one step, (batch_size, context): a function of the seed and the step alone."""
    rng = np.random.default_rng([config.seed, step])
    length = config.context - 1
    usable = stream.starts[stream.starts + length <= len(stream.ids)]
    begins = rng.choice(usable, config.batch_size, replace=False)
    rows = stream.ids[begins[:, None] + np.arange(length)]
    return torch.from_numpy(np.concatenate([np.full((config.batch_size, 1), bos), rows], axis=1))


def held_out_batches(stream: TokenStream, config: Config, bos: int, limit: int | None = None) -> Tensor:
    """Non-overlapping held-out sequences, (n, context), each starting at a logical line."""
    length = config.context - 1
    rows, position = [], 0
    for start in stream.starts:
        if start >= position and start + length <= len(stream.ids):
            rows.append(np.concatenate([[bos], stream.ids[start : start + length]]))
            position = start + length
    return torch.from_numpy(np.stack(rows[:limit]))


def next_token_loss(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over every predicted token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids_BT[:, :-1]).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean loss in nats a token over the sequences `ids`."""
    model.eval()
    losses = [float(next_token_loss(model, batch)) * len(batch) for batch in ids.split(16)]
    model.train()
    return sum(losses) / len(ids)


def baseline_losses(train: Tokens, ids: Tensor) -> dict[str, float]:
    """Held-out loss of unigram counts and of a bigram table interpolated with them (Jelinek-Mercer, weight chosen by grid)."""
    unigram = np.bincount(train, minlength=VOCAB_SIZE) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((VOCAB_SIZE, VOCAB_SIZE), np.float32)
    np.add.at(pairs, (train[:-1], train[1:]), 1.0)
    conditional = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    held_out = ids.numpy()
    before, after = held_out[:, :-1].ravel(), held_out[:, 1:].ravel()
    known = before != held_out[0, 0]  # nothing precedes the first token of a sequence
    weights = np.where(known, 1.0, 0.0)
    losses = [
        float(-np.log((1 - w * weights) * unigram[after] + w * weights * conditional[before, after]).mean())
        for w in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    return {"unigram": float(-np.log(unigram[after]).mean()), "bigram": min(losses)}


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup)))


def build(config: Config, bos: int, eos: int) -> LlamaForCausalLM:
    """A freshly initialised model with tied embeddings."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )


def make_optimizers(model: LlamaForCausalLM, config: Config) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(config: Config, out: Path) -> None:
    """Train, or go on from the last checkpoint, and write the model into `out`."""
    files = read_stdlib()
    train_files = [file for file in files if not file.held_out]
    tokenizer = train_tokenizer(file.text for file in train_files)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    stream = encode_files(train_files, tokenizer)
    held_out = held_out_batches(encode_files([file for file in files if file.held_out], tokenizer), config, bos)
    print(f"{len(files)} files, {len(stream.ids):,} training tokens, {held_out.numel():,} held-out tokens")

    model = build(config, bos, eos)
    optimizers = make_optimizers(model, config)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["config"] != asdict(config) or saved["corpus"] != digest(files):
            raise SystemExit(f"train: {checkpoint} is of another configuration or corpus; delete it to start again")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, seconds = saved["step"], saved["seconds"]
        lines = metrics.read_text().splitlines()
        metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < first))
    else:
        metrics.unlink(missing_ok=True)

    started = time.monotonic() - seconds
    with metrics.open("a") as log, tqdm(total=config.steps, initial=first, desc="training", unit="step") as bar:
        for step in range(first, config.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step)
                optimizer.zero_grad()
            loss = next_token_loss(model, training_batch(stream, config, step, bos))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            record = {"step": step, "loss": loss.item(), "lr": learning_rate(config, step)}
            if step % 100 == 99:
                record["held_out_loss"] = held_out_loss(model, held_out[:64])
                torch.save(
                    {
                        "config": asdict(config),
                        "corpus": digest(files),
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "step": step + 1,
                        "seconds": time.monotonic() - started,
                    },
                    checkpoint.with_suffix(".tmp"),
                )
                checkpoint.with_suffix(".tmp").replace(checkpoint)
            print(json.dumps(record), file=log, flush=True)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()

    model.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    losses = {"model": held_out_loss(model, held_out), **baseline_losses(stream.ids, held_out)}
    record = {
        "config": asdict(config),
        "corpus": {
            "sha256": digest(files),
            "files": len(files),
            "training_tokens": len(stream.ids),
            "held_out_tokens": held_out.numel(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_nats_per_token": losses,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_seconds": round(time.monotonic() - started),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(losses))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "model", help="folder of the trained model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=Config.steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Config(steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
