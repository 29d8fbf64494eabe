"""DM and IDC-1 beside their published figures: real CIFAR-10, one image a class, their authors' evaluation.

Shortened (`small`), so the share of iterations that were run is said. Random images are evaluated alike. Rows
go to data/published.csv, the table to published.md. About half an hour of one core; a run that was stopped
goes on.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from igd_lib.analysis import results, tables
from igd_lib.baselines.dm import DM
from igd_lib.baselines.idc import IDC
from igd_lib.experiment import measures
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.protocols import DM_OWN, IDC_OWN
from igd_lib.tools import files

HERE = Path(__file__).parent
SEEDS = 3
# By family: the authors' evaluation, their figure for IPC 1 (DM's in its paper's table, IDC-I's in its
# repository's readme), and the share of their iterations.
CHECKED = {
    "dm": (DM_OWN, 26.0, DM.small(1).iterations / DM().iterations),
    "idc": (IDC_OWN, 36.7, IDC.small(1).outer * IDC.small(1).inner / (IDC().outer * IDC().inner)),
}


def rows_of(family: str) -> pd.DataFrame:
    """Accuracies of a method's sets and of random ones."""
    experiment = prepare("published", None, "small", run=Run(ipc=1, seeds=str(SEEDS), stand_in="cifar-10"))
    sets = experiment.sets([Method("random"), Method(family)])
    return measures.accuracy_rows(experiment.with_protocol(CHECKED[family][0]), sets, "convnet3")


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a method: its accuracy, Random's, and the published one."""
    found = results.summary(tables.top1(rows), ("protocol", "method"))
    lines = []
    for family, (protocol, published, share) in CHECKED.items():
        own = found[found.protocol == protocol.name].set_index("method")
        name = Method(family).label
        lines.append(
            {
                "method": name,
                "top-1 (%)": own.loc[name, "mean"],
                "sd": own.loc[name, "sd"],
                "n": own.loc[name, "n"],
                "Random": own.loc["Random", "mean"],
                "sd of Random": own.loc["Random", "sd"],
                "published": published,
                "share of iterations (%)": 100 * share,
            }
        )
    return pd.DataFrame(lines)


def page(rows: pd.DataFrame) -> str:
    """The table with what it is of."""
    return (
        "# DM and IDC-1 on CIFAR-10, one image a class\n\n"
        "ConvNet-3, each by its authors' evaluation, on the test images; sets optimised on a ConvNet-3 of "
        "width 64, by a share of the authors' iterations. Published figures are of all of them.\n\n"
        + results.markdown(table(rows), 1)
    )


def main() -> None:
    rows = pd.concat([rows_of(family) for family in CHECKED], ignore_index=True)
    results.consolidate(rows, HERE / "data" / "published.csv")
    files.write(HERE / "published.md", page(rows))
    print(table(rows).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
