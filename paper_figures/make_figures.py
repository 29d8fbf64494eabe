"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images.

`python paper_figures/make_figures.py FOLDER` first takes new rows over: every FOLDER/NN_name/rows.csv that a notebook
saved (`-p save_to FOLDER/NN_name`) becomes data/NN_name.csv, sorted and checked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from igd_lib import files, methods, plotting, results, tables

HERE = Path(__file__).parent
Pairs = Sequence[tuple[str, str]]


def against(reference: str, only: str = "") -> Callable[[Sequence[str]], Pairs]:
    """Every other method, or those whose name contains `only`, against `reference`."""
    return lambda names: [(name, reference) for name in names if name != reference and only in name]


def scores(accuracy: pd.DataFrame, _: pd.DataFrame, title: str) -> Figure:
    return plotting.scores(accuracy, title=title)


def by_cfg(accuracy: pd.DataFrame, _: pd.DataFrame, title: str) -> Figure:
    return plotting.by_cfg(accuracy[accuracy.method.str.contains(", cfg ")], title=title)


def against_accuracy(accuracy: pd.DataFrame, others: pd.DataFrame, title: str) -> Figure:
    return plotting.against_accuracy(accuracy, others, title=title)


@dataclass(frozen=True)
class Artefact:
    """How the rows of one notebook are shown."""

    source: str  # data/SOURCE.csv
    heading: str
    name: str  # NAME.md, .png, .svg, .pdf
    pairs: Callable[[Sequence[str]], Pairs] = methods.claims  # of the methods' names: whose differences are shown
    table: int | None = None  # of the paper, to be shown beside
    figure: Callable[[pd.DataFrame, pd.DataFrame, str], Figure] = scores
    correlations: bool = False  # of every metric with accuracy


ARTEFACTS = (
    Artefact("00_quickstart", "Quickstart", "quickstart"),
    Artefact("01_nette_woof", "Table 1 on the stand-in", "table01"),
    Artefact("03_imagenet1k", "Table 2 on the stand-in, soft labels", "table02", table=2),
    Artefact("04_surrogate_architecture", "Table 4 on the stand-in", "table04", against("DiT + G_D", "IGD")),
    Artefact("05_guidance_ablation", "Table 5 on the stand-in", "table05", methods.ablation_claims),
    Artefact("06_checkpoint_selection", "Table 6 on the stand-in", "table06", methods.selection_claims),
    Artefact("07_food101", "Table 7 on the stand-in", "table07", table=7),
    Artefact("08_cifar", "Table 8 on the stand-in", "table08"),
    Artefact("09_diffusion_baselines", "Table 9 on the stand-in, soft labels", "table09"),
    Artefact("10_dpm_solver", "Table 10 on the stand-in", "table10", methods.solver_claims),
    Artefact("11_fid_coverage", "Table 11 on the stand-in", "table11", against("DiT"), figure=against_accuracy, correlations=True),
    Artefact("12_hyperparameters", "k and gamma on the stand-in, validation data", "table12", against("DiT")),
    Artefact("13_paper_vs_code", "Paper against released code, on the stand-in", "paper_vs_code", against("DiT-IGD", "="), figure=by_cfg),
    Artefact("14_shortcuts", "Faster guidance, on the stand-in", "shortcuts", against("DiT-IGD")),
)  # fmt: skip


def take_over(folder: Path) -> None:
    """Rows that notebooks saved become data/*.csv."""
    for found in sorted(folder.glob("[0-9][0-9]_*/rows.csv")):
        rows = pd.read_csv(found, dtype={"settings_hash": str, "artefact": str, "git_revision": str}, keep_default_na=False)
        print("took over", results.consolidate(rows, HERE / "data" / f"{found.parent.name}.csv"))


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with known methods first, in the order of their colours, the others by name."""
    known = list(plotting.COLOURS)
    rank = rows.method.map(lambda name: (known.index(name) if name in known else len(known), name))
    return rows.iloc[sorted(range(len(rows)), key=lambda position: (rank.iloc[position], position))]


def draw(artefact: Artefact) -> None:
    """One figure and one page of tables from the rows of one notebook."""
    rows = in_order(results.load(HERE / "data" / f"{artefact.source}.csv"))
    accuracy = tables.top1(rows)
    networks = list(dict.fromkeys(accuracy.network))
    first = accuracy[accuracy.network == networks[0]]
    one = first.iloc[0]
    title = f"{one.dataset}, IPC {one.ipc}, {', '.join(networks)}, scale {one.scale}"
    others = rows[~rows.metric.str.startswith("top")]
    whole = [tables.accuracy_table(accuracy) if len(networks) == 1 else tables.cross_table(accuracy)]
    if len(others):
        whole = [tables.metric_table(rows)] if len(networks) == 1 else [*whole, tables.metric_table(first, others)]
    if artefact.correlations:
        whole.append(tables.rank_correlations(first, others))
    pairs = artefact.pairs(list(dict.fromkeys(first.method)))
    figure = artefact.figure(first, others, title)
    plotting.keep(figure, str(HERE), artefact.name)
    parts = [f"# {artefact.heading}\n\n{title}. Means ± sd over n generation seeds.", *(results.markdown(table, 3) for table in whole)]
    if pairs:
        parts.append("Paired differences in top-1 (same noise):\n\n- " + tables.verdict(tables.differences(first, pairs)).replace("\n", "\n- "))
    if artefact.table is not None:
        paper = tables.reported(artefact.table, ipc=one.ipc)
        beside = results.markdown(tables.beside_paper(accuracy, paper, by=("network", "method")), 1)
        parts.append("Beside the paper's figures, which are for other data:\n\n" + beside)
    files.write(HERE / f"{artefact.name}.md", "\n\n".join(part.strip() for part in parts) + "\n")
    print(f"wrote {HERE / artefact.name}.md, .pdf, .svg and .png")


def main(arguments: list[str]) -> None:
    plotting.use_style()
    if arguments:
        take_over(Path(arguments[0]))
    for artefact in ARTEFACTS:
        if (HERE / "data" / f"{artefact.source}.csv").is_file():
            draw(artefact)
    if (HERE / "data" / "bench.json").is_file():
        plotting.keep(plotting.bench(json.loads((HERE / "data" / "bench.json").read_text())), str(HERE), "bench")


if __name__ == "__main__":
    main(sys.argv[1:])
