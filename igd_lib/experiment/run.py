"""What a run is asked to do: the parameters that all notebooks with a paper scale share, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from igd_lib.protocols import PROTOCOLS
from igd_lib.sampling import Precision

AUTO, ALL = "auto", "all"


@dataclass(frozen=True)
class Options:
    """Parameters of some notebooks that decide their rows."""

    backbone: str = "dit"
    surrogates: str = AUTO
    ks: str = AUTO
    gammas: str = AUTO
    cfgs: str = AUTO


@dataclass(frozen=True)
class Run:
    """The shared parameters of the notebooks. Raises ValueError for what cannot be meant."""

    ipc: int = 10  # images a class
    seeds: str | int = "5"  # generation seeds: how many, or which ("3:5", "0,3")
    methods: str = AUTO  # kinds of rows, comma-separated
    networks: str = AUTO  # what is trained on every set, comma-separated
    protocol: str = AUTO  # how, by name
    classes: str = ""  # the labels that this run works on ("0:125", "3,7"); empty: all
    batch: int = 0  # images side by side; 0: as memory allows
    precision: Precision = "float32"
    stand_in: str = AUTO  # whose data and models "small" and "smoke" take, by name
    options: Options = field(default_factory=Options)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Run:
        """From a notebook's parameters, whatever others are among them."""
        options = Options(**{name: given[name] for name in OPTIONS if name in given})
        return cls(**{name: given[name] for name in SHARED if name in given}, options=options)

    def __post_init__(self) -> None:
        if self.ipc < 1:
            raise ValueError(f"ipc is at least 1, got {self.ipc}")
        if self.batch < 0:
            raise ValueError(f"batch is 0 (as memory allows) or more, got {self.batch}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if self.protocol not in (AUTO, *PROTOCOLS):
            raise ValueError(f"protocol is auto, {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if not self.generation_seeds:
            raise ValueError(f"seeds is at least 1, got {self.seeds}")
        if self.classes:
            numbers("classes", self.classes)

    @property
    def generation_seeds(self) -> tuple[int, ...]:
        """The seeds: 0 ... n - 1 for a plain number n."""
        text = str(self.seeds).strip()
        return tuple(range(int(text))) if text.isdecimal() else numbers("seeds", text)

    def labels(self, count: int) -> list[int] | None:
        """Which of `count` labels this run works on; None: all. A range may reach beyond the last.

        Raises ValueError where none is left.
        """
        if not self.classes:
            return None
        chosen = [label for label in numbers("classes", self.classes) if label < count]
        if not chosen:
            raise ValueError(f"classes are labels 0 ... {count - 1} here, got {self.classes!r}")
        return chosen


OPTIONS = tuple(one.name for one in fields(Options))
SHARED = tuple(one.name for one in fields(Run) if one.name != "options")


def numbers(what: str, text: str) -> tuple[int, ...]:
    """The numbers that a text like "3", "0:4" (without 4) or "0,3,10:12" names, each once, in order.

    Raises ValueError for another text, and for a range without any.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        ends = [end.strip() for end in part.split(":")]
        if not all(end.isdecimal() for end in ends) or len(ends) > 2:
            raise ValueError(f'{what} are numbers like "3", "0:4" or "0,3,10:12", got {text!r}')
        first, last = int(ends[0]), int(ends[-1]) + (len(ends) == 1)
        if last <= first:
            raise ValueError(f"{what}: the range {part.strip()!r} holds no number")
        found |= dict.fromkeys(range(first, last))
    return tuple(found)


def split_names(text: str) -> list[str]:
    """Comma-separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]
