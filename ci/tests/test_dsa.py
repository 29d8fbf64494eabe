"""DSA: every change against a loop over pixels, what is drawn, how families are composed, derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from igd_lib.data.dsa import FAMILIES, Change, Strategy, apply, diffaug, draw, dsa

OPERATIONS = ("brightness", "saturation", "contrast", "crop", "cutout", "flip", "scale", "rotate")
COLOUR = OPERATIONS[:3]


def noise(count: int = 3, side: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(operation: str) -> Strategy:
    return dsa("color" if operation in COLOUR else operation)


def values_of(operation: str, count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Parameters of an operation as they are drawn, for each of `count` images."""
    params = draw(only(operation), count, side, generator(seed), per_sample=True)
    return next(change.values for change in params if change.operation == operation)


# --- references: one image as nested lists [channel][row][column], one operation's parameters


def mean_of(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def pixel(image, channel: int, row: int, column: int) -> float:
    side = len(image[0])
    return image[channel][row][column] if 0 <= row < side and 0 <= column < side else 0.0


def colour_by_hand(operation: str, image, value: float, c: int, i: int, j: int) -> float:
    x = image[c][i][j]
    if operation == "brightness":
        return x + value
    if operation == "saturation":
        centre = mean_of(image[k][i][j] for k in range(3))
    else:
        centre = mean_of(x for plane in image for row in plane for x in row)
    return centre + (x - centre) * value


def bilinear(image, c: int, y: float, x: float) -> float:
    """At a place in px, pixel centres at whole numbers."""
    top, left = math.floor(y), math.floor(x)
    return sum(
        (1 - abs(y - row)) * (1 - abs(x - column)) * pixel(image, c, row, column)
        for row in (top, top + 1)
        for column in (left, left + 1)
    )


def moved_by_hand(operation: str, image, values, c: int, i: int, j: int) -> float:
    side = len(image[0])
    middle = (side - 1) / 2
    y, x = i - middle, j - middle  # from the centre, px
    if operation == "crop":
        return pixel(image, c, i + int(values[0]), j + int(values[1]))
    if operation == "flip":
        return image[c][i][side - 1 - j] if values[0] < 0.5 else image[c][i][j]
    if operation == "cutout":
        length = int(0.5 * side + 0.5)
        rows, columns = (range(int(v) - length // 2, int(v) - length // 2 + length) for v in values)
        return 0.0 if i in rows and j in columns else image[c][i][j]
    if operation == "scale":
        return bilinear(image, c, middle + values[1] * y, middle + values[0] * x)
    cos, sin = math.cos(values[0]), math.sin(values[0])
    return bilinear(image, c, middle + sin * x + cos * y, middle + cos * x - sin * y)


def by_hand(operation: str, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel in Python's floats."""
    found, rows = torch.empty_like(images), values.expand(len(images), -1).tolist()
    for number, image in enumerate(images.tolist()):
        for c in range(3):
            for i in range(images.shape[2]):
                for j in range(images.shape[3]):
                    own = (operation, image, rows[number])
                    found[number, c, i, j] = (
                        colour_by_hand(operation, image, rows[number][0], c, i, j)
                        if operation in COLOUR
                        else moved_by_hand(*own, c, i, j)
                    )
    return found


# --- what a change does


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("side", [6, 9])  # cutout: an odd length, an odd side
def test_a_change_is_its_definition(operation, side):
    """Each image by its own parameters, then all by the first one's."""
    images = noise(4, side)
    values = values_of(operation, 4, side, seed=1)
    assert len(values.unique(dim=0)) > 1
    for own in (values, values[:1]):
        found, expected = apply(images, (Change(operation, own),)), by_hand(operation, images, own)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert (found - images).abs().max() > 0.01  # but the last of the flips all change something


def test_a_hole_is_clipped_at_the_border():
    images = torch.ones(2, 3, 8, 8)
    corners = torch.tensor([[0, 0], [8, 4]])
    found = apply(images, (Change("cutout", corners),))
    assert (found[0, 0] == 0).nonzero().tolist() == [[i, j] for i in (0, 1) for j in (0, 1)]
    assert (found[1, 0] == 0).nonzero().tolist() == [[i, j] for i in (6, 7) for j in (2, 3, 4, 5)]


def test_grey_images_have_no_saturation():
    grey = noise()[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(apply(grey, (Change("saturation", torch.tensor([[1.7]])),)), grey)


def test_a_quarter_turn_is_torchs():
    """The sense of a rotation, and that its centre is the image's."""
    images = noise(1, 5)
    quarter = torch.tensor([[math.pi / 2]], dtype=torch.float64)
    found = apply(images, (Change("rotate", quarter),))
    torch.testing.assert_close(found, images.rot90(1, (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_derivatives_of_both_orders_pass(operation):
    images = noise(2, 5).requires_grad_()
    params = (Change(operation, values_of(operation, 2, 5, seed=3)),)
    assert gradcheck(lambda x: apply(x, params), (images,))
    assert gradgradcheck(lambda x: apply(x, params) ** 3, (images,))
    assert torch.autograd.grad(apply(images, params).sum(), images)[0].abs().sum() > 0


# --- what is drawn


@pytest.mark.parametrize(
    ("operation", "low", "high"),
    [
        ("brightness", -0.5, 0.5),
        ("saturation", 0.0, 2.0),
        ("contrast", 0.5, 1.5),
        ("flip", 0.0, 1.0),
        ("scale", 1 / 1.2, 1.2),
        ("rotate", -15 / 180 * math.pi, 15 / 180 * math.pi),
    ],
)
def test_draws_are_uniform_in_their_range(operation, low, high):
    values = values_of(operation, 4000, 32)
    assert values.shape == (4000, 2 if operation == "scale" else 1)
    share = (values - low) / (high - low)
    assert 0 <= share.min() < 0.002 and 0.998 < share.max() < 1
    quarters = (share * 4).long().flatten().bincount(minlength=4) / share.numel()
    assert (quarters - 0.25).abs().max() < 0.025
    if operation == "scale":  # the axes are independent
        assert abs(torch.corrcoef(values.T)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("operation", "side", "low", "high"),
    [
        ("crop", 32, -4, 4),
        ("crop", 28, -4, 4),  # 3.5 is rounded up
        ("cutout", 32, 0, 32),  # a hole of 16 px
        ("cutout", 30, 0, 29),  # one of 15 px
    ],
)
def test_whole_px_are_drawn_uniformly(operation, side, low, high):
    values = values_of(operation, 8000, side)
    counts = (values - low).flatten().bincount()
    assert len(counts) == high - low + 1 and values.min() == low and values.max() == high
    mean = 16000 / len(counts)
    assert (counts - mean).abs().max() < 5 * mean**0.5
    assert abs(torch.corrcoef(values.T.double())[0, 1]) < 0.05


def test_dsa_takes_one_family_a_call():
    own, count = generator(), 3000
    seen: dict[tuple[str, ...], int] = {}
    for _ in range(count):
        names = tuple(change.operation for change in draw(dsa(), 1, 8, own, per_sample=False))
        seen[names] = seen.get(names, 0) + 1
    assert set(seen) == {COLOUR, *((name,) for name in OPERATIONS[3:])}
    assert all(abs(number / count - 1 / 6) < 0.03 for number in seen.values())
    assert dsa() == dsa("color_crop_cutout_flip_scale_rotate") and dsa().one_of == FAMILIES
    assert dsa("crop_flip").one_of == ("crop", "flip")


def test_diffaug_is_flip_colour_one_of_the_rest_cutout():
    named = "color_crop_cutout_flip_scale_rotate"
    own, middle = generator(), set()
    for _ in range(60):
        names = [change.operation for change in draw(diffaug(named), 1, 8, own, per_sample=False)]
        assert names[:4] == ["flip", *COLOUR] and names[5:] == ["cutout"]
        middle.add(names[4])
    assert middle == {"crop", "scale", "rotate"}
    matching = [change.operation for change in draw(diffaug(), 1, 8, own, per_sample=False)]
    assert matching == [*COLOUR, "crop", "cutout"]
    training = [change.operation for change in draw(diffaug("color_crop"), 1, 8, own, per_sample=False)]
    assert training == [*COLOUR, "crop"]


@pytest.mark.parametrize("strategy", [dsa(), diffaug()])
def test_changes_come_one_after_the_other(strategy):
    images, params = noise(3, 8), draw(strategy, 3, 8, generator(5), per_sample=True)
    expected = images
    for change in params:
        expected = by_hand(change.operation, expected, change.values)
    torch.testing.assert_close(apply(images, params), expected, rtol=0, atol=1e-12)


def test_both_sides_get_the_same_change():
    """Siamese: the images of one batch in another, of another length, come out alike."""
    real, few = noise(7, 8, seed=1), noise(7, 8, seed=1)[2:4]
    for seed in range(20):
        params = draw(dsa(), 7, 8, generator(seed), per_sample=False)
        assert all(len(change.values) == 1 for change in params)
        assert torch.equal(apply(real, params)[2:4], apply(few, params))
    each = draw(dsa("rotate"), 7, 8, generator(), per_sample=True)
    assert len(each[0].values.unique()) == 7


def test_a_generator_gives_the_same_and_no_other_moves():
    state = torch.get_rng_state()
    first, again, other = (
        [draw(diffaug(), 4, 8, generator(seed), per_sample=True) for _ in range(2)][1] for seed in (0, 0, 1)
    )
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.values, two.values) and not torch.equal(one.values, three.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_keep_their_type_and_none_named_changes_nothing():
    images = noise().float()
    for name in FAMILIES:
        found = apply(images, draw(dsa(name), 3, 6, generator(), per_sample=True))
        assert found.dtype == torch.float32 and found.shape == images.shape
    assert draw(dsa(""), 3, 6, generator(), per_sample=True) == () and apply(images, ()) is images


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'colour'; known: color, crop"):
        dsa("colour_crop")
    with pytest.raises(ValueError, match="unknown augmentation 'zoom'"):
        diffaug("color_zoom")
