"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images.

`python paper_figures/make_figures.py FOLDER ...` first takes new rows over: every FOLDER/NN_name/rows.csv
that a notebook saved (`-p save_to FOLDER/NN_name`) becomes data/NN_name.csv, sorted and checked; its other
tables and its images.png become data/NN_name.TABLE.csv and data/NN_name.images.png, and of a few notebooks
the pictures themselves, data/NN_name.PICTURE.png. FOLDER can also be one such NN_name. `--into OTHER` keeps
and draws all of it in OTHER instead; rows of another scale than those here must go there. Drawing twice gives
the same bytes; MANIFEST.json has the hashes of what went in and what came out, and `--check` draws anew
elsewhere and names what is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from igd_lib.analysis import plotting, results, speed, statistics, tables, trajectories
from igd_lib.tools import files

HERE = Path(__file__).parent
MANIFEST = "MANIFEST.json"
GUIDED: dict[str, object] = {"guides": statistics.BOTH, "varies": ""}


def scores(rows: pd.DataFrame, title: str) -> Figure:
    return plotting.scores(tables.top1(rows), title=title)


def curves(*panels: tuple[str, str]) -> Callable[[pd.DataFrame, str], Figure]:
    return lambda rows, title: plotting.curves(rows, panels, title=title)


def against_accuracy(rows: pd.DataFrame, title: str) -> Figure:
    return plotting.against_accuracy(tables.top1(rows), rows[~rows.metric.str.startswith("top")], title=title)


def influence(rows: pd.DataFrame, title: str) -> Figure:
    return plotting.influence(tables.top1(rows), rows[rows.metric == "influence_loss"], title=title)


@dataclass(frozen=True)
class Artefact:
    """How the rows of one notebook are shown."""

    source: str  # data/SOURCE.csv
    heading: str  # "{where}" becomes " on the stand-in" for its rows
    name: str  # NAME.md, .png, .svg, .pdf
    claims: statistics.Claims = statistics.table_claims  # whose differences are shown
    table: int | None = None  # of the paper, to be shown beside
    figure: Callable[[pd.DataFrame, str], Figure] = scores
    kept: str = "accuracy"  # what the notebook calls that figure
    all_networks: bool = False  # whether the figure shows them all
    correlations: bool = False  # of every metric with accuracy
    labellings: bool = False  # whether networks are trained with labels of several kinds
    note: str = ""  # on rows from before version 0.3


SENSITIVITY = curves(("k", "top1"), ("gamma", "top1"))
RDED_HARD = (
    "RDED's row here is not RDED's: version 0.2 set its images together from 2 x 2 patches, and RDED's own "
    "code makes no grids of images this small, but one patch an image."
)
# What made the rows that are from before version 0.3, whose CHANGELOG says what it corrected.
BEFORE_0_3 = frozenset({"d22bbe31409a"})
ARTEFACTS = (
    Artefact("00_quickstart", "Quickstart", "quickstart"),
    Artefact("01_nette_woof", "Table 1{where}", "table01", table=1),
    Artefact("01_nette_woof_ipc50", "Table 1{where}, IPC 50", "table01_ipc50", table=1, note=RDED_HARD),
    Artefact("01_nette_woof_ten", "Table 1{where}, ten seeds", "table01_ten", table=1),
    Artefact("03_imagenet1k", "Table 2{where}, soft labels", "table02", table=2),
    Artefact("04_surrogate_architecture", "Table 4{where}", "table04", statistics.varied(guides="deviation")),
    Artefact("05_guidance_ablation", "Table 5{where}", "table05", statistics.ablation_claims, table=5),
    Artefact("06_checkpoint_selection", "Table 6{where}", "table06", statistics.selection_claims),
    Artefact(
        "06_checkpoint_selection_minimax",
        "Table 6{where}, Minimax backbone",
        "table06_minimax",
        statistics.selection_claims,
    ),
    Artefact("07_food101", "Table 7{where}", "table07", table=7),
    Artefact("08_cifar", "Table 8{where}", "table08"),
    Artefact("08_cifar_ipc50", "Table 8{where}, IPC 50", "table08_ipc50"),
    Artefact("08_cifar_ten", "Table 8{where}, ten seeds", "table08_ten"),
    Artefact("09_diffusion_baselines", "Table 9{where}, soft labels", "table09"),
    Artefact("10_dpm_solver", "Table 10{where}", "table10", statistics.solver_claims, table=10),
    Artefact(
        "11_fid_coverage",
        "Table 11{where}",
        "table11",
        statistics.against(statistics.PLAIN_DIT),
        figure=against_accuracy,
        kept="distances",
        correlations=True,
    ),
    Artefact(
        "12_hyperparameters", "k and gamma{where}, validation data", "table12", statistics.varied(guides="")
    ),
    Artefact(
        "13_paper_vs_code",
        "Paper against released code{where}",
        "paper_vs_code",
        statistics.fidelity_claims,
        figure=curves(("cfg", "top1")),
        kept="by_cfg",
    ),
    Artefact("14_shortcuts", "Faster guidance{where}", "shortcuts", statistics.against(GUIDED)),
    Artefact(
        "14_shortcuts_fashion-mnist",
        "Faster guidance{where}, grey images",
        "shortcuts_fashion-mnist",
        statistics.against(GUIDED),
    ),
    Artefact("15_guides", "Every guide from the same noise{where}", "guides", statistics.guide_claims),
    Artefact("15_guides_ten", "The main guides{where}, ten seeds", "guides_ten", statistics.guide_claims),
    Artefact("16_coresets", "Distilling against choosing real images{where}", "coresets", labellings=True),
    Artefact(
        "21_influence",
        "Figure 1{where}",
        "fig01",
        figure=influence,
        kept="influence",
        all_networks=True,
    ),
    Artefact(
        "22_early_stage",
        "Figure 2{where}",
        "fig02",
        statistics.early_stage_claims,
        figure=curves(("k", "influence_loss"), ("k", "top1")),
        kept="early_stage",
    ),
    Artefact(
        "26_sensitivity",
        "Figure 6{where}",
        "fig06",
        statistics.varied(guides=""),
        figure=SENSITIVITY,
        kept="sensitivity",
    ),
    Artefact(
        "26_sensitivity_minimax",
        "Figure 6{where}, Minimax backbone",
        "fig06_minimax",
        statistics.varied(guides=""),
        figure=SENSITIVITY,
        kept="sensitivity",
    ),
)


def pictures(source: Path) -> Figure:
    return plotting.gallery(**plotting.read_gallery(f"{source}.images"))


def places(source: Path) -> Figure:
    coordinates, distances = (
        pd.read_csv(source.with_suffix(".coordinates.csv")),
        results.load(source.with_suffix(".csv")),
    )
    one = distances.iloc[0]
    return plotting.places(
        coordinates,
        distances,
        title=f"{one.dataset}, {coordinates['class'].iloc[0]}, IPC {one.ipc}, {one.scale}, seed 0",
    )


def overview(source: Path) -> Figure:
    shown = plotting.read_gallery(f"{source}.images")
    paths = pd.read_csv(source.with_suffix(".paths.csv"))
    return trajectories.figure(
        paths, shown["columns"], [int(step) for step in shown["titles"]], title=shown["title"]
    )


def similarity(source: Path) -> Figure:
    table = pd.read_csv(source.with_suffix(".similarity.csv"))
    curves = {
        name: own.similarity.fillna(-np.inf).tolist() for name, own in table.groupby("rule", sort=False)
    }
    epochs = table.epoch[table.rule == table.rule.iloc[0]].tolist()
    return plotting.similarities(epochs, curves, threshold=float(table.threshold.iloc[0]))


def similarity_matrices(source: Path) -> Figure:
    table = pd.read_csv(source.with_suffix(".matrices.csv"))
    wide = {
        str(name): own.pivot(index="epoch", columns="other", values="cosine")
        for name, own in table.groupby("rule", sort=False)
    }
    epochs = next(iter(wide.values())).index.tolist()
    return plotting.similarity_matrices(
        epochs, {name: torch.tensor(own.to_numpy()) for name, own in wide.items()}
    )


@dataclass(frozen=True)
class Picture:
    """What a notebook drew of something else than rows, drawn again from the tables and images it saved."""

    source: str  # data/SOURCE.*
    kept: str  # what the notebook calls it
    name: str  # NAME.png, .svg, .pdf
    figure: Callable[[Path], Figure] | None = pictures  # None: as the notebook drew it


def as_drawn(source: str, *kept: str) -> list[Picture]:
    """Pictures of what no table holds: data/SOURCE.KEPT.png."""
    return [Picture(source, one, f"data/{source}.{one}", None) for one in kept]


PICTURES = (
    Picture("00_quickstart", "gallery_classes", "quickstart_gallery"),
    Picture("02_checkpoints", "similarity", "similarity", similarity),
    Picture("02_checkpoints", "similarity_matrices", "similarity_matrices", similarity_matrices),
    Picture("15_guides", "gallery", "guides_gallery"),
    *as_drawn("17_your_data", "real_images", "similarity", "gallery", "accuracy"),
    *as_drawn("18_lesson", "samples", "denoising", "similarity", "influence", "deviation", "pulls", "ways"),
    *as_drawn("18_lesson", "sets", "accuracy"),
    Picture("22_early_stage", "examples", "fig02_examples"),
    Picture("23_tsne", "tsne", "fig03", places),
    Picture("24_same_noise", "same_noise", "fig04"),
    Picture("25_overview", "overview", "fig05", overview),
    Picture("27_gallery", "gallery_{config.backbone}", "fig07"),
    Picture("27_gallery_minimax", "gallery_{config.backbone}", "fig08"),
)


def drawn(source: str) -> dict[str, str]:
    """The names of what is drawn here of a run, by the names that its notebook keeps its figures under."""
    return {one.kept: one.name for one in (*ARTEFACTS, *PICTURES) if one.source == source}


def take_over(folders: Sequence[Path], base: Path) -> None:
    """Rows, tables and images that notebooks saved become data/* of `base`. Raises ValueError, before any,
    for one of another scale there.
    """
    runs = [
        run
        for folder in folders
        for run in ([folder] if re.match(r"\d\d_", folder.name) else sorted(folder.glob("[0-9][0-9]_*")))
        if run.is_dir()
    ]
    kinds = ("*.csv", "images.png", "notes.md")
    saved = [
        file
        for run in runs
        for file in sorted([*(path for kind in kinds for path in run.glob(kind)), *_as_drawn(run)])
    ]
    for file in saved:
        scales = set(pd.read_csv(file).scale) if file.suffix == ".csv" else set()
        if base == HERE and scales - {"small"}:
            raise ValueError(
                f"{file} is of scale {', '.join(sorted(scales))} and {HERE / 'data'} of scale small: "
                "choose a folder of its own, --into FOLDER"
            )
    for file in saved:
        if file.name == "rows.csv":
            rows = pd.read_csv(
                file,
                dtype={"settings_hash": str, "artefact": str, "git_revision": str},
                keep_default_na=False,
            )
            print("took over", results.consolidate(rows, base / "data" / f"{file.parent.name}.csv"))
        else:
            print(
                "took over", files.write(base / "data" / f"{file.parent.name}.{file.name}", file.read_bytes())
            )


def _as_drawn(run: Path) -> list[Path]:
    """A run's pictures that are kept as the notebook drew them."""
    kept = [one.kept for one in PICTURES if one.source == run.name and one.figure is None]
    return [path for name in kept if (path := run / f"{name}.png").is_file()]


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with plain methods first, in the order of their colours, the others by label, numbers in it by
    size.
    """
    known, table = list(plotting.COLOURS), results.methods(rows)
    looks = results.looks(rows)

    def rank(name: str) -> tuple:
        plain = table.loc[name, "varies"] == "" and looks[name] in known
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        numbers = (float(part) if index % 2 else part for index, part in enumerate(parts))
        return (known.index(looks[name]) if plain else len(known), *numbers)

    ranks = rows.method.map(rank)
    return rows.iloc[sorted(range(len(rows)), key=lambda position: (ranks.iloc[position], position))]


def draw(artefact: Artefact, data: Path, out: Path) -> None:
    """One figure and one page of tables from the rows of one notebook."""
    rows = in_order(results.load(data / f"{artefact.source}.csv"))
    again = rows.artefact.str.endswith("_readings")
    readings, rows = rows[again], rows[~again]
    accuracy = tables.top1(rows)
    networks = list(dict.fromkeys(accuracy.network))
    first = rows[rows.network.isin([networks[0], ""])]
    one = accuracy.iloc[0]
    title, whole_title = (
        f"{one.dataset}, IPC {one.ipc}, {names}, scale {one.scale}"
        for names in (networks[0], ", ".join(networks))
    )
    others = rows[~rows.metric.str.startswith("top")]
    whole = [tables.accuracy_table(accuracy) if len(networks) == 1 else tables.cross_table(accuracy)]
    if len(others):
        whole = (
            [tables.metric_table(rows)]
            if len(networks) == 1
            else [*whole, tables.metric_table(tables.top1(first), others)]
        )
    if artefact.correlations:
        whole.append(tables.rank_correlations(first, others))
    if artefact.all_networks:
        whole.append(tables.correlations_by(rows, others))
    figure = artefact.figure(rows, whole_title) if artefact.all_networks else artefact.figure(first, title)
    plotting.keep(figure, str(out), artefact.name)
    small = one.scale == "small"
    trained = " and ".join(dict.fromkeys(accuracy.device))
    parts = [f"# {artefact.heading.format(where=' on the stand-in' if small else '')}"]
    parts += [
        f"{whole_title}. Means ± sd over n generation seeds; trained on {trained}. {_origin(rows)}",
        *(results.markdown(table, 3) for table in whole),
    ]
    parts += [artefact.note] if is_before_0_3(rows) else []
    if (notes := data / f"{artefact.source}.notes.md").is_file():
        heading = "What the compared methods' images are, and which settings are not their authors':"
        parts += [f"{heading}\n\n{notes.read_text()}"]
    parts += claims_tested(tables.top1(first), artefact.claims)
    if len(readings):
        parts += ["The same sets, read in other ways:", results.markdown(tables.best_and_last(readings), 1)]
    if artefact.table is not None:
        paper = tables.reported(artefact.table)
        paper = paper[paper.ipc == str(one.ipc)] if str(one.ipc) in set(paper.ipc) else paper
        parts += [
            "The paper's figures, which are for other data:" if small else "Beside the paper's figures:"
        ]
        parts += [
            results.markdown(
                tables.paper_table(paper)
                if small
                else tables.beside_paper(accuracy, paper, by=("dataset", "ipc", "network", "method")),
                1,
            )
        ]
    files.write(out / f"{artefact.name}.md", "\n\n".join(part.strip() for part in parts if part) + "\n")


def claims_tested(accuracy: pd.DataFrame, claims: statistics.Claims, by: Sequence[str] = ()) -> list[str]:
    """Of a page: the differences that its claims are about and how they are tested; nothing without any."""
    shown = tables.differences(accuracy, claims, by)
    if shown.empty:
        return []
    tested = (
        f"Paired differences in top-1 (points, same noise) with 95 % intervals. The {len(shown)} lines are "
        "one family: p by a two-sided paired t-test over generation seeds, then after Holm's correction; "
        "gain and loss are said where that is below 0.05. The intervals are not widened for the family."
    )
    return [tested, results.markdown(shown, 1)]


def labelled(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The accuracies of the first network, on validation images and on test images."""
    rows = tables.top1(rows)
    rows = rows[rows.network == rows.network.iloc[0]]
    held = rows.artefact.str.endswith("_validation")
    return rows[held], rows[~held]


def draw_labellings(artefact: Artefact, data: Path, out: Path) -> None:
    """One figure and one page of sets with labels of several kinds, against the best choice of real images.

    That was chosen on validation images, whose rows are of an artefact of their own.
    """
    rows = in_order(results.load(data / f"{artefact.source}.csv"))
    validation, accuracy = labelled(rows)
    best, one = statistics.best_coresets(validation), accuracy.iloc[0]
    title = f"{one.dataset}, IPC {one.ipc}, {one.network}, scale {one.scale}"
    plotting.keep(plotting.scores_by(accuracy, "protocol", title=title), str(out), artefact.name)
    trained = " and ".join(dict.fromkeys(accuracy.device))
    parts = [
        f"# {artefact.heading.format(where=' on the stand-in' if one.scale == 'small' else '')}",
        f"{title}. Means ± sd over n generation seeds; trained on {trained}. All columns are at equal "
        f"optimiser steps. A coreset is one set for all seeds: its sd is of training alone. {_origin(rows)}",
        results.markdown(tables.cross_table(accuracy, "protocol"), 1),
        "The choices of real images on validation images, by which the best is named:",
        results.markdown(tables.cross_table(validation, "protocol"), 1),
        "\n".join(f"- {protocol}: {method}" for protocol, method in best.items()),
        *claims_tested(accuracy, statistics.against_coresets(best), by=("protocol",)),
    ]
    files.write(out / f"{artefact.name}.md", "\n\n".join(part.strip() for part in parts) + "\n")


def is_before_0_3(rows: pd.DataFrame) -> bool:
    """Whether some of the rows are from before version 0.3."""
    return not BEFORE_0_3.isdisjoint(rows.git_revision)


def _origin(rows: pd.DataFrame) -> str:
    """What made the rows' sets, and whether it has been corrected since."""
    revisions = sorted(set(rows.git_revision))
    made = f"Sets made by revision {', '.join(revisions)}"
    if not is_before_0_3(rows):
        return f"{made}."
    return f"{made}, before the corrections of version 0.3 (CHANGELOG.md); they are still to be made anew."


def draw_all(base: Path, out: Path) -> dict[str, dict[str, str]]:
    """Everything that `base` has data for, into `out`; the hashes of inputs and outputs (of those that no
    compression library has a hand in).
    """
    plotting.use_style()
    data = base / "data"
    there = [artefact for artefact in ARTEFACTS if (data / f"{artefact.source}.csv").is_file()]
    inputs = {
        HERE / "igd.mplstyle",
        HERE / "data" / "paper_reported.csv",
        *(data / f"{artefact.source}.csv" for artefact in there),
        *(path for artefact in there if (path := data / f"{artefact.source}.notes.md").is_file()),
    }
    names = [f"{artefact.name}.{kind}" for artefact in there for kind in ("md", "svg")]
    for artefact in there:
        (draw_labellings if artefact.labellings else draw)(artefact, data, out)
    for picture in PICTURES:
        own = sorted(data.glob(f"{picture.source}.*.*"))
        if own and picture.figure is not None:
            own += [path for path in [data / f"{picture.source}.csv"] if path.is_file()]
            plotting.keep(picture.figure(data / picture.source), str(out), picture.name)
            inputs, names = inputs | set(own), [*names, f"{picture.name}.svg"]
    bench = data / "bench.json"
    if bench.is_file():
        plotting.keep(speed.figure(json.loads(bench.read_text())), str(out), "bench")
        inputs, names = inputs | {bench}, [*names, "bench.svg"]
    return {
        "inputs": {
            path.relative_to(base if path.is_relative_to(base) else HERE).as_posix(): files.sha256(path)
            for path in sorted(inputs)
        },
        "outputs": {name: files.sha256(out / name) for name in sorted(names)},
    }


def stale() -> list[str]:
    """What is not as drawing it now would make it, a line a file; empty if nothing.

    PNG files are compared by what they show, since a compression library has a hand in their bytes; of PDF
    files only that they are there.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = draw_all(HERE, Path(folder))
        drawn = sorted(path.name for path in Path(folder).iterdir())
        lines = [f"file {name} is missing" for name in drawn if not (HERE / name).is_file()]
        pictures = [name for name in drawn if name.endswith(".png") and (HERE / name).is_file()]
        lines += [
            f"file {name} shows something else"
            for name in pictures
            if not same_picture(HERE / name, Path(folder) / name)
        ]
    present = json.loads((HERE / MANIFEST).read_text()) if (HERE / MANIFEST).is_file() else {}
    lines += [
        f"{kind} {name}"
        for kind in wanted
        for name, value in wanted[kind].items()
        if present.get(kind, {}).get(name) != value
    ]
    lines += [
        f"{kind} {name} is no longer used or drawn"
        for kind in wanted
        for name in present.get(kind, {})
        if name not in wanted[kind]
    ]
    return lines + [
        f"file {name}"
        for name, value in wanted["outputs"].items()
        if (HERE / name).is_file() and files.sha256(HERE / name) != value
    ]


def same_picture(a: Path, b: Path) -> bool:
    """Whether two PNG files show the same but for a rounding: equal sizes, less than one of 255 levels apart
    on average.
    """
    one, other = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (a, b))
    return one.shape == other.shape and bool(np.abs(one - other).mean() < 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="take new rows over from here first")
    parser.add_argument(
        "--into",
        type=Path,
        default=HERE,
        help="where data are kept and figures drawn; default: this project's own",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail if one of this project's figures or tables is stale",
    )
    given = parser.parse_args(arguments)
    if given.check:
        lines = stale()
        print(
            "\n".join(["stale: run `make figures`", *lines]) if lines else "figures and tables are up to date"
        )
        return int(bool(lines))
    base = given.into.resolve()
    try:
        take_over([folder.resolve() for folder in given.folders], base)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    manifest = draw_all(base, base)
    files.write(base / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    print(f"drew {len(manifest['outputs'])} tables and figures into {base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
