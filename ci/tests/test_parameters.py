"""A notebook's parameters: every name known, every value of its type, whatever else the notebook has set."""

import pytest
import torch

from igd_lib.experiment import parameters
from igd_lib.experiment.run import Run

TYPES = dict(scale=str, ipc=int, seeds=int, threshold=float, save=bool)
GIVEN = dict(scale="auto", ipc=10, seeds=3, threshold=0.7, save=False)
FOUND = GIVEN | {"run": Run(ipc=10, seeds=3)}
CELL = "\n".join(f"{name}: {kind.__name__} = {GIVEN[name]!r}  # a comment" for name, kind in TYPES.items())
READING = "config = parameters.read(globals(), scale=str, ipc=int, seeds=int, threshold=float, save=bool)"


def run(*cells, deleted=()):
    """A notebook's globals after these cells: what their literals set, and `In` as IPython keeps it."""
    namespace = {"In": ["", *cells], "Out": {}, "experiment": None}
    for source in cells:
        names = parameters.literals(source)
        if names:
            exec(source, namespace)
    return {name: value for name, value in namespace.items() if name not in (*deleted, "__builtins__")}


def test_parameters_are_read_by_name():
    around = {"_hidden": 1, "In": [], "Out": {}, "torch": torch, "run": run}
    found = parameters.read(GIVEN | around, **TYPES)
    assert vars(found) == FOUND
    assert vars(parameters.read(run(CELL, READING), **TYPES)) == FOUND


def test_an_int_passes_for_a_float():
    found = parameters.read(GIVEN | {"threshold": 1}, **TYPES)
    assert found.threshold == 1.0 and type(found.threshold) is float


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"treshold": 0.5}, NameError, "unknown notebook parameter 'treshold'; did you mean 'threshold'"),
        ({"zzz": 1}, NameError, "unknown notebook parameter 'zzz'; known: scale, ipc"),
        ({"ipc": "10"}, TypeError, "'ipc' is int, got '10'"),
        ({"ipc": 10.0}, TypeError, "'ipc' is int"),
        ({"ipc": True}, TypeError, "'ipc' is int, got True"),
        ({"threshold": True}, TypeError, "'threshold' is float"),
        ({"save": 1}, TypeError, "'save' is bool"),
        ({"scale": "large"}, ValueError, "scale is one of auto, smoke, small, rehearsal, paper, got 'large'"),
        ({"ipc": 0}, ValueError, "ipc is at least 1, got 0"),
        ({"seeds": 0}, ValueError, "seeds is at least 1"),
    ],
)
@pytest.mark.parametrize("in_a_notebook", [False, True], ids=["script", "notebook"])
def test_wrong_parameters_are_named(change, error, message, in_a_notebook):
    namespace = GIVEN | change
    if in_a_notebook:
        injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in change.items())
        namespace = run(CELL, injected, READING)
    with pytest.raises(error, match=message):
        parameters.read(namespace, **TYPES)


def test_a_missing_parameter_is_named():
    with pytest.raises(NameError, match="lacks 'seeds'"):
        parameters.read({name: value for name, value in GIVEN.items() if name != "seeds"}, **TYPES)


# --- in a notebook: which variables are parameters


def test_what_papermill_injects_is_a_parameter():
    with pytest.raises(NameError, match="unknown notebook parameter 'seedz'; did you mean 'seeds'"):
        parameters.read(run(CELL, "# Parameters\nseedz = 3", READING), **TYPES)
    every = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in GIVEN.items())
    with pytest.raises(NameError, match="unknown notebook parameter 'seedz'"):
        parameters.read(run(CELL, every + "\nseedz = 3", READING), **TYPES)
    assert parameters.read(run(CELL, "# Parameters\nseeds = 7", READING), **TYPES).seeds == 7


def test_variables_of_other_cells_are_no_parameters_when_everything_is_run_again():
    once = [
        CELL,
        READING,
        "sets = experiment.sets(rows, ipc, seeds)",
        "columns = ['top1', 'sd']",
        "title = 'x'",
    ]
    namespace = run(*once, CELL, READING) | {"sets": {"a": 1}, "ks": [1.0, 2.0]}
    assert namespace["columns"] == ["top1", "sd"]
    assert vars(parameters.read(namespace, **TYPES)) == FOUND
    # A cell with anything but literals is none of the parameters' even where it is run behind them.
    mixed = "thresholds = (0.6, 0.7)\nrows = comparisons.selections(experiment, thresholds)"
    namespace = run(*once, CELL, mixed, READING) | {"thresholds": (0.6, 0.7)}
    assert vars(parameters.read(namespace, **TYPES)) == FOUND


def test_a_corrected_name_no_longer_counts():
    """The misspelt variable is still there when the parameters cell has been corrected and run again."""
    misspelt = CELL.replace("seeds: int = 3", "seedz: int = 5")
    wrong = run(misspelt, READING)
    with pytest.raises(NameError, match="unknown notebook parameter 'seedz'"):
        parameters.read(wrong, **TYPES)
    corrected = run(misspelt, READING, CELL, READING)
    assert corrected["seedz"] == 5 and vars(parameters.read(corrected, **TYPES)) == FOUND
    # So it is where the name came from a cell of its own.
    corrected = run(CELL, "seedz = 5", READING, CELL, READING)
    assert corrected["seedz"] == 5 and vars(parameters.read(corrected, **TYPES)) == FOUND


def test_a_deleted_name_no_longer_counts():
    cells = (CELL, "seedz = 5", READING, "del seedz", READING)
    with pytest.raises(NameError, match="unknown notebook parameter 'seedz'"):
        parameters.read(run(*cells), **TYPES)
    assert vars(parameters.read(run(*cells, deleted=["seedz"]), **TYPES)) == FOUND


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (CELL, list(TYPES)),
        ("# Parameters\na = 1\nb = [-1, {'x': (None, 2.5)}]", ["a", "b"]),
        ("a = b = 1", ["a", "b"]),
        ("a: int", []),
        ("a = 1\nb = a", []),
        ("a = 1\nprint(a)", []),
        ("sets = experiment.sets(rows, ipc, seeds)", []),
        ("a += 1", []),
        ("a = {[1]: 2}", []),
        ("%matplotlib inline", []),
        ("", []),
    ],
)
def test_cells_of_literals(source, names):
    assert parameters.literals(source) == names


# --- text that papermill has made a number of


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (30, "30"),
        (0.5, "0.5"),
        (-1, "-1"),
        ("30", "30"),
        ([15, 30], "15,30"),
        ((0.5, "1"), "0.5,1"),
        (["convnet6", "resnet18"], "convnet6,resnet18"),
    ],
)
def test_a_number_passes_for_its_text(given, text):
    """`-p ks 30` gives 30, `-y "ks: [15, 30]"` a list."""
    assert parameters.read({"ks": given}, ks=str).ks == text


@pytest.mark.parametrize(
    "given", [True, None, float("nan"), float("inf"), [], [[1, 2]], ["a,b"], [True], [""], {"a": 1}]
)
def test_what_may_have_been_another_text_is_refused(given):
    with pytest.raises(TypeError, match=r"'ks' is str, got .*papermill takes text as it is by -r ks TEXT"):
        parameters.read({"ks": given}, ks=str)


@pytest.mark.parametrize("flag", ["-p", "-y"])
def test_text_as_papermill_itself_hands_it_on(flag):
    papermill = pytest.importorskip("papermill.cli")
    yaml = pytest.importorskip("yaml")
    given = papermill._resolve_type("30") if flag == "-p" else yaml.safe_load("[15, 30]")
    expected = "30" if flag == "-p" else "15,30"
    assert parameters.read({"ks": given}, ks=str).ks == expected
