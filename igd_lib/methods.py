"""What the tables compare: one `Method` a row, and the rows of each table for an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from igd_lib.config import Fidelity, Guidance, flips

if TYPE_CHECKING:
    from igd_lib.experiment import Experiment


@dataclass(frozen=True)
class Method:
    """One row of a comparison: `guidance=None` is vanilla sampling.

    real: "random" images or "rded" in place of sampled ones; backbone: "dit" or "minimax";
    fidelity, num_steps, keep (checkpoints, as indices into the trajectory) and surrogate are the experiment's unless given.
    """

    name: str
    guidance: Guidance | None = None
    cfg_scale: float = 4.0
    real: Literal["random", "rded"] | None = None
    backbone: Literal["dit", "minimax"] = "dit"
    fidelity: Fidelity | None = None
    num_steps: int | None = None
    keep: tuple[int, ...] | None = None
    surrogate: str | None = None
    shortcuts: Mapping[str, Any] = field(default_factory=dict)  # `sample_igd`'s; "tiny" names the stand-in's guidance decoder

    @property
    def influenced(self) -> bool:
        return self.guidance is not None and self.guidance.k > 0


def comparison(setup: Experiment) -> list[Method]:
    """Random, DiT at cfg 4, DiT at its best cfg, deviation guidance alone, and DiT-IGD."""
    return [
        Method("Random", real="random"),
        Method("DiT"),
        Method("DiT, best cfg", cfg_scale=setup.best_cfg),
        Method("DiT + G_D", replace(setup.guidance, k=0.0)),
        Method("DiT-IGD", setup.guidance),
    ]


def baselines(setup: Experiment) -> list[Method]:
    """`comparison` with RDED, and with Minimax and Minimax-IGD where there is a Minimax model (`Experiment.minimax_missing`)."""
    random, *others = comparison(setup)
    return [random, Method("RDED", real="rded"), *others, *_tuned(setup, Method("Minimax"), Method("Minimax-IGD", setup.minimax_guidance))]


def sampled(setup: Experiment) -> list[Method]:
    """The rows of `baselines` that a diffusion model samples at the paper's cfg."""
    return [row for row in baselines(setup) if row.real is None and row.cfg_scale == 4.0]


def plain_and_guided(setup: Experiment, backbone: str) -> tuple[Method, Method]:
    """A backbone's rows without and with guidance. Raises ValueError for another than "dit" or "minimax", or one that is missing."""
    found = [row for row in sampled(setup) if row.backbone == backbone and (row.guidance is None or row.influenced)]
    if len(found) != 2:
        raise ValueError(setup.minimax_missing if backbone == "minimax" else f"backbone is 'dit' or 'minimax', got {backbone!r}")
    return found[0], found[1]


def ablation(setup: Experiment) -> list[Method]:
    """Table 5's rows: neither guidance, each alone, both, on either backbone; and vanilla sampling at its best cfg."""
    _, plain, best, deviation, both = comparison(setup)
    rows = [plain, best, Method("DiT + G_I", replace(setup.guidance, gamma=0.0)), deviation, both]
    own = setup.minimax_guidance
    alone = [("Minimax", None), ("Minimax + G_I", replace(own, gamma=0.0)), ("Minimax + G_D", replace(own, k=0.0)), ("Minimax-IGD", own)]
    return [*rows, *_tuned(setup, *(Method(name, guidance) for name, guidance in alone))]


def _tuned(setup: Experiment, *rows: Method) -> list[Method]:
    """The rows on the Minimax backbone, none where it is missing."""
    return [] if setup.minimax_missing else [replace(row, backbone="minimax") for row in rows]


def surrogates(setup: Experiment, names: Sequence[str]) -> list[Method]:
    """Table 4's rows: DiT-IGD guided by surrogates of other architectures; DiT and deviation guidance alone beside them."""
    _, plain, _, deviation, _ = comparison(setup)
    return [plain, deviation, *(Method(f"DiT-IGD, {name}", setup.guidance, surrogate=name) for name in names)]


def selections(setup: Experiment, thresholds: Sequence[float], backbone: str = "dit") -> list[Method]:
    """Table 6's rows: no guidance, and IGD with Algorithm 2's checkpoints by threshold and with as many at regular intervals.

    Raises ValueError for another backbone than "dit" or "minimax", FileNotFoundError where there is no Minimax model.
    """
    if backbone not in ("dit", "minimax"):
        raise ValueError(f"backbone is 'dit' or 'minimax', got {backbone!r}")
    if backbone == "minimax" and setup.minimax_missing:
        raise FileNotFoundError(setup.minimax_missing)
    guidance = setup.guidance if backbone == "dit" else setup.minimax_guidance
    prefix = "" if backbone == "dit" else "Minimax-IGD, "
    chosen, found = setup.choices(thresholds), {}
    for entry in chosen[chosen.similarity == setup.fidelity.similarity].itertuples():
        found[tuple(entry.kept)] = Method(f"{prefix}threshold {entry.threshold} ({len(entry.kept)})", guidance, keep=tuple(entry.kept))
        found.setdefault(tuple(entry.regular), Method(f"{prefix}regular ({len(entry.regular)})", guidance, keep=tuple(entry.regular)))
    rows = [Method("DiT" if backbone == "dit" else "Minimax"), *found.values()]
    return [replace(row, backbone=backbone) for row in rows]


def solvers(setup: Experiment) -> list[Method]:
    """Table 10's rows: either backbone, with and without guidance, by DDIM and by DPM-Solver++ with 20 steps and guided range (12, 18)."""
    ddim = replace(setup.fidelity, solver="ddim")
    dpm = dict(fidelity=replace(setup.fidelity, solver="dpmsolver++"), num_steps=20 if setup.scale != "smoke" else setup.num_steps)
    short = replace(setup.guidance, guided_range=(12, 18)) if setup.scale != "smoke" else setup.guidance
    own = setup.minimax_guidance
    return [
        Method(f"DiT, DDIM {setup.num_steps}", fidelity=ddim),
        Method(f"DiT-IGD, DDIM {setup.num_steps}", setup.guidance, fidelity=ddim),
        Method("DiT, DPM-Solver++ 20", **dpm),
        Method("DiT-IGD, DPM-Solver++ 20", short, **dpm),
        *_tuned(
            setup,
            Method(f"Minimax, DDIM {setup.num_steps}", fidelity=ddim),
            Method(f"Minimax-IGD, DDIM {setup.num_steps}", own, fidelity=ddim),
            Method("Minimax, DPM-Solver++ 20", **dpm),
            Method("Minimax-IGD, DPM-Solver++ 20", replace(own, guided_range=short.guided_range), **dpm),
        ),
    ]


SHORTCUTS: dict[str, dict[str, Any]] = {
    "decoder Jacobian": {"jacobian": "decoder"},
    "tiny decoder": {"guidance_decoder": "tiny"},
    "decoder Jacobian, tiny decoder": {"jacobian": "decoder", "guidance_decoder": "tiny"},
    "gradient every 2nd step": {"every": 2},
    "gradient every 4th step": {"every": 4},
    "gradient every 8th step": {"every": 8},
    "gradient every 4th step, decoder Jacobian": {"every": 4, "jacobian": "decoder"},
    "one checkpoint a step": {"checkpoints_per_step": 1},
}


def shortcuts(setup: Experiment) -> list[Method]:
    """DiT, G_D alone and DiT-IGD, and DiT-IGD with each shortcut."""
    _, plain, _, deviation, both = comparison(setup)
    return [plain, deviation, both, *(Method(name, setup.guidance, shortcuts=options) for name, options in SHORTCUTS.items())]


def grid(setup: Experiment, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit") -> list[Method]:
    """A backbone without guidance, and with every pair of k and gamma (the paper's, for 4,096 latent values) but (0, 0)."""
    scaled = {gamma: replace(setup.guidance, k=0.0, gamma=gamma).for_latents(setup.latent_values).gamma for gamma in gammas}
    pairs = [(k, gamma) for gamma in gammas for k in ks if k or gamma]
    plain, _ = plain_and_guided(setup, backbone)
    prefix = "" if backbone == "dit" else f"{plain.name}, "
    named = [(f"{prefix}k {k:g}, gamma {gamma:g}", replace(setup.guidance, k=float(k), gamma=scaled[gamma])) for k, gamma in pairs]
    return [plain, *(replace(plain, name=name, guidance=guidance) for name, guidance in named)]


def early_stage(setup: Experiment, ks: Sequence[float]) -> list[Method]:
    """Figure 2's rows: DiT, and influence guidance alone at each k, in the guided range and at every step."""
    first = setup.fidelity.range_counts_from
    whole = (first, setup.num_steps - 1 + first)
    ranges = (("DiT + G_I", setup.guidance.guided_range), ("DiT + G_I throughout", whole))
    return [Method("DiT"), *(Method(f"{name}, k {k:g}", Guidance(k, 0.0, steps)) for name, steps in ranges for k in ks)]


def sensitivity(setup: Experiment, ks: Sequence[float], gammas: Sequence[float], backbone: str = "dit") -> list[Method]:
    """Figure 6's rows: guidance with each k, and with each gamma (the paper's, for 4,096 latent values), the other as in use."""
    plain, guided = plain_and_guided(setup, backbone)
    scaled = [(gamma, Guidance(0.0, gamma).for_latents(setup.latent_values).gamma) for gamma in gammas]
    pairs = [(f"k {k:g}", replace(guided.guidance, k=float(k))) for k in ks]
    pairs += [(f"gamma {gamma:g}", replace(guided.guidance, gamma=own)) for gamma, own in scaled]
    return [plain, *(replace(guided, name=f"{guided.name}, {name}", guidance=guidance) for name, guidance in pairs)]


def flipped(setup: Experiment) -> list[Method]:
    """DiT-IGD as released, and with one field of `Fidelity` changed towards the paper at a time.

    Away from the paper's scale without the fields that cannot matter there (they concern DiT's weights, fixed
    lists, many classes, or more images than are drawn), and with 1,000 images for "all": those the surrogate saw.
    """
    found = {}
    for name, fidelity in flips(setup.fidelity).items():
        if setup.scale != "paper" and name.split("=")[0] in ("checkpoints", "surrogate", "vae", "timestep_frequencies", "memory_size"):
            continue
        if setup.scale != "paper" and name.startswith("gradient_images"):
            name, fidelity = "gradient_images=1000", replace(fidelity, gradient_images=1000 if setup.scale == "small" else 20)
        found[name] = fidelity
    return [Method("DiT-IGD", setup.guidance), *(Method(name, setup.guidance, fidelity=fidelity) for name, fidelity in found.items())]


def by_cfg(setup: Experiment, cfgs: Sequence[float]) -> list[Method]:
    """DiT, G_D alone and DiT-IGD, each at each cfg."""
    kinds = (("DiT", None), ("DiT + G_D", replace(setup.guidance, k=0.0)), ("DiT-IGD", setup.guidance))
    return [Method(f"{name}, cfg {cfg:g}", guidance, cfg_scale=cfg) for name, guidance in kinds for cfg in cfgs]


# --- which differences a table's claims are about, as far as its rows have the methods


def claims(names: Sequence[str]) -> list[tuple[str, str]]:
    """Of `baselines`: the paper's claims, the controls, and what influence guidance adds."""
    pairs = [("DiT-IGD", "DiT"), ("DiT, best cfg", "DiT"), ("DiT-IGD", "DiT + G_D"), ("DiT-IGD", "DiT, best cfg"), ("DiT-IGD", "RDED")]
    pairs += [("Minimax", "DiT"), ("Minimax-IGD", "Minimax"), ("Minimax-IGD", "DiT-IGD")]
    return [pair for pair in pairs if set(pair) <= set(names)]


def ablation_claims(names: Sequence[str]) -> list[tuple[str, str]]:
    """Of `ablation`: each guidance alone, both, what influence guidance adds to the other, and the control."""
    pairs = [("DiT, best cfg", "DiT")]
    for name in ("DiT", "Minimax"):
        pairs += [(f"{name} + G_I", name), (f"{name} + G_D", name), (f"{name}-IGD", name), (f"{name}-IGD", f"{name} + G_D")]
    return [pair for pair in pairs if set(pair) <= set(names)]


def early_stage_claims(names: Sequence[str]) -> list[tuple[str, str]]:
    """Of `early_stage`: every row against DiT, then guidance throughout against the guided range at the same k."""
    found = [name for name in dict.fromkeys(names) if name != "DiT"]
    early = [name for name in found if "throughout" not in name]
    return [(name, "DiT") for name in found] + [(name.replace(",", " throughout,"), name) for name in early]


def selection_claims(names: Sequence[str]) -> list[tuple[str, str]]:
    """Of `selections`: every choice against no guidance, and Algorithm 2's against as many checkpoints at regular intervals."""
    first, *others = dict.fromkeys(names)
    pairs = [(name, first) for name in others]
    return pairs + [(ours, name) for ours in others for name in others if "threshold" in ours and "regular" in name and ours.split()[-1] == name.split()[-1]]


def solver_claims(names: Sequence[str]) -> list[tuple[str, str]]:
    """Of `solvers`: guidance with either solver, then the quick solver against the slow one; on each backbone."""
    pairs = []
    for backbone in ("DiT", "Minimax"):
        own = sorted({name for name in names if name.startswith(backbone)}, key=lambda name: ("DPM" in name, "IGD" in name))
        if own:
            plain, guided, quick, guided_quick = own
            pairs += [(guided, plain), (guided_quick, quick), (quick, plain), (guided_quick, guided)]
    return pairs
