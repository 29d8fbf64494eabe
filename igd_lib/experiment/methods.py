"""A table's row: a `Method` is typed fields, its label derived from them. Nothing is decided on a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from igd_lib.analysis import results
from igd_lib.config import STANDARD, Fidelity, Guidance, Solver
from igd_lib.experiment.registry import BASELINES, GUIDES
from igd_lib.experiment.run import ALL, AUTO, split_names
from igd_lib.guides import Shortcuts
from igd_lib.sampling import FAST

SAMPLED = "sampled"
Field = Literal["cfg", "k", "gamma", "range", "solver", "selection", "surrogate", "shortcuts", "fidelity"]
BACKBONES = {"dit": "DiT", "minimax": "Minimax"}


@dataclass(frozen=True)
class Selection:
    """Which checkpoints guide, as indices into the trajectory, and by which rule they were chosen."""

    rule: Literal["threshold", "regular"]
    keep: tuple[int, ...]
    threshold: float | None = None  # of Algorithm 2

    @property
    def label(self) -> str:
        return f"{self.rule} {self.threshold}" if self.threshold is not None else self.rule


@dataclass(frozen=True)
class Method:
    """One row of a comparison. Where a field is None, the experiment's own setting is used.

    gamma is the paper's, for latents of 4,096 values, whatever the latents' size.
    """

    family: str = SAMPLED  # or one of BASELINES
    backbone: Literal["dit", "minimax"] = "dit"
    guidance: Guidance | None = None  # the paper's two; None: neither
    guides: tuple[str, ...] = ()  # others, of GUIDES
    cfg_scale: float = 4.0
    cfg_choice: Literal["", "best"] = ""  # best: chosen on validation data
    throughout: bool = False  # whether every step is guided
    fidelity: Fidelity | None = None
    num_steps: int | None = None
    selection: Selection | None = None
    surrogate: str | None = None
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    tiny_decoder: bool = False  # the small guidance decoder in the autoencoder's place
    change: str = ""  # FIELD=VALUE: the one field of `fidelity` that the table is about
    varies: tuple[Field, ...] = ()  # what the table's rows differ in: the label says it

    @property
    def influenced(self) -> bool:
        return self.guidance is not None and self.guidance.k > 0

    @property
    def uses_surrogate(self) -> bool:
        """Whether checkpoints of a surrogate guide it."""
        return self.influenced or any(GUIDES[name].by_surrogate for name in self.guides)

    @property
    def guide_names(self) -> tuple[str, ...]:
        """Guides that take part, or that rows differ in: "influence", "deviation", others by name."""
        fields = (("influence", "k"), ("deviation", "gamma")) if self.guidance is not None else ()
        own = [name for name, field in fields if getattr(self.guidance, field) > 0 or field in self.varies]
        return (*own, *self.guides)

    @property
    def kind(self) -> str:
        """What the method is called, whatever its settings: the paper's name where it has one."""
        if self.family != SAMPLED:
            return BASELINES[self.family].name
        plain, names = BACKBONES[self.backbone], self.guide_names
        if names == ("influence", "deviation"):
            return f"{plain}-IGD"
        papers = {"influence": "G_I", "deviation": "G_D"}
        own = [papers[name] for name in names if name in papers]
        return " + ".join([plain, *(GUIDES[name].name for name in self.guides), *own])

    @property
    def solver(self) -> Solver | None:
        """The solver, where it is not the experiment's."""
        return self.fidelity.solver if self.fidelity else None

    @property
    def shortcuts_label(self) -> str:
        """The shortcuts in words, empty without any; "FAST" for those of that name together."""
        if (self.shortcuts, self.tiny_decoder) == (FAST.shortcuts, True) and self.solver == FAST.solver:
            return "FAST"
        words = {2: "2nd", 3: "3rd"}
        own = self.shortcuts
        found = [f"gradient every {words.get(own.every, f'{own.every}th')} step"] if own.every > 1 else []
        found += ["decoder Jacobian"] if own.jacobian == "decoder" else []
        found += ["tiny decoder"] if self.tiny_decoder else []
        if own.checkpoints_per_step is not None:
            found.append(
                "one checkpoint a step"
                if own.checkpoints_per_step == 1
                else f"{own.checkpoints_per_step} checkpoints a step"
            )
        return ", ".join(found)

    def columns(
        self, *, fidelity: Fidelity = STANDARD, num_steps: int = 0, surrogate: str = ""
    ) -> dict[str, Any]:
        """A method's fields as in a result row, with its label; arguments: the experiment's settings."""
        sampled, guidance, own = self.family == SAMPLED, self.guidance, self.fidelity or fidelity
        fields = {
            "kind": self.kind,
            "family": self.family,
            "backbone": self.backbone,
            "guides": "+".join(self.guide_names),
            "cfg": float(self.cfg_scale) if sampled else 0.0,
            "cfg_choice": self.cfg_choice,
            "k": float(guidance.k) if guidance else 0.0,
            "gamma": float(guidance.gamma) if guidance else 0.0,
            "guided_range": "-".join(map(str, guidance.guided_range)) if guidance else "",
            "throughout": int(self.throughout),
            "solver": own.solver if sampled else "",
            "steps": (self.num_steps or num_steps) if sampled else 0,
            "selection": self.selection.label if self.selection else "",
            "kept": len(self.selection.keep) if self.selection else 0,
            "surrogate": self.surrogate or surrogate,
            "shortcuts": self.shortcuts_label,
            "change": self.change,
            "varies": "+".join(self.varies),
        }
        return {"method": results.label(fields), **fields}

    @property
    def label(self) -> str:
        """What it is called in a table."""
        return self.columns()["method"]

    @property
    def look(self) -> str:
        """What figures tell it by."""
        return results.look(self.columns())


def chosen(methods: Sequence[Method], names: str) -> list[Method]:
    """The rows whose kind is among the comma-separated `names`; "auto" and "all": all of them.

    Raises ValueError for a name that no row has.
    """
    if names in (AUTO, ALL):
        return list(methods)
    wanted, kinds = split_names(names), list(dict.fromkeys(method.kind for method in methods))
    unknown = [name for name in wanted if name.casefold() not in map(str.casefold, kinds)]
    if unknown:
        raise ValueError(f"no row is called {unknown[0]!r} here; methods are among {', '.join(kinds)}")
    return [method for method in methods if method.kind.casefold() in map(str.casefold, wanted)]
