"""Guides: what the sampler asks of them, what it makes of their answers, and what it tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from igd_lib.config import STANDARD, Guidance
from igd_lib.distillation import distill, image_generator
from igd_lib.guides import Deviation, Guide, GuideFactory, Influence, Shortcuts, Step, Update
from igd_lib.sampler import Denoiser, sample, sample_igd
from igd_lib.schedulers import make_scheduler

STEPS, GUIDED = 10, (3, 6)
LABELS, TARGETS = torch.tensor([7, 985, 7]), torch.tensor([0, 2, 0])


class Asked(Guide):
    """A guide that answers with `answer(step)` in the steps of a range, and keeps what it is told."""

    def __init__(
        self,
        answer: Callable[[Step], Update] = lambda step: Update(),
        covered: tuple[int, int] = GUIDED,
        through: bool = False,
        events: list | None = None,
    ):
        self.answer, self.covered, self.through = answer, covered, through
        self.events = [] if events is None else events
        self.steps: list[Step] = []  # that it was asked in
        self.seen: list[Step] = []  # that it was told of

    @property
    def through_model(self) -> bool:
        return self.through

    def covers(self, index: int) -> bool:
        return self.covered[0] <= index <= self.covered[1]

    def __call__(self, step: Step) -> Update:
        self.steps.append(step)
        self.events.append(("asked", step.index))
        return self.answer(step)

    def after(self, step: Step) -> None:
        self.seen.append(step)
        self.events.append(("told", step.index))


def nowhere() -> tuple[int, int]:
    """A range without steps."""
    return (99, 99)


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))


def direction(seed: int) -> Tensor:
    return torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tiny):
    """Factory: sample three images in ten DDIM steps, in double precision; the latents."""

    def run(*guides: Guide, solver: str = "ddim", z: Tensor | None = None, **options) -> Tensor:
        models = tiny(dtype=torch.float64)
        scheduler = make_scheduler(replace(STANDARD, solver=solver), models.ddim.config)
        generators = [image_generator(0, 0, index) for index in range(3)]
        own = dict(guides=guides, num_steps=STEPS, generator=generators)
        return sample(
            Denoiser(models.transformer, LABELS), scheduler, noise() if z is None else z, **(own | options)
        )

    return run


# --- updates


def test_updates_of_two_guides_add_up(run):
    """Shifts and changes of the noise, of guides with one, the other, or both."""
    a, b, c, d = (0.05 * direction(seed) for seed in range(1, 5))
    two = run(Asked(lambda step: Update(a, step.eps + b)), Asked(lambda step: Update(c, step.eps + d)))
    four = run(
        Asked(lambda step: Update(shift=a)),
        Asked(lambda step: Update(eps=step.eps + b)),
        Asked(lambda step: Update(shift=c)),
        Asked(lambda step: Update(eps=step.eps + d)),
    )
    one = run(Asked(lambda step: Update(a + c, step.eps + b + d)))
    for found in (two, four):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-9)
    for alone in (Asked(lambda step: Update(a, step.eps + b)), Asked(lambda step: Update(c, step.eps + d))):
        assert (run(alone) - one).abs().max() > 1e-2


def test_one_guided_step_by_hand(run, tiny):
    """z_{t-1} is the scheduler's step with the changed noise, minus the shift."""
    a, b = 0.05 * direction(1), 0.05 * direction(2)
    states = {}
    guide = Asked(lambda step: Update(a, step.eps + b))
    run(guide, callback=lambda index, timestep, info: states.update({index: info["latents"]}))
    models = tiny(dtype=torch.float64)
    scheduler = make_scheduler(replace(STANDARD, solver="ddim"), models.ddim.config)
    scheduler.set_timesteps(STEPS)
    for step in guide.steps:
        before = states[step.index + 1]
        assert torch.equal(step.z, before)
        eps = Denoiser(models.transformer, LABELS)(before, torch.tensor(step.timestep)).eps.detach()
        torch.testing.assert_close(step.eps, eps, rtol=1e-12, atol=1e-12)
        expected = scheduler.step(eps + b, step.timestep, before).prev_sample - a
        torch.testing.assert_close(states[step.index], expected, rtol=1e-9, atol=1e-9)
    assert [step.index for step in guide.steps] == [6, 5, 4, 3]


def test_reports_reach_the_callback_and_nothing_else(run):
    """Of both guides, in guided steps alone."""
    found = {}
    one, two = (Asked(lambda step, name=name: Update(report={name: step.z.sum()})) for name in ("one", "two"))
    latents = run(one, two, callback=lambda index, timestep, info: found.update({index: info}))
    for index, info in found.items():
        assert info["guided"] == (3 <= index <= 6)
        assert info.keys() - {"latents", "clean", "guided"} == ({"one", "two"} if info["guided"] else set())
    assert torch.equal(latents, run())


def test_a_guide_says_what_it_does():
    plain = Guide()
    assert not plain.through_model and plain.modules == () and plain.covers(0)
    with pytest.raises(NotImplementedError):
        plain(None)


# --- what a guide is told


def test_every_guide_is_told_of_every_step(run):
    """Guided or not, and once all guides of the step have been asked."""
    events = []
    run(Asked(events=events), Asked(covered=(5, 5), events=events), Asked(covered=nowhere(), events=events))
    expected = []
    for index in range(9, -1, -1):
        asked = (3 <= index <= 6) + (index == 5)
        expected += [("asked", index)] * asked + [("told", index)] * 3
    assert events == expected


def test_a_step_says_where_it_is(run):
    """Its latents, its number, its timestep and the schedule there, and the clean latents that they imply."""
    guide, states = Asked(), {10: noise()}
    run(
        guide,
        callback=lambda index, timestep, info: states.update({index: info["latents"], -1 - index: timestep}),
    )
    assert [step.index for step in guide.seen] == list(range(9, -1, -1))
    for step in guide.seen:
        assert torch.equal(step.z, states[step.index + 1]) and step.timestep == states[-1 - step.index]
        assert step.num_steps == STEPS and step.variance is None and step.other_variance is None
        clean = (step.z - (1 - step.alpha_bar).sqrt() * step.eps) / step.alpha_bar.sqrt()
        torch.testing.assert_close(step.clean, clean)


@pytest.mark.parametrize("first", [0, 1])
def test_steps_count_from_the_number_asked_for(run, first):
    """The guides' index does; the callback's is T - 1 ... 0 either way."""
    guide, called = Asked(), []
    run(guide, counts_from=first, callback=lambda index, timestep, info: called.append((index, timestep)))
    assert [step.index for step in guide.seen] == list(range(9 + first, first - 1, -1))
    assert [step.index for step in guide.steps] == [6, 5, 4, 3]
    assert [(step.index - first, step.timestep) for step in guide.seen] == called
    assert [index for index, _ in called] == list(range(9, -1, -1))


def test_a_learned_variance_is_a_part_of_the_step(tiny):
    """Of a model that predicts one, with a scheduler that takes it."""
    models, seen = tiny(out_channels=8, dtype=torch.float64), {}
    for learned in (True, False):
        guide = Asked()
        scheduler = make_scheduler(STANDARD, models.ddim.config, learned_variance=learned)
        sample(Denoiser(models.transformer, LABELS), scheduler, noise(), guides=[guide], num_steps=STEPS)
        seen[learned] = guide.steps[0]
    assert seen[True].variance.shape == seen[True].other_variance.shape == (3, 4, 8, 8)
    assert seen[False].variance is None and seen[False].other_variance is None


# --- gradients


def steered(weight: Tensor, gradients: list) -> Callable[[Step], Update]:
    """Down the gradient of a non-linear function of the clean latents, which it keeps."""

    def answer(step: Step) -> Update:
        with torch.enable_grad():
            loss = (weight * step.clean.sin()).flatten(1).sum(1)
            gradients.append(step.gradient(loss))
        return Update(0.01 * gradients[-1])

    return answer


def test_the_noise_carries_a_graph_only_for_guides_through_the_model(run):
    """Without one the clean latents still depend on z, as if the noise were constant."""
    for through in (False, True):
        gradients = []
        guide = Asked(steered(direction(1), gradients), through=through)
        run(guide)
        for step, gradient in zip(guide.steps, gradients, strict=True):
            for value in (step.eps, step.conditional, step.other):
                assert value.requires_grad == through
            assert step.clean.requires_grad and step.z.is_leaf
            constant = direction(1) * step.clean.detach().cos() / step.alpha_bar.sqrt()
            assert torch.allclose(gradient, constant, rtol=1e-9) != through
        for step in guide.seen:
            assert step.clean.requires_grad == (through and 3 <= step.index <= 6)  # told without one


def test_two_guides_through_the_model_share_its_graph(run):
    """In the first guided step, where z is the same, each gets the gradient that it gets alone."""
    alone, together = [[], []], [[], []]
    for number in range(2):
        run(Asked(steered(direction(number), alone[number]), covered=(6, 6), through=True))
    forwards = []
    guides = [
        Asked(steered(direction(number), together[number]), covered=(6, 6), through=True)
        for number in range(2)
    ]
    found = run(*guides, callback=lambda index, timestep, info: forwards.append(index))
    for number in range(2):
        assert alone[number][0].abs().max() > 0.1
        torch.testing.assert_close(together[number][0], alone[number][0], rtol=1e-9, atol=1e-12)
    assert guides[0].steps[0].shared and guides[0].steps[0] is guides[1].steps[0]
    # Their shifts add up: what one guide with the sum of both losses does.
    both = run(Asked(steered(direction(0) + direction(1), []), covered=(6, 6), through=True))
    torch.testing.assert_close(found, both, rtol=1e-7, atol=1e-9)


def test_the_graph_is_let_go_after_the_only_gradient(run):
    """One guide alone through the model: a second gradient is an error unless it was announced."""
    refused = []

    def twice(step: Step) -> Update:
        with torch.enable_grad():
            loss = step.clean.square().flatten(1).sum(1)
            first, second = step.gradient(loss, again=True), step.gradient(loss)
            assert torch.equal(first, second) and not step.shared
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                step.gradient(loss)
            refused.append(step.index)
        return Update()

    run(Asked(twice, through=True))
    assert refused == [6, 5, 4, 3]


# One step is handed to all guides, so its graph is freed by the first gradient, or reaches through the model.


def influence(tiny, toy, **options) -> Influence:
    """The paper's influence guidance on the tiny models."""
    case = toy(torch.float64)
    return Influence(
        Guidance(5.0, 0.0, GUIDED),
        case.checkpoints,
        case.gradients[:, TARGETS],
        TARGETS,
        tiny(dtype=torch.float64).vae,
        **options,
    )


def test_influence_beside_another_guide_through_the_model(run, tiny, toy):
    """Both get their gradients, the paper's in one piece or a checkpoint at a time."""
    for fidelity in (STANDARD, replace(STANDARD, backward="per_checkpoint")):
        reports = {}

        def note(index, timestep, info, reports=reports):
            reports.setdefault(index, []).append(info.get("influence_shift"))

        gradients = [[], []]
        run(influence(tiny, toy, fidelity=fidelity), callback=note)
        run(Asked(steered(direction(1), gradients[0]), through=True))
        other = Asked(steered(direction(1), gradients[1]), through=True)
        run(influence(tiny, toy, fidelity=fidelity), other, callback=note)
        torch.testing.assert_close(*reports[6], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [True, False], ids=["asked first", "asked last"])
def test_a_decoder_jacobian_does_not_depend_on_the_guides_beside_it(run, tiny, toy, first):
    """It stops at the noise, also where another guide has the graph through the model."""
    reports = {}

    def note(index, timestep, info):
        reports.setdefault(index, []).append(info.get("influence_shift"))

    own = [influence(tiny, toy, shortcuts=Shortcuts(jacobian="decoder")) for _ in range(2)]
    other = Asked(steered(direction(1), []), covered=(6, 6), through=True)
    run(own[0], callback=note)
    run(*([own[1], other] if first else [other, own[1]]), callback=note)
    torch.testing.assert_close(*reports[6], rtol=1e-7, atol=1e-10)


def test_two_guides_without_the_model_share_nothing(run):
    """Two gradients of the clean latents with the noise held constant."""
    alone, together = [[], []], [[], []]
    for number in range(2):
        run(Asked(steered(direction(number), alone[number]), covered=(6, 6)))
    run(*(Asked(steered(direction(number), together[number]), covered=(6, 6)) for number in range(2)))
    for number in range(2):
        torch.testing.assert_close(together[number], alone[number], rtol=1e-12, atol=1e-12)


def test_the_paper_s_guidance_is_its_two_guides(run, tiny, toy):
    """`sample_igd` is `sample` with `Influence` and `Deviation`."""
    models, case = tiny(dtype=torch.float64), toy(torch.float64)
    memory = [direction(number)[:number] for number in range(3)]
    found = run(influence(tiny, toy), Deviation(Guidance(0.0, 7.5, GUIDED), memory, 64, 1e-6), solver="ddpm")
    expected = sample_igd(
        models.transformer,
        models.vae,
        make_scheduler(STANDARD, models.ddim.config),
        noise(),
        LABELS,
        targets=TARGETS,
        guidance=Guidance(5.0, 7.5, GUIDED),
        checkpoints=case.checkpoints,
        gradients=case.gradients[:, TARGETS],
        memory=memory,
        num_steps=STEPS,
        generator=[image_generator(0, 0, index) for index in range(3)],
    )
    assert torch.equal(found, expected) and not torch.equal(found, run(solver="ddpm"))


# --- no guidance, and latents that are not finite


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_guides_that_cover_nothing_leave_the_scheduler_s_own_sampling(run, tiny, solver):
    """Bit for bit that of a loop over the scheduler."""
    models = tiny(dtype=torch.float64)
    scheduler = make_scheduler(replace(STANDARD, solver=solver), models.ddim.config)
    scheduler.set_timesteps(STEPS)
    generators = [image_generator(0, 0, index) for index in range(3)]
    extra = {"generator": generators} if solver == "ddpm" else {}
    expected, denoiser = noise(), Denoiser(models.transformer, LABELS)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            expected = scheduler.step(
                denoiser(expected, timestep).eps, timestep, expected, **extra
            ).prev_sample
    idle = Asked(lambda step: pytest.fail("asked"), covered=nowhere(), through=True)
    assert torch.equal(run(idle, solver=solver), expected) and torch.equal(run(solver=solver), expected)
    silent = Asked(through=True)  # covers steps, and changes nothing in them
    torch.testing.assert_close(run(silent, solver="ddim"), run(solver="ddim"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [0, 1])
def test_an_unguided_step_of_latents_that_are_not_finite_is_named(run, first):
    """The first step, before the guided ones; and one after them, whose latents a callback has spoilt."""
    guide = Asked()
    with pytest.raises(
        FloatingPointError, match=f"not finite after step {9 + first}: check the transformer's"
    ):
        run(guide, counts_from=first, z=noise() * float("nan"))
    assert len(guide.seen) == 1 and not guide.steps

    def spoil(index, timestep, info):
        return {"latents": info["latents"] / 0} if index == 2 - first else None

    with pytest.raises(FloatingPointError, match=r"not finite after step 1: check the transformer's weights"):
        run(guide, counts_from=first, callback=spoil)


def test_a_guided_step_of_latents_that_are_not_finite_names_the_guidance(run, tiny, toy):
    """The paper's strengths where they are at hand."""
    endless = Asked(lambda step: Update(step.z / 0))
    with pytest.raises(FloatingPointError, match="after guided step 6; lower the guides' strength"):
        run(endless)
    with pytest.raises(FloatingPointError, match=r"after guided step 6; lower k or gamma \(Guidance\(k=5.0"):
        run(endless, influence(tiny, toy))


# --- guides of a distilled set


def test_a_factory_makes_the_guides_of_every_batch(tiny_pipe, toy_data, tmp_path):
    """Deviation guidance by a factory gives the paper's images; the manifest names it, not the paper's."""
    options = dict(checkpoints=None, num_steps=6, label_ids=(4, 0, 9))
    own, asked = Guidance(0.0, 30.0, (1, 4)), []

    def make(labels: Tensor, indices, memory) -> Guide:
        asked.append((labels.tolist(), list(indices), [len(latents) for latents in memory]))
        return Deviation(own, memory, 64)

    def run(name: str, guidance, **more):
        return distill(
            tiny_pipe, toy_data, ipc=3, guidance=guidance, out_dir=tmp_path / name, **options, **more
        )

    factory = GuideFactory(make, {"name": "deviation", "gamma": 30.0})
    paper, found = run("paper", own), run("factory", [factory])
    assert asked == [([0, 1, 2], [index] * 3, [index] * 3) for index in range(3)]
    assert all(torch.equal(found.latents(label), paper.latents(label)) for label in range(3))
    settings = found.manifest["settings"]
    assert settings["guides"] == [{"name": "deviation", "gamma": 30.0}] and settings["guidance"] is None
    assert paper.manifest["settings"]["guides"] is None and paper.manifest["key"] != found.manifest["key"]
    with pytest.raises(ValueError, match=r"other settings: guides\[0\]\.gamma = 30, wanted 31"):
        run("factory", [GuideFactory(make, {"name": "deviation", "gamma": 31.0})])
    # Without a memory all images of a class are sampled side by side.
    asked.clear()
    run("forgets", [GuideFactory(make, {"name": "none"}, remembers=False)])
    assert asked == [([0, 1, 2] * 3, [0] * 3 + [1] * 3 + [2] * 3, [0] * 9)]


@pytest.mark.parametrize(
    "options",
    [{"jacobian": "none"}, {"every": 0}, {"checkpoints_per_step": 0}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_shortcuts_raise(options):
    with pytest.raises(ValueError, match="is 'full' or 'decoder'|at least 1"):
        Shortcuts(**options)
