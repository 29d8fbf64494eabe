"""The rows of each table and figure, for an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from igd_lib.config import Fidelity, Guidance, flips
from igd_lib.experiment.makers import BY_EARLY, BY_TEACHER
from igd_lib.experiment.methods import SAMPLED, Method, Selection
from igd_lib.experiment.outline import Outline
from igd_lib.experiment.registry import BASELINES
from igd_lib.guides import Shortcuts
from igd_lib.sampling import FAST

THRESHOLDS = (0.6, 0.7, 0.8)  # of Algorithm 2, in Table 6
CFGS = "1,1.5,2,3,4"  # of the controls of 13_paper_vs_code


def comparison(experiment: Outline) -> list[Method]:
    """Random, DiT at cfg 4, DiT at its best cfg where that is another, G_D alone, and DiT-IGD."""
    return [Method("random"), *vanilla_rows(experiment), *guided_rows(experiment)]


def vanilla_rows(experiment: Outline) -> list[Method]:
    """DiT at cfg 4, and at the cfg that was best on validation data, where that is another."""
    plain, own = Method(), experiment.scale.best_cfg
    return [plain] if own == plain.cfg_scale else [plain, Method(cfg_scale=own, cfg_choice="best")]


def guided_rows(experiment: Outline) -> tuple[Method, Method]:
    """Deviation guidance alone, and DiT-IGD."""
    own = experiment.scale.guidance
    return Method(guidance=replace(own, k=0.0)), Method(guidance=own)


def baselines(experiment: Outline, others: Sequence[str] = ()) -> list[Method]:
    """`comparison` with RDED, and with Minimax and Minimax-IGD where there is a Minimax model.

    others: methods that optimise or choose images, by family, before RDED.
    """
    random, *compared = comparison(experiment)
    tuned = [Method(), Method(guidance=experiment.scale.on_minimax())]
    own = [Method(name) for name in others if name not in RENDERED or not experiment.renderer_missing]
    return [random, *own, Method("rded"), *compared, *_tuned(experiment, tuned)]


RENDERED = ("tdsdm", "d4m")  # new images of given ones, by another diffusion model at the paper's scale
OTHERS: Mapping[int, tuple[str, ...]] = {  # by table of the paper, in its order
    1: ("dm", "idc"),
    2: ("sre2l", "gvbsm"),
    7: ("dm",),
    8: ("dm", "datm", "datm-plain", "sre2l"),
    9: ("tdsdm", "d4m"),
}


def table(experiment: Outline, number: int) -> list[Method]:
    """The rows of one of the paper's tables that compare methods: 1, 2, 7, 8 or 9."""
    return baselines(experiment, OTHERS[number])


def coresets(experiment: Outline) -> list[Method]:
    """Random, the coresets, and the methods of all tables.

    Without those whose labels are their own, and without DATM where images are photographs, for which its
    authors have no settings. Where figures mean nothing one coreset by each kind of network and DiT stand
    for all: other tables try the others.
    """
    every = dict.fromkeys(family for table in OTHERS.values() for family in table)
    others = [family for family in every if BASELINES[family].protocol is None]
    if experiment.scale.papers:
        others.remove("datm-plain")
    if not experiment.scale.figures_mean_something:
        return [*(Method(family) for family in ("random", BY_TEACHER[0], BY_EARLY[0])), Method()]
    random, *compared = baselines(experiment, others)
    return [random, *(Method(rule) for rule in (*BY_TEACHER, *BY_EARLY)), *compared]


def sampled(experiment: Outline) -> list[Method]:
    """The rows of `baselines` that a diffusion model samples at the paper's cfg."""
    return [row for row in baselines(experiment) if row.family == SAMPLED and row.cfg_choice == ""]


def plain_and_guided(experiment: Outline, backbone: str) -> tuple[Method, Method]:
    """A backbone's rows without and with guidance.

    Raises ValueError for another than "dit" or "minimax", FileNotFoundError where there is no Minimax model.
    """
    if backbone not in ("dit", "minimax"):
        raise ValueError(f"backbone is 'dit' or 'minimax', got {backbone!r}")
    if backbone == "minimax" and experiment.minimax_missing:
        raise FileNotFoundError(experiment.minimax_missing)
    if backbone == "dit":
        return Method(), Method(guidance=experiment.scale.guidance)
    plain = Method(backbone="minimax")
    return plain, replace(plain, guidance=experiment.scale.on_minimax())


def ablation(experiment: Outline) -> list[Method]:
    """Table 5's rows: neither guidance, each alone, both, on either backbone; and vanilla sampling at its
    best cfg.
    """
    deviation, both = guided_rows(experiment)
    own = experiment.scale.on_minimax()
    tuned = [None, replace(own, gamma=0.0), replace(own, k=0.0), own]
    influence = Method(guidance=replace(experiment.scale.guidance, gamma=0.0))
    return [
        *vanilla_rows(experiment),
        influence,
        deviation,
        both,
        *_tuned(experiment, [Method(guidance=one) for one in tuned]),
    ]


MODES = ("modes", "modes-nearest", "modes-random", "modes-pooled", "modes-shuffled", "modes-algorithm")


def guides(experiment: Outline) -> list[Method]:
    """Every guide on DiT: the paper's two, the classifier's loss, MGD3 with its controls, with and without
    G_D, and OT; DiT and DiT at its best cfg beside them.

    Where figures mean nothing a row of each class of guides alone: the others are the same code.
    """
    deviation, both = guided_rows(experiment)
    names = ("classifier", *MODES, "transport")
    others = {name: Method(guides=(name,)) for name in names}
    joined = replace(deviation, guides=("modes",))
    if not experiment.scale.figures_mean_something:
        return [Method(), others["classifier"], joined, others["transport"]]
    influence = Method(guidance=replace(experiment.scale.guidance, gamma=0.0))
    modes = [others[name] for name in MODES]
    plain = [*vanilla_rows(experiment), deviation, influence, both]
    return [*plain, others["classifier"], *modes, joined, others["transport"]]


def surrogates(experiment: Outline, names: Sequence[str]) -> list[Method]:
    """Table 4's rows: DiT-IGD guided by surrogates of other architectures; DiT and deviation guidance alone
    beside them.
    """
    deviation, both = guided_rows(experiment)
    return [Method(), deviation, *(replace(both, surrogate=name, varies=("surrogate",)) for name in names)]


def selections(experiment: Outline, thresholds: Sequence[float], backbone: str = "dit") -> list[Method]:
    """Table 6's rows: no guidance, and IGD with Algorithm 2's checkpoints by threshold and with as many at
    regular intervals.

    Raises ValueError for another backbone than "dit" or "minimax", FileNotFoundError where there is no
    Minimax model.
    """
    plain, guided = plain_and_guided(experiment, backbone)
    chosen = experiment.choices(thresholds)
    found: dict[tuple[int, ...], Selection] = {}
    for entry in chosen[chosen.similarity == experiment.scale.fidelity.similarity].itertuples():
        found[tuple(entry.kept)] = Selection("threshold", tuple(entry.kept), entry.threshold)
        found.setdefault(tuple(entry.regular), Selection("regular", tuple(entry.regular)))
    return [plain, *(replace(guided, selection=one, varies=("selection",)) for one in found.values())]


def solvers(experiment: Outline) -> list[Method]:
    """Table 10's rows: either backbone, with and without guidance, by DDIM and by DPM-Solver++ with few
    steps.
    """
    scale = experiment.scale
    slow = Method(
        fidelity=replace(scale.fidelity, solver="ddim"), num_steps=scale.num_steps, varies=("solver",)
    )
    quick = in_few_steps(experiment)

    def four(guidance: Guidance) -> list[Method]:
        short = replace(guidance, guided_range=scale.few_range)
        return [slow, replace(slow, guidance=guidance), quick, replace(quick, guidance=short)]

    return [*four(scale.guidance), *_tuned(experiment, four(scale.on_minimax()))]


SHORTCUTS: tuple[tuple[Shortcuts, bool], ...] = (  # and whether with the tiny decoder
    (Shortcuts(jacobian="decoder"), False),
    (Shortcuts(), True),
    (Shortcuts(jacobian="decoder"), True),
    (Shortcuts(every=2), False),
    (Shortcuts(every=4), False),
    (Shortcuts(every=8), False),
    (Shortcuts(every=4, jacobian="decoder"), False),
    (Shortcuts(checkpoints_per_step=1), False),
)


def shortcuts(experiment: Outline) -> list[Method]:
    """DiT, G_D alone and DiT-IGD, DiT-IGD with each shortcut, and both in FAST's steps."""
    deviation, both = guided_rows(experiment)
    varied = replace(both, varies=("shortcuts",))
    return [
        Method(),
        deviation,
        both,
        *(replace(varied, shortcuts=own, tiny_decoder=tiny) for own, tiny in SHORTCUTS),
        *fast(experiment),
    ]


def in_few_steps(experiment: Outline) -> Method:
    """DiT by the quick solver."""
    scale = experiment.scale
    solver = replace(scale.fidelity, solver=FAST.solver)
    return Method(fidelity=solver, num_steps=scale.few_steps, varies=("solver",))


def fast(experiment: Outline) -> list[Method]:
    """DiT in FAST's steps, and guided by `FAST`."""
    scale = experiment.scale
    plain = in_few_steps(experiment)
    guidance = replace(FAST.weaker(scale.guidance), guided_range=scale.few_range)
    guided = replace(plain, guidance=guidance, shortcuts=FAST.shortcuts, tiny_decoder=True)
    return [plain, replace(guided, varies=("shortcuts",))]


def fast_grid(experiment: Outline, ks: Sequence[float], gammas: Sequence[float]) -> list[Method]:
    """DiT in FAST's steps, and guided by `FAST` with every pair of k and gamma."""
    plain, guided = fast(experiment)
    assert guided.guidance is not None
    pairs = [replace(guided.guidance, k=k, gamma=gamma) for gamma in gammas for k in ks]
    return [plain, *(replace(guided, guidance=one, varies=("shortcuts", "k", "gamma")) for one in pairs)]


def grid(
    experiment: Outline, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit"
) -> list[Method]:
    """A backbone without guidance, and with every pair of k and gamma but (0, 0)."""
    plain, _ = plain_and_guided(experiment, backbone)
    own = experiment.scale.guidance
    pairs = [replace(own, k=float(k), gamma=float(gamma)) for gamma in gammas for k in ks if k or gamma]
    return [plain, *(replace(plain, guidance=pair, varies=("k", "gamma")) for pair in pairs)]


def ranges(experiment: Outline, steps: Sequence[tuple[int, int]], backbone: str = "dit") -> list[Method]:
    """A backbone's guided row in each guided range."""
    _, guided = plain_and_guided(experiment, backbone)
    assert guided.guidance is not None
    own = [replace(guided.guidance, guided_range=one) for one in steps]
    return [replace(guided, guidance=one, varies=("range",)) for one in own]


def early_stage(experiment: Outline, ks: Sequence[float]) -> list[Method]:
    """Figure 2's rows: DiT, and influence guidance alone at each k, in the guided range and at every step."""
    first = experiment.scale.fidelity.range_counts_from
    whole = (first, experiment.scale.num_steps - 1 + first)
    ranges = ((experiment.scale.guidance.guided_range, False), (whole, True))
    return [
        Method(),
        *(
            Method(guidance=Guidance(float(k), 0.0, steps), throughout=throughout, varies=("k",))
            for steps, throughout in ranges
            for k in ks
        ),
    ]


def sensitivity(
    experiment: Outline, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit"
) -> list[Method]:
    """Figure 6's rows: guidance with each k, and with each gamma, the other as in use."""
    plain, guided = plain_and_guided(experiment, backbone)
    own = experiment.scale.guidance if backbone == "dit" else experiment.scale.on_minimax()
    by_k = [replace(guided, guidance=replace(own, k=float(k)), varies=("k",)) for k in ks]
    by_gamma = [replace(guided, guidance=replace(own, gamma=float(g)), varies=("gamma",)) for g in gammas]
    return [plain, *by_k, *by_gamma]


def flipped(experiment: Outline, ipc: int, backbone: str = "dit") -> list[Method]:
    """A backbone's guided row, and that row with one field of `Fidelity` changed at a time, towards the paper
    or (second_chain) the released code.

    Fields that cannot change a set of `ipc` images a class here are left out. "All images of a class" are
    `Scale.all_images` where the scale says so.
    """
    scale, (_, guided) = experiment.scale, plain_and_guided(experiment, backbone)
    found = {}
    for name, fidelity in flips(scale.fidelity).items():
        field, most = name.split("=")[0], scale.all_images
        if not _matters(experiment, field, fidelity, ipc):
            continue
        if field == "gradient_images" and most is not None:
            name, fidelity = f"{field}={most}", replace(fidelity, gradient_images=most)
        if field == "filter_images" and most is not None:
            name, fidelity = f"{field}={most}", replace(fidelity, filter_images=(most, most))
        found[name] = fidelity
    rows = [replace(guided, fidelity=own, change=name, varies=("fidelity",)) for name, own in found.items()]
    return [guided, *rows]


# Fields of `Fidelity` that sampling without guidance has too.
OF_PLAIN_SAMPLING = ("solver", "timestep_spacing", "timestep_frequencies", "cfg_channels", "vae")


def flipped_unguided(experiment: Outline, ipc: int, backbone: str = "dit") -> list[Method]:
    """A backbone without guidance, and that row with each field of `flipped` changed that its sampling has
    too: what such a field is worth without guidance.
    """
    plain, _ = plain_and_guided(experiment, backbone)
    rows = flipped(experiment, ipc, backbone)[1:]
    own = [row for row in rows if row.change.split("=")[0] in OF_PLAIN_SAMPLING]
    return [plain, *(replace(row, guidance=None) for row in own)]


def _matters(experiment: Outline, field: str, changed: Fidelity, ipc: int) -> bool:
    """Whether a field of `Fidelity` can change a set of `ipc` images a class at this scale."""
    scale, listed = experiment.scale, experiment.has_fixed_checkpoints
    filtered = scale.fidelity.checkpoints == "similarity" or not listed
    if field in ("vae", "timestep_frequencies"):  # of DiT's own weights
        return scale.papers
    if field == "checkpoints":
        return listed
    if field in ("similarity", "filter_images"):
        return filtered
    if field == "memory_size":
        return scale.fidelity.memory_size is not None and ipc > scale.fidelity.memory_size
    if field == "surrogate":
        return scale.with_fidelity(changed, experiment.number_of_classes).training != scale.training
    return True


def disputed(experiment: Outline, backbone: str) -> list[Method]:
    """What others measured below the paper: a backbone without guidance, with it, and with the released
    direction.
    """
    plain, guided = plain_and_guided(experiment, backbone)
    released = replace(experiment.scale.fidelity, second_chain=True)
    row = replace(guided, fidelity=released, change="second_chain=True", varies=("fidelity",))
    return [plain, guided, row]


def cfg_scales(text: str) -> list[float]:
    """The cfg scales of a text like "1,1.5,4"; the rows' own, 4, is among them and first."""
    own = Method().cfg_scale
    return [own, *(cfg for cfg in map(float, text.split(",")) if cfg != own)]


def by_cfg(experiment: Outline, cfgs: Sequence[float], backbone: str = "dit") -> list[Method]:
    """A backbone, G_D alone and both guidances, each at each cfg."""
    plain, guided = plain_and_guided(experiment, backbone)
    assert guided.guidance is not None
    rows = (plain, replace(guided, guidance=replace(guided.guidance, k=0.0)), guided)
    return [replace(row, cfg_scale=cfg, varies=("cfg",)) for row in rows for cfg in cfgs]


def _tuned(experiment: Outline, rows: Sequence[Method]) -> list[Method]:
    """The rows on the Minimax backbone, none where it is missing."""
    return [] if experiment.minimax_missing else [replace(row, backbone="minimax") for row in rows]
