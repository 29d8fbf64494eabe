"""`make demo`: runs the quickstart notebook headlessly and says what came out and where it is."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import papermill

from igd_lib.tables import accuracy_table, differences, top1, verdict

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run notebooks/00_quickstart.ipynb through papermill and print its table.")
    parser.add_argument("--scale", default="small", choices=("smoke", "small"))
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    arguments = parser.parse_args(argv)
    pictures = arguments.out.resolve() / "00_quickstart"
    notebook = arguments.out.resolve() / "00_quickstart.ipynb"
    pictures.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print("Influence-guided diffusion on Fashion-MNIST: about 10 minutes on 2 cores.", flush=True)
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "00_quickstart.ipynb"), str(notebook), {"scale": arguments.scale, "save_to": str(pictures)},
        kernel_name="python3", extra_arguments=["--log-level=ERROR"], progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stderr,
    )  # fmt: skip
    rows = pd.read_csv(pictures / "rows.csv", keep_default_na=False, dtype={"settings_hash": str})
    accuracy, influence = top1(rows), rows[rows.metric == "influence_loss"]
    pairs = [("DiT-IGD", "DiT"), ("DiT, best cfg", "DiT"), ("DiT-IGD", "DiT + G_D"), ("DiT-IGD", "DiT, best cfg")]
    first = accuracy.iloc[0]
    print(f"\n{first.dataset}, scale {first.scale}, IPC {first.ipc}, {first.network}; sd over generation seeds\n")
    print(accuracy_table(accuracy, influence).to_string(index=False))
    print("\nPaired differences in accuracy (same noise):\n" + verdict(differences(accuracy, pairs)))
    print(f"\nNotebook: {notebook}\nPictures: {pictures}\nTime: {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
