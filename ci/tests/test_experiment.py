"""Experiments: made at a scale, their sets, the methods of the tables, what is measured, and pictures."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from igd_lib import distillation, teachers
from igd_lib.analysis import plotting, results, statistics, tables
from igd_lib.config import AUGMENTATION, PAPER, STANDARD, Guidance, surrogate_training
from igd_lib.experiment import experiment as module
from igd_lib.experiment import makers, measures, models, pictures, registry
from igd_lib.experiment.comparisons import (
    ablation,
    baselines,
    by_cfg,
    cfg_scales,
    comparison,
    early_stage,
    flipped,
    flipped_unguided,
    grid,
    plain_and_guided,
    selections,
    sensitivity,
    shortcuts,
    solvers,
    surrogates,
)
from igd_lib.experiment.experiment import Sets, prepare
from igd_lib.experiment.methods import Method, Selection
from igd_lib.experiment.overview import overview, shown_steps, trace
from igd_lib.experiment.run import AUTO, Run
from igd_lib.experiment.scales import STAND_INS, paper_scale, small_scale, stand_in_of
from igd_lib.guidance import influence_loss
from igd_lib.guides import Shortcuts
from igd_lib.models.networks import network
from igd_lib.sets.store import DistilledSet
from igd_lib.surrogate import SurrogateTraining
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir

RANDOM, RDED, DIT = Method("random"), Method("rded"), Method()


@pytest.fixture
def smoke(small_loads):
    return prepare("01", "fashion-mnist", "smoke")


@pytest.fixture
def small(small_loads):
    return prepare("01", "fashion-mnist", "small")


def labels(methods):
    return [method.label for method in methods]


def columns(methods, protocol="a protocol"):
    """What statistics know of methods: their fields, a line each, and how networks are trained."""
    return pd.DataFrame([method.columns(num_steps=50) for method in methods]).assign(protocol=protocol)


# --- made at a scale


def test_a_stand_in_has_no_paper_scale(only_fashion):
    with pytest.raises(FileNotFoundError, match="no paper scale"):
        prepare("01", "fashion-mnist", "paper")


def test_the_quickstart_has_no_paper_scale_and_takes_a_stand_in_s_own_data(small_loads):
    found = prepare("00_quickstart", None, "auto")
    assert found.scale.name == "small" and found.train.name == found.spec.name == "fashion-mnist"
    assert "These are not" not in found.banner
    with pytest.raises(FileNotFoundError, match="no paper scale"):
        prepare("00_quickstart", None, "rehearsal")


def test_stand_ins_are_chosen_by_name(small_loads):
    assert {stand_in_of(AUTO, scale) for scale in ("small", "smoke")} <= set(STAND_INS)
    found = prepare("01", "imagewoof", "smoke", run=Run(stand_in="fashion-mnist"))
    assert found.train.name == "fashion-mnist"
    with pytest.raises(ValueError, match="stand_in is auto, fashion-mnist.*, got 'mnist'"):
        prepare("01", "imagewoof", "smoke", run=Run(stand_in="mnist"))


def test_auto_on_a_bare_machine_says_that_it_is_not_imagenet(small_loads):
    found = prepare("01", "imagenet", "auto")
    assert found.scale.name == "small" and found.train.name == "fashion-mnist"
    assert "**Scale: small.**" in found.banner and "not imagenet results" in found.banner
    assert "not fashion-mnist results" not in prepare("01", "fashion-mnist", "auto").banner


def test_wrong_scale_or_data_set_raise(only_fashion):
    with pytest.raises(ValueError, match="scale is one of"):
        prepare("01", "imagenet", "tiny")
    with pytest.raises(ValueError, match="unknown data set 'imagnet'"):
        prepare("01", "imagnet", "auto")  # a typo must not become the stand-in


def test_a_method_s_gamma_is_the_paper_s_and_follows_the_latents_where_it_samples(small):
    own = STAND_INS["fashion-mnist"].guidance
    assert labels(comparison(small)) == ["Random", "DiT", "DiT, best cfg", "DiT + G_D", "DiT-IGD"]
    alone = comparison(small)[3]
    assert alone.guidance == replace(own, k=0.0) == replace(small.scale.guidance, k=0.0)
    assert small.latent_values == 256
    assert small.sampling(alone).guidance == replace(own, k=0.0, gamma=own.gamma * 256 / 4096)


def test_where_the_papers_cfg_is_best_there_is_no_row_twice(small):
    """On CIFAR-10 with hard labels up to ten images a class; for more, or with soft ones, another is best."""
    found = {
        (n, labels): small_scale("x", "cifar-10", fidelity=STANDARD, ipc=n, labels=labels).best_cfg
        for n in (10, 50)
        for labels in ("hard", "soft")
    }
    assert found == {(10, "hard"): 4.0, (50, "hard"): 2.0, (10, "soft"): 7.0, (50, "soft"): 7.0}
    few = small_scale("x", "cifar-10", fidelity=STANDARD, ipc=10, labels="hard")
    same = replace(small, scale=replace(small.scale, best_cfg=few.best_cfg))
    assert labels(comparison(same)) == ["Random", "DiT", "DiT + G_D", "DiT-IGD"]
    assert len(labels(ablation(small))) - 1 == len(labels(ablation(same))) == len(set(ablation(same)))


def test_smoke_is_short(small_loads):
    found = prepare("01", "imagenet", "smoke", fidelity=PAPER)
    scale = found.scale
    assert scale.num_steps == 10 and scale.protocol.epochs_for(10, 10) == 2 and len(found.test) == 200
    assert scale.limit(Run(ipc=50)) == (2, (0, 1)) and scale.limit(Run(ipc=1, seeds="7:9")) == (1, (7, 8))
    assert scale.grid_values("1,2,3", "4,5,6") == ([2.0, 3.0], [5.0, 6.0])
    assert prepare("01", "imagenet", "small").scale.limit(Run(ipc=50, seeds="3")) == (50, (0, 1, 2))
    assert scale.fidelity == replace(PAPER, gradient_images=10, filter_images=(10, 20))
    assert "mean nothing" in found.banner and "not imagenet results" in found.banner


def test_a_threshold_of_its_own(small_loads):
    found = prepare("02", "fashion-mnist", "smoke", threshold=2.0)
    assert prepare("02", "fashion-mnist", "smoke").scale.threshold == 0.7
    assert found.scale.threshold == found.surrogates.scale.threshold == 2.0
    assert len(found.checkpoints) == len(found.surrogates.trajectory())  # no cosine reaches 2


def test_networks_by_scale(smoke):
    assert smoke.networks == ["convnet3", "convnet4"] and smoke.names("a, b") == ["a", "b"]
    asked = prepare("05", "fashion-mnist", "smoke", run=Run(networks="convnet2"))
    assert asked.networks == ["convnet2"] and asked.network == "convnet2"
    with pytest.raises(ValueError, match="01 trains one network, got convnet3, convnet4"):
        _ = smoke.network


def test_validation_images_are_none_of_training_or_test(only_fashion):
    found = prepare("12", "fashion-mnist", "smoke")
    held = found.on_validation()
    assert held.test.split.startswith("validation") and found.test.split.startswith("test")
    assert held.train is found.train and len(held.test) == len(found.test)
    known = {image.numpy().tobytes() for image in found.train.of_class(0)}
    fresh = [image.numpy().tobytes() not in known for image in held.test.of_class(0)]
    assert sum(fresh) >= len(fresh) - 1  # Fashion-MNIST repeats an image now and then


# --- the steps of a notebook


def test_the_steps_of_a_notebook(smoke, monkeypatch):
    """At smoke scale: surrogate, sets, influence, accuracy, pictures and stored rows."""
    deviation_only = comparison(smoke)[3]
    before = smoke.set(deviation_only, 0, 1)
    checkpoints, gradients_of = smoke.retained
    # The same set, found again, though a surrogate is there now.
    sets = smoke.sets([deviation_only, RANDOM], 1, 1)
    after = sets[deviation_only, 0]
    assert after.path == before.path and cache_dir() in before.path.parents
    assert len(sets) == 2 and sets.methods == [deviation_only, RANDOM] and sets.of_seed(1) == {}

    assert len(checkpoints) == len(gradients_of(0)) >= 1 and checkpoints.epochs[0] == 0
    curves, trajectory = smoke.surrogates.similarities(), smoke.surrogates.trajectory()
    assert [len(curve) for curve in curves.values()] == [len(trajectory)] * 2

    influence = measures.influence_rows(smoke, sets)
    labels = torch.arange(10)
    gradients = torch.stack([gradients_of(label) for label in range(10)], dim=1)
    images = torch.cat([after.images(label) for label in range(10)]).float() / 127.5 - 1
    losses = influence_loss(images, labels, checkpoints, gradients, weights=checkpoints.weights)
    assert influence.value[0] == pytest.approx(losses.mean().item(), rel=1e-4)

    accuracy = measures.accuracy_rows(smoke, sets, "convnet3")
    assert accuracy.value.between(0, 100).all() and set(accuracy.scale) == {"smoke"} and len(accuracy) == 10
    assert set(accuracy.metric) == {"top1", "top1_last", "top1_best", "top5_last", "top5_best"}
    assert tables.accuracy_table(accuracy, influence).shape == (2, 5)
    monkeypatch.setattr("igd_lib.evaluation.train_network", lambda *_: pytest.fail("trained again"))
    assert measures.accuracy_rows(smoke, sets, ["convnet3"]).equals(accuracy)  # read from disk

    measures.save(influence, accuracy, folder=str(cache_dir() / "notebook"))
    assert len(list((cache_dir() / "results").iterdir())) == 12
    assert len(pd.read_csv(cache_dir() / "notebook" / "rows.csv")) == 12

    shown = pictures.across_classes(sets, count=2)
    assert list(shown.titles) == list(smoke.train.classes[:2])
    assert shown.looks == {"DiT + G_D": "DiT + G_D", "Random": "Random"}
    assert {name: images.shape for name, images in shown.rows.items()} == dict.fromkeys(
        shown.looks, (2, 3, 32, 32)
    )
    assert torch.equal(shown.rows["DiT + G_D"], torch.cat([after.images(0), after.images(1)]))
    two = smoke.sets([RANDOM], 2, 1)  # the second image, where there is one
    second = pictures.across_classes(two).rows["Random"][3]
    assert torch.equal(second, two[RANDOM, 0].of_class(3)[1])
    assert torch.equal(pictures.one_class(sets, 8, title="").rows["DiT + G_D"], after.images(8))
    by_class = pictures.by_class(sets, title="").rows
    assert len(by_class) == 20 and torch.equal(
        by_class[f"{smoke.train.classes[8]}, DiT + G_D"], after.images(8)
    )


def test_other_weights_get_another_folder(smoke):
    first = smoke.set(DIT, 0, 1).path
    with torch.no_grad():
        next(smoke.models.pipe.transformer.parameters()).mul_(1.01)
    assert smoke.set(DIT, 0, 1).path != first
    assert smoke.set(DIT, 1, 1).path.name.endswith("seed1")


def test_a_guided_set_is_found_by_an_experiment_that_reads_the_surrogate_from_disk(small_loads, monkeypatch):
    folders = []
    for _ in range(3):  # the first trains and samples it
        found = prepare("01", "fashion-mnist", "smoke")
        folders.append(found.set(Method(guidance=found.scale.guidance), 0, 1).path)
        monkeypatch.setattr(distillation, "_store", lambda *_: pytest.fail("sampled again"))
        monkeypatch.setattr("igd_lib.surrogate._train_step", lambda *_: pytest.fail("trained again"))
    assert len(folders) == 3 and len(set(folders)) == 1


def test_a_set_of_another_version_is_named_once(smoke, monkeypatch, capsys):
    smoke.set(DIT, 0, 1)
    assert "was made by" not in capsys.readouterr().out
    monkeypatch.setattr(module, "VERSION", "99.0")
    smoke.set(DIT, 0, 1)
    assert "this is 99.0" in capsys.readouterr().out
    smoke.set(DIT, 0, 1)
    assert capsys.readouterr().out == ""


def test_random_images_are_a_draw_of_real_ones(smoke):
    a, b = (smoke.set(RANDOM, seed, 2) for seed in (0, 1))
    assert len(a) == 20 and not torch.equal(a.fetch(torch.arange(20)), b.fetch(torch.arange(20)))


# --- the comparisons of Tables 5, 6, 10 and of paper and code


def test_methods_of_the_tables(small):
    strong = small.scale.guidance
    by_label = {method.label: method for method in ablation(small)}
    alone = (by_label["DiT + G_I"].guidance, by_label["DiT + G_D"].guidance)
    assert [(own.k, own.gamma) for own in alone] == [(strong.k, 0.0), (0.0, strong.gamma)]
    assert by_label["DiT"].guidance is None and by_label["DiT, best cfg"].cfg_scale == small.scale.best_cfg
    dpm = solvers(small)[3]
    assert dpm.label == "DiT-IGD, DPM-Solver++ 20"
    settings = (dpm.fidelity.solver, dpm.num_steps, dpm.guidance.guided_range)
    assert settings == ("dpmsolver++", 20, (12, 18))
    assert cfg_scales("1,1.5, 4") == cfg_scales("1,1.5") == [4.0, 1.0, 1.5]
    assert labels(by_cfg(small, (1.0, 4.0))) == [
        f"{kind}, cfg {cfg}" for kind in ("DiT", "DiT + G_D", "DiT-IGD") for cfg in (1, 4)
    ]
    standard, *others = flipped(small, 10)
    assert standard.fidelity is None and standard.label == "DiT-IGD"
    assert all(method.guidance == strong for method in others)
    assert labels(others) == [
        "solver=ddim",
        "timestep_spacing=leading",
        "cfg_channels=None",
        "range_counts_from=1",
        "rho_factor=1.0",
        "eps=conditional",
        "cosine_floor=0.0",
        "gradient_images=1000",
        "filter_images=1000",
        "similarity=mean",
        "surrogate_augmentation=False",
        "second_chain=True",
        "clamp_images=True",
    ]
    for method in others:  # the label names the field that differs, and no other does
        field = method.label.split("=")[0]
        assert replace(method.fidelity, **{field: getattr(STANDARD, field)}) == STANDARD != method.fidelity
    unguided = flipped_unguided(small, 10)
    assert labels(unguided) == [
        "DiT", "DiT, solver=ddim", "DiT, timestep_spacing=leading", "DiT, cfg_channels=None",
    ]  # fmt: skip
    guided = {method.change: method.fidelity for method in others}
    assert all(row.guidance is None and row.fidelity == guided[row.change] for row in unguided[1:])
    assert "memory_size=None" in labels(flipped(small, 65)) and "memory_size=None" not in labels(
        flipped(small, 64)
    )


def test_fields_have_a_row_where_they_can_change_a_set(small):
    """At the paper's scale: with a fixed list not what filters; above 100 classes how surrogates train."""

    def fields(dataset, num_classes, ipc=10, **changes):
        about = dict(ipc=ipc, labels="hard", num_classes=num_classes, image_size=256)
        scale = paper_scale(dataset, fidelity=replace(STANDARD, **changes), **about)
        train = replace(small.train, name=dataset, classes=tuple(map(str, range(num_classes))))
        surrogates = replace(small.surrogates, scale=scale, train=train)
        made = replace(small, scale=scale, surrogates=surrogates, train=train)
        return {method.change.split("=")[0] for method in flipped(made, ipc)[1:]}

    woof, whole = fields("imagewoof", 10), fields("imagenet", 1000, ipc=100)
    assert "checkpoints" in woof and not {"similarity", "filter_images", "surrogate", "memory_size"} & woof
    assert {"checkpoints", "surrogate", "memory_size"} <= whole and not {
        "similarity",
        "filter_images",
    } & whole
    assert {"surrogate_augmentation", "second_chain", "gradient_images", "cosine_floor"} <= woof & whole
    unlisted = fields("food-101", 101)
    assert {"similarity", "filter_images", "surrogate"} <= unlisted and "checkpoints" not in unlisted
    assert {"similarity", "filter_images"} <= fields("imagewoof", 10, checkpoints="similarity")


def test_a_surrogate_follows_its_fidelity(small):
    """Augmentation on the stand-in without colours; at the paper's scale the whole training."""
    scale = small.scale
    assert scale.training.augment == replace(AUGMENTATION, jitter=0.0, lighting=0.0)
    assert scale.with_fidelity(replace(STANDARD, surrogate_augmentation=False), 10).training.augment is None
    assert replace(scale, papers=True).with_fidelity(STANDARD, 1000).training == SurrogateTraining(
        **surrogate_training(STANDARD, 1000)
    )
    other = small.surrogates.of(replace(STANDARD, surrogate_augmentation=False))
    assert other.scale.guiding != scale.guiding
    assert small.surrogates.of(replace(STANDARD, solver="ddim")).scale.guiding == scale.guiding


def test_labels_say_what_a_table_s_rows_differ_in(small):
    assert labels(surrogates(small, ["convnet3", "convnet2"])) == [
        "DiT", "DiT + G_D", "DiT-IGD, convnet3", "DiT-IGD, convnet2",
    ]  # fmt: skip
    assert labels(shortcuts(small)) == [
        "DiT",
        "DiT + G_D",
        "DiT-IGD",
        "decoder Jacobian",
        "tiny decoder",
        "decoder Jacobian, tiny decoder",
        "gradient every 2nd step",
        "gradient every 4th step",
        "gradient every 8th step",
        "gradient every 4th step, decoder Jacobian",
        "one checkpoint a step",
        "DiT, DPM-Solver++ 20",
        "FAST",
    ]
    assert len(set(shortcuts(small))) == 13
    assert Method(shortcuts=Shortcuts(every=4, jacobian="decoder"), varies=("shortcuts",)) in [
        replace(method, guidance=None) for method in shortcuts(small)
    ]
    for rows in (ablation(small), solvers(small), sensitivity(small, [0.0, 1.0], [2.0]), flipped(small, 10)):
        assert len(set(labels(rows))) == len(set(rows)) == len(rows)
    with pytest.raises(ValueError, match="backbone is 'dit' or 'minimax', got 'unet'"):
        plain_and_guided(small, "unet")


def test_methods_with_their_own_checkpoints_and_fidelity(smoke):
    """A method's own choice of checkpoints guides its set and no other's; sets do not depend on labels."""
    kept, trajectory = smoke.checkpoints, smoke.surrogates.trajectory()
    last = len(trajectory) - 1
    default = Method(guidance=replace(smoke.scale.guidance, gamma=0.0))
    renamed = replace(default, varies=("k",))
    chosen = replace(default, selection=Selection("regular", (last,)))
    ddim = replace(default, fidelity=replace(smoke.scale.fidelity, solver="ddim"))
    sets = smoke.sets([default, renamed, chosen, ddim, DIT], 1, 1)
    assert default.label != renamed.label and sets[default, 0].path == sets[renamed, 0].path
    assert len({images.path for _, _, images in sets}) == 4
    assert smoke.checkpoints is kept
    settings = sets[chosen, 0].manifest["settings"]
    assert settings["checkpoints"]["epochs"] == [trajectory.epochs[last]]
    assert sets[ddim, 0].manifest["settings"]["scheduler"] == "ListedDDIMScheduler"
    assert all(images.seconds > 0 for _, _, images in sets)

    two = Sets(1, {(method, 0): sets[method, 0] for method in (default, DIT)})
    value = measures.latent_rows(smoke, two, DIT).set_index(["method", "metric"]).value
    own, plain = (
        torch.cat([sets[method, 0].latents(label) for label in range(10)]).flatten(1)
        for method in (default, DIT)
    )
    moved = ((own - plain).norm(dim=1) / plain.norm(dim=1)).mean().item()
    assert moved > 0 and value[default.label, "moved"] == pytest.approx(moved, rel=1e-5)
    assert value["DiT", "moved"] == 0


def test_nearest_of_a_class_by_hand(smoke, tmp_path):
    about = {"classes": ["a"], "selected": [0], "ipc": 3}
    files.write(tmp_path / "manifest.json", json.dumps(about))
    images = DistilledSet(tmp_path)
    for index, latent in enumerate(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])):
        files.write(images.image_path(0, index), b"")
        files.save_tensors(images.latent_path(0, index), {"latent": latent.reshape(2, 1, 1)}, seconds=0.5)
    rows = measures.latent_rows(smoke, Sets(3, {(DIT, 0): images}), DIT).set_index("metric").value
    half = 0.5**0.5  # the first two are each other's nearest; the third is nearest to the second, at -0.707
    assert rows["nearest"] == pytest.approx((half + half - half) / 3, abs=1e-6)
    assert rows["moved"] == 0
    with pytest.raises(TypeError, match="Random is not sampled: it has no latents"):
        measures.latent_rows(smoke, Sets(3, {(RANDOM, 0): smoke.train}), DIT)


def test_choices_and_selections(smoke):
    choices = smoke.surrogates.choices((0.7, 2.0))
    assert (
        list(choices.columns) == ["similarity", "threshold", "kept", "epochs", "regular"]
        and len(choices) == 4
    )
    everything = list(range(len(smoke.surrogates.trajectory())))
    assert choices.kept[1] == choices.regular[1] == everything  # no cosine reaches 2
    rows = selections(smoke, (2.0,))
    assert labels(rows) == ["DiT", f"threshold 2.0 ({len(everything)})"]  # the regular one is the same
    assert rows[1].selection.keep == tuple(everything) and rows[1].guidance == smoke.scale.guidance
    assert labels(selections(smoke, (2.0,), "minimax"))[1].startswith("Minimax-IGD, threshold 2.0 (")


def test_grid_of_settings(small):
    assert small.scale.grid_values("auto", "0, 120") == ([0.0, 30.0], [0.0, 120.0])
    assert small.scale.grid_values("1,2", "auto") == (
        [1.0, 2.0],
        [0.0, 480.0],
    )  # the paper's, for 4,096 values
    rows = grid(small, [0.0, 30.0], [0.0, 480.0])
    assert [(method.label, method.guidance) for method in rows] == [
        ("DiT", None),
        ("k 30, gamma 0", Guidance(30.0, 0.0, (15, 22))),
        ("k 0, gamma 480", Guidance(0.0, 480.0, (15, 22))),
        ("k 30, gamma 480", Guidance(30.0, 480.0, (15, 22))),
    ]
    assert small.sampling(rows[2]).guidance == Guidance(0.0, 30.0, (15, 22))  # for latents of 256 values
    assert rows[3].guidance == small.scale.guidance
    assert labels(grid(small, [30.0], [480.0], "minimax")) == ["Minimax", "Minimax, k 30, gamma 480"]


def test_soft_labels_come_from_the_surrogates_last_checkpoint(small_loads):
    """None for hard labels. Smoke's is hardly trained, so only there no accuracy is asked of it."""
    assert prepare("03", "imagenet", "smoke", labels="hard").teacher() is None
    found = prepare("03", "imagenet", "smoke", labels="soft")
    teacher = found.teacher()
    assert found.scale.protocol.labels == "soft"
    assert teacher.classes == found.train.classes and "epoch 1" in teacher.weights
    assert teacher.least == 0 and prepare("03", "imagenet", "small").scale.teacher_least == 50
    asking = replace(found.surrogates, scale=replace(found.scale, teacher_least=50.0))
    assert replace(found, models=replace(found.models, surrogates=asking)).teacher().least == 50
    last = found.surrogates.trajectory().states[-1]
    assert all(torch.equal(value, last[name]) for name, value in teacher.model.state_dict().items())


def test_a_stand_ins_own_teacher_labels_its_own_classes_alone(smoke, monkeypatch):
    """Images of other classes, or in another order, are labelled by their own surrogate."""
    classes = smoke.train.classes
    shipped = replace(smoke.any_teacher(), weights="shipped", classes=classes)
    monkeypatch.setattr(models, "stand_in_teacher", lambda name: shipped)
    found = replace(smoke.models)  # nothing looked up yet
    assert found.teacher(classes, ()).weights == "shipped"
    for others in (classes[:3], tuple(reversed(classes))):
        teacher = found.teacher(others, ())
        assert "trajectory" in teacher.weights and teacher.classes == others


def test_a_published_teacher_is_reduced_to_the_classes_at_hand(monkeypatch):
    """ImageNet-1K's logits at its ids, in that order; without weights the error says where they go."""
    torch.manual_seed(0)
    state = network("timm/resnet18", num_classes=1000, image_size=224).state_dict()
    weights = teachers.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: state)
    teacher = teachers.imagenet_teacher(("woof", "meow"), (207, 5))
    whole = network("timm/resnet18", num_classes=1000, image_size=224)
    whole.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model.eval()(images), whole.eval()(images)[:, [207, 5]])

    def offline(self, **options):
        assert options == dict(progress=False, check_hash=True, weights_only=True)
        raise OSError("no route")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no route\); download https.*resnet18-f37072fd.pth to .*checkpoints"
    ):
        teachers.imagenet_teacher(("woof",), (207,))


def test_surrogates_of_other_architectures(smoke):
    """Each has a trajectory and guides sets of its own; influence is measured with the experiment's."""
    own = smoke.scale.surrogate
    rows = surrogates(smoke, [own, "convnet2"])
    default, other = (replace(row, guidance=replace(row.guidance, gamma=0.0)) for row in rows[2:])
    sets = smoke.sets([default, other], 1, 1)
    a, b = (sets[method, 0] for method in (default, other))
    assert a.path != b.path and not torch.equal(a.latents(3), b.latents(3))
    trajectories = [smoke.surrogates.trajectory(name) for name in (own, "convnet2")]
    sizes = [sum(value.numel() for value in found.states[0].values()) for found in trajectories]
    assert sizes[0] == smoke.retained[1](3).shape[1] != sizes[1]
    influence = measures.influence_rows(smoke, Sets(1, {(other, 0): b}))
    assert len(influence) == 1 and influence.surrogate[0] == "convnet2"


def test_distances_are_named_after_their_features(smoke, monkeypatch):
    """Real images drawn anew lie nearer to the data than dark ones, by every measure."""
    monkeypatch.setitem(registry.BASELINES, "dark", registry.Baseline("dark", None))
    draw = smoke.train.per_class(5, seed=1)
    dark = replace(draw, fetch=lambda indices: draw.fetch(indices) // 8)
    sets = Sets(5, {(RANDOM, 0): draw, (Method("dark"), 0): dark})
    rows = measures.distribution_rows(smoke, sets, images=20).set_index(["metric", "method"]).value
    fd, coverage, wasserstein = (
        f"{what} over {smoke.scale.surrogate} features" for what in ("FD", "coverage", "Wasserstein")
    )
    assert list(rows.index.levels[0]) == sorted([fd, coverage, wasserstein])
    for metric, better in ((fd, -1), (wasserstein, -1), (coverage, 1)):
        assert better * (rows[metric, "Random"] - rows[metric, "dark"]) > 0, metric


# --- either backbone, and RDED


def test_the_minimax_backbone_is_fine_tuned_once(smoke, monkeypatch):
    tuned = Method(backbone="minimax")
    assert smoke.models.minimax_missing == "" and smoke.models.minimax is smoke.models.minimax
    own, plain = (smoke.set(method, 0, 1) for method in (tuned, DIT))
    assert own.path != plain.path and not torch.equal(own.latents(0), plain.latents(0))
    monkeypatch.setattr(
        "igd_lib.baselines.tuning.Accelerator", None
    )  # a second experiment reads what the first made
    again = prepare("01", "fashion-mnist", "smoke")
    assert again.set(tuned, 0, 1).path == own.path
    guided = plain_and_guided(smoke, "minimax")[1]
    row = measures.About(smoke, guided, 0, own, 1).row("top1", 1.0)
    assert (row.method, row.backbone, row.guides) == ("Minimax-IGD", "minimax", "influence+deviation")
    assert measures.About(smoke, DIT, 0, plain, 1).row("top1", 1.0).backbone == "dit"


def test_rded_s_images_are_kept(smoke, monkeypatch):
    first = smoke.set(RDED, 0, 1)
    assert first.labels.tolist() == list(range(10)) and "RDED, ipc 1, factor 1, seed 0" in first.split
    monkeypatch.setattr(makers.rded, "selection", None)
    again = smoke.set(RDED, 0, 1)
    assert torch.equal(again.fetch(torch.arange(10)), first.fetch(torch.arange(10)))


def test_a_map_of_sets(smoke, tmp_path):
    few = smoke.train.per_class(3, seed=0)
    sets = Sets(3, {(RANDOM, 0): few, (RANDOM, 1): few})
    coordinates, distances = measures.map_of_sets(smoke, sets, 4, images=30)
    assert coordinates.set.tolist() == ["real"] * 30 + ["Random"] * 3
    assert list(distances.metric) == [f"Wasserstein over {smoke.scale.surrogate} features"]
    measures.save_table(smoke, coordinates, str(tmp_path), "coordinates")
    kept = pd.read_csv(tmp_path / "coordinates.csv")
    assert list(kept.columns) == ["set", "x", "y", "class", "dataset", "scale", "git_revision"]
    assert set(kept.scale) == {"smoke"}


# --- which differences a table claims


def test_claims_name_only_rows_that_are_there(small):
    igd, tuned = Guidance(), Method(backbone="minimax")
    alone = Guidance(k=0.0)
    assert statistics.table_claims(columns([DIT, Method(guidance=igd)])) == [("DiT-IGD", "DiT")]
    assert statistics.table_claims(columns(baselines(small))) == [
        ("DiT-IGD", "DiT"),
        ("DiT, best cfg", "DiT"),
        ("DiT-IGD", "DiT + G_D"),
        ("DiT-IGD", "DiT, best cfg"),
        ("DiT-IGD", "RDED"),
        ("Minimax", "DiT"),
        ("Minimax-IGD", "Minimax"),
        ("Minimax-IGD", "DiT-IGD"),
        *((method, "Random") for method in ("RDED", "DiT", "DiT-IGD")),
    ]
    rows = columns([tuned, replace(tuned, guidance=alone), replace(tuned, guidance=igd)])
    assert statistics.ablation_claims(rows) == [
        ("Minimax + G_D", "Minimax"), ("Minimax-IGD", "Minimax"), ("Minimax-IGD", "Minimax + G_D"),
    ]  # fmt: skip


def test_methods_are_compared_where_networks_are_trained_alike():
    table = columns([Method("random"), Method("dm"), Method("datm"), DIT, Method(guidance=Guidance())])
    table.loc[table.family == "datm", "protocol"] = "its own"
    assert statistics.table_claims(table) == [
        ("DiT-IGD", "DiT"), ("DiT-IGD", "DM"), ("DM", "Random"), ("DiT", "Random"), ("DiT-IGD", "Random"),
    ]  # fmt: skip


def test_claims_of_selections_and_solvers(small):
    def chosen(rule, count, threshold=None):
        selection = Selection(rule, tuple(range(count)), threshold)
        return Method(guidance=Guidance(), selection=selection, varies=("selection",))

    rows = columns([DIT, chosen("threshold", 3, 0.7), chosen("regular", 3), chosen("regular", 4)])
    assert rows.method.tolist() == ["DiT", "threshold 0.7 (3)", "regular (3)", "regular (4)"]
    against_none = [(name, "DiT") for name in rows.method[1:]]
    assert statistics.selection_claims(rows) == [*against_none, ("threshold 0.7 (3)", "regular (3)")]

    slow, guided, quick, guided_quick = solvers(small)[:4]
    found = statistics.solver_claims(columns([guided_quick, slow, quick, guided]))
    assert found == [
        ("DiT-IGD, DDIM 25", "DiT, DDIM 25"),
        ("DiT-IGD, DPM-Solver++ 20", "DiT, DPM-Solver++ 20"),
        ("DiT, DPM-Solver++ 20", "DiT, DDIM 25"),
        ("DiT-IGD, DPM-Solver++ 20", "DiT-IGD, DDIM 25"),
    ]


def test_what_a_method_is_called_is_read_from_its_row_again(small):
    """A row carries every field that its label is made of."""
    for rows in (baselines(small), ablation(small), solvers(small), shortcuts(small), flipped(small, 10)):
        table = columns(rows)
        assert results.labels(table).tolist() == table.method.tolist()
        assert results.looks(table) == {method.label: method.look for method in rows}


# --- the figures' methods and trajectories


def test_methods_of_figures_2_and_6(small, small_loads):
    own = small.scale.guidance
    plain, *others = rows = early_stage(small, [10.0, 30.0])
    assert plain.guidance is None and all(method.guidance.gamma == 0 for method in others)
    early, late = (
        ("DiT + G_I, k 10", "DiT + G_I, k 30"),
        ("DiT + G_I throughout, k 10", "DiT + G_I throughout, k 30"),
    )
    assert {(method.label, method.guidance.k, method.guidance.guided_range) for method in others} == {
        (early[0], 10.0, own.guided_range),
        (early[1], 30.0, own.guided_range),
        (late[0], 10.0, (0, 24)),
        (late[1], 30.0, (0, 24)),
    }
    assert statistics.early_stage_claims(columns([plain, rows[1], rows[3]])) == [
        (early[0], "DiT"), (late[0], "DiT"), (late[0], early[0]),
    ]  # fmt: skip
    counted = prepare("22", "fashion-mnist", "small", fidelity=replace(STANDARD, range_counts_from=1))
    assert early_stage(counted, [10.0])[2].guidance.guided_range == (1, 25)

    by_label = {method.label: method.guidance for method in sensitivity(small, [0.0, 100.0], [480.0, 4096.0])}
    assert by_label.pop("DiT") is None
    assert by_label == {
        "DiT-IGD, k 0": replace(own, k=0.0),
        "DiT-IGD, k 100": replace(own, k=100.0),
        "DiT-IGD, gamma 480": replace(own, gamma=480.0),
        "DiT-IGD, gamma 4096": replace(own, gamma=4096.0),
    }
    weakest = sensitivity(small, [0.0], [4096.0])[1]
    assert (
        small.sampling(replace(weakest, guidance=replace(weakest.guidance, gamma=4096.0))).guidance.gamma
        == 256.0
    )


def test_a_trace_ends_where_the_set_did_and_parts_from_the_plain_one_when_guided(smoke):
    plain, igd = plain_and_guided(smoke, "dit")
    sets = smoke.sets([plain, igd], 2, 1)
    ways = {method: trace(smoke, method, sets[method, 0], 8, 1) for method in (plain, igd)}
    first, last = smoke.scale.guidance.guided_range
    for method, way in ways.items():
        assert way.latents.shape == (11, 4, 8, 8) and way.clean.shape == (10, 4, 8, 8)
        # Alone and in a batch.
        assert (way.latents[-1] - sets[method, 0].latents(8)[1]).abs().max() < 1e-3
        assert way.guided == [method == igd and first <= 9 - step <= last for step in range(10)]
    same = (ways[plain].latents == ways[igd].latents).flatten(1).all(dim=1).tolist()
    assert same == [True] * (10 - last) + [False] * (last + 1)
    # Eq. 5 on the noise itself, from the first step's own prediction of it.
    pipe = smoke.models.pipe
    scheduler = pipe.scheduler_for(smoke.scale.fidelity)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[:1]
    alpha = scheduler.alphas_cumprod[int(timestep)]
    noise = ways[plain].latents[:1]
    classes = torch.tensor([8, 10])
    with torch.no_grad():
        predicted = pipe.transformer(
            noise.repeat(2, 1, 1, 1), timestep=timestep.expand(2), class_labels=classes
        )
    conditional, null = predicted.sample[:, :4]
    eps = null + 4 * (conditional - null)
    eps[3] = conditional[3]  # STANDARD guides three channels
    expected = (noise[0] - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    torch.testing.assert_close(ways[plain].clean[0], expected, rtol=1e-3, atol=1e-3)

    paths, strips = overview(smoke, sets, 8, [0, 1], columns=5)
    assert len(paths) == 2 * 2 * 11 and set(paths.method) == {"DiT", "DiT-IGD"}
    assert {name: images.shape for name, images in strips.items()} == dict.fromkeys(
        ("DiT", "DiT-IGD"), (5, 3, 32, 32)
    )
    assert shown_steps(10, 5) == [9, 7, 4, 2, 0]
    # A plane keeps at most the true distances, and shows the final latents apart.
    ends = paths[(paths.image == 1) & (paths.step == 0)][["x", "y"]].to_numpy()
    distance = (ways[plain].latents[-1] - ways[igd].latents[-1]).norm().item()
    assert 0 < ((ends[0] - ends[1]) ** 2).sum() ** 0.5 <= distance + 1e-3


def test_pictures_are_kept_pixel_by_pixel(tmp_path):
    about = SimpleNamespace(train=SimpleNamespace(name="data"), scale=SimpleNamespace(name="small"))
    rows = {name: torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8) for name in ("a, b", "c")}
    pictures.Gallery(rows, ["x", "y", "z"], "a title", {"a, b": "DiT"}).save(about, str(tmp_path))
    found = plotting.read_gallery(tmp_path / "images")
    assert found["titles"] == ["x", "y", "z"] and found["title"] == "a title"
    assert list(found["columns"]) == list(rows) and found["looks"] == {"a, b": "DiT", "c": ""}
    assert all(torch.equal(found["columns"][name], images) for name, images in rows.items())
