"""How long a whole notebook takes at scale "small", by stage, from an empty cache."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import papermill

from igd_lib.tools.machine import data_dir

ROOT = Path(__file__).parents[2]


def minutes(number: int, ipc: int) -> dict[str, Any]:
    """Minutes of the notebook of that number by its headings, start of the kernel and all else in "whole"."""
    (notebook,) = (ROOT / "notebooks").glob(f"{number:02d}_*.ipynb")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.ipynb"
        places = {"IGD_DATA": str(data_dir().resolve()), "IGD_CACHE": scratch}
        with mock.patch.dict(os.environ, places):
            done = papermill.execute_notebook(
                str(notebook),
                str(out),
                {"scale": "small", "ipc": ipc},
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stderr,
                stderr_file=sys.stderr,
            )
    about = {"notebook": notebook.stem, "ipc": ipc, "whole": done.metadata.papermill["duration"] / 60}
    return about | {"stages": by_heading(done)}


def by_heading(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """Minutes of the code cells under each heading of the second level; those before the first: "imports"."""
    heading, found = "imports", {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            titles = [line[3:] for line in cell.source.splitlines() if line.startswith("## ")]
            heading = titles[-1] if titles else heading
        else:
            spent = (cell.metadata.get("papermill", {}).get("duration") or 0.0) / 60
            found[heading] = found.get(heading, 0.0) + spent
    return found
