"""Training trajectory, class-averaged gradients and Algorithm 2."""

import copy
import math
import os
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import reference
from igd_lib import surrogate
from igd_lib.config import AUGMENTATION
from igd_lib.data.images import ImageData, from_tensors, to_float
from igd_lib.models.networks import ConvNet
from igd_lib.surrogate import (
    Checkpoints,
    ClassGradients,
    checkpoint_similarities,
    class_gradients,
    filter_images,
    kept,
    regular_checkpoints,
    select_checkpoints,
    similarities_along,
    similarity,
    similarity_matrices,
    train_surrogate,
)
from igd_lib.tools import files, machine, progress
from igd_lib.tools.recent import Recent

# Two classes, two parameters, five epochs; every cosine below can be done in the head.
TRAJECTORY = torch.tensor(
    [
        [[1.0, 0.0], [1.0, 0.0]],
        [[1.0, 0.0], [0.0, 1.0]],  # to epoch 0: per class 1 and 0; means (1, 0) and (1/2, 1/2)
        [[0.0, 1.0], [0.0, 1.0]],  # to epoch 0: orthogonal
        [[1.0, 0.0], [1.0, 0.0]],  # like epoch 0, orthogonal to epoch 2
        [[1.0, 0.0], [1.0, 1.0]],  # to epoch 3: per class 1 and 0.707; means (1, 0) and (1, 1/2)
    ]
)


def test_selection_by_per_class_cosines():
    # Epoch 1 lies exactly at the threshold: not kept. Epoch 3 is kept because the reference is epoch 2.
    assert select_checkpoints(TRAJECTORY, threshold=0.5, similarity="per_class") == [0, 2, 3]
    values = checkpoint_similarities(TRAJECTORY, threshold=0.5, similarity="per_class")
    assert values == pytest.approx([float("-inf"), 0.5, 0, 0, (1 + 0.5**0.5) / 2])


def test_selection_by_the_mean_gradient():
    assert select_checkpoints(TRAJECTORY, threshold=0.5, similarity="mean") == [0, 2, 3]
    values = checkpoint_similarities(TRAJECTORY, threshold=0.5, similarity="mean")
    assert values == pytest.approx([float("-inf"), 0.5**0.5, 0, 0, 2 / 5**0.5])
    # Orthogonal means lie exactly at the threshold 0: nothing after the first is kept.
    assert select_checkpoints(TRAJECTORY, threshold=0.0, similarity="mean") == [0]
    # At 0.8 the paper's similarity keeps epoch 1 (0.707), and then compares epoch 2 with it (0.707).
    assert select_checkpoints(TRAJECTORY, threshold=0.8, similarity="mean") == [0, 1, 2, 3]


def test_the_two_similarities_differ_where_classes_cancel():
    """Classes that disagree: per-class cosines are 1 and -1; the class means are orthogonal."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert similarity(a, b, "per_class") == pytest.approx(0)
    assert similarity(a, b, "mean") == pytest.approx(0)
    c = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert similarity(a, c, "per_class") == pytest.approx(1)
    assert similarity(a, c, "mean") == pytest.approx(4 / (2**0.5 * 10**0.5))


def test_selection_reads_an_iterable_once():
    seen = []

    def one_by_one():
        for epoch, gradient in enumerate(TRAJECTORY):
            seen.append(epoch)
            yield gradient

    assert select_checkpoints(one_by_one(), threshold=0.5, similarity="per_class") == [0, 2, 3]
    assert seen == [0, 1, 2, 3, 4]


def test_selection_errors():
    with pytest.raises(ValueError, match="no gradients"):
        select_checkpoints([])
    with pytest.raises(ValueError, match="'mean' or 'per_class'"):
        select_checkpoints(TRAJECTORY, similarity="cosine")


# --- class gradients


def test_class_gradients_equal_autograd_of_the_mean_loss(toy, toy_data):
    """In double precision by a loop over images; the library computes in single precision."""
    single, double = toy().checkpoints, toy(torch.float64).checkpoints
    for label in range(3):
        images = toy_data.of_class(label)
        found = class_gradients(single, images, label)
        exact = images.double() / 127.5 - 1
        expected = torch.stack(
            [reference.class_gradient(double.model, state, exact, label) for state in double.states]
        )
        assert found.shape == expected.shape == (3, sum(p.numel() for p in single.model.parameters()))
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item()
        )


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_class_gradients_do_not_depend_on_the_batch_size(toy, toy_data, batch_size):
    images = toy_data.of_class(1)  # 6 images, so 4 and 5 leave an unequal rest
    found, whole = (
        class_gradients(toy().checkpoints, images, 1, batch_size=size) for size in (batch_size, 6)
    )
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_class_gradients_leave_the_model_alone(toy, toy_data):
    checkpoints = toy().checkpoints
    before = copy.deepcopy(checkpoints.model.state_dict())
    class_gradients(checkpoints, toy_data.of_class(0), 0)
    assert all(p.grad is None for p in checkpoints.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in checkpoints.model.state_dict().items())


def test_a_class_without_images_raises(toy, toy_data):
    with pytest.raises(ValueError, match="class 7"):
        class_gradients(toy().checkpoints, toy_data.of_class(0)[:0], 7)


# --- training


def fresh_model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ConvNet(2, 3, 16, width=8)


def test_trajectory_starts_at_the_initialisation(toy_data):
    model = fresh_model()
    initial = copy.deepcopy(model.state_dict())
    checkpoints = train_surrogate(model, toy_data, epochs=2, batch_size=4, saves_in_first_epoch=3)
    # 18 images in batches of 4 are 5 steps; thirds of an epoch are rounded to steps 2, 3 and 5.
    assert checkpoints.epochs == pytest.approx([0, 2 / 5, 3 / 5, 1, 2])
    assert checkpoints.learning_rates == [1e-2] * 5 and len(checkpoints) == 5
    assert all(torch.equal(initial[name], value) for name, value in checkpoints.states[0].items())
    last = model.state_dict()
    assert all(torch.equal(last[name], value) for name, value in checkpoints.states[-1].items())
    assert not torch.equal(
        checkpoints.states[0]["classifier.weight"], checkpoints.states[1]["classifier.weight"]
    )
    assert not model.training


def test_first_step_is_sgd_by_hand(toy_data):
    """One batch of everything: w - lr (grad + weight decay w)."""
    model = fresh_model()
    expected = copy.deepcopy(model).double()
    loss = torch.nn.functional.cross_entropy(
        expected(to_float(toy_data.fetch(torch.arange(18))).double()), toy_data.labels
    )
    loss.backward()
    checkpoints = train_surrogate(model, toy_data, epochs=1, lr=0.1, weight_decay=0.5, batch_size=18)
    for name, parameter in expected.named_parameters():
        by_hand = parameter - 0.1 * (parameter.grad + 0.5 * parameter)
        torch.testing.assert_close(checkpoints.states[1][name].double(), by_hand, rtol=1e-4, atol=1e-5)


def test_training_is_deterministic_in_the_seed(toy_data):
    runs = [
        train_surrogate(fresh_model(), toy_data, epochs=2, batch_size=4, seed=seed).states[-1]
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["classifier.weight"], runs[2]["classifier.weight"])


def test_a_non_finite_loss_raises(toy_data):
    model = fresh_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train_surrogate(model, toy_data, epochs=1)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"saves_in_first_epoch": 0}])
def test_bad_training_options_raise(toy_data, options):
    with pytest.raises(ValueError, match="at least 1"):
        train_surrogate(fresh_model(), toy_data, **options)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("augment", [None, AUGMENTATION], ids=["plain", "augmented"])
def test_an_interrupted_training_resumes_to_the_same_trajectory(toy_data, tmp_path, monkeypatch, augment):
    options = dict(epochs=3, batch_size=4, saves_in_first_epoch=2, augment=augment)
    whole = train_surrogate(fresh_model(), toy_data, **options)
    batches, calls = toy_data.batches, []

    def dying(*arguments):  # in the middle of the second epoch, after one of its steps
        calls.append(1)
        for number, batch in enumerate(batches(*arguments)):
            if len(calls) == 2 and number == 2:
                raise Killed
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(type(toy_data), "batches", lambda self, *arguments: dying(*arguments))
        with pytest.raises(Killed):
            train_surrogate(fresh_model(), toy_data, folder=tmp_path, **options)
    resumed = train_surrogate(fresh_model(), toy_data, folder=tmp_path, **options)
    again = train_surrogate(fresh_model(), toy_data, folder=tmp_path, **options)  # all from disk
    for other in (resumed, again):
        assert other.epochs == whole.epochs
        for state, expected in zip(other.states, whole.states, strict=True):
            assert all(torch.equal(state[name], expected[name]) for name in expected) and list(state) == list(
                expected
            )
    assert sorted(path.name for path in tmp_path.glob("0*.safetensors")) == [
        f"{i:05d}.safetensors" for i in range(5)
    ]
    shorter = train_surrogate(fresh_model(), toy_data, folder=tmp_path, **(options | dict(epochs=2)))
    assert shorter.epochs == whole.epochs[:4]
    longer = train_surrogate(fresh_model(), toy_data, folder=tmp_path, **(options | dict(epochs=4)))
    assert longer.epochs == [*whole.epochs, 4.0]
    with pytest.raises(ValueError, match="lr = 0.01, wanted 0.02"):
        train_surrogate(fresh_model(), toy_data, folder=tmp_path, lr=0.02, **options)


class Seen(torch.nn.Module):
    """A linear model that keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.linear, self.inputs = torch.nn.Linear(3, 3), []

    def forward(self, images):
        self.inputs.append(images.detach().clone())
        return self.linear(images.mean((2, 3)))


def test_a_surrogate_is_trained_on_augmented_images(toy_data):
    """Crops, flips and colours anew in every epoch, normalised by 0.5 as the released code's."""
    plain, augmented, grey = Seen(), Seen(), Seen()
    train_surrogate(plain, toy_data, epochs=2, batch_size=18)
    train_surrogate(augmented, toy_data, epochs=2, batch_size=18, augment=AUGMENTATION)
    colourless = replace(AUGMENTATION, jitter=0.0, lighting=0.0)
    train_surrogate(grey, toy_data, epochs=2, batch_size=18, augment=colourless)
    assert plain.inputs[0].abs().max() <= 1 and len(plain.inputs) == len(augmented.inputs) == 2
    stored = {image.flatten().tolist()[0] for image in plain.inputs[0]}
    assert not stored & {image.flatten().tolist()[0] for image in augmented.inputs[0]}
    assert augmented.inputs[0].shape == (18, 3, 16, 16) and augmented.inputs[0].abs().max() > 1  # unclamped
    assert grey.inputs[0].abs().max() <= 1 + 1e-6
    # Contrast and brightness vary far more between epochs than the images' order makes them.
    spread = [torch.stack(model.inputs).mean((2, 3, 4)).std().item() for model in (plain, augmented, grey)]
    assert spread[1] > 3 * spread[0] and spread[1] > 3 * spread[2]


def test_augmentation_leaves_grey_images_grey_without_colour_operations():
    pixels = torch.randint(
        0, 256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    data = from_tensors("grey", "train", ("a", "b"), pixels.repeat(1, 3, 1, 1), torch.arange(2).repeat(3))
    model = Seen()
    colourless = replace(AUGMENTATION, jitter=0.0, lighting=0.0)
    train_surrogate(model, data, epochs=1, batch_size=6, augment=colourless)
    (inputs,) = model.inputs
    assert torch.equal(inputs[:, 0], inputs[:, 1]) and torch.equal(inputs[:, 0], inputs[:, 2])


def test_filter_images_are_some_of_the_first_and_the_same_each_time(toy_data):
    """As many as asked, of the first so many alone, of the class alone; all where there are fewer."""
    whole = {tuple(image.flatten().tolist()) for image in toy_data.of_class(1, 4)}
    found = filter_images(toy_data, 1, (3, 4))
    assert found.shape == (3, 3, 16, 16) and torch.equal(found, filter_images(toy_data, 1, (3, 4)))
    assert {tuple(image.flatten().tolist()) for image in found} < whole
    assert torch.equal(filter_images(toy_data, 1, (4, 4)), toy_data.of_class(1, 4))
    for images in ((80, 500), None):
        assert torch.equal(filter_images(toy_data, 1, images), toy_data.of_class(1))
    drawn = ImageData("n", "s", ("a",), torch.zeros(100).long(), 1, lambda indices: indices)
    chosen = filter_images(drawn, 0, (20, 50))
    assert len(set(chosen.tolist())) == 20 and chosen.max() < 50 and chosen.tolist() != list(range(20))


def test_one_pass_over_the_data_serves_every_threshold_and_both_readings(toy, toy_data):
    """The matrices give Algorithm 2's walk; gradients are made once, two classes' are alive at a time."""
    checkpoints = toy().checkpoints
    by_epoch = torch.stack(
        [class_gradients(checkpoints, toy_data.of_class(label, 4), label) for label in range(3)], dim=1
    )
    asked, alive, most = [], [], []

    def gradients(label):
        found = class_gradients(checkpoints, toy_data.of_class(label, 4), label)
        asked.append(label)
        alive[:] = [*(other for other in alive if other() is not None), weakref.ref(found)]
        most.append(len(alive))
        return found

    matrices = similarity_matrices(gradients, 3)
    assert asked == [0, 1, 2] and max(most) <= 2
    for kind, matrix in matrices.items():
        naive = [[similarity(a.double(), b.double(), kind) for a in by_epoch] for b in by_epoch]
        torch.testing.assert_close(
            matrix.double(), torch.tensor(naive, dtype=torch.float64), rtol=0, atol=1e-6
        )
        for threshold in (-2.0, *(value + 1e-4 for value in matrix.flatten().tolist()), 2.0):
            along = similarities_along(matrix, threshold)
            assert kept(along, threshold) == select_checkpoints(
                by_epoch, threshold=threshold, similarity=kind
            )
    with pytest.raises(FloatingPointError, match="checkpoint 1"):
        similarities_along(torch.full((2, 2), torch.nan))


def test_only_the_epochs_asked_for_are_kept(toy_data, tmp_path):
    options = dict(epochs=3, batch_size=7, saves_in_first_epoch=2)
    whole = train_surrogate(fresh_model(), toy_data, **options)
    assert len(whole.epochs) == 5
    for wanted in ([0, 2], [1, 3], [whole.epochs[1]]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = train_surrogate(fresh_model(), toy_data, keep_epochs=wanted, folder=folder, **options)
        again = train_surrogate(
            fresh_model(), toy_data, keep_epochs=wanted, folder=folder, **options
        )  # read from disk
        expected = whole.keep([whole.epochs.index(epoch) for epoch in wanted])
        for other in (found, again):
            assert other.epochs == expected.epochs == [float(epoch) for epoch in wanted]
            assert all(
                torch.equal(a[name], b[name])
                for a, b in zip(other.states, expected.states, strict=True)
                for name in a
            )
        assert len(list(folder.glob("0*.safetensors"))) == len(wanted)
    with pytest.raises(ValueError, match=r"keep_epochs are among .*got \[4\]"):
        train_surrogate(fresh_model(), toy_data, keep_epochs=[4], **options)
    with pytest.raises(ValueError, match="keep_epochs"):
        train_surrogate(fresh_model(), toy_data, folder=folder, **options)


def test_class_gradients_are_kept_on_disk_with_their_origin(toy, toy_data, tmp_path, monkeypatch):
    checkpoints = toy().checkpoints
    cached = ClassGradients(checkpoints, toy_data, tmp_path, images=4)
    first = cached(1)
    torch.testing.assert_close(
        first, class_gradients(checkpoints, toy_data.of_class(1, 4), 1), rtol=0, atol=0
    )
    assert [path.name for path in tmp_path.iterdir()] == [
        "00001.safetensors"
    ]  # the classes that were asked for
    monkeypatch.setattr("igd_lib.surrogate.class_gradients", None)
    assert torch.equal(ClassGradients(checkpoints, toy_data, tmp_path, images=4)(1), first)
    with pytest.raises(ValueError, match="images = 4, wanted 5"):
        ClassGradients(checkpoints, toy_data, tmp_path, images=5)(1)
    with pytest.raises(ValueError, match="epochs = "):
        ClassGradients(checkpoints.keep([0, 1]), toy_data, tmp_path, images=4)(1)
    moved = Checkpoints(
        checkpoints.model,
        [{n: v + 1 for n, v in s.items()} for s in checkpoints.states],
        checkpoints.epochs,
        checkpoints.learning_rates,
    )
    with pytest.raises(ValueError, match="weights = "):
        ClassGradients(moved, toy_data, tmp_path, images=4)(1)


def test_sets_sampled_class_after_class_read_each_file_once(toy, toy_data, tmp_path, monkeypatch):
    """Four sets, in chunks of two classes, with room for two: else each set reads each file."""
    checkpoints = toy().checkpoints
    ClassGradients(checkpoints, toy_data, tmp_path).keep(range(3))
    room = 2 * 3 * sum(4 * p.numel() for p in checkpoints.model.parameters())
    read, load = [], files.load_tensors
    monkeypatch.setattr(surrogate.files, "load_tensors", lambda path: read.append(path.name) or load(path))
    for limit, times in ((room, 1), (room - 1, 4), (0, 4), (None, 1)):
        read.clear()
        gradients = ClassGradients(checkpoints, toy_data, tmp_path, limit=limit)
        for chunk in ((0, 1), (2,)):
            for _ in range(4):
                found = [gradients(label) for label in chunk]
                assert all(
                    torch.equal(one, load(gradients._path(label))[0]["gradients"])
                    for one, label in zip(found, chunk, strict=True)
                )
        expected = times if limit != room - 1 else 4
        assert [read.count(f"{label:05d}.safetensors") for label in (0, 1)] == [expected] * 2
        assert gradients._recent.bytes <= (gradients._recent.limit)
    sent = pickle.loads(pickle.dumps(gradients._recent))
    assert sent.limit == gradients._recent.limit and sent.bytes == 0 < gradients._recent.bytes


def test_an_eighth_of_the_memory_is_for_class_gradients_and_workers_divide_it(
    toy, toy_data, tmp_path, monkeypatch
):
    alone = ClassGradients(toy().checkpoints, toy_data, tmp_path)._recent.limit
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < alone <= pages // 8
    monkeypatch.setattr(machine, "SHARED_BY", 4)
    assert abs(ClassGradients(toy().checkpoints, toy_data, tmp_path)._recent.limit - alone // 4) <= 1


def test_the_tensors_last_used_are_held():
    recent, tensors = Recent(12), [torch.full((1,), float(number)) for number in range(4)]
    for number in (0, 1, 2):
        recent.put(number, tensors[number])
    assert recent.get(0) is tensors[0]
    recent.put(3, tensors[3])
    assert [recent.get(number) is not None for number in range(4)] == [True, False, True, True]
    recent.put(4, torch.zeros(4))  # more than there is room for
    assert recent.bytes == 0


def test_a_class_that_another_run_computes_is_waited_for_and_no_other(toy, toy_data, tmp_path, monkeypatch):
    compute, made, begun, go_on = surrogate.class_gradients, [], threading.Event(), threading.Event()

    def slow(checkpoints, images, label):
        made.append(label)
        if label == 1:
            begun.set()
            assert go_on.wait(10)
        return compute(checkpoints, images, label)

    monkeypatch.setattr(surrogate, "class_gradients", slow)
    checkpoints = toy().checkpoints
    first, second = (ClassGradients(checkpoints, toy_data, tmp_path) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(first, 1)
        assert begun.wait(10)
        assert second(2).shape == second(0).shape and made == [1, 2, 0]
        waiting = pool.submit(second, 1)
        time.sleep(0.1)
        assert not waiting.done()
        go_on.set()
        assert torch.equal(waiting.result(), computing.result()) and made == [1, 2, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:05d}.safetensors" for n in range(3)]


def test_class_gradients_are_computed_on_the_model_s_device(toy, toy_data):
    """Wherever the states of the trajectory lie."""
    checkpoints = toy().checkpoints
    elsewhere = replace(checkpoints, model=copy.deepcopy(checkpoints.model).to("meta"))
    assert class_gradients(elsewhere, toy_data.of_class(0), 0).device.type == "meta"


def test_regular_checkpoints():
    assert regular_checkpoints(50, 4) == [0, 16, 32, 48]  # the paper's example
    assert regular_checkpoints(50, 10) == list(range(0, 46, 5))
    assert regular_checkpoints(3, 4) == [0, 1, 2, 3]
    for count in (1, 5):
        with pytest.raises(ValueError, match=f"got {count}"):
            regular_checkpoints(3, count)


def test_selection_at_a_similarity_of_exactly_the_threshold():
    """Kept only below it: cosine 3/5 is exact in floating point."""
    gradients = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]], dtype=torch.float64)
    for kind in ("mean", "per_class"):
        value = checkpoint_similarities(gradients, similarity=kind)[1]
        assert value == pytest.approx(0.6)
        assert select_checkpoints(gradients, threshold=value, similarity=kind) == [0]
        assert select_checkpoints(gradients, threshold=math.nextafter(value, 1), similarity=kind) == [0, 1]


def test_keep(toy):
    checkpoints = toy().checkpoints
    kept = checkpoints.keep([0, 2])
    assert kept.epochs == [0.0, 2.0] and kept.learning_rates == [0.01, 0.03]
    assert kept.states[0] is checkpoints.states[0] and kept.states[1] is checkpoints.states[2]


def test_class_gradients_are_on_the_model_s_device_whether_computed_or_read(
    toy, toy_data, tmp_path, monkeypatch
):
    """Some classes of a batch are on disk already and some are not."""
    monkeypatch.setattr("igd_lib.surrogate._norm", lambda state: 1.0)
    checkpoints = toy().checkpoints
    computed = ClassGradients(checkpoints, toy_data, tmp_path)(0)
    assert computed.device.type == "cpu"
    elsewhere = replace(checkpoints, model=copy.deepcopy(checkpoints.model).to("meta"))
    assert ClassGradients(elsewhere, toy_data, tmp_path)(0).device.type == "meta"


def test_interrupted_training_says_where_its_epochs_are(toy_data, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("igd_lib.surrogate._train_step", stop)
    with pytest.raises(KeyboardInterrupt, match="0 of 1 epochs of the trajectory are in .*; run the same ag"):
        train_surrogate(ConvNet(2, 3, 16, width=8), toy_data, epochs=1, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt, match="nothing of the trajectory is kept without a folder"):
        train_surrogate(ConvNet(2, 3, 16, width=8), toy_data, epochs=1)


# --- saved within an epoch


@pytest.fixture
def steps(monkeypatch):
    """A clock by which each step takes a second, and what may happen after so many: `steps["end"]`."""
    train_step, count = surrogate._train_step, {"done": 0, "end": 10**6}

    def counted(*arguments):
        if count["done"] == count["end"]:
            raise KeyboardInterrupt
        count["done"] += 1
        return train_step(*arguments)

    monkeypatch.setattr(surrogate, "_train_step", counted)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(count["done"]))
    monkeypatch.setattr(surrogate, "SAVE_SECONDS", 2.0)
    return count


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*.safetensors")}


@pytest.mark.parametrize("augment", [None, AUGMENTATION], ids=["plain", "augmented"])
@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (1, "0 of 3 epochs of"),  # nothing is saved yet
        (3, "0 of 3 epochs and 2 of 5 steps of"),  # behind a checkpoint of the first epoch that was saved
        (4, "0 of 3 epochs and 4 of 5 steps of"),
        (5, "1 of 3 epochs of"),  # at an epoch's end
        (8, "1 of 3 epochs and 2 of 5 steps of"),
        (14, "2 of 3 epochs and 4 of 5 steps of"),
    ],
)
def test_a_training_goes_on_within_an_epoch(toy_data, tmp_path, steps, augment, end, kept):
    """Every two steps of five are saved; checkpoints of the first epoch lie behind steps 2, 3 and 5."""
    options = dict(epochs=3, batch_size=4, saves_in_first_epoch=3, augment=augment)
    whole = train_surrogate(fresh_model(), toy_data, folder=tmp_path / "whole", **options)
    steps["done"], steps["end"] = 0, end
    with pytest.raises(KeyboardInterrupt, match=f"interrupted: {kept} the trajectory are in .*cut; run the"):
        train_surrogate(fresh_model(), toy_data, folder=tmp_path / "cut", **options)
    steps["end"] = 10**6
    model = fresh_model()
    found = train_surrogate(model, toy_data, folder=tmp_path / "cut", **options)
    assert steps["done"] == 15 + end % 5 % 2  # what had not been saved is done again
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and len(found.states) == 6
    assert found.epochs == whole.epochs
    for state, expected in zip(found.states, whole.states, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    last = model.state_dict()
    assert all(torch.equal(last[name], value) for name, value in found.states[-1].items())


def test_of_a_longer_run_that_is_within_an_epoch_the_beginning_is_read(toy_data, tmp_path, steps):
    """Two epochs and two steps of a third are on disk: two epochs are all there."""
    options = dict(batch_size=4)
    whole = train_surrogate(fresh_model(), toy_data, epochs=2, **options)
    steps["done"], steps["end"] = 0, 13
    with pytest.raises(KeyboardInterrupt):
        train_surrogate(fresh_model(), toy_data, epochs=3, folder=tmp_path, **options)
    model = fresh_model()
    found = train_surrogate(model, toy_data, epochs=2, folder=tmp_path, **options)
    assert steps["done"] == 13 and found.epochs == [0, 1, 2]
    last = model.state_dict()
    for name, value in whole.states[-1].items():
        assert torch.equal(found.states[-1][name], value) and torch.equal(last[name], value)


def test_between_epochs_a_state_is_as_it_was_before_there_were_others(toy_data, tmp_path):
    """A trajectory on disk that says whole epochs alone goes on."""
    train_surrogate(fresh_model(), toy_data, epochs=2, batch_size=4, folder=tmp_path)
    _, note = files.load_tensors(tmp_path / surrogate.STATE)
    assert note == {"step": 2} and surrogate.trained_epochs(tmp_path) == 2
    assert surrogate.trained_epochs(tmp_path / "none") == 0


def test_of_two_that_want_a_trajectory_one_trains(toy_data, tmp_path, monkeypatch, capsys):
    train_step, trained, begun = surrogate._train_step, [], threading.Event()

    def slow(*arguments):
        trained.append(threading.current_thread().name)
        begun.set()
        time.sleep(0.02)
        return train_step(*arguments)

    monkeypatch.setattr(surrogate, "_train_step", slow)
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    options = dict(epochs=3, batch_size=4, folder=tmp_path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train_surrogate, fresh_model(), toy_data, **options)
        assert begun.wait(5)
        second = train_surrogate(fresh_model(), toy_data, **options)
    assert len(trained) == 15 and len(set(trained)) == 1
    assert f"waiting for a surrogate's training (process {os.getpid()} on " in capsys.readouterr().out
    for state, expected in zip(second.states, first.result().states, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not (tmp_path / files.LOCK).exists()


def test_a_long_training_says_how_long_it_takes(toy_data, steps, monkeypatch, capsys):
    monkeypatch.delenv("IGD_QUIET")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    train_surrogate(fresh_model(), toy_data, epochs=10, batch_size=4)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "surrogate (5 steps an epoch), step 15/50, 15 s, 35 s left" and len(rest) == 2
