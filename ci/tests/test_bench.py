"""What `make bench` makes of an executed notebook, and says."""

import nbformat
import pytest

from ci.bench.notebook import by_heading


def test_a_notebooks_time_is_told_by_its_headings():
    cell = nbformat.v4.new_code_cell
    timed = [cell("a"), cell("b"), cell("c"), cell("d")]
    for one, seconds in zip(timed, (6.0, 60.0, 30.0, None), strict=True):
        one.metadata["papermill"] = {"duration": seconds}
    text = nbformat.v4.new_markdown_cell
    cells = [text("# Title"), timed[0], text("## Data\nwords"), *timed[1:3], text("more"), timed[3]]
    found = by_heading(nbformat.v4.new_notebook(cells=cells))
    assert found == pytest.approx({"imports": 0.1, "Data": 1.5})
