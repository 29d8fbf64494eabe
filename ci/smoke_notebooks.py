"""Runs every notebook at scale "smoke" under nbval, in a scratch folder; extra arguments go to pytest.

The notebooks' own asserts decide: their outputs are stripped, so there is nothing to compare with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from igd_lib.config import data_dir

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        print(f"no notebooks in {ROOT / 'notebooks'}", file=sys.stderr)
        return 1
    data = data_dir().resolve()  # before the cache moves
    with tempfile.TemporaryDirectory() as scratch:
        for path in notebooks:
            notebook = parameterize_notebook(load_notebook_node(str(path)), {"scale": "smoke"})
            nbformat.write(notebook, Path(scratch) / path.name)
        environment = {**os.environ, "IGD_DATA": str(data), "IGD_CACHE": f"{scratch}/cache", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "OMP_NUM_THREADS": "1"}
        # The kernel is this Python's own, whatever other kernelspecs the machine has.
        nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600"]
        side_by_side = ["-n", "auto", "--dist", "loadfile"]  # a notebook's cells in order, on one worker
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *side_by_side, *nbval, "--rootdir", scratch, scratch]
        return subprocess.run([*command, *arguments], cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
