"""Figures and tables in the repository are those that its rows give."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
import torch
from PIL import Image

from igd_lib.analysis import plotting, results, tables
from igd_lib.tools import files
from paper_figures import check_published, make_figures


@pytest.mark.slow
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
    assert set(manifest["outputs"]) == {"table05.md", "table05.svg"}
    assert (copy / "table05.pdf").is_file() and (copy / "table05.png").is_file()
    own = "data/05_guidance_ablation.csv"
    assert manifest["inputs"][own] == files.sha256(copy / own)
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


def test_a_picture_that_is_missing_or_shows_something_else_is_noticed(copy):
    picture = copy / "table05.png"
    drawn = picture.read_bytes()
    picture.unlink()
    assert make_figures.stale() == ["file table05.png is missing"]
    Image.new("RGB", Image.open(io.BytesIO(drawn)).size, "white").save(picture)
    assert make_figures.stale() == ["file table05.png shows something else"]
    picture.write_bytes(drawn)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    more = manifest | {"outputs": {**manifest["outputs"], "old.svg": "0"}}
    (copy / "MANIFEST.json").write_text(json.dumps(more))
    assert make_figures.stale() == ["outputs old.svg is no longer used or drawn"]


@pytest.fixture
def saved(copy, tmp_path_factory):
    """A folder as a notebook saves it at the paper's scale (the stand-in's rows under other names)."""
    rows = pd.read_csv(copy / "data" / "05_guidance_ablation.csv", dtype=str, keep_default_na=False)
    rows = rows.assign(
        scale="paper",
        dataset="imagenette",
        ipc="50",
        network=rows.network.replace("convnet3", "resnet18"),
        device="cuda, bfloat16",
    )
    folder = tmp_path_factory.mktemp("rows") / "05_guidance_ablation"
    folder.mkdir()
    rows.to_csv(folder / "rows.csv", index=False)
    return folder


def test_rows_of_the_paper_s_scale_do_not_replace_the_stand_in_s(copy, saved, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for folder in (saved, saved.parent):
        assert make_figures.main([str(folder)]) == 2
        assert "is of scale paper" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_rows_of_the_paper_s_scale_are_drawn_into_a_folder_of_their_own(copy, saved, tmp_path_factory):
    """Under the paper's name, beside its numbers with the difference, without words about the stand-in."""
    into = tmp_path_factory.mktemp("own")
    assert make_figures.main([str(saved), "--into", str(into)]) == 0
    page = (into / "table05.md").read_text()
    assert page.startswith("# Table 5\n") and "stand-in" not in page and "trained on cuda, bfloat16" in page
    rows = tables.top1(results.load(into / "data" / "05_guidance_ablation.csv"))
    mean = rows[rows.method == "DiT-IGD"].value.mean()
    start = "| imagenette | 50 | resnet18 | DiT-IGD |"
    line = next(line for line in page.splitlines() if line.startswith(start))
    assert "81.0 ± 0.7" in line and f"{mean:.1f} ± " in line and f"{mean - 81.0:+.1f}" in line


def test_pictures_of_what_no_table_holds_are_kept_as_they_were_drawn(copy, tmp_path_factory):
    """Those that are listed, by their bytes; another one of the same run is left."""
    run = tmp_path_factory.mktemp("pictures") / "18_lesson"
    run.mkdir()
    for name in ("samples", "sketch"):
        Image.new("RGB", (8, 4), "red").save(run / f"{name}.png")
    assert make_figures.main([str(run)]) == 0 and make_figures.stale() == []
    drawn = (run / "samples.png").read_bytes()
    assert (copy / "data" / "18_lesson.samples.png").read_bytes() == drawn
    assert not list(copy.rglob("*sketch*"))
    assert make_figures.drawn("18_lesson")["samples"] == "data/18_lesson.samples"


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
    values = [(method, mean + seed) for method, mean in means.items() for seed in (0, 1)]
    rows = pd.DataFrame(values, columns=["method", "value"]).assign(kind="DiT", throughout=0, cfg_choice="")
    assert tables.far_below(rows) == below
    low = plotting.scores(rows, title="").axes[0].get_ylim()[0]
    assert low > max((means[name] for name in below), default=-1.0)


def test_values_that_lie_close_at_the_top_hide_no_method():
    """The two best values of four alike methods, a gap below them, and methods on both sides of it."""
    values = {"a": [30.0, 35.0], "b": [31.0, 35.1], "c": [30.5, 31.2], "d": [29.5, 30.1]}
    rows = pd.DataFrame([(name, value) for name, own in values.items() for value in own])
    assert tables.far_below(rows.set_axis(["method", "value"], axis=1)) == []


def test_a_page_keeps_what_was_read_in_other_ways_apart(copy):
    """Of `13_paper_vs_code`: the same sets under another protocol, best and last, below the rows."""
    rows = pd.read_csv(copy / "data" / "05_guidance_ablation.csv", dtype=str, keep_default_na=False)
    again = pd.concat(
        [
            rows[rows.metric == "top1"].assign(
                metric=metric, artefact=rows.artefact + "_readings", protocol="other"
            )
            for metric in ("top1_best", "top1_last")
        ]
    )
    (copy / "data" / "05_guidance_ablation.csv").write_text(
        pd.concat([rows, again]).to_csv(index=False, lineterminator="\n")
    )
    before = (copy / "table05.md").read_text()
    assert make_figures.main([]) == 0
    page = (copy / "table05.md").read_text()
    assert "The same sets, read in other ways:" in page and "last (%)" in page
    assert page.split("The same sets")[0].strip() == before.split("The paper's figures")[0].strip()


def test_every_method_of_the_rows_has_a_colour_and_a_marker_of_its_own():
    assert plotting.COLOURS.keys() == plotting.MARKERS.keys()
    assert len(set(plotting.COLOURS.values())) == len(plotting.COLOURS)
    paths = [make_figures.HERE / "data" / f"{artefact.source}.csv" for artefact in make_figures.ARTEFACTS]
    there = [path for path in paths if path.is_file()]
    looks = {look for path in there for look in results.looks(results.load(path)).values()}
    assert len(there) > 15 and looks <= plotting.COLOURS.keys()


def test_methods_are_coloured_by_their_look_whatever_they_are_called():
    assert plotting.style_of("DiT-IGD") == (plotting.COLOURS["DiT-IGD"], "*")
    assert plotting.style_of("m1") == ("#777777", "o") and plotting.style_of("m1", "#333333")[0] == "#333333"
    first = {"method": "m1", "kind": "DiT + G_I", "throughout": 1, "cfg_choice": "", "value": 60.0}
    second = {"method": "DiT-IGD", "kind": "DiT", "throughout": 0, "cfg_choice": "best", "value": 62.0}
    rows = pd.DataFrame([first, first, second, second])
    looks = {"m1": "DiT + G_I throughout", "DiT-IGD": "DiT, best cfg"}
    assert results.looks(rows) == looks
    lines = plotting.scores(rows, title="").axes[0].lines
    styles = {(line.get_color(), line.get_marker()) for line in lines if line.get_marker() in "XD"}
    assert styles == {plotting.style_of(look) for look in looks.values()}

    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    columns = {"m1": images, "DiT-IGD": images, "DiT": images}
    figure = plotting.gallery(columns, titles=["0"], title="", looks=looks)
    colours = [axes.yaxis.label.get_color() for axes in figure.axes]
    assert colours == [*(plotting.COLOURS[look] for look in looks.values()), "#333333"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_gallery_whose_words_an_office_program_saved_is_read(tmp_path, encoding):
    Image.new("RGB", (8, 4)).save(tmp_path / "images.png")
    text = "row,look,title,0,1\nDiT,DiT,Bébés,tench,cat\n"
    (tmp_path / "images.csv").write_bytes(text.encode(encoding))
    found = plotting.read_gallery(tmp_path / "images")
    assert found["titles"] == ["tench", "cat"] and found["title"] == "Bébés"
    assert found["columns"]["DiT"].shape == (2, 3, 4, 4)


def test_the_page_of_published_figures_is_of_its_rows():
    rows = make_figures.HERE / "data" / "published.csv"
    if not rows.is_file():
        pytest.skip("no rows yet")
    assert (make_figures.HERE / "published.md").read_text() == check_published.page(results.load(rows))
