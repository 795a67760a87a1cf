"""The report's figures, as SVG text that follows the page's colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from millpond.analysis.sweep import Sweep

COLORS = ("#2f8fd0", "#d9661f", "#12a37f", "#c864a8", "#d19a00", "#8a6fdc", "#7a8b99", "#c8493f", "#5f9e2f", "#3aa6b9")
_INK = "#010203"
"""Drawn for whatever has the colour of text; replaced by `currentColor`."""


def auroc_figure(sweep: Sweep) -> str:
    """Test AUROC by layer: one line a label with its 95 % interval, the shuffled control dashed."""
    figure, axes = _figure(4.2)
    table = sweep.table()
    hooks = list(dict.fromkeys(table["hook"]))
    for number, label in enumerate(sweep.labels):
        color = COLORS[number % len(COLORS)]
        for control in (False, True):
            part = table[(table["label"] == label) & (table["control"] == control)]
            if part.empty:
                continue
            part = part.loc[part.groupby("hook", sort=False)["auroc"].idxmax()]
            x = part["hook"].map(hooks.index).to_numpy()
            if control:
                axes.plot(x, part["auroc"], color=color, linestyle="--", linewidth=1)
            else:
                axes.plot(x, part["auroc"], color=color, marker="o", markersize=4, label=label)
                axes.fill_between(x, part["auroc_low"], part["auroc_high"], color=color, alpha=0.18, linewidth=0)
    if table["control"].any():
        axes.plot([], [], color=_INK, linestyle="--", linewidth=1, label="shuffled labels")
    axes.set_xticks(range(len(hooks)), _hook_names(table, hooks))
    axes.set_xlabel("layer" if table["layer"].notna().all() else "hook")
    axes.set_ylabel("AUROC, held-out files")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=_INK, fontsize=9)
    return _svg(figure, "AUROC of the probes by layer")


def training_figure(metrics: Sequence[dict[str, Any]]) -> str:
    """Training loss and FVU by tokens seen."""
    figure, axes = _figure(3.2)
    tokens = np.array([line["tokens"] for line in metrics]) / 1e6
    loss, fvu = ([line[name] for line in metrics] for name in ("loss", "fvu"))
    axes.plot(tokens, loss, color=COLORS[0], linewidth=4, alpha=0.45, label="loss (FVU + auxiliary)")
    axes.plot(tokens, fvu, color=COLORS[1], linewidth=1.3, label="FVU")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if round(value * 10) in (2, 3, 5) else "")
    axes.set_xlabel("million tokens seen")
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, "Autoencoder loss over training")


def frequency_figure(frequency: NDArray[np.float64]) -> str:
    """How often latents fire: a histogram of log10 of their firing frequency, dead ones left out."""
    figure, axes = _figure(3.0)
    axes.hist(np.log10(frequency[frequency > 0]), bins=50, color=COLORS[2])
    axes.set_xlabel("log10 of the fraction of held-out rows that activate the latent")
    axes.set_ylabel("latents")
    return _svg(figure, "Histogram of firing frequencies")


def _hook_names(table: Any, hooks: list[str]) -> list[str]:
    layers = dict(zip(table["hook"], table["layer"], strict=True))
    return [str(layers[hook]) for hook in hooks] if table["layer"].notna().all() else hooks


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as one `<svg>` element that scales with the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
