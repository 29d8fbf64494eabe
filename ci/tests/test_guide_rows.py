"""Every registered guide as a row: its set, its key, what is measured of it, and what a plan says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from guided_sets import check_a_killed_run, latents
from igd_lib import distillation, memory
from igd_lib.analysis import plotting, statistics, tables
from igd_lib.config import Guidance
from igd_lib.data.images import from_tensors
from igd_lib.evaluation import fingerprint
from igd_lib.experiment import comparisons, costs, guide_makers, measures
from igd_lib.experiment.experiment import Sets, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.registry import GUIDES
from igd_lib.experiment.run import Run
from igd_lib.guides import GuideFactory
from igd_lib.other_guides import ClassifierLoss, Modes, Transport

PLAIN, MODES = Method(), Method(guides=("modes",))
STEPS, GUIDED = 6, (3, 4)
DEVIATING = Guidance(0.0, 480.0, GUIDED)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("guides")


@pytest.fixture
def experiment(small_loads, monkeypatch, shared_cache):
    """At smoke in fewer steps; what is trained and sampled is there for the next test."""
    monkeypatch.setenv("IGD_CACHE", str(shared_cache))
    made = prepare("15_guides", "fashion-mnist", "smoke")
    guidance = replace(made.scale.guidance, guided_range=GUIDED)
    return replace(made, scale=replace(made.scale, num_steps=STEPS, guidance=guidance))


# --- names


def test_labels_begin_with_the_paper_s_name():
    labels = {name: Method(guides=(name,)).label for name in GUIDES}
    assert labels == {
        "modes": "DiT + MGD3",
        "modes-nearest": "DiT + MGD3 (nearest)",
        "modes-random": "DiT + MGD3 (random)",
        "modes-pooled": "DiT + MGD3 (pooled)",
        "modes-shuffled": "DiT + MGD3 (shuffled)",
        "modes-algorithm": "DiT + MGD3 (algorithm)",
        "classifier": "DiT + classifier loss",
        "transport": "DiT + OT",
    }
    assert Method(guides=("modes",), guidance=DEVIATING).label == "DiT + MGD3 + G_D"
    assert Method(guidance=DEVIATING).label == "DiT + G_D"
    assert Method(guidance=replace(DEVIATING, k=5.0)).label == "DiT-IGD"
    assert Method(guides=("transport",), guidance=replace(DEVIATING, k=5.0)).label == "DiT + OT + G_I + G_D"


def test_every_row_has_a_look_of_its_own(experiment):
    rows = comparisons.guides(
        replace(experiment, scale=replace(experiment.scale, figures_mean_something=True))
    )
    assert len({row.label for row in rows}) == len(rows) == 14
    assert {row.look for row in rows} <= plotting.COLOURS.keys()


def test_where_figures_mean_nothing_a_row_of_each_class_is_enough(experiment):
    few = comparisons.guides(experiment)
    whole = comparisons.guides(
        replace(experiment, scale=replace(experiment.scale, figures_mean_something=True))
    )
    assert len(few) == 4 and set(few) <= set(whole)
    assert {name.split("-")[0] for row in few for name in row.guides} == {"modes", "classifier", "transport"}


# --- sets


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_moves_its_set_from_the_same_noise(experiment, name):
    found, plain = experiment.set(Method(guides=(name,)), 0, 2), experiment.set(PLAIN, 0, 2)
    assert found.path != plain.path and torch.isfinite(latents(found)).all()
    moved = (latents(found) - latents(plain)).flatten(2).norm(dim=2) / latents(plain).flatten(2).norm(dim=2)
    assert (moved.mean(dim=0) > 0.01).all(), moved  # the first images of classes, and the second ones
    [settings] = found.manifest["settings"]["guides"]
    assert settings["name"] == name and json.dumps(settings)


def test_each_image_is_drawn_to_its_own_anchor(experiment):
    """Image j of a class comes nearer to anchor j of the class than vanilla's does, but for a few."""
    factory = GUIDES["modes"].make(experiment).for_set(2, experiment.scale.num_steps, 0)
    anchors = torch.stack([factory.make.anchors(label) for label in range(10)])
    moved, plain = (latents(experiment.set(method, 0, 2)) for method in (MODES, PLAIN))
    nearer = (moved - anchors).flatten(2).norm(dim=2) / (plain - anchors).flatten(2).norm(dim=2)
    assert nearer.mean() < 0.95 and (nearer < 1).float().mean() > 0.65
    guide = factory(torch.tensor([3, 0]), [1, 0], [])
    assert isinstance(guide, Modes) and torch.equal(guide.anchors, anchors[[3, 0], [1, 0]])


def test_anchors_are_of_the_set_s_ipc(experiment):
    """And their key with them; another IPC is another factory."""
    made = GUIDES["modes"].make(experiment)
    one, two = (made.for_set(ipc, STEPS, 0) for ipc in (1, 2))
    assert one.settings != two.settings and two.settings["anchors"]["ipc"] == 2
    assert made.for_set(2, 25, 1).settings["guided_range"] == [14, 25]
    assert two.make.anchors(0).shape[0] == 2 and two.for_set is None
    with pytest.raises(ValueError, match="modes depends on the images a class of a set"):
        made(torch.tensor([0]), [0], [])
    sampling = experiment.sampling(MODES)
    assert sampling.for_set(2).for_set(3).settings["guides"] == [dict(two.settings)]
    plain = experiment.sampling(PLAIN)
    assert plain.for_set(2) is plain


def test_what_decides_a_guide_names_its_sets(experiment, monkeypatch):
    """The rule, the reading, the real images, the checkpoints and the strengths."""
    names = ("modes", "modes-nearest", "modes-shuffled", "modes-algorithm", "classifier", "transport")
    paths = {
        experiment.sampling(Method(guides=(name,))).for_set(2).settings["guides"][0]["name"] for name in names
    }
    assert paths == set(names)

    def settings(name, own=experiment) -> str:
        return json.dumps(own.sampling(Method(guides=(name,))).for_set(2).settings["guides"])

    before = {name: settings(name) for name in names}
    assert len(set(before.values())) == len(names)
    stronger = replace(experiment.scale, guidance=replace(experiment.scale.guidance, k=1.0))
    other = replace(experiment, scale=stronger)
    assert (
        settings("classifier", other) != before["classifier"] and settings("modes", other) == before["modes"]
    )
    more = replace(experiment, scale=replace(experiment.scale, candidates=12))
    for name in names:
        assert (settings(name, more) != before[name]) == (name != "classifier")
    weaker = replace(GUIDES["transport"], make=guide_makers.transport(6.0))
    monkeypatch.setitem(GUIDES, "transport", weaker)
    assert settings("transport") != before["transport"]


def test_the_guides_are_what_they_say(experiment):
    """With the checkpoints that guide, the decoder that samples, and beta for latents of this size."""
    noise = torch.zeros(2, 4, 8, 8)
    for name, kind in (("classifier", ClassifierLoss), ("transport", Transport)):
        sampling = experiment.sampling(Method(guides=(name,))).for_set(2)
        [guide] = sampling.guides([4, 1], [0, 0], [noise[:0]] * 2, {}, [torch.Generator()] * 2)
        assert isinstance(guide, kind)
        if name == "classifier":
            assert guide.decoder is experiment.models.pipe.vae and guide.targets.tolist() == [4, 1]
            assert guide.checkpoints.epochs == experiment.checkpoints.epochs
            assert guide.guidance == replace(experiment.scale.guidance, gamma=0.0)
        else:
            assert guide.beta == guide_makers.BETA * experiment.latent_values / 4096
            real = [guide_makers._latents(experiment)(label) for label in (4, 1)]
            for own, whole in zip(guide.real, real, strict=True):
                assert len(own) == len(whole) == experiment.scale.candidates  # all, in another order
                torch.testing.assert_close(own.sum(0), whole.sum(0), rtol=1e-4, atol=1e-4)


def test_a_killed_run_ends_as_one_that_was_not(experiment, monkeypatch, tmp_path):
    row = Method(guides=("transport", "modes"), guidance=DEVIATING)
    check_a_killed_run(experiment, row, monkeypatch, tmp_path)


def test_images_do_not_depend_on_the_batch(experiment, monkeypatch, tmp_path):
    found = latents(experiment.set(MODES, 0, 2))
    monkeypatch.setenv("IGD_CACHE", str(tmp_path))
    few = replace(experiment, run=Run(batch=3))
    torch.testing.assert_close(latents(few.set(MODES, 0, 2)), found, rtol=1e-3, atol=1e-4)


def test_what_is_needed_is_made_for_the_labels_at_hand(experiment, monkeypatch):
    asked = []
    prepared = GuideFactory(lambda *_: pytest.fail("not asked"), {"name": "x"}, prepare=asked.append)
    monkeypatch.setitem(GUIDES, "modes", replace(GUIDES["modes"], make=lambda experiment: prepared))
    monkeypatch.setattr(distillation._Job, "run_all", lambda *_: None)
    wanted, folder = experiment._wanted(experiment.sampling(MODES), 0, 1)
    distillation.fill(wanted, folder, only=[2, 5])
    assert asked == [[2, 5]]


# --- measures


@pytest.fixture
def sets(experiment) -> Sets:
    return experiment.sets([PLAIN, MODES], 2, 1)


def test_redundancy_is_accuracy_across_halves(experiment, sets):
    """High where both halves of a class are one image, at chance where they have nothing in common."""
    own = experiment.with_protocol(replace(experiment.scale.protocol, epochs=20))
    train, generator = experiment.train, torch.Generator().manual_seed(0)
    one = torch.stack([train.of_class(label, 1)[0] for label in range(10)])
    noise = torch.randint(0, 256, (40, *one.shape[1:]), generator=generator, dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(4)
    same, apart = (
        from_tensors(train.name, split, train.classes, images, labels)
        for split, images in (("same", one.repeat_interleave(4, 0)), ("noise", noise))
    )
    first, second = Method("random"), Method("herding")
    rows = measures.redundancy_rows(own, Sets(4, {(first, 0): same, (second, 0): apart}), "convnet3")
    values = rows.set_index("method").value
    assert set(rows.metric) == {"redundancy"} and values["Random"] == 100 and values["Herding"] < 50
    found = measures.redundancy_rows(experiment, sets, "convnet3")
    assert len(found) == 2 and found.value.between(0, 100).all() and set(found.network) == {"convnet3"}
    assert measures.redundancy_rows(experiment, experiment.sets([PLAIN], 1, 1), "convnet3").empty


def test_sets_that_share_a_half_are_told_apart(experiment, monkeypatch):
    """Guides that need earlier images leave the first one of a class as it is."""
    train = experiment.train
    images = torch.stack([train.of_class(label, 2) for label in range(10)]).flatten(0, 1)
    other = images.clone()
    other[1::2] = 255 - other[1::2]
    one, two = (
        from_tensors("set", "train", train.classes, own, torch.arange(10).repeat_interleave(2))
        for own in (images, other)
    )
    seen = []
    real = measures.evaluate_sets

    def spy(sets, test, *rest, **options):
        seen.append((fingerprint(sets[0]), test.split))
        return real(sets, test, *rest, **options)

    monkeypatch.setattr(measures, "evaluate_sets", spy)
    first, second = Method("random"), Method("herding")
    measures.redundancy_rows(experiment, Sets(2, {(first, 0): one, (second, 0): two}), "convnet3")
    assert seen[0][0] == seen[2][0] and seen[0][1] != seen[2][1] and len(set(seen)) == 4


def test_halves_share_no_image(toy_data):
    odd = toy_data.first(5)
    even, rest = measures._halves(odd)
    assert even.labels.bincount().tolist() == [3] * 3 and rest.labels.bincount().tolist() == [2] * 3
    for label in range(3):
        assert torch.equal(even.of_class(label), odd.of_class(label)[0::2])
        assert torch.equal(rest.of_class(label), odd.of_class(label)[1::2])


def test_coverage_is_that_of_the_distances(experiment, sets):
    few = measures.coverage_rows(experiment, sets)
    all_three = measures.distribution_rows(experiment, sets, images=experiment.scale.candidates)
    expected = all_three[all_three.metric.isin(few.metric)]
    assert few.value.tolist() == expected.value.tolist() and few.metric.nunique() == 1
    assert few.metric.iloc[0].startswith("coverage over ")


def test_costs_of_an_image(experiment):
    """A gradient through the model takes memory that anchors do not."""
    rows = [PLAIN, MODES, Method(guides=("transport",)), Method(guides=("classifier",))]
    sets = experiment.sets(rows, 2, 1)
    found = measures.cost_rows(experiment, sets)
    table = found.pivot(index="method", columns="metric", values="value")
    counted = table["MiB an image"]
    assert counted["DiT"] <= counted["DiT + MGD3"] < 1.2 * counted["DiT"]
    assert 2 * counted["DiT"] < counted["DiT + OT"] < counted["DiT + classifier loss"]
    times = table["seconds an image"]
    assert (times > 0).all() and (times["DiT"] < times[["DiT + OT", "DiT + classifier loss"]]).all()


def test_times_are_taken_in_rounds_after_a_first_that_warms_up(experiment, monkeypatch):
    asked = []
    sets = experiment.sets([PLAIN, MODES], 2, 2)
    kind = type(experiment)
    monkeypatch.setattr(kind, "seconds_an_image", lambda _, *given: asked.append(given) or float(len(asked)))
    times = measures.cost_rows(experiment, sets)
    times = times[times.metric == "seconds an image"]
    assert asked == [(PLAIN, 0), (PLAIN, 0), (MODES, 0), (PLAIN, 1), (MODES, 1)]
    assert list(zip(times.method, times.seed, times.value, strict=True)) == [
        ("DiT", 0, 2.0), ("DiT + MGD3", 0, 3.0), ("DiT", 1, 4.0), ("DiT + MGD3", 1, 5.0),
    ]  # fmt: skip


def test_counted_memory_grows_with_the_image(experiment):
    """Three images take as much more than two as two than one."""
    sampling = experiment.sampling(MODES).for_set(3)
    peaks = [memory.peak(sampling, batch, memory.one_step, memory.Live()) for batch in (1, 2, 3)]
    each = memory.by_image(sampling)
    assert peaks[2] - peaks[1] == pytest.approx(each, rel=0.05) and peaks[1] - peaks[0] == pytest.approx(
        each, rel=0.05
    )


# --- what is claimed, and what is planned


def rows_of(methods) -> pd.DataFrame:
    return pd.DataFrame([{**method.columns(), "value": 0.0, "seed": 0} for method in methods])


def test_which_differences_are_shown(experiment):
    whole = replace(experiment.scale, figures_mean_something=True)
    rows = rows_of(comparisons.guides(replace(experiment, scale=whole)))
    pairs = statistics.guide_claims(rows)
    assert len(set(pairs)) == len(pairs) == 13 + 1 + 5 + 2
    for pair in (
        ("DiT, best cfg", "DiT"),
        ("DiT + classifier loss", "DiT + G_I"),
        ("DiT + MGD3 (shuffled)", "DiT + MGD3"),
        ("DiT + MGD3 + G_D", "DiT + G_D"),
        ("DiT + OT", "DiT"),
    ):
        assert pair in pairs
    assert statistics.guide_claims(rows_of([MODES])) == []


def test_rows_make_a_table(experiment, sets):
    rows = pd.concat([measures.influence_rows(experiment, sets), measures.cost_rows(experiment, sets)])
    table = tables.metric_table(rows).set_index("method")
    assert list(table.index) == ["DiT", "DiT + MGD3"] and table.notna().all().all()


def test_a_plan_counts_what_guides_do(experiment):
    """A backward pass of the transformer where one is taken, surrogates where they guide, images encoded."""
    scale = experiment.scale

    def work(*rows: Method) -> costs.Work:
        return costs.Work(scale, rows, 10, 1, [], 10, (1000, 100), 28)

    def one(row: Method) -> float:
        return costs.image_operations(row, scale, 10, 28)

    transformer, decoder = costs.paper_operations()
    surely = 2 * 2 * transformer  # two guided steps, of both halves
    assert one(MODES) == one(PLAIN) == STEPS * 2 * transformer + decoder
    assert one(Method(guides=("transport",))) == pytest.approx(one(PLAIN) + surely)
    classifier, influence = one(Method(guides=("classifier",))), one(Method(guidance=scale.guidance))
    assert one(PLAIN) + surely + 4 * decoder < classifier < influence
    stages = {stage.name: stage for stage in costs.stages(work(PLAIN, MODES))}
    assert stages["real latents"].operations == pytest.approx(1000 * costs.encoding_operations())
    assert "surrogate convnet3" not in stages and "sampling, other guides" in stages
    guided = {stage.name for stage in costs.stages(work(Method(guides=("classifier",))))}
    assert any(name.startswith("surrogate") for name in guided)
    assert "real latents" not in {stage.name for stage in costs.stages(work(PLAIN))}
