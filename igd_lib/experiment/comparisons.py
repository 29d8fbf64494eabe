"""The rows of each table and figure, for an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from igd_lib.config import Guidance, flips
from igd_lib.experiment.experiment import Experiment
from igd_lib.experiment.methods import SAMPLED, Method, Selection
from igd_lib.guides import Shortcuts


def comparison(experiment: Experiment) -> list[Method]:
    """Random, DiT at cfg 4, DiT at its best cfg, deviation guidance alone, and DiT-IGD."""
    scale = experiment.scale
    return [
        Method("random"),
        Method(),
        Method(cfg_scale=scale.best_cfg, cfg_choice="best"),
        Method(guidance=replace(scale.guidance, k=0.0)),
        Method(guidance=scale.guidance),
    ]


def baselines(experiment: Experiment) -> list[Method]:
    """`comparison` with RDED, and with Minimax and Minimax-IGD where there is a Minimax model."""
    random, *others = comparison(experiment)
    tuned = [Method(), Method(guidance=experiment.scale.on_minimax())]
    return [random, Method("rded"), *others, *_tuned(experiment, tuned)]


def sampled(experiment: Experiment) -> list[Method]:
    """The rows of `baselines` that a diffusion model samples at the paper's cfg."""
    return [row for row in baselines(experiment) if row.family == SAMPLED and row.cfg_choice == ""]


def plain_and_guided(experiment: Experiment, backbone: str) -> tuple[Method, Method]:
    """A backbone's rows without and with guidance.

    Raises ValueError for another than "dit" or "minimax", FileNotFoundError where there is no Minimax model.
    """
    if backbone not in ("dit", "minimax"):
        raise ValueError(f"backbone is 'dit' or 'minimax', got {backbone!r}")
    if backbone == "minimax" and experiment.models.minimax_missing:
        raise FileNotFoundError(experiment.models.minimax_missing)
    if backbone == "dit":
        return Method(), Method(guidance=experiment.scale.guidance)
    plain = Method(backbone="minimax")
    return plain, replace(plain, guidance=experiment.scale.on_minimax())


def ablation(experiment: Experiment) -> list[Method]:
    """Table 5's rows: neither guidance, each alone, both, on either backbone; and vanilla sampling at its
    best cfg.
    """
    _, plain, best, deviation, both = comparison(experiment)
    own = experiment.scale.on_minimax()
    tuned = [None, replace(own, gamma=0.0), replace(own, k=0.0), own]
    influence = Method(guidance=replace(experiment.scale.guidance, gamma=0.0))
    return [
        plain,
        best,
        influence,
        deviation,
        both,
        *_tuned(experiment, [Method(guidance=one) for one in tuned]),
    ]


def surrogates(experiment: Experiment, names: Sequence[str]) -> list[Method]:
    """Table 4's rows: DiT-IGD guided by surrogates of other architectures; DiT and deviation guidance alone
    beside them.
    """
    _, plain, _, deviation, both = comparison(experiment)
    return [plain, deviation, *(replace(both, surrogate=name, varies=("surrogate",)) for name in names)]


def selections(experiment: Experiment, thresholds: Sequence[float], backbone: str = "dit") -> list[Method]:
    """Table 6's rows: no guidance, and IGD with Algorithm 2's checkpoints by threshold and with as many at
    regular intervals.

    Raises ValueError for another backbone than "dit" or "minimax", FileNotFoundError where there is no
    Minimax model.
    """
    plain, guided = plain_and_guided(experiment, backbone)
    chosen = experiment.surrogates.choices(thresholds)
    found: dict[tuple[int, ...], Selection] = {}
    for entry in chosen[chosen.similarity == experiment.scale.fidelity.similarity].itertuples():
        found[tuple(entry.kept)] = Selection("threshold", tuple(entry.kept), entry.threshold)
        found.setdefault(tuple(entry.regular), Selection("regular", tuple(entry.regular)))
    return [plain, *(replace(guided, selection=one, varies=("selection",)) for one in found.values())]


def solvers(experiment: Experiment) -> list[Method]:
    """Table 10's rows: either backbone, with and without guidance, by DDIM and by DPM-Solver++ with few
    steps.
    """
    scale = experiment.scale
    slow = Method(
        fidelity=replace(scale.fidelity, solver="ddim"), num_steps=scale.num_steps, varies=("solver",)
    )
    quick = replace(slow, fidelity=replace(scale.fidelity, solver="dpmsolver++"), num_steps=scale.few_steps)

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


def shortcuts(experiment: Experiment) -> list[Method]:
    """DiT, G_D alone and DiT-IGD, and DiT-IGD with each shortcut."""
    _, plain, _, deviation, both = comparison(experiment)
    varied = replace(both, varies=("shortcuts",))
    return [
        plain,
        deviation,
        both,
        *(replace(varied, shortcuts=own, tiny_decoder=tiny) for own, tiny in SHORTCUTS),
    ]


def grid(
    experiment: Experiment, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit"
) -> list[Method]:
    """A backbone without guidance, and with every pair of k and gamma but (0, 0)."""
    plain, _ = plain_and_guided(experiment, backbone)
    own = experiment.scale.guidance
    pairs = [replace(own, k=float(k), gamma=float(gamma)) for gamma in gammas for k in ks if k or gamma]
    return [plain, *(replace(plain, guidance=pair, varies=("k", "gamma")) for pair in pairs)]


def early_stage(experiment: Experiment, ks: Sequence[float]) -> list[Method]:
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
    experiment: Experiment, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit"
) -> list[Method]:
    """Figure 6's rows: guidance with each k, and with each gamma, the other as in use."""
    plain, guided = plain_and_guided(experiment, backbone)
    own = experiment.scale.guidance if backbone == "dit" else experiment.scale.on_minimax()
    by_k = [replace(guided, guidance=replace(own, k=float(k)), varies=("k",)) for k in ks]
    by_gamma = [replace(guided, guidance=replace(own, gamma=float(g)), varies=("gamma",)) for g in gammas]
    return [plain, *by_k, *by_gamma]


# Fields that cannot matter on a stand-in: they concern DiT's weights, fixed lists, many classes, or more
# images than are drawn.
_PAPER_ONLY = ("checkpoints", "surrogate", "vae", "timestep_frequencies", "memory_size")


def flipped(experiment: Experiment) -> list[Method]:
    """DiT-IGD as released, and with one field of `Fidelity` changed towards the paper at a time.

    On a stand-in without the fields that cannot matter there, and with `Scale.all_images` for "all".
    """
    scale, guided = experiment.scale, Method(guidance=experiment.scale.guidance)
    found = {}
    for name, fidelity in flips(scale.fidelity).items():
        field = name.split("=")[0]
        if not scale.papers and field in _PAPER_ONLY:
            continue
        if field == "gradient_images" and scale.all_images is not None:
            name, fidelity = "gradient_images=1000", replace(fidelity, gradient_images=scale.all_images)
        found[name] = fidelity
    rows = [replace(guided, fidelity=own, change=name, varies=("fidelity",)) for name, own in found.items()]
    return [guided, *rows]


def by_cfg(experiment: Experiment, cfgs: Sequence[float]) -> list[Method]:
    """DiT, G_D alone and DiT-IGD, each at each cfg."""
    own = experiment.scale.guidance
    kinds = (None, replace(own, k=0.0), own)
    return [Method(guidance=guidance, cfg_scale=cfg, varies=("cfg",)) for guidance in kinds for cfg in cfgs]


def _tuned(experiment: Experiment, rows: Sequence[Method]) -> list[Method]:
    """The rows on the Minimax backbone, none where it is missing."""
    return [] if experiment.models.minimax_missing else [replace(row, backbone="minimax") for row in rows]
