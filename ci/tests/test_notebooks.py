"""Notebooks are stripped sources: one parameters cell, no logic, the kernel python3."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from ci.strip_notebooks import stripped
from igd_lib.experiment import parameters

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    return request.param, json.loads(request.param.read_text())


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_stripped(notebook):
    path, _ = notebook
    assert path.read_text() == stripped(path.read_text()), "run python ci/strip_notebooks.py"


def test_valid_with_unique_cell_ids(notebook):
    nbformat.validate(notebook[1])
    ids = [cell.get("id") for cell in notebook[1]["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)


def test_kernel(notebook):
    assert notebook[1]["metadata"]["kernelspec"]["name"] == "python3"


def test_one_parameters_cell_first(notebook):
    tags = [cell["metadata"].get("tags", []) for cell in code_cells(notebook[1])]
    assert [index for index, own in enumerate(tags) if "parameters" in own] == [0]


def test_no_other_cell_could_be_taken_for_parameters(notebook):
    """Cells of nothing but literal assignments are; so the first one alone is made of them."""
    first, *others = ("".join(cell["source"]) for cell in code_cells(notebook[1]))
    assert "scale" in parameters.literals(first)
    for source in others:
        assert not parameters.literals(source), source


def test_every_parameter_is_read_with_its_type(notebook):
    """What the second cell gives `parameters.read` is what the first declares, in its order."""
    first, second, *_ = ("".join(cell["source"]) for cell in code_cells(notebook[1]))
    declared = [(line.target.id, line.annotation.id) for line in ast.parse(first).body]
    (call,) = (
        node
        for node in ast.walk(ast.parse(second))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parameters.read"
    )
    assert ast.unparse(call.args[0]) == "globals()"
    assert [(word.arg, word.value.id) for word in call.keywords] == declared


def test_parameters_are_commented_literals(notebook):
    lines = "".join(code_cells(notebook[1])[0]["source"]).splitlines()
    names = {}
    for line in lines:
        assert re.search(r"  # \S", line), f"no trailing comment: {line}"
        (assignment,) = ast.parse(line).body
        assert isinstance(assignment, ast.AnnAssign), f"no type: {line}"
        names[assignment.target.id] = ast.literal_eval(assignment.value)
    assert names["scale"] == "auto"


def test_no_logic(notebook):
    cells = code_cells(notebook[1])
    assert len(cells) <= 12
    for cell in cells:
        source = "".join(cell["source"])
        assert not re.search(r"^\s*[!%]", source, re.M), source
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(source))), source
        most = 16 if "parameters" in cell["metadata"].get("tags", []) else 12
        assert len(source.splitlines()) <= most, source


def test_objects_are_made_and_never_changed(notebook):
    """No assignment to an attribute, and no `setup` that one would be made to."""
    for cell in code_cells(notebook[1]):
        source = "".join(cell["source"])
        assert not re.search(r"\bsetup\b", source), source
        nodes = list(ast.walk(ast.parse(source)))
        stored = [
            node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        ]
        assert not stored, source
        assert not any(isinstance(node, ast.Name) and node.id == "setattr" for node in nodes), source


def test_named_in_readme(notebook):
    assert notebook[0].name in (ROOT / "README.md").read_text()
