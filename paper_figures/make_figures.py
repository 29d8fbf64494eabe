"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from igd_lib import experiment, files, plotting

HERE = Path(__file__).parent
PAIRS = [("DiT-IGD", "DiT"), ("DiT, best cfg", "DiT"), ("DiT-IGD", "DiT + G_D"), ("DiT-IGD", "DiT, best cfg")]


def main() -> None:
    plotting.use_style()
    rows = pd.read_csv(HERE / "data" / "00_quickstart.csv")
    if (rows.scale == "smoke").any():
        raise ValueError("paper_figures/data/00_quickstart.csv has smoke rows; their numbers mean nothing")
    accuracy, influence = rows[rows.metric == "top1"], rows[rows.metric == "influence_loss"]
    first = accuracy.iloc[0]
    title = f"{first.dataset}, IPC {first.ipc}, {first.network}, scale {first.scale}"
    plotting.keep(plotting.scores(accuracy, title=title), str(HERE), "quickstart")
    table = experiment.accuracy_table(accuracy, influence).rename(columns={"method": "Method"})
    table["influence loss"] = table["influence loss"].map("{:.4f}".format)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(str(value) for value in entry) + " |" for entry in table.itertuples(index=False)]
    verdicts = experiment.verdict(experiment.differences(accuracy, PAIRS)).replace("\n", "\n- ")
    text = f"# Quickstart: {title}\n\nsd over generation seeds.\n\n" + "\n".join(lines) + f"\n\nPaired differences (same noise):\n\n- {verdicts}\n"
    files.write(HERE / "quickstart.md", text)
    print(f"wrote {HERE / 'quickstart'}.pdf, .svg, .png and .md")


if __name__ == "__main__":
    main()
