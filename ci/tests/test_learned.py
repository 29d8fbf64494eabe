"""Sets with float images, soft labels, a rate or a whitening of their own: as data, on disk, evaluated."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from igd_lib import evaluation
from igd_lib.data import zca
from igd_lib.data.augment import cutmix, to_unit
from igd_lib.data.dsa import apply, diffaug, draw, dsa
from igd_lib.data.images import ImageData, from_tensors, in_8_bits, learned, to_float
from igd_lib.evaluation import Cell, evaluate, fingerprint
from igd_lib.models.networks import network
from igd_lib.protocols import DATM_OWN, DM_OWN, IDC_OWN, SMALL_SOFT
from igd_lib.sets.learned import load, save
from igd_lib.teachers import Teacher, accuracy, check_teacher, labelled, seen_by, test_inputs
from igd_lib.tools import files

CLASSES = ("a", "b", "c")


def real(count: int = 30, seed: int = 0) -> ImageData:
    """8-px images, each class with a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count // 3)
    colours = torch.eye(3)[labels].mul(60)[:, :, None, None]
    pixels = torch.randint(0, 190, (count, 3, 8, 8), generator=generator) + colours
    return from_tensors("toy", "test", CLASSES, pixels.to(torch.uint8), labels)


@pytest.fixture
def whitening() -> zca.ZCA:
    return zca.fit(real(60, seed=5).fetch(torch.arange(60)))


@pytest.fixture
def made(whitening) -> ImageData:
    """Two images a class, partly out of [0, 1], with soft labels, a rate and a whitening."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(6, 3, 8, 8, generator=generator) * 1.4 - 0.2
    targets = torch.randn(6, 3, generator=generator).mul(2).softmax(1)
    labels = torch.arange(3).repeat_interleave(2)
    base = ImageData("toy", "learned", CLASSES, labels, 8, lambda indices: pixels[indices])
    return learned(base, pixels, targets, lr=0.037, whitening=whitening)


def everything(data: ImageData) -> torch.Tensor:
    return data.fetch(torch.arange(len(data)))


def test_a_teacher_sees_whitened_images_as_they_are(made):
    """It was trained on normalised images; what students see is another matter."""
    model = network("convnet2", num_classes=3, image_size=8).eval()
    judge = Teacher(model, "convnet2", "of no file", CLASSES, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    protocol = replace(SMALL_SOFT, labels="own", image_size=8)
    plain = labelled(replace(made, whitening=None), judge, protocol)
    assert torch.equal(labelled(made, judge, protocol).targets, plain.targets)
    assert labelled(made, judge, protocol).whitening is made.whitening


# --- as data


def test_soft_labels_go_with_their_images(made):
    few = made.subset(torch.tensor([4, 1]))
    assert torch.equal(few.targets, made.targets[[4, 1]]) and torch.equal(
        everything(few), everything(made)[[4, 1]]
    )
    assert (few.lr, few.whitening) == (made.lr, made.whitening)
    assert torch.equal(made.first(1).targets, made.targets[::2])
    drawn = made.per_class(2, seed=0)
    for image, target in zip(everything(drawn), drawn.targets, strict=True):
        (number,) = (everything(made) == image).all((1, 2, 3)).nonzero().flatten().tolist()
        assert torch.equal(target, made.targets[number])


def test_plain_images_are_what_others_store(made):
    plain = made.plain()
    assert (plain.targets, plain.lr, plain.whitening) == (None, None, None)
    expected = (everything(made).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(everything(plain), expected) and expected.min() == 0 and expected.max() == 255
    assert torch.equal(plain.labels, made.labels) and plain.plain() is plain
    assert made.photograph(3).getpixel((2, 5)) == tuple(expected[3, :, 5, 2].tolist())
    eight_bit = learned(made, expected, made.targets, lr=0.1)
    assert torch.equal(everything(eight_bit.plain()), expected) and eight_bit.plain().targets is None


def test_floats_are_the_pixels_that_they_would_be_stored_as(made):
    """Whatever reads images takes either."""
    pixels = in_8_bits(everything(made))
    assert torch.equal(in_8_bits(pixels), pixels)
    for change in (to_unit, to_float):
        assert torch.allclose(change(pixels / 255), change(pixels), atol=1e-6)


def test_what_would_lose_what_was_learned_is_refused(made):
    assert made.at(8) is made
    with pytest.raises(ValueError, match=r"whitened images are of 8 px alone, not 16; .* plain\(\) images"):
        made.at(16)
    assert made.plain().at(16).image_size == 16
    with pytest.raises(ValueError, match=r"soft labels are of all classes; take the plain\(\) images"):
        made.of_labels([0, 2])


def test_nonsense_is_refused(made):
    pixels, targets = everything(made), made.targets
    with pytest.raises(ValueError, match=r"images are finite numbers \(6, 3, 8, 8\), got \(5, 3, 8, 8\)"):
        learned(made, pixels[:5], targets)
    with pytest.raises(ValueError, match="images are finite"):
        learned(made, pixels.index_fill(0, torch.tensor(2), float("nan")), targets)
    for wrong in (targets[:, :2], targets * 1.01, targets * float("nan")):
        with pytest.raises(ValueError, match=r"soft labels are shares of one, \(6, 3\)"):
            learned(made, pixels, wrong)
    for rate in (0.0, -0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a learning rate is positive"):
            learned(made, pixels, targets, lr=rate)


# --- on disk


@pytest.mark.parametrize("kept", ["all", "nothing"])
def test_a_set_comes_back_to_the_bit(made, tmp_path, kept):
    given = made if kept == "all" else made.plain()
    found = load(save(tmp_path / "set.safetensors", given))
    assert (
        torch.equal(everything(found), everything(given))
        and everything(found).dtype == everything(given).dtype
    )
    assert torch.equal(found.labels, given.labels)
    same = ("name", "split", "classes", "image_size", "lr")
    assert all(getattr(found, name) == getattr(given, name) for name in same)
    if kept == "all":
        assert torch.equal(found.targets, given.targets)
        assert torch.equal(found.whitening.matrix, given.whitening.matrix)
        assert torch.equal(found.whitening.mean, given.whitening.mean)
    else:
        assert found.targets is None and found.whitening is None
    assert fingerprint(found) == fingerprint(given)


def test_a_damaged_file_is_named(made, tmp_path):
    path = save(tmp_path / "set.safetensors", made)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"set\.safetensors is damaged"):
        load(path)
    files.save_tensors(path, {"images": everything(made)}, name="toy")
    with pytest.raises(
        ValueError, match=r"set\.safetensors holds no learned set .*; delete it and run again"
    ):
        load(path)


# --- evaluated

OWN = replace(DATM_OWN, image_size=8, epochs=9, milestones=(0.5,), batch_size=4, seeds=(0,))
NET = "convnet2-w8"


def by_hand(made: ImageData, protocol, *, targets: torch.Tensor, lr: float, seed: int) -> torch.nn.Module:
    """The network that the protocol trains: whitened images, changed, soft cross-entropy, SGD by hand."""
    torch.manual_seed(seed)
    model = network(NET, num_classes=3, image_size=8)
    generator = torch.Generator().manual_seed(seed)
    flat = everything(made).float().flatten(1)
    whitened = ((flat - made.whitening.mean) @ made.whitening.matrix).reshape(-1, 3, 8, 8)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(protocol.epochs):
        rate = lr * (0.1 if epoch >= protocol.epochs // 2 else 1.0)
        for indices in torch.randperm(len(made), generator=generator).split(4):
            inputs = whitened[indices]
            if protocol.dsa:
                inputs = apply(inputs, draw(dsa(protocol.dsa), len(indices), 8, generator, per_sample=True))
            torch.rand((), generator=generator)  # whether to mix, which it never does
            logits = model(inputs)
            losses = [
                -(t * (z - z.exp().sum().log())).sum() for t, z in zip(targets[indices], logits, strict=True)
            ]
            gradients = torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))
            with torch.no_grad():
                for p, g, m in zip(model.parameters(), gradients, momentum, strict=True):
                    m.mul_(0.9).add_(g + 5e-4 * p)
                    p.sub_(rate * m)
    return model


def accuracy_by_hand(model, data: ImageData, whitening) -> float:
    flat = (everything(data).float() / 255).flatten(1)
    inputs = ((flat - whitening.mean) @ whitening.matrix).reshape(-1, 3, 8, 8)
    with torch.no_grad():
        return 100 * (model(inputs).argmax(1) == data.labels).double().mean().item()


@pytest.mark.parametrize("changed", ["", DATM_OWN.dsa])
@pytest.mark.parametrize("labels", ["own", "hard"])
def test_it_is_the_loop_by_hand(made, changed, labels, monkeypatch):
    protocol, test = replace(OWN, dsa=changed, labels=labels), real(300)
    trained: list[torch.nn.Module] = []
    monkeypatch.setattr(
        evaluation, "accuracy", lambda model, *rest: trained.append(model) or accuracy(model, *rest)
    )
    found = evaluate(made, test, network=NET, protocol=protocol, seed=3, device="cpu")
    targets = made.targets if labels == "own" else torch.eye(3)[made.labels]
    expected = by_hand(made, protocol, targets=targets, lr=made.lr, seed=3)
    for ours, theirs in zip(trained[-1].parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)
    assert found.last == pytest.approx(accuracy_by_hand(expected, test, made.whitening))


def test_the_rate_is_the_set_s_only_where_the_protocol_says_so(made):
    test, lr = real(), {}
    for own in (True, False):
        cell = Cell.of(made, test, NET, replace(OWN, own_lr=own), 0, device="cpu")
        lr[own] = evaluation._Training(cell).plan.lr
    assert lr == {True: 0.037, False: OWN.lr}
    without = replace(made, lr=None)
    assert evaluation._Training(Cell.of(without, test, NET, OWN, 0, device="cpu")).plan.lr == OWN.lr


def test_a_set_without_soft_labels_is_refused(made):
    with pytest.raises(
        ValueError, match=r"own soft labels, and 'learned' has none; give a set that has, or repl"
    ):
        evaluate(made.plain(), real(), network=NET, protocol=OWN, seed=0)
    with pytest.raises(ValueError, match="own labels: it takes no teacher"):
        evaluate(made, real(), network=NET, protocol=OWN, seed=0, teacher=object())


def test_test_images_are_whitened_as_the_set_s_were(made):
    cell = Cell.of(made, real(), NET, OWN, 0, device="cpu")
    (inputs,) = test_inputs(cell.test, OWN, "cpu")
    assert torch.equal(inputs, made.whitening(everything(real()) / 255))
    plain = Cell.of(made.plain(), real(), NET, replace(OWN, labels="hard"), 0, device="cpu")
    (inputs,) = test_inputs(plain.test, OWN, "cpu")
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (OWN.mean, OWN.std))
    assert torch.allclose(inputs, (everything(real()) / 255 - mean) / std, atol=1e-6)
    assert torch.allclose(seen_by(made, OWN, "cpu")(everything(made)), made.whitening(everything(made)))


def test_a_teacher_sees_test_images_its_own_way(made):
    """Whitened ones are nothing to a network that was trained on others."""

    class Colour(torch.nn.Module):
        """Sure of the channel that is brightest."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            return images.mean((2, 3)) * self.scale

    teacher = Teacher(Colour(), "colour", "none", CLASSES, (0.0,) * 3, (1.0,) * 3, 90.0)
    soft = replace(SMALL_SOFT, image_size=8, epochs=1)
    cell = Cell.of(made, real(90), NET, soft, 0, teacher, "cpu")
    assert cell.test.whitening is not None
    assert check_teacher(teacher, cell.test, soft) > 90
    cell.checked()


def test_each_part_of_a_set_tells_evaluations_apart(made):
    """And those of plain sets keep the names that they had."""
    shuffled = replace(made, targets=made.targets.flip(0))
    whitened = replace(made, whitening=replace(made.whitening, matrix=made.whitening.matrix * 1.001))
    others = [
        made,
        replace(made, targets=None),
        shuffled,
        replace(made, lr=0.04),
        replace(made, lr=None),
        whitened,
    ]
    assert len({fingerprint(other) for other in others}) == len(others)
    plain = made.plain()
    before = hashlib.sha256(plain.labels.numpy().tobytes() + everything(plain).numpy().tobytes()).hexdigest()
    assert fingerprint(plain) == before[:12]


def test_idc_s_changes_are_an_image_s_own_and_come_before_cutmix():
    """As its authors' training has it; a step of one batch, by hand."""
    protocol = replace(IDC_OWN, epochs=1, cutmix_probability=1.0, image_size=8, test_resize=None)
    train = real(6)
    found: list[torch.Tensor] = []
    cell = Cell.of(train, real(30), NET, protocol, 3, None, "cpu", False)
    training = evaluation._Training(cell, None)
    training.model.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    training.generator.manual_seed(5)
    pixels = everything(train)
    training.loss(pixels, train.labels)
    generator = torch.Generator().manual_seed(5)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (protocol.mean, protocol.std))
    seen = (pixels.float() / 255 - mean) / std
    strategy = diffaug("color_crop_flip_scale_rotate")
    changed = apply(seen, draw(strategy, 6, 8, generator, per_sample=True))
    torch.rand((), generator=generator)
    mixed, _, _ = cutmix(changed, train.labels, 1.0, generator)
    assert torch.allclose(found[0], mixed, atol=1e-6) and not torch.equal(mixed, changed)


@pytest.mark.parametrize("wrong", [{"labels": "soft"}, {"diffaug": "color"}])
def test_changes_that_a_teacher_would_not_see_are_refused(wrong):
    with pytest.raises(ValueError, match="dsa or diffaug, not both, and neither with a teacher's labels"):
        _ = replace(DM_OWN, **wrong).changes
