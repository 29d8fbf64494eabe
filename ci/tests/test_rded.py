"""RDED: which patches are taken, where they go, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from igd_lib.baselines.rded import grid, rded
from igd_lib.data.images import from_tensors
from igd_lib.teachers import Teacher

HALF = (0.5, 0.5, 0.5)


class Brightness(nn.Module):
    """A teacher that is the surer of class 0 the brighter the image; black frames do not count."""

    def forward(self, images):
        light = images.sum((1, 2, 3)) / 100
        return torch.stack([light, -light], 1)


def teacher(classes=("light", "dark")) -> Teacher:
    return Teacher(Brightness(), "brightness", "none", tuple(classes), HALF, HALF)


@pytest.fixture
def steps():
    """Two classes of twelve uniform 8 px images each: image i of either class has grey level 20 i."""
    levels = torch.arange(12).repeat(2) * 20
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8).contiguous()
    return from_tensors("steps", "train", ("light", "dark"), images, torch.arange(2).repeat_interleave(12))


def test_the_surest_patches_are_taken_best_first(steps):
    """Class 0 takes the eight brightest, class 1 the eight darkest; the best two in the first cells."""
    found = rded(steps, teacher(), 2, factor=2)
    assert found.labels.tolist() == [0, 0, 1, 1] and found.image_size == 8 and found.classes == steps.classes
    images = found.fetch(torch.arange(4))
    cells = images[:, 0, ::4, ::4].flatten(1) // 20  # the level of each cell
    assert cells.tolist() == [[11, 9, 7, 5], [10, 8, 6, 4], [0, 2, 4, 6], [1, 3, 5, 7]]
    blocks = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).transpose(3, 4).flatten(4)
    assert (blocks == blocks[..., :1]).all()  # uniform cells: no patch crosses a border


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
    patches = torch.arange(8)[:, None, None, None].expand(8, 1, 2, 2)
    found = grid(patches, 2)
    assert found.shape == (2, 1, 4, 4)
    assert found[0, 0, ::2, ::2].tolist() == [[0, 2], [4, 6]] and found[1, 0, ::2, ::2].tolist() == [
        [1, 3],
        [5, 7],
    ]


def test_a_seed_draws_its_own_candidates_and_leaves_the_generator_alone(fashion_train):
    few = fashion_train.first(40)
    judge = Teacher(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), "linear", "none", few.classes, HALF, HALF
    )
    state = torch.get_rng_state()
    a, again, b = (rded(few, judge, 2, candidates=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pixels = [found.fetch(torch.arange(20)) for found in (a, again, b)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def test_what_cannot_be_had_is_refused(steps):
    with pytest.raises(ValueError, match="class orders differ: label 0 is 'dark' in the teacher"):
        rded(steps, teacher(("dark", "light")), 1)
    with pytest.raises(ValueError, match=r"factor divides the image's side \(8\), got 3"):
        rded(steps, teacher(), 1, factor=3)
    with pytest.raises(
        ValueError, match="ipc 4 with factor 2 needs 16 images a class, the smallest class has 12"
    ):
        rded(steps, teacher(), 4)
