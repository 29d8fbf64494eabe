"""Images of an experiment's sets, arranged for galleries, and written as pixels to redraw figures from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from igd_lib.analysis import plotting
from igd_lib.experiment.experiment import Experiment, Sets
from igd_lib.experiment.measures import save_table
from igd_lib.sets.store import in_memory
from igd_lib.tools import files


@dataclass(frozen=True)
class Gallery:
    """Rows of images under one title; `looks` is what a row is coloured by, by its name."""

    rows: Mapping[str, Tensor]  # uint8 (n, 3, H, W) each
    titles: Sequence[str]  # of the n columns
    title: str
    looks: Mapping[str, str]

    def figure(self) -> Figure:
        return plotting.gallery(self.rows, titles=self.titles, title=self.title, looks=self.looks)

    def save(self, experiment: Experiment, folder: str) -> None:
        """Write the pixels, `folder/images.png`, and the words beside them, if a folder is given."""
        if not folder:
            return
        grid = torch.cat([torch.cat(list(row), dim=2) for row in self.rows.values()], dim=1)
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        files.write(Path(folder) / "images.png", lambda path: image.save(path, format="PNG"))
        rows = [(row, self.looks.get(row, ""), self.title, *self.titles) for row in self.rows]
        numbers = map(str, range(len(self.titles)))
        save_table(
            experiment, pd.DataFrame(rows, columns=["row", "look", "title", *numbers]), folder, "images"
        )


def looks(sets: Sets) -> dict[str, str]:
    """What figures tell each method by, by its label."""
    return {method.label: method.look for method in sets.methods}


def _first_images(sets: Sets, label: int, count: int) -> dict[str, Tensor]:
    """By method's label, uint8 (n, 3, H, W): one class's first images of one seed."""
    return {
        method.label: in_memory(images).plain().of_class(label, count)
        for method, images in sets.of_seed(sets.shown_seed).items()
    }


def one_class(sets: Sets, label: int, *, title: str, column: str = "{}", count: int = 10) -> Gallery:
    """A row a method: one class's first images of one seed, columns named by their number."""
    rows = _first_images(sets, label, min(count, sets.ipc))
    return Gallery(
        rows, [column.format(number) for number in range(min(count, sets.ipc))], title, looks(sets)
    )


def across_classes(sets: Sets, *, title: str = "", count: int = 10) -> Gallery:
    """A row a method: the second image of each of the first classes, of one seed; with IPC 1 the only one.

    The first has no other to deviate from, so that deviation guidance does not show there.
    """
    seed, shown = sets.shown_seed, min(2, sets.ipc)
    title = title or (
        f"Image {shown} of the first classes, seed {seed}: each column's sampled rows share their noise"
    )
    once = Sets(
        sets.ipc, {(method, seed): in_memory(own).plain() for method, own in sets.of_seed(seed).items()}
    )
    classes = next(iter(once.cells.values())).classes[:count]
    parts = [_first_images(once, label, shown) for label in range(len(classes))]
    rows = {method: torch.stack([part[method][-1] for part in parts]) for method in parts[0]}
    return Gallery(rows, classes, title, looks(sets))


def by_class(sets: Sets, *, title: str, count: int = 10) -> Gallery:
    """A row a class and method, "CLASS, METHOD": the first images of one seed."""
    classes = next(iter(sets.cells.values())).classes
    rows = {
        f"{name}, {method}": images
        for label, name in enumerate(classes)
        for method, images in _first_images(sets, label, min(count, sets.ipc)).items()
    }
    return Gallery(rows, [str(number) for number in range(min(count, sets.ipc))], title, {})
