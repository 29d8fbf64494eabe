"""What a lesson's sliders show, and progress by where it is shown."""

from __future__ import annotations

import pandas as pd
import pytest

from igd_lib.experiment import explore
from igd_lib.tools.progress import progress


def test_sliders_cover_what_was_tried_and_show_its_rows():
    settings = explore.Settings(explore.tried("fashion-mnist"))
    rows = pd.read_csv(f"{explore.tried('fashion-mnist')}.csv")
    tried = set(rows.method) - {"DiT"}
    assert {f"k {k:g}, gamma {gamma:g}" for k in settings.ks for gamma in settings.gammas} == tried
    figure = settings.figure(30.0, 480.0)
    own = rows[(rows.method == "k 30, gamma 480") & (rows.metric == "top1")].value
    assert f"k 30, gamma 480: top-1 {own.mean():.1f} ± {own.std():.1f} %" in figure.get_suptitle()
    assert f"n = {len(own)}" in figure.get_suptitle()
    assert [axes.get_ylabel() for axes in figure.axes[::10]] == ["DiT", "k 30, gamma 480"]
    shown = settings.shown["columns"]
    assert not any((shown["DiT"] == images).all() for name, images in shown.items() if name != "DiT")
    with pytest.raises(KeyError):
        settings.figure(31.0, 480.0)


def test_sliders_in_jupyterlab_and_a_picture_elsewhere(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert hasattr(explore.explore("fashion-mnist", 30.0, 480.0), "savefig")
    monkeypatch.setenv("JPY_SESSION_NAME", "lesson.ipynb")
    found = explore.explore("fashion-mnist", 30.0, 480.0)
    k, gamma, picture = found.children
    assert (k.description, k.value, gamma.description, gamma.value) == ("k", 30.0, "gamma", 480.0)
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG")
    k.value = 0.0
    assert bytes(picture.value) != before
    k.value = 30.0
    assert bytes(picture.value) == before


def test_progress_by_where_it_is_shown(monkeypatch, capsys):
    for name in ("JPY_SESSION_NAME", "IGD_QUIET"):
        monkeypatch.delenv(name, raising=False)
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr("igd_lib.tools.progress.time.monotonic", lambda: float(next(now)))
    assert list(progress(range(4), "work")) == [0, 1, 2, 3]
    assert capsys.readouterr().out == "work 2/4, 12 s, 12 s left\n"  # at most a line in ten seconds
    monkeypatch.setenv("JPY_SESSION_NAME", "lesson.ipynb")
    bars = []
    monkeypatch.setattr("tqdm.notebook.tqdm", lambda items, **options: bars.append(options) or items)
    assert list(progress(range(4), "work")) == [0, 1, 2, 3] and bars == [{"desc": "work", "leave": False}]
    assert capsys.readouterr().out == ""
