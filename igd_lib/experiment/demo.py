"""Runs the quickstart notebook headlessly and says what came out and where it is."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd

from igd_lib.analysis.statistics import table_claims
from igd_lib.analysis.tables import accuracy_table, differences, top1
from igd_lib.data.images import load
from igd_lib.experiment.notebooks import execute
from igd_lib.experiment.scales import DEFAULTS, STAND_INS


def usable_stand_in(scale: str) -> str:
    """The scale's own stand-in, or where its images cannot be had, the quick one, with a bold line."""
    own, quick = DEFAULTS[scale], DEFAULTS["smoke"]
    try:
        load(STAND_INS[own].dataset, "test")
    except FileNotFoundError as error:
        print(f"\033[1mIn grey on {quick}, for the images of {own} are not here: {error}\033[0m", flush=True)
        return quick
    return own


def demo(scale: str, out: Path) -> None:
    """Run `00_quickstart` through papermill into the folder `out` and print its table."""
    pictures = out.resolve() / "00_quickstart"
    notebook = out.resolve() / "00_quickstart.ipynb"
    pictures.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    stand_in = usable_stand_in(scale)
    print(f"Influence-guided diffusion on {stand_in}: about 6 minutes on 2 cores.", flush=True)
    execute("00_quickstart", {"scale": scale, "stand_in": stand_in, "save_to": str(pictures)}, notebook)
    rows = pd.read_csv(pictures / "rows.csv", keep_default_na=False, dtype={"settings_hash": str})
    accuracy, influence = top1(rows), rows[rows.metric == "influence_loss"]
    first = accuracy.iloc[0]
    print(
        f"\n{first.dataset}, scale {first.scale}, IPC {first.ipc}, {first.network}; sd over generation "
        "seeds\n"
    )
    print(accuracy_table(accuracy, influence).to_string(index=False))
    print(
        "\nPaired differences in accuracy (points, same noise, 95 %; gain or loss after Holm's correction):"
    )
    print(differences(accuracy, table_claims).to_string(index=False))
    print(
        f"\nNotebook: {notebook}\nPictures: {pictures}\nTime: {(time.monotonic() - started) / 60:.1f} minutes"
    )
