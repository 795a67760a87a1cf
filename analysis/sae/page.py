"""Latents to look at: one self-contained HTML page, without scripts and without anything fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis.sae.evaluation import nearest
from millpond.analysis.sae.latents import COMMON, RARE, Context, Decode, Survey, contexts_of, survey
from millpond.analysis.sae.logits import logit_effects, unembedding
from millpond.store.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from millpond.analysis.sae.estimator import Sae
    from millpond.store.result import Result
    from millpond.store.run import Run


@dataclass(frozen=True)
class PageOptions:
    """What `write_page` shows."""

    latents: int = 100
    """Latents on the page: the best for each label, then those with the highest activation that are neither rare nor common."""
    contexts: int = 8
    """Contexts of each, from different prompts."""
    before: int = 16
    """Tokens before the activating one."""
    after: int = 8
    """Tokens after it."""
    neighbours: int = 5
    """Latents with the most similar decoder rows."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the head of the page."""


def write_page(
    sae: Sae,
    run: Run,
    path: str | Path,
    decode: Decode,
    *,
    hook: str | None = None,
    labels: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    evaluation: Result | None = None,
    auto: pd.DataFrame | None = None,
    options: PageOptions | None = None,
) -> pd.DataFrame:
    """Write the page, and return the table of all latents behind it (`Survey.table`).

    Args:
        sae: a trained autoencoder or transcoder.
        run: the rows to look at, with their tokens.
        path: of the page.
        decode: text of token ids.
        hook: what the autoencoder reads; by default what it says.
        labels: columns aligned with the run's rows.
        model: folder of the model, for logit effects; without it they are left out.
        evaluation: of `sae.evaluate`, for the head of the page.
        auto: of `auto_labels`, likewise.
        options: how much to show.
    """
    chosen = options or PageOptions()
    name = hook or str(sae.trained_on_.get("hook", ""))
    found = survey(sae, run[name], labels, n=chosen.contexts, progress=sae.progress)
    table = found.table(sae._weights(), chosen.neighbours)
    shown = _shown(found, chosen.latents, auto)
    texts = contexts_of(
        found.top[found.top["latent"].isin(shown)], run, decode, before=chosen.before, after=chosen.after
    )
    effects = None if model is None else logit_effects(sae, unembedding(model), np.array(shown, np.int64))
    similar = nearest(sae._weights(), chosen.neighbours) if sae.d_sae > 1 else None
    cards = []
    for at, number in enumerate(shown):
        parts = [_facts(found, number, table), _histogram(found, number), _contexts(texts.get(number, ()))]
        if effects is not None:
            parts.append(_effects(decode, *(each[at] for each in effects)))
        if similar is not None:
            near = ", ".join(
                f'<a href="#l{other}">{other}</a> ({cosine:.2f})'
                for other, cosine in zip(similar[0][number], similar[1][number], strict=True)
            )
            parts.append(f"<p>Nearest decoder rows: {near}</p>")
        cards.append(f'<section id="l{number}"><h2>Latent {number}</h2>{"".join(parts)}</section>')
    page = _PAGE.format(
        title=_e(f"{type(sae).__name__} of {name}"),
        head=_head(sae, found, evaluation, chosen.notes),
        auto="" if auto is None else _auto(auto, set(shown)),
        index=" ".join(f'<a href="#l{number}">{number}</a>' for number in shown),
        cards="\n".join(cards),
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), page.encode())
    return table


def _shown(found: Survey, limit: int, auto: pd.DataFrame | None) -> list[int]:
    best = [int(number) for number in found.f1.argmax(axis=0)] if found.labels else []
    if auto is not None:
        best = [int(latents[0]) for latents in auto["latents"]] + best
    peaks = found.top[found.top["rank"] == 0].sort_values("value", ascending=False, kind="stable")["latent"]
    plain = [int(n) for n in peaks if RARE <= found.frequency[n] <= COMMON]
    rest = [int(n) for n in peaks if not RARE <= found.frequency[n] <= COMMON]
    return list(dict.fromkeys([*best, *plain, *rest]))[:limit]


def _head(sae: Sae, found: Survey, evaluation: Result | None, notes: Mapping[str, str]) -> str:
    facts = {str(key): str(value) for key, value in sae.trained_on_.items()}
    facts |= {"latents": f"{sae.d_sae:,}", "rows looked at": f"{found.rows:,}"}
    facts["never active"] = f"{int((found.frequency == 0).sum()):,}"
    if evaluation is not None:
        facts |= {k: f"{v:.4g}" for k, v in evaluation.values.items() if isinstance(v, float)}
    facts |= notes
    return "<dl>" + "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


def _auto(auto: pd.DataFrame, shown: set[int]) -> str:
    def listed(latents: list[int]) -> str:
        links = [f'<a href="#l{number}">{number}</a>' if number in shown else str(number) for number in latents[:5]]
        return ", ".join(links) + (" ..." if len(latents) > 5 else "")

    rows = "".join(
        f"<tr><td>{_e(str(row['label']))}</td><td>{row['k']}</td><td>{row['f1']:.3f}</td>"
        f"<td>{row['positive']:.1%}</td><td>{listed(row['latents'])}</td></tr>"
        for row in auto.to_dict("records")
    )
    return (
        "<h2>Labels that few latents say</h2><table><tr><th>label</th><th>k</th><th>F1, held out</th><th>positive</th>"
        f"<th>latents</th></tr>{rows}</table>"
    )


def _facts(found: Survey, number: int, table: pd.DataFrame) -> str:
    row = table.loc[number]
    text = f"active in {row['frequency']:.3%} of the rows, at most {row['max']:.3g}"
    if found.labels:
        text += f"; best label <b>{_e(str(row['label']))}</b>: F1 {row['f1']:.2f}, correlation {row['correlation']:.2f}"
    return f"<p>{text}</p>"


def _histogram(found: Survey, number: int) -> str:
    counts = found.histogram[number]
    tallest = max(1, int(counts.max()))
    bars = "".join(
        f'<rect x="{6 * at}" y="{30 - 30 * count / tallest:.1f}" width="5" height="{30 * count / tallest:.1f}">'
        f"<title>{low:.3g} to {high:.3g}: {count:,} rows</title></rect>"
        for at, (count, low, high) in enumerate(zip(counts, found.edges[:-1], found.edges[1:], strict=True))
    )
    return f'<svg viewBox="0 0 {6 * len(counts)} 30" role="img" aria-label="rows by activation">{bars}</svg>'


def _contexts(contexts: tuple[Context, ...]) -> str:
    lines = "".join(
        f'<li><span class="value">{each.value:.3g}</span> <code>{_e(each.before)}<mark>{_e(each.token)}</mark>'
        f"{_e(each.after)}</code> <small>{_e(each.prompt_id)}</small></li>"
        for each in contexts
    )
    return f"<ol>{lines}</ol>"


def _effects(decode: Decode, raised: Any, more: Any, lowered: Any, less: Any) -> str:
    def listed(tokens: Any, amounts: Any) -> str:
        return ", ".join(
            f"<code>{_e(decode([int(token)]))}</code> {amount:+.2f}"
            for token, amount in zip(tokens, amounts, strict=True)
        )

    return f"<p>Raises {listed(raised, more)}<br>Lowers {listed(lowered, less)}</p>"


def _e(text: str) -> str:
    return html.escape(text)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
dl {{ display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; }} dt {{ color: #57606a; font-size: .8rem; }} dd {{ margin: 0; }}
section {{ border-top: 1px solid #d0d7de; }} h2 {{ font-size: 1.05rem; }}
ol {{ padding-left: 0; list-style: none; }} li {{ margin: .25rem 0; }}
code {{ white-space: pre-wrap; background: #f6f8fa; padding: .05rem .2rem; }} mark {{ background: #ffd33d; }}
.value {{ display: inline-block; min-width: 4rem; color: #57606a; }} small {{ color: #8c959f; }}
svg {{ width: 18rem; height: 3rem; fill: #6f42c1; }} td, th {{ padding: .1rem .8rem .1rem 0; text-align: left; }}
</style></head>
<body><header><h1>{title}</h1>
{head}
{auto}
<p>Latents: {index}</p></header>
{cards}
</body></html>
"""
