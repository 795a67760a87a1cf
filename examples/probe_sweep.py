"""Where does the example model know that it is inside a string? One probe a layer, with intervals and controls.

    python examples/probe_sweep.py [--lake demo/lake] [--out probe_sweep]

reads the run that `make demo` captures. Without one it captures a smaller run of its own first, which starts vLLM and
takes a few minutes. Writes `auroc.svg` and the sweep's `metrics.jsonl` and `table.json` into --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import millpond as mp
from millpond.hub.demo import HOOKS, RUN, DemoConfig, capture_toml, find_example

LABELS = {
    "in a string": "in_string",
    "in a docstring": "in_docstring",
    "in a string that is no docstring": lambda run: run.labels["in_string"] & ~run.labels["in_docstring"],
}


def open_or_capture(lake: Path, out: Path, tokens: int) -> mp.Run:
    """The demo's run in `lake`, or else one captured into `out`."""
    for folder in (lake, out / "lake"):
        if folder.is_dir() and RUN in mp.open(folder):
            return mp.open(folder)[RUN]
    from millpond.capture.job import run_capture_file

    print(f"{lake} holds no run {RUN!r} (make demo captures it): capturing {tokens:,} tokens into {out / 'lake'}")
    config = DemoConfig(out=out, tokens=tokens)
    example = find_example(None)
    out.mkdir(parents=True, exist_ok=True)
    prompts = [sys.executable, str(example / "prompts.py"), "--out", str(out / "prompts.parquet")]
    subprocess.run([*prompts, "--tokens", str(tokens)], check=True)
    mp.open(out / "lake", create=True)
    job = out / "capture.toml"
    job.write_text(capture_toml(config, example))
    run_capture_file(job)
    return mp.open(out / "lake")[RUN]


def main() -> None:
    """Sweep the layers, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, default=Path("demo/lake"), help="lake of the demo")
    parser.add_argument("--out", type=Path, default=Path("probe_sweep"), help="folder for the results")
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens to capture where there is no demo lake")
    options = parser.parse_args()
    run = open_or_capture(options.lake, options.out, options.tokens)
    print(run)
    train, test = run.split(test=0.25, seed=0, by="path")  # a quarter of the files, never some of a file's tokens
    probe = mp.LogisticProbe(standardize=True, C=0.01, max_iter=300)
    sweep = probe.sweep(train, test, HOOKS, LABELS, cv=5, groups="path")

    shown = ["label", "layer", "auroc", "auroc_low", "auroc_high", "selectivity", "random_direction", "cv_loss"]
    table = sweep.table().query("not control")
    print(table[shown].to_string(index=False, float_format="{:.4f}".format))
    for label in sweep.labels:
        best = sweep.best(label)  # by the loss on left-out training files, so that the test score is honest
        found = best.evaluation_
        low, high = found.intervals["auroc"]
        print(
            f"{label}: best at {best.trained_on_['hook']}, AUROC {found['auroc']:.4f} [{low:.4f}, {high:.4f}], "
            f"recall {found['recall_at_fpr']:.3f} at 1 % false positives, ECE {found['ece']:.4f}, "
            f"{found.evidence['rows']:,} rows of {found.evidence['groups']} files"
        )
    folder = sweep.save(options.out)
    sweep.plot().savefig(folder / "auroc.svg")
    print(folder / "auroc.svg")


if __name__ == "__main__":
    main()
