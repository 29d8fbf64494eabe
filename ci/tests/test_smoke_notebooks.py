"""The runner of notebooks: which run, with which parameters, in which environment."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ci import fakes, smoke_notebooks


def names(paths):
    return [path.stem for path in paths]


def test_which_notebooks_run():
    every, rehearsed = (names(smoke_notebooks.chosen(scale)) for scale in smoke_notebooks.SCALES)
    assert every[0] == "00_quickstart" and "00_quickstart" not in rehearsed
    assert set(rehearsed) < set(every) and "03_imagenet1k" in rehearsed
    assert names(smoke_notebooks.chosen("rehearsal", ["00", "03", "2"]))[0] == "03_imagenet1k"
    assert smoke_notebooks.main(["--scale", "rehearsal", "--only", "00"]) == 0  # and runs nothing
    assert smoke_notebooks.main(["--only", "99"]) == 1


@pytest.mark.parametrize("scale", smoke_notebooks.SCALES)
def test_the_scale_reaches_the_notebook(scale):
    """Behind the notebook's own parameters, and again before the second pass, which has another IPC."""
    [path] = smoke_notebooks.chosen("smoke", ["01"])
    once, twice = (smoke_notebooks.prepared(path, scale, twice=again) for again in (False, True))
    given = [cell.source for cell in twice.cells if f'scale = "{scale}"' in cell.source]
    assert len(given) == 2 and "ipc = 1" in given[1] and "ipc" not in given[0]
    assert len(twice.cells) == 2 * len(once.cells)
    assert len({cell.id for cell in twice.cells}) == len(twice.cells)


def test_nothing_is_written_outside_the_scratch_folder(tmp_path, monkeypatch):
    """And a rehearsal finds fakes alone: their environment names data, models and both caches of others."""
    monkeypatch.setattr(fakes, "_images", lambda data, extras: None)
    monkeypatch.setattr(fakes, "_models", lambda models, extras, cifar_px: None)
    monkeypatch.setattr(fakes.Path, "write_text", lambda path, text: path.parent.mkdir(parents=True))
    smoke = smoke_notebooks.environment("smoke", tmp_path)
    assert Path(smoke["IGD_CACHE"]).is_relative_to(tmp_path)
    rehearsal = smoke_notebooks.environment("rehearsal", tmp_path)
    for name in ("IGD_DATA", "IGD_CACHE", "HF_HOME", "TORCH_HOME"):
        assert Path(rehearsal[name]).is_relative_to(tmp_path / "fakes")
    assert rehearsal["IGD_ALLOW_CPU"] == rehearsal["HF_HUB_OFFLINE"] == "1"


def test_the_exit_status_is_pytest_s(tmp_path, monkeypatch):
    """Cells run in this Python's kernel, in the given environment, from the scratch folder."""
    seen = {}

    def pytest_run(command, cwd, env, check):
        seen.update(command=command, cwd=cwd, env=env)
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(smoke_notebooks.subprocess, "run", pytest_run)
    assert smoke_notebooks.run(tmp_path, {"IGD_CACHE": "mine"}) == 5
    assert seen["env"]["IGD_CACHE"] == "mine" and seen["env"]["OMP_NUM_THREADS"] == "1"
    assert seen["cwd"] == tmp_path and seen["command"][0] == sys.executable
    assert "--nbval-current-env" in seen["command"] and seen["command"][-1] == str(tmp_path)
