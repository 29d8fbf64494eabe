"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images.

`python paper_figures/make_figures.py FOLDER` first takes new rows over: every FOLDER/NN_name/rows.csv that a notebook
saved (`-p save_to FOLDER/NN_name`) becomes data/NN_name.csv, sorted and checked. Drawing twice gives the same bytes;
MANIFEST.json has the hashes of what went in and what came out, and `--check` draws anew elsewhere and names what is stale.
"""

from __future__ import annotations

import argparse
import json
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


def draw(artefact: Artefact, out: Path) -> None:
    """One figure and one page of tables from the rows of one notebook."""
    rows = in_order(results.load(HERE / "data" / f"{artefact.source}.csv"))
    accuracy = tables.top1(rows)
    networks = list(dict.fromkeys(accuracy.network))
    first = accuracy[accuracy.network == networks[0]]
    one = first.iloc[0]
    title, whole_title = (f"{one.dataset}, IPC {one.ipc}, {names}, scale {one.scale}" for names in (networks[0], ", ".join(networks)))
    others = rows[~rows.metric.str.startswith("top")]
    whole = [tables.accuracy_table(accuracy) if len(networks) == 1 else tables.cross_table(accuracy)]
    if len(others):
        whole = [tables.metric_table(rows)] if len(networks) == 1 else [*whole, tables.metric_table(first, others)]
    if artefact.correlations:
        whole.append(tables.rank_correlations(first, others))
    pairs = artefact.pairs(list(dict.fromkeys(first.method)))
    figure = artefact.figure(first, others, title)
    plotting.keep(figure, str(out), artefact.name)
    parts = [f"# {artefact.heading}\n\n{whole_title}. Means ± sd over n generation seeds.", *(results.markdown(table, 3) for table in whole)]
    if pairs:
        parts.append("Paired differences in top-1 (same noise):\n\n- " + tables.verdict(tables.differences(first, pairs)).replace("\n", "\n- "))
    if artefact.table is not None:
        paper = tables.reported(artefact.table, ipc=one.ipc)
        beside = results.markdown(tables.beside_paper(accuracy, paper, by=("network", "method")), 1)
        parts.append("Beside the paper's figures, which are for other data:\n\n" + beside)
    files.write(out / f"{artefact.name}.md", "\n\n".join(part.strip() for part in parts) + "\n")


def draw_all(out: Path) -> dict[str, dict[str, str]]:
    """Everything there are rows for, into `out`; the hashes of inputs and outputs (of those that no compression library has a hand in)."""
    plotting.use_style()
    there = [artefact for artefact in ARTEFACTS if (HERE / "data" / f"{artefact.source}.csv").is_file()]
    for artefact in there:
        draw(artefact, out)
    inputs = [HERE / "igd.mplstyle", HERE / "data" / "paper_reported.csv", *(HERE / "data" / f"{artefact.source}.csv" for artefact in there)]
    names = [f"{artefact.name}.{kind}" for artefact in there for kind in ("md", "svg")]
    bench = HERE / "data" / "bench.json"
    if bench.is_file():
        plotting.keep(plotting.bench(json.loads(bench.read_text())), str(out), "bench")
        inputs, names = [*inputs, bench], [*names, "bench.svg"]
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
