"""How rows are shown: verdicts, crossings, and the paper's figures beside ours."""

import pandas as pd
import pytest

from igd_lib import config
from igd_lib.analysis import plotting, tables
from igd_lib.analysis.results import frame
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.measures import About
from igd_lib.experiment.methods import Method
from igd_lib.tools import locks


@pytest.fixture
def rows(small_loads):
    experiment = prepare("02", "imagenet", "smoke")
    values = {
        Method(guidance=experiment.scale.guidance): [60.0, 61.0, 62.0, 61.0],
        Method(): [50.0, 52.0, 52.0, 50.0],
    }
    return frame(
        [
            About(experiment, method, seed, experiment.train, 10).row("top1", value)
            for method, own in values.items()
            for seed, value in enumerate(own)
        ]
    )


def guided(rows):
    """The claim that guidance gains."""
    return [("DiT-IGD", "DiT")]


def test_a_difference_is_shown_with_its_interval_and_p(rows):
    """Differences 10, 9, 10, 11: mean 10, sd 0.816, t = 24.5 with 3 degrees of freedom; half-width 1.299."""
    (shown,) = tables.differences(rows, guided).to_dict("records")
    assert shown == {
        "difference": "DiT-IGD - DiT", "mean [95 %]": "+10.0 [+8.7, +11.3]", "n": 4,
        "p (paired t)": "0.0001", "p (Holm)": "0.0001", "verdict": "gain",
    }  # fmt: skip
    (shown,) = tables.differences(rows, lambda _: [("DiT", "DiT-IGD")], digits=2).to_dict("records")
    assert shown["mean [95 %]"] == "-10.00 [-11.30, -8.70]" and shown["verdict"] == "loss"
    # Two pairs need t > 12.7: differences 10 and 9 have t = 19, differences 10 and 6 have t = 4.
    assert tables.differences(rows[rows.seed < 2], guided).verdict.tolist() == ["gain"]
    wider = rows.assign(value=rows.value.where((rows.seed != 1) | (rows.method != "DiT"), 55.0))
    assert tables.differences(wider[wider.seed < 2], guided).verdict.tolist() == ["no clear difference"]
    assert tables.differences(rows[rows.seed == 0], guided).verdict.tolist() == ["no clear difference"]


def test_a_very_small_p_is_not_shown_as_nought(rows):
    close = rows.assign(value=rows.value.where(rows.method != "DiT-IGD", 60.0)).assign(
        value=lambda own: own.value.where(own.method != "DiT", 50.0 + 0.001 * own.seed)
    )
    assert tables.differences(close, guided)["p (paired t)"].tolist() == ["< 0.0001"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([11.58, 11.62, 11.60], "11.60 ± 0.02"),
        ([81.0, 82.0, 83.0], "82.0 ± 1.0"),
        ([0.231, 0.233, 0.235], "0.233 ± 0.002"),
        ([50.00001, 50.00002, 50.00003], "50.000 ± 0.000"),
        ([7.0, 7.0, 7.0], "7.000 ± 0.000"),
    ],
)
def test_a_metric_has_the_decimals_that_its_spread_asks_for(rows, values, shown):
    own = rows[rows.method == "DiT"].iloc[:3].assign(metric="FD over x", value=values)
    assert tables.metric_table(rows[rows.method == "DiT"], own)["FD over x"].tolist() == [shown]


def test_crossing_methods_with_networks(rows):
    other = rows.assign(network="resnet18", value=rows.value + 1)
    found = tables.cross_table(pd.concat([rows.assign(network="convnet3"), other]))
    assert found.to_dict("records") == [
        {"method": "DiT-IGD", "convnet3": "61.0 ± 0.8", "resnet18": "62.0 ± 0.8", "n": 4},
        {"method": "DiT", "convnet3": "51.0 ± 1.2", "resnet18": "52.0 ± 1.2", "n": 4},
    ]


def test_only_the_reported_accuracy_is_shown(rows):
    best = rows.assign(metric="top1_best", value=99.0)
    both = pd.concat([rows, best])
    assert tables.accuracy_table(both).equals(tables.accuracy_table(rows))
    assert list(tables.wide_table(both).columns) == ["method", "top-1 (%)", "sd", "n"]


def test_metrics_side_by_side_and_their_rank_correlation(rows):
    """Distances that fall as accuracy rises, but for one swap among eight: rho = 1 - 6 * 2 / (8 * 63)."""
    order = rows.value.rank(method="first")
    distance = rows.assign(metric="FD over x", value=-order.where(~order.isin([1, 2]), 3 - order))
    table = tables.metric_table(rows, distance)
    assert list(table.columns) == ["method", "top-1 (%)", "FD over x", "n"]
    assert table["top-1 (%)"][0] == "61.0 ± 0.8"
    accuracy = rows.assign(value=order)
    (entry,) = tables.rank_correlations(accuracy, distance).to_dict("records")
    rho = -round(1 - 12 / 504, 2)
    assert entry == {"metric": "FD over x", "rank correlation with top-1": rho, "p": "< 0.0001", "n": 8}
    low = accuracy[accuracy.method == accuracy.method[0]].assign(method="broken", value=-100.0)
    # Would make nearly any metric correlate.
    worst = distance[distance.method == distance.method[0]].assign(method="broken", value=100.0)
    found = tables.rank_correlations(pd.concat([accuracy, low]), pd.concat([distance, worst]))
    (other,) = found.to_dict("records")
    assert other == entry | {"without": "broken"}
    (still,) = tables.rank_correlations(accuracy, distance.assign(value=1.0)).to_dict("records")
    assert still == entry | {"rank correlation with top-1": "", "p": ""}


def test_the_papers_rows_by_cell():
    found = tables.reported(1, dataset="imagewoof", ipc=10, network="resnetap10")
    assert found[found.method == "Minimax-IGD"][["value", "sd"]].values.tolist() == [[43.3, 0.3]]
    assert set(tables.reported(2).dataset) == {"imagenet"} and len(tables.reported(3)) == 0


def test_ours_beside_the_paper(rows):
    """On the stand-in nothing is called a difference to the paper; methods not run here keep its figure."""
    found = tables.beside_paper(rows, tables.reported(2, ipc=10)).set_index("method")
    ours = "ours (fashion-mnist, smoke)"  # never shown as ImageNet numbers
    assert found.loc["DiT-IGD"].to_dict() == {"paper": "45.5 ± 0.5", ours: "61.0 ± 0.8", "n": "4"}
    assert found.loc["RDED"].to_dict() == {"paper": "42.0 ± 0.1", ours: "", "n": ""}


def test_a_comparable_cell_has_its_difference(rows):
    ours = rows.assign(
        dataset="imagenet", scale="paper", network="torchvision/resnet18", value=rows.value - 16
    )
    found = tables.beside_paper(ours, tables.reported(2, ipc=10)).set_index("method")
    assert found.loc["DiT-IGD"].to_dict() == {
        "paper": "45.5 ± 0.5", "ours (imagenet, paper)": "45.0 ± 0.8", "n": "4", "difference": "-0.5",
        "within two sds": "yes",
    }  # fmt: skip
    assert found.loc["DiT"].difference == "-4.6" and found.loc["DiT"]["within two sds"] == "no"
    assert found.loc["RDED"].difference == ""


# --- one seed, and what the paper does not have


def test_one_seed_has_no_sd(rows):
    one = rows[rows.seed == 0]
    distance = one.assign(metric="FD over x", value=1.0)
    shown = [
        tables.accuracy_table(one),
        tables.wide_table(pd.concat([one, distance])),
        tables.cross_table(one),
        tables.metric_table(one, distance),
        tables.differences(one, guided),
        tables.rank_correlations(one, distance),
        tables.beside_paper(one, tables.reported(2, ipc=10)),
    ]
    for table in shown:
        assert "nan" not in table.to_string(index=False).casefold(), table
    assert tables.accuracy_table(one).sd.tolist() == ["", ""] and tables.accuracy_table(one).n.tolist() == [
        1,
        1,
    ]
    assert tables.metric_table(one, distance)["FD over x"].tolist() == ["1.000", "1.000"]
    assert tables.differences(one, guided)["mean [95 %]"].tolist() == ["+10.0"]


def test_figures_of_one_seed_say_so(rows):
    for chosen, words in ((rows[rows.seed == 0], "n = 1 generation seed, no sd"), (rows, "sd over n = 4 ")):
        figure = plotting.scores(chosen, title="x")
        assert words in figure.axes[0].get_title()
        plotting.keep(figure, "", "")


@pytest.mark.parametrize("ipc", [7, 20])
def test_the_paper_has_no_such_ipc(rows, ipc, capsys, monkeypatch):
    monkeypatch.setattr(locks, "_said", set())
    for _ in range(2):
        paper = tables.reported(2, ipc=ipc)
    assert (
        capsys.readouterr().out
        == f"the paper's Table 2 has no ipc {ipc}, but 10, 50: nothing to compare with\n"
    )
    ours = rows.assign(ipc=ipc)
    found = tables.beside_paper(ours, paper)
    assert list(found.method) == ["DiT-IGD", "DiT"] and set(found.paper) == {""}
    assert found.iloc[0]["ours (fashion-mnist, smoke)"] == "61.0 ± 0.8"
    assert len(tables.paper_table(paper)) == 0


def test_a_preset_says_where_the_paper_has_none(capsys, monkeypatch):
    monkeypatch.setattr(locks, "_said", set())
    assert config.preset("imagenette", "dit", 10).gamma == 50 and capsys.readouterr().out == ""
    found = {ipc: config.preset("imagenette", "dit", ipc).gamma for ipc in (1, 7, 20, 49, 50, 75, 100, 200)}
    assert found == {1: 50, 7: 50, 20: 50, 49: 50, 50: 120, 75: 120, 100: 120, 200: 120}
    said = capsys.readouterr().out
    assert (
        "Table 12 has no IPC 20, but 10, 50, 100: k and gamma are IPC 10's" in said and said.count("\n") == 6
    )
