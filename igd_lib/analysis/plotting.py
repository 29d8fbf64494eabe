"""One style for every figure: fixed colours and markers a method, seeds as dots, mean and sd with n."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from igd_lib.analysis import results
from igd_lib.analysis.tables import far_below
from igd_lib.tools import files
from igd_lib.tools.version import PROJECT

STYLE = PROJECT / "paper_figures" / "igd.mplstyle"
# Okabe and Ito's colour-blind-safe palette.
COLOURS = {
    "Random": "#000000",
    "Herding": "#44AA99",
    "K-centre": "#999933",
    "Medoid": "#CC6677",
    "Confidence": "#661100",
    "EL2N": "#DDCC77",
    "EL2N (easiest)": "#88CCEE",
    "DM": "#8C6D31",
    "IDC-1": "#C49A00",
    "DATM": "#637939",
    "DATM (hard labels, 8 bits)": "#A5B96E",
    "SRe2L": "#AD494A",
    "G-VBSM": "#E7969C",
    "TDSDM": "#6B6ECF",
    "D4M": "#17A2B8",
    "RDED": "#777777",
    "DiT": "#0072B2",
    "DiT, best cfg": "#56B4E9",
    "DiT + G_I": "#CC79A7",
    "DiT + G_I throughout": "#E69F00",
    "DiT + G_D": "#009E73",
    "DiT-IGD": "#D55E00",
    "DiT + classifier loss": "#B2182B",
    "DiT + MGD3": "#1B9E77",
    "DiT + MGD3 (nearest)": "#66C2A5",
    "DiT + MGD3 (random)": "#A6CEE3",
    "DiT + MGD3 (pooled)": "#1F78B4",
    "DiT + MGD3 (shuffled)": "#BEBADA",
    "DiT + MGD3 (algorithm)": "#7570B3",
    "DiT + MGD3 + G_D": "#E7298A",
    "DiT + OT": "#A6761D",
    "Minimax": "#332288",
    "Minimax + G_I": "#AA4499",
    "Minimax + G_D": "#117733",
    "Minimax-IGD": "#882255",
}
MARKERS = {
    "Random": "s",
    "Herding": "H",
    "K-centre": "p",
    "Medoid": "d",
    "Confidence": ">",
    "EL2N": "<",
    "EL2N (easiest)": "8",
    "DM": "s",
    "IDC-1": "D",
    "DATM": "h",
    "DATM (hard labels, 8 bits)": "H",
    "SRe2L": "<",
    "G-VBSM": ">",
    "TDSDM": "d",
    "D4M": "p",
    "DiT": "o",
    "DiT, best cfg": "D",
    "DiT + G_I": "v",
    "DiT + G_I throughout": "X",
    "DiT + G_D": "^",
    "DiT-IGD": "*",
    "DiT + classifier loss": "<",
    "DiT + MGD3": "s",
    "DiT + MGD3 (nearest)": "p",
    "DiT + MGD3 (random)": "d",
    "DiT + MGD3 (pooled)": "h",
    "DiT + MGD3 (shuffled)": "X",
    "DiT + MGD3 (algorithm)": "8",
    "DiT + MGD3 + G_D": "P",
    "DiT + OT": ">",
    "RDED": "P",
    "Minimax": "o",
    "Minimax + G_I": "v",
    "Minimax + G_D": "^",
    "Minimax-IGD": "*",
}


# What axes are called.
PARAMETERS = {
    "cfg": "classifier-free guidance scale (cfg)",
    "k": "k",
    "gamma": "gamma (for 4,096 latent values)",
}
METRICS = {"top1": "top-1 accuracy (%)", "influence_loss": "mean influence loss"}


def use_style() -> None:
    """Apply the project's matplotlib style; tables show the whole of long labels."""
    if STYLE.is_file():
        plt.style.use(STYLE)
    pd.set_option("display.max_colwidth", None)


def style_of(look: str, other: str = "#777777") -> tuple[str, str]:
    """The colour and marker of what `results.look` says of a method; unknown: `other` and a circle."""
    return COLOURS.get(look, other), MARKERS.get(look, "o")


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PDF, SVG and PNG beside each other with reproducible bytes; returns the three paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in (
        ("pdf", {"CreationDate": None}),
        ("svg", {"Date": None}),
        ("png", {"Software": None}),
    ):
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
    """A column a method: seeds as dots, mean and sd beside; those far below as words at the lower edge."""
    methods = list(dict.fromkeys(rows.method))
    figure, axes = plt.subplots(figsize=(1.1 * len(methods) + 1.2, 3.2), layout="constrained")
    _columns(axes, rows, methods, label)
    axes.set_title(f"{title}\n({_over(_counts(rows))})")
    return figure


def scores_by(rows: pd.DataFrame, by: str, *, title: str, label: str = "top-1 accuracy (%)") -> Figure:
    """`scores` in a panel a value of a column, one above the other, each with an axis of its own."""
    methods, values = list(dict.fromkeys(rows.method)), list(dict.fromkeys(rows[by]))
    size = (0.95 * len(methods) + 1.2, 2.3 * len(values) + 0.8)
    figure, panels = plt.subplots(len(values), figsize=size, sharex=True, layout="constrained", squeeze=False)
    for axes, value in zip(panels[:, 0], values, strict=True):
        _columns(axes, rows[rows[by] == value], methods, label)
        axes.set_title(value)
    figure.suptitle(f"{title}\n({_over(_counts(rows.drop_duplicates(['method', 'seed'])))})")
    return figure


def _counts(rows: pd.DataFrame) -> list[int]:
    """How many seeds methods have."""
    return sorted(set(rows.groupby("method").size()))


def _columns(axes: Axes, rows: pd.DataFrame, methods: Sequence[str], label: str) -> None:
    """A column a method."""
    below, looks = far_below(rows), results.looks(rows)
    for position, method in enumerate(methods):
        values = rows[rows.method == method].value
        colour, marker = style_of(looks[method])
        if method in below:
            edge = ("data", "axes fraction")
            arrow = dict(arrowstyle="->", color=colour)
            axes.annotate(
                f"{values.mean():.1f}\n(off the\naxis)",
                (position, 0),
                (position, 0.13),
                edge,
                edge,
                ha="center",
                color=colour,
                arrowprops=arrow,
            )
            continue
        axes.plot(
            [position - 0.13] * len(values),
            values,
            marker,
            color=colour,
            alpha=0.45,
            markersize=5,
            linestyle="none",
        )
        sd = values.std() if len(values) > 1 else 0.0
        axes.errorbar(
            position + 0.13, values.mean(), yerr=sd, fmt=marker, color=colour, markersize=8, capsize=3
        )
    parts = [method.replace(", ", ",\n").replace(" (", "\n(").splitlines() for method in methods]
    axes.set_xticks(
        range(len(methods)),
        ["\n".join(line for part in own for line in textwrap.wrap(part, 16)) for own in parts],
    )
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylabel(label)


def _over(counts: Sequence[int]) -> str:
    """What dots and bars are, of methods with so many seeds each: one seed has no sd."""
    if list(counts) == [1]:
        return "n = 1 generation seed, no sd"
    return f"mean and sd over n = {', '.join(map(str, counts))} generation seeds"


def curves(rows: pd.DataFrame, panels: Sequence[tuple[str, str]], *, title: str) -> Figure:
    """A panel a (parameter, metric): metric over the parameter that rows differ in, a line a kind of method.

    Seeds as dots, mean and sd beside them; the mean of sampling without guidance as a dashed line where it
    does not differ.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels) + 0.6, 3.6), layout="constrained", squeeze=False
    )
    rows = rows.assign(look=rows.method.map(results.looks(rows)))
    counts: set[int] = set()
    for place, (parameter, metric) in zip(axes[0], panels, strict=True):
        measured = rows[rows.metric == metric]
        own = measured[measured.varies == parameter].assign(at=lambda found, name=parameter: found[name])
        _lines(place, own)
        plain = measured[(measured.varies == "") & (measured.family == "sampled") & (measured.guides == "")]
        for look, found in plain[plain.cfg_choice == ""].groupby("look", sort=False):
            colour, _ = style_of(str(look))
            place.axhline(found.value.mean(), color=colour, linewidth=1, linestyle="--", label=look)
        place.set(xlabel=PARAMETERS.get(parameter, parameter), ylabel=METRICS.get(metric, metric))
        counts |= set(own.groupby("method").size())
    handles = {
        label: handle
        for place in axes[0]
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}\n({_over(sorted(counts))})")
    return figure


def _lines(place: Axes, own: pd.DataFrame) -> None:
    """A line a look over the column `at`, slightly apart so that no bar hides another."""
    looks = list(dict.fromkeys(own["look"]))
    for position, look in enumerate(looks):
        line = own[own["look"] == look]
        spread = line.groupby("at")["value"].agg(["mean", "std"]).fillna(0.0)
        colour, marker = style_of(look)
        shift = 0.012 * (own["at"].max() - own["at"].min()) * (position - (len(looks) - 1) / 2)
        place.plot(
            line["at"] + shift, line.value, marker, color=colour, alpha=0.3, markersize=4, linestyle="none"
        )
        place.errorbar(
            spread.index + shift,
            spread["mean"],
            yerr=spread["std"],
            fmt=f"{marker}-",
            color=colour,
            markersize=6,
            capsize=2,
            label=look,
        )


def against_accuracy(
    rows: pd.DataFrame, distances: pd.DataFrame, *, title: str, label: str = "top-1 accuracy (%)"
) -> Figure:
    """A panel a metric: each set's metric against its top-1, a point each.

    Methods by colour and marker, those far below in words.
    """
    rows, title = _on_the_axes(rows[rows.metric == "top1"], title)
    accuracy, looks = rows.set_index(["method", "seed"])["value"], results.looks(rows)
    metrics = list(dict.fromkeys(distances.metric))
    figure, panels = plt.subplots(
        1,
        len(metrics),
        figsize=(2.7 * len(metrics) + 0.4, 3.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        own = distances[distances.metric == metric].set_index(["method", "seed"])["value"]
        _sets_as_points(axes, own, accuracy, looks)
        axes.set_xlabel(metric.replace(" over ", "\nover "))
    return _finish(figure, panels[0][0], title, label, per_line=len(set(rows.method)))


def influence(
    rows: pd.DataFrame, losses: pd.DataFrame, *, title: str, label: str = "top-1 accuracy (%)"
) -> Figure:
    """A panel a network: each set's mean influence loss against the network's accuracy.

    The network is trained on the set; methods far below are in words.
    """
    rows, title = _on_the_axes(rows[rows.metric == "top1"], title)
    accuracy, looks = rows.set_index(["method", "seed"]), results.looks(rows)
    networks = list(dict.fromkeys(accuracy.network))
    own = losses.set_index(["method", "seed"])["value"]
    figure, panels = plt.subplots(
        1,
        len(networks),
        figsize=(3.3 * len(networks) + 0.6, 3.6),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, network in zip(panels[0], networks, strict=True):
        _sets_as_points(axes, own, accuracy[accuracy.network == network]["value"], looks)
        axes.set(xlabel="mean influence loss", title=network)
    return _finish(figure, panels[0][0], title, label, per_line=4)


def _on_the_axes(accuracy: pd.DataFrame, title: str) -> tuple[pd.DataFrame, str]:
    """The rows of methods that are not far below the others, and a title that names those that are."""
    below = {method: accuracy[accuracy.method == method].value.mean() for method in far_below(accuracy)}
    words = ", ".join(f"{method} ({mean:.1f} %)" for method, mean in below.items())
    return accuracy[~accuracy.method.isin(list(below))], f"{title}\noff the axes: {words}" if below else title


def _sets_as_points(axes: Axes, x: pd.Series, y: pd.Series, looks: Mapping[str, str]) -> None:
    """A point a set, by method and seed: both series have them as their index."""
    for method in dict.fromkeys(y.index.get_level_values("method")):
        colour, marker = style_of(looks[method])
        axes.plot(
            x[method],
            y[method].reindex(x[method].index),
            marker,
            color=colour,
            alpha=0.7,
            markersize=6,
            linestyle="none",
            label=method,
        )


def _finish(figure: Figure, first: Axes, title: str, label: str, *, per_line: int) -> Figure:
    """One legend for all panels below them, the label of their shared ordinate and the title."""
    first.set_ylabel(label)
    figure.legend(
        *first.get_legend_handles_labels(), loc="outside lower center", ncols=per_line, frameon=False
    )
    figure.suptitle(title)
    return figure


def places(coordinates: pd.DataFrame, distances: pd.DataFrame, *, title: str) -> Figure:
    """A panel a set: its points of a joint t-SNE over the real ones, with its distance to them."""
    real, names = (
        coordinates[coordinates.set == "real"],
        [name for name in dict.fromkeys(coordinates.set) if name != "real"],
    )
    looks = results.looks(distances)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(2.1 * columns, 2.2 * lines + 0.4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        own, (colour, marker) = coordinates[coordinates.set == name], style_of(looks[name])
        axes.plot(real.x, real.y, ".", color="#cccccc", markersize=3)
        axes.plot(
            own.x,
            own.y,
            marker,
            color=colour,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.4,
            linestyle="none",
        )
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            f"{name}\nWasserstein {distances[distances.method == name].value.mean():.2f}", fontsize=8
        )
    figure.suptitle(title)
    return figure


def read_gallery(source: str | Path) -> dict[str, Any]:
    """`gallery`'s arguments from `pictures.Gallery.save`'s two files: `source` without .png and .csv."""
    table = pd.read_csv(io.StringIO(files.text(f"{source}.csv")), dtype=str, keep_default_na=False)
    titles = [table[column].iloc[0] for column in table.columns if column.isdecimal()]
    with Image.open(f"{source}.png") as picture:
        grid = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    rows = [torch.stack(row.chunk(len(titles), dim=2)) for row in grid.chunk(len(table), dim=1)]
    return {
        "columns": dict(zip(table.row, rows, strict=True)),
        "titles": titles,
        "title": table.title.iloc[0],
        "looks": dict(zip(table.row, table["look"], strict=True)),
    }


def gallery(
    columns: Mapping[str, Tensor],
    *,
    titles: Sequence[str],
    title: str,
    looks: Mapping[str, str] | None = None,
) -> Figure:
    """A row a method, a column a noise: `columns[method]` is uint8 (n, 3, H, W), `titles` one a column.

    looks: what each row is coloured by (`results.look`).
    """
    count = len(titles)
    figure, axes = plt.subplots(
        len(columns),
        count,
        figsize=(0.72 * count + 1.3, 0.78 * len(columns) + 0.55),
        layout="constrained",
        squeeze=False,
    )
    for position, (row, (method, images)) in enumerate(zip(axes, columns.items(), strict=True)):
        for index, axis in enumerate(row):
            axis.imshow(images[index].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if position == 0:
                axis.set_title(titles[index], fontsize=7)
        row[0].set_ylabel(
            method,
            rotation=0,
            ha="right",
            va="center",
            color=style_of((looks or {}).get(method, ""), "#333333")[0],
        )
    figure.suptitle(title)
    return figure


def similarity_matrices(epochs: Sequence[float], matrices: Mapping[str, Tensor]) -> Figure:
    """The cosine of each checkpoint's gradient with each other's, a panel a rule: (E, E) each."""
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(3.2 * len(matrices) + 0.6, 3.3), layout="constrained", squeeze=False
    )
    names = [f"{round(epoch, 2):g}" for epoch in epochs]
    every = -(-len(names) // 12)
    for axes, (name, matrix) in zip(panels[0], matrices.items(), strict=True):
        seaborn.heatmap(
            pd.DataFrame(matrix.double().numpy(), index=names, columns=names),
            ax=axes,
            vmin=-1,
            vmax=1,
            cmap="RdBu_r",
            square=True,
            xticklabels=every,
            yticklabels=every,
            cbar=axes is panels[0, -1],
            cbar_kws={"label": "cosine"},
        )
        axes.set(xlabel="epoch", title=textwrap.fill(name, 34))
        axes.tick_params(labelsize=6, rotation=0)
    panels[0, 0].set_ylabel("epoch")
    return figure


def matrix_table(epochs: Sequence[float], matrices: Mapping[str, Tensor]) -> pd.DataFrame:
    """What `similarity_matrices` draws as a table: rule, epoch, other, cosine."""
    return pd.DataFrame(
        {"rule": name, "epoch": epoch, "other": other, "cosine": float(matrix[row, column])}
        for name, matrix in matrices.items()
        for row, epoch in enumerate(epochs)
        for column, other in enumerate(epochs)
    )


def curve_table(
    epochs: Sequence[float], curves: Mapping[str, Sequence[float]], threshold: float
) -> pd.DataFrame:
    """What `similarities` draws as a table: rule, epoch, similarity (empty at epoch 0), threshold."""
    return pd.DataFrame(
        {
            "rule": name,
            "epoch": epoch,
            "similarity": value if np.isfinite(value) else np.nan,
            "threshold": threshold,
        }
        for name, values in curves.items()
        for epoch, value in zip(epochs, values, strict=True)
    )


def similarities(
    epochs: Sequence[float], curves: Mapping[str, Sequence[float]], *, threshold: float
) -> Figure:
    """Algorithm 2's similarity to the last kept checkpoint; kept checkpoints are filled."""
    figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
    for (name, values), colour, marker in zip(
        curves.items(), ("#D55E00", "#0072B2"), ("o", "s"), strict=False
    ):
        kept = [value < threshold for value in values]
        # The first has nothing to compare with.
        shown = [1.0 if value == float("-inf") else value for value in values]
        axes.plot(epochs[1:], shown[1:], color=colour, linewidth=1, label=name)
        for epoch, value, keep in list(zip(epochs, shown, kept, strict=True))[1:]:
            axes.plot(
                epoch, value, marker, color=colour, markerfacecolor=colour if keep else "white", markersize=5
            )
    axes.axhline(threshold, color="#777777", linewidth=0.8, linestyle="--", label=f"threshold {threshold}")
    axes.set(xlabel="epoch", ylabel="cosine to the last kept")
    axes.set_title("Algorithm 2: filled = kept (epoch 0 always is)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
