"""What a fork needs: workflows, containers and issue templates that fit the project as it is."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

import pytest
import yaml

from igd_lib.tools.version import PROJECT

FILES = sorted([*(PROJECT / ".github").rglob("*.yml"), PROJECT / ".pre-commit-config.yaml"])
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))


def commands(node) -> list[str]:
    """Every `run` and `entry` in a file."""
    if isinstance(node, dict):
        own = [value for key, value in node.items() if key in ("run", "entry") and isinstance(value, str)]
        return own + [line for value in node.values() for line in commands(value)]
    return [line for value in node for line in commands(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_make_targets_and_scripts_are_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(yaml.safe_load(path.read_text())):
        for target in re.findall(r"\bmake ([a-z-]+)", line):
            assert target in targets, line
        for script in re.findall(r"\b(?:ci|docs)/\w+\.(?:py|sh)", line):
            assert (PROJECT / script).is_file(), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_take_no_rights_that_they_do_not_need(path):
    flow = yaml.safe_load(path.read_text())
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        rights = job.get("permissions", {})
        assert not rights or name == "publish", name
        assert "${{ github.event" not in json.dumps(job), "an event's text is no part of a command"


def test_the_pythons_are_those_of_the_package():
    flow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"]
    setup = (PROJECT / "ci" / "setup.sh").read_text()
    first, last = re.search(r"\((3), (\d+)\) <= sys.version_info < \(3, (\d+)\)", setup).groups()[1:]
    versions = flow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == [f"3.{minor}" for minor in range(int(first), int(last))] and wanted == f">=3.{first}"
    assert re.search(r"FROM python:3\.(\d+)-", (PROJECT / "Dockerfile").read_text())[1] in ("11", "12", "13")


def test_the_list_of_notebooks_is_made_by_the_workflow_s_own_line():
    flow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    line = flow["jobs"]["names"]["steps"][-1]["run"].replace('>> "$GITHUB_OUTPUT"', "")
    said = subprocess.run(
        ["bash", "-c", line], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    names = json.loads(said.removeprefix("notebooks="))
    assert names == sorted(path.stem for path in (PROJECT / "notebooks").glob("[0-9]*.ipynb"))


def test_reports_ask_for_the_doctor():
    for name in ("problem", "numbers"):
        form = yaml.safe_load((PROJECT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        doctor = next(one for one in form["body"] if one["id"] == "doctor")
        assert doctor["validations"] == {"required": True} and "igd doctor" in json.dumps(doctor)


def test_no_address_is_invented():
    """Colab and Binder have buttons where the repository is named, which it is not here."""
    urls = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"].get("urls", {})
    texts = [path.read_text() for path in (*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"))]
    assert urls or not [text for text in texts if "colab.research" in text or "mybinder" in text]


def test_the_container_s_file_runs_as_nobody_special():
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") < lines.index("RUN make setup")
    json.loads((PROJECT / ".devcontainer" / "devcontainer.json").read_text())
