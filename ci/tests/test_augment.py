"""The protocols' augmentation: crops, colours, CutMix and the patch shuffle."""

from dataclasses import replace

import pytest
import torch

from igd_lib.data import augment as module
from igd_lib.data.augment import augment, centre, cutmix, normalise, resize, shuffle_patches
from igd_lib.protocols import Protocol

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


def test_crop_keeps_its_share_of_the_area(pixels):
    """On a ramp in x and y the crop's extent can be read off: its area share is the drawn one."""
    ramp = torch.linspace(0, 1, 64)
    protocol = replace(PLAIN, image_size=64, crop_scale=(0.5, 1.0))
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(
        500, -1, -1, -1
    )
    found = augment(images, protocol, generator())
    width = (found[:, 0].amax((1, 2)) - found[:, 0].amin((1, 2))).double()
    height = (found[:, 1].amax((1, 2)) - found[:, 1].amin((1, 2))).double()
    area, ratio = width * height, width / height
    assert area.min() > 0.47 and area.max() <= 1 + 1e-6
    assert area.mean().item() == pytest.approx(0.75, abs=0.03)
    assert ratio.min() > 3 / 4 - 0.02 and ratio.max() < 4 / 3 + 0.02
    # The crop's centre moves over everything that is left.
    left = found[:, 0].amin((1, 2))
    assert left.min() < 0.02 and ((1 - width - left) < 0.02).any()


def test_crop_is_filled_from_inside_the_image(pixels):
    ones = torch.ones(64, 3, 32, 32)
    torch.testing.assert_close(
        augment(ones, replace(PLAIN, crop_scale=(0.5, 1.0), flip=True), generator()), ones
    )


def test_jitter_by_hand(pixels):
    """Grey images have nothing to saturate: brightness and contrast map x to a growing function in [0, 1]."""
    found = augment(pixels, replace(PLAIN, jitter=0.4), generator())
    assert found.min() >= 0 and found.max() <= 1
    assert (found - pixels).abs().amax((1, 2, 3)).min() > 1e-3  # every image changes
    flat = augment(torch.full((200, 3, 8, 8), 0.5), replace(PLAIN, jitter=0.4), generator())
    # A flat grey image only feels brightness: 0.5 times a factor in [0.6, 1.4].
    assert flat.std((1, 2, 3)).max() < 1e-5
    assert 0.3 - 1e-5 <= flat.min() < 0.33 and 0.67 < flat.max() <= 0.7 + 1e-5


def test_lighting_shifts_along_the_principal_components():
    """The shift of flat images has the covariance V diag(0.1 lambda)^2 V^T."""
    found = augment(torch.full((20_000, 3, 4, 4), 0.5), replace(PLAIN, lighting=0.1), generator()) - 0.5
    assert found.std((2, 3)).max() < 1e-5
    vectors, values = module._EIGENVECTORS, module._EIGENVALUES
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=2e-3)  # orthonormal
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(found[:, :, 0, 0].T.cov(), expected, rtol=0.1, atol=1e-5)


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


def test_patch_shuffle_keeps_every_pixel_of_sizes_that_do_not_divide():
    image = torch.arange(3 * 7 * 7.0).reshape(1, 3, 7, 7)
    found = shuffle_patches(image.expand(20, -1, -1, -1), 3, generator())
    assert all(sorted(each.flatten().tolist()) == image.flatten().tolist() for each in found)
    assert len({each.numpy().tobytes() for each in found}) > 5
    with pytest.raises(ValueError, match="7 px into 8 strips"):
        shuffle_patches(image, 8, generator())


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
