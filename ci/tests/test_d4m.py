"""D4M: which latents are clustered in what order, what becomes of the centres, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from igd_lib.baselines import d4m as module
from igd_lib.baselines.d4m import D4M, d4m, prototypes
from igd_lib.baselines.img2img import DiT
from igd_lib.data.images import from_tensors, to_uint8
from igd_lib.distillation import image_generator
from igd_lib.sampler import Denoiser, sample

SHORT = replace(D4M.small(), num_steps=4)


@pytest.fixture
def backbone(tiny_pipe) -> DiT:
    """Of three classes, ids 7, 3 and 5."""
    return DiT(tiny_pipe, (7, 3, 5))


def groups(sizes=(6, 3, 5), classes=3, size=16):
    """Each class: groups of that many images in a colour of the group and class, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    images, labels = [], []
    for label in range(classes):
        for group, count in enumerate(sizes):
            colour = torch.randint(0, 256, (3, 1, 1), generator=generator)
            grain = torch.randint(-3, 4, (count, 3, size, size), generator=generator)
            images.append((colour + 20 * (group == label) + grain).clamp(0, 255))
            labels += [label] * count
    order = torch.randperm(len(labels), generator=generator)
    pixels = torch.cat(images).to(torch.uint8)[order]
    return from_tensors("groups", "train", tuple("abcdef"[:classes]), pixels, torch.tensor(labels)[order])


def latents_of(pipe, images):
    with torch.no_grad():
        return pipe.vae.encode(images / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor


# --- the centres


def nearest_mean(points: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One step of k-means in plain float64 loops: centres become the means of the points nearest to them."""
    members = [[] for _ in first]
    for point in points.astype(np.float64):
        distances = [sum((a - b) ** 2 for a, b in zip(point, centre, strict=True)) for centre in first]
        members[int(np.argmin(distances))].append(point)
    return np.stack([sum(own) / len(own) for own in members])


@pytest.mark.parametrize("label", [0, 2])
def test_centres_are_the_means_of_well_separated_groups(backbone, label):
    """In one chunk: k-means++ starts in each of the groups, and one step finds their means."""
    data = groups()
    found = prototypes(data, backbone, 3, SHORT, seed=0, device="cpu").centres(label)
    latents = latents_of(backbone.pipe, data.of_class(label))
    points, clusters = latents.flatten(1).numpy(), found.flatten(1).numpy()
    assert found.shape == (3, 4, 8, 8)
    expected = nearest_mean(points, clusters)
    np.testing.assert_allclose(clusters, expected, atol=1e-4)
    assert sorted(len({c}) for c in range(3)) == [1, 1, 1]
    spread = min(np.abs(a - b).max() for i, a in enumerate(clusters) for b in clusters[:i])
    assert spread > 0.05 > np.abs(clusters - expected).max()


def test_every_class_is_clustered_in_chunks_and_what_is_left_over_too(backbone, monkeypatch):
    """23 images: 8, 8 and 7 at a time; of 18 the last two, fewer than clusters, are left out."""
    taken = []

    class Spy(MiniBatchKMeans):
        def partial_fit(self, points):
            taken.append(len(points))
            return super().partial_fit(points)

    monkeypatch.setattr(module, "MiniBatchKMeans", Spy)
    for count, expected in ((23, [8, 8, 7]), (18, [8, 8]), (5, [5]), (20, [8, 8, 4])):
        chosen = prototypes(groups((count,)), backbone, 4, replace(SHORT, km_expand=2), seed=0, device="cpu")
        for label in range(3):
            taken.clear()
            assert chosen.centres(label).shape == (4, 4, 8, 8) and taken == expected
    taken.clear()
    few = replace(SHORT, km_expand=1, images=9)
    prototypes(groups((23,)), backbone, 4, few, seed=0, device="cpu").centres(0)
    assert taken == [4, 4]


def test_the_chunks_are_what_k_means_is_given_in_random_order(backbone):
    """Beside scikit-learn called by hand on the class's latents, shuffled by the class's own generator."""
    data = groups((5, 5, 5, 5))
    label, chosen = 1, prototypes(data, backbone, 3, replace(SHORT, km_expand=2), seed=4, device="cpu")
    latents = latents_of(backbone.pipe, data.of_class(label)).flatten(1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4 * 1_000_003 + label))
    own, another = (MiniBatchKMeans(3, batch_size=6, random_state=seed, n_init="auto") for seed in (4, 0))
    for first in (0, 6, 12):
        for means in (own, another):
            means.partial_fit(latents[order[first : first + 6]].numpy())
    np.testing.assert_allclose(chosen.centres(label).flatten(1), own.cluster_centers_, atol=1e-5)
    assert np.abs(another.cluster_centers_ - own.cluster_centers_).max() > 0.01
    other = replace(chosen, seed=5).centres(label).flatten(1)
    assert np.abs(other - own.cluster_centers_).max() > 0.01


def test_k_means_is_told_how_many_it_sees_at_once(backbone, monkeypatch):
    """Its own guess of 1,024 would spare clusters that got few of more."""
    told = []

    def spy(clusters, **options):
        told.append(options["batch_size"])
        return MiniBatchKMeans(clusters, **options)

    monkeypatch.setattr(module, "MiniBatchKMeans", spy)
    prototypes(groups((6, 6)), backbone, 2, replace(SHORT, km_expand=3), seed=0, device="cpu").centres(0)
    assert told == [6]


def test_latents_are_samples_where_the_authors_have_samples(backbone):
    data = groups((4,))
    mean, drawn = (
        prototypes(data, backbone, 4, replace(SHORT, posterior=own), seed=0, device="cpu").centres(0)
        for own in ("mean", "sample")
    )
    # One image a cluster: the same four, with the posterior's noise or without.
    gaps = torch.cdist(mean.flatten(1), drawn.flatten(1)).min(1).values
    assert gaps.min() > 0.1


# --- the images


def test_strength_0_decodes_the_centres(backbone):
    data, own = groups(), replace(SHORT, strength=0.0)
    found = d4m(data, backbone, 2, own)
    for label in range(3):
        centres = prototypes(data, backbone, 2, own, seed=0, device="cpu").centres(label)
        assert torch.equal(found.of_class(label), to_uint8(backbone.pipe.decode(centres)))


def test_strength_1_ignores_them(backbone):
    """It is plain sampling with the same noise, steps, guidance and classes."""
    data, pipe = groups(), backbone.pipe
    found = d4m(data, backbone, 2, replace(SHORT, strength=1.0), seed=3)
    for label, model_class in enumerate((7, 3, 5)):
        noise = pipe.latent_noise([image_generator(3, model_class, index) for index in range(2)])
        asked = Denoiser(pipe.transformer, torch.tensor([model_class] * 2), 4.0, 3)
        fidelity = replace(backbone.fidelity, solver="ddim")
        plain = sample(asked, pipe.scheduler_for(fidelity), noise, num_steps=4)
        assert torch.equal(found.of_class(label), to_uint8(pipe.decode(plain)))
    between = d4m(data, backbone, 2, SHORT, seed=3)
    gap = between.fetch(torch.arange(6)).float() - found.fetch(torch.arange(6)).float()
    assert gap.abs().mean() > 5


def test_images_come_class_after_class_and_say_what_they_are(backbone):
    found = d4m(groups(), backbone, 2, SHORT, seed=1)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.classes == ("a", "b", "c")
    assert (found.name, found.split, found.image_size) == ("groups", "D4M, ipc 2, seed 1", 16)
    assert d4m(groups(), backbone, 2, replace(SHORT, size=8)).image_size == 8


def test_same_seed_same_bytes_and_the_global_generators_stay(backbone):
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, again, other = (
        d4m(groups(), backbone, 2, replace(SHORT, posterior="sample"), seed=seed).fetch(torch.arange(6))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numbers).all()


def test_a_class_depends_on_no_other(backbone):
    data = groups()
    whole, some = d4m(data, backbone, 2, SHORT), d4m(data, backbone, 2, SHORT, labels=[2, 0])
    assert some.labels.tolist() == [2, 2, 0, 0] and some.classes == whole.classes
    assert all(torch.equal(some.of_class(label), whole.of_class(label)) for label in (0, 2))
    images = data.fetch(torch.arange(len(data)))
    images[data.labels == 1] = 255 - images[data.labels == 1]
    changed = d4m(from_tensors("groups", "train", data.classes, images, data.labels), backbone, 2, SHORT)
    same = [torch.equal(changed.of_class(label), whole.of_class(label)) for label in range(3)]
    assert same == [True, False, True]


def test_on_the_stand_in_its_images_are_the_class_s(standin_pipe, fashion_train):
    """Trousers and bags by their mean images: nearer to their own class, and none twice."""
    data = fashion_train.of_labels([1, 8]).first(60)
    found = d4m(data, DiT.of(standin_pipe, data, [1, 8]), 3, replace(SHORT, num_steps=6))
    means = torch.stack([data.of_class(label).float().mean(0) for label in range(2)])
    gaps = torch.cdist(found.fetch(torch.arange(6)).float().flatten(1), means.flatten(1))
    assert gaps.argmin(1).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(found.fetch(torch.arange(6)).flatten(1).unique(dim=0)) == 6


# --- settings


def test_the_authors_settings():
    script = D4M.paper("imagenet", 10)
    assert (script.strength, script.cfg_scale, script.num_steps, script.km_expand) == (0.7, 8.0, 50, 1)
    assert script.negative_prompt == "cartoon, anime, painting" and script.prompt == "{}"
    assert (script.solver, script.posterior, script.size) == ("configured", "sample", 224)
    assert D4M.paper("imagewoof", 50) == script and D4M.paper("cifar-10", 10) == D4M()
    assert (D4M().km_expand, D4M().size) == (10, None)
    dit = D4M.dit("imagewoof", 10)
    changed = {f.name for f in fields(D4M) if getattr(dit, f.name) != getattr(script, f.name)}
    assert changed == {"strength", "cfg_scale", "solver", "size"}
    assert (dit.strength, dit.cfg_scale, dit.solver) == (0.5, 4.0, "ddim")
    small = replace(D4M.dit("cifar-10", 10), posterior="mean", images=1000)
    assert D4M.small(10) == small and set(asdict(small)) == {field.name for field in fields(D4M)}


def test_what_does_not_fit_is_refused(backbone, tiny_pipe):
    data = groups((2, 3))
    with pytest.raises(
        ValueError, match=r"ipc is 1 \.\.\. 5, which the smallest class has, got 6: take fewer"
    ):
        d4m(data, backbone, 6, SHORT)
    with pytest.raises(ValueError, match="got 0: take fewer"):
        d4m(data, backbone, 0, SHORT)
    with pytest.raises(ValueError, match="is told 2 classes, groups has 3: give it an id or a name for each"):
        d4m(data, DiT(tiny_pipe, (1, 2)), 2, SHORT)
    with pytest.raises(ValueError, match="4 clusters need as many images a class: images is 3; take more"):
        d4m(data, backbone, 4, replace(SHORT, images=3))
    for wrong in (dict(km_expand=0), dict(images=0)):
        with pytest.raises(ValueError, match="km_expand is at least 1, images too"):
            replace(SHORT, **wrong)


def test_latents_that_are_not_finite_are_refused(backbone):
    with torch.no_grad():
        backbone.pipe.transformer.proj_out_2.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="check the transformer's weights and precision"):
        d4m(groups(), backbone, 2, SHORT)
