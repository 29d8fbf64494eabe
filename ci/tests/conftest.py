"""Fixtures of the whole suite: folders of its own, real images, the stand-in, and tiny random models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel

import reference
from ci import fakes
from igd_lib.data import images as data
from igd_lib.experiment import experiment, pieces, plan, scales
from igd_lib.memory import Footprint
from igd_lib.models import standin
from igd_lib.models.networks import ConvNet
from igd_lib.pipeline import IGDPipeline
from igd_lib.surrogate import Checkpoints
from igd_lib.tools.machine import cache_dir, data_dir, reuse_memory

reuse_memory()
FOUND_DATA, FOUND_CACHE = data_dir(), cache_dir()  # before any test redirects them


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> Path:
    """Nothing a test writes reaches the user's cache; data sets are still found where they were."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IGD_CACHE", str(folder))
    monkeypatch.setenv("IGD_DATA", str(FOUND_DATA))
    monkeypatch.setenv("IGD_QUIET", "1")
    monkeypatch.delenv("IGD_RAY", raising=False)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers alone, in any order and in any process of a parallel run."""
    torch.manual_seed(0)


# --- real images and the stand-in


@pytest.fixture(scope="session")
def fashion_folder() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IGD_DATA", str(FOUND_DATA))
        return data.fashion_mnist_folder()


def _fashion(folder: Path, split: str) -> data.ImageData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IGD_DATA", str(FOUND_DATA))
        return data.load("fashion-mnist", split)


@pytest.fixture(scope="session")
def fashion_train(fashion_folder):
    return _fashion(fashion_folder, "train")


@pytest.fixture(scope="session")
def fashion_test(fashion_folder):
    return _fashion(fashion_folder, "test")


@pytest.fixture
def only_fashion(monkeypatch, tmp_path, fashion_folder) -> None:
    """A machine with Fashion-MNIST, on which "small" then runs, and nothing else: no images, no weights, no
    GPU.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_, **__):
        raise LocalEntryNotFoundError("not here")

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "fashion-mnist").symlink_to(fashion_folder)
    monkeypatch.setenv("IGD_DATA", str(folder))
    monkeypatch.delenv("IGD_ALLOW_CPU", raising=False)
    monkeypatch.setattr(pieces, "snapshot_download", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(scales.DEFAULTS, "small", "fashion-mnist")


@pytest.fixture
def small_loads(monkeypatch, only_fashion, fashion_train, fashion_test):
    """Fashion-MNIST read once for all tests of this file, on a machine that has nothing else."""
    splits = {"train": fashion_train, "test": fashion_test}
    monkeypatch.setattr(experiment, "load", lambda spec, split: splits[split])


@pytest.fixture(scope="session")
def standin_pipe() -> IGDPipeline:
    pipe = IGDPipeline.from_pretrained(standin.path("fashion-mnist"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- the paper's data and models, faked


@pytest.fixture(scope="session")
def faked(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has fakes of them in the real layouts."""
    return fakes.make(tmp_path_factory.mktemp("fakes"))


@pytest.fixture
def rehearsing(faked, monkeypatch, own_cache) -> Path:
    """Such a machine; its models' folder, to which tests may add. What a plan times takes no time."""
    for name, value in faked.items():
        if name != "IGD_CACHE":
            monkeypatch.setenv(name, value)
    models = own_cache / "models"
    models.mkdir()
    for folder in (Path(faked["IGD_CACHE"]) / "models").iterdir():
        (models / folder.name).symlink_to(folder)
    pieces._counted.cache_clear()
    monkeypatch.setitem(scales.DEFAULTS, "small", "fashion-mnist")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plan, "this_machine", lambda precision: plan.other_machine(24))
    monkeypatch.setattr(plan, "guided_step", lambda *_: Footprint(3_350_000_000, 3_057_000_000))
    return models


@pytest.fixture
def complete(rehearsing, monkeypatch) -> Path:
    """The same, as if all images were there."""
    monkeypatch.setattr(pieces, "count_problems", lambda dataset: [])
    monkeypatch.setattr(data, "_size_problem", lambda *_: "")
    return rehearsing


# --- tiny random models


@pytest.fixture(scope="session")
def tiny():
    """Factory: a random two-layer DiT, a random autoencoder (latents 4 x 8 x 8 of 16 px) and schedulers."""

    def make(
        num_classes: int = 1000, out_channels: int = 4, dtype: torch.dtype = torch.float32
    ) -> SimpleNamespace:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=out_channels,
                num_layers=2,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=num_classes,
            )
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
                scaling_factor=0.7,  # not 1, so that a forgotten factor shows
            )
        if dtype == torch.float64:
            transformer, vae = transformer.double(), vae.double()
        # A weak noise schedule (alpha_bar_T = 0.08): a random model's latents then stay of order 1.
        schedule = dict(beta_schedule="linear", beta_end=0.005, clip_sample=False)
        return SimpleNamespace(
            transformer=transformer.eval(),
            vae=vae.eval(),
            ddim=DDIMScheduler(**schedule),
            ddpm=DDPMScheduler(timestep_spacing="linspace", **schedule),
        )

    return make


@pytest.fixture
def tiny_pipe(tiny) -> IGDPipeline:
    """The tiny models as a pipeline of 10 classes."""
    models = tiny(num_classes=10)
    pipe = IGDPipeline(models.transformer, models.vae, models.ddpm)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def toy():
    """Factory: three checkpoints of a ConvNet of 3 classes, unequal rates, and (3, 3, P) class gradients."""

    def make(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            models = [ConvNet(2, 3, 16, width=8).to(dtype).eval() for _ in range(3)]
            images = torch.rand(3, 4, 3, 16, 16, dtype=dtype) * 2 - 1  # four images of each class
        states = [model.state_dict() for model in models]
        checkpoints = Checkpoints(
            models[0], [dict(state) for state in states], [0.0, 1.0, 2.0], [0.01, 0.02, 0.03]
        )
        gradients = [
            [reference.class_gradient(models[0], state, images[c], c) for c in range(3)] for state in states
        ]
        return SimpleNamespace(
            checkpoints=checkpoints, gradients=torch.stack([torch.stack(row) for row in gradients])
        )

    return make


@pytest.fixture(scope="session")
def toy_data() -> data.ImageData:
    """Random images at 16 px: 3 classes, 6 each."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (18, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return data.from_tensors("toy", "train", ("a", "b", "c"), images, torch.arange(3).repeat(6))
