"""How a table's row makes its set, if not by the paper's guidance: one function and one line each.

BASELINES: other methods, each a file in `igd_lib.baselines`. GUIDES: other guidance, each a class in
`igd_lib.other_guides`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from igd_lib.data.images import ImageData
from igd_lib.experiment import guide_makers, makers
from igd_lib.experiment.scales import Scale
from igd_lib.guides import GuideFactory
from igd_lib.protocols import DATM_OWN, SMALL_DATM, Protocol
from igd_lib.sets.terms import Origin


@dataclass(frozen=True)
class Baseline:
    """A method that is no guided sampling."""

    name: str  # the paper's
    make: Callable[[Any, int, int], ImageData]  # of a Workplace, IPC and generation seed
    # Of a method that takes long: minutes of one core for a set on a stand-in, by Workplace and IPC, for what
    # all its sets share (networks, experts, an adapter), and whether a set is in the cache already.
    minutes: Callable[[Any, int], float] | None = None
    shared_minutes: float = 0.0
    is_made: Callable[[Any, int, int], bool] = lambda place, ipc, seed: False
    origin: Origin = "derived"  # what its images are
    # Which of its settings are not its authors', by Workplace and IPC.
    shortened: Callable[[Any, int], list[str]] = lambda place, ipc: []
    # Under which its sets are evaluated where they are not as others' are; None: the table's.
    protocol: Callable[[Scale], Protocol] | None = None


@dataclass(frozen=True)
class OtherGuide:
    """Another paper's guidance."""

    name: str  # as a label has it: "DiT + NAME"
    make: Callable[[Any], GuideFactory]  # of an Experiment
    # What it costs, for plans: whether its gradient goes through the transformer, whether through decoder and
    # surrogate too, and whether all real images are encoded for it.
    through_model: bool = False
    by_surrogate: bool = False
    encodes: bool = False


def _takes_minutes(
    sets: makers.Whole | makers.ByClass, minutes: Callable[[int], float], shared: float = 0.0
) -> Baseline:
    """A method whose set of an IPC takes so many minutes of one core on CIFAR-10's stand-in, as measured."""
    return Baseline(
        sets.name,
        sets,
        lambda place, ipc: minutes(ipc),
        shared,
        is_made=sets.is_made,
        origin=sets.origin,
        shortened=sets.shortened,
    )


def _datm_own(scale: Scale) -> Protocol:
    """By the labels and the rate that were learned with the images."""
    return scale.cut(DATM_OWN if scale.papers else SMALL_DATM)


BASELINES: dict[str, Baseline] = {
    "random": Baseline("Random", makers.random_images, origin="real"),
    "dm": _takes_minutes(makers.DM_SETS, lambda ipc: 2.2 + 0.08 * ipc),
    "idc": _takes_minutes(makers.IDC_SETS, lambda ipc: 4.5 + 0.13 * ipc),
    "datm": replace(_takes_minutes(makers.DATM_SETS, lambda ipc: 2.2, 12), protocol=_datm_own),
    "datm-plain": _takes_minutes(makers.PLAIN_DATM_SETS, lambda ipc: 2.2, 12),
    "sre2l": _takes_minutes(makers.SRE2L_SETS, lambda ipc: 0.14 * ipc, 1.3),
    "gvbsm": _takes_minutes(makers.GVBSM_SETS, lambda ipc: 0.2 * ipc, 4),
    "rded": Baseline("RDED", makers.rded_images, origin="real"),
    "tdsdm": _takes_minutes(makers.TDSDM_SETS, lambda ipc: 0.01 * ipc, 1.2),
    "d4m": _takes_minutes(makers.D4M_SETS, lambda ipc: 0.4),
} | {
    rule: Baseline(name, makers.coreset_images(rule), origin="real")
    for rule, name in {
        "herding": "Herding",
        "k-centre": "K-centre",
        "medoid": "Medoid",
        "el2n": "EL2N",
        "el2n-easiest": "EL2N (easiest)",
        "confidence": "Confidence",
    }.items()
}


def _modes(key: str, name: str, *how: Any) -> OtherGuide:
    return OtherGuide(name, guide_makers.modes(key, *how), encodes=True)


GUIDES: dict[str, OtherGuide] = {
    "modes": _modes("modes", "MGD3"),
    "modes-nearest": _modes("modes-nearest", "MGD3 (nearest)", "nearest"),
    "modes-random": _modes("modes-random", "MGD3 (random)", "random"),
    "modes-pooled": _modes("modes-pooled", "MGD3 (pooled)", "pooled"),
    "modes-shuffled": _modes("modes-shuffled", "MGD3 (shuffled)", "shuffled"),
    "modes-algorithm": _modes("modes-algorithm", "MGD3 (algorithm)", "k-means", "algorithm"),
    "classifier": OtherGuide(
        "classifier loss", guide_makers.classifier, through_model=True, by_surrogate=True
    ),
    "transport": OtherGuide("OT", guide_makers.transport(), through_model=True, encodes=True),
}
