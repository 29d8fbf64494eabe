"""Other papers' guides, against their formulas written out one image at a time in double precision."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import ot
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor
from torch.nn import functional as F

import reference
from igd_lib.config import STANDARD, Guidance
from igd_lib.distillation import image_generator
from igd_lib.guides import Deviation, Guide, Step, Update
from igd_lib.other_guides import (
    ClassifierLoss,
    Modes,
    Transport,
    cross_entropy,
    mode_range,
    sinkhorn_distance,
)
from igd_lib.sampler import Denoiser, sample
from igd_lib.schedulers import make_scheduler, noise_deviation

STEPS, RANGE, CFG = 8, (3, 6), 4.0
LABELS, TARGETS = torch.tensor([7, 985, 7]), torch.tensor([0, 2, 1])
GUIDANCE = Guidance(300.0, 7.5, RANGE)
SHARE = 0.1
SOLVERS = ("ddpm", "ddim", "dpmsolver++", "unipc")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NOISE, ANCHORS = drawn(3, 4, 8, 8, seed=0), drawn(3, 4, 8, 8, seed=1)
REAL = [drawn(5 + number, 4, 8, 8, seed=2 + number) for number in range(3)]
MEMORY = [drawn(number, 4, 8, 8, seed=7 + number) for number in (2, 0, 1)]


class Kit:
    """The tiny models, and guides for some of the three images."""

    def __init__(self, tiny, toy, out_channels: int):
        self.models, self.case = tiny(out_channels=out_channels, dtype=torch.float64), toy(torch.float64)
        self.learned = out_channels == 8

    def guide(self, name: str, images: list[int], strength: float = 1.0, guided=RANGE) -> Guide:
        if name.startswith("modes"):
            reading = "algorithm" if name.endswith("algorithm") else "code"
            return Modes(ANCHORS[images], guided, 0.1 * strength, reading)
        if name == "transport":
            real, memory = [REAL[i] for i in images], [MEMORY[i] for i in images]
            return Transport(20.0 * strength, real, memory, guided, SHARE)
        own = Guidance(GUIDANCE.k * strength, GUIDANCE.gamma * strength, guided)
        if name == "deviation":
            return Deviation(own, [MEMORY[i] for i in images], floor=1e-6)
        return ClassifierLoss(own, self.case.checkpoints, TARGETS[images], self.models.vae)

    def scheduler(self, solver: str):
        fidelity = replace(STANDARD, solver=solver)
        return make_scheduler(fidelity, self.models.ddim.config, learned_variance=self.learned)

    def run(self, guides: list[Guide], images=(0, 1, 2), solver: str = "ddpm", **options) -> Tensor:
        own = list(images)
        return sample(
            Denoiser(self.models.transformer, LABELS[own], CFG),
            self.scheduler(solver),
            NOISE[own],
            guides=guides,
            num_steps=STEPS,
            generator=[image_generator(0, 0, index) for index in own],
            **options,
        )


@pytest.fixture
def kit(tiny, toy):
    """Factory: with or without a learned variance."""
    made = {}

    def make(out_channels: int = 8) -> Kit:
        if out_channels not in made:
            made[out_channels] = Kit(tiny, toy, out_channels)
        return made[out_channels]

    return make


ONE = ["modes", "modes-algorithm", "classifier", "transport"]


# --- straight-line references


def naive_plan(cost: list[list[float]], r: float) -> list[list[float]]:
    """Sinkhorn's plan of uniform margins, in logarithms, by plain loops over potentials f and g."""
    n, m = len(cost), len(cost[0])
    f, g = [0.0] * n, [0.0] * m

    def soft_min(values: list[float], count: int) -> float:
        least = min(values)
        return least - r * math.log(sum(math.exp((least - value) / r) for value in values) / count)

    for _ in range(600):
        f = [soft_min([cost[i][j] - g[j] for j in range(m)], m) for i in range(n)]
        g = [soft_min([cost[i][j] - f[i] for i in range(n)], n) for j in range(m)]
    return [[math.exp((f[i] + g[j] - cost[i][j]) / r) / (n * m) for j in range(m)] for i in range(n)]


def naive_cost(points: Tensor, real: Tensor) -> list[list[float]]:
    return [[((x - y) ** 2).mean().item() for y in real] for x in points]


def transport_gradient(clean: Tensor, memory: Tensor, real: Tensor) -> Tensor:
    """By the clean latent (C, h, w) of n images with the earlier ones: n sum over j of P_1j 2 (x - y_j) / d.

    The rows of n P sum to 1, so it is twice the way to the mean of the real latents that the plan gives it.
    """
    cost = naive_cost([clean, *memory], real)
    mean = sum(map(sum, cost)) / (len(cost) * len(cost[0]))
    plan = naive_plan(cost, SHARE * mean)
    goal = sum(len(cost) * p * y for p, y in zip(plan[0], real, strict=True))
    return 2 * (clean - goal) / clean.numel()


def classifier_gradient(kit: Kit, clean: Tensor, target: int) -> Tensor:
    """By the clean latent: of the cross-entropy of its image, over checkpoints by their rates."""
    clean = clean.detach().requires_grad_()
    image = kit.models.vae.decode(clean[None] / kit.models.vae.config.scaling_factor).sample
    rates, total = kit.case.checkpoints.learning_rates, 0.0
    for rate, state in zip(rates, kit.case.checkpoints.states, strict=True):
        model = copy.deepcopy(kit.case.checkpoints.model)
        model.load_state_dict(state)
        total = total + rate / (sum(rates) / len(rates)) * -model(image).log_softmax(1)[0, target]
    return torch.autograd.grad(total / len(rates), clean)[0]


def straight_line(kit: Kit, names: list[str], b: int, solver: str) -> Tensor:
    """One image's whole trajectory under the named guides, step by step as their papers have it."""
    transformer, scheduler = kit.models.transformer, kit.scheduler(solver)
    scheduler.set_timesteps(STEPS)
    times, alphas = [int(t) for t in scheduler.timesteps], scheduler.alphas_cumprod.double()
    generator, z = image_generator(0, 0, b), NOISE[b]
    for number, t in enumerate(times):
        a = float(alphas[t])
        a_next = float(alphas[times[number + 1]]) if number + 1 < STEPS else 1.0
        z = z.detach().requires_grad_()
        out = [
            transformer(z[None], timestep=torch.tensor([t]), class_labels=torch.tensor([label])).sample[0]
            for label in (int(LABELS[b]), 1000)
        ]
        # Classifier-free guidance of the first three channels.
        eps = torch.cat([out[1][:3] + CFG * (out[0][:3] - out[1][:3]), out[0][3:4]])
        x_0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        guided = RANGE[0] <= STEPS - 1 - number <= RANGE[1]
        shift, pulled = torch.zeros_like(z), eps.detach().clone()
        for name in names if guided else ():
            clean = x_0.detach()
            if name == "modes-algorithm":
                pulled = pulled - math.sqrt(1 - a) * 0.1 * (ANCHORS[b] - clean)
            elif name == "deviation":
                (own,) = torch.autograd.grad(reference.deviation(z, MEMORY[b], 1e-6), z, allow_unused=True)
                shift = shift + (0.0 if own is None else GUIDANCE.gamma * own)
            elif name == "classifier":
                own = torch.autograd.grad(
                    x_0, z, classifier_gradient(kit, clean, int(TARGETS[b])), retain_graph=True
                )[0]
                rho = GUIDANCE.k * 0.0015 * math.sqrt(1 - a) * (eps.norm() / own.norm()).item()
                shift = shift + rho * own
            elif name == "transport":
                towards = transport_gradient(clean, MEMORY[b], REAL[b])
                shift = shift + 20.0 * torch.autograd.grad(x_0, z, towards, retain_graph=True)[0]
        with torch.no_grad():
            clean = (z - math.sqrt(1 - a) * pulled) / math.sqrt(a)
            if solver == "ddim":
                z = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * pulled - shift
                continue
            beta = 1 - a / a_next
            mean = math.sqrt(a_next) * beta / (1 - a) * clean
            mean = mean + math.sqrt(1 - beta) * (1 - a_next) / (1 - a) * z
            sigma = torch.zeros(())
            if t > 0:
                low = beta * (1 - a_next) / (1 - a)
                share = (out[0][4:] + 1) / 2 if kit.learned else torch.zeros(())
                sigma = torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(low)))
                mean = mean + sigma * torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=generator)[0]
            if guided and "modes" in names:
                mean = mean + 0.1 * sigma * (ANCHORS[b] - x_0.detach())
            z = mean - shift
    return z.detach()


CASES = [
    (["modes"], "ddpm", 8),
    (["modes"], "ddpm", 4),
    (["modes-algorithm"], "ddim", 8),
    (["modes-algorithm"], "ddpm", 8),
    (["classifier"], "ddpm", 8),
    (["classifier"], "ddim", 4),
    (["transport"], "ddpm", 8),
    (["transport"], "ddim", 4),
    (["modes", "deviation"], "ddpm", 8),
    (["transport", "modes-algorithm", "classifier", "deviation"], "ddim", 4),
    (["classifier", "modes", "transport"], "ddpm", 8),
]


@pytest.mark.parametrize(("names", "solver", "channels"), CASES, ids=lambda value: str(value))
def test_a_trajectory_is_the_papers(kit, names, solver, channels):
    own = kit(channels)
    found = own.run([own.guide(name, [0, 1, 2]) for name in names], solver=solver)
    plain = own.run([], solver=solver)
    for b in (0, 1) if len(names) > 1 else (0,):
        expected = straight_line(own, names, b, solver)
        assert (expected - plain[b]).abs().max() > 1e-2
        torch.testing.assert_close(found[b], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ONE)
def test_without_strength_it_is_vanilla_bit_for_bit(kit, name):
    own = kit()
    assert torch.equal(own.run([own.guide(name, [0, 1, 2], strength=0.0)]), own.run([]))
    assert torch.equal(own.run([own.guide(name, [0, 1, 2], guided=(99, 99))]), own.run([]))


@pytest.mark.parametrize("name", ONE)
def test_an_image_depends_on_itself_alone(kit, name):
    """Whichever others are sampled beside it, in whatever order."""
    own = kit()
    together = own.run([own.guide(name, [0, 1, 2])])
    turned = own.run([own.guide(name, [2, 0, 1])], images=(2, 0, 1))
    torch.testing.assert_close(turned, together[[2, 0, 1]], rtol=1e-9, atol=1e-9)
    for b in range(3):
        alone = own.run([own.guide(name, [b])], images=(b,))
        torch.testing.assert_close(alone[0], together[b], rtol=1e-9, atol=1e-9)


def test_guides_add_up_in_any_order(kit):
    own, names = kit(), ["modes", "classifier", "transport", "deviation"]
    found = [own.run([own.guide(name, [0, 1, 2]) for name in order]) for order in (names, names[::-1])]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_algorithm_goes_with_any_scheduler_and_the_code_with_ddpm(kit, solver):
    own = kit(4)
    pulled, plain = (
        own.run([own.guide("modes-algorithm", [0, 1, 2])], solver=solver),
        own.run([], solver=solver),
    )
    assert ((pulled - ANCHORS).norm() < (plain - ANCHORS).norm()).item()
    if solver == "ddpm":
        return
    with pytest.raises(ValueError, match="this scheduler adds none; take reading='algorithm'"):
        own.run([own.guide("modes", [0, 1, 2])], solver=solver)


# --- the noise of a step


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    "kind", ["learned_range", "fixed_small", "fixed_small_log", "fixed_large", "learned"]
)
def test_sigma_is_the_noise_that_the_scheduler_adds(tiny, monkeypatch, kind, spacing):
    """What diffusers' step gives with noise 1, less what it gives with noise 0, at every respaced step."""
    config = tiny().ddim.config
    scheduler = DDPMScheduler.from_config(
        config, variance_type=kind, timestep_spacing=spacing, clip_sample=False
    )
    scheduler.set_timesteps(7)
    z, eps, learned = (drawn(2, 4, 8, 8, seed=number) for number in (1, 2, 3))
    variance = learned.tanh() if kind == "learned_range" else learned.square()
    output = torch.cat([eps, variance], dim=1) if kind.startswith("learned") else eps
    given = variance if kind.startswith("learned") else None
    for t in scheduler.timesteps:
        moved = []
        for value in (0.0, 1.0):
            monkeypatch.setattr(
                scheduling_ddpm,
                "randn_tensor",
                lambda shape, value=value, **_: torch.full(shape, value).double(),
            )
            moved.append(scheduler.step(output, t, z).prev_sample)
        found = noise_deviation(scheduler, int(t), given)
        torch.testing.assert_close(found.double().expand_as(z), moved[1] - moved[0], rtol=1e-5, atol=1e-7)
        assert int(t) == 0 or moved[1].ne(moved[0]).any() or spacing == "trailing"


def test_a_step_says_its_noise(kit):
    """A guide is told it: with a learned variance a value each, else one number; None where there is none."""
    seen: list[Step] = []

    class Told(Guide):
        def __call__(self, step: Step) -> Update:
            seen.append(step)
            return Update()

    for channels, solver in ((8, "ddpm"), (4, "ddpm"), (4, "ddim")):
        kit(channels).run([Told()], solver=solver)
    learned, fixed, quiet = seen[:STEPS], seen[STEPS : 2 * STEPS], seen[2 * STEPS :]
    assert all(step.sigma.shape == (3, 4, 8, 8) and (step.sigma > 0).all() for step in learned[:-1])
    assert all(step.sigma.shape == () and step.sigma > 0 for step in fixed[:-1])
    assert learned[-1].timestep == 0 and learned[-1].sigma == fixed[-1].sigma == 0
    assert all(step.sigma is None for step in quiet)


# --- gradients


class Kept(Guide):
    """Asks another guide, and keeps the step with its answer."""

    def __init__(self, own: Guide):
        self.own, self.kept = own, []

    through_model = True  # type: ignore[assignment]

    def covers(self, index: int) -> bool:
        return index == 5

    def __call__(self, step: Step) -> Update:
        found = self.own(step)
        self.kept.append((step, found))
        return found


def clean_at(kit: Kit, z: Tensor, step: Step) -> Tensor:
    with torch.no_grad():
        eps = Denoiser(kit.models.transformer, LABELS, CFG)(z, torch.tensor(step.timestep)).eps
    return (z - (1 - step.alpha_bar).sqrt() * eps) / step.alpha_bar.sqrt()


@pytest.mark.parametrize("name", ["classifier", "transport"])
def test_the_gradient_is_that_of_the_loss(kit, name):
    """By central differences of z_t in random directions, through transformer and decoder."""
    own = kit()
    guide = Kept(own.guide(name, [0, 1, 2]))
    own.run([guide])
    [(step, update)] = guide.kept
    z = step.z.detach()
    blur = [
        SHARE * (sum(map(sum, cost)) / (len(cost) * len(cost[0])))
        for cost in (
            naive_cost([clean, *earlier], real)
            for clean, earlier, real in zip(clean_at(own, z, step), MEMORY, REAL, strict=True)
        )
    ]

    def loss(at: Tensor) -> Tensor:
        clean = clean_at(own, at, step)
        if name == "classifier":
            with torch.no_grad():
                return guide.own.loss(guide.own.decoded(clean), [0, 1, 2])
        found = []
        for one, earlier, real, r in zip(clean, MEMORY, REAL, blur, strict=True):
            points = torch.cat([one[None], earlier])
            cost = naive_cost(points, real)
            share = r / (sum(map(sum, cost)) / (len(cost) * len(cost[0])))  # the blur is a constant
            found.append(len(points) * sinkhorn_distance(points, real, share))
        return torch.stack(found)

    torch.testing.assert_close(update.report[f"{name}_loss"], loss(z), rtol=1e-7, atol=1e-9)
    shift = update.shift.flatten(1)
    if name == "classifier":  # its length is rho_t's
        norm = 0.0015 * GUIDANCE.k * (1 - step.alpha_bar).sqrt() * step.eps.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(shift.norm(dim=1), norm, rtol=1e-9, atol=1e-12)
    ratios = []
    for seed in range(3):
        direction = drawn(3, 4, 8, 8, seed=50 + seed) + z
        slope = (loss(z + 1e-6 * direction) - loss(z - 1e-6 * direction)) / 2e-6
        ratios.append((shift * direction.flatten(1)).sum(1) / slope)
    scale = torch.stack(ratios)
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)
    if name == "transport":
        torch.testing.assert_close(scale, torch.full_like(scale, 20.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["classifier", "transport"])
def test_guidance_lowers_its_loss(kit, name):
    """At the last guided step the loss is below that of a run whose guide does next to nothing."""
    own, last = kit(4), {}
    for strength in (1.0, 1e-9):
        guide, found = own.guide(name, [0, 1, 2], strength), {}
        own.run([guide], solver="ddim", callback=lambda i, t, info, found=found: found.update({i: info}))
        last[strength] = found[RANGE[0]][f"{name}_loss"]
    assert (last[1.0] < last[1e-9]).all()


def test_the_cross_entropy_is_torch_s(kit):
    checkpoints = kit().case.checkpoints
    images, targets = drawn(3, 3, 16, 16, seed=3), TARGETS
    found = cross_entropy(images, targets, checkpoints, [1.0] * 3)
    expected = []
    for image, target in zip(images, targets, strict=True):
        total = 0.0
        for state in checkpoints.states:
            model = copy.deepcopy(checkpoints.model)
            model.load_state_dict(state)
            total += F.cross_entropy(model(image[None]), target[None]).item() / 3
        expected.append(total)
    torch.testing.assert_close(found.detach(), torch.tensor(expected).double())


# --- the Sinkhorn distance


@pytest.mark.parametrize(("n", "m", "share"), [(1, 6, 0.1), (3, 7, 0.1), (5, 4, 0.5)])
def test_the_sinkhorn_distance_is_a_naive_one(n, m, share):
    points, real = drawn(n, 2, 3, 3, seed=n), drawn(m, 2, 3, 3, seed=m) + 0.5
    cost = naive_cost(points, real)
    r = share * sum(map(sum, cost)) / (n * m)
    plan = naive_plan(cost, r)
    value = sum(plan[i][j] * (cost[i][j] + r * math.log(plan[i][j])) for i in range(n) for j in range(m))
    assert [sum(row) for row in plan] == pytest.approx([1 / n] * n, rel=1e-6)
    assert float(sinkhorn_distance(points, real, share)) == pytest.approx(value, rel=1e-7)


def test_with_little_blur_it_is_the_exact_distance():
    points, real = drawn(4, 2, 3, 3, seed=1), drawn(6, 2, 3, 3, seed=2) + 1.0
    cost = torch.tensor(naive_cost(points, real)).numpy()
    exact = ot.emd2([1 / 4] * 4, [1 / 6] * 6, cost)
    r = 0.004 * float(cost.mean())
    assert float(sinkhorn_distance(points, real, 0.004)) == pytest.approx(exact, abs=4 * r)


def test_an_image_is_drawn_to_what_the_earlier_ones_leave_out():
    """Of two real places the memory has one; the gradient leads to the other."""
    places = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).double()
    own = torch.full((1, 1, 2, 2), 0.5).double().requires_grad_()
    for earlier, sign in ((places[:1], -1.0), (places[1:], 1.0)):
        loss = sinkhorn_distance(torch.cat([own, earlier]), places, 0.05)
        (gradient,) = torch.autograd.grad(loss, own)
        assert (gradient * sign > 0).all()


# --- when, and what is refused


def test_mgd3_guides_the_noisier_half():
    """Its code: `if t > stop_t`, t running 49 ... 0 and stop_t 25."""
    assert mode_range(50) == (26, 49) and mode_range(50, 1) == (27, 50)
    assert mode_range(25) == (13, 24) and mode_range(10) == (6, 9)
    assert mode_range(4) == (3, 3) and mode_range(1) == (0, 0)


REFUSED = {
    "modes of another shape": (lambda kit: Modes(ANCHORS[:2], RANGE), "anchors are one a latent"),
    "modes that are not finite": (lambda kit: Modes(ANCHORS * float("nan"), RANGE), "anchors are not finite"),
    "another reading": (lambda kit: Modes(ANCHORS, RANGE, reading="text"), "reading is 'code' or"),
    "an infinite scale": (lambda kit: Modes(ANCHORS, RANGE, float("inf")), "scale is a finite number"),
    "a swapped range": (lambda kit: Modes(ANCHORS, (6, 3)), "guided_range is"),
    "beta nan": (lambda kit: Transport(float("nan"), REAL, MEMORY, RANGE), "beta is a finite number"),
    "beta below 0": (lambda kit: Transport(-1.0, REAL, MEMORY, RANGE), "beta is a finite number"),
    "no blur": (lambda kit: Transport(1.0, REAL, MEMORY, RANGE, 0.0), "share is above 0"),
    "no real latents": (
        lambda kit: Transport(1.0, [REAL[0], REAL[1], REAL[2][:0]], MEMORY, RANGE),
        "every image needs real latents",
    ),
    "a memory too few": (lambda kit: Transport(1.0, REAL, MEMORY[:2], RANGE), "every image needs"),
    "images too few": (lambda kit: Transport(1.0, REAL[:2], MEMORY[:2], RANGE), "real latents are 3 tensors"),
    "real latents of another shape": (
        lambda kit: Transport(1.0, [own[:, :, :4] for own in REAL], MEMORY, RANGE),
        r"real latents are 3 tensors \(N, 4, 8, 8\)",
    ),
    "targets of another shape": (
        lambda kit: ClassifierLoss(GUIDANCE, kit.case.checkpoints, TARGETS[None], kit.models.vae),
        r"targets are \(B,\) labels",
    ),
    "targets too few": (
        lambda kit: ClassifierLoss(GUIDANCE, kit.case.checkpoints, TARGETS[:2], kit.models.vae),
        "targets are 3 labels below 3",
    ),
    "unknown classes": (
        lambda kit: ClassifierLoss(GUIDANCE, kit.case.checkpoints, TARGETS + 1, kit.models.vae),
        "targets are 3 labels below 3",
    ),
    "a second chain": (
        lambda kit: ClassifierLoss(
            GUIDANCE, kit.case.checkpoints, TARGETS, kit.models.vae, replace(STANDARD, second_chain=True)
        ),
        "has no second chain",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(kit, case):
    make, message = REFUSED[case]
    own = kit()
    with pytest.raises(ValueError, match=message) as refused:
        own.run([make(own)])
    assert "\n" not in str(refused.value)


def test_a_surrogate_that_sees_the_batch_is_refused(kit):
    own = kit()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).train()
    with pytest.raises(ValueError, match="normalises over the batch"):
        ClassifierLoss(GUIDANCE, replace(own.case.checkpoints, model=model), TARGETS, own.models.vae)
