"""Train a sparse autoencoder on the example model and look at its latents: `python examples/sae_stdlib.py`.

Uses the run that `make demo` captured, or captures it first. Writes `sae_stdlib/latents.html` and prints, for
some things a Python programmer knows, the latent that says them best, with text where it fires. A few minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

import millpond as mp
from millpond.analysis.sae.autolabel import auto_labels
from millpond.analysis.sae.latents import contexts_of, survey
from millpond.analysis.sae.page import write_page
from millpond.analysis.sae.recovered import HuggingFaceModel, cross_entropy_recovered
from millpond.hub.demo import RUN, DemoConfig, capture_toml
from millpond.store.prompt_tokens import prompts_of

HERE = Path(__file__).resolve().parent / "stdlib_llama"
MODEL = HERE / "model"
HOOK = "blocks.3.hook_resid_post"
LABELS = ("in_string", "in_comment", "in_docstring", "is_keyword", "is_number", "is_identifier")


def captured(out: Path, tokens: int) -> mp.Run:
    """The run of held-out standard library files in `out`, captured if it is not there."""
    lake = out / "lake"
    if not lake.exists() or RUN not in mp.open(lake):
        from millpond.capture.job import run_capture_file

        out.mkdir(parents=True, exist_ok=True)
        config = DemoConfig(out=out, tokens=tokens)
        prompts = [sys.executable, str(HERE / "prompts.py"), "--out", str(out / "prompts.parquet")]
        subprocess.run([*prompts, "--tokens", str(tokens)], check=True)
        (out / "capture.toml").write_text(capture_toml(config, HERE))
        run_capture_file(out / "capture.toml")
    return mp.open(lake)[RUN]


def main() -> None:
    """Train, evaluate, label, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the demo (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sae_stdlib"), help="results (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="rows to train on (default: %(default)s)")
    arguments = parser.parse_args()
    train, test = captured(arguments.demo, 200_000).split(0.25, seed=0, by="path")

    sae = mp.BatchTopKSae(d_sae=2048, k=32)
    epochs = -(-arguments.tokens // len(train))
    sae.fit(train[HOOK], tokens=arguments.tokens, epochs=epochs, out=arguments.out, resume=True)
    sae.save(arguments.out, model_name="stdlib_llama")
    result = sae.calibrate(test[HOOK]).evaluate(test[HOOK])
    print(result)
    print(cross_entropy_recovered(sae, HuggingFaceModel(MODEL), prompts_of(test, bos=0, limit=40)))

    parts = [{name: part.labels[name] for name in LABELS} for part in (train, test)]
    auto = auto_labels(sae, train[HOOK], parts[0], test[HOOK], parts[1])
    print(auto.to_string(index=False, float_format="{:.3f}".format))

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def decode(ids: object) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))  # type: ignore[call-overload]

    page = arguments.out / "latents.html"
    write_page(sae, test, page, decode, labels=parts[1], model=MODEL, evaluation=result, auto=auto)
    top = survey(sae, test[HOOK], n=3).top
    single = auto[auto["k"] == 1]
    best = {label: latents[0] for label, latents in zip(single["label"], single["latents"], strict=True)}
    shown = contexts_of(top[top["latent"].isin(best.values())], test, decode, before=8, after=4)
    for label, latent in best.items():
        print(f"\n{label}: latent {latent}")
        for each in shown.get(latent, ()):
            print(f"  {each.before!r} [{each.token!r}] {each.after!r}  {each.value:.1f}  {each.prompt_id}")
    print(f"\n{page}")


if __name__ == "__main__":
    main()
