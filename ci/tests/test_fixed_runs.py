"""Small runs give the results that they gave when their schema number was set."""

from __future__ import annotations

import json

import pytest
import torch

import fixed_runs
from igd_lib.tools.keys import SCHEMA

RECORDED = json.loads(fixed_runs.RECORDED.read_text())
TOLERANCE = 0.01  # rounding differs by machine; what is told apart differs by 0.06 and more


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        return fixed_runs.models()


def differing(made, name: str) -> bool:
    """Whether a run's result is not the recorded one."""
    with torch.random.fork_rng():
        found = fixed_runs.summary(fixed_runs.runs()[name](made).detach().cpu())
    return max(abs(a - b) for a, b in zip(found, RECORDED["runs"][name], strict=True)) > TOLERANCE


def test_every_run_is_recorded():
    again = "run python ci/tests/fixed_runs.py values"
    assert set(RECORDED["runs"]) == set(fixed_runs.runs()), again
    assert all(SCHEMA[kind] == number for kind, number in RECORDED["schema"].items()), again


@pytest.mark.parametrize("kind", sorted(RECORDED["schema"]))
def test_results_belong_to_their_schema_number(made, kind):
    own = [name for name in RECORDED["runs"] if fixed_runs.kind_of(name) == kind]
    other = [name for name in own if differing(made, name)]
    assert not other, f"{other} changed: raise SCHEMA[{kind!r}], and run python ci/tests/fixed_runs.py values"


def test_a_changed_result_under_the_same_number_is_seen(made, monkeypatch):
    name = "sample: both"
    monkeypatch.setitem(fixed_runs.SAMPLES, "both", {"guidance": fixed_runs.GUIDED, "every": 2})
    assert differing(made, name)
