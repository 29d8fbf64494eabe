"""Tidy rows: stored once each, averaged and paired as by hand."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from igd_lib import results
from igd_lib.results import Row, append, comparison, frame, paired, settings_hash, summary

ROW = Row("01", "toy", "DiT", "dit", 10, "convnet3", "convnet3", "small-hard", 0, "top1", 50.0, "small", 1.0, "cpu", "abc")


@pytest.fixture
def rows():
    """DiT-IGD and DiT over three seeds, the second in another order."""
    values = {"DiT-IGD": {0: 71.0, 1: 74.0, 2: 77.0}, "DiT": {2: 70.0, 0: 70.0, 1: 70.0}}
    return frame([replace(ROW, method=method, seed=seed, value=value) for method, found in values.items() for seed, value in found.items()])


def test_summary_by_hand(rows):
    found = summary(rows)
    assert found.method.tolist() == ["DiT-IGD", "DiT"]  # in order of appearance
    assert found["mean"].tolist() == pytest.approx([74.0, 70.0])
    assert found.sd.tolist() == pytest.approx([3.0, 0.0])  # n - 1
    assert found.n.tolist() == [3, 3]


def test_summary_by_more_columns(rows):
    assert len(summary(rows, by=("method", "seed"))) == 6
    assert summary(rows[rows.seed == 0]).sd.isna().all()  # one value has no spread


def test_paired_differences_by_hand(rows):
    """+1, +4, +7: mean 4, sd 3, standard error 3 / sqrt(3); seeds are matched, not positions."""
    assert paired(rows, "DiT-IGD", "DiT").to_dict() == {0: 1.0, 1: 4.0, 2: 7.0}
    (entry,) = comparison(rows, [("DiT-IGD", "DiT")]).to_dict("records")
    assert entry == {"difference": "DiT-IGD - DiT", "mean": 4.0, "sd": 3.0, "n": 3, "standard error": pytest.approx(3**0.5)}


def test_seeds_that_do_not_pair_raise(rows):
    for broken in (
        rows[~((rows.method == "DiT") & (rows.seed == 1))],  # one missing
        pd.concat([rows, rows[rows.seed == 1]]),  # one twice
        rows.assign(seed=rows.seed.where(rows.method != "DiT", rows.seed + 1)),  # others
        rows[rows.method == "DiT"],  # a method missing
    ):
        with pytest.raises(ValueError, match="pairs need the same"):
            paired(broken, "DiT-IGD", "DiT")


def test_a_rerun_replaces_its_row(tmp_path):
    first = append(tmp_path, ROW)
    second = append(tmp_path, replace(ROW, value=51.0, seconds=9.0, device="cuda"))
    assert first == second and json.loads(first.read_text())["value"] == 51.0
    for change in ({"seed": 1}, {"metric": "influence_loss"}, {"settings_hash": "abd"}, {"scale": "smoke"}, {"network": "resnet18"}):
        append(tmp_path, replace(ROW, **change))
    assert len(list(tmp_path.iterdir())) == 6


def test_settings_hash_is_stable_and_sensitive():
    assert settings_hash({"a": 1, "b": [2, 3]}) == settings_hash({"b": (2, 3), "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})
    assert len(settings_hash(results)) == 12


def test_an_empty_frame_has_every_column():
    assert list(frame([]).columns) == list(frame([ROW]).columns)
