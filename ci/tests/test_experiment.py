"""Notebook parameters, scales, and the steps that notebooks share."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from igd_lib import experiment
from igd_lib.config import PAPER, cache_dir
from igd_lib.experiment import Method, prepare, read_parameters
from igd_lib.guidance import influence_loss
from igd_lib.results import frame

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


@pytest.fixture
def small_loads(monkeypatch, only_fashion, fashion_train, fashion_test):
    """Fashion-MNIST read once for all tests of this file, on a machine that has nothing else."""
    splits = {"train": fashion_train, "test": fashion_test}
    monkeypatch.setattr(experiment, "load", lambda spec, split: splits[split])


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
        (tmp_path / "data" / "imagenet" / split).mkdir(parents=True)
    (cache_dir() / "models" / "DiT-XL-2-256").mkdir(parents=True)
    (line,) = experiment.missing_for_paper("imagenet")
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
    assert found.guidance.gamma == experiment.STAND_IN_SETTINGS["fashion-mnist"].guidance.gamma * 256 / 4096
    assert [m.name for m in found.methods()] == ["Random", "DiT", "DiT, best cfg", "DiT + G_D", "DiT-IGD"]
    alone = found.methods()[3].guidance
    assert (alone.k, alone.gamma) == (0.0, found.guidance.gamma)


def test_smoke_is_short(small_loads):
    found = prepare("01", "imagenet", "smoke", fidelity=PAPER)
    assert found.num_steps == 10 and found.protocol.epochs_for(10, 10) == 2 and len(found.test) == 200
    assert found.limit(50, 5) == (2, 2) and found.limit(1, 1) == (1, 1)
    assert replace(found, scale="small").limit(50, 5) == (50, 5)
    assert found.fidelity == replace(PAPER, gradient_images=10)
    assert "mean nothing" in found.banner and "not imagenet results" in found.banner


def test_the_steps_of_a_notebook(small_loads):
    """At smoke scale, two classes: surrogate, sets, influence, accuracy, pictures and stored rows."""
    found = prepare("01", "fashion-mnist", "smoke")
    found.classes = [0, 8]
    deviation_only = found.methods()[3]
    before = found.distilled(deviation_only, 1, seed=0)
    checkpoints = found.fit_surrogate()
    # The same set, found again, though a surrogate is there now.
    after = found.distilled(deviation_only, 1, seed=0)
    assert after.path == before.path and cache_dir() in before.path.parents

    assert len(checkpoints) == len(found.gradients(0)) >= 1 and checkpoints.epochs[0] == 0
    assert [len(curve) for curve in found.similarities().values()] == [len(found.trajectory())] * 2

    random = found.train.per_class(1, seed=0)
    sets = {("DiT + G_D", 0): after, ("Random", 0): random.subset(torch.tensor([0, 8]))}
    influence = found.influence_rows(sets, ipc=1)
    labels = torch.tensor([0, 8])
    gradients = torch.stack([found.gradients(0), found.gradients(8)], dim=1)
    images = torch.cat([after.images(0), after.images(8)]).float() / 127.5 - 1
    expected = influence_loss(images, labels, checkpoints, gradients, weights=checkpoints.weights).mean().item()
    assert influence.value[0] == pytest.approx(expected, rel=1e-4)

    accuracy = found.accuracy_rows(sets, ipc=1, network="convnet3")
    assert accuracy.value.between(0, 100).all() and set(accuracy.scale) == {"smoke"} and set(accuracy.metric) == {"top1"}
    assert experiment.accuracy_table(accuracy, influence).shape == (2, 5)

    found.save(influence, accuracy, folder=str(cache_dir() / "notebook"))
    assert len(list((cache_dir() / "results").iterdir())) == 4
    assert len(pd.read_csv(cache_dir() / "notebook" / "rows.csv")) == 4

    pictures = found.across_classes(sets)
    assert {name: images.shape for name, images in pictures.items()} == {"DiT + G_D": (2, 3, 32, 32), "Random": (2, 3, 32, 32)}
    assert torch.equal(found.images_of(sets, 8, seeds=1)["DiT + G_D"], after.images(8))


def test_other_weights_get_another_folder(small_loads):
    found = prepare("01", "fashion-mnist", "smoke")
    found.classes = [0]
    first = found.distilled(Method("DiT"), 1, seed=0).path
    with torch.no_grad():
        next(found.pipe.transformer.parameters()).mul_(1.01)
    assert found.distilled(Method("DiT"), 1, seed=0).path != first
    assert found.distilled(Method("DiT"), 1, seed=1).path.name.endswith("seed1")


# --- tables


@pytest.fixture
def rows(small_loads):
    found = prepare("02", "imagenet", "smoke")
    values = {"DiT-IGD": [60.0, 61.0, 62.0, 61.0], "DiT": [50.0, 52.0, 52.0, 50.0]}
    return frame([found.row(name, 10, seed, "top1", value) for name, list_ in values.items() for seed, value in enumerate(list_)])


def test_verdict_is_a_paired_t_test(rows):
    """Differences 10, 9, 10, 11: mean 10, sd 0.82, t = 24.5 with 3 degrees of freedom, above 3.18."""
    found = experiment.differences(rows, [("DiT-IGD", "DiT"), ("DiT", "DiT-IGD")])
    first, second = experiment.verdict(found).splitlines()
    assert first == "DiT-IGD - DiT: +10.0 points, sd 0.8 over n = 4 pairs: gain" and second.endswith("loss")
    # Two pairs need t > 12.7: differences 10 and 9 have t = 19, differences 10 and 6 have t = 4.
    two = experiment.differences(rows[rows.seed < 2], [("DiT-IGD", "DiT")])
    assert experiment.verdict(two).endswith("gain")
    wider = rows.assign(value=rows.value.where((rows.seed != 1) | (rows.method != "DiT"), 55.0))
    assert experiment.verdict(experiment.differences(wider[wider.seed < 2], [("DiT-IGD", "DiT")])).endswith("no clear difference")
    one = experiment.differences(rows[rows.seed == 0], [("DiT-IGD", "DiT")])
    assert experiment.verdict(one).endswith("no clear difference")


def test_ours_beside_the_paper(rows):
    found = experiment.beside_paper(rows, table=2, ipc=10)
    ours = "ours, fashion-mnist, smoke"  # never shown as ImageNet numbers
    assert found.loc["DiT-IGD"].to_dict() == {"paper": "45.5 ± 0.5", ours: "61.0 ± 0.8", "n": "4"}
    assert found.loc["RDED"].to_dict() == {"paper": "42.0 ± 0.1", ours: "", "n": ""}


def test_random_images_are_a_draw_of_real_ones(small_loads):
    found = prepare("01", "fashion-mnist", "smoke")
    a, b = (found.distilled(Method("Random", cfg_scale=None), 2, seed) for seed in (0, 1))
    assert len(a) == 20 and not torch.equal(a.fetch(torch.arange(20)), b.fetch(torch.arange(20)))


# --- the comparisons of Tables 5, 6, 10 and of paper and code


def test_methods_of_the_tables(only_fashion):
    found = prepare("05", "fashion-mnist", "small")
    strong = found.guidance
    by_name = {method.name: method for method in found.ablation()}
    assert [(m.guidance.k, m.guidance.gamma) for m in (by_name["DiT + G_I"], by_name["DiT + G_D"])] == [(strong.k, 0.0), (0.0, strong.gamma)]
    assert by_name["DiT"].guidance is None and by_name["DiT, best cfg"].cfg_scale == found.best_cfg
    dpm = found.solvers()[3]
    assert (dpm.fidelity.solver, dpm.num_steps, dpm.guidance.guided_range) == ("dpmsolver++", 20, (12, 18))
    assert [m.name for m in found.by_cfg((1.0, 4.0))] == [f"{kind}, cfg {cfg}" for kind in ("DiT", "DiT + G_D", "DiT-IGD") for cfg in (1, 4)]
    released, *others = found.flipped()
    assert released.fidelity is None and all(method.guidance == strong for method in others)
    assert [method.name for method in others] == [
        "solver=ddim", "timestep_spacing=leading", "cfg_channels=None", "range_counts_from=1", "rho_factor=1.0", "eps=conditional",
        "gradient_images=1000", "similarity=mean", "both_halves=True", "clamp_images=True",
    ]  # fmt: skip


def test_methods_with_their_own_checkpoints_and_fidelity(only_fashion):
    """At smoke scale: a method's own choice of checkpoints guides its set and no other's; sets do not depend on names."""
    found = prepare("06", "fashion-mnist", "smoke")
    found.classes = [3]
    kept = found.fit_surrogate()
    last = len(found.trajectory()) - 1
    guidance = replace(found.guidance, gamma=0.0)
    sets = {
        name: found.distilled(method, 1, 0)
        for name, method in {
            "default": Method("a", guidance), "renamed": Method("b", guidance), "last": Method("c", guidance, keep=(last,)),
            "ddim": Method("d", guidance, fidelity=replace(found.fidelity, solver="ddim")), "plain": Method("e"),
        }.items()
    }  # fmt: skip
    assert sets["default"].path == sets["renamed"].path and len({images.path for images in sets.values()}) == 4
    assert found.checkpoints is kept
    assert sets["last"].manifest["settings"]["checkpoint_epochs"] == [found.trajectory().epochs[last]]
    assert sets["ddim"].manifest["settings"]["scheduler"] == "ListedDDIMScheduler"
    assert all(images.seconds > 0 for images in sets.values())

    rows = found.latent_rows({("default", 0): sets["default"], ("plain", 0): sets["plain"]}, 1, reference="plain")
    value = rows.set_index(["method", "metric"]).value
    own, plain = sets["default"].latents(3), sets["plain"].latents(3)
    assert value["default", "moved"] == pytest.approx(((own - plain).norm() / plain.norm()).item(), rel=1e-5) and value["plain", "moved"] == 0
    assert value["default", "seconds"] == sets["default"].seconds


def test_nearest_of_a_class_by_hand(only_fashion):
    found = prepare("13", "fashion-mnist", "smoke")
    latents = {0: torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]).reshape(3, 2, 1, 1)}
    images = SimpleNamespace(selected=[0], latents=lambda label: latents[label], seconds=2.0)
    rows = found.latent_rows({("DiT", 0): images}, 3, reference="DiT").set_index("metric").value
    half = 0.5**0.5  # the first two are each other's nearest; the third is nearest to the second, at -0.707
    assert rows["nearest"] == pytest.approx((half + half - half) / 3, abs=1e-6) and rows["moved"] == 0 and rows["seconds"] == 2


def test_choices_and_selections(only_fashion):
    found = prepare("06", "fashion-mnist", "smoke")
    choices = found.choices((0.7, 2.0))
    assert list(choices.columns) == ["similarity", "threshold", "kept", "epochs", "regular"] and len(choices) == 4
    everything = list(range(len(found.trajectory())))
    assert choices.kept[1] == choices.regular[1] == everything  # no cosine reaches 2
    methods = found.selections((2.0,))
    assert [method.name for method in methods] == ["DiT", f"threshold 2.0 ({len(everything)})"]  # the regular one is the same
    assert methods[1].keep == tuple(everything)
