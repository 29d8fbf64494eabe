"""Figure 5: how the guidances enter, and where they take a latent on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from igd_lib.analysis.plotting import COLOURS, style_of


def figure(paths: pd.DataFrame, strips: Mapping[str, Tensor], steps: Sequence[int], *, title: str) -> Figure:
    """Figure 5: how the guidances enter, the latents' ways in a plane (columns as
    `igd_lib.overview.overview`'s), and what the steps `steps` predict.
    """
    figure = plt.figure(figsize=(10.6, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.25))
    figure.suptitle(title)
    _scheme(
        top.subplots(),
        int(paths[paths.guided].step.max()),
        int(paths[paths.guided].step.min()),
        int(paths.step.max()),
    )
    axes = left.subplots()
    looks = dict(zip(paths.method, paths["look"], strict=True))
    for (method, _), way in paths.groupby(["method", "image"], sort=False):
        colour, marker = style_of(looks[method])
        axes.plot(way.x, way.y, "-", color=colour, linewidth=0.8, alpha=0.6)
        guided = way[way.guided]
        axes.plot(guided.x, guided.y, ".", color=colour, markersize=5)
        axes.plot(
            way.x.iloc[-1:],
            way.y.iloc[-1:],
            marker,
            color=colour,
            markersize=9,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=method,
        )
    starts = paths[paths.step == paths.step.max()]
    axes.plot(starts.x, starts.y, "o", color="#333333", markersize=5, markerfacecolor="white", label="noise")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second")
    axes.set_title("latents $z_T \\dots z_0$; dots: guided steps", fontsize=8)
    panels = right.subplots(len(strips), len(steps), squeeze=False)
    for row, (method, images) in zip(panels, strips.items(), strict=True):
        colour = style_of(looks[method])[0]
        # A latent's step is the one that led to it.
        guided_steps = set(paths[paths.guided & (paths.method == method)].step)
        for axis, image, step in zip(row, images, steps, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=step in guided_steps, color=colour, linewidth=2)
            axis.set_title(str(step), fontsize=7)
        row[0].set_ylabel(method, color=colour, fontsize=8)
    right.suptitle(
        "predicted clean image $\\hat z_{0|t}$ by step, the same noise (framed: guided)", fontsize=8
    )
    return figure


def _scheme(axes: Axes, first: int, last: int, steps: int) -> None:
    """What a guided step uses, as boxes and arrows; steps `first` down to `last` of `steps` are guided."""
    axes.set(xlim=(0, 10), ylim=(0, 3.1))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        style = dict(boxstyle="round,pad=0.35", facecolor="white", edgecolor=colour, linewidth=1.2)
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=7.5, bbox=style)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = "#333333") -> None:
        axes.annotate(
            "",
            end,
            start,
            arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.1, shrinkA=0, shrinkB=0),
        )

    influence, deviation = COLOURS["DiT + G_I"], COLOURS["DiT + G_D"]
    box(0.1, 2.55, 1.4, "real images\nof class $c$", influence)
    box(2.2, 2.55, 2.2, "surrogate's checkpoints $\\theta_e$\nthat Algorithm 2 keeps", influence)
    box(5.2, 2.55, 2.0, "class-averaged\ngradients", influence)
    box(7.9, 2.55, 1.9, "influence guidance\n$\\mathcal{G}_I$ (Eq. 7)", influence)
    for start, end in ((1.62, 2.08), (4.52, 5.08), (7.32, 7.78)):
        arrow((start, 2.55), (end, 2.55), influence)
    box(0.1, 0.45, 1.9, "latents drawn so far\nfor class $c$", deviation)
    box(2.7, 0.45, 2.1, "deviation guidance\n$\\mathcal{G}_D$ (Eq. 8)", deviation)
    arrow((2.12, 0.45), (2.58, 0.45), deviation)
    axes.annotate(
        "", (9.85, 1.5), (0.1, 1.5), arrowprops=dict(arrowstyle="-|>", color="#777777", linewidth=1.2)
    )
    left, right = (0.1 + 9.7 * (steps - step) / steps for step in (first + 1, last))
    axes.plot([left, right], [1.5, 1.5], color=COLOURS["DiT-IGD"], linewidth=5, solid_capstyle="butt")
    axes.text(0.1, 1.68, f"noise, step {steps - 1}", fontsize=7.5, color="#555555")
    axes.text(9.8, 1.32, "image, step 0", ha="right", va="top", fontsize=7.5, color="#555555")
    middle = (left + right) / 2
    axes.text(
        middle, 1.68, f"guided steps {first} to {last}", ha="center", fontsize=7.5, color=COLOURS["DiT-IGD"]
    )
    arrow((8.85, 2.15), (right, 1.6), influence)
    arrow((3.75, 0.85), (middle, 1.4), deviation)
