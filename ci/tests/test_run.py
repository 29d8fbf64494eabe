"""What a notebook's run is asked to do: shared parameters, their texts, and the rows that they choose."""

import ast
import json
from pathlib import Path

import pytest

from igd_lib.experiment.artefacts import ARTEFACTS, artefact
from igd_lib.experiment.methods import Method, chosen
from igd_lib.experiment.run import Options, Run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("5", (0, 1, 2, 3, 4)),
        ("1", (0,)),
        ("3:5", (3, 4)),
        ("0,3", (0, 3)),
        (" 2 ", (0, 1)),
        ("7,7,1:3", (7, 1, 2)),
    ],
)
def test_seeds_are_a_number_of_them_or_which(text, seeds):
    assert Run(seeds=text).generation_seeds == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "3:3", "4:2", "1:2:3", "1,,2", "1.5"])
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError, match="seeds"):
        Run(seeds=text)


def test_labels_of_a_job_array():
    parts = [Run(classes=f"{start}:{start + 4}").labels(10) for start in (0, 4, 8)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]  # the last part reaches beyond
    assert Run().labels(10) is None and Run(classes="3,7").labels(10) == [3, 7]
    with pytest.raises(ValueError, match=r"classes are labels 0 \.\.\. 9 here, got '10:20'"):
        Run(classes="10:20").labels(10)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ipc": 0}, "ipc is at least 1, got 0"),
        ({"batch": -1}, "batch is 0"),
        ({"precision": "float16"}, "precision is one of float32, tf32, bfloat16, got 'float16'"),
        ({"protocol": "igd_hard"}, "protocol is auto, .*igd-hard.*, got 'igd_hard'"),
        ({"classes": "a"}, "classes are numbers like"),
    ],
)
def test_what_cannot_be_meant(given, named):
    with pytest.raises(ValueError, match=named):
        Run(**given)


def test_a_run_from_a_notebook_s_parameters():
    run = Run.of(
        {"scale": "paper", "ipc": 50, "seeds": "2", "ks": "1,2", "save_to": "x", "backbone": "minimax"}
    )
    assert run == Run(ipc=50, seeds="2", options=Options(backbone="minimax", ks="1,2"))


def test_rows_are_chosen_by_kind():
    rows = [Method("random"), Method(), Method(cfg_scale=1.5, cfg_choice="best")]
    assert chosen(rows, "auto") == chosen(rows, "all") == rows
    assert chosen(rows, "DiT") == rows[1:] and chosen(rows, "random, dit") == rows
    with pytest.raises(ValueError, match="no row is called 'DiT-IGD' here; methods are among Random, DiT"):
        chosen(rows, "Random,DiT-IGD")


def parameters_of(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    (cell,) = [one for one in cells if "parameters" in one["metadata"].get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse("".join(cell["source"])).body}


def test_every_notebook_is_known():
    assert list(ARTEFACTS) == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert artefact("03") is ARTEFACTS["03_imagenet1k"] and artefact("99").labels == "hard"


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_notebook_s_defaults_are_a_run_s(name):
    """The same default in each notebook, and the data set that the plan is made for."""
    found = parameters_of(name)
    if not ARTEFACTS[name].paper:
        return
    assert Run.of(found) == Run(options=Run.of(found).options)
    assert found.get("dataset", ARTEFACTS[name].dataset) == ARTEFACTS[name].dataset
    if name != "02_checkpoints":
        assert {"classes", "batch", "precision"} <= set(found)
        assert ("networks" in found) == bool(ARTEFACTS[name].networks) == ("protocol" in found)
