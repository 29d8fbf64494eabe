"""What is said of long work, when it is saved, and what an interruption says."""

from __future__ import annotations

import pytest

from igd_lib.tools import progress
from igd_lib.tools.progress import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by hand: `clock[0]` seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def saves(clock, pace: Pace, steps: list[float], took: float) -> list[float]:
    """When a run saves whose steps end at those seconds."""
    found = []
    for end in steps:
        clock[0] = max(clock[0], end)
        if pace.due:
            found.append(clock[0])
            with pace.saving():
                clock[0] += took
    return found


def test_it_is_saved_once_in_so_many_seconds(clock):
    steps = [float(second) for second in range(7, 400, 7)]
    assert saves(clock, Pace(60.0), steps, took=0.0) == [63, 126, 189, 252, 315, 378]


def test_saving_takes_a_small_part_of_the_time(clock):
    steps = [float(second) for second in range(1000)]
    found = saves(clock, Pace(60.0, times=20.0), steps, took=5.0)
    assert found[0] == 60 and found[1] == 165 and found[2] == 270  # 20 x 5 s after the end of the last


def test_ten_minutes_never_pass_without_a_save(clock):
    """However long a save takes and a pace is asked for; steps of half a minute."""
    for pace in (Pace(60.0, times=20.0), Pace(3600.0)):
        clock[0] = 0.0
        pace.saved = 0.0
        found = saves(clock, pace, [30.0 * step for step in range(200)], took=60.0)
        assert len(found) > 5 and max(b - a for a, b in zip(found, found[1:], strict=False)) <= 600


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (7100, "118 min"), (9000, "2.5 h")]
)
def test_times_are_for_people(seconds, text):
    assert progress.duration(seconds) == text


def test_what_an_earlier_run_has_done_counts(clock, monkeypatch, capsys):
    """The time left is of this run's own pace."""
    for name in ("JPY_SESSION_NAME", "IGD_QUIET"):
        monkeypatch.delenv(name, raising=False)
    for _ in progress.progress(range(90, 100), "epoch", every=20, done=90):
        clock[0] += 15
    assert capsys.readouterr().out.splitlines()[:2] == [
        "epoch 92/100, 30 s, 2 min left",
        "epoch 94/100, 60 s, 90 s left",
    ]


def test_short_work_shows_no_bar(clock, monkeypatch):
    bars = []
    monkeypatch.delenv("IGD_QUIET")
    monkeypatch.setenv("JPY_SESSION_NAME", "lesson.ipynb")
    monkeypatch.setattr("tqdm.notebook.tqdm", lambda items, **options: bars.append(options) or items)
    list(progress.progress(range(3), "epoch", done=2, delay=20.0))
    assert bars == [{"desc": "epoch", "leave": False, "initial": 2, "total": 5, "delay": 20.0}]
