"""One set of pins: the lock, environment.yml and pyproject.toml agree."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import igd_lib
from ci.make_environment import environment

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


LOCKED = pins(line for line in LOCK.splitlines() if line and not line.startswith("#"))


def test_environment_has_the_same_pins():
    written = yaml.safe_load((ROOT / "environment.yml").read_text())
    packages = written["dependencies"][-1]["pip"]
    assert packages[-1] == "-e ."
    assert pins(packages[:-1]) == LOCKED
    assert (ROOT / "environment.yml").read_text() == environment(LOCK), "run python ci/make_environment.py"


def test_torch_is_pinned_where_everything_is():
    assert LOCKED["torch"] == "2.14.1"
    assert LOCKED["torchvision"] == "0.29.1"
    environment_yml = (ROOT / "environment.yml").read_text()
    assert "'torch==2.14.1'" in environment_yml and "'torchvision==0.29.1'" in environment_yml


def test_lock_names_no_place():
    assert not [line for line in LOCK.splitlines() if line.startswith("-") or "://" in line or " @ " in line]


def test_lock_satisfies_every_dependency():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for name in extras for line in extras[name])]
    found = [Requirement(line) for line in wanted if not line.startswith("igd_lib[")]
    for requirement in found:
        if requirement.name != "torch-fidelity":  # for FID, which nothing here computes without its weights
            assert LOCKED[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)
    assert len(found) > 30 and not [one for one in found if "==" in str(one.specifier)]


def test_running_versions_are_the_locked_ones():
    from importlib.metadata import version

    for name in ("torch", "torchvision", "diffusers", "timm", "papermill", "nbval"):
        assert version(name).split("+")[0] == LOCKED[name]


def test_every_folder_of_the_package_is_installed():
    """Only folders with an `__init__.py` are, and of other files only those that are named."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "igd_lib").rglob("*.py")}
    names = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert set(tool["packages"]) == names | {"igd_lib.project"}
    for package, patterns in tool["package-data"].items():
        folder = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        assert all(any(folder.glob(pattern)) for pattern in patterns), package


def test_the_command_leads_to_the_program():
    module, name = PROJECT["scripts"]["igd"].split(":")
    assert callable(getattr(import_module(module), name))


def test_version_is_in_the_changelog():
    assert f"## {igd_lib.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_of_the_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "paper_figures").rglob("*.md")]
    assert len(pages) > 30
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_importing_the_package_is_quick():
    """Public names are loaded when first used: nothing heavy comes with the package itself."""
    heavy = "('torch', 'diffusers', 'pandas')"
    code = f"import igd_lib, sys; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
