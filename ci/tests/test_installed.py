"""The package as people install it: a wheel in an environment of its own, used from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from igd_lib.__main__ import igd
from igd_lib.experiment import notebooks
from igd_lib.tools.version import PROJECT

# --- notebooks of the package


def test_a_notebook_is_found_by_its_name_number_or_file(tmp_path):
    assert notebooks.find("03").stem == notebooks.find("03_imagenet1k.ipynb").stem == "03_imagenet1k"
    own = tmp_path / "mine.ipynb"
    own.write_text("{}")
    assert notebooks.find(str(own)) == own
    for name in ("0", "99", "", "mine"):
        with pytest.raises(ValueError, match="NOTEBOOK is a file, or one of 00_quickstart, 01_"):
            notebooks.find(name)


def test_notebooks_are_copied_and_never_overwritten(tmp_path):
    first = CliRunner().invoke(igd, ["notebooks", str(tmp_path / "igd")])
    copies = sorted((tmp_path / "igd").iterdir())
    assert first.exit_code == 0 and [path.name for path in copies] == sorted(
        path.name for path in (PROJECT / "notebooks").glob("*.ipynb")
    )
    copies[0].write_text("mine")
    copies[1].unlink()
    again = CliRunner().invoke(igd, ["notebooks", str(tmp_path / "igd")]).output.splitlines()
    assert again == [
        f"{copies[0]}: kept, though it differs from the package's; move it away to have that",
        str(copies[1]),
    ]
    assert copies[0].read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "value"),
    [("50", 50), ("1.5", 1.5), ("True", True), ("0:125", "0:125"), ("Random,DiT", "Random,DiT")],
)
def test_parameters_are_read_as_papermill_s_command_reads_them(text, value):
    found = notebooks.typed(text)
    assert found == value and type(found) is type(value)


def test_what_cannot_be_run_is_one_line(tmp_path):
    for arguments, words in (
        (["run", "99"], "NOTEBOOK is a file, or one of"),
        (["run", "02", "-p", "ipcs", "5"], "02_checkpoints has no parameter 'ipcs'; it has scale, "),
        (
            ["run", "02", "--out", str(PROJECT / "notebooks" / "02_checkpoints.ipynb")],
            "is the notebook itself",
        ),
    ):
        result = CliRunner().invoke(igd, arguments)
        assert result.exit_code == 1 and words in result.output and result.output.count("\n") == 1
    failed = CliRunner().invoke(
        igd, ["run", "02", "-p", "scale", "huge", "--out", str(tmp_path / "out.ipynb")]
    )
    assert failed.exit_code == 1 and "02_checkpoints failed, see" in failed.output


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy of what git knows, so that nothing else of this folder gets into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built), str(source)]
    subprocess.run([sys.executable, *command], check=True)
    return next(built.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_what_the_library_reads_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    source = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "igd_lib").rglob("*.py")}
    assert source <= set(names)
    project = {name.removeprefix("igd_lib/project/") for name in names if name.startswith("igd_lib/project/")}
    assert {
        path.relative_to(PROJECT).as_posix() for path in (PROJECT / "notebooks").glob("*.ipynb")
    } <= project
    assert {
        "paper_figures/igd.mplstyle",
        "paper_figures/data/paper_reported.csv",
        "requirements.lock",
    } <= project
    assert not [name for name in project if name.endswith(".py")]
    assert wheel.stat().st_size < 45e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the commands of an environment that has the wheel, and this one's other packages, elsewhere."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    # Others' packages by a path file, without those lines that put a checkout on the path.
    own = Path(next(path for path in sys.path if path.endswith("site-packages")))
    others = folder / "others"
    others.mkdir()
    for path in own.iterdir():
        if not re.match(r"__editable__|igd_lib|_igd", path.name):
            (others / path.name).symlink_to(path)
    (packages / "others.pth").write_text(f"{others}\n")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    python, work = folder / "venv" / "bin" / "python", folder / "work"
    work.mkdir()

    def run(*arguments: str) -> str:
        unwanted = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        done = subprocess.run(
            [str(python), *arguments], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run, work


@pytest.mark.slow
def test_an_installed_package_needs_no_checkout(installed, monkeypatch, tmp_path):
    """doctor, the demo and a notebook from another folder, with no file of the checkout on any path."""
    from igd_lib.tools.machine import data_dir

    run, work = installed
    monkeypatch.setenv("IGD_DATA", str(data_dir()))
    monkeypatch.setenv("IGD_CACHE", str(tmp_path / "cache"))
    code = "import igd_lib, sys; from igd_lib.tools import version; print(igd_lib.__file__, version.PROJECT)"
    where = run("-c", code)
    assert str(PROJECT) not in where and where.split()[1].endswith("igd_lib/project")
    said = run("-m", "igd_lib", "doctor")
    assert "igd_lib" in said and "Traceback" not in said
    said = run("-m", "igd_lib", "demo", "--scale", "smoke")
    assert "Paired differences" in said and (work / "out" / "00_quickstart.ipynb").is_file()
    run("-m", "igd_lib", "run", "03_imagenet1k", "-p", "scale", "smoke", "--out", "third.ipynb")
    text = (work / "third.ipynb").read_text()
    assert "Scale: smoke" in text and str(PROJECT) not in text
