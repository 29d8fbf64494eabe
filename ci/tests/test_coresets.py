"""Coresets: what each rule chooses, against its definition; the sets made of it; what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from igd_lib import evaluation
from igd_lib.analysis import results
from igd_lib.baselines import coresets
from igd_lib.baselines.coresets import (
    NAMES,
    RULES,
    View,
    chooser,
    confidence,
    coreset,
    el2n,
    el2n_scores,
    herding,
    k_centre,
    medoid,
    view,
)
from igd_lib.data.images import from_tensors
from igd_lib.evaluation import Cell, fingerprint
from igd_lib.experiment import experiment as experiments
from igd_lib.experiment import makers, measures, registry
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.models.networks import ConvNet, last_linear, outputs
from igd_lib.models.networks import network as make_network
from igd_lib.protocols import IGD_HARD, SMALL_HARD_COLOUR, SMALL_SOFT, labellings
from igd_lib.teachers import Teacher, labelled
from igd_lib.tools import keys
from paper_figures import make_figures

HALF = (0.5, 0.5, 0.5)
OF_FEATURES = {"herding": herding, "k-centre": k_centre, "medoid": medoid}


def features(count=40, dimension=7, seed=0):
    """Skewed, far from the origin, and with unequal lengths: so that a mean or length forgotten shows."""
    drawn = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return (drawn.exp() + torch.arange(dimension)).float()


def judged(count=30, classes=4, networks=2, seed=0):
    """Logits (networks, n, C) and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(networks, count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


# --- herding


def herded(points, k):
    """Step by step in plain Python: of all images not yet taken the one whose mean with them is nearest."""
    points = [[float(value) for value in row] for row in points]
    count, dimension = len(points), len(points[0])
    mean = [sum(row[d] for row in points) / count for d in range(dimension)]
    taken = []
    for _ in range(k):
        gaps = {}
        for index in range(count):
            if index not in taken:
                rows = [points[one] for one in [*taken, index]]
                own = [sum(row[d] for row in rows) / len(rows) for d in range(dimension)]
                gaps[index] = sum((a - b) ** 2 for a, b in zip(mean, own, strict=True))
        taken.append(min(gaps, key=gaps.get))
    return taken


@pytest.mark.parametrize("seed", range(3))
def test_herding_is_the_naive_loop(seed):
    points = features(seed=seed)
    assert herding(points, 25).tolist() == herded(points, 25)
    assert sorted(herding(points, 40).tolist()) == list(range(40))


def test_herding_follows_the_mean_closer_than_chance():
    points = features(400)
    gap = (points[herding(points, 10)].mean(0) - points.mean(0)).norm()
    draws = [points[torch.randperm(400)[:10]] for _ in range(50)]
    assert gap < 0.5 * min((own.mean(0) - points.mean(0)).norm() for own in draws)


# --- k-centre


def radius(points, chosen):
    """The largest distance of an image to the nearest chosen one."""
    return torch.cdist(points.double(), points[list(chosen)].double()).min(1).values.max().item()


@pytest.mark.parametrize("seed", range(5))
def test_k_centre_leaves_nothing_twice_as_far_as_the_best_centres_do(seed):
    """All choices of three of eleven are tried."""
    points = features(11, 2, seed)
    least = min(radius(points, own) for own in itertools.combinations(range(11), 3))
    assert least <= radius(points, k_centre(points, 3).tolist()) <= 2 * least


@pytest.mark.parametrize("seed", range(3))
def test_k_centre_takes_the_farthest_each_time(seed):
    points = features(seed=seed).double()
    taken = k_centre(points, 12).tolist()
    assert taken[0] == (points - points.mean(0)).norm(dim=1).argmin()
    for count in range(1, 12):
        assert taken[count] == torch.cdist(points, points[taken[:count]]).min(1).values.argmax()


# --- medoids


def test_a_medoid_is_the_image_nearest_to_its_centre():
    """Clusters apart from each other, of unequal sizes, the largest first."""
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 80.0]])
    labels = torch.tensor([0] * 5 + [1] * 11 + [2] * 8)
    points = centres[labels] + torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    found = [medoid(points, 3, seed=seed) for seed in range(6)]
    assert all(labels[taken].tolist() == [1, 2, 0] for taken in found)
    for index in found[0].tolist():
        own = (labels == labels[index]).nonzero().flatten()
        gaps = (points[own] - points[own].mean(0)).norm(dim=1)
        assert own[gaps.argmin()] == index


def test_medoids_are_nearest_to_the_centres_that_scikit_learn_finds():
    """Of overlapping clusters as well. (In a cluster of two images either is nearest.)"""
    points = features(200, 3).double()
    order = (points - points.mean(0)).norm(dim=1).argsort()
    for seed in range(4):
        centres = KMeans(6, n_init=1, random_state=seed).fit(points[order].numpy()).cluster_centers_
        gaps = (points[:, None] - torch.from_numpy(centres)).norm(dim=2)
        assert len(set(gaps.argmin(0).tolist())) == 6  # no two centres share their nearest
        taken = gaps[medoid(points, 6, seed=seed)].min(0).values
        torch.testing.assert_close(taken, gaps.min(0).values, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("rule", OF_FEATURES)
def test_no_copy_is_taken_twice(rule):
    """Three different images, four of each, and seven asked for."""
    points = torch.tensor([[0.0], [1.0], [9.0]]).repeat(4, 1)
    assert len(set(OF_FEATURES[rule](points, 7).tolist())) == 7


def test_medoids_depend_on_the_seed_of_k_means():
    points = features(200, 3)
    found = {tuple(medoid(points, 9, seed=seed).tolist()) for seed in (0, 0, 1, 2)}
    assert len(found) == 3


# --- EL2N and confidence


def test_el2n_by_hand():
    """One image: e^0, e^0, e^1 over their sum against (0, 0, 1), in two networks that disagree."""
    total = 2 + np.e
    sure = (2 / total**2 + (np.e / total - 1) ** 2) ** 0.5
    unsure = (2 * (1 / 3) ** 2 + (1 / 3 - 1) ** 2) ** 0.5
    logits = torch.tensor([[[0.0, 0.0, 1.0]], [[5.0, 5.0, 5.0]]])
    labels = torch.tensor([2])
    assert el2n_scores(logits[0], labels).tolist() == pytest.approx([sure])
    assert el2n_scores(logits, labels).tolist() == pytest.approx([(sure + unsure) / 2])


def test_el2n_and_confidence_are_the_naive_loops():
    logits, labels = judged()
    errors, sureness = [], []
    for index, label in enumerate(labels.tolist()):
        norms, own = [], []
        for network in logits.double():
            shares = [float(np.exp(value)) for value in network[index]]
            shares = [value / sum(shares) for value in shares]
            norms.append(sum((v - (c == label)) ** 2 for c, v in enumerate(shares)) ** 0.5)
            own.append(shares[label])
        errors.append(sum(norms) / len(norms))
        sureness.append(sum(own) / len(own))
    by_error = sorted(range(30), key=lambda index: -errors[index])
    by_sureness = sorted(range(30), key=lambda index: -sureness[index])
    assert el2n(logits, labels, 7).tolist() == by_error[:7]
    assert el2n(logits, labels, 7, end="easiest").tolist() == by_error[::-1][:7]
    assert confidence(logits, labels, 7).tolist() == by_sureness[:7]
    assert confidence(logits, labels, 7, end="hardest").tolist() == by_sureness[::-1][:7]
    assert el2n_scores(logits, labels).tolist() == pytest.approx(errors, abs=1e-12)


# --- of all rules


def seen(count=40, seed=0) -> View:
    logits, labels = judged(count, seed=seed)
    return View(features(count, seed=seed), logits, labels)


@pytest.mark.parametrize("rule", RULES)
def test_each_image_is_chosen_once_and_alike_each_time(rule):
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again = (RULES[rule](seen(), 9, 3) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.int64
    assert len(first) == len(set(first.tolist())) == 9 and set(first.tolist()) <= set(range(40))
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_images_does_not_matter(rule):
    whole = seen()
    order = torch.randperm(40)
    mixed = View(whole.features[order], whole.logits[:, order], whole.labels[order])
    assert order[RULES[rule](mixed, 9, 0)].tolist() == RULES[rule](whole, 9, 0).tolist()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "medoid"])
def test_fewer_images_are_the_first_of_more(rule):
    assert RULES[rule](seen(), 4, 0).tolist() == RULES[rule](seen(), 9, 0)[:4].tolist()


def test_of_equally_good_images_the_first_is_taken():
    """Of copies, and of pairs on either side of the mean; the numbers are exact in floating point."""
    pairs = torch.tensor([[-1.0], [1.0], [-3.0], [3.0], [-3.0], [3.0]])
    assert herding(pairs, 3).tolist() == [0, 1, 2]
    assert k_centre(pairs, 3).tolist() == [0, 3, 1]
    logits, labels = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.zeros(4).long()
    assert el2n(logits, labels, 4).tolist() == [1, 2, 0, 3]
    assert confidence(logits, labels, 4).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 41])
def test_more_than_there_are_or_none_is_refused(rule, count):
    with pytest.raises(ValueError, match=f"{count} of 40 images cannot be chosen; ask for 1 ... 40"):
        RULES[rule](seen(), count, 0)


# --- over a data set


@pytest.fixture(scope="module")
def noise():
    """Random images of three classes in no order, 9, 8 and 7 of them."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 9 + [1] * 8 + [2] * 7)[torch.randperm(24, generator=generator)]
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return from_tensors("noise", "train", ("a", "b", "c"), images, labels)


def network(seed=0, classes=("a", "b", "c"), least=0.0) -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvNet(2, len(classes), 16, width=8)
    return Teacher(model, "convnet2", f"random, seed {seed}", tuple(classes), HALF, (0.2, 0.3, 0.4), least)


@pytest.mark.parametrize("rule", NAMES)
def test_a_coreset_is_real_images_of_each_class_in_class_order(noise, rule):
    found = coreset(noise, network(), 4, rule, seed=2)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and found.classes == noise.classes
    pixels = found.fetch(torch.arange(12))
    assert pixels.dtype == torch.uint8
    for label in range(3):
        own = {image.numpy().tobytes() for image in noise.of_class(label)}
        taken = [image.numpy().tobytes() for image in pixels[4 * label : 4 * label + 4]]
        assert len(set(taken)) == 4 and set(taken) <= own
    assert torch.equal(coreset(noise, network(), 4, rule, seed=2).fetch(torch.arange(12)), pixels)


def test_random_is_the_random_baseline(noise):
    found, drawn = coreset(noise, network(), 3, "random", seed=5), noise.per_class(3, 5)
    assert torch.equal(found.fetch(torch.arange(9)), drawn.fetch(torch.arange(9)))


def test_what_a_network_sees_is_its_last_layer_s_input_and_its_logits(noise):
    """Of images as they are, normalised as the network was trained; several networks side by side."""
    first, second = network(0), network(1)
    found = view(noise, (first, second))
    pixels = noise.fetch(torch.arange(24)).float() / 255
    inputs = (pixels - 0.5) / torch.tensor(first.std)[:, None, None]
    with torch.no_grad():
        parts = [one.model.features(inputs).flatten(1) for one in (first, second)]
        logits = [one.model(inputs) for one in (first, second)]
    torch.testing.assert_close(found.features, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, torch.stack(logits), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, noise.labels)
    assert not first.model.classifier._forward_pre_hooks  # nothing is left behind


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("convnet2", "classifier"),
        ("resnet10", "classifier"),
        ("resnet18_modified", "fc"),
        ("torchvision/resnet18", "fc"),
        ("timm/resnet10t", "fc"),
    ],
)
def test_features_of_every_kind_of_teacher(name, last):
    """The paper's are torchvision's: what the layer makes of the features is the logits."""
    model = make_network(name, num_classes=7, image_size=32).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, logits = outputs(model, inputs)
        assert last_linear(model) is getattr(model, last) and torch.equal(logits, model(inputs))
        assert torch.equal(getattr(model, last)(features), logits) and features.ndim == 2


@pytest.mark.parametrize("rule", RULES)
def test_each_class_is_chosen_by_its_own_images_alone(noise, rule):
    networks = (network(0), network(1))
    found = coreset(noise, networks, 3, rule)
    for label in range(3):
        own = noise.subset(noise.class_indices(label))
        taken = RULES[rule](view(own, networks), 3, 0)
        assert torch.equal(found.of_class(label), own.fetch(taken))


def test_one_look_serves_all_rules(noise):
    made = chooser(noise, network(), 3, list(RULES))
    for rule in RULES:
        found = coreset(noise, network(), 3, rule)
        for label in range(3):
            assert torch.equal(noise.fetch(made(label)[rule]), found.of_class(label)), rule


def test_what_cannot_be_had_is_refused(noise):
    with pytest.raises(ValueError, match="no rule 'herdin'; there are random, herding, k-centre, medoid"):
        coreset(noise, network(), 1, "herdin")
    wanted = r"ipc=8, but class 'c' of noise has 7 images in 'train'; take 1 \.\.\. 7"
    with pytest.raises(ValueError, match=wanted):
        coreset(noise, network(), 8, "herding")
    with pytest.raises(ValueError, match="ipc=0, but class 'a'"):
        coreset(noise, network(), 0, "herding")
    with pytest.raises(ValueError, match="class orders differ: label 0 is 'b' in the teacher"):
        coreset(noise, network(classes=("b", "a", "c")), 1, "medoid")
    with pytest.raises(ValueError, match=r"convnet2 \(random, seed 0\) gets .* below 101 %"):
        coreset(noise, network(least=101.0), 1, "el2n")
    odd = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "odd", "none", noise.classes, HALF, HALF, 0)
    with pytest.raises(TypeError, match="penultimate features are known for ConvNet.* not for Sequential"):
        coreset(noise, odd, 1, "herding")
    broken = network()
    with torch.no_grad():
        broken.model.features[0].weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite; check its weights and normalisation"):
        coreset(noise, broken, 1, "herding")


# --- as rows of a table


@pytest.fixture
def place(noise):
    """A workplace with a teacher and two early networks."""
    early = [network(1), network(2)]
    return SimpleNamespace(
        train=noise,
        scale=SimpleNamespace(figures_mean_something=True),
        any_teacher=network,
        early_networks=early,
        device="cpu",
    )


def made(place, rule, ipc=2, seed=0):
    return registry.BASELINES[rule].make(place, ipc, seed).fetch(torch.arange(3 * ipc))


def test_coresets_are_chosen_once_for_all_rules_and_seeds(place, own_cache, monkeypatch):
    """One look by the teacher at each class, and one by the early networks for EL2N."""
    looks, look = [], coresets.view
    monkeypatch.setattr(coresets, "view", lambda data, *rest: looks.append(len(data)) or look(data, *rest))
    asked, ask = [], coresets.chooser
    monkeypatch.setattr(coresets, "chooser", lambda *given, **more: asked.append(1) or ask(*given, **more))
    rules = (*makers.BY_TEACHER, *makers.BY_EARLY)
    found = {(rule, seed): made(place, rule, seed=seed) for rule in rules for seed in (0, 1)}
    files = list((own_cache / "coreset").glob("*/*.safetensors"))
    assert looks == [9, 8, 7] * 2 and len(files) == 6 and len(asked) == 2
    makers._keep_choice(files[0], None, 0)  # another process has chosen meanwhile: nobody is asked
    for rule in rules:
        networks = place.early_networks if rule in makers.BY_EARLY else network()
        direct = coreset(place.train, networks, 2, rule).fetch(torch.arange(6))
        assert torch.equal(found[rule, 0], direct) and torch.equal(found[rule, 1], direct), rule
    assert set(rules) <= set(NAMES) <= set(registry.BASELINES) | {"confidence-hardest"}


def test_their_rows_are_called_as_in_tables():
    labels = [Method(rule).label for rule in (*makers.BY_TEACHER, *makers.BY_EARLY)]
    assert labels == ["Herding", "K-centre", "Medoid", "Confidence", "EL2N", "EL2N (easiest)"]


def test_an_interrupted_choice_goes_on_with_the_classes_that_lack(place, monkeypatch):
    call, asked = coresets.Chooser.__call__, []

    def stopping(self, label):
        asked.append(label)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return call(self, label)

    monkeypatch.setattr(coresets.Chooser, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 classes are in .*coreset.*; run the same again"):
        made(place, "herding")
    found = made(place, "herding")
    assert asked == [0, 1, 1, 2]
    assert torch.equal(found, coreset(place.train, network(), 2, "herding").fetch(torch.arange(6)))


def test_what_a_choice_depends_on_names_it_on_disk(place, monkeypatch):
    """Images, networks and how many; not the generation seed, for nothing is drawn."""
    asked, claim = [], keys.claim
    monkeypatch.setattr(keys, "claim", lambda *about: asked.append(about[2]) or claim(*about))
    for rule, ipc, seed in (("herding", 1, 0), ("medoid", 1, 1), ("herding", 2, 0), ("el2n", 1, 0)):
        made(place, rule, ipc, seed)
    place.any_teacher = lambda: network(5)
    made(place, "herding", 1)
    first, same, *others = (keys.key("coreset", settings) for settings in asked)
    assert first == same and len({first, *others}) == 4
    for name in ("data", "split", "images", "networks", "ipc", "rules"):
        assert keys.key("coreset", asked[0] | {name: "x"}) != first, name


def test_the_networks_of_an_experiment(small_loads):
    """EL2N's are the surrogate's checkpoints of the first epoch, without its beginning; all differ."""
    experiment = prepare("16", "fashion-mnist", "smoke")
    trajectory = experiment.surrogates.trajectory()
    early = experiment.early_networks
    assert trajectory.epochs[0] == 0 and [one.weights.split(";")[0] for one in early] == [
        f"the surrogate's trajectory, epoch {epoch:g}" for epoch in trajectory.epochs[1:]
    ]
    for one, state in zip(early, trajectory.states[1:], strict=True):
        assert all(torch.equal(one.model.state_dict()[name], value) for name, value in state.items())
    assert len({one.weights for one in early}) == len(early) > 1
    assert makers._pool(experiment).labels.bincount().tolist() == [experiment.scale.candidates] * 10


# --- labels of three kinds


def test_labels_of_every_kind_are_learned_in_the_same_steps():
    for protocol, own in ((SMALL_HARD_COLOUR, "hard"), (IGD_HARD, "hard"), (SMALL_SOFT, "every batch")):
        ways = labellings(protocol)
        assert [one.labels for one in ways.values()] == ["hard", "own", "soft"] and ways[own] is protocol
        assert len({one.name for one in ways.values()}) == 3
        for one in ways.values():
            assert replace(one, name=protocol.name, labels=protocol.labels) == protocol


def test_a_fixed_label_is_the_teacher_s_of_the_image_as_it_is(noise):
    judge = network()
    found = labelled(noise, judge, replace(SMALL_HARD_COLOUR, image_size=16))
    inputs = (noise.fetch(torch.arange(24)).float() / 255 - 0.5) / torch.tensor(judge.std)[:, None, None]
    with torch.no_grad():
        wanted = judge.model(inputs).softmax(1)
    torch.testing.assert_close(found.targets, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, noise.labels)
    few = found.subset(torch.tensor([5, 3]))
    assert torch.equal(few.targets, found.targets[[5, 3]])
    assert fingerprint(found) != fingerprint(noise) == fingerprint(noise.subset(torch.arange(24)))


def test_fixed_labels_are_learned_by_cross_entropy_and_mixed_with_their_images(noise, monkeypatch):
    """A quarter of each image's label is another's; not the hard labels, which are all wrong here."""
    monkeypatch.setattr(evaluation, "cutmix", lambda inputs, labels, *_: (inputs, labels.flip(0), 0.75))
    plain = replace(SMALL_HARD_COLOUR, image_size=16, mixed_precision=False, crop_scale=(1, 1), flip=False)
    protocol = replace(plain, labels="own", cutmix_probability=1.0)
    own = labelled(replace(noise, labels=noise.labels * 0), network(), protocol)
    run = evaluation._Training(Cell.of(own, noise, "convnet2", protocol, 0, device="cpu"))
    pixels, targets = run.train.fetch(torch.arange(4)), run.train.labels[:4]
    loss = run.loss(pixels, targets)
    log_p = run.model((pixels.float() / 255 - 0.5) / 0.5).log_softmax(1)
    mixed = 0.75 * own.targets[:4] + 0.25 * own.targets[:4].flip(0)
    torch.testing.assert_close(loss, -(mixed * log_p).sum(1).mean(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="trains on a set's own soft labels"):
        Cell.of(noise, noise, "convnet2", protocol, 0, device="cpu")


def test_rows_with_labels_of_every_kind(small_loads, fashion_train, fashion_test, monkeypatch):
    """The fixed ones are the checked teacher's; a set's own, where it has some, are left as they are."""
    splits = {"train": fashion_train, "test": fashion_test, "validation": fashion_train.first(30)}
    monkeypatch.setattr(experiments, "load", lambda spec, split: splits[split])
    experiment = prepare("16_coresets", "fashion-mnist", "smoke")
    found = experiment.sets([Method("random")], 1, 1)
    rows = measures.labelled_rows(experiment, found, "convnet3")
    top1 = rows[rows.metric == "top1"].set_index("protocol").value
    assert list(top1.index) == [one.name for one in labellings(experiment.scale.protocol).values()]
    protocol, teacher = labellings(experiment.scale.protocol)["fixed"], experiment.any_teacher()
    random = found[Method("random"), 0]
    direct = evaluation.evaluate(
        labelled(random, teacher, protocol), experiment.test, network="convnet3", protocol=protocol, seed=0
    )
    assert top1[protocol.name] == direct.reported
    even = replace(random, targets=torch.full((10, 10), 0.1))
    given = measures._with_labels(experiment.with_protocol(protocol), [even, random])
    assert given[0].targets is even.targets and given[1].targets is not None and len(given) == 2
    held = measures.validation_rows(experiment, found, "convnet3")
    assert set(held.artefact) == {"16_coresets_validation"} and len(held) == len(rows)


# --- the page


def row(artefact, family, protocol, seed, value) -> results.Row:
    about = dict(artefact=artefact, dataset="toy", ipc=10, network="convnet3", protocol=protocol, seed=seed)
    about |= dict(metric="top1", value=value, scale="small", seconds=1.0, device="cpu, float32")
    return results.Row(**about, git_revision="abc", settings_hash="0", **Method(family).columns())


def test_the_page_names_the_choice_made_on_validation_images(tmp_path):
    """Herding is best there, though Random is on test images."""
    means = {"random": 32.0, "herding": 31.0, "sampled": 36.0}
    rows = [
        row("16_coresets", family, protocol, seed, mean + 0.2 * seed + 0.05 * (family == "sampled") * seed**2)
        for family, mean in means.items()
        for protocol in ("p", "p, fixed soft labels")
        for seed in range(4)
    ]
    rows += [
        row("16_coresets_validation", family, protocol, seed, mean + seed)
        for family, mean in (("random", 30.0), ("herding", 35.0))
        for protocol in ("p", "p, fixed soft labels")
        for seed in range(4)
    ]
    results.consolidate(results.frame(rows), tmp_path / "16_coresets.csv")
    (artefact,) = (one for one in make_figures.ARTEFACTS if one.source == "16_coresets")
    make_figures.draw_labellings(artefact, tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "coresets.md").read_text()
    assert "- p: Herding\n- p, fixed soft labels: Herding" in page
    assert "| p | DiT - Herding | +5.2 [+4.9, +5.5] | 4 | < 0.0001 | < 0.0001 | gain |" in page
    assert "| Random | 32.3 ± 0.3 | 32.3 ± 0.3 | 4 |" in page and "on the stand-in" in page
    assert (tmp_path / "out" / "coresets.png").is_file()
