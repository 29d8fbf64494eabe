"""Two sliders over settings that have been tried, for a lesson: what k and gamma do to images, influence loss and accuracy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from igd_lib import plotting, results
from igd_lib.progress import in_jupyterlab

TRIED = Path(__file__).parents[1] / "paper_figures" / "data" / "standin_settings_guidance"


class Settings:
    """The stand-in's grid of k and gamma on validation data: rows and a class's images, as `paper_figures/choose_settings.py` left them."""

    def __init__(self, source: Path = TRIED):
        rows = results.load(source.with_suffix(".csv"))
        self.shown = plotting.read_gallery(f"{source}.images")
        self.found = results.summary(rows[rows.metric.isin(["top1", "influence_loss"])], ("method", "metric")).set_index(["method", "metric"])
        pairs = [name for name in self.shown["columns"] if name.startswith("k ")]
        values = pd.Series(pairs).str.extract(r"k (\S+), gamma (\S+)").astype(float)
        self.ks, self.gammas = (sorted(set(values[column])) for column in (0, 1))
        self.first = rows.iloc[0]

    def figure(self, k: float, gamma: float) -> Figure:
        """A class's images without guidance and with this pair's, and what the pair reached. Raises KeyError for another pair."""
        name = f"k {k:g}, gamma {gamma:g}"
        lines = []
        for method in ("DiT", name):
            top1, loss = (self.found.loc[method, metric] for metric in ("top1", "influence_loss"))
            lines.append(f"{method}: top-1 {top1['mean']:.1f} ± {top1.sd:.1f} %, influence loss {loss['mean']:.3f} ± {loss.sd:.3f}, n = {top1.n:.0f}")
        title = f"{self.shown['title']}; IPC {self.first.ipc}, validation data\n" + "\n".join(lines)
        columns = {method: self.shown["columns"][method] for method in ("DiT", name)}
        figure = plotting.gallery(columns, titles=self.shown["titles"], title=title)
        return plotting.keep(figure, "", "")


def explore(k: float, gamma: float) -> Any:
    """Sliders over the pairs that were tried, in JupyterLab; anywhere else the picture of this one."""
    settings = Settings()
    if not in_jupyterlab():
        return settings.figure(k, gamma)
    from ipywidgets import Image, SelectionSlider, VBox

    sliders = [
        SelectionSlider(options=values, value=value, description=name, continuous_update=False)
        for name, values, value in (("k", settings.ks, k), ("gamma", settings.gammas, gamma))
    ]
    picture = Image(format="png", layout={"max_width": "100%"})

    def draw(_: object = None) -> None:
        pixels = io.BytesIO()
        settings.figure(*(slider.value for slider in sliders)).savefig(pixels, format="png", dpi=100)
        picture.value = pixels.getvalue()

    for slider in sliders:
        slider.observe(draw, "value")
    draw()
    return VBox([*sliders, picture])
