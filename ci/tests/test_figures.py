"""Figures and tables in the repository are those that its rows give."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from igd_lib import files, plotting, tables
from paper_figures import make_figures


def test_nothing_is_stale():
    assert make_figures.stale() == []


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the folder with one artefact, drawn."""
    here = make_figures.HERE
    (tmp_path / "data").mkdir()
    for name in ("igd.mplstyle", "data/paper_reported.csv", "data/05_guidance_ablation.csv"):
        (tmp_path / name).write_bytes((here / name).read_bytes())
    monkeypatch.setattr(make_figures, "HERE", tmp_path)
    assert make_figures.main([]) == 0
    return tmp_path


def test_a_change_of_rows_or_of_a_page_is_noticed(copy, capsys):
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    assert set(manifest["outputs"]) == {"table05.md", "table05.svg"} and (copy / "table05.pdf").is_file() and (copy / "table05.png").is_file()
    assert manifest["inputs"]["data/05_guidance_ablation.csv"] == files.sha256(copy / "data" / "05_guidance_ablation.csv")
    assert make_figures.main(["--check"]) == 0
    page = (copy / "table05.md").read_text()
    (copy / "table05.md").write_text(page.replace("Table 5", "Table 6"))
    assert make_figures.stale() == ["file table05.md"] and make_figures.main(["--check"]) == 1
    (copy / "table05.md").write_text(page)
    path = copy / "data" / "05_guidance_ablation.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows.loc[rows.metric == "top1", "value"] = "50.0"
    path.write_text(rows.to_csv(index=False, lineterminator="\n"))
    capsys.readouterr()
    assert make_figures.main(["--check"]) == 1
    assert "inputs data/05_guidance_ablation.csv" in capsys.readouterr().out
    make_figures.main([])
    assert make_figures.stale() == []


@pytest.mark.parametrize(
    ("means", "below"),
    [
        ({"a": 10.0, "b": 70.0, "c": 73.0}, ["a"]),
        ({"a": 10.0, "b": 9.0, "c": 70.0, "d": 72.0}, ["a", "b"]),
        ({"a": 60.0, "b": 70.0, "c": 74.0}, []),  # a gap of 9 is not more than 2 x 5
        ({"a": 10.0, "b": 70.0}, []),  # nothing says how much the others differ
        ({"a": 70.0}, []),
    ],
)
def test_methods_far_below_the_others_do_not_set_the_axis(means, below):
    rows = pd.DataFrame([(method, mean + seed) for method, mean in means.items() for seed in (0, 1)], columns=["method", "value"])
    assert tables.far_below(rows) == below
    low = plotting.scores(rows, title="").axes[0].get_ylim()[0]
    assert low > max((means[name] for name in below), default=-1.0)
