"""Anchors of a class: the rules on latents, and what is kept of a data set in the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from igd_lib import anchors
from igd_lib.anchors import Anchors, RealLatents, k_means, nearest, pooled, random
from igd_lib.data.images import from_tensors, to_float

SIZES = (9, 4, 6)


def clusters(seed: int = 0, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Latents (19, 2, 8, 8) about three far places, in a random order, and whose place each is."""
    generator = torch.Generator().manual_seed(seed)
    places = 3 * torch.randn(3, 2, 8, 8, generator=generator)
    owner = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    owner = owner[torch.randperm(len(owner), generator=generator)]
    return places[owner] + spread * torch.randn(len(owner), 2, 8, 8, generator=generator), owner


def lloyd(points: Tensor, centres: list[Tensor]) -> list[Tensor]:
    """k-means by plain loops from given centres, until nothing changes."""
    while True:
        owned: list[list[Tensor]] = [[] for _ in centres]
        for point in points.double():
            distances = [float(((point - centre) ** 2).sum()) for centre in centres]
            owned[distances.index(min(distances))].append(point)
        found = [sum(own) / len(own) for own in owned]
        if all(torch.equal(a, b) for a, b in zip(found, centres, strict=True)):
            return found
        centres = found


# --- the rules


def test_k_means_is_a_naive_lloyd_s():
    """From one latent of each place; the largest cluster comes first."""
    latents, owner = clusters()
    first = [latents[owner == number][0].double() for number in range(3)]
    expected = torch.stack(lloyd(latents, first))[[0, 2, 1]]  # of 9, 6 and 4 latents
    torch.testing.assert_close(k_means(latents, 3).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 19])
def test_k_means_leaves_no_latent_with_a_nearer_centre(k):
    """A fixed point: each centre is the mean of those that are nearest to it."""
    latents = clusters(spread=2.0)[0].double()
    centres = k_means(latents, k)
    owner = torch.cdist(latents.flatten(1), centres.flatten(1)).argmin(1)
    sizes = owner.bincount(minlength=k)
    for number in range(k):
        torch.testing.assert_close(latents[owner == number].mean(0), centres[number])
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


@pytest.mark.parametrize("rule", [k_means, nearest, random, pooled])
def test_a_rule_is_the_same_every_time(rule):
    latents, _ = clusters(spread=2.0)
    torch.manual_seed(5)
    first = rule(latents, 4, seed=3)
    torch.manual_seed(6)
    assert torch.equal(first, rule(latents, 4, seed=3)) and first.shape == (4, 2, 8, 8)
    assert first.dtype == torch.float32
    for k in (0, 20):
        with pytest.raises(ValueError, match=rf"{k} anchors of a class with 19 real images"):
            rule(latents, k)


def test_nearest_is_real_and_the_nearest():
    latents, _ = clusters(spread=2.0)
    centres, found = k_means(latents, 4), nearest(latents, 4)
    for centre, own in zip(centres, found, strict=True):
        distances = [float((one - centre).norm()) for one in latents]
        assert torch.equal(own, latents[distances.index(min(distances))])
    assert not torch.equal(found, centres)


def test_random_draws_real_ones_none_twice():
    latents, _ = clusters()
    found = random(latents, 19)
    assert sorted(found.flatten(1).sum(1).tolist()) == sorted(latents.flatten(1).sum(1).tolist())
    assert not torch.equal(random(latents, 5), random(latents, 5, seed=1))
    assert torch.equal(random(latents, 5), found[:5])  # fewer are the first of more


def test_pooled_clusters_what_is_averaged_and_gives_whole_means():
    """Two groups that differ on average, under stronger differences that average out."""
    generator = torch.Generator().manual_seed(1)
    group = torch.arange(12) % 3 == 0
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    signs = torch.randn(12, 1, 1, 1, generator=generator).sign()
    latents = group.float()[:, None, None, None] + 5 * signs * checks + torch.zeros(12, 2, 8, 8)
    latents += 0.05 * torch.randn(12, 2, 8, 8, generator=generator)
    found = pooled(latents, 2)
    torch.testing.assert_close(found, torch.stack([latents[~group].mean(0), latents[group].mean(0)]))
    by_sign = torch.stack([latents[signs.flatten() == sign].mean(0) for sign in (1, -1)])
    whole = k_means(latents, 2)
    assert min((whole - by_sign).norm(), (whole - by_sign.flip(0)).norm()) < 1e-4


def test_too_few_different_latents_are_refused():
    latents = clusters()[0][:2].repeat(4, 1, 1, 1)
    with pytest.warns(Warning, match="distinct clusters"), pytest.raises(ValueError, match="fewer than 3"):
        k_means(latents, 3)


# --- of a data set


@pytest.fixture
def real(tiny, toy_data):
    """The latents of the toy data by the tiny autoencoder."""
    return RealLatents(toy_data, tiny().vae, 16)


def test_latents_are_scaled_means_in_file_order(real, toy_data):
    for label in range(3):
        images = to_float(toy_data.of_class(label))
        with torch.no_grad():
            expected = real.vae.encode(images).latent_dist.mean * real.vae.config.scaling_factor
        torch.testing.assert_close(real(label), expected, rtol=1e-5, atol=1e-6)


def test_images_come_to_the_model_s_size(real, toy_data):
    other = RealLatents(toy_data, real.vae, 32)
    assert real(0).shape == (6, 4, 8, 8) and other(0).shape == (6, 4, 16, 16)
    assert other.folder != real.folder


def test_what_is_there_is_read(real, monkeypatch, toy_data):
    """Neither encoded nor clustered again, by whoever has the same data and weights."""
    made = Anchors(real, 2)
    first = [made(label) for label in range(3)]
    monkeypatch.setattr(RealLatents, "_encoded", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setitem(anchors.RULES, "k-means", lambda *_, **__: pytest.fail("clustered again"))
    again = Anchors(RealLatents(toy_data, real.vae, 16), 2)
    assert all(torch.equal(again(label), own) for label, own in enumerate(first))


def test_keeping_makes_the_classes_that_are_asked_for(real):
    made = Anchors(real, 2)
    made.keep([0, 2])
    assert [path.stem for path in sorted(real.folder.glob("*.safetensors"))] == ["00000", "00002"]
    shuffled = Anchors(real, 2, "shuffled")
    shuffled.keep([0])
    assert [path.stem for path in sorted(real.folder.glob("*.safetensors"))] == ["00000", "00001", "00002"]


def test_anchors_are_the_rule_s_of_the_class(real):
    for name, rule in anchors.RULES.items():
        made = Anchors(real, 3, name, seed=2)
        for label in range(3):
            source = (label + 1) % 3 if name == "shuffled" else label
            assert torch.equal(made(label), rule(real(source), 3, seed=2))


def test_shuffled_anchors_are_another_class_s(real):
    """Each class's go to one other, and none keeps its own."""
    own, other = Anchors(real, 2), Anchors(real, 2, "shuffled")
    sources = [other.source(label) for label in range(3)]
    assert sorted(sources) == [0, 1, 2] and all(source != label for label, source in enumerate(sources))
    for label in range(3):
        assert torch.equal(other(label), own(sources[label])) and not torch.equal(other(label), own(label))


def test_what_decides_them_names_them(real, toy_data, tiny):
    other = tiny().vae
    with torch.no_grad():
        next(iter(other.parameters())).add_(0.1)
    found = [
        Anchors(real, 2),
        Anchors(real, 3),
        Anchors(real, 2, "nearest"),
        Anchors(real, 2, seed=1),
        Anchors(RealLatents(toy_data.first(5), real.vae, 16), 2),
        Anchors(RealLatents(toy_data, other, 16), 2),
        Anchors(RealLatents(replace(toy_data, name="another"), real.vae, 16), 2),
    ]
    assert len({str(one._path(0)) for one in found}) == len(found)


def test_what_cannot_be_is_refused(real, toy_data):
    with pytest.raises(ValueError, match="anchors are by one of k-means, nearest"):
        Anchors(real, 2, "median")
    with pytest.raises(ValueError, match="one class alone"):
        Anchors(RealLatents(toy_data.of_labels([0]), real.vae, 16), 2, "shuffled")
    with pytest.raises(ValueError, match="7 anchors of a class with 6 real images"):
        Anchors(real, 7)(0)
    empty = from_tensors("toy", "train", ("a", "b"), toy_data.of_class(0), torch.zeros(6))
    with pytest.raises(ValueError, match="class 'b' of toy has no images"):
        RealLatents(empty, real.vae, 16)(1)


def test_images_of_a_large_class_are_encoded_in_parts(real, monkeypatch):
    whole = real(1)
    monkeypatch.setattr(anchors, "ENCODED", 4)
    torch.testing.assert_close(real._encoded(1), whole, rtol=1e-5, atol=1e-6)
