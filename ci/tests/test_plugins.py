"""Another guide or baseline: one class or function, one line of a registry, and it appears in tables."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from guided_sets import check_a_killed_run, latents
from igd_lib.analysis import tables
from igd_lib.data.images import from_tensors
from igd_lib.experiment import makers, measures, registry
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.registry import Baseline, OtherGuide
from igd_lib.experiment.run import Run
from igd_lib.guides import Guide, GuideFactory, Step, Update

PLAIN, GUIDED, OTHER = Method(), Method(guides=("toy",)), Method("toy")


# --- the toys


@dataclass
class Pull(Guide):
    """Pulls each z_t towards a constant of its own."""

    strength: float
    targets: Tensor  # (B,)

    def __call__(self, step: Step) -> Update:
        return Update(self.strength * (step.z.detach() - self.targets[:, None, None, None]))


def target(label: int, index: int) -> float:
    """What image `index` of a class is pulled towards."""
    return 2.0 + label + 10 * index


def toy_guide(strength: float = 0.1, remembers: bool = False, towards=target) -> OtherGuide:
    """`Pull` by class and image number, and away from the earlier latents where it remembers them."""

    def guide(labels, indices, memory):
        own = [towards(label, index) for label, index in zip(labels.tolist(), indices, strict=True)]
        if remembers:
            own = [value - earlier.sum() / 256 for value, earlier in zip(own, memory, strict=True)]
        return Pull(strength, torch.tensor(own))

    settings = {"name": "toy", "strength": strength, "towards": towards.__name__}
    return OtherGuide("toy", lambda experiment: GuideFactory(guide, settings, remembers))


def mean_images(place: makers.Workplace, ipc: int, seed: int):
    """A baseline: each class's mean image with noise on it."""
    generator, train = torch.Generator().manual_seed(seed), place.train
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    means = torch.stack([train.of_class(label, 100).float().mean(0) for label in range(len(train.classes))])
    noise = 10 * torch.randn(len(labels), *means.shape[1:], generator=generator)
    images = (means[labels] + noise).clamp(0, 255).to(torch.uint8)
    return from_tensors(train.name, f"mean images, seed {seed}", train.classes, images, labels)


@pytest.fixture
def experiment(small_loads, monkeypatch):
    monkeypatch.setitem(registry.GUIDES, "toy", toy_guide())
    monkeypatch.setitem(registry.BASELINES, "toy", Baseline("Toy", mean_images))
    return prepare("01", "fashion-mnist", "smoke")


# --- what becomes of them


def test_both_appear_in_a_table(experiment):
    sets = experiment.sets([PLAIN, GUIDED, OTHER], 1, 2)
    rows = measures.accuracy_rows(experiment, sets, "convnet3")
    table = tables.accuracy_table(rows).set_index("method")
    assert list(table.index) == ["DiT", "DiT + toy", "Toy"] and table.n.tolist() == [2, 2, 2]
    assert table.notna().all().all() and table["top-1 (%)"].between(0, 100).all()
    fields = rows.drop_duplicates("method").set_index("method")
    assert fields.guides.to_dict() == {"DiT": "", "DiT + toy": "toy", "Toy": ""}
    assert fields.family.to_dict() == {"DiT": "sampled", "DiT + toy": "sampled", "Toy": "toy"}
    moved = measures.latent_rows(experiment, experiment.sets([PLAIN, GUIDED], 1, 1), PLAIN)
    moved = moved[moved.metric == "moved"].set_index("method").value
    assert moved["DiT"] == 0 < moved["DiT + toy"]


def test_the_guide_knows_class_and_image_number(experiment, monkeypatch):
    """Asked in the last step alone, it moves each latent by 0.1 of what that one is pulled towards."""

    def zero(label, index):
        return 0.0

    monkeypatch.setattr(Pull, "covers", lambda self, index: index == 0)
    guided = latents(experiment.set(GUIDED, 0, 2))
    monkeypatch.setitem(registry.GUIDES, "toy", toy_guide(towards=zero))
    moved = guided - latents(experiment.set(GUIDED, 0, 2))
    wanted = torch.tensor([[target(label, index) for index in range(2)] for label in range(10)])
    torch.testing.assert_close(
        moved, 0.1 * wanted[:, :, None, None, None].expand_as(moved), rtol=1e-4, atol=1e-5
    )


def test_the_guide_s_settings_name_its_sets(experiment, monkeypatch):
    found = experiment.set(GUIDED, 0, 1)
    assert found.manifest["settings"]["guides"] == [{"name": "toy", "strength": 0.1, "towards": "target"}]
    assert experiment.set(GUIDED, 0, 1).path == found.path != experiment.set(PLAIN, 0, 1).path
    monkeypatch.setitem(registry.GUIDES, "toy", toy_guide(strength=0.2))
    assert experiment.set(GUIDED, 0, 1).path != found.path


def test_without_strength_its_latents_are_vanilla_s(experiment, monkeypatch):
    monkeypatch.setitem(registry.GUIDES, "toy", toy_guide(strength=0.0))
    plain, guided = (experiment.set(method, 0, 2) for method in (PLAIN, GUIDED))
    assert plain.path != guided.path and torch.equal(latents(plain), latents(guided))


@pytest.mark.parametrize("remembers", [False, True], ids=["independent images", "with a memory"])
def test_a_killed_run_ends_as_one_that_was_not(experiment, monkeypatch, tmp_path, remembers):
    monkeypatch.setitem(registry.GUIDES, "toy", toy_guide(remembers=remembers))
    check_a_killed_run(experiment, GUIDED, monkeypatch, tmp_path)


# --- what takes long


def test_a_baseline_that_takes_long_is_left_out_until_it_is_there_or_asked_for(
    small_loads, monkeypatch, capsys
):
    """Only "small" and "auto" leave it out, with its minutes; what lies in the cache is shown."""
    made = {0}

    def toy(minutes=None):
        return Baseline("Toy", mean_images, minutes, 4.0, lambda place, ipc, seed: seed in made)

    def rows(scale="small", methods="auto", seeds="0,1"):
        found = prepare("01", "fashion-mnist", scale, run=Run(ipc=1, methods=methods, seeds=seeds))
        return [method.kind for method in found.sets([Method("random"), Method("toy")]).methods]

    monkeypatch.setitem(registry.BASELINES, "toy", toy(lambda place, ipc: 3.0 * ipc))
    assert rows() == ["Random"]
    assert "left out: Toy (about 7 minutes); `-p methods all` makes them" in capsys.readouterr().out
    assert rows(methods="all") == rows(methods="Random,Toy") == rows(seeds="1") == ["Random", "Toy"]
    assert rows(scale="smoke") == ["Random", "Toy"] and not capsys.readouterr().out
    monkeypatch.setitem(registry.BASELINES, "toy", toy())
    assert rows() == ["Random", "Toy"]
