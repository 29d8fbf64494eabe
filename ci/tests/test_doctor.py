"""The command line: what `doctor` finds, what `verify` says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from igd_lib.__main__ import igd
from igd_lib.experiment import doctor

ROOT = Path(__file__).parents[2]


def test_doctor_says_what_is_here(only_fashion):
    told = CliRunner().invoke(igd, ["doctor"])
    assert told.exit_code == 0
    said = told.output
    for expected in (
        "no CUDA GPU",
        "fashion-mnist: found",
        "stand-in fashion-mnist: found",
        "facebook/DiT-XL-2-256",
        "Inception-V3 (FID): ",
    ):
        assert expected in said, expected
    assert re.search(r"\d+ cores .* GiB of memory", said) and re.search(r"IGD_CACHE: .* GiB free", said)
    assert re.search(r"imagenet: .*imagenet", said)


def test_doctor_for_scripts(only_fashion):
    parts = json.loads(CliRunner().invoke(igd, ["doctor", "--json"]).output)
    assert list(parts)[1:] == ["Machine", "Data sets", "Models", 'Notebooks at scale "auto"']
    assert "fashion-mnist: found" in parts["Data sets"]


def test_every_notebook_has_its_line(only_fashion):
    lines = doctor.notebooks()
    assert [line.split(":")[0] for line in lines] == sorted(
        path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")
    )
    assert all(": small (" in line for line in lines)


def test_other_versions_than_the_locked_ones_are_named(monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "timm" else real(name))
    assert any(re.fullmatch(r"timm: 0\.1, locked [0-9.]+", line) for line in doctor.versions())


def test_a_folder_that_cannot_be_written_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert any("NOT WRITABLE" in line for line in doctor.machine())


def test_doctor_speaks_where_a_package_is_missing():
    """In a process of its own, without timm: the rest is reported, and what could not be looked at."""
    code = "import sys; sys.modules['timm'] = None; from igd_lib.__main__ import igd; igd(['doctor'])"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "NOT LOOKED AT, ModuleNotFoundError: " in said and "timm" in said and "Python 3." in said


def test_verify_by_command(tmp_path, tiny_pipe, toy_data):
    from igd_lib.distillation import distill

    options = dict(ipc=1, guidance=None, checkpoints=None, num_steps=2, label_ids=(4, 0, 9))
    found = distill(tiny_pipe, toy_data, out_dir=tmp_path / "set", **options)
    run = CliRunner().invoke
    told = run(igd, ["verify", str(tmp_path / "set")])
    assert told.exit_code == 0 and "complete" in told.output
    told = run(igd, ["verify", str(tmp_path / "set"), "--json"])
    assert json.loads(told.output) == {"folder": str(tmp_path / "set"), "problems": []}
    found.image_path(1, 0).write_bytes(b"x")
    told = run(igd, ["verify", str(tmp_path / "set"), "--repair"])
    assert (
        told.exit_code == 1
        and "class 1, image 0: cannot be read" in told.output
        and not found.image_path(1, 0).exists()
    )
    told = run(igd, ["verify", str(tmp_path)])
    assert told.exit_code == 2 and "no distilled set" in told.stderr
    assert run(igd, ["treat"]).exit_code == 2


def test_a_data_set_is_fetched_by_name(only_fashion, monkeypatch):
    """What is there is said; what cannot be had ends with its reason and 1."""
    told = CliRunner().invoke(igd, ["fetch", "fashion-mnist"])
    assert told.exit_code == 0 and "50,000 training and 10,000 test images are here" in told.output
    told = CliRunner().invoke(igd, ["fetch", "imagenet"])
    assert told.exit_code == 1 and "imagenet" in told.output and "Traceback" not in told.output
    told = CliRunner().invoke(igd, ["fetch", "fashion"])
    assert told.exit_code == 2 and "one of cifar-10" in told.output
