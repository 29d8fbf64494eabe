"""One style for every figure: fixed colours and markers a method, seeds as dots, mean and sd with n."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from igd_lib.tables import far_below

STYLE = Path(__file__).parents[1] / "paper_figures" / "igd.mplstyle"
# Okabe and Ito's colour-blind-safe palette.
COLOURS = {
    "Random": "#000000",
    "RDED": "#777777",
    "DiT": "#0072B2",
    "DiT, best cfg": "#56B4E9",
    "DiT + G_I": "#CC79A7",
    "DiT + G_I throughout": "#E69F00",
    "DiT + G_D": "#009E73",
    "DiT-IGD": "#D55E00",
    "Minimax": "#332288",
    "Minimax + G_I": "#AA4499",
    "Minimax + G_D": "#117733",
    "Minimax-IGD": "#882255",
}
MARKERS = {
    "Random": "s", "DiT": "o", "DiT, best cfg": "D", "DiT + G_I": "v", "DiT + G_I throughout": "X", "DiT + G_D": "^", "DiT-IGD": "*",
    "RDED": "P", "Minimax": "o", "Minimax + G_I": "v", "Minimax + G_D": "^", "Minimax-IGD": "*",
}  # fmt: skip


# What axes are called.
PARAMETERS = {"cfg": "classifier-free guidance scale (cfg)", "k": "k", "gamma": "gamma (for 4,096 latent values)"}
METRICS = {"top1": "top-1 accuracy (%)", "influence_loss": "mean influence loss"}


def use_style() -> None:
    """Apply the project's matplotlib style."""
    if STYLE.is_file():
        plt.style.use(STYLE)


def look(method: str, other: str = "#777777") -> tuple[str, str]:
    """A method's colour and marker; "DiT-IGD, DDIM 25" has DiT-IGD's, an unknown one `other` and a circle."""
    known = method if method in COLOURS else method.split(", ")[0]
    return COLOURS.get(known, other), MARKERS.get(known, "o")


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PDF, SVG and PNG beside each other with reproducible bytes; returns the three paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("svg", {"Date": None}), ("png", {"Software": None})):
        written.append(path.with_suffix(f".{suffix}"))
        figure.savefig(written[-1], metadata=metadata)
    return written


def keep(figure: Figure, folder: str, name: str) -> Figure:
    """Save a figure as `folder/name` when a folder is given; returns it for display and closes it."""
    if folder:
        save(figure, Path(folder) / name)
    plt.close(figure)
    return figure


def scores(rows: pd.DataFrame, *, title: str, label: str = "top-1 accuracy (%)") -> Figure:
    """Every seed as a dot, mean and sd beside them, a column a method; methods far below the others as words at the lower edge."""
    methods = list(dict.fromkeys(rows.method))
    figure, axes = plt.subplots(figsize=(1.1 * len(methods) + 1.2, 3.2), layout="constrained")
    below = far_below(rows)
    for position, method in enumerate(methods):
        values = rows[rows.method == method].value
        colour, marker = look(method)
        if method in below:
            edge = ("data", "axes fraction")
            arrow = dict(arrowstyle="->", color=colour)
            axes.annotate(f"{values.mean():.1f}\n(off the\naxis)", (position, 0), (position, 0.13), edge, edge, ha="center", color=colour, arrowprops=arrow)
            continue
        axes.plot([position - 0.13] * len(values), values, marker, color=colour, alpha=0.45, markersize=5, linestyle="none")
        sd = values.std() if len(values) > 1 else 0.0
        axes.errorbar(position + 0.13, values.mean(), yerr=sd, fmt=marker, color=colour, markersize=8, capsize=3)
    parts = [method.replace(", ", ",\n").replace(" (", "\n(").splitlines() for method in methods]
    axes.set_xticks(range(len(methods)), ["\n".join(line for part in own for line in textwrap.wrap(part, 16)) for own in parts])
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylabel(label)
    counts = sorted({int((rows.method == method).sum()) for method in methods})
    axes.set_title(f"{title}\n(mean and sd over n = {', '.join(map(str, counts))} generation seeds)")
    return figure


def curves(rows: pd.DataFrame, panels: Sequence[tuple[str, str]], *, title: str) -> Figure:
    """A panel a (parameter, metric): the metric over the parameter, a line a method; methods are named "METHOD, PARAMETER VALUE".

    Seeds as dots, mean and sd beside them; the mean of a plain "DiT" or "Minimax" as a dashed line.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels) + 0.6, 3.6), layout="constrained", squeeze=False)
    counts = set()
    for place, (parameter, metric) in zip(axes[0], panels, strict=True):
        own = rows[(rows.metric == metric) & rows.method.str.contains(f", {parameter} ", regex=False)]
        names = own.method.str.rsplit(f", {parameter} ", n=1)
        own = own.assign(kind=names.str[0], at=names.str[1].astype(float))
        kinds = list(dict.fromkeys(own.kind))
        for position, kind in enumerate(kinds):
            line = own[own.kind == kind]
            spread = line.groupby("at")["value"].agg(["mean", "std"]).fillna(0.0)
            colour, marker = look(kind)
            shift = 0.012 * (own["at"].max() - own["at"].min()) * (position - (len(kinds) - 1) / 2)  # so that the bars do not hide each other
            place.plot(line["at"] + shift, line.value, marker, color=colour, alpha=0.3, markersize=4, linestyle="none")
            place.errorbar(spread.index + shift, spread["mean"], yerr=spread["std"], fmt=f"{marker}-", color=colour, markersize=6, capsize=2, label=kind)
        for kind in ("DiT", "Minimax"):
            plain = rows[(rows.metric == metric) & (rows.method == kind)].value
            if len(plain):
                place.axhline(plain.mean(), color=look(kind)[0], linewidth=1, linestyle="--", label=kind)
        place.set(xlabel=PARAMETERS.get(parameter, parameter), ylabel=METRICS.get(metric, metric))
        counts |= set(own.groupby("method").size())
    handles = {label: handle for place in axes[0] for handle, label in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}\n(mean and sd over n = {', '.join(map(str, sorted(counts)))} generation seeds)")
    return figure


def against_accuracy(rows: pd.DataFrame, distances: pd.DataFrame, *, title: str, label: str = "top-1 accuracy (%)") -> Figure:
    """A panel a metric: every set as a point, its metric against its top-1; methods by colour and marker, those far below in words."""
    rows, title = _on_the_axes(rows[rows.metric == "top1"], title)
    accuracy = rows.set_index(["method", "seed"])["value"]
    metrics = list(dict.fromkeys(distances.metric))
    figure, panels = plt.subplots(1, len(metrics), figsize=(2.7 * len(metrics) + 0.4, 3.4), sharey=True, layout="constrained", squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=True):
        own = distances[distances.metric == metric].set_index(["method", "seed"])["value"]
        _sets_as_points(axes, own, accuracy)
        axes.set_xlabel(metric.replace(" over ", "\nover "))
    return _finish(figure, panels[0][0], title, label, per_line=len(set(rows.method)))


def influence(rows: pd.DataFrame, losses: pd.DataFrame, *, title: str, label: str = "top-1 accuracy (%)") -> Figure:
    """A panel a network: every set's mean influence loss against the accuracy of the network trained on it; methods far below in words."""
    rows, title = _on_the_axes(rows[rows.metric == "top1"], title)
    accuracy = rows.set_index(["method", "seed"])
    networks = list(dict.fromkeys(accuracy.network))
    own = losses.set_index(["method", "seed"])["value"]
    figure, panels = plt.subplots(1, len(networks), figsize=(3.3 * len(networks) + 0.6, 3.6), sharex=True, layout="constrained", squeeze=False)
    for axes, network in zip(panels[0], networks, strict=True):
        _sets_as_points(axes, own, accuracy[accuracy.network == network]["value"])
        axes.set(xlabel="mean influence loss", title=network)
    return _finish(figure, panels[0][0], title, label, per_line=4)


def _on_the_axes(accuracy: pd.DataFrame, title: str) -> tuple[pd.DataFrame, str]:
    """The rows of methods that are not far below the others, and a title that names those that are."""
    below = {method: accuracy[accuracy.method == method].value.mean() for method in far_below(accuracy)}
    words = ", ".join(f"{method} ({mean:.1f} %)" for method, mean in below.items())
    return accuracy[~accuracy.method.isin(list(below))], f"{title}\noff the axes: {words}" if below else title


def _sets_as_points(axes: Axes, x: pd.Series, y: pd.Series) -> None:
    """A point a set, by method and seed: both series have them as their index."""
    for method in dict.fromkeys(y.index.get_level_values("method")):
        colour, marker = look(method)
        axes.plot(x[method], y[method].reindex(x[method].index), marker, color=colour, alpha=0.7, markersize=6, linestyle="none", label=method)


def _finish(figure: Figure, first: Axes, title: str, label: str, *, per_line: int) -> Figure:
    """One legend for all panels below them, the label of their shared ordinate and the title."""
    first.set_ylabel(label)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=per_line, frameon=False)
    figure.suptitle(title)
    return figure


def places(coordinates: pd.DataFrame, distances: pd.DataFrame, *, title: str) -> Figure:
    """A panel a set: its points of a joint t-SNE over the real ones, with its distance to them."""
    real, names = coordinates[coordinates.set == "real"], [name for name in dict.fromkeys(coordinates.set) if name != "real"]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(2.1 * columns, 2.2 * lines + 0.4), sharex=True, sharey=True, layout="constrained", squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        own, (colour, marker) = coordinates[coordinates.set == name], look(name)
        axes.plot(real.x, real.y, ".", color="#cccccc", markersize=3)
        axes.plot(own.x, own.y, marker, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.4, linestyle="none")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name}\nWasserstein {distances[distances.method == name].value.mean():.2f}", fontsize=8)
    figure.suptitle(title)
    return figure


def read_gallery(source: str | Path) -> dict[str, Any]:
    """`gallery`'s arguments from the two files that `Experiment.keep_images` writes: `source` without their .png and .csv."""
    table = pd.read_csv(f"{source}.csv", dtype=str, keep_default_na=False)
    titles = [table[column].iloc[0] for column in table.columns if column.isdecimal()]
    with Image.open(f"{source}.png") as picture:
        grid = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    rows = [torch.stack(row.chunk(len(titles), dim=2)) for row in grid.chunk(len(table), dim=1)]
    return {"columns": dict(zip(table.row, rows, strict=True)), "titles": titles, "title": table.title.iloc[0]}


def gallery(columns: Mapping[str, Tensor], *, titles: Sequence[str], title: str) -> Figure:
    """A row a method, a column a noise: `columns[method]` is uint8 (n, 3, H, W), `titles` one a column."""
    count = len(titles)
    figure, axes = plt.subplots(len(columns), count, figsize=(0.72 * count + 1.3, 0.78 * len(columns) + 0.55), layout="constrained", squeeze=False)
    for position, (row, (method, images)) in enumerate(zip(axes, columns.items(), strict=True)):
        for index, axis in enumerate(row):
            axis.imshow(images[index].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if position == 0:
                axis.set_title(titles[index], fontsize=7)
        row[0].set_ylabel(method, rotation=0, ha="right", va="center", color=look(method, "#333333")[0])
    figure.suptitle(title)
    return figure


def overview(paths: pd.DataFrame, strips: Mapping[str, Tensor], steps: Sequence[int], *, title: str) -> Figure:
    """Figure 5: how the guidances enter, the latents' ways in a plane (columns as `igd_lib.overview.overview`'s), and what the steps `steps` predict."""
    figure = plt.figure(figsize=(10.6, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.25))
    figure.suptitle(title)
    _scheme(top.subplots(), int(paths[paths.guided].step.max()), int(paths[paths.guided].step.min()), int(paths.step.max()))
    axes = left.subplots()
    for (method, _), way in paths.groupby(["method", "image"], sort=False):
        colour, marker = look(method)
        axes.plot(way.x, way.y, "-", color=colour, linewidth=0.8, alpha=0.6)
        guided = way[way.guided]
        axes.plot(guided.x, guided.y, ".", color=colour, markersize=5)
        axes.plot(way.x.iloc[-1:], way.y.iloc[-1:], marker, color=colour, markersize=9, markeredgecolor="white", markeredgewidth=0.6, label=method)
    starts = paths[paths.step == paths.step.max()]
    axes.plot(starts.x, starts.y, "o", color="#333333", markersize=5, markerfacecolor="white", label="noise")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second")
    axes.set_title("latents $z_T \\dots z_0$; dots: guided steps", fontsize=8)
    panels = right.subplots(len(strips), len(steps), squeeze=False)
    for row, (method, images) in zip(panels, strips.items(), strict=True):
        colour = look(method)[0]
        guided_steps = set(paths[paths.guided & (paths.method == method)].step)  # a latent's step is the one that led to it
        for axis, image, step in zip(row, images, steps, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=step in guided_steps, color=colour, linewidth=2)
            axis.set_title(str(step), fontsize=7)
        row[0].set_ylabel(method, color=colour, fontsize=8)
    right.suptitle("predicted clean image $\\hat z_{0|t}$ by step, the same noise (framed: guided)", fontsize=8)
    return figure


def _scheme(axes: Axes, first: int, last: int, steps: int) -> None:
    """What a guided step uses, as boxes and arrows; steps `first` down to `last` of `steps` are guided."""
    axes.set(xlim=(0, 10), ylim=(0, 3.1))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        style = dict(boxstyle="round,pad=0.35", facecolor="white", edgecolor=colour, linewidth=1.2)
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=7.5, bbox=style)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = "#333333") -> None:
        axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.1, shrinkA=0, shrinkB=0))

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
    axes.annotate("", (9.85, 1.5), (0.1, 1.5), arrowprops=dict(arrowstyle="-|>", color="#777777", linewidth=1.2))
    left, right = (0.1 + 9.7 * (steps - step) / steps for step in (first + 1, last))
    axes.plot([left, right], [1.5, 1.5], color=COLOURS["DiT-IGD"], linewidth=5, solid_capstyle="butt")
    axes.text(0.1, 1.68, f"noise, step {steps - 1}", fontsize=7.5, color="#555555")
    axes.text(9.8, 1.32, "image, step 0", ha="right", va="top", fontsize=7.5, color="#555555")
    middle = (left + right) / 2
    axes.text(middle, 1.68, f"guided steps {first} to {last}", ha="center", fontsize=7.5, color=COLOURS["DiT-IGD"])
    arrow((8.85, 2.15), (right, 1.6), influence)
    arrow((3.75, 0.85), (middle, 1.4), deviation)


def similarities(epochs: Sequence[float], curves: Mapping[str, Sequence[float]], *, threshold: float) -> Figure:
    """Algorithm 2's similarity to the last kept checkpoint; kept checkpoints are filled."""
    figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
    for (name, values), colour, marker in zip(curves.items(), ("#D55E00", "#0072B2"), ("o", "s"), strict=False):
        kept = [value < threshold for value in values]
        shown = [1.0 if value == float("-inf") else value for value in values]  # the first has nothing to compare with
        axes.plot(epochs[1:], shown[1:], color=colour, linewidth=1, label=name)
        for epoch, value, keep in list(zip(epochs, shown, kept, strict=True))[1:]:
            axes.plot(epoch, value, marker, color=colour, markerfacecolor=colour if keep else "white", markersize=5)
    axes.axhline(threshold, color="#777777", linewidth=0.8, linestyle="--")
    axes.annotate(f"threshold {threshold}", (epochs[-1], threshold), textcoords="offset points", xytext=(0, 3), ha="right", fontsize=7)
    axes.set(xlabel="epoch", ylabel="cosine to the last kept")
    axes.set_title("Algorithm 2: filled = kept (epoch 0 always is)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def bench(report: Mapping[str, Any]) -> Figure:
    """What `make bench` measured: each mode's price over 50 steps at the paper's shapes, and the stand-in's throughput and memory by batch."""
    modes = report["paper"]["over 50 steps with 16 guided"]
    names = sorted(modes, key=lambda name: -modes[name]["tflop / vanilla"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(1.5, 1))
    for shift, key, colour, label in ((0.2, "seconds / vanilla", "#0072B2", "seconds"), (-0.2, "tflop / vanilla", "#E69F00", "counted arithmetic")):
        values = [modes[name][key] for name in names]
        left.barh([position + shift for position in range(len(names))], values, 0.38, color=colour, label=label)
        for position, value in enumerate(values):
            left.text(value + 0.05, position + shift, f"{value:.2f}", va="center", fontsize=7)
    left.set_yticks(range(len(names)), names)
    left.set_xlim(0, 1.12 * max(modes[name][key] for name in names for key in modes[name]))
    left.set_xlabel("times vanilla sampling, 50 steps with 16 guided")
    left.set_title(f"DiT-XL/2 shapes, random weights\n{report['paper']['device']}, {report['paper']['dtype']}, batch {report['paper']['batch']}")
    left.legend(loc="upper right")
    sizes = [row["batch"] for row in report["batches"]]
    right.plot(sizes, [row["images_per_second"] for row in report["batches"]], "o-", color="#0072B2")
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.set_ylim(bottom=0)
    right.set_xlabel("batch")
    right.set_ylabel("images/s, exact guidance", color="#0072B2")
    memory = right.twinx()
    memory.plot(sizes, [row["peak_gib"] for row in report["batches"]], "s--", color="#D55E00")
    memory.set_ylim(bottom=0)
    memory.grid(False)
    memory.set_ylabel("peak memory (GiB)", color="#D55E00")
    right.set_title(f"stand-in, {report['standin']['steps']} steps\n{report['machine']}, {report['threads']} threads")
    return figure
