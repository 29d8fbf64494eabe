"""Diffusion models for the commands: found on this machine, converted from others' files, or fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL

from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import ImageData, load
from igd_lib.data.your_folder import IDS, your_folder
from igd_lib.experiment import pieces
from igd_lib.experiment.pieces import DIT, SD_VAE, dit_of
from igd_lib.models import folder
from igd_lib.models.dit import from_original, match_original, read
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools.machine import cache_dir


def found_model(repository: str, revision: str | None) -> Path:
    """A model's folder on this machine. Raises FileNotFoundError with the ways to get it."""
    found = pieces.model_folder(repository, revision)
    if found is None:
        raise FileNotFoundError(
            f"the model {repository} is not on this machine: hf download {repository} --revision {revision}; "
            "or, without a network, copy its folder from a machine that has it to "
            f"{cache_dir() / 'models' / repository.split('/')[-1]}, or name the folder in the command"
        )
    return found


def autoencoder(name: str | None = None) -> AutoencoderKL:
    """That of a folder (or of the pipeline in it), else of the hub; None: the pinned sd-vae-ft-mse.

    Raises FileNotFoundError where there is none.
    """
    where: str | Path = found_model(*SD_VAE) if name is None else name
    if (Path(where) / "vae").is_dir():
        where = Path(where) / "vae"
    try:
        return AutoencoderKL.from_pretrained(where).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no autoencoder in {where} ({str(error).splitlines()[0]}); without a network, copy a folder "
            "with config.json and diffusion_pytorch_model.safetensors here, and name it: --vae FOLDER"
        ) from error


def convert(file: Path, out: Path, *, vae: str | None = None, heads: int | None = None) -> None:
    """DiT's or Minimax's own file as a diffusers pipeline in a new folder.

    vae: see `autoencoder`. heads: of attention, for a width that is none of DiT's. Nothing is written before
    all of it is there. Raises ValueError for a file of another model, FileExistsError for a folder that is
    taken.
    """
    folder.refuse_taken(out)
    own = autoencoder(vae)
    transformer = from_original(read(file), num_attention_heads=heads)
    imagenet = DATASETS["imagenet"].names
    known = transformer.config.num_embeds_ada_norm == len(imagenet)
    names = {str(label): name for label, name in enumerate(imagenet)} if known else None
    folder.write_pipeline(out, transformer, own, folder.dit_scheduler(), names)


@dataclass(frozen=True)
class Base:
    """What a DiT is fine-tuned from; the paper's and its pinned autoencoder where nothing is named."""

    path: Path | None = None  # of a pipeline
    vae: str | None = None  # see `autoencoder`; of a pipeline that is named, its own

    def pipeline(self) -> IGDPipeline:
        """Raises FileNotFoundError where it is not on this machine."""
        if self.path is not None:
            own = {} if self.vae is None else {"vae": autoencoder(self.vae)}
            return IGDPipeline.from_pretrained(self.path, **own)
        pipe = IGDPipeline.from_pretrained(found_model(*DIT), vae=autoencoder(self.vae))
        match_original(pipe.transformer)
        return pipe


def to_finetune_on(dataset: str, base: Base, image_size: int) -> tuple[IGDPipeline, ImageData]:
    """A pipeline, and the training images that it is to learn.

    dataset: a name, or a folder with one folder of images a class in train and test; image_size: px a side
    that a folder's images are used at. Raises ValueError where the paper's DiT knows the classes already.
    """
    if dataset not in DATASETS and not Path(dataset).expanduser().is_dir():
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"DATASET is a folder or one of {known}; there is no folder {dataset}")
    spec = DATASETS.get(dataset) or your_folder(dataset, image_size=image_size)
    data = load(spec, "train")
    if base.path is None:
        _refuse_known(dataset, spec)
    return base.pipeline(), data


def _refuse_known(dataset: str, spec: DataSpec) -> None:
    known = dit_of(dataset) == DIT if dataset in DATASETS else bool(spec.label_ids)
    if not known:
        return
    listed = "" if dataset in DATASETS else f" ({Path(spec.folder) / IDS})"
    raise ValueError(
        f"DiT-XL/2 knows the classes of {dataset}{listed}: it is sampled as it is; --base FOLDER "
        "fine-tunes all the same"
    )
