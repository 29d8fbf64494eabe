"""Figures and tables in the repository are those that its rows give."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from igd_lib import files
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
