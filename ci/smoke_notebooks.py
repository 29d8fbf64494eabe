"""Runs notebooks at scale "smoke" or "rehearsal" under nbval, in a scratch folder.

The notebooks' own asserts decide: their outputs are stripped, so there is nothing to compare with. A
rehearsal runs the code of the paper's scale on fakes in the real layouts (`fakes`), made once for all; a
notebook without a paper scale has none. `--twice` names notebooks (or "all") that run twice in one kernel,
the second time with another number of images: what somebody does who changes a parameter and runs all cells
again.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from igd_lib.experiment.artefacts import ARTEFACTS
from igd_lib.tools.machine import data_dir

ROOT = Path(__file__).parents[1]
SCALES = ("smoke", "rehearsal")
WITH_MEMORY = ("01", "08", "15")  # rehearsed with several images a class: later ones know the earlier


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--twice", nargs="*", default=[], help='beginnings of names, or "all"')
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names; default: all notebooks")
    given = parser.parse_args(arguments)
    if not chosen("smoke", given.only):
        print(f"no such notebooks in {ROOT / 'notebooks'}", file=sys.stderr)
        return 1
    if not (notebooks := chosen(given.scale, given.only)):
        print("nothing to rehearse: none of these has a paper scale")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "notebooks"
        place.mkdir()
        for path in notebooks:
            again = "all" in given.twice or path.name.startswith(tuple(given.twice) or ("none",))
            nbformat.write(prepared(path, given.scale, twice=again), place / path.name)
        return run(place, environment(given.scale, Path(scratch)))


def chosen(scale: str, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks that have the scale, in order; of these, those whose names begin with one of `only`."""
    found = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if scale == "rehearsal":
        found = [path for path in found if ARTEFACTS[path.stem].paper]
    return [path for path in found if not only or path.name.startswith(tuple(only))]


def prepared(path: Path, scale: str, *, twice: bool) -> Any:
    """A notebook at a scale; its cells once more behind them, with IPC 1 where it has one, if `twice`."""
    bare = load_notebook_node(str(path))
    declared = "".join(cell.source for cell in bare.cells if cell.cell_type == "code")
    given = {"scale": scale}
    if scale == "rehearsal":
        given |= {name: value for name, value in brief(path.stem).items() if f"{name}: " in declared}
    first = parameterize_notebook(copy.deepcopy(bare), given)
    if twice:
        second = parameterize_notebook(bare, given | ({"ipc": 1} if "ipc: int" in declared else {}))
        for number, cell in enumerate(second.cells):
            cell.id = f"again-{number}"
        first.cells += second.cells
    return first


def brief(name: str) -> dict[str, Any]:
    """A rehearsal's parameters: one seed, and one image a class but in a few notebooks."""
    return {"seeds": "1"} | ({} if name[:2] in WITH_MEMORY else {"ipc": 1})


def environment(scale: str, scratch: Path) -> dict[str, str]:
    """Where notebooks find data and models, and keep their work."""
    if scale == "smoke":
        return {"IGD_DATA": str(data_dir().resolve()), "IGD_CACHE": str(scratch / "cache")}
    sys.path.insert(0, str(ROOT))  # this file is run as a script
    from ci import fakes

    return fakes.make(scratch / "fakes", extras=True)


def run(folder: Path, own: Mapping[str, str]) -> int:
    """The notebooks of a folder under nbval, two or more side by side; pytest's exit status."""
    always = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "OMP_NUM_THREADS": "1"}
    # The kernel is this Python's own, whatever other kernelspecs the machine has.
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600"]
    side_by_side = ["-n", "auto", "--dist", "loadfile"]  # a notebook's cells in order, on one worker
    plugins = ["-p", "no:cacheprovider", *side_by_side, *nbval]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=folder, env={**os.environ, **own, **always}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
