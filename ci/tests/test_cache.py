"""The commands `igd cache` and Ctrl-C: what is listed, what is removed, and what a user is told."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from igd_lib.__main__ import igd
from igd_lib.tools import cache, files, progress


@pytest.fixture
def pieces(own_cache):
    """Two sets, one of them old, an earlier version's surrogate, RDED's file, weights, and no work."""
    contents = {
        "set/0123456789ab-seed0/manifest.json": 1000,
        "set/0123456789ab-seed0/images/00000/00000.png": 500,
        "set/fedcba987654-seed1/manifest.json": 10,
        "surrogates/abc/x.safetensors": 7,
        "rded/00aa00aa00aa.safetensors": 2_500_000,
        "models/taesd/config.json": 3,
        "results/00-row.json": 9,
        "data/imagenet/train/n01440764/x.jpg": 9,
    }
    for name, count in contents.items():
        files.write(own_cache / name, b"x" * count)
    for path in (own_cache / "set" / "fedcba987654-seed1").rglob("*"):
        os.utime(path, (time.time() - 40 * cache.DAY,) * 2)
    return own_cache


def run(*words, text=None):
    return CliRunner().invoke(igd, ["cache", *words], input=text)


def listed(*words):
    return [(one["kind"], one["key"], one["bytes"]) for one in json.loads(run("--json", *words).stdout)]


OLD, NEW = ("set", "fedcba987654-seed1", 10), ("set", "0123456789ab-seed0", 1500)
OTHERS = [("rded", "00aa00aa00aa.safetensors", 2_500_000), ("surrogates", "abc", 7), ("models", "taesd", 3)]


def test_work_is_listed_by_kind_and_last_use(pieces):
    assert listed() == [OLD, NEW, *OTHERS] and listed("--older-than", "39.5") == [OLD]
    assert listed("--older-than", "41") == []
    shown = run().stdout
    assert "2.5 MB" in shown and "5 pieces of work" in shown and "results" not in shown
    assert listed() == [OLD, NEW, *OTHERS]  # looking is no use


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["set"], OTHERS),
        (["set", "--older-than", "30"], [NEW, *OTHERS]),
        (["0123456789ab"], [OLD, *OTHERS]),
        (["00aa00aa00aa", "--remove", "surrogates"], [OLD, NEW, OTHERS[2]]),
        (["all"], [OTHERS[2]]),  # weights may have been put there by hand
        (["models"], [OLD, NEW, *OTHERS[:2]]),
    ],
)
def test_what_is_named_is_removed(pieces, words, left):
    assert run("--remove", *words, "--yes").exit_code == 0 and listed() == left
    assert (pieces / "results" / "00-row.json").is_file() and (pieces / "data").is_dir()


def test_nothing_is_removed_without_a_yes(pieces):
    assert run("--remove", "all", text="n\n").exit_code == 1 and len(listed()) == 5
    found = run("--remove", "nothing", "--yes")
    assert found.exit_code == 2 and "no such work: 'nothing'" in found.output
    assert run("--remove", "set", text="y\n").exit_code == 0 and listed() == OTHERS


@pytest.mark.parametrize("where", ["", "images/00003"])
def test_work_in_use_is_kept(pieces, where):
    """Whether a run holds its lock, or that of one class of a set."""
    folder = pieces / "set" / "0123456789ab-seed0" / where
    with files.locked(folder, "a run"):
        found = run("--remove", "set", "--yes")
    assert found.exit_code == 1 and "kept: " in found.stderr and "in use by a run" in found.stderr
    assert listed() == [NEW, *OTHERS]


def test_of_a_link_the_link_is_removed(pieces, tmp_path):
    (pieces / "set" / "link").symlink_to(tmp_path)
    (tmp_path / "precious").write_text("x")
    run("--remove", "link", "--yes")
    assert not (pieces / "set" / "link").exists() and (tmp_path / "precious").is_file()


# --- Ctrl-C


@pytest.mark.parametrize("message", ["", "interrupted: 3 of 9 images are in x; run the same again to go on"])
def test_ctrl_c_ends_a_command_with_one_line(monkeypatch, message):
    def stop(*_):
        raise progress.Interrupted(message) if message else KeyboardInterrupt

    monkeypatch.setattr(cache, "work", stop)
    found = run()
    assert found.exit_code == 130 and found.stdout == ""
    assert found.stderr.strip() == (message or "interrupted; run the same command again")


def test_a_notebook_shows_an_interruption_as_one_line():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.append(lines)
    source = "from igd_lib.tools.progress import resumable\n"
    source += "with resumable(lambda: '2 of 3'):\n    raise KeyboardInterrupt"
    found = shell.run_cell(source)
    assert isinstance(found.error_in_exec, KeyboardInterrupt)
    assert shown == [["interrupted: 2 of 3; run the same again to go on from there"]]
