"""Lines of probes side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleepify.files import written_beside


@dataclass(frozen=True)
class Panel:
    """One picture: values of some lines over common places.

    Attributes:
        title: above it.
        x_label, y_label: of its axes.
        x: places.
        lines: by their labels, a value per place.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def plot(panels: Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """Panels side by side, three in a row, as a PNG file.

    Raises:
        ValueError: for no panel at all.
        ImportError: without matplotlib, which the extra ``train`` brings.
    """
    if not panels:
        raise ValueError("expected at least one panel to plot, got none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sleepify[train]'") from error
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * n_rows), layout="constrained")
    places = figure.subplots(n_rows, columns, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=False):
        for label, values in panel.lines.items():
            axes.plot(panel.x, values, marker="o", markersize=3, linewidth=1.2, label=label)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xticks=panel.x)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in places:
        axes.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_beside(Path(path)) as draft:
        figure.savefig(draft, dpi=110, format="png")
