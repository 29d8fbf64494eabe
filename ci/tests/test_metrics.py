"""Metrics of sets: distances against closed forms, features and influence against the networks' own."""

import hashlib
import importlib.util
import json
import math
import resource

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn

import reference
from igd_lib.analysis import features as feature_spaces
from igd_lib.analysis import metrics
from igd_lib.analysis.features import (
    Extractor,
    features,
    inception,
    missing_for_inception,
    network_extractor,
    problems_of_inception,
)
from igd_lib.analysis.metrics import (
    coverage,
    coverage_threshold,
    distance_name,
    frechet_distance,
    gaussian,
    influence_of_set,
    nearest_cosine,
    nearest_distances,
    per_class_accuracy,
    wasserstein,
)
from igd_lib.data.images import from_tensors, to_float
from igd_lib.models.networks import ConvNet, ResNet
from igd_lib.sets.store import DistilledSet
from igd_lib.tools import files

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def line(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


# --- features


def images(count=5, size=32):
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def normalised(pictures, mean=MEAN, std=STD):
    return (pictures.float() / 255 - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


@pytest.fixture(scope="module")
def networks():
    """Random networks in evaluation mode: ours and two of timm's, one with a hidden layer in its head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = {
            "convnet": ConvNet(3, 7, 32, width=8),
            "resnet": ResNet((1, 1, 1, 1), False, 7),
            "timm": timm.create_model("resnet10t", num_classes=7),
            "hidden": timm.create_model("mobilenetv3_small_050", num_classes=7),
        }
    return {name: model.eval() for name, model in found.items()}


@pytest.mark.parametrize("name", ["convnet", "resnet", "timm", "hidden"])
def test_features_are_what_the_last_linear_layer_sees(networks, name):
    model = networks[name]
    pictures = images(size=64 if name == "resnet" else 32)
    found = network_extractor(model, name, mean=MEAN, std=STD)(pictures)
    inputs = normalised(pictures)
    with torch.no_grad():
        by_hand = {
            "convnet": lambda: model.features(inputs).flatten(1),
            "resnet": lambda: model.body(model.stem(inputs)).mean((-2, -1)),
            "timm": lambda: model.forward_features(inputs).mean((-2, -1)),
            "hidden": lambda: model.act2(
                model.conv_head(model.forward_features(inputs).mean((-2, -1), keepdim=True))
            ).flatten(1),
        }[name]()
        last = model.get_classifier() if hasattr(model, "get_classifier") else model.classifier
        assert last(found).std() > 0
        torch.testing.assert_close(last(found), model(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32 and found.shape == (5, last.in_features)


def test_features_by_default_are_of_the_surrogates_range(networks):
    found = network_extractor(networks["convnet"], "convnet")(images())
    with torch.no_grad():
        torch.testing.assert_close(
            found, networks["convnet"].features(to_float(images())).flatten(1), rtol=1e-4, atol=1e-5
        )


def test_features_resize_then_cut_the_centre(networks):
    pictures = images(size=48)
    found = network_extractor(networks["convnet"], "convnet", image_size=40, crop=32)(pictures)
    small = nn.functional.interpolate(pictures.float() / 255, size=(40, 40), mode="bilinear", antialias=True)[
        ..., 4:36, 4:36
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            found, networks["convnet"].features((small - 0.5) / 0.5).flatten(1), rtol=1e-4, atol=1e-5
        )


def test_extractor_is_frozen_and_leaves_the_model_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=3).train()
    extractor = network_extractor(model, "resnet10t")
    before = extractor(images())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(extractor(images()), before)  # batch statistics, too, are not updated
    torch.testing.assert_close(
        extractor(images()[2:3]), before[2:3], rtol=1e-3, atol=1e-4
    )  # nor used: an image's features are its own
    assert not torch.allclose(before[2], before[3], rtol=1e-2, atol=1e-3)


def test_wrong_images_sizes_and_networks_are_refused(networks):
    extractor = network_extractor(networks["convnet"], "convnet")
    with pytest.raises(ValueError, match="uint8"):
        extractor(to_float(images()))
    with pytest.raises(ValueError, match=r"\(5, 512\).*not \(5, 128\).*image size"):
        extractor(images(size=64))
    with pytest.raises(TypeError, match="Linear"):
        network_extractor(nn.Linear(3, 3), "linear")
    with torch.no_grad():
        broken = ConvNet(1, 3, 32, width=4)
        broken.features[0].weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        network_extractor(broken, "broken")(images())


def colours(count=7):
    """Uniform grey images of brightness 10 i, and an extractor that reads the brightness off."""
    pictures = (
        (10 * torch.arange(count, dtype=torch.uint8)).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    )
    return pictures, Extractor("brightness", 1, lambda batch: batch.float().mean((1, 2, 3))[:, None])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 250])
def test_features_of_a_set_are_in_its_order(batch_size):
    pictures, extractor = colours()
    data = from_tensors("toy", "train", ("a", "b"), pictures, torch.tensor([0, 1, 0, 1, 1, 0, 0]))
    assert features(extractor, data, batch_size=batch_size).flatten().tolist() == [0, 10, 20, 30, 40, 50, 60]
    order = torch.tensor([4, 0, 6])
    assert features(extractor, data.subset(order), batch_size=batch_size).flatten().tolist() == [40, 0, 60]
    with pytest.raises(ValueError, match="no images"):
        features(extractor, data.subset(order[:0]))


def test_features_of_a_distilled_set(tmp_path):
    pictures, extractor = colours(4)
    manifest = {"dataset": "toy", "classes": ["a", "b", "c"], "selected": [2, 0], "ipc": 2}
    files.write(tmp_path / "manifest.json", json.dumps(manifest))
    distilled = DistilledSet(tmp_path)
    for picture, (label, index) in zip(pictures, [(2, 0), (2, 1), (0, 0), (0, 1)], strict=True):
        distilled.image_path(label, index).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(distilled.image_path(label, index))
        files.save_tensors(distilled.latent_path(label, index), {"latent": torch.zeros(1)})
    found = features(extractor, distilled)
    assert torch.equal(found, features(extractor, distilled.data()))
    assert sorted(found.flatten().tolist()) == [0, 10, 20, 30]


# --- Inception-V3


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No Inception weights: neither in the project's cache nor in torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def test_missing_inception_says_how_to_get_it(nowhere, own_cache):
    with pytest.raises(FileNotFoundError) as error:
        inception()
    message = str(error.value)
    assert (
        f"{own_cache}/models/weights-inception-2015-12-05-6726825d.pth https://github.com/toshas/torch-fidelity/releases/"
        in message
    )
    assert ("pip install torch-fidelity" in message) == (importlib.util.find_spec("torch_fidelity") is None)
    with pytest.raises(FileNotFoundError, match="elsewhere.pth"):
        inception(weights=nowhere / "elsewhere.pth")


@pytest.mark.parametrize(
    "name", ["weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"]
)
@pytest.mark.parametrize("place", ["cache", "torch"])
def test_other_bytes_are_no_inception(nowhere, own_cache, monkeypatch, name, place):
    """Found in each place under each name, and refused: only the published weights give FID."""
    monkeypatch.setattr(feature_spaces.importlib.util, "find_spec", lambda name: True)
    assert len(missing_for_inception()) == 1
    folder = own_cache / "models" if place == "cache" else nowhere / "torch" / "hub" / "checkpoints"
    files.write(folder / name, b"something else")
    assert missing_for_inception() == []
    [line] = problems_of_inception()
    assert str(folder / name) in line and "delete it and download" in line
    with pytest.raises(ValueError, match="another file"):
        inception()
    monkeypatch.setattr(feature_spaces, "INCEPTION_SHA256", hashlib.sha256(b"something else").hexdigest())
    assert problems_of_inception() == []


def test_inception_features(tmp_path, monkeypatch):
    """Random weights, not the published ones: 2,048 features before the last layer, nothing unpickled."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        model = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()

    def stored(content):
        torch.save(content, tmp_path / "weights.pth")
        monkeypatch.setattr(
            feature_spaces,
            "INCEPTION_SHA256",
            hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest(),
        )
        return tmp_path / "weights.pth"

    pictures = images(2, 299)
    extractor = inception(weights=stored(model.state_dict()), device="cpu")
    assert extractor.is_inception and distance_name(extractor) == "FID"
    with torch.no_grad():
        torch.testing.assert_close(
            extractor(pictures), model(pictures)[0], rtol=1e-4, atol=1e-5
        )  # at 299 px nothing is resized
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        inception(weights=stored({"fc.weight": Extractor("code", 1, len)}), device="cpu")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in metrics.os.environ


def test_only_inception_gives_fid(networks):
    assert distance_name(Extractor("Inception-V3 pool", 2048, len, is_inception=True)) == "FID"
    assert distance_name(network_extractor(networks["convnet"], "convnet3")) == "FD over convnet3 features"
    assert "FID" not in distance_name(Extractor("Inception-V3 pool", 2048, len))


# --- Fréchet distance


def white(count, dimension, seed=0):
    """Points with mean 0 and covariance 1, exactly."""
    points = randn(count, dimension, seed=seed)
    points = points - points.mean(0)
    return torch.linalg.qr(points).Q * (count - 1) ** 0.5


def test_frechet_distance_in_one_dimension_by_hand():
    """Means 0 and 3, variances 2 and 8: 9 + (sqrt 2 - sqrt 8)^2 = 11."""
    assert frechet_distance(line(-1, 1), line(1, 5)) == pytest.approx(11, rel=1e-12)


def test_frechet_distance_of_commuting_covariances():
    """||m - n||^2 + the squared difference of the standard deviations along the common axes."""
    axes = torch.linalg.qr(randn(6, 6, seed=9)).Q
    s, t = torch.tensor([1.0, 2, 3, 4, 5, 6]).double(), torch.tensor([6.0, 1, 3, 0.5, 0, 2]).double()
    shift = torch.tensor([1.0, -2, 0, 0, 3, 0]).double()
    real, fake = white(40, 6, seed=1) * s @ axes.T, white(25, 6, seed=2) * t @ axes.T + shift
    assert frechet_distance(real, fake) == pytest.approx(14 + (s - t).square().sum().item(), rel=1e-9)
    assert frechet_distance(real, real + shift) == pytest.approx(14, rel=1e-9)
    assert frechet_distance(3 * real, 3 * fake) == pytest.approx(9 * frechet_distance(real, fake), rel=1e-9)


def test_frechet_distance_with_fewer_points_than_dimensions_by_hand():
    """+-a e1, +-b e2 against +-c e1, +-d e3: variances 2/3 of the squares, so 2/3 ((a - c)^2 + b^2 + d^2)."""
    real, fake = torch.zeros(4, 8), torch.zeros(4, 8)
    real[0, 0], real[1, 0], real[2, 1], real[3, 1] = 5, -5, 2, -2
    fake[0, 0], fake[1, 0], fake[2, 2], fake[3, 2] = 3, -3, 1, -1
    assert frechet_distance(real, fake) == pytest.approx(2 / 3 * (4 + 4 + 1), rel=1e-12)


@pytest.mark.parametrize("count, other, dimension", [(200, 150, 8), (300, 5, 16), (6, 5, 16)])
def test_frechet_distance_equals_torchmetrics(count, other, dimension):
    from torchmetrics.image.fid import FrechetInceptionDistance

    mixing = randn(dimension, dimension, seed=5)
    real, fake = randn(count, dimension, seed=1) @ mixing, randn(other, dimension, seed=2) @ mixing.T + 0.3
    same = nn.Identity()
    same.num_features = dimension
    metric = FrechetInceptionDistance(feature=same)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("count", [5, 100])
def test_frechet_distance_of_a_set_to_itself_is_zero_in_any_order(count):
    points = randn(count, 12, dtype=torch.float32) * 10
    other = randn(50, 12, seed=1, dtype=torch.float32)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert all(0 <= frechet_distance(scale * points, scale * points) < 1e-6 for scale in range(1, 20))
    assert 0 <= frechet_distance(points, points[order]) < 1e-8
    assert frechet_distance(points[order], other) == pytest.approx(frechet_distance(points, other), rel=1e-10)
    assert frechet_distance(other, points) == pytest.approx(frechet_distance(points, other), rel=1e-10)


def test_frechet_distance_keeps_its_digits_far_from_the_origin():
    real, fake = randn(100, 5), 2 * randn(80, 5, seed=1)
    assert frechet_distance(real + 1e5, fake + 1e5) == pytest.approx(frechet_distance(real, fake), rel=1e-6)


def test_frechet_distance_from_a_stored_gaussian_and_in_blocks(monkeypatch):
    real, fake = randn(100, 5), 2 * randn(4, 5, seed=1)
    expected = frechet_distance(real, fake)
    assert (
        frechet_distance(gaussian(real), fake) == frechet_distance(gaussian(real), gaussian(fake)) == expected
    )
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_refuses_what_has_none():
    points = randn(5, 3)
    with pytest.raises(ValueError, match="has 1 points; at least 2"):
        frechet_distance(points, points[:1])
    with pytest.raises(ValueError, match="D is 3.* and 2"):
        frechet_distance(points, points[:, :2])
    with pytest.raises(ValueError, match="floating point"):
        frechet_distance(points, points.long())
    with pytest.raises(FloatingPointError, match="not finite"):
        frechet_distance(points, points.log())


# --- coverage


def test_coverage_of_points_on_a_line_by_hand():
    """Distances of 0 ... 9 to the nearest of {0, 6}: 0 1 2 3 2 1 0 1 2 3."""
    real, fake = line(*range(10)), line(6, 0)
    assert nearest_distances(real, fake).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert coverage(real, fake, 2.0) == 80  # exactly at the threshold is within
    assert coverage(real, fake, math.nextafter(2.0, 0)) == 50
    assert [coverage(real, fake, threshold) for threshold in (0.0, 1.0, 3.0, math.inf)] == [20, 50, 100, 100]
    assert coverage(real, fake, 2.0, exclude=torch.tensor([0, 3, 9])) == pytest.approx(100)
    assert coverage(real, fake, 2.0, exclude=torch.tensor([0, 6])) == 75  # Random's own images do not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_distances_in_blocks_equal_one_piece(monkeypatch, dtype):
    """Several blocks on both sides, against the whole matrix; a point of both sets is at exactly 0."""
    points, others = 3 * randn(700, 6, dtype=dtype) + 100, 3 * randn(901, 6, seed=1, dtype=dtype) + 100
    others[850] = points[650]
    expected = (points.double()[:, None] - others.double()).norm(dim=2).amin(1)
    for rows in (701, 64):
        monkeypatch.setattr(metrics, "ROWS", rows)
        found = nearest_distances(points, others)
        assert found.dtype == torch.float64 and found[650] == 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_coverage_never_holds_the_whole_matrix():
    """200,000 x 2,000 distances are 1.6 GB in single precision."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (
        0
        < coverage(randn(200_000, 2, dtype=torch.float32), randn(2_000, 2, seed=1, dtype=torch.float32), 0.05)
        < 100
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_coverage_threshold_by_hand():
    """Distances to {0, 6} of 1 ... 5 are 1 2 3 2 1: median 2, highest 3."""
    real, other = line(1, 2, 3, 4, 5), line(0, 6)
    assert coverage_threshold(real, other) == 2
    assert coverage_threshold(real, other, quantile=1.0) == 3
    assert coverage_threshold(10 * real, 10 * other) == 20


def test_at_its_threshold_a_random_set_covers_about_that_share():
    points = randn(1200, 4)
    for quantile in (0.5, 0.721):
        threshold = coverage_threshold(points[200:], points[:100], quantile=quantile)
        assert coverage(points[200:], points[:100], threshold) == pytest.approx(100 * quantile, abs=0.11)
        assert coverage(points[200:], points[100:200], threshold) == pytest.approx(100 * quantile, abs=8)
        assert coverage(points[200:], 0.1 * points[100:200], threshold) < 100 * quantile - 20  # all alike


def test_coverage_refuses_what_has_none():
    points = line(0, 1)
    for threshold in (-1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            coverage(points, points, threshold)
    with pytest.raises(ValueError, match="points has 0"):
        coverage(points, points, 1.0, exclude=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="different spaces"):
        coverage(points, randn(3, 2), 1.0)
    with pytest.raises(ValueError, match="quantile"):
        coverage_threshold(points, points, quantile=50)


# --- Wasserstein distance


def test_wasserstein_by_hand():
    real, fake = line(0, 4), line(10, 1)  # 0 goes to 1, 4 to 10
    assert wasserstein(real, fake) == pytest.approx(3.5, rel=1e-12)
    assert wasserstein(real, fake, p=2) == pytest.approx(18.5**0.5, rel=1e-12)
    assert wasserstein(real, line(1)) == pytest.approx(2, rel=1e-12)  # sets of unequal size: (1 + 3) / 2
    assert wasserstein(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])) == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_equals_the_best_assignment(p):
    real, fake = randn(30, 5).numpy(), randn(30, 5, seed=1).numpy()
    cost = np.linalg.norm(real[:, None] - fake[None], axis=2) ** p
    expected = cost[linear_sum_assignment(cost)].mean() ** (1 / p)
    assert wasserstein(torch.from_numpy(real), torch.from_numpy(fake), p=p) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("p", [1, 2, 3])
def test_wasserstein_of_a_shifted_set_is_the_shifts_length(p):
    points = randn(40, 3)
    direction = torch.tensor([2.0, 3.0, 6.0]).double() / 7
    found = [
        wasserstein(points, points[torch.randperm(40)] + length * direction, p=p)
        for length in (0.0, 0.5, 2.0, 20.0)
    ]
    assert found == pytest.approx([0.0, 0.5, 2.0, 20.0], abs=1e-4 if p > 1 else 1e-6)


def test_wasserstein_grows_with_the_shift():
    real, fake = randn(50, 4), randn(30, 4, seed=1)
    found = [wasserstein(real, fake + length) for length in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found) and len(set(found)) == 4


def test_regularised_wasserstein_comes_down_to_the_exact_one():
    real, fake = randn(40, 3), randn(30, 3, seed=1) + 1
    exact = wasserstein(real, fake)
    loose, close = (wasserstein(real, fake, regularisation=strength) for strength in (5.0, 0.05))
    assert exact <= close < loose
    assert close == pytest.approx(exact, rel=0.02) and loose > 1.1 * exact
    with pytest.raises(RuntimeError, match=r"raise regularisation \(1e-05\)"):
        wasserstein(real, fake, regularisation=1e-5)


def test_large_sets_are_cut_to_a_seeded_draw():
    real, fake = randn(200, 3), randn(90, 3, seed=1) + 1
    whole = wasserstein(real, fake)
    assert (
        wasserstein(real, fake, max_points=200, seed=1)
        == wasserstein(real, fake, max_points=200, seed=2)
        == whole
    )
    cut = [wasserstein(real, fake, max_points=60, seed=seed) for seed in (0, 0, 1)]
    assert cut[0] == cut[1] != cut[2]
    assert cut[0] == pytest.approx(whole, rel=0.3)
    # One of {0, 10} against 0: either point, never both (5).
    assert {wasserstein(line(0, 10), line(0), max_points=1, seed=seed) for seed in range(20)} == {0.0, 10.0}


def test_wasserstein_refuses_wrong_settings():
    points = randn(4, 2)
    for options in ({"p": 0.5}, {"regularisation": 0.0}, {"max_points": 0}):
        with pytest.raises(ValueError, match="p >= 1"):
            wasserstein(points, points, **options)
    with pytest.raises(ValueError, match="different spaces"):
        wasserstein(points, points[:, :1])
    with pytest.raises(FloatingPointError):
        wasserstein(points, points.log())


# --- a set's images


@pytest.fixture(scope="module")
def case(toy, toy_data):
    """Checkpoints of unequal rates, and the influence loss of each of 18 images by plain autograd."""
    case = toy()
    case.expected = torch.stack(
        [
            reference.influence(
                to_float(image), label, case.checkpoints, case.gradients[:, label], case.checkpoints.weights
            ).detach()
            for image, label in zip(toy_data.fetch(torch.arange(18)), toy_data.labels.tolist(), strict=True)
        ]
    )
    return case


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_influence_of_a_set_is_each_images_own(case, toy_data, batch_size):
    found = influence_of_set(toy_data, case.checkpoints, case.gradients, batch_size=batch_size)
    assert found.shape == (18,) and case.expected.std() > 1e-3
    torch.testing.assert_close(found, case.expected, rtol=1e-4, atol=1e-5)


def test_influence_of_a_set_in_any_order(case, toy_data):
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))[:13]
    found = influence_of_set(
        toy_data.subset(order), case.checkpoints, case.gradients, batch_size=3, device="cpu"
    )
    torch.testing.assert_close(found, case.expected[order], rtol=1e-4, atol=1e-5)


def test_class_gradients_are_asked_for_once_a_class(case, toy_data):
    """A function of the label: at the paper's scale each call reads a file. No absent class is asked for."""
    asked = []

    def gradients(label):
        asked.append(label)
        return case.gradients[:, label]

    order = torch.tensor([17, 3, 14, 0, 5])  # classes 2 0 2 0 2
    found = influence_of_set(toy_data.subset(order), case.checkpoints, gradients, batch_size=2)
    torch.testing.assert_close(found, case.expected[order], rtol=1e-4, atol=1e-5)
    assert sorted(asked) == [0, 2]


def test_influence_refuses_gradients_of_other_classes_or_checkpoints(case, toy_data):
    with pytest.raises(ValueError, match="2 classes for a set of 3"):
        influence_of_set(toy_data, case.checkpoints, case.gradients[:, :2])
    with pytest.raises(ValueError, match="3 checkpoints"):
        influence_of_set(toy_data, case.checkpoints, case.gradients[:2])


def test_nearest_cosine_by_hand():
    """At 0, 60, 90, 180 degrees, of lengths 1 to 4: the nearest others are at 60, 30, 30, 90 degrees."""
    angles, lengths = torch.tensor([0.0, 60.0, 90.0, 180.0]).deg2rad(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    vectors = lengths[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    assert nearest_cosine(vectors).tolist() == pytest.approx([0.5, 0.75**0.5, 0.75**0.5, 0.0], abs=1e-6)
    assert torch.equal(nearest_cosine(vectors.reshape(4, 1, 2, 1)), nearest_cosine(vectors))
    assert nearest_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).tolist() == [-1, -1]
    assert nearest_cosine(vectors[:1]).isnan().tolist() == [True]


def test_per_class_accuracy_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 0, 1, 0, 3, 3])
    found = per_class_accuracy(predictions, labels, 5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([75, 0, math.nan, 100, math.nan], nan_ok=True)
    counts = labels.bincount(minlength=5)
    assert (found.nan_to_num() * counts).sum() / counts.sum() == pytest.approx(
        100 * 4 / 7
    )  # weighted: the accuracy


def test_per_class_accuracy_refuses_labels_of_other_classes():
    labels = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"labels are 0 \.\.\. 1, got 0 \.\.\. 2"):
        per_class_accuracy(labels.clamp(max=1), labels, 2)
    with pytest.raises(ValueError, match="predictions are"):
        per_class_accuracy(labels - 1, labels, 3)
    with pytest.raises(ValueError, match=r"\(N,\)"):
        per_class_accuracy(labels[:1], labels, 3)


# --- a map of sets


def test_one_tsne_for_all_sets_keeps_neighbours_together():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(40, 5, generator=generator), torch.randn(20, 5, generator=generator) + 40
    points = {"real": near[:30], "same": near[30:], "other": far}
    found = metrics.joint_tsne(points, perplexity=10)
    assert found.set.tolist() == ["real"] * 30 + ["same"] * 10 + ["other"] * 20
    centres = found.groupby("set")[["x", "y"]].mean()
    assert (centres.loc["real"] - centres.loc["same"]).pow(2).sum() < 0.1 * (
        centres.loc["real"] - centres.loc["other"]
    ).pow(2).sum()
    assert found.equals(metrics.joint_tsne(points, perplexity=10))  # the same seed, the same map
    with pytest.raises(ValueError, match="20 points are too few for a perplexity of 10"):
        metrics.joint_tsne({"a": near[:20]}, perplexity=10)
