"""Every number in README.md and FINDINGS.md comes from the saved results, and those marked elsewhere."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from scipy import stats

from igd_lib.tools.version import PROJECT
from paper_figures import make_texts

QUICKSTART = "00_quickstart"
ALL_MARKED = ("README.md", "FINDINGS.md")


def quickstart(method: str, metric: str = "top1") -> pd.Series:
    rows = pd.read_csv(make_texts.DATA / f"{QUICKSTART}.csv")
    return rows[(rows.method == method) & (rows.metric == metric)].set_index("seed")["value"]


@pytest.mark.parametrize("name", make_texts.TEXTS)
def test_numbers_are_those_of_the_results(name):
    text = (PROJECT / name).read_text()
    assert make_texts.changed(text, make_texts.fill(text)) == []


RESULT = r"\d+\.\d+|\d+ ?%|\d+ points|±"  # what a result looks like; versions and code are left out


@pytest.mark.parametrize("name", ALL_MARKED)
def test_no_result_is_typed_by_hand(name):
    """Outside of marks are no decimals, percentages and spreads, but in code, links and versions."""
    text = make_texts.MARK.sub("", (PROJECT / name).read_text())
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = re.sub(
        r"Python \d\.\d+ to \d\.\d+|Apache-2\.0|CC-BY-NC 4\.0|version \d\.\d|95 % interval", "", text
    )
    assert re.findall(RESULT, text) == []


def test_a_difference_is_the_paired_one_after_the_table_s_correction():
    found = quickstart("DiT-IGD") - quickstart("Random")
    low, high = stats.t.interval(0.95, 4, found.mean(), found.sem())
    shown = make_texts.value(f"difference {QUICKSTART}; DiT-IGD - Random")
    assert shown.startswith(f"{found.mean():+.1f} [{low:+.1f}, {high:+.1f}], n = {len(found)}, ")
    verdict = make_texts.value(f"difference {QUICKSTART}; DiT-IGD - Random; show=verdict")
    assert shown.endswith(f", {verdict}") and f"| {verdict} |" in make_texts.value("table quickstart; 2")
    loss = quickstart("DiT-IGD", "influence_loss") - quickstart("DiT + G_D", "influence_loss")
    what = f"difference {QUICKSTART}; DiT-IGD - DiT + G_D; metric=influence_loss; show=mean"
    assert make_texts.value(what) == f"{loss.mean():+.3f}"


def test_a_mean():
    own = quickstart("DiT")
    assert (
        make_texts.value(f"mean {QUICKSTART}; DiT") == f"{own.mean():.1f} ± {own.std():.1f} (n = {len(own)})"
    )
    assert make_texts.value(f"mean {QUICKSTART}; DiT; show=mean") == f"{own.mean():.1f}"


def test_hours_by_stage(tmp_path, monkeypatch):
    """30, 90 and 60 minutes of two runs, one of them in two goes."""
    lines = ["a,sets,t,30,r", "a,sets,u,90,r", "b,evaluation,t,60,r"]
    (tmp_path / "reproduction.csv").write_text("\n".join(["run,stage,started,minutes,revision", *lines]))
    monkeypatch.setattr(make_texts, "DATA", tmp_path)
    found = dict(re.findall(r"^\| ([a-z0-9 ]+?) \| ([\d.]+) \|$", make_texts.value("hours"), re.MULTILINE))
    assert found == {
        "sets": "2.0", "evaluation": "1.0", "sets and evaluation": "0.0", "other": "0.0", "all 2 runs": "3.0",
    }  # fmt: skip


def test_a_cell_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "measured.csv").write_text("what,apart\nthe sampler,4.8e-6\nforward,0\n")
    monkeypatch.setattr(make_texts, "DATA", tmp_path)
    assert make_texts.value("cell measured; the sampler; apart") == "4.8e-6"
    with pytest.raises(ValueError, match="no such result"):
        make_texts.value("cell measured; another; apart")


@pytest.mark.parametrize(
    "what",
    [
        f"difference {QUICKSTART}; DiT-IGD - Nothing",
        f"mean {QUICKSTART}; Nothing",
        "mean 99_nothing; DiT",
        "table quickstart; 9",
        "table nothing; 1",
        f"mean {QUICKSTART}; DiT; show=colour",
        f"mean {QUICKSTART}",
    ],
)
def test_a_mark_of_what_there_is_not_is_refused(what):
    with pytest.raises(ValueError, match="no such result: "):
        make_texts.value(what)


def test_a_misspelt_mark_is_refused():
    with pytest.raises(
        ValueError,
        match=f"is one of {', '.join(make_texts.KINDS)}, got 'men x'",
    ):
        make_texts.fill("<!--= men x -->1<!--/-->")


def test_the_table_against_coresets_has_the_page_s_lines():
    """Mean, interval, and gain or loss, of every difference on the page and of no other."""
    page = (PROJECT / "paper_figures" / "coresets.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\|.* - .*\[", line)]
    expected = [
        shown + (f" **{verdict}**" if verdict in ("gain", "loss") else "")
        for _, _, shown, *_, verdict in cells
    ]
    rows = make_texts.value("coresets 16_coresets").strip().splitlines()[2:]
    shown = [line.strip("| ").split(" | ")[1:-1] for line in rows]
    assert [one for column in zip(*shown, strict=True) for one in column] == expected
    assert len(expected) == 3 * len(rows) > 0


def test_what_is_stale_is_named(tmp_path, monkeypatch, capsys):
    mark = f"<!--= mean {QUICKSTART}; DiT; show=n -->"
    (tmp_path / "README.md").write_text(f"so many: {mark}4<!--/-->, and 7.")
    monkeypatch.setattr(make_texts, "PROJECT", tmp_path)
    monkeypatch.setattr(make_texts, "TEXTS", ("README.md",))
    assert make_texts.main(["--check"]) == 1
    n = len(quickstart("DiT"))
    assert f"README.md: mean {QUICKSTART}; DiT; show=n: '4', now '{n}'" in capsys.readouterr().out
    assert make_texts.main([]) == 0 and make_texts.main(["--check"]) == 0
    assert (tmp_path / "README.md").read_text() == f"so many: {mark}{n}<!--/-->, and 7."
