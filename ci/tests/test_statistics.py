"""Which differences are claimed is decided on fields: whatever a method is called, every statistic stays."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from scipy import stats

from igd_lib.analysis import results, statistics, tables
from igd_lib.config import Fidelity, Guidance
from igd_lib.experiment.methods import Method, Selection
from igd_lib.tools.version import PROJECT

DATA = PROJECT / "paper_figures" / "data"
FILES = [path.name for path in sorted(DATA.glob("*.csv")) if "settings_hash" in path.open().readline()]
PLAIN = dict(family="sampled", backbone="dit", guides="", cfg_choice="")
CLAIMS: dict[str, statistics.Claims] = {
    "table": statistics.table_claims,
    "ablation": statistics.ablation_claims,
    "early stage": statistics.early_stage_claims,
    "selection": statistics.selection_claims,
    "solver": statistics.solver_claims,
    "fidelity": statistics.fidelity_claims,
    "influence": statistics.influence_claims,
    "against": statistics.against(PLAIN),
    "against, some": statistics.against(PLAIN, guides="deviation"),
    "varied": statistics.varied(guides=""),
    "varied, guided": statistics.varied(guides="deviation"),
}


# --- the rows in the repository


@cache
def committed(name: str) -> pd.DataFrame:
    return results.load(DATA / name)


def renamed(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows whose methods are called m17, m24, ..., which sorts them otherwise, and the names by label."""
    labels = dict.fromkeys(rows.method)
    names = {label: f"m{(7 * number + 17) % 101}" for number, label in enumerate(labels)}
    assert len(set(names.values())) == len(labels)
    return rows.assign(method=rows.method.map(names)), names


def test_there_are_rows_for_every_claim():
    assert len(FILES) >= 25
    for name, claims in CLAIMS.items():
        assert any(claims(committed(file).drop_duplicates("method")) for file in FILES), name


@pytest.mark.parametrize("file", FILES)
def test_labels_are_what_the_fields_give(file):
    rows = committed(file)
    pd.testing.assert_series_equal(results.labels(rows), rows.method, check_names=False)
    assert results.labels(renamed(rows)[0]).equals(results.labels(rows))


@pytest.mark.parametrize("file", FILES)
def test_no_difference_depends_on_what_methods_are_called(file):
    """The same pairs, and the same differences of accuracy and influence loss."""
    rows = committed(file)
    other, names = renamed(rows)
    first = ~rows.method.duplicated()  # one row a method, for speed
    pairs = {what: claims(rows[first]) for what, claims in CLAIMS.items()}
    for what, claims in CLAIMS.items():
        assert claims(other[first]) == [(names[one], names[two]) for one, two in pairs[what]], what
    every = {pair for own in pairs.values() for pair in own}
    compared = rows[rows.metric.isin(["top1", "influence_loss"])]
    groups = {key[0]: group for key, group in compared.groupby(["metric", "network", "artefact", "protocol"])}
    for metric, group in groups.items():  # one of each metric, for speed
        there = set(group.method)
        for one, two in every:
            if {one, two} <= there:
                expected = statistics.paired(group, one, two)
                found = statistics.paired(other.loc[group.index], names[one], names[two])
                assert found.to_dict() == expected.to_dict(), (one, two, metric)


@pytest.mark.parametrize("file", FILES)
def test_no_look_or_table_depends_on_what_methods_are_called(file):
    rows = committed(file)
    rows = rows[rows.artefact == rows.artefact.iloc[0]]
    rows = rows[rows.protocol == rows.protocol.mode().iloc[0]]
    other, names = renamed(rows)
    assert results.looks(other) == {names[label]: look for label, look in results.looks(rows).items()}

    accuracy = tables.top1(rows)
    if accuracy.empty:
        return
    first = rows.network.isin([accuracy.network.iloc[0], ""])
    paper = tables.reported(1, dataset="imagewoof", ipc=10, network="resnetap10")
    beside, beside_other = (tables.beside_paper(some[first], paper) for some in (rows, other))
    assert_frame_equal(beside_other, beside)
    assert set(results.labels(accuracy)) <= set(beside.method)

    below, below_other = (tables.far_below(tables.top1(some[first])) for some in (rows, other))
    assert set(below_other) == {names[label] for label in below}
    apart = first & ~rows.metric.str.startswith("top")
    ranks, ranks_other = (
        tables.rank_correlations(some[first], some[apart]).drop(columns="without", errors="ignore")
        for some in (rows, other)
    )
    assert_frame_equal(ranks_other, ranks)


# --- pairs by hand, of methods that are called otherwise than their labels


INFLUENCE, DEVIATION, BOTH = Guidance(k=30.0, gamma=0.0), Guidance(k=0.0, gamma=480.0), Guidance(30.0, 480.0)
GUIDED = {"": None, " I": INFLUENCE, " D": DEVIATION, " ID": BOTH}
TABLE = {
    "real": Method("random"),
    "patches": Method("rded"),
    "best": Method(cfg_scale=1.5, cfg_choice="best"),
}
TABLE |= {f"a{name}": Method(guidance=guidance) for name, guidance in GUIDED.items()}
TABLE |= {f"b{name}": Method(backbone="minimax", guidance=guidance) for name, guidance in GUIDED.items()}
EARLY = {f"early {k}": Method(guidance=Guidance(k, 0.0), varies=("k",)) for k in (0, 10)}
EARLY |= {
    f"always {k}": Method(guidance=Guidance(k, 0.0, (0, 49)), throughout=True, varies=("k",)) for k in (10, 0)
}
KEPT = {
    "chosen 3": Selection("threshold", (0, 1, 4), 0.7),
    "even 3": Selection("regular", (0, 2, 4)),
    "even 4": Selection("regular", (0, 1, 2, 4)),
    "chosen 2": Selection("threshold", (0, 4), 0.5),
}
SELECTED, SELECTED_B = (
    {
        name: Method(backbone=backbone, guidance=BOTH, selection=selection, varies=("selection",))
        for name, selection in KEPT.items()
    }
    for backbone in ("dit", "minimax")
)
SOLVED = {
    f"{name} {speed}{guide}": Method(
        backbone=backbone,
        guidance=guidance,
        fidelity=Fidelity(solver=solver),
        num_steps=steps,
        varies=("solver",),
    )
    for guide, guidance in (("", None), (" ID", BOTH))
    for speed, solver, steps in (("quick", "dpmsolver++", 20), ("slow", "ddim", 50))
    for name, backbone in (("a", "dit"), ("b", "minimax"))
}
CHANGED = {
    f"{name}{guide} clamped": Method(
        backbone=backbone,
        guidance=guidance,
        fidelity=Fidelity(clamp_images=True),
        change="clamp_images=True",
        varies=("fidelity",),
    )
    for guide, guidance in (("", None), (" ID", BOTH))
    for name, backbone in (("a", "dit"), ("b", "minimax"))
}
SURROGATES = {
    name: Method(guidance=BOTH, surrogate=name, varies=("surrogate",)) for name in ("convnet2", "resnet18")
}


def some(methods: dict[str, Method], *names: str) -> dict[str, Method]:
    return {name: methods[name] for name in names}


CASES: list[tuple[str, dict[str, Method], statistics.Pairs]] = [
    (
        "table",
        TABLE,
        [
            ("a ID", "a"), ("best", "a"), ("a ID", "a D"), ("a ID", "best"), ("a ID", "patches"),
            ("b", "a"), ("b ID", "b"), ("b ID", "a ID"),
            ("patches", "real"), ("a", "real"), ("a ID", "real"),
        ],
    ),
    ("table", some(TABLE, "b ID", "b", "b D"), [("b ID", "b")]),
    ("table", some(TABLE, "a ID", "a D", "a I", "b"), [("a ID", "a D")]),
    ("table", some(TABLE, "real", "patches", "a I", "a"), [("patches", "real"), ("a", "real")]),
    ("table", SOLVED | EARLY | SURROGATES, []),  # what varies is no plain method of a table
    (
        "ablation",
        TABLE,
        [
            ("best", "a"), ("a I", "a"), ("a D", "a"), ("a ID", "a"), ("a ID", "a D"),
            ("b I", "b"), ("b D", "b"), ("b ID", "b"), ("b ID", "b D"),
        ],
    ),
    ("ablation", some(TABLE, "b", "b D", "b ID"), [("b D", "b"), ("b ID", "b"), ("b ID", "b D")]),
    ("ablation", some(TABLE, "best", "a I", "a D", "b ID"), []),
    (
        "early stage",
        some(TABLE, "a") | EARLY,
        [
            ("early 0", "a"), ("early 10", "a"), ("always 10", "a"), ("always 0", "a"),
            ("always 0", "early 0"), ("always 10", "early 10"),
        ],
    ),
    ("early stage", some(EARLY, "always 10", "early 10", "early 0"), [("always 10", "early 10")]),
    (
        "early stage",
        some(TABLE, "a") | some(EARLY, "always 10", "early 0"),
        [("always 10", "a"), ("early 0", "a")],
    ),
    *(
        (
            "selection",
            some(TABLE, plain) | selected,
            [*((name, plain) for name in KEPT), ("chosen 3", "even 3")],
        )
        for plain, selected in (("a", SELECTED), ("b", SELECTED_B))
    ),
    ("selection", SELECTED, [("chosen 3", "even 3")]),
    ("selection", some(TABLE, "real", "a ID") | some(SELECTED, "chosen 2", "even 4"), []),
    (
        "solver",
        SOLVED,
        [
            (f"{name} {one}", f"{name} {two}")
            for name in "ab"
            for one, two in (
                ("slow ID", "slow"), ("quick ID", "quick"), ("quick", "slow"), ("quick ID", "slow ID"),
            )
        ],
    ),
    (
        "solver",
        some(SOLVED, "b slow", "b quick ID", "a slow", "b slow ID"),
        [("b slow ID", "b slow"), ("b quick ID", "b slow ID")],
    ),
    ("solver", TABLE, []),
    (
        "fidelity",
        TABLE | CHANGED,
        [(f"{name} clamped", name) for name in ("a", "b", "a ID", "b ID")],
    ),
    ("fidelity", some(TABLE, "a ID", "best", "b D") | CHANGED, [("a ID clamped", "a ID")]),
    ("influence", TABLE, [("a ID", "a"), ("a ID", "a D")]),
    ("influence", some(TABLE, "b", "b ID", "a", "a ID"), [("a ID", "a")]),
    ("against", some(TABLE, "real", "b", "a", "a ID"), [("real", "a"), ("b", "a"), ("a ID", "a")]),
    ("against", some(TABLE, "real", "b", "best", "a ID"), []),
    ("against, some", TABLE, [("a D", "a"), ("b D", "a")]),
    ("varied", some(TABLE, "real", "a", "a D") | EARLY, [(name, "a") for name in EARLY]),
    ("varied", some(TABLE, "b") | SELECTED_B, [(name, "b") for name in SELECTED_B]),
    ("varied", TABLE, []),
    ("varied", some(TABLE, "real", "a D") | EARLY, []),
    ("varied, guided", some(TABLE, "a", "a D") | SURROGATES, [("convnet2", "a D"), ("resnet18", "a D")]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "methods", "pairs"), CASES)
def test_pairs_by_hand(what, methods, pairs):
    """Those of which both methods are there, in whichever order the rows are."""
    columns = [method.columns() | {"method": name, "protocol": "one"} for name, method in methods.items()]
    rows = pd.DataFrame(columns)
    assert CLAIMS[what](rows) == pairs
    assert sorted(CLAIMS[what](rows[::-1])) == sorted(pairs)


def test_every_claim_has_pairs_by_hand():
    assert {what for what, _, pairs in CASES if pairs} == set(CLAIMS)


def test_the_first_method_with_the_fields_wanted():
    rows = pd.DataFrame([TABLE[name].columns() | {"method": name} for name in ("b D", "a D", "a", "b D")])
    assert statistics.find(rows, guides="deviation") == "b D"
    assert statistics.find(rows, guides="deviation", backbone="dit") == "a D"
    assert statistics.find(rows, family="random") is None


# --- a family of tests


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1; the last is raised to the one before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert statistics.holm([0.03]) == [0.03] and statistics.holm([]) == []


def test_a_missing_p_counts_in_the_family():
    """A test that could not be made was a claim all the same: 0.02 is one of three."""
    found = statistics.holm([float("nan"), 0.02, 0.5])
    assert found[1:] == pytest.approx([0.06, 1.0]) and np.isnan(found[0])


def test_holm_rejects_step_by_step():
    """From its definition: in order of p, as long as p is at most 5 % over the number of tests left."""
    p = [0.001, 0.02, 0.011, 0.2, 0.013, 0.04]
    rejected = set()
    for count, index in enumerate(sorted(range(6), key=lambda one: p[one])):
        if p[index] > 0.05 / (6 - count):
            break
        rejected.add(index)
    assert 0 < len(rejected) < 6
    assert {index for index, value in enumerate(statistics.holm(p)) if value <= 0.05} == rejected


def scored(values: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Rows of methods, called by other names than theirs, under protocols."""
    methods = TABLE | {"near": Method("herding"), "easy": Method("el2n-easiest")}
    return pd.DataFrame(
        [
            methods[name].columns() | dict(method=name, protocol=way, metric="top1", seed=seed, value=one)
            for (name, way), own in values.items()
            for seed, one in enumerate(own)
        ]
    )


def test_the_best_choice_of_real_images_is_named_by_protocol():
    """Random is one, RDED's patches and samples are none; the mean decides."""
    rows = scored(
        {
            ("real", "hard"): [30.0, 31.0], ("near", "hard"): [29.0, 33.0], ("a", "hard"): [50.0, 50.0],
            ("patches", "hard"): [60.0, 60.0], ("easy", "hard"): [30.0, 31.9],
            ("real", "soft"): [40.0, 41.0], ("near", "soft"): [39.0, 40.0], ("easy", "soft"): [40.0, 40.9],
        }
    )  # fmt: skip
    assert statistics.best_coresets(rows) == {"hard": "near", "soft": "real"}
    with pytest.raises(ValueError, match="no row chooses real images; let Random or a coreset be among"):
        statistics.best_coresets(rows[rows.family.isin(["sampled", "rded"])])


def pair(one: str, other: str) -> statistics.Claims:
    return lambda rows: [(one, other)]


def test_the_interval_and_p_of_a_paired_t_test():
    """Differences 1, 2, 3, 6 by hand: mean 3, sd sqrt(14/3), t = 3 / (sd / 2); t(0.975, 3) = 3.1824."""
    rows = scored({("a", "hard"): [31.0, 33.0, 33.0, 36.0], ("real", "hard"): [30.0, 31.0, 30.0, 30.0]})
    (found,) = statistics.differences(rows, pair("a", "real")).to_dict("records")
    half = 3.182446305 * (14 / 3) ** 0.5 / 2
    assert (found["difference"], found["mean"], found["n"]) == ("a - real", 3.0, 4)
    assert found["sd"] == pytest.approx((14 / 3) ** 0.5)
    assert (found["low"], found["high"]) == pytest.approx((3.0 - half, 3.0 + half))
    # The density of t with 3 degrees of freedom, integrated in closed form.
    t = 3.0 / ((14 / 3) ** 0.5 / 2)
    inside = 2 / np.pi * (np.arctan(t / 3**0.5) + t / 3**0.5 / (1 + t * t / 3))
    assert found["p"] == found["p (Holm)"] == pytest.approx(1 - inside)
    assert found["verdict"] == "no clear difference"  # 0.069: the interval reaches below 0, and so it says
    assert found["low"] < 0 < found["high"]


def test_a_gain_alone_may_be_none_in_a_family():
    """p = 0.04 is a gain as a table's only claim, and none beside two that are nothing."""
    alone = {("a", "hard"): [31.0, 32.0, 31.5], ("real", "hard"): [30.0, 30.2, 30.0]}
    beside = {("a I", "hard"): [30.0, 31.0, 29.0], ("a D", "hard"): [31.0, 29.0, 30.0]}
    rows = scored(alone | beside)
    assert statistics.differences(rows, pair("a", "real")).verdict.tolist() == ["gain"]
    found = statistics.differences(rows, lambda _: [(name, "real") for name in ("a", "a I", "a D")])
    assert found.p[0] < 0.05 < found["p (Holm)"][0] == pytest.approx(3 * found.p[0])
    assert found.verdict.tolist() == ["no clear difference"] * 3
    reverse = statistics.differences(rows, pair("real", "a"))
    assert reverse.verdict.tolist() == ["loss"] and reverse.p[0] == pytest.approx(found.p[0])


@pytest.mark.parametrize("values", [[31.0], [30.1, 30.3], [31.0, 31.1, 31.2]])
def test_where_nothing_spreads_nothing_can_be_tested(values):
    """One seed, or 1 at every seed but for rounding: no interval, no p; but it counts in the family."""
    rows = scored({("a", "hard"): values, ("real", "hard"): [one - 1 for one in values]})
    both = statistics.differences(rows, lambda _: [("a", "real"), ("a", "a")])
    found, nothing = both.to_dict("records")
    assert found["mean"] == pytest.approx(1.0) and found["verdict"] == "no clear difference"
    assert np.isnan([found["low"], found["high"], found["p"], found["p (Holm)"]]).all()
    if len(values) > 1:
        assert (nothing["low"], nothing["high"], nothing["p"], nothing["p (Holm)"]) == (0.0, 0.0, 1.0, 1.0)


def test_of_another_metric_a_clear_difference_is_no_gain():
    rows = scored({("a", "hard"): [0.11, 0.10, 0.12], ("a I", "hard"): [0.01, 0.01, 0.01]})
    rows = rows.assign(metric="influence_loss")
    assert statistics.differences(rows, pair("a I", "a")).verdict.tolist() == ["lower"]
    assert statistics.differences(rows, pair("a", "a I")).verdict.tolist() == ["higher"]


def test_claims_in_turn_for_each_value_of_a_column_are_one_family():
    one = scored({("a", "hard"): [31.0, 32.0, 31.5], ("real", "hard"): [30.0, 30.2, 30.0]})
    other = one.assign(network="resnet18", value=one.value.where(one.method != "a", 20.0))
    both = pd.concat([one.assign(network="convnet3"), other])
    found = statistics.differences(both, pair("a", "real"), by=("network",))
    assert found.network.tolist() == ["convnet3", "resnet18"]
    assert found["p (Holm)"].tolist() == pytest.approx([found.p[0], 2 * found.p[1]])
    assert found.verdict.tolist() == ["gain", "loss"]


def test_without_claims_there_is_an_empty_table():
    rows = scored({("a", "hard"): [31.0, 32.0]})
    found = statistics.differences(rows, lambda _: [], by=("protocol",))
    assert found.empty and list(found) == [
        "protocol", "difference", "mean", "low", "high", "sd", "n", "p", "p (Holm)", "verdict"
    ]  # fmt: skip
    assert tables.differences(rows, lambda _: []).empty


# --- against the best choice of real images


def test_methods_against_the_best_choice_are_one_family():
    """Four differences of two protocols: p of a paired t-test, times four, three, two, one."""
    hard = {"real": [30.0, 31.0, 30.0, 31.0], "near": [33.0, 33.0, 34.0, 34.0]}
    hard |= {"a": [38.0, 38.1, 39.0, 39.2], "a ID": [33.0, 35.0, 33.5, 35.5]}
    soft = {"real": [40.0, 41.0, 40.5, 41.0], "near": [37.0, 38.0, 39.0, 38.0]}
    soft |= {"a": [36.0, 36.4, 36.5, 36.2], "a ID": [41.0, 40.0, 41.5, 42.0]}
    ways = {"hard": hard, "soft": soft}
    rows = scored({(name, way): own for way, part in ways.items() for name, own in part.items()})
    claims = statistics.against_coresets({"hard": "near", "soft": "real"})
    found = statistics.differences(rows, claims, by=("protocol",))
    found = found.set_index(["protocol", "difference"])
    assert [name for _, name in found.index] == ["a - near", "a ID - near", "a - real", "a ID - real"]
    for (protocol, name), line in found.iterrows():
        one, other = name.split(" - ")
        own = ways[protocol]
        test = stats.ttest_rel(own[one], own[other])
        assert line.p == pytest.approx(test.pvalue) and line["n"] == 4
        assert line["mean"] == pytest.approx(sum(own[one]) / 4 - sum(own[other]) / 4)
    first, second, third, last = found.p
    assert first < third < second < last < 2 * second
    assert found["p (Holm)"].tolist() == pytest.approx([4 * first, 2 * second, 3 * third, 2 * second])
    assert found.verdict.tolist() == ["gain", "no clear difference", "loss", "no clear difference"]


def test_without_a_second_seed_there_is_no_verdict():
    claims = statistics.against_coresets({"hard": "near"})
    rows = scored({("near", "hard"): [30.0], ("a", "hard"): [40.0]})
    assert tables.differences(rows, claims, by=("protocol",)).to_dict("records") == [
        {
            "protocol": "hard", "difference": "a - near", "mean [95 %]": "+10.0", "n": 1, "p (paired t)": "",
            "p (Holm)": "", "verdict": "no clear difference",
        }
    ]  # fmt: skip
    alike = scored({("near", "hard"): [30.0, 31.0], ("a", "hard"): [30.0, 31.0]})
    found = statistics.differences(alike, claims)
    assert found.p.tolist() == found["p (Holm)"].tolist() == [1.0]
