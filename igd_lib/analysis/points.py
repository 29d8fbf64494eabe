"""Pictures of points in the plane: clouds, fields of arrows, and the ways of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from igd_lib.analysis.plotting import style_of

# Paul Tol's muted palette: dark, middle and light, for three classes; a marker each.
CLASS_COLOURS, CLASS_MARKERS = ("#332288", "#44AA99", "#DDCC77"), ("o", "s", "^")
PANEL = 2.7  # inches
GREY = "#bbbbbb"


@dataclass(frozen=True)
class Field:
    """A panel of arrows at the nodes of a square grid, n x n, whose first coordinate changes faster."""

    title: str
    grid: Tensor  # (N, 2)
    arrows: Tensor  # (N, 2)
    heat: Tensor | None = None  # (N,): drawn below them
    cloud: Tensor | None = None  # (M, 2): points in grey
    marks: Tensor | None = None  # (K, 2): points in orange
    heat_label: str = ""


@dataclass(frozen=True)
class Set:
    """A panel of points, (n, 2) a class."""

    points: Sequence[Tensor]
    regions: Tensor | None = None  # (N,): the class a network gives to the nodes of a grid
    note: str = ""  # below the title


def sets(
    panels: Mapping[str, Set],
    classes: Sequence[str],
    *,
    title: str,
    extent: float,
    cloud: Sequence[Tensor] = (),  # (M, 2) a class, small behind each panel's points
    grid: Tensor | None = None,  # (N, 2): where the regions are known
    looks: Mapping[str, str] | None = None,  # what titles are coloured by
    panel: float = PANEL,  # inches
) -> Figure:
    """A panel a set: classes by colour and marker, over the regions of a network that it trained."""
    size = (panel * len(panels), panel + 1.1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    small = 9 if not cloud and max(len(own) for one in panels.values() for own in one.points) > 50 else 34
    for place, (name, one) in zip(axes.flat, panels.items(), strict=False):
        if one.regions is not None and grid is not None:
            _regions(place, grid, one.regions)
        for colour, own in zip(CLASS_COLOURS, cloud, strict=False):
            place.scatter(*own.T, s=3, color=colour, alpha=0.25, linewidths=0)
        _classes(place, one.points, classes, small)
        _square(place, extent)
        colour = style_of(looks[name])[0] if looks else "#000000"
        place.set_title(f"{name}\n{one.note}" if one.note else name, color=colour)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(title)
    return figure


def _classes(place: Axes, points: Sequence[Tensor], classes: Sequence[str], size: float) -> None:
    """Points by class."""
    edge = 0.4 if size > 20 else 0.0
    for name, colour, marker, own in zip(classes, CLASS_COLOURS, CLASS_MARKERS, points, strict=True):
        place.scatter(
            own[:, 0],
            own[:, 1],
            s=size,
            color=colour,
            marker=marker,
            edgecolors="black",
            linewidths=edge,
            label=name,
        )


def _regions(place: Axes, grid: Tensor, regions: Tensor) -> None:
    """Which class is given where."""
    side, shades = _side(grid), ListedColormap(CLASS_COLOURS)
    x, y = (grid[:, axis].reshape(side, side).numpy() for axis in (0, 1))
    found = regions.reshape(side, side).numpy()
    place.pcolormesh(x, y, found, cmap=shades, vmin=0, vmax=len(CLASS_COLOURS) - 1, alpha=0.22, linewidth=0)


def fields(panels: Sequence[Field], *, title: str, extent: float) -> Figure:
    """A panel a field: an arrow at every second node, drawn by the root of its length, over the loss."""
    size = (PANEL * len(panels), PANEL + 1.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for place, one in zip(axes[0], panels, strict=True):
        side = _side(one.grid)
        if one.heat is not None:
            x, y, heat = (
                values.reshape(side, side).numpy() for values in (one.grid[:, 0], one.grid[:, 1], one.heat)
            )
            drawn = place.contourf(x, y, heat, levels=14, cmap="cividis", alpha=0.85)
            bar = figure.colorbar(drawn, ax=place, orientation="horizontal", shrink=0.9)
            bar.locator = MaxNLocator(4)
            bar.update_ticks()
            bar.set_label(one.heat_label)
        if one.cloud is not None:
            colour = "#777777" if one.heat is None else "white"
            place.scatter(*one.cloud.T, s=4, color=colour, alpha=0.4, linewidths=0)
        at, arrows = (
            values.reshape(side, side, 2)[::2, ::2].reshape(-1, 2) for values in (one.grid, one.arrows)
        )
        colour = "black" if one.heat is None else "white"
        place.quiver(*at.T, *_shown(arrows).T, color=colour, angles="xy", pivot="mid", scale=17, width=0.007)
        if one.marks is not None:
            size_of = 46 if len(one.marks) < 20 else 6
            place.scatter(
                *one.marks.T, s=size_of, color="#D55E00", edgecolors="white", linewidths=0.3, zorder=3
            )
        _square(place, extent)
        place.set_title(one.title)
    figure.suptitle(title)
    return figure


def _shown(arrows: Tensor) -> Tensor:
    """Arrows by the root of their length, at most 1, so that short ones remain visible beside long ones."""
    lengths = arrows.norm(dim=1, keepdim=True)
    usual = lengths.quantile(0.9).clamp_min(1e-12)
    return arrows / lengths.clamp_min(1e-12) * (lengths / usual).clamp_max(1).sqrt()


def ways(
    found: Mapping[str, Tensor],  # (n, T + 1, 2): z_T ... z_0
    guided: Sequence[bool],  # of the T steps
    looks: Mapping[str, str],
    *,
    reference: str,  # the one that is drawn in grey behind the others
    cloud: Tensor,  # (M, 2)
    title: str,
    extent: float,
) -> Figure:
    """A panel a method: the ways of points from noise (open) to the finished latent (filled), Algorithm 1."""
    size = (PANEL * len(found), PANEL + 0.7)
    figure, axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    steps = [number for number, own in enumerate(guided) if own]
    for place, (name, own) in zip(axes[0], found.items(), strict=True):
        colour, marker = style_of(looks[name])
        place.scatter(*cloud.T, s=4, color="#cccccc", linewidths=0)
        for way, plain in zip(own, found[reference], strict=True):
            if name != reference:
                place.plot(*plain.T, "-", color=GREY, linewidth=0.8)
                place.plot(*plain[-1:].T, "o", color="#888888", markersize=5, markerfacecolor="white")
            place.plot(*way.T, "-", color=colour, linewidth=0.9, alpha=0.8)
            if name != reference:
                place.plot(*way[[number + 1 for number in steps]].T, ".", color=colour, markersize=3)
            place.plot(*way[:1].T, "o", color="#333333", markersize=3.5, markerfacecolor="white")
            place.plot(*way[-1:].T, marker, color=colour, markersize=8, markeredgecolor="white")
        _square(place, extent)
        place.set_title(name, color=colour)
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class Moment:
    """A panel of one step: latents (n, 2), the terms that move them, by name, and the memory (M, 2)."""

    at: Tensor
    terms: Mapping[str, Tensor]  # (n, 2) each, in the units of the axes
    memory: Tensor


def pulls(
    moments: Mapping[str, Moment],
    looks: Mapping[str, str],  # of the terms
    *,
    cloud: Tensor,  # (M, 2)
    title: str,
    extent: float,
) -> Figure:
    """A panel a moment: what moves a latent in one step, an arrow a term, drawn by the root of its length."""
    size = (PANEL * 1.4 * len(moments), PANEL * 1.4 + 0.9)
    figure, axes = plt.subplots(1, len(moments), figsize=size, layout="constrained", squeeze=False)
    for place, (name, one) in zip(axes[0], moments.items(), strict=True):
        place.scatter(*cloud.T, s=4, color="#cccccc", linewidths=0)
        place.scatter(*one.at.T, s=16, color="black", zorder=6, label="$z_t$")
        place.scatter(
            *one.memory.T, s=46, color="white", edgecolors="black", marker="D", zorder=3, label="memory"
        )
        for above, (term, arrows) in zip((5, 4, 3), one.terms.items(), strict=True):
            colour = style_of(looks[term])[0]
            units = dict(angles="xy", scale_units="xy", scale=0.5)
            place.quiver(
                *one.at.T, *_root(arrows).T, color=colour, width=0.006, label=term, zorder=above, **units
            )
        _square(place, extent)
        lengths = ", ".join(f"{own.norm(dim=1).mean():.2g}" for own in one.terms.values())
        place.set_title(f"{name}, mean lengths {lengths}")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    return figure


def _square(place: Axes, extent: float) -> None:
    place.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    place.tick_params(labelsize=6)


def _root(arrows: Tensor) -> Tensor:
    return arrows / arrows.norm(dim=1, keepdim=True).clamp_min(1e-12).sqrt()


def _side(grid: Tensor) -> int:
    return round(len(grid) ** 0.5)
