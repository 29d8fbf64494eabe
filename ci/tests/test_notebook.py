"""What a notebook does first: parameters, and the experiment at a scale."""

from dataclasses import replace

import pytest
import torch

from igd_lib import notebook
from igd_lib.config import PAPER, cache_dir
from igd_lib.datasets import DATASETS
from igd_lib.methods import comparison
from igd_lib.notebook import prepare, read_parameters

TYPES = dict(scale=str, ipc=int, seeds=int, threshold=float, save=bool)
GIVEN = dict(scale="auto", ipc=10, seeds=3, threshold=0.7, save=False)

# --- parameters


def test_parameters_are_read_by_name():
    found = read_parameters({**GIVEN, "_hidden": 1, "In": [], "Out": {}, "torch": torch, "prepare": prepare}, **TYPES)
    assert vars(found) == GIVEN


def test_an_int_passes_for_a_float():
    found = read_parameters(GIVEN | {"threshold": 1}, **TYPES)
    assert found.threshold == 1.0 and type(found.threshold) is float


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"treshold": 0.5}, NameError, "unknown notebook parameter 'treshold'; did you mean 'threshold'"),
        ({"zzz": 1}, NameError, "unknown notebook parameter 'zzz'; known: scale, ipc"),
        ({"ipc": "10"}, TypeError, "'ipc' is int, got '10'"),
        ({"ipc": 10.0}, TypeError, "'ipc' is int"),
        ({"ipc": True}, TypeError, "'ipc' is int, got True"),
        ({"threshold": True}, TypeError, "'threshold' is float"),
        ({"save": 1}, TypeError, "'save' is bool"),
        ({"scale": "large"}, ValueError, "scale is one of auto, smoke, small, paper, got 'large'"),
        ({"ipc": 0}, ValueError, "ipc is at least 1, got 0"),
        ({"seeds": 0}, ValueError, "seeds is at least 1"),
    ],
)
def test_wrong_parameters_are_named(change, error, message):
    with pytest.raises(error, match=message):
        read_parameters(GIVEN | change, **TYPES)


def test_a_missing_parameter_is_named():
    with pytest.raises(NameError, match="lacks 'seeds'"):
        read_parameters({name: value for name, value in GIVEN.items() if name != "seeds"}, **TYPES)


# --- scales


def test_paper_scale_names_every_missing_piece(only_fashion):
    with pytest.raises(FileNotFoundError) as caught:
        prepare("01", "imagenet", "paper")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for line, piece in zip(lines[1:], ("the images of imagenet", "facebook/DiT-XL-2-256", "stabilityai/sd-vae-ft-mse", "a CUDA GPU"), strict=True):
        assert piece in line
    assert "IGD_DATA" in lines[1] and "--revision" in lines[2]


def test_paper_scale_names_only_what_is_missing(only_fashion, monkeypatch, tmp_path):
    monkeypatch.setenv("IGD_ALLOW_CPU", "1")
    for split in ("train", "val"):
        for wnid in DATASETS["imagenet"].classes:
            (tmp_path / "data" / "imagenet" / split / wnid).mkdir(parents=True)
    (cache_dir() / "models" / "DiT-XL-2-256").mkdir(parents=True)
    (line,) = notebook.missing_for_paper("imagenet")
    assert "stabilityai/sd-vae-ft-mse" in line


def test_a_stand_in_has_no_paper_scale(only_fashion):
    with pytest.raises(FileNotFoundError, match="no paper scale"):
        prepare("01", "fashion-mnist", "paper")


def test_auto_on_a_bare_machine_says_that_it_is_not_imagenet(small_loads):
    found = prepare("01", "imagenet", "auto")
    assert found.scale == "small" and found.train.name == "fashion-mnist"
    assert "**Scale: small.**" in found.banner and "not imagenet results" in found.banner
    assert "not fashion-mnist results" not in prepare("01", "fashion-mnist", "auto").banner


def test_wrong_scale_or_data_set_raise(only_fashion):
    with pytest.raises(ValueError, match="scale is one of"):
        prepare("01", "imagenet", "tiny")
    with pytest.raises(ValueError, match="unknown data set 'imagnet'"):
        prepare("01", "imagnet", "auto")  # a typo must not become the stand-in


def test_gamma_follows_the_latents(small_loads):
    found = prepare("01", "fashion-mnist", "small")
    assert found.guidance.gamma == notebook.STAND_IN_SETTINGS["fashion-mnist"].guidance.gamma * 256 / 4096
    assert [m.name for m in comparison(found)] == ["Random", "DiT", "DiT, best cfg", "DiT + G_D", "DiT-IGD"]
    alone = comparison(found)[3].guidance
    assert (alone.k, alone.gamma) == (0.0, found.guidance.gamma)


def test_smoke_is_short(small_loads):
    found = prepare("01", "imagenet", "smoke", fidelity=PAPER)
    assert found.num_steps == 10 and found.protocol.epochs_for(10, 10) == 2 and len(found.test) == 200
    assert found.limit(50, 5) == (2, 2) and found.limit(1, 1) == (1, 1)
    assert replace(found, scale="small").limit(50, 5) == (50, 5)
    assert found.fidelity == replace(PAPER, gradient_images=10)
    assert "mean nothing" in found.banner and "not imagenet results" in found.banner
