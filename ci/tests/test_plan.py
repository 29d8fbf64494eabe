"""`igd plan`: what a notebook needs, costs and would do, before anything is loaded."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from igd_lib.__main__ import igd
from igd_lib.experiment import plan
from igd_lib.experiment.artefacts import ARTEFACTS
from igd_lib.experiment.run import Run
from igd_lib.memory import Footprint

ROOT = Path(__file__).parents[2]
CARD = plan.other_machine(24)


@pytest.fixture(autouse=True)
def known_footprints(monkeypatch):
    """What `test_memory` measures at the paper's shapes takes half a minute to find: here it is given."""
    found = {
        "float32": Footprint(3_350_000_000, 3_057_000_000),
        "bfloat16": Footprint(1_720_000_000, 1_700_000_000),
    }
    monkeypatch.setattr(plan, "guided_step", lambda surrogate, precision: found[precision])


@pytest.mark.parametrize("name", [name for name, about in ARTEFACTS.items() if about.paper])
def test_every_notebook_with_a_paper_scale_has_a_plan(only_fashion, name):
    found = plan.of(name, ARTEFACTS[name].dataset, Run(), CARD)
    assert found.hours > 0 and f"**Plan of `{name}`**" in found.text
    for part in (
        "| needed | where | |",
        "| stage | work |",
        "GPU memory of a guided step",
        "On disk: 0 finished",
    ):
        assert part in found.text


def test_a_plan_has_the_notebook_s_rows(only_fashion):
    """Every function of `comparisons` that a notebook calls is one of its plan's."""
    for name in ARTEFACTS:
        if not ARTEFACTS[name].paper:
            continue
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        used = set(re.findall(r"comparisons\.(\w+)\(", "".join("".join(cell["source"]) for cell in cells)))
        source = inspect.getsource(plan.ROWS.get(name[:2], plan._baselines))
        if "lambda" in source:  # the source of all of them
            source = next(line for line in source.splitlines() if f'"{name[:2]}"' in line)
        assert used <= set(re.findall(r"comparisons\.(\w+)\(", source)), name


def test_hours_follow_what_is_asked(only_fashion):
    def hours(**given):
        return plan.of("03_imagenet1k", "imagenet", Run(**given), CARD).hours

    ten, fifty = hours(ipc=10), hours(ipc=50)
    assert 3 < fifty / ten < 5.5  # the surrogate is trained once
    one, two = hours(ipc=10, seeds="1"), hours(ipc=10, seeds="2")
    assert ten == pytest.approx(one + 4 * (two - one))
    assert hours(ipc=10, methods="Random,RDED") < ten / 2
    quick = plan.of("03_imagenet1k", "imagenet", Run(), plan.other_machine(24, (100.0, 40.0))).hours
    assert quick == pytest.approx(ten / 2)


def test_the_batch_follows_the_card_and_the_precision(only_fashion):
    def batch(gib, **given):
        return plan.of("01_nette_woof", "imagewoof", Run(**given), plan.other_machine(gib)).batch

    assert 1 <= batch(24) < batch(80) <= 50
    assert batch(24, precision="bfloat16") > batch(24)
    assert batch(24, batch=3) == 3
    tight = plan.of("01_nette_woof", "imagewoof", Run(), plan.other_machine(4))
    assert tight.batch == 0 and "not even one image fits" in tight.text


def test_options_decide_the_rows(only_fashion):
    name, dataset, run = plan.asked("26", {"ks": "1,2,3", "gammas": "5", "seeds": "1"})
    found = plan.of(name, dataset, run, CARD)
    assert len(found.work.rows) == 1 + 3 + 1 and found.work.seeds == 1


def test_a_set_that_two_tables_show_is_counted_once(only_fashion):
    """Of `13_paper_vs_code`: "DiT, cfg 4" and "DiT", whose labels differ and nothing else."""
    name, dataset, run = plan.asked("13", {"cfgs": "4", "seeds": "1"})
    rows = plan.of(name, dataset, run, CARD).work.rows
    assert len({replace(row, varies=()) for row in rows}) == len(rows)
    assert sum(not row.guide_names and row.fidelity is None for row in rows) == 1


def test_the_command(only_fashion):
    told = CliRunner().invoke(igd, ["plan", "03_imagenet1k", "-p", "ipc", "50", "--memory", "24"])
    assert told.exit_code == 1, told.output  # nothing of it is here
    assert "at IPC 50, scale paper: 8 rows" in told.output and "a card with 24 GiB" in told.output
    assert "hf download facebook/DiT-XL-2-256" in told.output
    for given, line in (
        (["plan", "3"], "no notebook '3'; there are 00_quickstart"),
        (["plan", "00"], "00_quickstart has no paper scale"),
        (["plan", "01", "-p", "ipcs", "5"], "unknown parameter 'ipcs'"),
        (["plan", "01", "-p", "dataset", "imagewolf"], "unknown data set 'imagewolf'"),
        (["plan", "01", "-p", "seeds", "x"], "seeds are numbers like"),
        (["plan", "01", "-p", "ipc", "ten"], "ipc is a whole number, got 'ten'"),
    ):
        told = CliRunner().invoke(igd, given)
        assert told.exit_code == 1 and line in told.output and "Traceback" not in told.output, told.output


def test_the_command_for_scripts(only_fashion):
    given = ["plan", "03_imagenet1k", "-p", "ipc", "50", "--memory", "24", "--json"]
    told = json.loads(CliRunner().invoke(igd, given).output)
    assert (told["notebook"], told["ipc"], len(told["rows"])) == ("03_imagenet1k", 50, 8)
    assert told["hours"] == pytest.approx(sum(one["hours"] for one in told["stages"])) and told["hours"] > 0
    assert any(piece["blocks"] for piece in told["pieces"]) and 22 < told["machine"]["memory"] / 2**30 < 24


def test_figures_have_no_exponents():
    assert [plan.figure(value) for value in (0.0023, 0.23, 5, 77.4, 137, 18300)] == [
        "0.0023",
        "0.23",
        "5",
        "77",
        "140",
        "18,000",
    ]
