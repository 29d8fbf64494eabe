"""Who may give soft labels: ImageNet's teacher, one from a file, and one that is trained here."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from igd_lib import evaluation, teacher_training
from igd_lib.data.datasets import DATASETS
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.experiment import models
from igd_lib.experiment.models import PaperModels
from igd_lib.models.networks import network
from igd_lib.teacher_training import TEACHER, teacher_recipe, train_teacher
from igd_lib.teachers import (
    check_teacher,
    imagenet_teacher,
    imagenet_teacher_file,
    least_for,
    predict,
    problems_of_imagenet_teacher,
    problems_of_teacher_file,
    teacher_from_file,
)

CLASSES = ("a", "b", "c")
HALF = (0.5, 0.5, 0.5)
SHORT = replace(
    TEACHER,
    name="short",
    image_size=16,
    mean=HALF,
    std=HALF,
    lr=0.02,
    epochs=6,
    batch_size=8,
    train_resize=None,
    test_resize=None,
    crop_scale=(0.9, 1.0),
)


def colours(count: int, seed: int, split: str) -> ImageData:
    """`count` noisy images of each of three colours, 16 px."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count)
    pixels = torch.randint(0, 130, (3 * count, 3, 16, 16), generator=generator)
    pixels = pixels + torch.eye(3, dtype=torch.long)[labels].mul(100)[:, :, None, None]
    return from_tensors("colours", split, CLASSES, pixels.to(torch.uint8), labels)


@pytest.fixture
def train() -> ImageData:
    return colours(12, 0, "train")


@pytest.fixture
def unseen() -> ImageData:
    return colours(20, 1, "test")


# --- ImageNet's


def test_classes_without_imagenet_ids_never_get_imagenets_teacher(monkeypatch):
    """Food-101's 101 labels are no ids of ImageNet: 0 is the tench there. No weights are asked for."""
    monkeypatch.setattr("igd_lib.teachers.ResNet18_Weights", None)
    food = DATASETS["food-101"]
    for ids in ((), (3, 7), (*range(100), 1000)):
        with pytest.raises(ValueError, match="101 classes came with .* train one"):
            imagenet_teacher(food.classes, ids)


@pytest.fixture
def teacher_file(monkeypatch, tmp_path) -> Path:
    """The file of ImageNet's teacher in torch.hub's cache, with random weights and the hash of those."""
    model = network("torchvision/resnet18", num_classes=1000, image_size=224)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    name = f"resnet18-{hashlib.sha256((tmp_path / 'a.pth').read_bytes()).hexdigest()[:8]}.pth"
    weights = SimpleNamespace(url=f"https://download.pytorch.org/models/{name}")

    def state(**_):
        if not place.is_file():
            raise URLError("no network")
        return torch.load(place, weights_only=True)

    weights.get_state_dict = state
    monkeypatch.setattr("igd_lib.teachers.ResNet18_Weights", SimpleNamespace(IMAGENET1K_V1=weights))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints" / name
    place.parent.mkdir(parents=True)
    return (tmp_path / "a.pth").rename(place)


def test_imagenets_teacher_is_checked_where_it_is_cached(teacher_file):
    """One bit of one weight of a file that loads: torch.hub does not look at a file that is there."""
    assert problems_of_imagenet_teacher() == [] and imagenet_teacher_file() == (teacher_file, [])
    assert imagenet_teacher(("tench", "goldfish"), (0, 1)).model.fc.out_features == 1000
    raw = bytearray(teacher_file.read_bytes())
    raw[len(raw) // 2] ^= 1
    teacher_file.write_bytes(raw)
    torch.load(teacher_file, weights_only=True)
    [line] = problems_of_imagenet_teacher()
    assert str(teacher_file) in line and "is damaged or another file" in line and "delete it" in line
    with pytest.raises(ValueError, match="is damaged or another file: .* delete it and run again"):
        imagenet_teacher(("tench", "goldfish"), (0, 1))
    teacher_file.unlink()
    assert imagenet_teacher_file() == (None, [])
    [line] = problems_of_imagenet_teacher()
    assert "not in" in line and f"curl -L --create-dirs -o {teacher_file} https://download" in line
    with pytest.raises(FileNotFoundError, match="could not be had .*no network"):
        imagenet_teacher(("tench", "goldfish"), (0, 1))


# --- from a file


@pytest.mark.parametrize("layout", ["safetensors", "plain", "reference code", "in parallel"])
def test_a_teacher_is_read_from_its_file(tmp_path, layout):
    torch.manual_seed(0)
    model = network("convnet3-bn", num_classes=3, image_size=16)
    state = model.state_dict()
    path = tmp_path / ("teacher.safetensors" if layout == "safetensors" else "teacher.pth")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "plain":
        torch.save(state, path)
    elif layout == "reference code":
        torch.save({"model": state, "epoch": 89, "args": argparse.Namespace(lr=0.1, model="convnet3")}, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    found = teacher_from_file(path, CLASSES, architecture="convnet3-bn", image_size=16, least=30.0)
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(found.model.eval()(images), model.eval()(images))
    assert (found.architecture, found.classes, found.least) == ("convnet3-bn", CLASSES, 30.0)
    assert found.weights.startswith(f"{path.name}, sha256 ") and len(found.weights.split()[-1]) == 12
    assert problems_of_teacher_file(path, 3, architecture="convnet3-bn", image_size=16) == []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    [line] = problems_of_teacher_file(path, 3, architecture="convnet3-bn", image_size=16)
    assert f"{path} is cut short" in line


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    options = dict(architecture="convnet3-bn", image_size=16)
    with pytest.raises(FileNotFoundError, match="no teacher in .*none.pth"):
        teacher_from_file(tmp_path / "none.pth", CLASSES, **options)
    path = tmp_path / "x.pth"
    for content in (
        network("convnet3-bn", num_classes=4, image_size=16).state_dict(),  # other classes
        network("convnet2", num_classes=3, image_size=16).state_dict(),
        [1, 2],
        {"model": Harmful()},
    ):
        torch.save(content, path)
        with pytest.raises(
            ValueError, match=r"x\.pth is no state dict of convnet3-bn for 3 classes at 16 px"
        ):
            teacher_from_file(path, CLASSES, **options)
        assert len(problems_of_teacher_file(path, 3, **options)) == 1
    path.write_bytes(b"not a file of torch's")
    with pytest.raises(ValueError, match=r"x\.pth is no state dict"):
        teacher_from_file(path, CLASSES, **options)
    [line] = problems_of_teacher_file(path, 3, **options)
    assert "cannot be read as plain tensors" in line
    assert "no teacher in" in problems_of_teacher_file(tmp_path / "none.pth", 3)[0]
    assert "run" not in capsys.readouterr().out  # nothing in it was called


# --- trained here


def test_the_recipe_is_the_reference_codes():
    """Its schedule is x 0.1 every 30 epochs; small images are trained on as they are."""
    name, recipe = teacher_recipe(256)
    plan = recipe.training(name, 1245, 10)
    assert (name, plan.epochs, plan.batch_size, plan.lr, plan.weight_decay) == (
        "torchvision/resnet18",
        90,
        256,
        0.1,
        1e-4,
    )
    factors = [evaluation.schedule(recipe, epoch, 90) for epoch in (0, 29, 30, 59, 60, 89)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert (recipe.train_resize, recipe.test_resize, recipe.image_size) == (256, 256, 224)
    assert (recipe.labels, recipe.crop_scale, recipe.cutmix, recipe.flip) == ("hard", (0.08, 1.0), 0.0, True)
    name, small = teacher_recipe(32)
    assert (name, small.image_size, small.train_resize) == ("resnet18_modified", 32, None)
    assert (least_for("imagenette"), least_for("imagewoof"), least_for("food-101")) == (80, 65, 50)


def test_a_teacher_is_trained_once_and_says_so(train, unseen, own_cache, monkeypatch, capsys):
    options = dict(network="convnet2", recipe=SHORT, least=70.0, device="cpu")
    found = train_teacher(train, unseen, **options)
    top1 = 100 * (predict(found.model, unseen, SHORT).argmax(1) == unseen.labels).double().mean().item()
    assert found.top1 == pytest.approx(top1) and top1 > 80  # a guess: 33
    said = f"labels by convnet2 (trained here on 36 images of colours, train; {found.weights[-12:]}), "
    assert capsys.readouterr().out.strip() == said + f"{top1:.1f} % of the test images"
    assert check_teacher(found, unseen, SHORT) == pytest.approx(top1)
    assert (found.classes, found.mean, found.least) == (CLASSES, HALF, 70.0)
    (folder,) = (own_cache / "teacher").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "teacher.safetensors"]
    monkeypatch.setattr(teacher_training, "_train", None)
    again = train_teacher(train, unseen, **options)
    assert again.weights == found.weights and again.top1 == found.top1
    assert said in capsys.readouterr().out
    images = unseen.fetch(torch.arange(5)).float()
    assert torch.equal(again.model.eval()(images), found.model.eval()(images))
    with pytest.raises(ValueError, match="holds a teacher of other settings: seed = 0, wanted 1"):
        train_teacher(train, unseen, folder, seed=1, **options)


def test_an_interrupted_training_ends_with_the_same_teacher(train, unseen, tmp_path, monkeypatch):
    options = dict(network="convnet2", recipe=SHORT, device="cpu")
    whole = train_teacher(train, unseen, tmp_path / "whole", **options)
    monkeypatch.setattr(evaluation, "CHECKPOINT_SECONDS", 0.0)
    epoch = evaluation._Training.epoch

    def cut(self, number):
        if number == 4:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation._Training, "epoch", cut)
        said = r"interrupted: 3 of \d+ epochs of convnet2 are in .*cut; run the same again to go on"
        with pytest.raises(KeyboardInterrupt, match=said):
            train_teacher(train, unseen, tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "training.safetensors").is_file()
    found = train_teacher(train, unseen, tmp_path / "cut", **options)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert found.weights == whole.weights and not (tmp_path / "cut" / "training.safetensors").exists()


# --- at the paper's scale


@pytest.fixture
def paper(monkeypatch, train, unseen):
    """The paper's models of a data set, whose images are the colours'."""
    splits = {"train": train, "test": unseen}
    monkeypatch.setattr(models, "load", lambda name, split: replace(splits[split], name=name))
    monkeypatch.setattr(models, "teacher_recipe", lambda size: ("convnet2", SHORT))
    monkeypatch.setattr(teacher_training, "teacher_recipe", lambda size: ("convnet2", SHORT))

    def make(dataset: str) -> PaperModels:
        made = object.__new__(PaperModels)
        made.dataset, made.device = dataset, "cpu"
        return made

    return make


def test_imagenet_alone_has_imagenets_teacher(paper, monkeypatch):
    given = []
    monkeypatch.setattr(models, "imagenet_teacher", lambda *given_: given.append(given_))
    spec = DATASETS["imagenet"]
    paper("imagenet").teacher(spec.classes, spec.label_ids)
    assert given == [(spec.classes, spec.label_ids)]
    for dataset in ("imagenette", "imagewoof", "food-101", "fastai-imagewoof2"):
        made = paper(dataset)
        found = made.teacher(CLASSES, (0, 1, 2))
        assert len(given) == 1 and f"trained here on 36 images of {dataset}" in found.weights
        assert found is made.teacher(CLASSES, (0, 1, 2)) and found.least == least_for(dataset)


def test_a_file_in_the_cache_is_the_teacher(paper, own_cache, monkeypatch):
    (own_cache / "models").mkdir()
    torch.manual_seed(3)
    state = network("convnet2", num_classes=3, image_size=16).state_dict()
    torch.save({"model": state}, own_cache / "models" / "Teacher-imagewoof.pth")
    monkeypatch.setattr(models, "train_teacher", None)
    found = paper("imagewoof").teacher(CLASSES, (0, 1, 2))
    assert "Teacher-imagewoof.pth" in found.weights and found.least == 65
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


# --- a stand-in's


def test_a_stand_ins_teacher_is_kept_in_its_folder(tmp_path, monkeypatch):
    """Trained on its data, half precision on disk; read, it labels as it did. None where there is none."""
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    tiny = from_tensors("cifar-10", "train", DATASETS["cifar-10"].classes, pixels, torch.arange(40) % 10)
    monkeypatch.setattr(teacher_training, "load", lambda spec, split: tiny)
    monkeypatch.setattr(teacher_training.standin, "path", lambda name: tmp_path)
    short = replace(teacher_training.STAND_IN_TEACHER, epochs=1, mixed_precision=False)
    monkeypatch.setattr(teacher_training, "STAND_IN_TEACHER", short)
    assert teacher_training.stand_in_teacher("cifar-10") is None
    path = teacher_training.add_teacher("cifar-10", tmp_path)
    assert path.stat().st_size < 800_000
    found = teacher_training.stand_in_teacher("cifar-10")
    assert found.architecture == "convnet3" and found.classes == tiny.classes and found.mean == HALF
    trained = train_teacher(tiny, tiny, network="convnet3", recipe=short)  # read from the cache
    assert found.top1 == trained.top1 and "of 40 real images" in found.weights
    ours, theirs = (predict(one.model, tiny, short) for one in (found, trained))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
