"""Sets of the compared methods in an experiment: settings by scale, made once and read, gone on with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from igd_lib.analysis import tables
from igd_lib.baselines.d4m import D4M
from igd_lib.baselines.dm import DM
from igd_lib.baselines.idc import IDC
from igd_lib.experiment import comparisons, makers, measures, pictures, registry
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.protocols import SMALL_DATM
from igd_lib.tools import keys
from igd_lib.tools.machine import work_dir

LONG = [name for name, own in registry.BASELINES.items() if own.minutes is not None]
BY_CLASS = ("d4m", "tdsdm")


@pytest.fixture
def smoke(small_loads):
    return prepare("01", "fashion-mnist", "smoke", run=Run(ipc=1))


def pixels(images):
    return images.fetch(torch.arange(len(images)))


@pytest.mark.parametrize("name", LONG)
def test_a_set_is_made_once_and_then_read(smoke, name, monkeypatch):
    own = registry.BASELINES[name]
    assert not own.is_made(smoke, 1, 0)
    assert not (work_dir() / "teacher").exists()  # nothing is trained to be asked
    first = smoke.set(Method(name), 0, 1)
    assert own.is_made(smoke, 1, 0) and not own.is_made(smoke, 1, 1) and not own.is_made(smoke, 2, 0)
    assert first.labels.tolist() == list(range(10)) and first.classes == smoke.train.classes
    assert pixels(first).shape == (10, 3, 32, 32) and pixels(first.plain()).float().std() > 1
    again = replace(own.make, **{"prepare" if name in BY_CLASS else "make": None})
    assert torch.equal(pixels(again(smoke, 1, 0)), pixels(first))
    other = smoke.set(Method(name), 1, 1)
    # IDC-1 begins with the first images of each class, whatever the seed, and D4M with the centre of one
    # cluster; what follows is drawn.
    assert not torch.equal(pixels(other), pixels(first))


@pytest.mark.parametrize("kind", ["dm", "sre2l"])
def test_an_interrupted_set_is_gone_on_with(smoke, kind):
    """What is under way lies beside the finished set, and goes when that is there."""
    whole = registry.BASELINES[kind].make
    folder = keys.folder(kind, whole.about(smoke, 1, 0))

    def cut(place, ipc, seed, settings, state):
        state.mkdir(parents=True) if kind == "sre2l" else state.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=f"what {whole.name} has is in .*run the same again"):
        replace(whole, make=cut)(smoke, 1, 0)
    assert (folder / "state").exists() and not whole.is_made(smoke, 1, 0)
    seen = []

    def rest(place, ipc, seed, settings, state):
        seen.append(state.exists())
        return place.train.per_class(ipc, seed)

    replace(whole, make=rest)(smoke, 1, 0)
    assert seen == [True] and whole.is_made(smoke, 1, 0) and not (folder / "state").exists()


def test_settings_follow_the_scale(smoke, small_loads):
    small = prepare("01", "fashion-mnist", "small")
    assert makers.DM_SETS.settings(small, 10) == DM.small(10)
    assert makers.IDC_SETS.settings(small, 10) == IDC.small(10)
    assert makers.DM_SETS.settings(smoke, 10).iterations == 2
    assert makers.D4M_SETS.settings(small, 10) == D4M.small(10)
    papers = replace(small, scale=replace(small.scale, papers=True, dataset="cifar-10"))
    assert makers.DM_SETS.settings(papers, 100) == DM.paper("cifar-10", 100)


def test_settings_are_in_the_key(smoke):
    for whole in (makers.DM_SETS, makers.IDC_SETS, makers.SRE2L_SETS, makers.GVBSM_SETS):
        about = whole.about(smoke, 1, 0)
        assert about["settings"] == asdict(whole.settings(smoke, 1)) and about["seed"] == 0
        own = keys.key(whole.kind, about)
        assert keys.key(whole.kind, whole.about(smoke, 2, 0)) != own
        for name, value in about["settings"].items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                other = about | {"settings": about["settings"] | {name: value + 1}}
                assert keys.key(whole.kind, other) != own, name
    networks = makers.SRE2L_SETS.about(smoke, 1, 0)["networks"]
    assert networks[0][0] == "convnet3-bn-w64" and len(networks) == 1
    assert len(makers.GVBSM_SETS.about(smoke, 1, 0)["networks"]) == 3


def test_what_is_shortened_is_said(small_loads):
    small = prepare("08_cifar", "cifar-10", "small", run=Run(ipc=10, stand_in="fashion-mnist"))
    said = makers.DM_SETS.shortened(small, 10)
    assert "iterations 500 (20000)" in said and "network convnet3-w64 (convnet3)" in said
    assert not [line for line in said if line.startswith(("lr ", "momentum "))]
    assert "adapter's steps 500 (None)" in makers.TDSDM_SETS.shortened(small, 10)
    assert makers.shortened(DM.paper("cifar-10", 10), DM.paper("cifar-10", 10)) == []


def test_rows_of_the_tables(smoke):
    kinds = [method.kind for method in comparisons.table(smoke, 1)]
    assert kinds[:4] == ["Random", "DM", "IDC-1", "RDED"] and kinds[-1] == "Minimax-IGD"
    assert [method.kind for method in comparisons.table(smoke, 9)][:4] == ["Random", "TDSDM", "D4M", "RDED"]
    assert [row.kind for row in comparisons.table(smoke, 2)][1:3] == ["SRe2L", "G-VBSM"]


def test_the_note_on_datm_s_plain_sets_says_what_was_given_up():
    place = prepare("08", "cifar-10", "small", run=Run(ipc=10))
    whole, plain = (registry.BASELINES[name].shortened(place, 10) for name in ("datm", "datm-plain"))
    assert set(plain) - set(whole) == {"labels hard (soft)", "images 8-bit (float)"}
    assert "iterations 200 (10000)" in whole and "experts' count 3 (100)" in whole


@pytest.mark.parametrize("name, said", [("dm", "derived from real images"), ("rded", "real images, whole")])
def test_a_set_s_card_says_what_its_images_are(smoke, name, said):
    registry.BASELINES[name].make(smoke, 1, 0)
    own = registry.BASELINES[name]
    assert own.origin == ("real" if name == "rded" else "derived")
    (card,) = {path for path in work_dir().glob(f"{name}/*/README.md")}
    assert f"**{said}" in card.read_text() and "1 images a class, seed 0" in card.read_text()


def test_datm_is_evaluated_by_what_it_learned(smoke):
    """And without it under the table's protocol; both from the same experts."""
    whole, plain = (smoke.set(Method(name), 0, 1) for name in ("datm", "datm-plain"))
    assert whole.targets is not None and whole.lr is not None and pixels(whole).is_floating_point()
    assert plain.targets is None and pixels(plain).dtype == torch.uint8
    assert len(list(work_dir().glob("experts/*/manifest.json"))) == 1
    sets = smoke.sets([Method("random"), Method("datm"), Method("datm-plain")])
    rows = tables.top1(measures.accuracy_rows(smoke, sets, "convnet1"))
    protocols = rows.groupby("family").protocol.unique()
    own = smoke.scale.protocol.name
    assert {name: list(found) for name, found in protocols.items()} == {
        "random": [own],
        "datm": [SMALL_DATM.name],
        "datm-plain": [own],
    }
    assert list(rows.family) == [method.family for method, _, _ in sets]
    for shown in (pictures.across_classes(sets), pictures.one_class(sets, 0, title="")):
        assert {image.dtype for row in shown.rows.values() for image in row} == {torch.uint8}


def test_notes_name_origin_protocol_and_what_is_shortened(smoke, tmp_path):
    """Of every row that is no guided sampling; a page is given the same text."""
    sets = smoke.sets([Method("random"), Method("sre2l"), Method("datm"), Method()])
    text = measures.notes(smoke, sets, str(tmp_path / "out"))
    random, recovered, matched = text.splitlines()
    assert random == "- Random: real images, whole or in parts"
    assert "recovered from networks" in recovered and "iterations 2 (" in recovered
    assert f"derived from real images; networks are trained by its own protocol, {SMALL_DATM.name}" in matched
    assert (tmp_path / "out" / "notes.md").read_text() == text
