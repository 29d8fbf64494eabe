"""Sliders that redraw a figure, for a lesson; and the two over k and gamma of settings that have been tried.

These show what k and gamma do to images, influence loss and accuracy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from igd_lib.analysis import plotting, results
from igd_lib.tools.progress import in_jupyterlab
from igd_lib.tools.version import PROJECT


def tried(stand_in: str) -> Path:
    """Where the pairs that were tried on a stand-in are, without the endings."""
    return PROJECT / "paper_figures" / "data" / f"{stand_in}_settings_guidance"


class Settings:
    """A stand-in's grid of k and gamma on validation data: rows and a class's images, as
    `paper_figures/choose_settings.py` left them.
    """

    def __init__(self, source: Path):
        rows = results.load(source.with_suffix(".csv"))
        self.shown = plotting.read_gallery(f"{source}.images")
        measured = rows[rows.metric.isin(["top1", "influence_loss"])]
        self.found = results.summary(measured, ("method", "metric")).set_index(["method", "metric"])
        table = results.methods(rows)
        self.pairs = {(own.k, own.gamma): own.method for own in table[table.varies == "k+gamma"].itertuples()}
        self.ks, self.gammas = (sorted({pair[place] for pair in self.pairs}) for place in (0, 1))
        self.plain = table[table.guides == ""].method.iloc[0]
        self.first = rows.iloc[0]

    def figure(self, k: float, gamma: float) -> Figure:
        """A class's images without guidance and with this pair's, and what the pair reached.

        Raises KeyError for another pair.
        """
        methods, lines = (self.plain, self.pairs[k, gamma]), []
        for method in methods:
            top1, loss = (self.found.loc[method, metric] for metric in ("top1", "influence_loss"))
            lines.append(
                f"{method}: top-1 {top1['mean']:.1f} ± {top1.sd:.1f} %, "
                f"influence loss {loss['mean']:.3f} ± {loss.sd:.3f}, n = {top1.n:.0f}"
            )
        title = f"{self.shown['title']}; IPC {self.first.ipc}, validation data\n" + "\n".join(lines)
        columns = {method: self.shown["columns"][method] for method in methods}
        figure = plotting.gallery(
            columns, titles=self.shown["titles"], title=title, looks=self.shown["looks"]
        )
        return plotting.keep(figure, "", "")


def explore(stand_in: str, k: float, gamma: float) -> Any:
    """Sliders over the pairs that were tried on a stand-in, in JupyterLab; elsewhere this one's picture."""
    settings = Settings(tried(stand_in))
    return sliders(settings.figure, k=(settings.ks, k), gamma=(settings.gammas, gamma))


def sliders(figure: Callable[..., Figure], **values: tuple[Sequence[float], float]) -> Any:
    """A figure of some values, each with its slider, in JupyterLab; elsewhere the figure as it begins.

    values: by name, what a slider offers and where it begins; given to `figure` in that order.
    """
    if not in_jupyterlab():
        return figure(*(first for _, first in values.values()))
    from ipywidgets import Image, SelectionSlider, VBox

    moved = [
        SelectionSlider(options=offered, value=first, description=name, continuous_update=False)
        for name, (offered, first) in values.items()
    ]
    picture = Image(format="png", layout={"max_width": "100%"})

    def draw(_: object = None) -> None:
        pixels = io.BytesIO()
        figure(*(slider.value for slider in moved)).savefig(pixels, format="png", dpi=100)
        picture.value = pixels.getvalue()

    for slider in moved:
        slider.observe(draw, "value")
    draw()
    return VBox([*moved, picture])
