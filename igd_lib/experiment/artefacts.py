"""The numbered notebooks, as far as the library has to know them: their data, networks and what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Need = Literal["teacher", "minimax", "taesd", "inception", "stable-diffusion"]
THREE = "convnet6,resnetap10,resnet18"  # the paper's networks
TWO = "convnet3,convnet4"


@dataclass(frozen=True)
class Artefact:
    """A table or figure and the notebook that makes it."""

    dataset: str  # at the paper's scale, unless the notebook's parameter says otherwise
    networks: str = "resnet18"  # trained on every set at the paper's scale, ...
    small_networks: str = "convnet3"  # ... and on a stand-in
    labels: Literal["hard", "soft"] = "hard"
    needs: tuple[Need, ...] = ()  # weights beside DiT and its autoencoder, where rows use them
    paper: bool = True  # whether it has a paper scale


ARTEFACTS: Mapping[str, Artefact] = {
    "00_quickstart": Artefact("fashion-mnist", "", paper=False),
    "01_nette_woof": Artefact("imagewoof", THREE, TWO, needs=("teacher", "minimax")),
    "02_checkpoints": Artefact("imagenet", ""),
    "03_imagenet1k": Artefact(
        "imagenet", "torchvision/resnet18", labels="soft", needs=("teacher", "minimax")
    ),
    "04_surrogate_architecture": Artefact("imagewoof", THREE, "convnet2,convnet3"),
    "05_guidance_ablation": Artefact("imagenette", needs=("minimax",)),
    "06_checkpoint_selection": Artefact("imagenette", needs=("minimax",)),
    "07_food101": Artefact("food-101", "resnetap10", needs=("teacher", "minimax")),
    "08_cifar": Artefact("cifar-10", "convnet3", needs=("teacher", "minimax")),
    "09_diffusion_baselines": Artefact(
        "imagenet",
        "torchvision/resnet18",
        labels="soft",
        needs=("teacher", "minimax", "stable-diffusion"),
    ),
    "10_dpm_solver": Artefact("imagenette", needs=("minimax",)),
    "11_fid_coverage": Artefact("imagewoof", needs=("teacher", "minimax", "inception")),
    "12_hyperparameters": Artefact("imagewoof"),
    "13_paper_vs_code": Artefact("imagewoof", needs=("minimax",)),
    "14_shortcuts": Artefact("imagewoof", needs=("taesd",)),
    "15_guides": Artefact("imagewoof", needs=("inception",)),
    "16_coresets": Artefact("imagewoof", needs=("teacher", "minimax")),
    "17_your_data": Artefact("", "resnetap10", paper=False),  # one's own folder: no plan
    "18_lesson": Artefact("", "", paper=False),  # points in the plane
    "21_influence": Artefact("imagenette", THREE, TWO, needs=("teacher", "minimax")),
    "22_early_stage": Artefact("imagewoof"),
    "23_tsne": Artefact("imagewoof", "", needs=("teacher", "minimax", "inception")),
    "24_same_noise": Artefact("imagewoof", "", needs=("minimax",)),
    "25_overview": Artefact("imagewoof", ""),
    "26_sensitivity": Artefact("imagenette", needs=("minimax",)),
    "27_gallery": Artefact("imagewoof", "", needs=("minimax",)),
}


def artefact(name: str) -> Artefact:
    """The notebook of that name, or of that number; hard labels and no networks of its own for another."""
    found = [known for known in ARTEFACTS if known == name or known.split("_")[0] == name]
    return ARTEFACTS[found[0]] if found else Artefact("imagenet")
