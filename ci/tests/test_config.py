"""Settings check themselves, and agree with the paper and its released code."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from igd_lib.config import (
    AUGMENTATION,
    PAPER,
    RELEASED,
    STANDARD,
    Fidelity,
    Guidance,
    fixed_checkpoints,
    flips,
    preset,
    surrogate_training,
)
from igd_lib.protocols import (
    IGD_HARD,
    MINIMAX_HARD,
    RDED_SOFT,
    SMALL_HARD,
    SMALL_HARD_COLOUR,
    Training,
    rded_soft,
)
from igd_lib.tools.machine import cache_dir, data_dir


def test_guided_range_covers_16_of_50_steps():
    assert [i for i in range(50) if Guidance().covers(i)] == list(range(30, 46))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided_range": (45, 30)}, "did you swap"),
        ({"guided_range": (-1, 30)}, "guided_range"),
        ({"k": -1.0}, "at least 0"),
        ({"gamma": -0.1}, "at least 0"),
    ],
)
def test_bad_guidance_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_guidance_read_from_json_is_equal():
    assert Guidance(5.0, 120.0, [30, 45]) == Guidance()


def test_gamma_scales_with_the_latents():
    """The gradient of a cosine shrinks like 1 / ||z||, so gamma goes with the number of latent values."""
    assert Guidance(5.0, 120.0, (1, 2)).for_latents(256) == Guidance(5.0, 7.5, (1, 2))
    assert Guidance().for_latents(4096) == Guidance()


@pytest.mark.parametrize("field", ["cfg_channels", "memory_size", "gradient_images"])
def test_bad_fidelity_raises(field):
    with pytest.raises(ValueError, match=field):
        Fidelity(**{field: 0})


def test_misspelt_choices_raise():
    for field, value in (
        ("solver", "DDIM"),
        ("eps", "cond"),
        ("range_counts_from", 2),
        ("checkpoints", "all"),
    ):
        with pytest.raises(ValueError, match=f"Fidelity.{field} is one of"):
            Fidelity(**{field: value})


def test_paper_and_released_code():
    """The table of differences, by hand: field, standard, paper, and what else the released code has."""
    assert Fidelity() == STANDARD
    table = {
        "solver": ("ddpm", "ddim"),
        "timestep_spacing": ("linspace", "leading"),
        "timestep_frequencies": ("original", "original"),
        "cfg_channels": (3, None),
        "range_counts_from": (0, 1),
        "rho_factor": (0.0015, 1.0),
        "eps": ("combined", "conditional"),
        "second_chain": (False, False),
        "cosine_floor": (1e-6, 0.0),
        "backward": ("once", "once"),
        "clamp_images": (False, False),
        "memory_size": (64, None),
        "gradient_images": (200, None),
        "filter_images": ((80, 500), None),
        "checkpoints": ("fixed", "similarity"),
        "similarity": ("per_class", "mean"),
        "surrogate": ("released", "paper"),
        "surrogate_augmentation": (True, False),
        "vae": ("stabilityai/sd-vae-ft-mse",) * 2,
    }
    standard = {field: values[0] for field, values in table.items()}
    assert asdict(STANDARD) == standard
    assert asdict(RELEASED) == standard | {"second_chain": True, "backward": "per_checkpoint"}
    assert asdict(PAPER) == {field: values[1] for field, values in table.items()}


def test_flips_change_one_field_each():
    found = flips()
    assert list(found) == [
        "solver=ddim",
        "timestep_spacing=leading",
        "cfg_channels=None",
        "range_counts_from=1",
        "rho_factor=1.0",
        "eps=conditional",
        "cosine_floor=0.0",
        "memory_size=None",
        "gradient_images=None",
        "filter_images=None",
        "checkpoints=similarity",
        "similarity=mean",
        "surrogate=paper",
        "surrogate_augmentation=False",
        "second_chain=True",
        "clamp_images=True",
    ]
    for name, fidelity in found.items():
        changed = [field for field, value in asdict(fidelity).items() if value != asdict(STANDARD)[field]]
        assert changed == [name.split("=")[0]]


def test_fixed_checkpoints():
    assert fixed_checkpoints("imagenette", "convnet6") == (0, 2, 11, 40)
    assert fixed_checkpoints("imagewoof", "resnet18") == (0, 16, 33)
    assert fixed_checkpoints("fashion-mnist", "convnet3") is None
    assert fixed_checkpoints("imagewoof", "convnet6", cutmix=True) == (0, 10, 26, 60)
    assert fixed_checkpoints("imagenette", "convnet6", cutmix=True) is None


def test_surrogate_training():
    ten = dict(epochs=50, lr=0.01, momentum=0.9, weight_decay=5e-4, batch_size=64)
    assert surrogate_training(PAPER, 10) == surrogate_training(PAPER, 1000) == ten | {"augment": None}
    assert surrogate_training(STANDARD, 10) == surrogate_training(RELEASED, 10)
    assert surrogate_training(STANDARD, 10) == ten | {"augment": AUGMENTATION}
    assert asdict(AUGMENTATION) == dict(crop_scale=(0.5, 1.0), flip=True, jitter=0.4, lighting=0.1)
    # The released list for ImageNet-1K asks for epoch 52.
    assert surrogate_training(RELEASED, 1000) == dict(
        epochs=52, lr=0.1, momentum=0.9, weight_decay=1e-4, batch_size=128, augment=AUGMENTATION
    )


@pytest.mark.parametrize(
    ("dataset", "backbone", "expected"),
    [
        ("imagenette", "dit", [(5, 50), (5, 120), (5, 120)]),
        ("imagewoof", "dit", [(5, 50), (5, 120), (5, 120)]),
        ("imagenet", "dit", [(5, 120), (5, 120), (5, 120)]),
        ("imagenette", "minimax", [(15, 10), (15, 10), (15, 10)]),
        ("imagewoof", "minimax", [(10, 50), (10, 100), (10, 100)]),
        ("imagenet", "minimax", [(10, 100), (10, 100), (10, 100)]),
    ],
)
def test_table_12(dataset, backbone, expected):
    assert [preset(dataset, backbone, ipc) for ipc in (10, 50, 100)] == [
        Guidance(float(k), float(gamma)) for k, gamma in expected
    ]
    assert preset(dataset, backbone, 1) == preset(dataset, backbone, 10)
    assert preset(dataset, backbone, 99) == preset(dataset, backbone, 50)


def test_no_preset_raises():
    with pytest.raises(KeyError, match="imagenette"):
        preset("cifar10")


# --- protocols


@pytest.mark.parametrize(
    ("ipc", "ten", "hundred"),
    [
        (1, 3000, 2000),
        (10, 2000, 1300),
        (20, 1500, 1000),
        (50, 1500, 1000),
        (100, 1000, 600),
        (200, 1000, 600),
        (500, 500, 300),
        (1000, 300, 200),
    ],
)
def test_epochs_by_ipc(ipc, ten, hundred):
    """Minimax's table; at 100 classes two thirds of it, rounded down to hundreds."""
    assert IGD_HARD.epochs_for(ipc, 10) == ten
    assert IGD_HARD.epochs_for(ipc, 100) == hundred
    assert IGD_HARD.epochs_for(ipc, 1000) == ten


def test_fixed_epochs_win():
    assert replace(IGD_HARD, epochs=7).epochs_for(10, 100) == 7


@pytest.mark.parametrize("epochs", [3000, 2000, 1500, 1300, 1000, 600, 500, 300, 200, 120])
def test_milestones_at_two_thirds_and_five_sixths(epochs):
    """No rounding of 2/3 or 5/6 moves a milestone by an epoch."""
    assert [int(epochs * share) for share in IGD_HARD.milestones] == [epochs * 2 // 3, epochs * 5 // 6]


def test_hard_label_protocols_by_hand():
    """Every number of the two hard-label protocols."""
    shared = dict(
        batch_size=64,
        momentum=0.9,
        labels="hard",
        schedule="multistep",
        milestones=(2 / 3, 5 / 6),
        lr_decay=0.2,
        crop_scale=(0.5, 1.0),
        flip=True,
        jitter=0.4,
        lighting=0.1,
        cutmix=1.0,
        patch_factor=1,
        evaluations=100,
        reported="best",
        decay="all",
    )
    igd = dict(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        image_size=256,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        seeds=(0, 1, 2, 3, 4),
    )
    minimax = dict(
        optimizer="sgd",
        lr=0.01,
        weight_decay=5e-4,
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        over_100_classes=(0.1, 1e-4, 128),
    )
    for protocol, own in ((IGD_HARD, igd), (MINIMAX_HARD, minimax)):
        found = asdict(protocol)
        assert {key: found[key] for key in {**shared, **own}} == {**shared, **own}


def test_soft_label_protocol_by_hand():
    """Every number of RDED's protocol."""
    expected = dict(
        optimizer="adamw",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        decay="matrices",
        epochs=300,
        schedule="half-cosine",
        labels="soft",
        temperature=20.0,
        cutmix=1.0,
        patch_factor=2,
        crop_scale=(0.5, 1.0),
        flip=True,
        jitter=0.0,
        lighting=0.0,
        train_resize=0,
        image_size=224,
        test_resize=256,
        seeds=(42,),
        reported="best",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    found = asdict(RDED_SOFT)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("network", "lr"),
    [
        ("torchvision/resnet18", 1e-3),
        ("resnet50", 1e-3),
        ("resnet101", 1e-3),
        ("convnet5", 1e-3),
        ("efficientnet_b0", 2e-3),
        ("mobilenet_v2", 2.5e-3),
        ("swin_v2_t", 1e-4),
    ],
)
def test_soft_label_rates_by_network(network, lr):
    assert RDED_SOFT.training(network, 10, 1000).lr == lr
    assert IGD_HARD.training(network, 10, 10).lr == 1e-3


def test_soft_label_batches():
    """10, 50, 100 at IPC 1, 10, 50, doubled at 100 and 1,000 classes; never more than there are images."""
    batches = [
        [RDED_SOFT.training("resnet50", ipc, classes).batch_size for ipc in (1, 10, 50, 100)]
        for classes in (10, 100, 200, 1000)
    ]
    assert batches == [[10, 50, 100, 100], [20, 100, 200, 200], [10, 50, 100, 100], [20, 100, 200, 200]]
    assert RDED_SOFT.training("resnet50", 1, 3).batch_size == 3


def test_minimax_rates_for_many_classes():
    """Over 100 classes lr 0.1, weight decay 1e-4, batches of 128 at least; at 100 still the others."""
    assert MINIMAX_HARD.training("resnet18", 10, 1000) == Training(
        epochs=2000, batch_size=128, lr=0.1, weight_decay=1e-4
    )
    assert MINIMAX_HARD.training("resnet18", 10, 100) == Training(
        epochs=1300, batch_size=64, lr=0.01, weight_decay=5e-4
    )
    assert replace(MINIMAX_HARD, batch_size=256).training("resnet18", 10, 1000).batch_size == 256
    assert IGD_HARD.training("resnet18", 50, 1000) == Training(
        epochs=1500, batch_size=128, lr=1e-3, weight_decay=0.01
    )


def test_when_networks_are_tested():
    """Hard: about 100 times, evenly. Soft: every 10 epochs after 80 %."""
    assert IGD_HARD.tests(2000) == list(range(20, 2001, 20))
    assert RDED_SOFT.tests(300) == [250, 260, 270, 280, 290, 300]
    assert replace(RDED_SOFT, test_every=7).tests(20) == [20]
    assert SMALL_HARD.tests(50) == [50]
    assert SMALL_HARD_COLOUR.training("convnet3", 10, 10) == Training(60, 64, 1e-3, 0.01)
    assert SMALL_HARD_COLOUR.training("convnet3", 50, 10).epochs == 30


def test_images_without_patches_are_never_cropped_by_the_soft_protocol():
    assert rded_soft(RDED_SOFT, 2) == RDED_SOFT
    assert (rded_soft(RDED_SOFT, 1).patch_factor, rded_soft(RDED_SOFT, 1).crop_scale) == (1, (1.0, 1.0))
    assert rded_soft(RDED_SOFT, 4).crop_scale == (0.25, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        rded_soft(RDED_SOFT, 0)


# --- folders


def test_folders_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("IGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IGD_DATA")
    assert (cache_dir(), data_dir()) == (tmp_path / "cache", tmp_path / "cache" / "data")
    monkeypatch.setenv("IGD_DATA", "~/pictures")
    assert data_dir() == Path.home() / "pictures"
    monkeypatch.delenv("IGD_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "igd"


ZEROED_PAGES = """
import resource, sys, torch
from igd_lib.tools.machine import reuse_memory
if sys.argv[1] == "reuse":
    reuse_memory()
torch.zeros(2**24).add_(1)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.zeros(2**24).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_is_reused_rather_than_taken_anew():
    pages = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", ZEROED_PAGES, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("", "reuse")
    }
    assert pages["reuse"] < pages[""] / 2
