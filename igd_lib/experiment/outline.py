"""What the rows of a table depend on: less than an experiment, so that a plan can have it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from igd_lib.experiment.scales import Scale


class Outline(Protocol):
    """What `comparisons` ask for; an `Experiment` is one, and a plan has one before anything is loaded."""

    @property
    def scale(self) -> Scale: ...

    @property
    def minimax_missing(self) -> str:
        """Why there is no Minimax backbone; empty where there is one."""
        ...

    @property
    def renderer_missing(self) -> str:
        """Why nothing makes new images of given ones here; empty where something does."""
        ...

    @property
    def has_fixed_checkpoints(self) -> bool:
        """Whether the released code has a list of checkpoints for the data and the surrogate."""
        ...

    @property
    def number_of_classes(self) -> int: ...

    def choices(self, thresholds: Sequence[float]) -> Any:
        """What Algorithm 2 keeps, as `Surrogates.choices` has it."""
        ...
