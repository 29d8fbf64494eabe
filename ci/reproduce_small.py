"""Runs every notebook at scale "small", in order and some with other parameters too, and redraws figures and
tables: `make reproduce-small`.

Surrogates, sets, models and evaluations are kept under `$IGD_CACHE`, so that a run that was stopped goes on
where it was and a second one takes minutes. Executed notebooks, pictures and rows are in `out/small`; figures
and tables take over the rows of those that ended well, in this call.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from papermill import inspect_notebook

ROOT = Path(__file__).parents[1]
# What differs from the notebooks' own defaults, and runs beside those.
OWN = {"14_shortcuts": {"seeds": "10"}}
# At IPC 50 the rows that are sampled, Random, and of the methods that take long DM and SRe2L alone.
SAMPLED = "DiT,DiT + G_D,DiT-IGD,Minimax,Minimax-IGD"
FURTHER = {
    "01_nette_woof_ipc50": (
        "01_nette_woof",
        {"ipc": "50", "networks": "convnet3", "methods": f"Random,DM,{SAMPLED}"},
    ),
    "06_checkpoint_selection_minimax": ("06_checkpoint_selection", {"backbone": "minimax"}),
    "08_cifar_ipc50": (
        "08_cifar",
        {"ipc": "50", "methods": f"Random,DM,SRe2L,{SAMPLED}"},
    ),
    "14_shortcuts_fashion-mnist": ("14_shortcuts", {"stand_in": "fashion-mnist"}),
    "26_sensitivity_minimax": ("26_sensitivity", {"backbone": "minimax"}),
    "27_gallery_minimax": ("27_gallery", {"backbone": "minimax"}),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "notebooks", nargs="*", help="names, or their beginnings such as 05; default: all, in order"
    )
    parser.add_argument("--out", type=Path, help="default: out/SCALE")
    parser.add_argument("--scale", default="small", choices=("smoke", "small"))
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="of every run; repeatable",
    )
    given = parser.parse_args(argv)
    names = [path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    runs = {name: (name, OWN.get(name, {})) for name in names} | FURTHER
    chosen = [name for name in sorted(runs) if not given.notebooks or name.startswith(tuple(given.notebooks))]
    base, failed, started = (given.out or ROOT / "out" / given.scale).resolve(), [], time.monotonic()
    for name in chosen:
        notebook, further = runs[name]
        folder, log = base / name, base / f"{name}.log"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True)
        values = {"scale": given.scale, "save_to": str(folder), **further, **dict(given.parameters)}
        if "methods" in inspect_notebook(ROOT / "notebooks" / f"{notebook}.ipynb"):
            values.setdefault("methods", "all")
        parameters = [part for key, value in values.items() for part in ("-p", key, value)]
        files = [str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(base / f"{name}.ipynb")]
        command = [
            sys.executable,
            "-m",
            "papermill",
            *files,
            *parameters,
            "-k",
            "python3",
            "--no-progress-bar",
            "--log-output",
        ]
        before = time.monotonic()
        with open(log, "w") as file:
            code = subprocess.run(
                command, cwd=ROOT / "notebooks", stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        print(
            f"{name}: {'done' if code == 0 else f'FAILED, see {log}'}, "
            f"{(time.monotonic() - before) / 60:.1f} minutes",
            flush=True,
        )
        failed += [name] * (code != 0)
    done = [str(base / name) for name in chosen if name not in failed]
    if given.scale == "small" and done:
        subprocess.run([sys.executable, str(ROOT / "paper_figures" / "make_figures.py"), *done], check=True)
    print(f"{len(done)} of {len(chosen)} runs, {(time.monotonic() - started) / 60:.0f} minutes; {base}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
