"""Runs every notebook at scale "smoke" under nbval, in a scratch folder.

The notebooks' own asserts decide: their outputs are stripped, so there is nothing to compare with. `--twice`
names notebooks (or "all") that run twice in one kernel, the second time with another number of images: what
somebody does who changes a parameter and runs all cells again.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from igd_lib.tools.machine import data_dir

ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--twice", nargs="*", default=[], help='beginnings of names, or "all"')
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names; default: all notebooks")
    given = parser.parse_args(arguments)
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if given.only:
        notebooks = [path for path in notebooks if path.name.startswith(tuple(given.only))]
    if not notebooks:
        print(f"no such notebooks in {ROOT / 'notebooks'}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        for path in notebooks:
            again = "all" in given.twice or path.name.startswith(tuple(given.twice) or ("none",))
            nbformat.write(prepared(path, twice=again), Path(scratch) / path.name)
        return run(scratch)


def prepared(path: Path, *, twice: bool) -> Any:
    """A notebook at scale "smoke"; its cells once more behind them, with IPC 1 where it has one, if
    `twice`.
    """
    bare = load_notebook_node(str(path))
    first = parameterize_notebook(copy.deepcopy(bare), {"scale": "smoke"})
    if twice:
        has_ipc = any("ipc: int" in cell.source for cell in bare.cells if cell.cell_type == "code")
        second = parameterize_notebook(bare, {"scale": "smoke"} | ({"ipc": 1} if has_ipc else {}))
        for number, cell in enumerate(second.cells):
            cell.id = f"again-{number}"
        first.cells += second.cells
    return first


def run(scratch: str) -> int:
    """The notebooks of a folder under nbval, two or more side by side; pytest's exit status."""
    data = data_dir().resolve()  # before the cache moves
    environment = {
        **os.environ,
        "IGD_DATA": str(data),
        "IGD_CACHE": f"{scratch}/cache",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    # The kernel is this Python's own, whatever other kernelspecs the machine has.
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600"]
    side_by_side = ["-n", "auto", "--dist", "loadfile"]  # a notebook's cells in order, on one worker
    plugins = ["-p", "no:cacheprovider", *side_by_side, *nbval]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", scratch, scratch]
    return subprocess.run(command, cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
