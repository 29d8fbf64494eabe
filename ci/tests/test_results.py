"""Rows: stored once each, averaged and paired as by hand, never over different settings; the paper's too."""

import json
import math
import os
import random
import shutil
import subprocess
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest

from igd_lib.analysis import results
from igd_lib.analysis.results import Row, append, compare, consolidate, frame, load, markdown, read, summary
from igd_lib.analysis.statistics import differences, paired
from igd_lib.tools import version
from igd_lib.tools.keys import settings_hash
from igd_lib.tools.version import VERSION

ROW = Row(
    artefact="01", dataset="toy", ipc=10,
    method="DiT", kind="DiT", family="sampled", backbone="dit", guides="", cfg=4.0, cfg_choice="", k=0.0,
    gamma=0.0, guided_range="", throughout=0, solver="ddpm", steps=20, selection="", kept=0,
    surrogate="convnet3", shortcuts="", change="", varies="",
    network="convnet3", protocol="small-hard", seed=0, metric="top1", value=50.0, scale="small", seconds=1.0,
    device="cpu", git_revision="c0ffee", settings_hash="abc",
)  # fmt: skip
SHARED = {  # another value of every column that rows of two methods must share to be paired
    "artefact": "02", "dataset": "other", "ipc": 50, "network": "resnet18", "protocol": "igd-hard",
    "metric": "influence_loss", "scale": "paper", "settings_hash": "abd",
}  # fmt: skip
OWN = {  # and of those that make the method
    "kind": "DiT-IGD", "family": "random", "backbone": "minimax", "guides": "influence", "cfg": 1.5,
    "cfg_choice": "best", "k": 30.0, "gamma": 480.0, "guided_range": "30-45", "throughout": 1,
    "solver": "ddim", "steps": 50, "selection": "regular", "kept": 3, "surrogate": "resnet18",
    "shortcuts": "tiny decoder", "change": "vae=x", "varies": "k",
}  # fmt: skip
OTHER = SHARED | OWN  # neither are merged


@pytest.fixture
def rows():
    """DiT-IGD and DiT over three seeds, the second in another order."""
    values = {"DiT-IGD": {0: 71.0, 1: 74.0, 2: 77.0}, "DiT": {2: 70.0, 0: 70.0, 1: 70.0}}
    return frame(
        [
            replace(ROW, method=method, seed=seed, value=value)
            for method, found in values.items()
            for seed, value in found.items()
        ]
    )


# --- means and paired differences


def test_every_setting_has_another_value_here():
    """Columns that are added must be tried too: all but the label, the seed and what was measured."""
    measured = {"seed", "value", "seconds", "device", "git_revision"}
    assert {field.name for field in fields(Row)} - measured - {"method"} == set(OTHER)


def test_summary_by_hand(rows):
    found = summary(rows)
    assert found.method.tolist() == ["DiT-IGD", "DiT"]  # in order of appearance
    assert found["mean"].tolist() == pytest.approx([74.0, 70.0])
    assert found.sd.tolist() == pytest.approx([3.0, 0.0])  # n - 1
    assert found.n.tolist() == [3, 3]


def test_summary_by_more_columns(rows):
    assert len(summary(rows, by=("method", "seed"))) == 6
    assert summary(rows[rows.seed == 0]).sd.isna().all()  # one value has no spread


@pytest.mark.parametrize("column", OTHER)
def test_summary_does_not_merge_settings(rows, column):
    mixed = pd.concat([rows, frame([replace(ROW, seed=3, **{column: OTHER[column]})])], ignore_index=True)
    values = f"{getattr(ROW, column)!r}, {OTHER[column]!r}"
    with pytest.raises(ValueError, match=rf"^DiT has rows of more than one {column} {values}: "):
        summary(mixed)
    assert summary(mixed, by=("method", column)).n.tolist() == [3, 3, 1]  # told apart they are welcome


def test_summary_names_every_mixed_column_and_methods_too(rows):
    with pytest.raises(ValueError, match="more than one ipc 10, 50; network 'convnet3', 'resnet18'"):
        summary(pd.concat([rows, frame([replace(ROW, seed=3, ipc=50, network="resnet18")])]))
    with pytest.raises(ValueError, match="method 'DiT-IGD', 'DiT'"):
        summary(rows, by=("network",))


def test_runs_of_other_machines_and_revisions_are_the_same_measurement(rows):
    rows.loc[0, ["device", "git_revision", "seconds"]] = ["cuda", "beef00+", 9.0]
    assert summary(rows).n.tolist() == [3, 3] and len(paired(rows, "DiT-IGD", "DiT")) == 3


def test_summary_keeps_groups_with_a_missing_name(rows):
    """pandas reads "" as NaN and by default leaves such groups out."""
    assert summary(rows.assign(network=float("nan")), by=("method", "network")).n.tolist() == [3, 3]
    with pytest.raises(ValueError, match="more than one network nan, 'convnet3'"):
        summary(rows.assign(network=rows.network.where(rows.seed > 0)))


def test_summary_refuses_repeated_seeds_and_values_that_are_not_finite(rows):
    with pytest.raises(ValueError, match=r"DiT-IGD has a seed twice: \[1\]"):
        summary(pd.concat([rows, rows[rows.seed == 1]]))
    for value in (math.nan, math.inf):  # pandas would leave a NaN out of mean and n
        broken = rows.assign(value=rows.value.where(rows.seed != 1, value))
        with pytest.raises(ValueError, match="not finite"):
            summary(broken)
        with pytest.raises(ValueError, match="not finite"):
            paired(broken, "DiT-IGD", "DiT")


def test_paired_differences_by_hand(rows):
    """+1, +4, +7: mean 4, sd 3, standard error 3 / sqrt(3); seeds are matched, not positions."""
    assert paired(rows, "DiT-IGD", "DiT").to_dict() == {0: 1.0, 1: 4.0, 2: 7.0}
    (entry,) = differences(rows, lambda _: [("DiT-IGD", "DiT")]).to_dict("records")
    assert (entry["difference"], entry["mean"], entry["sd"], entry["n"]) == ("DiT-IGD - DiT", 4.0, 3.0, 3)
    assert entry["high"] - entry["mean"] == pytest.approx(4.30265 * 3**0.5, rel=1e-5)  # t(0.975, 2)


def test_seeds_that_do_not_pair_raise(rows):
    for broken in (
        rows[~((rows.method == "DiT") & (rows.seed == 1))],  # one missing
        pd.concat([rows, rows[rows.seed == 1]]),  # one twice
        rows.assign(seed=rows.seed.where(rows.method != "DiT", rows.seed + 1)),  # others
        rows[rows.method == "DiT"],  # a method missing
    ):
        with pytest.raises(ValueError, match="pairs need the same"):
            paired(broken, "DiT-IGD", "DiT")


@pytest.mark.parametrize("column", OTHER)
def test_pairs_share_their_settings(rows, column):
    """One side with two settings never pairs; the sides may differ in what makes the method alone."""
    within = rows.copy()
    within.loc[0, column] = OTHER[column]
    with pytest.raises(ValueError, match=f"^DiT-IGD has rows of more than one {column}"):
        paired(within, "DiT-IGD", "DiT")
    across = rows.copy()
    across.loc[across.method == "DiT", column] = OTHER[column]
    if column in OWN:
        assert paired(across, "DiT-IGD", "DiT").to_dict() == {0: 1.0, 1: 4.0, 2: 7.0}
    else:
        with pytest.raises(ValueError, match=f"^DiT-IGD - DiT has rows of more than one {column}"):
            paired(across, "DiT-IGD", "DiT")


def test_other_methods_do_not_disturb_a_pair(rows):
    more = pd.concat([rows, frame([replace(ROW, method="Random", ipc=50, value=math.nan)])])
    assert paired(more, "DiT-IGD", "DiT").mean() == 4.0


# --- rows on disk


def test_columns_of_a_row_are_fixed():
    assert ",".join(field.name for field in fields(Row)) == (
        "artefact,dataset,ipc,"
        "method,kind,family,backbone,guides,cfg,cfg_choice,k,gamma,guided_range,throughout,solver,steps,"
        "selection,kept,surrogate,shortcuts,change,varies,"
        "network,protocol,seed,metric,value,scale,seconds,device,git_revision,settings_hash"
    )


def test_a_rerun_replaces_its_row(tmp_path):
    first = append(tmp_path, ROW)
    second = append(tmp_path, replace(ROW, value=51.0, seconds=9.0, device="cuda", git_revision="beef00"))
    assert first == second and json.loads(first.read_text())["value"] == 51.0
    for change in ({"seed": 1}, {"method": "DiT-IGD"}, *({column: value} for column, value in OTHER.items())):
        append(tmp_path, replace(ROW, **change))
    assert len(list(tmp_path.iterdir())) == 3 + len(OTHER)


def test_settings_hash_is_stable_and_sensitive():
    assert settings_hash({"a": 1, "b": [2, 3]}) == settings_hash({"b": (2, 3), "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})
    assert len(settings_hash(results)) == 12


def test_an_empty_frame_has_every_column_and_its_type():
    assert frame([]).dtypes.equals(frame([ROW]).dtypes)
    assert pd.concat([frame([]), frame([ROW])]).dtypes.equals(frame([ROW]).dtypes)


def test_read_is_what_was_appended(tmp_path):
    row = replace(ROW, network="", settings_hash="123e45")
    written = [replace(row, seed=seed, value=seed / 3) for seed in range(4)]
    for row in written:
        append(tmp_path, row)
    (tmp_path / ".unfinished.tmp").write_text("{")
    pd.testing.assert_frame_equal(read(tmp_path).sort_values("seed", ignore_index=True), frame(written))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_read_names_a_file_that_is_no_row(tmp_path):
    good = append(tmp_path, ROW)
    content = asdict(ROW)
    lacking = {name: value for name, value in content.items() if name != "git_revision"}
    for broken, message in (
        (good.read_text()[:50], "Unterminated|Expecting"),
        (b"\xff\xfe\xff", "codec|decode"),
        ("[1, 2]", "not list"),
        (json.dumps(lacking), "missing: git_revision; unknown: none"),
        (json.dumps(content | {"note": "x"}), "missing: none; unknown: note"),
        (json.dumps(content | {"ipc": "10"}), "ipc is int, got '10'"),
        (json.dumps(content | {"seed": True}), "seed is int, got True"),
        (json.dumps(content | {"value": None}), "value is float, got None"),
        (json.dumps(content | {"settings_hash": 12}), "settings_hash is str, got 12"),
    ):
        path = tmp_path / "b.json"
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        with pytest.raises(ValueError, match=rf"b\.json is no result row.*({message})"):
            read(tmp_path)
        path.unlink()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is no result row"):
        read(tmp_path)


AWKWARD = [
    replace(ROW, settings_hash="123e45", value=0.1 + 0.2, seconds=1e-300),
    replace(ROW, method="NA", network="", settings_hash="000123", value=-0.0),
    replace(ROW, method='a, "b"\r\nc', device="cpu, bfloat16", value=1 / 3, git_revision="1e5"),
    replace(ROW, method="γ = 480", seed=2, value=5e-324, settings_hash="None"),
    replace(ROW, method="γ = 480", seed=10, value=2.0**53 + 2, settings_hash="None"),
]


def test_consolidated_rows_come_back_exactly(tmp_path):
    path = consolidate(frame(AWKWARD), tmp_path / "a.csv")
    found = load(path)
    key = ["method", "seed"]
    pd.testing.assert_frame_equal(
        found.sort_values(key, ignore_index=True),
        frame(AWKWARD).sort_values(key, ignore_index=True),
        check_exact=True,
    )
    assert found.ipc.dtype == found.seed.dtype == "int64"
    assert found.value.dtype == found.seconds.dtype == "float64"
    texts = found[["network", "settings_hash", "git_revision"]].to_numpy().ravel()
    assert {type(value) for value in texts} == {str}
    assert consolidate(found, tmp_path / "b.csv").read_bytes() == path.read_bytes()


def test_consolidated_bytes_do_not_depend_on_order_or_source(tmp_path):
    rows = [
        replace(ROW, method=method, ipc=ipc, seed=seed, value=-seed / 7)
        for method in "BA"
        for ipc in (50, 10)
        for seed in (10, 2, 1)
    ]
    for row in rows:
        append(tmp_path / "rows", row)
    expected = consolidate(tmp_path / "rows", tmp_path / "a.csv").read_bytes()
    random.Random(0).shuffle(rows)
    assert consolidate(frame(rows), tmp_path / "b.csv").read_bytes() == expected
    lines = expected.decode().split("\n")
    assert lines[-1] == "" and b"\r" not in expected and len(lines) == 14
    assert lines[0] == ",".join(field.name for field in fields(Row))
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:-1]]
    assert [(entry["ipc"], entry["method"], entry["seed"]) for entry in table] == [  # numbers as numbers
        (ipc, method, seed) for ipc in ("10", "50") for method in "AB" for seed in ("1", "2", "10")
    ]
    assert table[0]["value"] == repr(-1 / 7)


def test_the_same_measurement_with_the_same_value_is_one(tmp_path):
    again = replace(ROW, seconds=0.5, device="cuda", git_revision="beef00")
    first, second = (
        consolidate(frame(rows), tmp_path / f"{len(rows)}.csv")
        for rows in ([ROW, again], [again, ROW, again])
    )
    assert first.read_bytes() == second.read_bytes() and load(first).seconds.tolist() == [0.5]


REFUSED = {
    "smoke": ([replace(ROW, seed=1, scale="smoke")], "scale smoke are no results"),
    "unknown scale": ([replace(ROW, seed=1, scale="Paper")], "scale Paper are no results"),
    "nan": ([replace(ROW, seed=1, value=math.nan)], "value that is not finite"),
    "infinite time": ([replace(ROW, seed=1, seconds=math.inf)], "seconds that is not finite"),
    "two values": ([replace(ROW, value=51.0)], r"values \[50\.0, 51\.0\].*'method': 'DiT'.*'seed': 0"),
    "two settings": (
        [replace(ROW, seed=1, settings_hash="abd")],
        "'method': 'DiT'.*'metric': 'top1'.* abc, abd",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_consolidate_and_load_refuse(case, tmp_path):
    more, message = REFUSED[case]
    rows = frame([ROW, *more])
    with pytest.raises(ValueError, match=message):
        consolidate(rows, tmp_path / "a.csv")
    for row in (ROW, *more):
        append(tmp_path / "rows", row)
    if case != "two values":  # which a folder cannot hold
        with pytest.raises(ValueError, match=message):
            consolidate(tmp_path / "rows", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    rows.to_csv(tmp_path / "by hand.csv", index=False)
    with pytest.raises(ValueError, match="by hand.csv: "):
        load(tmp_path / "by hand.csv")


def test_different_settings_of_different_groups_are_no_mixture(tmp_path):
    for column in ("method", *OTHER):
        if column != "settings_hash":
            value = OTHER.get(column, "DiT-IGD")
            rows = frame([ROW, replace(ROW, settings_hash="abd", **{column: value})])
            assert len(load(consolidate(rows, tmp_path / "a.csv"))) == 2


def test_consolidate_refuses_frames_that_pandas_guessed(tmp_path, rows):
    """pandas makes 1 of "01" and infinity of "123e45"."""
    written = [replace(ROW, settings_hash="123e45"), replace(ROW, network="", settings_hash="1e2")]
    consolidate(frame(written), tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"artefact is str, got 1; .*results\.load"):
        consolidate(pd.read_csv(tmp_path / "a.csv"), tmp_path / "b.csv")
    with pytest.raises(ValueError, match="missing: device"):
        consolidate(rows.drop(columns="device"), tmp_path / "b.csv")
    with pytest.raises(ValueError, match="unknown: note"):
        consolidate(rows.assign(note=""), tmp_path / "b.csv")
    with pytest.raises(ValueError, match="no rows"):
        consolidate(rows[:0], tmp_path / "b.csv")


def test_load_names_a_damaged_file(tmp_path):
    text = consolidate(frame([ROW, replace(ROW, seed=1)]), tmp_path / "a.csv").read_text()
    path = tmp_path / "b.csv"
    for broken, message in (
        ("", "missing: artefact, dataset"),
        (text.split("\n")[0] + "\n", "no rows"),
        (text[:-20], "row 2 has 28 fields, the header 32"),
        (text.replace("c0ffee,abc", "c0ffee,abc,more"), "row 1 has 33 fields"),
        (text.replace("50.0", "fifty"), "fifty"),
        (text.replace("git_revision", "revision"), "missing: git_revision; unknown: revision"),
        (
            text.replace("\n", ",x\n").replace("settings_hash,x", "settings_hash,method"),
            "each is needed once",
        ),
        (text.replace(",10,", ",10.5,"), "10.5"),
        (text + '"', "unexpected end"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=f"b\\.csv.*{message}"):
            load(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rows_that_an_office_program_saved_are_read(tmp_path, encoding):
    path = consolidate(frame([replace(ROW, network="résumé")]), tmp_path / "a.csv")
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert load(path).network.tolist() == ["résumé"]
    path.write_bytes(path.read_bytes().decode(encoding).encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv, line 2 is not utf-8 .*save the file as UTF-8"):
        load(path)


# --- the code's revision


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_of_a_checkout(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # in a git hook they would point at the real repository

    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "igd_lib"
    package.mkdir()
    (package / "__init__.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    expected = f"igd_lib {VERSION}"
    assert version._revision(package) == expected  # no checkout
    git("init", "-q")
    git("add", "README.md")
    git("commit", "-q", "-m", "a")
    assert version._revision(package) == expected  # somebody else's checkout around an installed package
    git("add", ".")
    git("commit", "-q", "-m", "b")
    clean = version._revision(package)
    assert len(clean) == 12 and git("rev-parse", "HEAD").startswith(clean)
    (tmp_path / "README.md").write_text("2")
    (package / "notes.txt").write_text("not tracked")
    assert version._revision(package) == clean  # neither is the package's code
    (package / "__init__.py").write_text("2")
    assert version._revision(package) == clean + "+"
    git("add", "igd_lib/__init__.py")
    assert version._revision(package) == clean + "+"  # staged is not committed
    git("commit", "-q", "-m", "c")
    assert version._revision(package) not in (clean, clean + "+")


def test_revision_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version._revision(tmp_path) == f"igd_lib {VERSION}"


# --- the paper's figures beside ours


def reported(*cells, **columns):
    """The paper's rows, cells (method, value, sd)."""
    rows = [{"method": method, "value": value, "sd": sd} for method, value, sd in cells]
    shared = dict(table=1, dataset="toy", backbone=np.nan, surrogate=np.nan, network="convnet3", ipc=10)
    return pd.DataFrame(rows).assign(**shared | {"metric": "top1"} | columns)


def measured(scale="paper", **methods):
    return frame(
        [
            replace(ROW, scale=scale, method=name, seed=seed, value=value)
            for name, values in methods.items()
            for seed, value in enumerate(values)
        ]
    )


def test_compare_by_hand():
    """A: 50, 52, 54 has mean 52, sd 2; with the paper's sd 1 pooled sqrt(5 / 2) = 1.581, twice that 3.162."""
    ours = measured(A=[50.0, 52.0, 54.0], B=[50.0, 52.0, 54.0], D=[1.0])
    found = compare(ours, reported(("C", 9.0, 0.5), ("B", 48.8, 1.0), ("A", 48.9, 1.0))).set_index("method")
    assert found.index.tolist() == ["C", "B", "A", "D"]  # the paper's order, then what only we have
    measures = ["paper_mean", "paper_sd", "ours_mean", "ours_sd", "n"]
    assert found.columns.tolist() == ["ipc", "network", *measures, "difference", "within", "comparable"]
    assert found.loc["A", measures].tolist() == [48.9, 1.0, 52.0, 2.0, 3]
    assert found.difference[["A", "B"]].tolist() == pytest.approx([3.1, 3.2])
    assert found.within.tolist() == [pd.NA, False, True, pd.NA]
    assert found.comparable.tolist() == [False, True, True, False]  # one side alone compares with nothing
    assert found.loc["C", ["ours_mean", "ours_sd", "n", "difference"]].isna().all()
    assert found.loc["C", "paper_mean"] == 9.0
    assert found.loc["D", ["paper_mean", "paper_sd", "difference"]].isna().all() and found.loc["D", "n"] == 1


@pytest.mark.parametrize(
    ("values", "sd", "difference", "expected"),
    [
        ([50.0, 54.0], math.nan, 5.6, True),  # ours alone: sd 2.828, two of them 5.657
        ([50.0, 54.0], math.nan, 5.7, False),
        ([52.0], 1.5, 3.0, True),  # the paper's alone, at its edge
        ([52.0], 1.5, 3.1, False),
        ([52.0], 1.5, -3.1, False),  # on either side
        ([52.0], math.nan, 0.0, pd.NA),  # neither
        ([52.0, 52.0], 0.0, 0.0, True),
        ([52.0, 52.0], 0.0, 0.1, False),
        ([52.1], 0.05, 0.1, True),  # 52.1 - 52.0 is not 0.1 in binary
    ],
)
def test_within_two_pooled_sds_where_an_sd_is_missing(values, sd, difference, expected):
    found = compare(measured(A=values), reported(("A", sum(values) / len(values) - difference, sd)))
    assert found.within.tolist() == [expected]


def test_only_the_papers_scale_data_and_metric_compare():
    ours = measured(A=[50.0, 52.0])
    assert compare(ours, reported(("A", 50.0, 1.0))).comparable.tolist() == [True]
    for scale in ("small", "smoke"):
        found = compare(measured(scale, A=[50.0, 52.0]), reported(("A", 50.0, 1.0)))
        assert found.comparable.tolist() == [False] and found.difference.tolist() == [1.0]
    unknown = reported(("A", math.nan, math.nan))  # a cell that is not known
    assert compare(ours, unknown).comparable.tolist() == [False]
    for column, value in {"dataset": "imagenet", "metric": "top5", "network": "resnet18", "ipc": 50}.items():
        other = reported(("A", 50.0, 1.0), **{column: value})
        assert compare(ours, other, by=("method",)).comparable.tolist() == [False]
    # What tables are told apart by never meets at all.
    assert len(compare(ours, reported(("A", 50.0, 1.0), dataset="imagenet"), by=("method", "dataset"))) == 2


def test_compare_matches_empty_names_as_pandas_reads_them(tmp_path):
    reported(("A", 50.0, 1.0)).to_csv(tmp_path / "paper.csv", index=False)
    ours = measured(A=[50.0, 52.0]).assign(surrogate="")
    found = compare(ours, pd.read_csv(tmp_path / "paper.csv"), by=("method", "surrogate"))
    assert found.difference.tolist() == [1.0]


@pytest.mark.parametrize(
    "options", [{}, {"keep_default_na": False, "na_values": {"value": [""], "sd": [""]}}]
)
def test_compare_beside_rows_of_the_full_data_set(tmp_path, options):
    """The paper's row without ipc makes pandas read the whole column as floats or as text."""
    whole = pd.concat([reported(("A", 50.0, 1.0)), reported(("A", 95.0, math.nan), ipc="")])
    whole.to_csv(tmp_path / "paper.csv", index=False)
    paper = pd.read_csv(tmp_path / "paper.csv", **options)
    found = compare(measured(A=[50.0, 52.0]), paper)
    assert found.ipc.tolist() == [10, pd.NA] and found.comparable.tolist() == [True, False]
    assert markdown(found, 1).splitlines()[2].startswith("| A | 10 | convnet3 | 50.0 |")
    assert compare(measured(A=[50.0, 52.0]), paper[:1], by=("method",)).comparable.tolist() == [True]
    assert compare(measured(A=[50.0, 52.0]), paper[1:], by=("method",)).comparable.tolist() == [False]


def test_compare_without_a_row_of_ours():
    found = compare(frame([]), reported(("A", 50.0, 1.0)))
    assert found.paper_mean.tolist() == [50.0] and found.within.isna().all()
    assert found.comparable.tolist() == [False]


def test_compare_refuses_ambiguous_cells_and_missing_columns():
    ours, paper = measured(A=[50.0, 52.0]), reported(("A", 50.0, 1.0))
    with pytest.raises(ValueError, match="'method': 'A'.* more than once"):
        compare(ours, pd.concat([paper, paper.assign(table=2)]))
    other = frame([replace(ROW, method="A", seed=9, scale="paper", dataset="other")])
    with pytest.raises(ValueError, match="A, 10, convnet3 has rows of more than one dataset"):
        compare(pd.concat([ours, other]), paper)
    with pytest.raises(ValueError, match="the paper's rows lack columns: sd"):
        compare(ours, paper.drop(columns="sd"))
    with pytest.raises(ValueError, match="our rows lack columns: table"):
        compare(ours, paper, by=("method", "table"))


# --- Markdown


def test_markdown_by_hand():
    table = pd.DataFrame(
        {
            "Method": ["a|b", "DiT\nlong", ""],
            "mean": [71.25, -0.04, np.nan],
            "loss": np.array([0.123456, 2.0, 0.5], dtype=np.float32),
            "n": pd.array([5, pd.NA, 10], dtype="Int64"),
            "within": pd.array([True, pd.NA, False], dtype="boolean"),
        }
    )
    assert markdown(table, {"mean": 1, "loss": 4}) == (
        "| Method | mean | loss | n | within |\n"
        "| --- | ---: | ---: | ---: | --- |\n"
        "| a\\|b | 71.2 | 0.1235 | 5 | yes |\n"
        "| DiT long | 0.0 | 2.0000 |  |  |\n"
        "|  |  | 0.5000 | 10 | no |\n"
    )
    assert markdown(table[["mean"]], 2) == "| mean |\n| ---: |\n| 71.25 |\n| -0.04 |\n|  |\n"


def test_markdown_shows_a_comparison():
    table = compare(measured(A=[50.0, 52.0]), reported(("A", 50.0, math.nan), ("B", 40.0, 0.5)))
    assert markdown(table, 1).splitlines()[2:] == [
        "| A | 10 | convnet3 | 50.0 |  | 51.0 | 1.4 | 2 | 1.0 | yes | yes |",
        "| B | 10 | convnet3 | 40.0 | 0.5 |  |  |  |  |  | no |",
    ]


def test_markdown_wants_digits_for_every_float():
    table = pd.DataFrame({"mean": [1.5], "n": [3], "mixed": ["x"]})
    with pytest.raises(ValueError, match="'mean' holds floats"):
        markdown(table, {})
    with pytest.raises(ValueError, match=r"digits for \['sd'\]"):
        markdown(table, {"mean": 1, "sd": 1})
    assert "mixed" in markdown(table, {"mean": 1})
