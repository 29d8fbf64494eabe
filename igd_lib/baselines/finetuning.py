"""Fine-tuning of a DiT on data whose classes it does not know, by its own loss alone.

`accelerate launch -m igd_lib finetune DATASET OUT` trains on one GPU, several or a CPU; an interrupted run
goes on where it was. DiT-XL/2's weights, and what is fine-tuned from them, are under CC-BY-NC 4.0 (no
commercial use).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from igd_lib.baselines.tuning import Parameters, Tuning, Work, settings_of, tune
from igd_lib.data.datasets import Resize
from igd_lib.data.images import ImageData
from igd_lib.models.dit import for_classes
from igd_lib.pipeline import IGDPipeline


@dataclass(frozen=True, kw_only=True)
class Finetuning(Tuning):
    """How a DiT learns other classes: this project's choice, for want of a published one.

    Loss, label dropout, running average and image resizing are those of DiT's own training.
    """

    parameters: Parameters = "difffit"  # biases, norms, class embedding and learned scales; or all
    epochs: int = 1000
    steps: int | None = 24_000
    batch_size: int = 32
    lr: float = 1e-3
    ema: float = 0.9999
    label_dropout: float = 0.1
    flip: bool = True
    posterior: Literal["sample", "mean"] = "sample"
    resize: Resize = "bicubic-halving"
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters not in ("all", "difffit"):
            raise ValueError(f"parameters are 'all' or 'difffit', got {self.parameters!r}")


def recipe_for(parameters: Parameters) -> Finetuning:
    """The defaults; with all parameters DiT's own rate, 1e-4."""
    return Finetuning(parameters=parameters, lr=1e-4 if parameters == "all" else Finetuning.lr)


def finetune(
    pipe: IGDPipeline,
    data: ImageData,
    out: str | Path,
    *,
    recipe: Finetuning | None = None,
    sources: Sequence[int | None] | None = None,  # the known class that each begins as; None: unlabelled
    mixed_precision: str = "no",  # "no", "bf16" or "fp16"
    accumulate: int = 1,  # parts of a batch, one after the other in each process
) -> Path:
    """Fine-tune a copy of `pipe`'s DiT that has the data's classes, ids 0 ... C-1 in label order.

    Writes the pipeline folder `out` and returns it; `pipe` itself stays as it is. A class begins as
    `for_classes` has it. Errors as `tuning.tune`; ValueError where `sources` are not one a class.
    """
    recipe, classes = recipe or Finetuning(), range(len(data.classes))
    known = list(sources) if sources is not None else [None] * len(classes)
    if len(known) != len(classes):
        raise ValueError(f"sources has one id (or None) a class: {len(classes)}, got {len(known)}")
    settings = settings_of(pipe, data, classes, accumulate, mixed_precision)
    names = {str(label): name.replace(",", " ") for label, name in enumerate(data.classes)}
    work = Work(
        "finetune",
        settings | {"recipe": asdict(recipe), "sources": known},
        recipe,
        recipe.parameters,
        classes,
        classes,
        names,
        mixed_precision=mixed_precision,
        accumulate=accumulate,
    )
    return tune(pipe, for_classes(pipe.transformer, known), data, out, work)
