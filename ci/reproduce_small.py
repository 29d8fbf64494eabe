"""Runs every notebook at scale "small", in order and some with other parameters too, and redraws figures,
tables and pages: `make reproduce-small`.

It prints its plan first. Surrogates, sets, models and evaluations are kept under `$IGD_CACHE`, so that a run
that was stopped goes on where it was and a second one takes minutes; what all took is in `reproduction.csv`
there. Executed notebooks, pictures and rows are in `out/small`; figures, tables and pages take over those of
the runs that ended well, in this call.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from papermill import inspect_notebook

from ci import reproduction_log
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir
from igd_lib.tools.version import git_revision

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "paper_figures" / "data" / "reproduction.csv"  # what the rows of this repository took
BUDGET = 24.0  # core-hours
TEN = {"seeds": "10"}  # of the rows that the paper's claims are about; elsewhere five, the notebooks' default
SAMPLED = "DiT,DiT + G_D,DiT-IGD,Minimax,Minimax-IGD"
MAIN = {"methods": f"Random,RDED,{SAMPLED}", **TEN}  # without what takes minutes a set


@dataclass(frozen=True)
class Run:
    """A notebook with parameters that differ from its own."""

    name: str  # of its rows, figures and page
    notebook: str
    parameters: Mapping[str, str] = field(default_factory=dict)


OWN = {
    "05_guidance_ablation": TEN,
    "13_paper_vs_code": {"cfgs": "1,1.5,4"},
}
FURTHER = (
    # At IPC 50 of the methods that take long DM and SRe2L alone.
    Run(
        "01_nette_woof_ipc50",
        "01_nette_woof",
        {"ipc": "50", "networks": "convnet3", "methods": f"Random,DM,{SAMPLED}"},
    ),
    Run("01_nette_woof_ten", "01_nette_woof", MAIN),
    Run("06_checkpoint_selection_minimax", "06_checkpoint_selection", {"backbone": "minimax"}),
    Run("08_cifar_ipc50", "08_cifar", {"ipc": "50", "methods": f"Random,DM,SRe2L,{SAMPLED}"}),
    Run("08_cifar_ten", "08_cifar", MAIN),
    Run("14_shortcuts_fashion-mnist", "14_shortcuts", {"stand_in": "fashion-mnist"}),
    Run("15_guides_ten", "15_guides", {"methods": "DiT,DiT + G_D,DiT-IGD,DiT + MGD3", **TEN}),
    Run("26_sensitivity_minimax", "26_sensitivity", {"backbone": "minimax"}),
    Run("27_gallery_minimax", "27_gallery", {"backbone": "minimax"}),
)


def runs(beginnings: list[str]) -> list[Run]:
    """All runs in order of their names, or those of these names; the beginning of names stands for all."""
    names = [path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    found = [*(Run(name, name, OWN.get(name, {})) for name in names), *FURTHER]
    whole = {run.name for run in found} & set(beginnings)
    begun = tuple(text for text in beginnings if text not in whole)
    chosen = [run for run in found if not beginnings or run.name in whole or run.name.startswith(begun)]
    return sorted(chosen, key=lambda run: run.name)


def plan(chosen: list[Run]) -> str:
    """What will be run, with which parameters, and the minutes of one core that it took when last recorded.

    They began with an empty cache: what runs share is counted in the one that made it.
    """
    known = reproduction_log.summed(reproduction_log.read(RECORDED)).set_index("run")["in all"]
    lines, total = [], 0.0
    for run in chosen:
        minutes = known.get(run.name)
        total += minutes or 0.0
        values = " ".join(f"-p {key} {value}" for key, value in run.parameters.items())
        lines.append(
            f"{'not recorded' if minutes is None else f'{minutes:.0f} min':>12}  {run.name} {values}"
        )
    lines.append(
        f"{total / 60:10.1f} h  {len(chosen)} runs from an empty cache, one core; budget {BUDGET:g} h"
    )
    return "\n".join(lines)


class Runner:
    """Executes runs at a scale, each with its rows and pictures in a folder of `base`."""

    def __init__(self, scale: str, base: Path, parameters: Mapping[str, str]):
        self.scale, self.base, self.parameters = scale, base, dict(parameters)
        self.log = cache_dir() / "reproduction.csv"

    def command(self, run: Run) -> list[str]:
        """papermill's, with the parameters that the notebook has."""
        source = ROOT / "notebooks" / f"{run.notebook}.ipynb"
        values = {
            "scale": self.scale,
            "save_to": str(self.base / run.name),
            **run.parameters,
            **self.parameters,
        }
        if "methods" in inspect_notebook(source):
            values.setdefault("methods", "all")
        given = [part for key, value in values.items() for part in ("-p", key, value)]
        options = ["-k", "python3", "--no-progress-bar", "--log-output"]
        return [sys.executable, "-m", "papermill", str(source), str(self.executed(run)), *given, *options]

    def executed(self, run: Run) -> Path:
        return self.base / f"{run.name}.ipynb"

    def __call__(self, run: Run) -> bool:
        """Execute one; whether it ended well. On one thread, as all numbers here: another count rounds
        otherwise.
        """
        folder, output = self.base / run.name, self.base / f"{run.name}.log"
        if output.is_file():  # an earlier go, which may have been stopped
            self._note(run, ended=output.stat().st_mtime)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.executed(run).unlink(missing_ok=True)
        began, used = time.monotonic(), processor_minutes()
        with open(output, "w") as file:
            code = subprocess.run(
                self.command(run),
                cwd=ROOT / "notebooks",
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        self._note(run, used=processor_minutes() - used)
        ended = "done" if code == 0 else f"FAILED, see {output}"
        print(f"{run.name}: {ended}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        return code == 0

    def _note(self, run: Run, **times: float) -> None:
        if self.scale == "small":
            reproduction_log.note(self.log, run.name, self.executed(run), git_revision(), **times)


def processor_minutes() -> float:
    """What all programs that this one ran, and has waited for, have used of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def record(log: Path, names: list[str]) -> None:
    """What these runs took, beside the rows of this repository."""
    kept, new = reproduction_log.read(RECORDED), reproduction_log.read(log)
    whole = pd.concat([kept[~kept.run.isin(names)], new[new.run.isin(names)]]).sort_values(["run", "started"])
    files.write(RECORDED, whole.to_csv(index=False, lineterminator="\n"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "notebooks", nargs="*", help="names, or their beginnings such as 05; default: all, in order"
    )
    parser.add_argument("--out", type=Path, help="default: out/SCALE")
    parser.add_argument("--scale", default="small", choices=("smoke", "small"))
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
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
    chosen, started = runs(given.notebooks), time.monotonic()
    print(plan(chosen), flush=True)
    if given.plan:
        return 0
    base = (given.out or ROOT / "out" / given.scale).resolve()
    execute = Runner(given.scale, base, dict(given.parameters))
    done = [run for run in chosen if execute(run)]
    if given.scale == "small" and done:
        record(execute.log, [run.name for run in done])
        draw(base, done)
    print(f"{len(done)} of {len(chosen)} runs, {(time.monotonic() - started) / 60:.0f} minutes; {base}")
    return int(len(done) < len(chosen))


def draw(base: Path, done: list[Run]) -> None:
    """Figures, tables and pages of the runs that ended well, and the texts' numbers."""
    scripts = {
        "make_figures.py": [str(base / run.name) for run in done],
        "make_pages.py": [str(base / f"{run.name}.ipynb") for run in done],
        "make_texts.py": [],
    }
    for script, arguments in scripts.items():
        subprocess.run([sys.executable, str(ROOT / "paper_figures" / script), *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
