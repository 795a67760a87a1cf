"""The demo's report: one self-contained HTML page, without scripts and without anything fetched."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.sae.latents import COMMON, RARE, Context, LatentCard
from millpond.hub.figures import auroc_figure, frequency_figure, training_figure
from millpond.store.files import write_whole
from millpond.store.hooks import summarize_hooks
from millpond.store.reprs import human_bytes

if TYPE_CHECKING:
    from millpond.analysis.sweep import Sweep
    from millpond.store.result import Result
    from millpond.store.run import Run

Row = Sequence[str]


@dataclass(frozen=True)
class CaptureFacts:
    """What one capture did."""

    tokens: int
    """Tokens that the model computed."""
    seconds: float
    """From the first request to the last row on disk; loading the model is not in it."""
    tokens_per_second: float
    """Over those seconds."""


@dataclass(frozen=True)
class SaeFacts:
    """An autoencoder's training and how it does on held-out rows, beside PCA of as many components."""

    hook: str
    evaluation: Result
    """Of `BatchTopKSae.evaluate` on the test part, with the threshold that training stored."""
    at_k: Result
    """The same with the threshold moved so that k latents are active on the test part."""
    metrics: tuple[dict[str, Any], ...]
    """The lines of `metrics.jsonl`."""
    frequency: NDArray[np.float64]
    """Firing frequency of each latent on the test part, (d_sae,)."""
    latents: tuple[LatentCard, ...]
    pca_rank: int
    pca_explained_variance: float
    """Of PCA fitted to the training part, on the test part."""


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the page shows."""

    run: Run
    train: Run
    test: Run
    capture: CaptureFacts
    sweep: Sweep
    sae: SaeFacts
    stages: Mapping[str, float]
    """Wall time of each stage so far in seconds, in order."""
    cores: int
    """CPU cores that the process may use."""
    versions: Mapping[str, str]
    seed: int


def write_report(inputs: ReportInputs, path: Path) -> Path:
    """Write the page to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(inputs).encode())
    return path


def render(inputs: ReportInputs) -> str:
    """The page as HTML text."""
    name = model_name(inputs.run)
    sections = "\n".join(
        f"<section><h2>{title}</h2>\n{body}</section>"
        for title, body in (
            ("What a layer knows of a token", _probes(inputs)),
            ("A sparse autoencoder of one layer", _sae(inputs.sae)),
            ("How often latents fire", _frequency(inputs.sae)),
            ("The strongest latents", _latents(inputs.sae.latents)),
            ("Throughput and size", _throughput(inputs)),
            ("Where this comes from", _provenance(inputs)),
        )
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(name)}: Millpond demo</title><style>{_STYLE}</style></head>
<body><header><h1>What {_e(name)} represents</h1>
<p>Activations captured, stored, probed and decomposed by Millpond. Every number on this page was measured in the run
that wrote it, on {inputs.cores} CPU cores.</p>
{_headline(inputs)}</header>
{sections}
</body></html>
"""


def model_name(run: Run) -> str:
    """The model's name without the folders it lies in: of `.../stdlib_llama/model`, `stdlib_llama/model`."""
    model = str(run.provenance.get("model", "unknown model"))
    return "/".join(Path(model).parts[-2:]) if Path(model).is_absolute() or model.startswith(".") else model


def _headline(inputs: ReportInputs) -> str:
    run, values = inputs.run, inputs.sae.at_k.values
    facts = [
        ("tokens captured", f"{inputs.capture.tokens:,}"),
        ("rows stored", f"{run.n_rows:,} x {len(run.hooks)} hooks"),
        ("activations on disk", human_bytes(run.nbytes)),
        ("capture", f"{inputs.capture.tokens_per_second:,.0f} tokens/s"),
        ("explained variance, SAE", f"{values['explained_variance']:.3f} at L0 {values['l0']:.1f}"),
        (f"the same, PCA of rank {inputs.sae.pca_rank}", f"{inputs.sae.pca_explained_variance:.3f}"),
        ("wall time", f"{sum(inputs.stages.values()):,.0f} s"),
    ]
    return "<dl>" + "".join(f"<div><dt>{_e(a)}</dt><dd>{_e(b)}</dd></div>" for a, b in facts) + "</dl>"


def _probes(inputs: ReportInputs) -> str:
    table = inputs.sweep.table()
    rows = []
    for label in inputs.sweep.labels:
        real = table[(table["label"] == label) & ~table["control"]]
        best = real.iloc[int(real["auroc"].to_numpy().argmax())]
        controls = table[(table["label"] == label) & table["control"]]["auroc"]
        spread = f"{controls.min():.3f} to {controls.max():.3f}" if len(controls) else "none"
        share = best["positives_test"] / best["n_test"]
        interval = f"{best['auroc_low']:.4f} to {best['auroc_high']:.4f}"
        rows.append((label, str(best["layer"]), f"{best['auroc']:.4f}", interval, spread, f"{share:.1%}"))
    note = (
        f"<p>One logistic probe a layer and label, fitted to {len(inputs.train):,} rows of {_files(inputs.train)} and "
        f"scored on {len(inputs.test):,} rows of {_files(inputs.test)} that share none with them. Bands and intervals "
        "are 95 % bootstraps over prompts. Dashed: the same probe on labels permuted over the rows, which should be at "
        "0.5.</p>"
    )
    heads = ("label", "best layer", "AUROC", "95 % interval", "shuffled, all layers", "positive")
    after = "<p>The best layer is picked on the rows it is scored on, so its AUROC is slightly too high.</p>"
    return note + _figure(auroc_figure(inputs.sweep)) + _table(heads, rows) + after


def _files(part: Run) -> str:
    if "path" in part.prompts:
        return f"{part.prompts['path'].nunique()} files"
    return f"{len(part.prompts):,} prompts"


def _sae(sae: SaeFacts) -> str:
    config = sae.evaluation.provenance["parameters"]
    last = sae.metrics[-1]
    intro = (
        f"<p>BatchTopK autoencoder of <code>{_e(sae.hook)}</code>: {config['d_sae']:,} latents, k = {config['k']}, "
        f"trained on {last['tokens']:,} rows of the training part (each seen several times), scored on the "
        f"{sae.evaluation.evidence['rows']:,} rows of the test part.</p>"
    )
    rows = [
        ("SAE", *_sae_numbers(sae.evaluation)),
        ("SAE, threshold moved to L0 = k", *_sae_numbers(sae.at_k)),
        (
            f"PCA, rank {sae.pca_rank}",
            str(sae.pca_rank),
            f"{1 - sae.pca_explained_variance:.4f}",
            f"{sae.pca_explained_variance:.4f}",
            "",
        ),
    ]
    heads = ("held-out rows", "L0", "FVU", "explained variance", "dead latents")
    note = (
        "<p>The stored threshold was set on training rows, so that L0 differs on rows of other files; the second line "
        "moves this one number on the rows scored, to compare at equal L0.</p>"
    )
    return intro + _figure(training_figure(sae.metrics)) + _table(heads, rows) + note


def _sae_numbers(result: Result) -> list[str]:
    values = result.values
    return [
        f"{values['l0']:.2f}",
        f"{values['fvu']:.4f}",
        f"{values['explained_variance']:.4f}",
        f"{values['dead_latents']:.2%}",
    ]


def _frequency(sae: SaeFacts) -> str:
    dead = int((sae.frequency == 0).sum())
    alive = np.median(sae.frequency[sae.frequency > 0]) if dead < len(sae.frequency) else 0.0
    note = (
        f"<p>{dead:,} of {len(sae.frequency):,} latents never fire on the test part; "
        f"the median of the others fires on {alive:.2%} of its rows.</p>"
    )
    return _figure(frequency_figure(sae.frequency)) + note


def _latents(cards: Iterable[LatentCard]) -> str:
    note = (
        f"<p>Those with the highest activation among the latents that fire on {RARE:.2%} to {COMMON:.0%} of the "
        "held-out rows. Each line is the text around one of the rows that activate a latent most, from another prompt "
        "each time, with the row's own token marked. They are not chosen by hand; &#9166; is a line break.</p>"
    )
    body = "".join(
        f"<article><h3>latent {card.latent} <small>fires on {card.frequency:.2%}</small></h3>"
        + "".join(_context(context) for context in card.contexts)
        + "</article>"
        for card in cards
    )
    return note + (body or "<p>No latent fires that often.</p>")


def _context(context: Context) -> str:
    indented = context.after.startswith("  ") and context.token.endswith("\n")
    rest = " " + context.after.lstrip(" ") if indented else context.after
    before, token, after = (_e(_one_line(text)) for text in (context.before.lstrip(" "), context.token, rest))
    return (
        f'<p class="context" title="{_e(context.prompt_id)}"><span class="value">{context.value:.1f}</span>'
        f"<code>{before}<mark>{token}</mark>{after}</code></p>"
    )


def _one_line(text: str) -> str:
    """Line breaks and indentation as visible signs that take little room."""
    lines = text.replace("\t", "    ").split("\n")
    return "\u23ce".join([lines[0], *(" " + line.lstrip(" ") if line.startswith("  ") else line for line in lines[1:])])


def _throughput(inputs: ReportInputs) -> str:
    run, last = inputs.run, inputs.sae.metrics[-1]
    per_token = run.nbytes / max(1, inputs.capture.tokens)
    sizes = [
        ("model", model_name(run)),
        ("hooks", f"{summarize_hooks(run.hooks)} ({len(run.hooks)})"),
        ("prompts", f"{len(run.prompts):,}"),
        ("tokens computed", f"{inputs.capture.tokens:,}"),
        ("rows stored", f"{run.n_rows:,} of {run.d_model} x {run.dtype}, for each hook"),
        ("activations", f"{human_bytes(run.nbytes)}, {human_bytes(per_token)} a token"),
        (
            "capture",
            f"{inputs.capture.tokens_per_second:,.0f} tokens/s over {inputs.capture.seconds:.1f} s, loading the model apart",
        ),
        ("autoencoder training", f"{last['tokens_per_second']:,.0f} tokens/s"),
    ]
    stages = [(name, f"{seconds:.1f} s") for name, seconds in inputs.stages.items()]
    return _table(("quantity", "measured"), sizes) + _table(("stage", "wall time"), stages)


def _provenance(inputs: ReportInputs) -> str:
    manifest = inputs.run.check_sealed()
    facts = [
        ("run", f"{inputs.run.name}, sealed {manifest.sealed}"),
        ("counts in the manifest", ", ".join(f"{name} {count:,}" for name, count in manifest.counts.items())),
        ("seed of split, probes and autoencoder", str(inputs.seed)),
        ("probe", json.dumps(dict(inputs.sweep.provenance.get("parameters", {})))),
        ("autoencoder", json.dumps(inputs.sae.evaluation.provenance["parameters"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in inputs.versions.items())),
    ]
    return _table(("", ""), facts)


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _table(heads: Row, rows: Iterable[Row]) -> str:
    top = "<tr>" + "".join(f"<th>{_e(head)}</th>" for head in heads) + "</tr>" if any(heads) else ""
    body = "".join(
        f'<tr><th scope="row">{_e(row[0])}</th>' + "".join(f"<td>{_e(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    wide = "wide" if len(heads) > 2 else ""
    return f'<div class="scroll"><table class="{wide}"><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def _e(text: str) -> str:
    return html.escape(text)


_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--faint:#5c6670;--page:#fff;--card:#f4f6f8;--line:#d5dbe1;--mark:#ffd966}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--faint:#9aa5b0;--page:#14181c;--card:#1e242a;--line:#343d46;--mark:#8a6a00}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:54rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page)}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:0 0 .4rem}small{color:var(--faint);font-weight:normal}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.6rem;margin:1rem 0}
dl div,article{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
dt{font-size:.8rem;color:var(--faint)}dd{margin:0;font-size:1.1rem;font-weight:600;overflow-wrap:anywhere}
figure{margin:.5rem 0;overflow-x:auto}figure svg{display:block;width:100%;min-width:30rem;height:auto}
.scroll{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;min-width:60%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--faint);font-weight:normal}tbody th{font-weight:600}td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.wide th,.wide td{white-space:nowrap}
article{margin:.8rem 0}.context{display:flex;gap:.7rem;margin:.25rem 0;font-size:.85rem}
.value{color:var(--faint);min-width:2.6rem;text-align:right;font-variant-numeric:tabular-nums}
code{font-family:ui-monospace,monospace}.context code{white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:.2rem;padding:0 .1rem}
"""
