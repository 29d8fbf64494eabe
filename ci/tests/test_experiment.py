"""The steps that notebooks share: surrogates, sets, rows, pictures, and the methods of the tables."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from igd_lib import experiment, plotting, tables
from igd_lib.config import cache_dir
from igd_lib.guidance import influence_loss
from igd_lib.methods import (
    Method,
    ablation,
    ablation_claims,
    baselines,
    by_cfg,
    claims,
    comparison,
    early_stage,
    early_stage_claims,
    flipped,
    grid,
    plain_and_guided,
    sampled,
    selection_claims,
    selections,
    sensitivity,
    solver_claims,
    solvers,
    surrogates,
)
from igd_lib.models import network
from igd_lib.notebook import prepare
from igd_lib.overview import overview, shown_steps, trace


def test_the_steps_of_a_notebook(small_loads, monkeypatch):
    """At smoke scale, two classes: surrogate, sets, influence, accuracy, pictures and stored rows."""
    found = prepare("01", "fashion-mnist", "smoke")
    found.classes = [0, 8]
    deviation_only = comparison(found)[3]
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

    accuracy = found.accuracy_rows(sets, ipc=1, networks="convnet3")
    assert accuracy.value.between(0, 100).all() and set(accuracy.scale) == {"smoke"} and len(accuracy) == 10
    assert set(accuracy.metric) == {"top1", "top1_last", "top1_best", "top5_last", "top5_best"}
    assert tables.accuracy_table(accuracy, influence).shape == (2, 5)
    monkeypatch.setattr("igd_lib.evaluate._run", lambda *_: pytest.fail("trained again"))
    assert found.accuracy_rows(sets, ipc=1, networks=["convnet3"]).equals(accuracy)  # read from disk

    found.save(influence, accuracy, folder=str(cache_dir() / "notebook"))
    assert len(list((cache_dir() / "results").iterdir())) == 12
    assert len(pd.read_csv(cache_dir() / "notebook" / "rows.csv")) == 12

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


def test_a_guided_set_is_found_by_an_experiment_that_reads_the_surrogate_from_disk(small_loads, monkeypatch):
    folders = []
    monkeypatch.setattr(experiment, "distill", lambda *_, out_dir, **__: folders.append(out_dir))
    for _ in range(3):  # the first trains it
        found = prepare("01", "fashion-mnist", "smoke")
        found.distilled(Method("DiT-IGD", found.guidance), 1, seed=0)
    assert len(folders) == 3 and len(set(folders)) == 1


def test_random_images_are_a_draw_of_real_ones(small_loads):
    found = prepare("01", "fashion-mnist", "smoke")
    a, b = (found.distilled(Method("Random", real="random"), 2, seed) for seed in (0, 1))
    assert len(a) == 20 and not torch.equal(a.fetch(torch.arange(20)), b.fetch(torch.arange(20)))


# --- the comparisons of Tables 5, 6, 10 and of paper and code


def test_methods_of_the_tables(only_fashion):
    found = prepare("05", "fashion-mnist", "small")
    strong = found.guidance
    by_name = {method.name: method for method in ablation(found)}
    assert [(m.guidance.k, m.guidance.gamma) for m in (by_name["DiT + G_I"], by_name["DiT + G_D"])] == [(strong.k, 0.0), (0.0, strong.gamma)]
    assert by_name["DiT"].guidance is None and by_name["DiT, best cfg"].cfg_scale == found.best_cfg
    dpm = solvers(found)[3]
    assert (dpm.fidelity.solver, dpm.num_steps, dpm.guidance.guided_range) == ("dpmsolver++", 20, (12, 18))
    assert [m.name for m in by_cfg(found, (1.0, 4.0))] == [f"{kind}, cfg {cfg}" for kind in ("DiT", "DiT + G_D", "DiT-IGD") for cfg in (1, 4)]
    released, *others = flipped(found)
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
    rows = selections(found, (2.0,))
    assert [method.name for method in rows] == ["DiT", f"threshold 2.0 ({len(everything)})"]  # the regular one is the same
    assert rows[1].keep == tuple(everything)


def test_grid_of_settings(only_fashion):
    found = prepare("12", "fashion-mnist", "small")
    assert found.grid_values("auto", "0, 120") == ([0.0, 30.0], [0.0, 120.0])
    assert found.grid_values("1,2", "auto") == ([1.0, 2.0], [0.0, 480.0])  # the paper's gamma, for 4,096 values
    rows = grid(found, [0.0, 30.0], [0.0, 480.0])
    assert [(m.name, m.guidance and (m.guidance.k, m.guidance.gamma)) for m in rows] == [
        ("DiT", None), ("k 30, gamma 0", (30.0, 0.0)), ("k 0, gamma 480", (0.0, 30.0)), ("k 30, gamma 480", (30.0, 30.0)),
    ]  # fmt: skip
    assert rows[3].guidance == found.guidance


def test_networks_by_scale(small_loads):
    found = prepare("01", "imagenet", "smoke")
    assert found.networks("auto", paper="resnet18", small="convnet3,convnet4") == ["convnet3", "convnet4"]
    assert found.networks("a, b", paper="resnet18") == ["a", "b"]
    found.scale = "paper"
    assert found.networks("auto", paper="convnet6,resnet18") == ["convnet6", "resnet18"]


def test_validation_images_are_none_of_training_or_test(only_fashion):
    found = prepare("12", "fashion-mnist", "smoke")
    held = found.on_validation()
    assert held.test.split.startswith("validation") and found.test.split.startswith("test") and held.train is found.train
    known = {image.numpy().tobytes() for image in found.train.of_class(0)}
    fresh = [image.numpy().tobytes() not in known for image in held.test.of_class(0)]
    assert sum(fresh) >= len(fresh) - 1  # Fashion-MNIST repeats an image now and then


def test_soft_labels_come_from_the_surrogates_last_checkpoint(only_fashion):
    """None for hard labels. Smoke's is hardly trained, so only there no accuracy is asked of it."""
    assert prepare("03", "imagenet", "smoke").teacher() is None
    found = prepare("03", "imagenet", "smoke", labels="soft")
    teacher = found.teacher()
    assert found.protocol.labels == "soft" and teacher.classes == found.train.classes and "epoch 1" in teacher.weights
    assert teacher.least == 0 and replace(found, scale="small").teacher().least == 50
    last = found.trajectory().states[-1]
    assert all(torch.equal(value, last[name]) for name, value in teacher.model.state_dict().items())


def test_a_published_teacher_is_reduced_to_the_classes_at_hand(monkeypatch):
    """Logits of ImageNet-1K's ids alone, in the data set's order; without weights the error says where they go."""
    torch.manual_seed(0)
    state = network("timm/resnet18", num_classes=1000, image_size=224).state_dict()
    weights = experiment.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: state)
    teacher = experiment.imagenet_teacher(("woof", "meow"), (207, 5))
    whole = network("timm/resnet18", num_classes=1000, image_size=224)
    whole.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model.eval()(images), whole.eval()(images)[:, [207, 5]])

    def offline(self, **options):
        assert options == dict(progress=False, check_hash=True, weights_only=True)
        raise OSError("no route")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(FileNotFoundError, match=r"no route\); download https.*resnet18-f37072fd.pth to .*checkpoints"):
        experiment.imagenet_teacher(("woof",), (207,))


def test_surrogates_of_other_architectures(only_fashion):
    """Each has a trajectory and guides sets of its own; influence is measured with the experiment's."""
    found = prepare("04", "fashion-mnist", "smoke")
    found.classes = [3]
    found.fit_surrogate()
    _, _, default, other = surrogates(found, ["convnet3", "convnet2"])
    a, b = (found.distilled(replace(method, guidance=replace(method.guidance, gamma=0.0)), 1, 0) for method in (default, other))
    assert a.path != b.path and not torch.equal(a.latents(3), b.latents(3))
    sizes = [sum(value.numel() for value in found.trajectory(name).states[0].values()) for name in ("convnet3", "convnet2")]
    assert sizes[0] == found.gradients(3).shape[1] != sizes[1]
    assert len(found.influence_rows({("b", 0): b}, 1)) == 1


def test_distances_are_named_after_their_features(only_fashion):
    """Real images drawn anew lie nearer to the data than dark ones, by every measure."""
    found = prepare("11", "fashion-mnist", "smoke")
    draw = found.train.per_class(5, seed=1)
    dark = replace(draw, fetch=lambda indices: draw.fetch(indices) // 8)
    rows = found.distribution_rows({("Random", 0): draw, ("dark", 0): dark}, 5, images=20).set_index(["metric", "method"]).value
    name = "convnet3 features"
    assert list(rows.index.levels[0]) == sorted([f"FD over {name}", f"coverage over {name}", f"Wasserstein over {name}"])
    for metric, better in ((f"FD over {name}", -1), (f"Wasserstein over {name}", -1), (f"coverage over {name}", 1)):
        assert better * (rows[metric, "Random"] - rows[metric, "dark"]) > 0, metric


# --- either backbone, and RDED


def test_the_minimax_backbone_is_fine_tuned_once(small_loads, monkeypatch):
    found = prepare("01", "fashion-mnist", "smoke")
    found.classes = [0]
    assert found.minimax_missing == "" and found.minimax_pipe is found.minimax_pipe
    own, plain = (found.distilled(Method(name, backbone=name.lower()), 1, seed=0) for name in ("Minimax", "DiT"))
    assert own.path != plain.path and not torch.equal(own.latents(0), plain.latents(0))
    monkeypatch.setattr("igd_lib.minimax.Accelerator", None)  # a second experiment reads what the first made
    again = prepare("01", "fashion-mnist", "smoke")
    again.classes = [0]
    assert again.distilled(Method("Minimax", backbone="minimax"), 1, seed=0).path == own.path
    assert found.row("Minimax-IGD", 1, 0, "top1", 1.0).backbone == "minimax" and found.row("DiT-IGD", 1, 0, "top1", 1.0).backbone == "dit"


def test_without_a_minimax_model_its_rows_are_left_out(small_loads):
    found = prepare("01", "fashion-mnist", "smoke")
    with_it = [method.name for method in baselines(found)]
    assert with_it == ["Random", "RDED", "DiT", "DiT, best cfg", "DiT + G_D", "DiT-IGD", "Minimax", "Minimax-IGD"]
    assert [method.name for method in sampled(found)] == ["DiT", "DiT + G_D", "DiT-IGD", "Minimax", "Minimax-IGD"]
    assert [method.name for method in plain_and_guided(found, "minimax")] == ["Minimax", "Minimax-IGD"]
    found.scale = "paper"  # where no folder of such a model is
    assert [method.name for method in baselines(found)] == with_it[:6] and len(ablation(found)) == 5
    assert "accelerate launch -m igd_lib.minimax fashion-mnist" in found.minimax_missing
    for make in (lambda: found.minimax_pipe, lambda: selections(found, [0.7], "minimax"), lambda: plain_and_guided(found, "minimax")):
        with pytest.raises((FileNotFoundError, ValueError), match="no Minimax model in"):
            make()


def test_rded_s_images_are_kept(small_loads, monkeypatch):
    found = prepare("01", "fashion-mnist", "smoke")
    first = found.distilled(Method("RDED", real="rded"), 1, seed=0)
    assert first.labels.tolist() == list(range(10)) and "RDED, ipc 1, factor 2, seed 0" in first.split
    monkeypatch.setattr(experiment, "rded", None)
    again = found.distilled(Method("RDED", real="rded"), 1, seed=0)
    assert torch.equal(again.fetch(torch.arange(10)), first.fetch(torch.arange(10)))


def test_a_map_of_sets(small_loads, tmp_path):
    found = prepare("23", "fashion-mnist", "smoke")
    few = found.train.per_class(3, seed=0)
    coordinates, distances = found.map_of_sets({("Random", 0): few, ("Random", 1): few}, 3, 4, images=30)
    assert coordinates.set.tolist() == ["real"] * 30 + ["Random"] * 3 and list(distances.metric) == ["Wasserstein over convnet3 features"]
    found.keep_table(coordinates, str(tmp_path), "coordinates")
    kept = pd.read_csv(tmp_path / "coordinates.csv")
    assert list(kept.columns) == ["set", "x", "y", "class", "dataset", "scale", "git_revision"] and set(kept.scale) == {"smoke"}


def test_claims_name_only_rows_that_are_there():
    assert claims(["DiT", "DiT-IGD"]) == [("DiT-IGD", "DiT")]
    assert ablation_claims(["Minimax", "Minimax + G_D", "Minimax-IGD"]) == [
        ("Minimax + G_D", "Minimax"), ("Minimax-IGD", "Minimax"), ("Minimax-IGD", "Minimax + G_D"),
    ]  # fmt: skip
    assert selection_claims(["DiT", "threshold 0.7 (3)", "regular (3)", "regular (4)"])[-1] == ("threshold 0.7 (3)", "regular (3)")
    names = ["DiT-IGD, DPM-Solver++ 20", "DiT, DDIM 50", "DiT, DPM-Solver++ 20", "DiT-IGD, DDIM 50"]
    assert solver_claims(names) == [(names[3], names[1]), (names[0], names[2]), (names[2], names[1]), (names[0], names[3])]


# --- the figures' methods and trajectories


def test_methods_of_figures_2_and_6(only_fashion):
    found = prepare("22", "fashion-mnist", "small")
    plain, *others = early_stage(found, [10.0, 30.0])
    assert plain.guidance is None and all(method.guidance.gamma == 0 for method in others)
    assert {(m.name, m.guidance.k, m.guidance.guided_range) for m in others} == {
        ("DiT + G_I, k 10", 10.0, found.guidance.guided_range), ("DiT + G_I, k 30", 30.0, found.guidance.guided_range),
        ("DiT + G_I throughout, k 10", 10.0, (0, 24)), ("DiT + G_I throughout, k 30", 30.0, (0, 24)),
    }  # fmt: skip
    early = "DiT + G_I, k 10"
    assert early_stage_claims(["DiT", early, "DiT + G_I throughout, k 10"]) == [
        (early, "DiT"), ("DiT + G_I throughout, k 10", "DiT"), ("DiT + G_I throughout, k 10", early),
    ]  # fmt: skip
    found.fidelity = replace(found.fidelity, range_counts_from=1)
    assert early_stage(found, [10.0])[2].guidance.guided_range == (1, 25)

    own = found.guidance
    by_name = {method.name: method.guidance for method in sensitivity(found, [0.0, 100.0], [480.0, 4096.0])}
    assert by_name.pop("DiT") is None
    assert by_name == {
        "DiT-IGD, k 0": replace(own, k=0.0), "DiT-IGD, k 100": replace(own, k=100.0),
        "DiT-IGD, gamma 480": replace(own, gamma=30.0), "DiT-IGD, gamma 4096": replace(own, gamma=256.0),
    }  # fmt: skip


def test_a_trace_ends_where_the_set_did_and_parts_from_the_plain_one_when_guided(small_loads):
    found = prepare("25", "fashion-mnist", "smoke")
    found.classes = [3, 8]
    found.fit_surrogate()
    compared = plain_and_guided(found, "dit")
    sets = found.all_sets(2, 1, compared)
    ways = {method.name: trace(found, method, sets[method.name, 0], 8, 1) for method in compared}
    first, last = found.guidance.guided_range
    for name, way in ways.items():
        assert way.latents.shape == (11, 4, 8, 8) and way.clean.shape == (10, 4, 8, 8)
        assert (way.latents[-1] - sets[name, 0].latents(8)[1]).abs().max() < 1e-3  # alone and in a batch of two
        assert way.guided == [name == "DiT-IGD" and first <= 9 - step <= last for step in range(10)]
    same = (ways["DiT"].latents == ways["DiT-IGD"].latents).flatten(1).all(dim=1).tolist()
    assert same == [True] * (10 - last) + [False] * (last + 1)
    # Eq. 5 on the noise itself, from the first step's own prediction of it.
    scheduler = found.pipe.scheduler_for(found.fidelity)
    scheduler.set_timesteps(10)
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
    noise = ways["DiT"].latents[:1]
    labels = torch.tensor([8, 10])
    with torch.no_grad():
        conditional, null = found.pipe.transformer(noise.repeat(2, 1, 1, 1), timestep=scheduler.timesteps[:1].expand(2), class_labels=labels).sample[:, :4]
    eps = null + 4 * (conditional - null)
    eps[3] = conditional[3]  # RELEASED guides three channels
    expected = (noise[0] - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    torch.testing.assert_close(ways["DiT"].clean[0], expected, rtol=1e-3, atol=1e-3)

    paths, strips = overview(found, compared, sets, 8, [0, 1], columns=5)
    assert len(paths) == 2 * 2 * 11 and {name: images.shape for name, images in strips.items()} == {name: (5, 3, 32, 32) for name in ("DiT", "DiT-IGD")}
    assert shown_steps(10, 5) == [9, 7, 4, 2, 0]
    # A plane keeps at most the true distances, and shows the final latents apart.
    ends = paths[(paths.image == 1) & (paths.step == 0)][["x", "y"]].to_numpy()
    distance = (ways["DiT"].latents[-1] - ways["DiT-IGD"].latents[-1]).norm().item()
    assert 0 < ((ends[0] - ends[1]) ** 2).sum() ** 0.5 <= distance + 1e-3


def test_pictures_are_kept_pixel_by_pixel(tmp_path):
    setup = SimpleNamespace(train=SimpleNamespace(name="data"), scale="small")
    setup.keep_table = lambda *arguments: experiment.Experiment.keep_table(setup, *arguments)
    pictures = {name: torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8) for name in ("a, b", "c")}
    experiment.Experiment.keep_images(setup, pictures, ["x", "y", "z"], "a title", str(tmp_path))
    found = plotting.read_gallery(tmp_path / "images")
    assert found["titles"] == ["x", "y", "z"] and found["title"] == "a title" and list(found["columns"]) == list(pictures)
    assert all(torch.equal(found["columns"][name], images) for name, images in pictures.items())
