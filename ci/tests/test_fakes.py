"""The fakes that rehearsals run on: read by the code that reads the real ones."""

from __future__ import annotations

import json
import time

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ci import fakes
from igd_lib.baselines import minimax
from igd_lib.data.datasets import DATASETS
from igd_lib.data.images import load, missing, read_original
from igd_lib.models.loadable import problems, problems_of_autoencoder, problems_of_decoder
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir, data_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All fakes, and the seconds of processor time that making them took."""
    root, began = tmp_path_factory.mktemp("fakes") / "all", time.process_time()
    return fakes.make(root, extras=True), time.process_time() - began


@pytest.fixture(autouse=True)
def environment(monkeypatch, made):
    for name, value in made[0].items():
        monkeypatch.setenv(name, value)


def test_they_are_made_in_seconds_and_once(made, tmp_path):
    environment, seconds = made
    assert seconds < 30
    root = data_dir().parent
    stamp = (root / fakes.DONE).stat().st_mtime_ns
    assert fakes.make(root, extras=True) == environment
    assert (root / fakes.DONE).stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="not empty"):
        fakes.make(root, extras=False)


@pytest.mark.parametrize(
    "name",
    [name for name in DATASETS if name not in ("fashion-mnist", "imagenet")],
)
def test_every_data_set_is_read(name):
    """By its own layout's reader; that there are fewer images is an error, unless it is allowed."""
    assert missing(name) == []
    train = [fakes.MORE if known in fakes.REHEARSED else fakes.TRAIN for known in DATASETS[name].classes]
    if name.startswith("cifar"):
        train = [fakes.MORE + 2] * len(train)
    assert min(train[:2]) >= fakes.MORE  # the classes that a rehearsal takes
    for split, counts in (("train", train), ("test", [fakes.TEST] * len(train))):
        with pytest.raises(ValueError, match=r"images instead of|has \d+ images"):
            load(name, split)
        data = load(name, split, check_sizes=False)
        assert data.classes == DATASETS[name].classes and data.image_size == DATASETS[name].image_size
        assert data.labels.bincount().tolist() == counts


def test_imagenet_has_all_classes_and_every_kind_of_file():
    assert missing("imagenet") == []
    base = data_dir() / "imagenet"
    assert len(list((base / "train").iterdir())) == len(list((base / "val").iterdir())) == 1000
    modes = set()
    for wnid in sorted(path.name for path in (base / "train").iterdir())[:5]:
        for path in sorted((base / "train" / wnid).iterdir()):
            with Image.open(path) as image:
                modes.add((image.format, image.mode))
                assert min(image.size) >= 60 and max(image.size) <= 90
            assert read_original(path).mode == "RGB"
    assert modes == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")}


def test_classes_can_be_told_apart():
    """A network has something to learn: the tint of a class's images, in a CMYK file as well."""
    data = load("imagenette", "train", check_sizes=False)
    means = torch.stack([data.of_class(label)[: fakes.TRAIN].float().mean((2, 3)) for label in range(10)])
    between, within = means.mean(1).std(0).mean(), means.std(1).mean()
    assert between > 1.5 * within


def test_every_model_is_loadable():
    models = cache_dir() / "models"
    vae, known = models / "sd-vae-ft-mse", dict(classes=1000, image_size=256)
    assert problems(models / "DiT-XL-2-256", **known) == problems_of_autoencoder(vae) == []
    assert problems(models / "DiT-XL-2-256", parts=("transformer",), vae=vae, **known) == []
    for name in ("food-101", "cifar-10", "cifar-100"):
        spec = DATASETS[name]
        wanted = dict(classes=len(spec.classes), image_size=spec.image_size)
        assert problems(models / f"DiT-{name}", **wanted) == []
    for name in ("imagenette", "imagewoof", "imagenet"):
        assert minimax.problems(models / f"Minimax-{name}", DATASETS[name]) == []
    assert problems_of_decoder(models / "taesd", latent_channels=4) == []


def test_they_sample_at_the_real_size(tmp_path):
    models = cache_dir() / "models"
    vae = AutoencoderKL.from_pretrained(models / "sd-vae-ft-mse")
    pipe = IGDPipeline.from_pretrained(models / "DiT-XL-2-256", vae=vae)
    index = json.loads((models / "DiT-XL-2-256" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "Transformer2DModel"] and pipe.labels["Samoyed"] == 258
    generator = torch.Generator().manual_seed(0)
    image = pipe([207], generator=generator, num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 256, 256) and torch.isfinite(image).all()


def test_they_are_the_same_every_time(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fakes._models(tmp_path, extras=False, cifar_px=256)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("DiT-XL-2-256", "DiT-food-101"):
        ours, theirs = (
            IGDPipeline.from_pretrained(folder / name).transformer
            for folder in (tmp_path, cache_dir() / "models")
        )
        assert files.digest(ours.state_dict()) == files.digest(theirs.state_dict())
    assert problems(tmp_path / "DiT-cifar-10", classes=10, image_size=256) == []
    assert fakes.photograph("a", 1) == fakes.photograph("a", 1) != fakes.photograph("b", 1)
