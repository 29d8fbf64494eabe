"""The protocols' augmentation: crops, colours, CutMix, mixup and the patch shuffle."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from igd_lib.data import augment as module
from igd_lib.data.augment import (
    augment,
    centre,
    change_colours,
    crop_boxes,
    cutmix,
    light,
    mixup,
    normalise,
    resize,
    resized_crop,
    shuffle_patches,
)
from igd_lib.protocols import IGD_HARD, SMALL_HARD, SMALL_SOFT, Protocol

HALF = (0.5, 0.5, 0.5)
PLAIN = Protocol(
    "plain",
    32,
    HALF,
    HALF,
    "adamw",
    1e-3,
    0.01,
    crop_scale=(1.0, 1.0),
    flip=False,
    jitter=0.0,
    lighting=0.0,
    cutmix=0.0,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pixels():
    """Smooth colour images in [0, 1], so that interpolation is nearly exact."""
    small = torch.rand(64, 3, 4, 4, generator=generator())
    return torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)


# --- augmentation


def test_no_augmentation_is_the_identity(pixels):
    torch.testing.assert_close(augment(pixels, PLAIN, generator()), pixels, rtol=0, atol=1e-5)


def test_flip_mirrors_about_half_of_the_images(pixels):
    found = augment(pixels, replace(PLAIN, flip=True), generator())
    same = (found - pixels).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (found - pixels.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (same | mirrored).all()
    assert 16 <= mirrored.sum() <= 48


def mean_area(least):
    """Of boxes drawn until they fit: a share a fits a log-uniform ratio r where |log r| <= -log a."""

    def fits(area):
        return min(1.0, -math.log(area) / math.log(4 / 3))

    ends = sorted({least, max(least, 3 / 4), 1.0})
    above, below = (
        sum(integrate.quad(f, a, b)[0] for a, b in itertools.pairwise(ends))
        for f in (lambda a: a * fits(a), fits)
    )
    return above / below


@pytest.mark.parametrize(("least", "mean"), [(0.5, 0.693), (0.25, None), (0.08, None)])
def test_the_mean_area_of_crops(least, mean):
    boxes = crop_boxes(60_000, 224, (least, 1.0), generator()).double()
    found = (boxes[:, 2] * boxes[:, 3] / 224**2).mean().item()
    assert found == pytest.approx(mean_area(least), abs=0.003)
    assert mean is None or found == pytest.approx(mean, abs=0.003)


def test_crops_are_distributed_as_torchvisions():
    """Areas, ratios, sides and places of 4,000 boxes each, at a size where rounding to px matters."""
    image = torch.zeros(3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
        ).double()
    ours = crop_boxes(4000, 32, (0.3, 1.0), generator()).double()
    for value in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 3],
        lambda box: box[:, 2],
        lambda box: box[:, 0] / (33 - box[:, 2]),
        lambda box: box[:, 1] / (33 - box[:, 3]),
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 1e-3
    assert ours.min() == 0 and ours[:, 2:].min() >= 1
    assert (ours[:, :2] + ours[:, 2:]).max() == 32


def test_a_crop_that_never_fits_is_the_whole_image():
    whole = torch.tensor([0, 0, 20, 20]).expand(50, 4)
    assert torch.equal(crop_boxes(50, 20, (1.5, 2.0), generator()), whole)
    assert torch.equal(crop_boxes(50, 20, (1.0, 1.0), generator()), whole)


@pytest.mark.parametrize("size", [24, 32, 40])
def test_a_crop_is_resized_as_torchvisions(size):
    """Antialiased, as where crops are larger than the network's input; elsewhere that changes nothing."""
    pixels = torch.rand(30, 3, 32, 32, generator=generator(), dtype=torch.float64)
    boxes = crop_boxes(30, 32, (0.08, 1.0), generator(1))
    found, shape = resized_crop(pixels, boxes, size), [size, size]
    for image, box, ours in zip(pixels, boxes.tolist(), found, strict=True):
        theirs = TF.resized_crop(image, *box, shape, antialias=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        if max(box[2:]) <= size:
            plain = TF.resized_crop(image, *box, shape, antialias=False)
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    single = resized_crop(pixels.float(), boxes, size)
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-6)


def test_augment_crops_and_flips_each_image_by_its_own_draw(monkeypatch):
    """With what was drawn, torchvision's functions give the same images."""
    drawn, real = [], module.crop_boxes
    monkeypatch.setattr(module, "crop_boxes", lambda *args: drawn.append(real(*args)) or drawn[-1])
    pixels = torch.rand(20, 3, 32, 32, generator=generator())
    found = augment(pixels, replace(PLAIN, image_size=28, crop_scale=(0.5, 1.0), flip=True), generator())
    mirrored = 0
    for image, box, ours in zip(pixels, drawn[0].tolist(), found, strict=True):
        theirs = TF.resized_crop(image, *box, [28, 28], antialias=True)
        straight, turned = ((ours - x).abs().max().item() < 1e-4 for x in (theirs, theirs.flip(2)))
        assert straight != turned
        mirrored += turned
    assert 3 <= mirrored <= 17


def test_crop_is_filled_from_inside_the_image(pixels):
    ones = torch.ones(64, 3, 32, 32)
    torch.testing.assert_close(
        augment(ones, replace(PLAIN, crop_scale=(0.5, 1.0), flip=True), generator()), ones
    )


def test_colours_against_a_float64_reference():
    """Minimax's jitter: x + a (base - x) with a = 1 - factor; base black, the mean of grey, grey."""
    pixels = torch.rand(12, 3, 5, 7, generator=generator())
    factors = 0.6 + 0.8 * torch.rand(12, 3, generator=generator(1))
    order = torch.tensor(list(itertools.permutations(range(3))) * 2)
    found = change_colours(pixels, factors, order).double().numpy()
    for image, own, kinds, ours in zip(pixels, factors, order.tolist(), found, strict=True):
        x = image.double().numpy()
        for kind in kinds:
            grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
            base = (0.0, grey.mean(), grey)[kind]
            x = x + (1 - float(own[kind])) * (base - x)
        np.testing.assert_allclose(ours, x, rtol=0, atol=1e-6)
    assert found.min() < -0.01 and found.max() > 1.01  # nothing is clamped


def test_colours_are_drawn_for_each_image(monkeypatch):
    """Factors uniform in [0.6, 1.4], independent of each other; each of the six orders equally often."""
    drawn = []
    monkeypatch.setattr(module, "change_colours", lambda pixels, *rest: drawn.append(rest) or pixels)
    augment(torch.zeros(6000, 3, 1, 1), replace(PLAIN, image_size=1, jitter=0.4), generator())
    ((factors, order),) = drawn
    for column in factors.double().T:
        assert stats.kstest(column, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.05
    assert (order.sort(dim=1).values == torch.arange(3)).all()
    counts = (order @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


def test_colours_leave_the_unit_range_as_often_as_minimaxs(pixels):
    """Uniform noise: about an eighth of the values (0.118 in their code, on 200 images)."""
    noise = torch.rand(400, 3, 32, 32, generator=generator())
    found = augment(noise, replace(PLAIN, jitter=0.4), generator())
    assert ((found < 0) | (found > 1)).double().mean().item() == pytest.approx(0.12, abs=0.015)


@pytest.mark.parametrize(
    "protocol",
    [SMALL_HARD, SMALL_SOFT, replace(SMALL_HARD, jitter=0.4)],
    ids=["hard", "soft", "with jitter"],
)
def test_grey_images_stay_grey_in_the_stand_ins_protocols(pixels, protocol):
    grey = pixels[:, :1].expand(-1, 3, -1, -1).contiguous()
    found = augment(grey, protocol, generator())
    assert torch.equal(found, found[:, :1].expand_as(found))
    coloured = augment(grey, replace(protocol, lighting=IGD_HARD.lighting), generator())
    assert (coloured - coloured[:, :1]).abs().max() > 1e-3


def test_lighting_against_a_float64_reference():
    """The shift of channel c: the sum over components j of vector[c][j] value[j] strength[j]."""
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    strengths = 0.1 * torch.randn(50, 3, generator=generator())
    pixels = torch.rand(50, 3, 4, 4, generator=generator(1))
    expected = np.einsum("cj,j,nj->nc", vectors, values, strengths.double().numpy())
    found = (light(pixels, strengths).double() - pixels.double()).numpy()
    np.testing.assert_allclose(found, expected[:, :, None, None] + np.zeros((4, 4)), rtol=0, atol=2e-7)


def test_lighting_is_drawn_with_its_deviation():
    """The shift of flat images has the covariance V diag(0.1 lambda)^2 V^T."""
    found = augment(
        torch.full((20_000, 3, 4, 4), 0.5), replace(PLAIN, image_size=4, lighting=0.1), generator()
    )
    shift = found - 0.5
    assert shift.std((2, 3)).max() < 1e-5
    vectors, values = torch.tensor(module.EIGENVECTORS), torch.tensor(module.EIGENVALUES)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=2e-3)  # orthonormal
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(shift[:, :, 0, 0].T.cov(), expected, rtol=0.1, atol=1e-5)


def test_augmentation_is_drawn_a_sample(pixels):
    same = pixels[:1].expand(8, -1, -1, -1)
    for change in ({"crop_scale": (0.5, 0.9)}, {"jitter": 0.4}, {"lighting": 0.1}):
        found = augment(same, replace(PLAIN, **change), generator())
        assert len({image.numpy().tobytes() for image in found}) == 8
        again = augment(same, replace(PLAIN, **change), generator())
        assert torch.equal(found, again)


# --- CutMix


def test_cutmix_share_is_the_area_that_is_left():
    labels = torch.arange(16)
    inputs = labels.float().reshape(16, 1, 1, 1).expand(-1, 3, 13, 10).contiguous()  # image i is all i
    shares = []
    for seed in range(200):
        mixed, other, share = cutmix(inputs, labels, 1.0, generator(seed))
        assert sorted(other.tolist()) == labels.tolist()
        for i, j in enumerate(other.tolist()):
            pasted = mixed[i] != i
            assert (mixed[i][pasted] == j).all()
            if j != i:
                assert 1 - pasted[0].sum().item() / 130 == share
                assert torch.equal(pasted[0], pasted[1])
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.9
    assert (inputs[3] == 3).all()  # the inputs themselves are left alone


def test_mixup_is_a_weighted_mean():
    labels = torch.arange(16)
    inputs = torch.rand(16, 3, 4, 4, generator=generator())
    shares = []
    for seed in range(300):
        mixed, other, share = mixup(inputs, labels, 0.8, generator(seed))
        assert sorted(other.tolist()) == labels.tolist()
        torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs[other])
        shares.append(share)
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_off():
    inputs, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixed, other, share = cutmix(inputs, labels, 0.0, generator())
    assert mixed is inputs and other is labels and share == 1


# --- patches, sizes


def test_patch_shuffle_permutes_whole_patches():
    """8 px in 2 strips a side: one of four arrangements of the quarters, each about equally often."""
    quarters = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    found = shuffle_patches(quarters.expand(400, 3, 8, 8), 2, generator())
    seen = {}
    for image in found:
        assert torch.equal(image[0], image[1])
        corners = tuple(image[0, ::4, ::4].flatten().tolist())
        assert torch.equal(
            image[0], torch.tensor(corners).reshape(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        )
        seen[corners] = seen.get(corners, 0) + 1
    assert set(seen) == {
        (0, 1, 2, 3),
        (1, 0, 3, 2),
        (2, 3, 0, 1),
        (3, 2, 1, 0),
    }  # columns swap together, and so do rows
    assert min(seen.values()) > 60


def test_patch_shuffle_drops_what_does_not_divide():
    """As RDED's: 11 px in 3 strips of 3 px, the last two rows and columns gone."""
    image = torch.arange(3 * 11 * 11.0).reshape(1, 3, 11, 11)
    found = shuffle_patches(image.expand(20, -1, -1, -1), 3, generator())
    assert found.shape == (20, 3, 9, 9)
    kept = sorted(image[..., :9, :9].flatten().tolist())
    assert all(sorted(each.flatten().tolist()) == kept for each in found)
    assert len({each.numpy().tobytes() for each in found}) > 5
    with pytest.raises(ValueError, match="11 px into 12 strips"):
        shuffle_patches(image, 12, generator())


def test_augment_shuffles_patches_when_asked(pixels):
    found = augment(pixels, replace(PLAIN, patch_factor=2), generator())
    unmoved = (found - pixels).abs().amax((1, 2, 3)) < 1e-4
    assert 4 <= unmoved.sum() <= 32  # a quarter of 64 is expected
    torch.testing.assert_close(found.mean((2, 3)), pixels.mean((2, 3)), rtol=0, atol=1e-5)


def test_crops_come_out_at_the_protocols_size(pixels):
    assert augment(pixels, replace(PLAIN, image_size=24), generator()).shape == (64, 3, 24, 24)


def test_resize_centre_and_normalise_by_hand():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(-1, 3, -1, -1)
    assert torch.equal(resize(images, 0), images.float() / 255)
    assert resize(images, 4).shape == (1, 3, 4, 4) and resize(images, 4)[0, 0, 0, 0] > 0
    assert torch.equal(centre(images, 4), images[..., 2:6, 2:6])
    found = normalise(torch.full((1, 3, 1, 1), 0.6), (0.5, 0.6, 0.2), (0.1, 0.2, 0.4)).flatten()
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1.0]))
