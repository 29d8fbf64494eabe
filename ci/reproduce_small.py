"""Runs every notebook at scale "small", in order, and redraws figures and tables from their rows: `make reproduce-small`.

Surrogates, sets, models and evaluations are kept under `$IGD_CACHE`, so that a run that was stopped goes on where it was
and a second one takes minutes. Executed notebooks, pictures and rows are in `out/small`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="names, or their beginnings such as 05; default: all, in order")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "small")
    parser.add_argument("--scale", default="small", choices=("smoke", "small"))
    given = parser.parse_args(argv)
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = [path for path in every if not given.notebooks or path.stem.startswith(tuple(given.notebooks))]
    base, failed, started = given.out.resolve(), [], time.monotonic()
    for path in chosen:
        folder, log = base / path.stem, base / f"{path.stem}.log"
        folder.mkdir(parents=True, exist_ok=True)
        parameters = ["-p", "scale", given.scale, "-p", "save_to", str(folder)]
        command = [sys.executable, "-m", "papermill", str(path), str(base / path.name), *parameters, "-k", "python3", "--no-progress-bar", "--log-output"]
        before = time.monotonic()
        with open(log, "w") as file:
            code = subprocess.run(command, cwd=ROOT / "notebooks", stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{path.stem}: {'done' if code == 0 else f'FAILED, see {log}'}, {(time.monotonic() - before) / 60:.1f} minutes", flush=True)
        failed += [path.stem] * (code != 0)
    if given.scale == "small":
        subprocess.run([sys.executable, str(ROOT / "paper_figures" / "make_figures.py"), str(given.out)], check=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} notebooks, {(time.monotonic() - started) / 60:.0f} minutes; {given.out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
