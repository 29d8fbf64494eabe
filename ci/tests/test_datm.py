"""DATM: experts, what is matched to them when, what is learned, and what is given back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from igd_lib.baselines import datm as module
from igd_lib.baselines import trajectories
from igd_lib.baselines.datm import DATM, datm, drawn_steps, initial, matching_loss, mean_of_right, student
from igd_lib.baselines.trajectories import Experts, Flat, Trajectories, expert_epoch, gsam_direction
from igd_lib.data import zca
from igd_lib.data.dsa import apply, draw, dsa
from igd_lib.data.images import ImageData, from_tensors, in_8_bits
from igd_lib.tools import files

CLASSES = ("a", "b", "c")
EXPERTS = Experts("convnet1-w4", count=2, epochs=4, lr=0.1, batch_size=10, rho=0.1)
TINY = DATM(
    EXPERTS,
    iterations=5,
    steps=3,
    expert_epochs=1,
    batch_size=4,
    upper=2,
    last_upper=4,
    widened_by=3,
    lr_images=0.5,
    lr_labels=0.5,
    lr_rate=1e-4,
    rate=0.1,
    threshold=1e9,
)


@pytest.fixture
def data() -> ImageData:
    """Twelve 8-px images of each of three classes: noise on a colour of the class's own."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(12)
    colours = torch.eye(3)[labels].mul(90)[:, :, None, None]
    pixels = torch.randint(0, 160, (36, 3, 8, 8), generator=generator) + colours
    return from_tensors("toy", "train", CLASSES, pixels.to(torch.uint8), labels)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Factory: the folder of experts of some data, trained once."""
    folders: dict[Experts, Path] = {}

    def make(data: ImageData, recipe: Experts = EXPERTS) -> Trajectories:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("experts")
            Trajectories(data, recipe, folders[recipe]).train()
        return Trajectories(data, recipe, folders[recipe])

    return make


def everything(found: ImageData) -> torch.Tensor:
    return found.fetch(torch.arange(len(found)))


def same(one: ImageData, other: ImageData) -> bool:
    return (
        torch.equal(everything(one), everything(other))
        and torch.equal(one.targets, other.targets)
        and one.lr == other.lr
    )


# --- a two-layer net in float64, once flat and once as lists of parameters


def two_layers(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Flatten(), torch.nn.Linear(48, 5), torch.nn.Softplus(), torch.nn.Linear(5, 3)
    return torch.nn.Sequential(*layers).double()


def logits_of(parameters: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    a, b, c, d = parameters
    hidden = torch.log(1 + torch.exp(images.reshape(len(images), -1) @ a.T + b))
    return hidden @ c.T + d


def soft_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The mean of -sum p log q, an image at a time."""
    return sum(-(p * (z - z.exp().sum().log())).sum() for p, z in zip(shares, logits, strict=True)) / len(
        logits
    )


@pytest.fixture
def problem():
    """A net, its flat form, two points of a trajectory, six images with logits, and three steps."""
    model = two_layers()
    flat = Flat(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    start = flat.parameters
    target = start + 0.1 * torch.randn(len(start), generator=generator, dtype=torch.float64)
    settings = replace(TINY, steps=3, batch_size=4)
    steps = list(drawn_steps(6, settings, 4, generator))
    return flat, images, labels, torch.tensor(0.3, dtype=torch.float64), start, target, steps


def naive_matching(model, images, labels, rate, target: list[torch.Tensor], steps) -> torch.Tensor:
    """L with a list of parameters, updated one by one."""
    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    current = start
    for indices, changes in steps:
        shares = labels[indices].exp() / labels[indices].exp().sum(1, keepdim=True)
        loss = soft_loss(logits_of(current, apply(images[indices], changes)), shares)
        gradients = torch.autograd.grad(loss, current, create_graph=True)
        current = [p - rate * g for p, g in zip(current, gradients, strict=True)]
    above = sum(((p - t) ** 2).sum() for p, t in zip(current, target, strict=True))
    below = sum(((p.detach() - t) ** 2).sum() for p, t in zip(start, target, strict=True))
    return above / below


def parts(vector: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    found, at = [], 0
    for p in model.parameters():
        found.append(vector[at : at + p.numel()].reshape(p.shape))
        at += p.numel()
    return found


def test_the_matching_loss_is_the_naive_one(problem):
    flat, images, labels, rate, start, target, steps = problem
    given = [value.clone().requires_grad_() for value in (images, labels, rate)]
    loss = matching_loss(student(flat, start, steps, *given), start, target)
    copies = [value.clone().requires_grad_() for value in (images, labels, rate)]
    expected = naive_matching(flat.model, *copies, parts(target, flat.model), steps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and loss.item() != pytest.approx(
        1, abs=0.01
    )
    ours, theirs = torch.autograd.grad(loss, given), torch.autograd.grad(expected, copies)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14) and a.abs().max() > 1e-5


def test_hard_labels_are_soft_ones_of_one_class(problem):
    flat, images, _, rate, start, target, steps = problem
    hard = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = matching_loss(student(flat, start, steps, images, hard, rate), start, target)
    sure = torch.eye(3, dtype=torch.float64)[hard] * 200
    expected = naive_matching(flat.model, images, sure, rate, parts(target, flat.model), steps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("which", ["images", "labels", "rate"])
def test_gradients_are_finite_differences(problem, which):
    flat, images, labels, rate, start, target, steps = problem
    given = {"images": images, "labels": labels, "rate": rate}

    def value(**changed) -> torch.Tensor:
        own = given | changed
        return matching_loss(student(flat, start, steps, *own.values()), start, target)

    own = given[which].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(**{which: own}), own)
    direction = torch.randn(
        given[which].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    step = 1e-5 * direction
    difference = (value(**{which: given[which] + step}) - value(**{which: given[which] - step})) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
    assert abs(difference) > 1e-4


def test_batches_are_cut_from_permutations():
    """Six images in fours: all six, then all six again; each image is changed by itself."""
    steps = list(drawn_steps(6, replace(TINY, steps=5, batch_size=4), 8, torch.Generator().manual_seed(0)))
    sizes = [len(indices) for indices, _ in steps]
    assert sorted(sizes[:2]) == [2, 4] and sorted(sizes[2:4]) == [2, 4]
    for pair in (steps[:2], steps[2:4]):
        assert sorted(torch.cat([indices for indices, _ in pair]).tolist()) == list(range(6))
    values = {len(change.values) for indices, changes in steps for change in changes if len(indices) == 4}
    assert values == {4}
    assert len({change.operation for _, changes in steps for change in changes}) > 1


# --- experts


def naive_gsam(parameters: list[torch.Tensor], loss, rho: float, alpha: float) -> list[torch.Tensor]:
    """The direction, with lists of parameters and entries one by one."""
    g = torch.autograd.grad(loss(parameters), parameters)
    length = sum(((w * gi) ** 2).sum() for w, gi in zip(parameters, g, strict=True)).sqrt()
    moved = [
        (w + rho * w * w * gi / length).detach().requires_grad_() for w, gi in zip(parameters, g, strict=True)
    ]
    h = torch.autograd.grad(loss(moved), moved)
    inner = sum((a * b).sum() for a, b in zip(g, h, strict=True))
    square = sum((b * b).sum() for b in h)
    return [b - alpha * (a - inner / square * b) for a, b in zip(g, h, strict=True)]


def test_gsam_is_the_naive_one():
    model = two_layers(3)
    flat, generator = Flat(model), torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (7,), generator=generator)
    shares = torch.eye(3, dtype=torch.float64)[labels]
    own = [p.detach().clone().requires_grad_() for p in model.parameters()]
    expected = naive_gsam(own, lambda parameters: soft_loss(logits_of(parameters, images), shares), 0.5, 0.3)
    found = gsam_direction(
        lambda w: trajectories.batch_gradient(flat, images, labels, w), flat.parameters, 0.5, 0.3
    )
    plain = trajectories.batch_gradient(flat, images, labels, flat.parameters)
    expected = torch.cat([value.reshape(-1) for value in expected])
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert (found - plain).abs().max() > 1e-3


def test_gsam_of_a_parabola_by_hand():
    """L = w1^2 / 2 + 3 w2^2 / 2 at (1, 2): g = (1, 6), |w g| = sqrt(145)."""
    found = gsam_direction(
        lambda w: torch.tensor([1.0, 3.0], dtype=torch.float64) * w,
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        rho=0.5,
        alpha=0.3,
    )
    e1, e2 = 0.5 * 1 * 1 / 145**0.5, 0.5 * 4 * 6 / 145**0.5
    h1, h2 = 1 + e1, 3 * (2 + e2)
    share = (1 * h1 + 6 * h2) / (h1 * h1 + h2 * h2)
    expected = [h1 - 0.3 * (1 - share * h1), h2 - 0.3 * (6 - share * h2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert abs(found[0] - h1) > 0.02  # what alpha takes off


def test_an_epoch_of_an_expert_is_the_naive_loop():
    """Its order, its changes of every image, and SGD along GSAM's direction."""
    model = two_layers(5)
    recipe = replace(EXPERTS, batch_size=4, lr=0.2)
    images = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(10) % 3
    flat = Flat(model)
    found = expert_epoch(flat, flat.parameters, images, labels, recipe, torch.Generator().manual_seed(7))
    generator, own = torch.Generator().manual_seed(7), [p.detach().clone() for p in model.parameters()]
    for indices in torch.randperm(10, generator=generator).split(4):
        changed = apply(images[indices], draw(dsa(), len(indices), 4, generator, per_sample=True))
        shares = torch.eye(3, dtype=torch.float64)[labels[indices]]
        own = [p.requires_grad_() for p in own]

        def loss(parameters, changed=changed, shares=shares):
            return soft_loss(logits_of(parameters, changed), shares)

        direction = naive_gsam(own, loss, recipe.rho, recipe.alpha)
        own = [(p - recipe.lr * d).detach() for p, d in zip(own, direction, strict=True)]
    expected = torch.cat([p.reshape(-1) for p in own])
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10)
    assert (found - flat.parameters).norm() > 0.05


def test_experts_learn_and_differ(data, trained):
    found = trained(data)
    assert found.lacking() == []
    starts = [found.state(number, 0) for number in range(2)]
    assert not torch.equal(*starts)
    assert torch.equal(starts[1], Flat.of("convnet1-w4", 3, 8, seed=1).parameters)

    def loss(w):
        return F.cross_entropy(found.network(w, found.inputs), data.labels).item()

    for number in range(2):
        losses = [loss(found.state(number, epoch)) for epoch in range(5)]
        assert losses[-1] < losses[0] - 0.1
        assert torch.equal(found.state(number, -1), found.state(number, 4))


def test_an_expert_goes_on_where_it_was_stopped(data, trained, tmp_path, monkeypatch):
    epochs = []
    usual = trajectories.expert_epoch

    def cut(*arguments):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return usual(*arguments)

    folder = tmp_path / "cut"
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="0 of 2 experts are in .*; run"),
    ):
        patch.setattr(trajectories, "expert_epoch", cut)
        Trajectories(data, EXPERTS, folder).train()
    assert len(list((folder / "00000").glob("*.safetensors"))) == 3  # as initialised, and two epochs
    again = Trajectories(data, EXPERTS, folder)
    counted = []
    monkeypatch.setattr(trajectories, "expert_epoch", lambda *a: counted.append(1) or usual(*a))
    again.train()
    assert len(counted) == 2 + 4
    for number in range(2):
        for epoch in range(5):
            assert torch.equal(again.state(number, epoch), trained(data).state(number, epoch))


def test_an_expert_that_another_process_trains_is_left_to_it(data, tmp_path):
    found = Trajectories(data, EXPERTS, tmp_path)
    with files.locked(tmp_path / "00000", "a test"):
        assert found.train_one(0, wait=False) is False and found.train_one(1, wait=False) is True
    assert found.lacking() == [0]
    assert found.train_one(0) is True and found.lacking() == []


def test_a_folder_of_other_experts_is_refused(data, tmp_path):
    Trajectories(data, EXPERTS, tmp_path)
    with pytest.raises(
        ValueError, match=r"experts of other settings: lr = 0\.1, wanted 0\.2; choose another"
    ):
        Trajectories(data, replace(EXPERTS, lr=0.2), tmp_path)
    with pytest.raises(ValueError, match=r"other settings: data\[1\] = train, wanted train, first 2 a class"):
        Trajectories(data.first(2), EXPERTS, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged .*; delete its folder and run again"):
        Trajectories(data, EXPERTS, tmp_path)


def test_experts_that_cannot_be_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="convnet1-bn keeps running statistics"):
        Trajectories(data, replace(EXPERTS, network="convnet1-bn"), tmp_path / "a").train()
    with pytest.raises(FloatingPointError, match=r"not finite after epoch \d+; lower lr \(1e\+30\)"):
        Trajectories(data, replace(EXPERTS, lr=1e30), tmp_path / "b").train()
    for wrong in ({"count": 0}, {"epochs": 0}, {"batch_size": 0}, {"images": 0}, {"lr": 0.0}, {"rho": -1.0}):
        with pytest.raises(ValueError, match="experts are at least 1|lr and eps are positive"):
            replace(EXPERTS, **wrong)
    with pytest.raises(ValueError, match="unknown augmentation 'colour'"):
        replace(EXPERTS, augmentation="colour")


@pytest.mark.parametrize("whiten", [True, False])
def test_networks_see_whitened_or_normalised_images(data, tmp_path, whiten):
    found = Trajectories(data, replace(EXPERTS, whiten=whiten, images=3), tmp_path)
    pixels = everything(data.first(3)) / 255
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (EXPERTS.mean, EXPERTS.std))
    # Of all images, not of those alone that experts learn from.
    expected = zca.fit(everything(data))(pixels) if whiten else (pixels - mean) / std
    assert torch.allclose(found.inputs, expected, atol=1e-6)
    assert (tmp_path / "zca.safetensors").is_file() == whiten
    assert torch.allclose(found.view.pixels(found.inputs), pixels, atol=1e-5)


# --- how a set begins


def test_soft_labels_begin_as_the_mean_of_experts_that_are_right():
    """Of three experts and three images: two right, all right, none."""
    logits = torch.tensor(
        [
            [[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]],
            [[1.0, 2.0], [1.0, 4.0], [3.0, 1.0]],
            [[6.0, 0.0], [2.0, 5.0], [1.0, 0.0]],
        ]
    )
    found = mean_of_right(logits, torch.tensor([0, 1, 1]))
    assert found.tolist() == [[4.0, 0.5], [1.0, 4.0], [3.0, pytest.approx(2 / 3)]]


def test_images_begin_as_real_ones_that_experts_get_right(data, trained):
    found = trained(data)
    images, logits = initial(found, 3, "correct", seed=4)
    last = [found.network(found.state(number, -1), found.inputs).detach() for number in range(2)]
    right = [own.argmax(1) == data.labels for own in last]
    assert not right[0].all() or not right[1].all()  # else this shows nothing
    for place, image in enumerate(images):
        (number,) = (found.inputs == image).all((1, 2, 3)).nonzero().flatten().tolist()
        label = place // 3
        enough = right[0][data.labels == label].sum() >= 3
        assert data.labels[number] == label and (right[0][number] or not enough)
        own = [one[number] for one, good in zip(last, right, strict=True) if good[number]]
        assert torch.allclose(logits[place], torch.stack(own).mean(0), atol=1e-5)
    assert not torch.equal(initial(found, 3, "correct", seed=5)[0], images)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 9


def test_any_real_images_have_the_first_expert_s_logits(data, trained):
    """Right or wrong, as the authors have it for their one setting of the kind."""
    found = trained(data)
    images, logits = initial(found, 5, "real", seed=4)
    assert torch.equal(logits, found.network(found.state(0, -1), images).detach())
    wrong = logits.argmax(1) != torch.arange(3).repeat_interleave(5)
    assert wrong.any()  # else this shows nothing


class Stub:
    """Experts whose verdicts are given: expert e gets image i of its class right where verdicts[e][i]."""

    def __init__(self, verdicts: list[list[bool]], classes: int = 2):
        count = len(verdicts[0])
        self.verdicts, self.device = verdicts, "cpu"
        labels = torch.arange(classes).repeat_interleave(count)
        pixels = torch.arange(count).repeat(classes)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
        self.data = self.images = from_tensors("stub", "train", ("a", "b"), pixels.contiguous(), labels)
        self.inputs = torch.stack([labels.float(), pixels[:, 0, 0, 0].float()], 1)[:, :, None, None]
        self.recipe = replace(EXPERTS, count=len(verdicts))

    def state(self, number: int, epoch: int) -> torch.Tensor:
        assert epoch == -1
        return torch.tensor(number)

    def network(self, w: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        labels, numbers = inputs[:, 0, 0, 0].long(), inputs[:, 1, 0, 0].long()
        right = torch.tensor(self.verdicts[int(w)])[numbers]
        return F.one_hot(torch.where(right, labels, 1 - labels), 2).float()


def test_where_the_first_expert_is_right_too_rarely_the_next_is_asked():
    verdicts = [[True, False, False, False, True], [True, True, False, True, False]]
    images, _ = initial(Stub(verdicts), 4, "correct", seed=0)
    numbers = images[:, 1, 0, 0].reshape(2, 4).tolist()
    for own in numbers:
        assert set(own[:2]) == {0, 4} and set(own[2:]) == {1, 3}
    with pytest.raises(
        ValueError, match="ipc is 5, and experts get 4 images of 'a' right .* or take init='real'"
    ):
        initial(Stub(verdicts), 5, "correct", seed=0)
    images, logits = initial(Stub(verdicts), 5, "real", seed=0)
    assert sorted(images[:5, 1, 0, 0].tolist()) == [0, 1, 2, 3, 4] and logits.isfinite().all()


# --- the loop


def matching(data, trained, settings=TINY, ipc=2, seed=0, state=None) -> module._Matching:
    return module._Matching(trained(data, settings.experts), ipc, settings, seed, state)


def test_the_first_steps_by_hand(data, trained):
    """Images, labels and rate move against L's gradients by their own rates, and on by their own momenta."""
    run = matching(data, trained)
    own, rates = [run.set.images, run.set.rate, run.set.logits], (0.5, 1e-4, 0.5)
    speeds = [torch.zeros_like(value) for value in own]
    for iteration in range(2):
        expected, state = (
            [value.detach().clone().requires_grad_() for value in own],
            run.generator.get_state(),
        )
        start, target = run.segment(iteration)
        side, count = 8, len(run.labels)
        steps = list(drawn_steps(count, TINY, side, run.generator))
        images, rate, labels = expected
        loss = matching_loss(
            student(run.trajectories.network, start, steps, images, labels, rate), start, target
        )
        gradients = torch.autograd.grad(loss, expected)
        run.generator.set_state(state)
        assert run.iterate(iteration) == pytest.approx(loss.item(), rel=1e-5)
        for value, before, g, speed, lr, momentum in zip(
            own, expected, gradients, speeds, rates, (0.5, 0.5, 0.9), strict=True
        ):
            speed.mul_(momentum).add_(g)
            moved = before.detach() - lr * speed
            assert torch.allclose(value, moved, rtol=1e-4, atol=1e-7) and not torch.equal(value, before)


def test_the_range_of_start_epochs_grows():
    settings = replace(DATM.paper("cifar-10", 10), iterations=5000)
    assert [settings.upper_at(i) for i in (0, 99, 100, 550, 999, 1000, 4999)] == [10, 10, 11, 15, 19, 20, 20]
    fixed = DATM.paper("cifar-10", 1000)
    assert {fixed.upper_at(i) for i in range(0, 10_000, 500)} == {60}


def test_segments_are_drawn_from_the_range(data, trained):
    """From the first epoch on, below the upper end of the iteration, M epochs apart, of all experts."""
    settings = replace(TINY, first_epoch=1, upper=2, last_upper=4, widened_by=10)
    run, known = matching(data, trained, settings), {}
    for number in range(2):
        for epoch in range(5):
            known[tuple(run.trajectories.state(number, epoch).tolist())] = (number, epoch)
    drawn = {0: set(), 10: set()}
    for iteration, found in drawn.items():
        for _ in range(60):
            start, target = (known[tuple(w.tolist())] for w in run.segment(iteration))
            assert target == (start[0], start[1] + 1)
            found.add(start)
    assert drawn[0] == {(0, 1), (1, 1)}
    assert drawn[10] == {(number, epoch) for number in range(2) for epoch in (1, 2, 3)}


def test_an_iteration_above_the_threshold_changes_nothing(data, trained, capsys):
    run = matching(data, trained, replace(TINY, threshold=1e-9))
    before = {name: value.clone() for name, value in run.set.state_dict().items()}
    run.go_on()
    assert all(torch.equal(before[name], value) for name, value in run.set.state_dict().items())
    assert run.skipped == TINY.iterations and not run.optimizer.state
    assert "5 of 5 iterations had a loss above the threshold" in capsys.readouterr().out
    at = matching(data, trained)
    loss = at.iterate(0)
    above = matching(data, trained, replace(TINY, threshold=loss * 0.999))
    above.iterate(0)
    assert (at.skipped, above.skipped) == (0, 1)


def test_the_loss_falls(data, trained):
    """On the same segments, before and after; of whole batches without changes, which would be noise here."""
    still = replace(EXPERTS, augmentation="")
    settings = replace(TINY, experts=still, iterations=20, lr_images=2.0, batch_size=6)

    def mean(run) -> float:
        run.generator.manual_seed(99)
        return sum(run.loss(*run.segment(9)).item() for _ in range(12)) / 12

    run = matching(data, trained, settings)
    before = mean(run)
    run.generator.manual_seed(0)
    run.go_on()
    assert mean(run) < 0.8 * before


# --- the whole


def test_the_same_seed_gives_the_same_set(data, trained):
    folder, state = trained(data).folder, torch.get_rng_state()
    first = datm(data, 2, TINY, folder, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert same(datm(data, 2, TINY, folder, seed=1), first)
    assert not same(datm(data, 2, TINY, folder, seed=2), first)


def test_a_set_says_what_it_is(data, trained):
    found = datm(data, 3, TINY, trained(data).folder, seed=1)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found.classes == CLASSES
    assert (found.name, found.split, found.image_size) == ("toy", "DATM, ipc 3, seed 1", 8)
    assert everything(found).dtype == torch.float32 and found.targets.shape == (9, 3)
    assert torch.allclose(found.targets.sum(1), torch.ones(9), atol=1e-6) and found.targets.max() < 1
    assert found.lr != TINY.rate and found.lr == pytest.approx(TINY.rate, rel=0.5)
    assert torch.equal(found.whitening.matrix, trained(data).view.whitening.matrix)


def test_it_is_what_the_optimiser_saw(data, trained):
    """Whitened again, the pixels are what the network was trained on."""
    run = matching(data, trained, ipc=2)
    run.go_on()
    found = run.result()
    assert torch.allclose(found.whitening(everything(found)), run.set.images, atol=1e-5)
    real, _ = initial(trained(data), 2, "correct", 0)
    assert (run.set.images - real).abs().max() > 1e-3
    assert torch.allclose(found.targets, run.set.logits.softmax(1))


def test_hard_labels_and_8_bits_are_switches(data, trained):
    folder = trained(data).folder
    whole = datm(data, 2, TINY, folder)
    rounded = datm(data, 2, replace(TINY, images="8-bit"), folder)
    assert everything(rounded).dtype == torch.uint8
    assert torch.equal(everything(rounded), in_8_bits(everything(whole)))
    assert torch.equal(rounded.targets, whole.targets) and rounded.lr == whole.lr
    hard = datm(data, 2, replace(TINY, labels="hard"), folder)
    assert hard.targets is None and not torch.equal(everything(hard), everything(whole))
    normalised = replace(TINY, labels="hard", images="8-bit", experts=replace(EXPERTS, whiten=False))
    plain = datm(data, 2, normalised, trained(data, normalised.experts).folder)
    assert (plain.targets, plain.whitening) == (None, None) and everything(plain).dtype == torch.uint8


def test_an_interrupted_set_goes_on(data, trained, tmp_path, monkeypatch):
    """After three iterations, the last of them unsaved; its state is not another set's."""
    folder, state = trained(data).folder, tmp_path / "state.safetensors"
    whole = datm(data, 2, TINY, folder)
    usual, calls = module._Matching.iterate, []

    def cut(self, iteration):
        calls.append(iteration)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(self, iteration)

    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="3 of 5 iterations are in .*; run"),
    ):
        patch.setattr(module._Matching, "iterate", cut)
        datm(data, 2, TINY, folder, state=state)
    for other in ({"seed": 1}, {"ipc": 3}, {"settings": replace(TINY, steps=4)}):
        options = {"ipc": 2, "settings": TINY, "experts": folder, "state": state} | other
        with pytest.raises(
            ValueError, match=r"state\.safetensors is of another set: .*; delete it, or choose"
        ):
            datm(data, **options)
    calls.clear()
    monkeypatch.setattr(module._Matching, "iterate", lambda self, i: calls.append(i) or usual(self, i))
    assert same(datm(data, 2, TINY, folder, state=state), whole) and calls == [3, 4]


def test_what_cannot_be_made_is_refused(data, trained, tmp_path):
    folder = trained(data).folder
    for ipc in (0, 13):
        with pytest.raises(
            ValueError, match=rf"ipc is 1 \.\.\. 12, which the smallest class of toy has, got {ipc}"
        ):
            datm(data, ipc, TINY, tmp_path / "none")
    assert not (tmp_path / "none").exists()  # before anything is trained
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in iteration 0; lower lr_images"):
        datm(data, 2, replace(TINY, rate=1e30), folder)
    with pytest.raises(FloatingPointError, match=r"the learned rate is -.*; lower the rate's \(10000.0\)"):
        run = matching(data, trained, replace(TINY, lr_rate=1e4))
        run.set.rate.data.fill_(-0.5)
        run.result()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"upper": 0}, "0 <= first_epoch < upper <= last_upper"),
        ({"first_epoch": 2}, "first_epoch < upper"),
        ({"upper": 3, "last_upper": 2}, "upper <= last_upper"),
        (
            {"last_upper": 5},
            "epochs up to 5 are matched and experts have 4; train them longer, or lower last_upper",
        ),
        ({"expert_epochs": 2}, "epochs up to 5 are matched"),
        ({"rate": 0.0}, "a learning rate is positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(TINY, **wrong)


def test_the_authors_settings():
    """Steps, M, rates of images and labels, range, its widening and the batch, row by row."""
    rows = {
        ("cifar-10", 1): (80, 2, 100, 5, 0, 4, 4, 10),
        ("cifar-10", 10): (80, 2, 100, 2, 0, 10, 20, 100),
        ("cifar-10", 50): (80, 2, 1000, 2, 0, 20, 40, 500),
        ("cifar-10", 500): (40, 2, 50, 10, 40, 60, 60, 1000),
        ("cifar-10", 1000): (100, 2, 50, 10, 40, 60, 60, 1000),
        ("cifar-100", 1): (40, 3, 1000, 10, 0, 10, 20, 1000),
        ("cifar-100", 10): (80, 2, 1000, 10, 0, 30, 50, 1000),
        ("cifar-100", 50): (80, 2, 1000, 10, 20, 70, 70, 1000),
        ("cifar-100", 100): (80, 2, 50, 10, 30, 70, 70, 1000),
    }
    for (dataset, ipc), row in rows.items():
        s = DATM.paper(dataset, ipc)
        ranges = (s.first_epoch, s.upper, s.last_upper, s.batch_size)
        assert (s.steps, s.expert_epochs, s.lr_images, s.lr_labels, *ranges) == row
        assert (s.iterations, s.rate, s.images, s.labels, s.experts) == (
            10_000,
            0.01,
            "float",
            "soft",
            Experts(),
        )
        first = (dataset, ipc) == ("cifar-10", 1)
        assert (s.threshold, s.lr_rate) == ((1.1, 1e-7) if first else (1.0, 1e-5))
        assert s.init == ("real" if (dataset, ipc) == ("cifar-100", 50) else "correct")
    widened = {
        key: DATM.paper(*key).widened_by
        for key in rows
        if DATM.paper(*key).upper != DATM.paper(*key).last_upper
    }
    assert widened == {
        ("cifar-10", 10): 1000,
        ("cifar-10", 50): 2000,
        ("cifar-100", 1): 1000,
        ("cifar-100", 10): 2000,
    }
    assert DATM.paper("cifar-10", 20) == DATM.paper("cifar-10", 10)
    assert DATM.paper("cifar-10", 40) == DATM.paper("cifar-10", 50)
    assert DATM.paper("food-101", 10) == DATM.paper("cifar-10", 10)


def test_the_small_settings_are_whole():
    """Whitened, soft labels, a range that grows; only shorter."""
    for ipc in (1, 10, 50):
        s = DATM.small(ipc)
        assert (s.labels, s.images, s.init, s.experts.whiten) == ("soft", "float", "correct", True)
        assert s.experts.network == "convnet3-w64" and s.upper < s.last_upper and s.widened_by < s.iterations
