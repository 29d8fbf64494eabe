"""RDED: which patches are taken of what, where they go, how they are stored, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from igd_lib.baselines.rded import Grids, grid, grids_of, rded, selection, through_jpeg
from igd_lib.data.datasets import DataSpec
from igd_lib.data.images import ImageData, from_tensors, load
from igd_lib.teachers import Teacher

HALF = (0.5, 0.5, 0.5)


class Brightness(nn.Module):
    """A teacher that is the surer of class 0 the brighter the image; black frames do not count."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.01))

    def forward(self, images):
        light = images.sum((1, 2, 3)) * self.gain
        return torch.stack([light, -light], 1)


def teacher(classes=("light", "dark"), least=0.0, mean=HALF, std=HALF) -> Teacher:
    return Teacher(Brightness(), "brightness", "none", tuple(classes), mean, std, least)


@pytest.fixture
def steps():
    """Two classes of twelve uniform 8 px images each: image i of either class has grey level 20 i."""
    levels = torch.arange(12).repeat(2) * 20
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8).contiguous()
    return from_tensors("steps", "train", ("light", "dark"), images, torch.arange(2).repeat_interleave(12))


@pytest.fixture
def photographs(tmp_path) -> ImageData:
    """Six noisy photographs of different shapes in each of two classes, read at 32 px."""
    generator = np.random.default_rng(0)
    for name in ("light", "dark"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 256, (40 + 9 * i, 90 - 5 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    return load(DataSpec("photographs", ("light", "dark"), (), 32), "train", tmp_path)


def test_the_surest_patches_are_taken_best_first(steps):
    """Class 0 takes the eight brightest, class 1 the eight darkest; the best two in the first cells."""
    found = rded(steps, teacher(), 2, factor=2, jpeg_quality=None)
    assert found.labels.tolist() == [0, 0, 1, 1] and found.image_size == 8 and found.classes == steps.classes
    images = found.fetch(torch.arange(4))
    cells = images[:, 0, ::4, ::4].flatten(1).float() / 20  # the level of each cell; truncated, so one below
    assert cells.round().tolist() == [[11, 9, 7, 5], [10, 8, 6, 4], [0, 2, 4, 6], [1, 3, 5, 7]]
    blocks = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).transpose(3, 4).flatten(4).int()
    assert (blocks - blocks[..., :1]).abs().max() <= 1  # uniform cells: no patch crosses a border


def by_hand(data: ImageData, judge: Teacher, size: int, factor: int, crops: int, seed: int) -> torch.Tensor:
    """One image a class, step by step with torchvision's own transforms; uint8 (classes, 3, size, size)."""
    side = size // factor
    crop = transforms.RandomResizedCrop(side, ratio=(1, 1), antialias=True)
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(judge.mean, judge.std)
    spread = transforms.Normalize((0.0,) * 3, [1 / value for value in judge.std])
    back = transforms.Compose([spread, transforms.Normalize([-value for value in judge.mean], (1.0,) * 3)])
    found = []
    for label in range(len(data.classes)):
        torch.manual_seed(seed * 1_000_003 + label)  # each class by itself
        scored = []
        for index in data.class_indices(label).tolist():
            image = to_tensor(data.photograph(index))
            patches = [normalise(crop(image)) for _ in range(crops)]
            losses = []
            for patch in patches:
                frame = torch.zeros(3, size, size)
                edge = (size - side) // 2
                frame[:, edge : edge + side, edge : edge + side] = patch
                losses.append(-judge.model(frame[None]).softmax(1)[0, label].log().item())
            scored.append(min(zip(losses, range(crops), patches, strict=True), key=lambda row: row[0]))
        scored.sort(key=lambda row: row[0])
        rows = [
            torch.cat([patch for _, _, patch in scored[row * factor : (row + 1) * factor]], 2)
            for row in range(factor)
        ]
        found.append(back(torch.cat(rows, 1)).numpy())
    return torch.from_numpy((np.stack(found) * 255).astype(np.uint8))


@pytest.mark.parametrize("factor", [1, 2])
def test_it_is_rded_step_by_step(photographs, factor):
    """Whole originals at another size than the data's, on the same candidates and draws."""
    judge = teacher(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    drawn = photographs.per_class(6, seed=3)
    found = rded(photographs, judge, 1, size=48, factor=factor, candidates=6, jpeg_quality=None, seed=3)
    assert found.image_size == 48
    with torch.no_grad(), torch.random.fork_rng():
        expected = by_hand(drawn, judge, 48, factor, crops=5, seed=3)
    assert torch.equal(found.fetch(torch.arange(2)), expected)


def test_a_class_is_the_same_whatever_was_made_before(photographs):
    """So a run can be interrupted, or divided among machines."""
    judge = teacher()
    grids = Grids(48, 2, 6, 2, 75)
    whole = rded(photographs, judge, 1, size=48, candidates=6, crops=2, seed=5)
    chosen = selection(photographs, judge, 1, grids, seed=5, device="cpu")
    for label in (1, 0, 1):
        assert torch.equal(chosen(label), whole.of_class(label))
    other = selection(photographs, judge, 1, grids, seed=6, device="cpu")
    assert not torch.equal(other(1), chosen(1))


def test_patches_come_from_the_whole_photograph(tmp_path):
    """Light at the right end alone, which the data's centre crop never sees."""
    pixels = np.zeros((40, 200, 3), np.uint8)
    pixels[:, 160:] = 255
    for name in ("light", "dark"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "0.png")
    data = load(DataSpec("wide", ("light", "dark"), (), 20), "train", tmp_path)
    assert data.fetch(torch.tensor([0])).max() == 0
    found = rded(data, teacher(), 1, size=24, factor=1, crops=60, jpeg_quality=None)
    light, dark = found.fetch(torch.arange(2)).float().mean((1, 2, 3)).tolist()
    assert light > 200 and dark == 0


def test_the_best_crop_of_an_image_stands_for_it():
    """One bright corner: of many crops, one inside it is found."""
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[0, :, :6, :6] = 255
    data = from_tensors("corner", "train", ("light", "dark"), images, torch.tensor([0, 1]))
    few, many = (
        rded(data, teacher(), 1, factor=1, crops=crops).fetch(torch.tensor([0])).float().mean()
        for crops in (1, 200)
    )
    assert many > few and many > 200


def test_the_grid_goes_row_by_row():
    patches = torch.arange(8.0)[:, None, None, None].expand(8, 1, 2, 2)
    found = grid(patches, 2)
    assert found.shape == (2, 1, 4, 4)
    assert found[0, 0, ::2, ::2].tolist() == [[0, 2], [4, 6]] and found[1, 0, ::2, ::2].tolist() == [
        [1, 3],
        [5, 7],
    ]


def test_cells_that_do_not_divide_the_side_are_a_pixel_longer_at_first():
    """8 px in three cells: 3, 3, 2; a patch of 2 px is stretched by repeating pixels."""
    patches = torch.arange(9.0)[:, None, None, None] + torch.tensor([[0, 0.25], [0.5, 0.75]])
    found = grid(patches, 3, size=8)[0, 0]
    assert found.shape == (8, 8)
    assert found[0].tolist() == [0, 0, 0.25, 1, 1, 1.25, 2, 2.25]
    assert found[:, 0].tolist() == [0, 0, 0.5, 3, 3, 3.5, 6, 6.5]


def test_sets_go_through_jpeg(tmp_path):
    """As PIL saves and reads a file by default: coarse colour detail is lost, another quality is another."""
    pixels = torch.randint(
        0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for index, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.jpg")
    files = [np.asarray(Image.open(tmp_path / f"{index}.jpg")) for index in range(2)]
    expected = torch.from_numpy(np.stack(files)).permute(0, 3, 1, 2)
    found = through_jpeg(pixels, Grids().jpeg_quality)
    assert torch.equal(found, expected) and (found.int() - pixels.int()).abs().float().mean() > 10
    assert not torch.equal(through_jpeg(pixels, 90), expected)
    data = from_tensors("noise", "train", ("light", "dark"), pixels, torch.tensor([0, 1]))
    stored, exact = (
        rded(data, teacher(), 1, factor=1, jpeg_quality=quality).fetch(torch.arange(2))
        for quality in (75, None)
    )
    assert torch.equal(stored, through_jpeg(exact, 75)) and not torch.equal(stored, exact)


def test_the_settings_are_rdeds():
    """Its scripts: 2 x 2 patches at 224 px of photographs; of CIFAR and Tiny-ImageNet one, in their size."""
    assert grids_of(256) == Grids(224, 2, 300, 5, 75)
    assert grids_of(32) == Grids(32, 1, 300, 5, 75) and grids_of(64, 10) == Grids(64, 1, 10, 5, 75)


def test_a_seed_draws_its_own_candidates_and_leaves_the_generator_alone(fashion_train):
    few = fashion_train.first(40)
    judge = Teacher(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), "linear", "none", few.classes, HALF, HALF, 0
    )
    state = torch.get_rng_state()
    a, again, b = (rded(few, judge, 2, candidates=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pixels = [found.fetch(torch.arange(20)) for found in (a, again, b)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def test_the_teacher_is_checked_before_it_selects(steps, monkeypatch):
    """It gets half of these images right: no candidate is drawn for one that should do better."""
    monkeypatch.setattr(ImageData, "per_class", None)
    with pytest.raises(ValueError, match=r"brightness \(none\) gets 50.0 % of 24 real images .* below 60 %"):
        rded(steps, teacher(least=60.0), 1)


def test_what_cannot_be_had_is_refused(steps):
    with pytest.raises(ValueError, match="class orders differ: label 0 is 'dark' in the teacher"):
        rded(steps, teacher(("dark", "light")), 1)
    with pytest.raises(ValueError, match=r"factor is 1 ... the image's side \(8\), .* got 9 and 5"):
        rded(steps, teacher(), 1, factor=9)
    with pytest.raises(ValueError, match=r"jpeg_quality is 1 ... 95 or None, got 100"):
        rded(steps, teacher(), 1, jpeg_quality=100)
    with pytest.raises(
        ValueError, match="ipc 4 with factor 2 needs 16 images a class, the smallest class has 12"
    ):
        rded(steps, teacher(), 4)


PEAK = """
import os, resource, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from igd_lib.baselines.rded import Grids, selection, split_of
from igd_lib.data.images import from_tensors
from igd_lib.sets.class_files import kept_by_class
from igd_lib.sets.class_files import ClassFiles
from igd_lib.teachers import Teacher

def rss():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1]) - shared()

def shared():  # pages of files, such as the code's
    return 4096 * int(Path("/proc/self/statm").read_text().split()[2])

classes, ipc = 200, 10
names = tuple(f"c{i:03d}" for i in range(classes))
labels = torch.arange(classes).repeat_interleave(ipc)
images = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
data = from_tensors("noise", "train", names, images, labels)
model = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, classes))
teacher = Teacher(model, "linear", "none", names, (0.5,) * 3, (0.5,) * 3, 0.0)
kept = ClassFiles(Path(sys.argv[1]), "noise", split_of(ipc, 1, 0), names, ipc, 224)
chosen = selection(data, teacher, ipc, Grids(224, 1, ipc, 1), seed=0, device="cpu")
before, most, running = rss(), [0], [True]

def watch():
    while running:
        most[0] = max(most[0], rss())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
found = kept_by_class("rded", {"seed": 0}, kept, lambda: chosen, "RDED")
running.clear()
watcher.join()
size = len(found) * 3 * 224 * 224
assert not found.slow
kept_by_class("rded", {"seed": 0}, kept, None, "RDED")  # from disk
print(size, most[0] - before)
"""


@pytest.mark.slow
def test_a_set_is_made_in_one_and_a_half_of_its_own_size(tmp_path):
    """300 MB of it, of noise, by a trivial teacher; what a class takes included."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(int, found.stdout.split())
    assert size > 300e6 and size <= peak < 1.5 * size
