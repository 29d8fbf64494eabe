"""Redraws figures and tables from the result rows in `paper_figures/data`; needs no GPU and no images."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from igd_lib import files, plotting, tables

HERE = Path(__file__).parent
FIGURES = {  # rows in data/ -> heading, file name, paired differences
    "00_quickstart": ("Quickstart", "quickstart", [("DiT-IGD", "DiT"), ("DiT, best cfg", "DiT"), ("DiT-IGD", "DiT + G_D"), ("DiT-IGD", "DiT, best cfg")]),
    "05_guidance_ablation": (
        "Table 5 on the stand-in", "table05",
        [("DiT + G_I", "DiT"), ("DiT + G_D", "DiT"), ("DiT-IGD", "DiT"), ("DiT-IGD", "DiT + G_D"), ("DiT, best cfg", "DiT")],
    ),
}  # fmt: skip


def draw(source: str, heading: str, name: str, pairs: list[tuple[str, str]]) -> None:
    """One figure and one table of accuracies from the rows of one notebook."""
    rows = pd.read_csv(HERE / "data" / f"{source}.csv")
    if (rows.scale == "smoke").any():
        raise ValueError(f"paper_figures/data/{source}.csv has smoke rows; their numbers mean nothing")
    accuracy, influence = rows[rows.metric == "top1"], rows[rows.metric == "influence_loss"]
    first = accuracy.iloc[0]
    title = f"{first.dataset}, IPC {first.ipc}, {first.network}, scale {first.scale}"
    plotting.keep(plotting.scores(accuracy, title=title), str(HERE), name)
    table = tables.accuracy_table(accuracy, influence).rename(columns={"method": "Method"})
    table["influence loss"] = table["influence loss"].map("{:.4f}".format)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(str(value) for value in entry) + " |" for entry in table.itertuples(index=False)]
    verdicts = tables.verdict(tables.differences(accuracy, pairs)).replace("\n", "\n- ")
    text = f"# {heading}: {title}\n\nsd over generation seeds.\n\n" + "\n".join(lines) + f"\n\nPaired differences (same noise):\n\n- {verdicts}\n"
    files.write(HERE / f"{name}.md", text)
    print(f"wrote {HERE / name}.pdf, .svg, .png and .md")


def main() -> None:
    plotting.use_style()
    for source, (heading, name, pairs) in FIGURES.items():
        draw(source, heading, name, pairs)


if __name__ == "__main__":
    main()
