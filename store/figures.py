"""Figures that notebooks show by themselves, made without pyplot and its global state."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """An empty Matplotlib figure (inches) that notebooks show as SVG and that `savefig` writes."""
    return cast("Figure", _shown()(figsize=(width, height), layout="constrained"))


@cache
def _shown() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure with an HTML repr of its own; Matplotlib's needs a backend that draws in browsers."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            FigureCanvasAgg(self)

        def _repr_html_(self) -> str:
            buffer = io.StringIO()
            self.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            text = buffer.getvalue()
            return text[text.index("<svg") :]

    return ShownFigure
