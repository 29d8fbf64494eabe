"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images.

`python paper_figures/make_figures.py FOLDER` first takes new rows over: every FOLDER/NN_name/rows.csv that a notebook
saved (`-p save_to FOLDER/NN_name`) becomes data/NN_name.csv, sorted and checked; its other tables and its images.png become
data/NN_name.TABLE.csv and data/NN_name.images.png. Drawing twice gives the same bytes;
MANIFEST.json has the hashes of what went in and what came out, and `--check` draws anew elsewhere and names what is stale.
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

import pandas as pd
from matplotlib.figure import Figure

from igd_lib import files, methods, plotting, results, tables

HERE = Path(__file__).parent
MANIFEST = "MANIFEST.json"
Pairs = Sequence[tuple[str, str]]


def against(reference: str, only: str = "") -> Callable[[Sequence[str]], Pairs]:
    """Every other method, or those whose name contains `only`, against `reference`."""
    return lambda names: [(name, reference) for name in names if name != reference and only in name]


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
    heading: str
    name: str  # NAME.md, .png, .svg, .pdf
    pairs: Callable[[Sequence[str]], Pairs] = methods.claims  # of the methods' names: whose differences are shown
    table: int | None = None  # of the paper, to be shown beside
    figure: Callable[[pd.DataFrame, str], Figure] = scores
    all_networks: bool = False  # whether the figure shows them all
    correlations: bool = False  # of every metric with accuracy
    note: str = ""


SENSITIVITY = curves(("k", "top1"), ("gamma", "top1"))
RDED_HARD = (
    "RDED's images are grids of 2 x 2 patches, made for soft labels and shuffled patches (Tables 2 and 9). With hard labels a network "
    "learns them and not the garments, which are twice as large in a test image: chance, most of them taken for the class with the most black."
)
ARTEFACTS = (
    Artefact("00_quickstart", "Quickstart", "quickstart"),
    Artefact("01_nette_woof", "Table 1 on the stand-in", "table01", note=RDED_HARD),
    Artefact("01_nette_woof_ipc50", "Table 1 on the stand-in, IPC 50", "table01_ipc50", note=RDED_HARD),
    Artefact("03_imagenet1k", "Table 2 on the stand-in, soft labels", "table02", table=2),
    Artefact("04_surrogate_architecture", "Table 4 on the stand-in", "table04", against("DiT + G_D", "IGD")),
    Artefact("05_guidance_ablation", "Table 5 on the stand-in", "table05", methods.ablation_claims),
    Artefact("06_checkpoint_selection", "Table 6 on the stand-in", "table06", methods.selection_claims),
    Artefact("06_checkpoint_selection_minimax", "Table 6 on the stand-in, Minimax backbone", "table06_minimax", methods.selection_claims),
    Artefact("07_food101", "Table 7 on the stand-in", "table07", table=7, note=RDED_HARD),
    Artefact("08_cifar", "Table 8 on the stand-in", "table08", note=RDED_HARD),
    Artefact("09_diffusion_baselines", "Table 9 on the stand-in, soft labels", "table09"),
    Artefact("10_dpm_solver", "Table 10 on the stand-in", "table10", methods.solver_claims),
    Artefact("11_fid_coverage", "Table 11 on the stand-in", "table11", against("DiT"), figure=against_accuracy, correlations=True, note=RDED_HARD),
    Artefact("12_hyperparameters", "k and gamma on the stand-in, validation data", "table12", against("DiT")),
    Artefact("13_paper_vs_code", "Paper against released code, on the stand-in", "paper_vs_code", against("DiT-IGD", "="), figure=curves(("cfg", "top1"))),
    Artefact("14_shortcuts", "Faster guidance, on the stand-in", "shortcuts", against("DiT-IGD")),
    Artefact("21_influence", "Figure 1 on the stand-in", "fig01", figure=influence, all_networks=True, note=RDED_HARD),
    Artefact("22_early_stage", "Figure 2 on the stand-in", "fig02", methods.early_stage_claims, figure=curves(("k", "influence_loss"), ("k", "top1"))),
    Artefact("26_sensitivity", "Figure 6 on the stand-in", "fig06", against("DiT"), figure=SENSITIVITY),
    Artefact("26_sensitivity_minimax", "Figure 6 on the stand-in, Minimax backbone", "fig06_minimax", against("Minimax"), figure=SENSITIVITY),
)  # fmt: skip


def pictures(source: Path) -> Figure:
    return plotting.gallery(**plotting.read_gallery(f"{source}.images"))


def places(source: Path) -> Figure:
    coordinates, distances = pd.read_csv(source.with_suffix(".coordinates.csv")), results.load(source.with_suffix(".csv"))
    one = distances.iloc[0]
    return plotting.places(coordinates, distances, title=f"{one.dataset}, {coordinates['class'].iloc[0]}, IPC {one.ipc}, {one.scale}, seed 0")


def overview(source: Path) -> Figure:
    shown = plotting.read_gallery(f"{source}.images")
    paths = pd.read_csv(source.with_suffix(".paths.csv"))
    return plotting.overview(paths, shown["columns"], [int(step) for step in shown["titles"]], title=shown["title"])


PICTURES: tuple[tuple[str, str, Callable[[Path], Figure]], ...] = (  # of data/SOURCE.*, as NAME, drawn by
    ("00_quickstart", "quickstart_gallery", pictures),
    ("22_early_stage", "fig02_examples", pictures),
    ("23_tsne", "fig03", places),
    ("24_same_noise", "fig04", pictures),
    ("25_overview", "fig05", overview),
    ("27_gallery", "fig07", pictures),
    ("27_gallery_minimax", "fig08", pictures),
)


def take_over(folder: Path) -> None:
    """Rows, tables and images that notebooks saved become data/*."""
    for found in sorted(folder.glob("[0-9][0-9]_*/rows.csv")):
        rows = pd.read_csv(found, dtype={"settings_hash": str, "artefact": str, "git_revision": str}, keep_default_na=False)
        print("took over", results.consolidate(rows, HERE / "data" / f"{found.parent.name}.csv"))
    for found in sorted([*folder.glob("[0-9][0-9]_*/*.csv"), *folder.glob("[0-9][0-9]_*/images.png")]):
        if found.name != "rows.csv":
            print("took over", files.write(HERE / "data" / f"{found.parent.name}.{found.name}", found.read_bytes()))


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with known methods first, in the order of their colours, the others by name, numbers in it by size."""
    known = list(plotting.COLOURS)

    def rank(name: str) -> tuple:
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        return (known.index(name) if name in known else len(known), *(float(part) if index % 2 else part for index, part in enumerate(parts)))

    ranks = rows.method.map(rank)
    return rows.iloc[sorted(range(len(rows)), key=lambda position: (ranks.iloc[position], position))]


def draw(artefact: Artefact, out: Path) -> None:
    """One figure and one page of tables from the rows of one notebook."""
    rows = in_order(results.load(HERE / "data" / f"{artefact.source}.csv"))
    accuracy = tables.top1(rows)
    networks = list(dict.fromkeys(accuracy.network))
    first = rows[rows.network.isin([networks[0], ""])]
    one = accuracy.iloc[0]
    title, whole_title = (f"{one.dataset}, IPC {one.ipc}, {names}, scale {one.scale}" for names in (networks[0], ", ".join(networks)))
    others = rows[~rows.metric.str.startswith("top")]
    whole = [tables.accuracy_table(accuracy) if len(networks) == 1 else tables.cross_table(accuracy)]
    if len(others):
        whole = [tables.metric_table(rows)] if len(networks) == 1 else [*whole, tables.metric_table(tables.top1(first), others)]
    if artefact.correlations:
        whole.append(tables.rank_correlations(first, others))
    if artefact.all_networks:
        whole.append(tables.correlations_by(rows, others))
    pairs = artefact.pairs(list(dict.fromkeys(first.method)))
    figure = artefact.figure(rows, whole_title) if artefact.all_networks else artefact.figure(first, title)
    plotting.keep(figure, str(out), artefact.name)
    parts = [f"# {artefact.heading}\n\n{whole_title}. Means ± sd over n generation seeds.", *(results.markdown(table, 3) for table in whole), artefact.note]
    if pairs:
        parts.append("Paired differences in top-1 (same noise):\n\n- " + tables.verdict(tables.differences(tables.top1(first), pairs)).replace("\n", "\n- "))
    if artefact.table is not None:
        paper = tables.reported(artefact.table, ipc=one.ipc)
        beside = results.markdown(tables.beside_paper(accuracy, paper, by=("network", "method")), 1)
        parts.append("Beside the paper's figures, which are for other data:\n\n" + beside)
    files.write(out / f"{artefact.name}.md", "\n\n".join(part.strip() for part in parts if part) + "\n")


def draw_all(out: Path) -> dict[str, dict[str, str]]:
    """Everything there are data for, into `out`; the hashes of inputs and outputs (of those that no compression library has a hand in)."""
    plotting.use_style()
    data = HERE / "data"
    there = [artefact for artefact in ARTEFACTS if (data / f"{artefact.source}.csv").is_file()]
    inputs = {HERE / "igd.mplstyle", data / "paper_reported.csv", *(data / f"{artefact.source}.csv" for artefact in there)}
    names = [f"{artefact.name}.{kind}" for artefact in there for kind in ("md", "svg")]
    for artefact in there:
        draw(artefact, out)
    for source, name, figure in PICTURES:
        own = sorted(data.glob(f"{source}.*.*"))
        if own:
            own += [path for path in [data / f"{source}.csv"] if path.is_file()]
            plotting.keep(figure(data / source), str(out), name)
            inputs, names = inputs | set(own), [*names, f"{name}.svg"]
    bench = data / "bench.json"
    if bench.is_file():
        plotting.keep(plotting.bench(json.loads(bench.read_text())), str(out), "bench")
        inputs, names = inputs | {bench}, [*names, "bench.svg"]
    return {
        "inputs": {path.relative_to(HERE).as_posix(): files.sha256(path) for path in sorted(inputs)},
        "outputs": {name: files.sha256(out / name) for name in sorted(names)},
    }


def stale() -> list[str]:
    """What is not as drawing it now would make it, a line a file; empty if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = draw_all(Path(folder))
    present = json.loads((HERE / MANIFEST).read_text()) if (HERE / MANIFEST).is_file() else {}
    lines = [f"{kind} {name}" for kind in wanted for name, value in wanted[kind].items() if present.get(kind, {}).get(name) != value]
    lines += [f"file {name}" for name, value in wanted["outputs"].items() if not (HERE / name).is_file() or files.sha256(HERE / name) != value]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="take new rows over from here first")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a figure or table is stale")
    given = parser.parse_args(arguments)
    if given.check:
        lines = stale()
        print("\n".join(["stale: run `make figures`", *lines]) if lines else "figures and tables are up to date")
        return int(bool(lines))
    if given.folder:
        take_over(given.folder)
    manifest = draw_all(HERE)
    files.write(HERE / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    print(f"drew {len(manifest['outputs'])} tables and figures into {HERE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
