"""`make reproduce-small`: its plan, its log by stages, and the pages of what notebooks showed."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest

from ci import reproduce_small, reproduction_log
from igd_lib.tools.machine import cache_dir
from paper_figures import make_figures, make_pages


def cell(source: str, started: str = "", duration: float | None = None, outputs=(), name: str = "c", tags=()):
    clock = {"papermill": {"start_time": started, "duration": duration}} if started else {}
    about = {**clock, "tags": list(tags)}
    return dict(cell_type="code", id=name, source=[source], metadata=about, outputs=list(outputs))


def heading(text: str):
    return dict(cell_type="markdown", id="m", source=[text], metadata={})


def executed(*cells, parameters=None):
    about = {"start_time": "2026-05-01T10:00:00+00:00", "duration": 90.0, "parameters": parameters or {}}
    return {"cells": list(cells), "metadata": {"papermill": about}}


TEN = "2026-05-01T10:00:00+00:00"
RUN = executed(
    cell("experiment = prepare()", TEN, 6.0),
    cell("sets = experiment.sets(rows)", TEN, 120.0),
    cell("rows = measures.accuracy_rows(experiment, sets)", TEN, 60.0),
    cell("sets = experiment.sets(rows)\nmeasures.influence_rows(sets)", TEN, 30.0),
)


# --- the plan


def test_every_notebook_is_run_and_some_twice():
    names = [run.name for run in reproduce_small.runs([])]
    own = {path.stem for path in (reproduce_small.ROOT / "notebooks").glob("*.ipynb")}
    assert own <= set(names) and names == sorted(names) and len(names) > len(own)
    assert [run.name for run in reproduce_small.runs(["06"])] == [
        "06_checkpoint_selection", "06_checkpoint_selection_minimax"
    ]  # fmt: skip
    assert [run.name for run in reproduce_small.runs(["06_checkpoint_selection", "02"])] == [
        "02_checkpoints", "06_checkpoint_selection"
    ]  # fmt: skip
    parameters = {run.name: run.parameters for run in reproduce_small.runs([])}
    for name in ("01_nette_woof_ten", "05_guidance_ablation", "08_cifar_ten"):
        assert parameters[name]["seeds"] == "10"


def test_every_run_s_parameters_are_its_notebook_s():
    for run in reproduce_small.runs([]):
        notebook = json.loads((reproduce_small.ROOT / "notebooks" / f"{run.notebook}.ipynb").read_text())
        cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        names = {line.split(":")[0] for line in cells[0]["source"]}
        assert set(run.parameters) <= names, run


def test_the_plan_names_minutes_where_they_were_recorded(monkeypatch, tmp_path):
    log = tmp_path / "reproduction.csv"
    (tmp_path / "run.ipynb").write_text(json.dumps(RUN))
    reproduction_log.note(log, "06_checkpoint_selection", tmp_path / "run.ipynb", "abc")
    monkeypatch.setattr(reproduce_small, "RECORDED", log)
    first, second, total = reproduce_small.plan(reproduce_small.runs(["06"])).splitlines()
    assert first.split() == ["4", "min", "06_checkpoint_selection"]
    assert second.strip() == "not recorded  06_checkpoint_selection_minimax -p backbone minimax"
    assert total.split()[:4] == ["0.1", "h", "2", "runs"] and "budget 24 h" in total


# --- the log


def test_minutes_by_stage():
    assert reproduction_log.minutes_by_stage(RUN) == pytest.approx(
        {"other": 0.1, "sets": 2.0, "evaluation": 1.0, "sets and evaluation": 0.5}
    )


def test_a_run_that_was_stopped_counts_what_it_did_and_the_cell_it_was_at():
    """Stopped at 10:03 in a cell that began at 10:00; the cells behind it had not begun."""
    stopped = executed(
        cell("x = 1", TEN, 6.0), cell("experiment.sets()", TEN), cell("measures.accuracy_rows()")
    )
    ended = pd.Timestamp("2026-05-01T10:03:00+00:00").timestamp()
    found = reproduction_log.minutes_by_stage(stopped, ended)
    assert (found["other"], found["sets"], found["evaluation"]) == (pytest.approx(0.1), 3.0, 0.0)


def test_the_log_has_each_go_once_and_sums_them(tmp_path):
    log, path = tmp_path / "log.csv", tmp_path / "run.ipynb"
    path.write_text(json.dumps(RUN))
    for _ in range(2):
        reproduction_log.note(log, "05", path, "abc")
    again = RUN | {"metadata": {"papermill": {"start_time": "2026-05-02T08:00:00+00:00"}}}
    path.write_text(json.dumps(again))
    reproduction_log.note(log, "05", path, "abc")
    reproduction_log.note(log, "06", path, "abc")
    reproduction_log.note(log, "07", tmp_path / "missing.ipynb", "abc")
    table = reproduction_log.summed(reproduction_log.read(log)).set_index("run")
    assert table["in all"].to_dict() == pytest.approx({"05": 7.2, "06": 3.6, "all": 10.8})
    assert table.goes.to_dict() == {"05": 2, "06": 1, "all": 3} and table.sets["all"] == 6.0


def test_minutes_are_the_processor_s_where_they_are_known(tmp_path):
    """3.6 minutes by the clock, 1.8 of the processor: half of each stage's."""
    path = tmp_path / "run.ipynb"
    path.write_text(json.dumps(RUN))
    reproduction_log.note(tmp_path / "log.csv", "05", path, "abc", used=1.8)
    table = reproduction_log.summed(reproduction_log.read(tmp_path / "log.csv")).set_index("run")
    assert table.loc["05", "in all"] == 1.8 and table.loc["05", "sets"] == 1.0


def test_the_processor_s_minutes_are_those_of_programs_that_were_run():
    before = reproduce_small.processor_minutes()
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    subprocess.run([sys.executable, "-c", outer], check=True)
    assert 0.01 <= reproduce_small.processor_minutes() - before < 0.1


@pytest.mark.slow
def test_smoke_runs_a_notebook_and_logs_nothing(tmp_path, capsys):
    assert reproduce_small.main(["02", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "02_checkpoints: done" in printed and "1 of 1 runs" in printed
    assert (tmp_path / "02_checkpoints.ipynb").is_file()
    assert not (cache_dir() / "reproduction.csv").is_file()


# --- pages


TABLE = pd.DataFrame({"method": ["DiT", "a | b"], "n": [5, None]})


def shown(**data):
    return {"output_type": "display_data", "data": data}


def test_a_page_has_what_cells_showed_under_their_headings():
    waited = "waiting for a training in /x\n/x/seed1: another run is sampling what is left; waiting for it\n"
    said = f"sets 3/9, 14 s, 2 min left\nkept 3\n{waited}class 1/3, 5 min left is text\n"
    html = TABLE.to_html()
    one = cell(
        'display(plotting.keep(figure, config.save_to, "accuracy"))\ndisplay(table)',
        outputs=[
            {"output_type": "stream", "name": "stdout", "text": [said]},
            shown(**{"image/png": "...", "text/plain": "<Figure>"}),
            shown(**{"text/html": html, "text/plain": "..."}),
            shown(**{"text/markdown": "**Bold** words", "text/plain": "..."}),
        ],
        name="nb05-04",
    )
    notebook = executed(heading("# Title\nwords"), heading("## Part"), cell("x = 1"), one)
    page = make_pages.as_page(notebook, "05_guidance_ablation")
    lines = page.split("\n\n")
    assert lines[0] == f"<!-- notebook 05_guidance_ablation, code {make_pages.digest(notebook)} -->"
    assert lines[1] == "# Title" and lines[2].startswith("As it ran at scale `auto`, 2026-05-01, in 1.5 min")
    assert lines[3:5] == ["## Part", "<!-- cell nb05-04 -->"]
    assert lines[5] == "```text\nkept 3\nclass 1/3, 5 min left is text\n```"
    assert lines[6] == "![table05](../table05.png)"
    assert lines[7].splitlines() == [
        "| method | n |", "| --- | --- |", "| DiT | 5.0 |", r"| a \| b |  |"
    ]  # fmt: skip
    assert lines[8] == "**Bold** words\n"


def test_a_pivoted_table_is_whole():
    """Names of the index in the header, and cells over several rows or columns in each of them."""
    metrics = ["x"] * 4 + ["y"] * 4
    rows = pd.DataFrame({"method": list("aabb") * 2, "seed": [0, 1] * 4, "metric": metrics, "v": 1.5})
    wide = rows.pivot(index=["method", "seed"], columns="metric", values="v")
    header, _, *body = make_pages._table(wide.to_html()).splitlines()
    assert header == "| method | seed | x | y |"
    assert body == [f"| {method} | {seed} | 1.5 | 1.5 |" for method in "ab" for seed in (0, 1)]
    wide = rows.pivot(index="method", columns=["metric", "seed"], values="v")
    header, _, *body = make_pages._table(wide.to_html()).splitlines()
    assert header == "| method | x 0 | x 1 | y 0 | y 1 |"
    assert body == [f"| {method} | 1.5 | 1.5 | 1.5 | 1.5 |" for method in "ab"]


def test_a_page_says_with_which_parameters_and_names_no_folder_of_this_machine(monkeypatch):
    printed = f"data in {make_pages.data_dir()}/x, sets in {cache_dir()}/y, exported to /somewhere/06/z"
    one = cell("x", outputs=[{"output_type": "stream", "name": "stdout", "text": printed}])
    given = {"scale": "small", "save_to": "/somewhere/06", "backbone": "minimax"}
    page = make_pages.as_page(
        executed(heading("# T"), one, parameters=given), "06_checkpoint_selection_minimax"
    )
    assert page.startswith("<!-- notebook 06_checkpoint_selection, code ")
    assert "at scale `small` with `-p backbone minimax`," in page and "/somewhere" not in page
    assert "data in $IGD_DATA/x, sets in $IGD_CACHE/y, exported to out/small/06/z" in page


def test_dollars_of_a_page_are_no_formulas():
    text = "put $IGD_DATA/a and $IGD_DATA/b, `$X`\n\n```text\n$IGD_CACHE, $Y\n```\n\nin \\$Z\n"
    page = make_pages.without_formulas(text)
    assert page == text.replace("put $IGD_DATA/a and $IGD", r"put \$IGD_DATA/a and \$IGD")
    assert make_pages.without_formulas(page) == page
    for own in make_pages.PAGES.glob("*.md"):
        assert make_pages.without_formulas(own.read_text()) == own.read_text(), own.name


def test_a_page_of_other_code_is_not_current():
    first, injected = cell("x = 1"), cell("seeds = 3", tags=["injected-parameters"])
    page = make_pages.as_page(executed(heading("# T"), first, injected), "02_checkpoints")
    assert make_pages.is_current(page, {"cells": [heading("# other words"), first]})
    assert not make_pages.is_current(page, {"cells": [heading("# T"), cell("x = 2")]})


def test_a_page_that_is_too_large_is_refused():
    one = cell("x", outputs=[{"output_type": "stream", "name": "stdout", "text": "y" * 200_001}])
    with pytest.raises(ValueError, match="the page of 02_checkpoints would have 2"):
        make_pages.as_page(executed(heading("# T"), one), "02_checkpoints")


def test_pictures_are_known_by_the_names_that_notebooks_keep_them_under():
    """Each name that is drawn of a run is one that its notebook keeps a figure under."""
    for one in (*make_figures.ARTEFACTS, *make_figures.PICTURES):
        run = next(run for run in reproduce_small.runs([]) if run.name == one.source)
        source = (reproduce_small.ROOT / "notebooks" / f"{run.notebook}.ipynb").read_text()
        kept = {match["name"] for match in make_pages.KEPT.finditer(source.replace('\\"', '"'))}
        assert one.kept in kept, (one.source, kept)
    assert make_figures.drawn("22_early_stage") == {"early_stage": "fig02", "examples": "fig02_examples"}
