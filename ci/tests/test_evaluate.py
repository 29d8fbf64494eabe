"""The hard-label protocol: augmentation, CutMix, the schedule, and a network that learns."""

import copy
from dataclasses import replace

import pytest
import torch

from igd_lib import evaluate as module
from igd_lib.config import IGD_HARD, Protocol
from igd_lib.data import from_tensors
from igd_lib.evaluate import accuracy, augment, check_class_order, cutmix, evaluate, make_optimizer, predict

HALF = (0.5, 0.5, 0.5)
PLAIN = Protocol(
    "plain", 32, HALF, HALF, "adamw", 1e-3, 0.01, epochs=12, crop_scale=(1.0, 1.0), flip=False, jitter=0.0, lighting=0.0, cutmix=0.0,
    evaluations=3,
)  # fmt: skip


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
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(500, -1, -1, -1)
    found = augment(images, replace(PLAIN, crop_scale=(0.5, 1.0)), generator())
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
    torch.testing.assert_close(augment(ones, replace(PLAIN, crop_scale=(0.5, 1.0), flip=True), generator()), ones)


def test_jitter_by_hand(pixels):
    """Grey images have nothing to saturate: brightness and contrast map x to an increasing function of x in [0, 1]."""
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


# --- the optimiser and the schedule


def test_optimizers():
    model = torch.nn.Linear(2, 2)
    adamw = make_optimizer(model, IGD_HARD)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["lr"] == 1e-3 and adamw.defaults["weight_decay"] == 0.01
    sgd = make_optimizer(model, replace(IGD_HARD, optimizer="sgd", lr=0.01, weight_decay=5e-4))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9 and sgd.defaults["weight_decay"] == 5e-4


@pytest.mark.parametrize(("evaluations", "expected"), [(5, [2, 4, 6, 8, 10]), (1, [10]), (10, list(range(1, 11))), (100, list(range(1, 11)))])
def test_tests_are_spread_over_the_training(toy_data, monkeypatch, evaluations, expected):
    """About `evaluations` tests, evenly, the last epoch among them; after every epoch if there are fewer epochs."""
    steps, at = [], []
    real = module.make_optimizer

    def counting(model, protocol):
        optimizer = real(model, protocol)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", counting)
    monkeypatch.setattr(module, "accuracy", lambda *_: at.append(len(steps)) or 50.0)
    protocol = replace(PLAIN, image_size=16, epochs=10, evaluations=evaluations, batch_size=18)  # one step an epoch
    score = evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=0)
    assert at == expected
    assert (score.epochs, score.best_epoch) == (10, expected[0])


def test_best_and_last_are_both_there(toy_data, monkeypatch):
    values = iter([30.0, 70.0, 40.0])
    monkeypatch.setattr(module, "accuracy", lambda *_: next(values))
    protocol = replace(PLAIN, image_size=16, epochs=3)
    score = evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=4)
    assert (score.best, score.best_epoch, score.last, score.reported, score.seed) == (70.0, 2, 40.0, 70.0, 4)
    values = iter([30.0, 70.0, 40.0])
    assert evaluate(toy_data, toy_data, network="convnet2", protocol=replace(protocol, reported="last"), seed=4).reported == 40.0


def test_the_rate_falls_at_the_milestones(toy_data, monkeypatch):
    rates, real = [], module.make_optimizer

    def watching(model, protocol):
        optimizer = real(model, protocol)
        optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", watching)
    monkeypatch.setattr(module, "accuracy", lambda *_: 0.0)
    evaluate(toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=16, batch_size=18), seed=0)
    assert rates == pytest.approx([1e-3] * 8 + [2e-4] * 2 + [4e-5] * 2)


def test_epochs_follow_the_images_a_class(toy_data, monkeypatch):
    asked = []
    monkeypatch.setattr(Protocol, "epochs_for", lambda self, ipc, classes: asked.append((ipc, classes)) or 1)
    evaluate(toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=16), seed=0)
    assert asked == [(6, 3)]


def test_one_training_step_by_hand(toy_data, monkeypatch):
    """Cross-entropy with the mixed labels, share by share, and one step of SGD with weight decay."""
    finals = []
    monkeypatch.setattr(module, "accuracy", lambda model, *_: finals.append(copy.deepcopy(model)) or 0.0)
    monkeypatch.setattr(module, "augment", lambda pixels, *_: pixels)
    monkeypatch.setattr(module, "cutmix", lambda inputs, labels, *_: (inputs, (labels + 1) % 3, 0.75))
    protocol = replace(PLAIN, image_size=16, optimizer="sgd", lr=0.1, weight_decay=0.5, epochs=1, milestones=(), batch_size=18)
    evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=7, device="cpu", mixed_precision=False)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = module.make_network("convnet2", num_classes=3, image_size=16).double()
    images = toy_data.fetch(torch.arange(18)).double() / 127.5 - 1  # mean and sd 0.5
    log_p = model(images).log_softmax(1)
    rows = torch.arange(18)
    loss = -(0.75 * log_p[rows, toy_data.labels] + 0.25 * log_p[rows, (toy_data.labels + 1) % 3]).mean()
    loss.backward()
    for found, parameter in zip(finals[0].parameters(), model.parameters(), strict=True):
        by_hand = parameter - 0.1 * (parameter.grad + 0.5 * parameter)
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-3, atol=1e-5)


# --- class order


def test_other_class_orders_are_refused_at_the_first_difference(toy_data):
    other = replace(toy_data, classes=("a", "c", "b"))
    with pytest.raises(ValueError, match="label 1 is 'b' in the distilled set and 'c' in the test set"):
        evaluate(toy_data, other, network="convnet2", protocol=PLAIN, seed=0)
    with pytest.raises(ValueError, match="2 classes in the distilled set, 3 in the test set"):
        check_class_order(("a", "b"), ("a", "b", "c"))


# --- accuracy and learning


def test_accuracy_by_hand(toy_data):
    """A network that says the red mean's third: normalised pixels go in, argmax comes out."""

    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            mean = images.mean((1, 2, 3))
            return torch.stack([-mean, mean, torch.full_like(mean, -9.0)], dim=1) * self.scale

    images = torch.tensor([10, 250, 20, 240], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    data = from_tensors("toy", "test", ("dark", "light", "none"), images, torch.tensor([0, 1, 0, 2]))
    protocol = replace(PLAIN, image_size=16)
    assert predict(Brightness(), data, protocol).tolist() == [0, 1, 0, 1]
    assert accuracy(Brightness(), data, protocol) == 75.0


def test_a_network_learns_from_real_images(fashion_train, fashion_test):
    """10 images a class for 10 epochs, tested on 500 test images."""
    few, test = fashion_train.per_class(10, seed=0), fashion_test.per_class(50, seed=0)
    score = evaluate(few, test, network="convnet3", protocol=replace(PLAIN, flip=True, epochs=10, evaluations=2), seed=0, device="cpu")
    assert score.last > 30  # chance is 10
    assert score.best >= score.last and score.best_epoch in (5, 10)


def test_evaluation_is_deterministic_in_the_seed(toy_data, monkeypatch):
    """The final weights too, with every augmentation on and other global random numbers before."""
    finals = []
    monkeypatch.setattr(module, "accuracy", lambda model, *_: finals.append(model.classifier.weight.detach().clone()) or 0.0)
    protocol = replace(IGD_HARD, image_size=16, epochs=3, batch_size=8, evaluations=1)
    for other, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(other)
        state = torch.random.get_rng_state()
        evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=seed, device="cpu")
        assert torch.equal(torch.random.get_rng_state(), state)  # and it leaves them alone
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


def test_mixed_precision_changes_only_the_rounding(toy_data, monkeypatch):
    finals = []
    monkeypatch.setattr(module, "accuracy", lambda model, *_: finals.append(model.classifier.weight.detach().clone()) or 0.0)
    protocol = replace(PLAIN, image_size=16, optimizer="sgd", lr=0.01, epochs=3, evaluations=1)
    for mixed in (False, True):
        evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=0, device="cpu", mixed_precision=mixed)
    assert finals[1].dtype == torch.float32 and not torch.equal(*finals)
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0.02 * finals[0].abs().max().item())


def test_images_are_resized_to_the_protocol(toy_data):
    score = evaluate(toy_data, toy_data, network="convnet2", protocol=replace(PLAIN, image_size=24, epochs=1), seed=0)
    assert 0 <= score.last <= 100


def test_a_non_finite_loss_raises(toy_data):
    protocol = replace(PLAIN, image_size=16, optimizer="sgd", lr=1e30, epochs=20)
    with pytest.raises(FloatingPointError, match="lower lr"):
        evaluate(toy_data, toy_data, network="convnet2", protocol=protocol, seed=0)
