"""Fakes of what the paper's scale needs, in the real layouts and in seconds: what rehearsals in CI run on.

Images are noise with a tint a class, models are random and tiny; all are the same every time. Their names,
formats, configurations and class lists are those of the real ones. Numbers of images are not, so nothing but
a rehearsal takes them.

    python ci/fakes.py FOLDER [--extras]
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from igd_lib.baselines.img2img import SD_15
from igd_lib.baselines.minimax import Minimax, Shards
from igd_lib.baselines.tuning import TRANSFORMER
from igd_lib.data.datasets import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    DATASETS,
    FOOD_CLASSES,
    IMAGENET_CLASSES,
)
from igd_lib.data.sources.cifar import CIFAR, PIXELS
from igd_lib.models.folder import dit_scheduler, write_pipeline
from igd_lib.tools import files

TRAIN, TEST = 3, 2  # images a class, ...
MORE = 8  # ... and for training of those that a rehearsal takes: the first of every data set
REHEARSED = {name for spec in DATASETS.values() for name in spec.classes[:2]}
# How an image is stored: ImageNet has some of each kind, all called .JPEG.
KINDS = ("RGB", "L", "CMYK", "PNG", "RGB")
DONE = "fakes.json"  # written last


def make(root: str | Path, *, extras: bool = False, cifar_px: int = 32) -> dict[str, str]:
    """Make the fakes in the new folder `root`; returns the environment in which they are found.

    extras: also what a rehearsal can do without: fastai's subsets, Minimax models (one of them in shards),
    TAESD and Stable Diffusion. cifar_px: the size of CIFAR's DiTs' images, 32, or 256 as `igd finetune` makes
    them of DiT-XL/2. A folder that `make` finished with the same options is left as it is. Raises
    FileExistsError for another.
    """
    root = Path(root).resolve()
    options = {"extras": extras, "cifar_px": cifar_px}
    if not (root / DONE).is_file() or json.loads((root / DONE).read_text()) != options:
        if root.is_dir() and any(root.iterdir()):
            raise FileExistsError(f"{root} is not empty; remove it, or choose another folder")
        _images(root / "data", extras)
        _models(root / "cache" / "models", extras, cifar_px)
        (root / DONE).write_text(json.dumps(options))
    return {
        "IGD_DATA": str(root / "data"),
        "IGD_CACHE": str(root / "cache"),
        "IGD_ALLOW_CPU": "1",
        "HF_HUB_OFFLINE": "1",
        # Nothing that this machine happens to have: a run is the same everywhere.
        "HF_HOME": str(root / "huggingface"),
        "TORCH_HOME": str(root / "torch"),
    }


# --- images


def _images(data: Path, extras: bool) -> None:
    imagenet(data / "imagenet")
    food(data / "food-101")
    for name, classes in (("cifar-10", CIFAR10_CLASSES), ("cifar-100", CIFAR100_CLASSES)):
        cifar(data, name, len(classes))
    if extras:
        for name in ("imagenette2", "imagewoof2"):
            class_folders(data / name, DATASETS[f"fastai-{name}"].classes)


def photograph(name: str, tint: int, kind: str = "RGB") -> bytes:
    """A file's content: noise of 60 to 90 px a side, tinted; its seed is the name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    height, width = random.integers(60, 91, 2)
    colour = np.random.default_rng(tint).integers(0, 160, 3)
    pixels = (random.integers(0, 96, (height // 4, width // 4, 3)) + colour).astype(np.uint8)
    image = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.NEAREST)
    file = BytesIO()
    if kind == "PNG":
        image.save(file, "PNG", compress_level=1)
    else:
        image.convert(kind).save(file, "JPEG", quality=75)
    return file.getvalue()


def class_folders(base: Path, classes: Sequence[str]) -> None:
    """ImageNet's two sorted splits, `train/WNID/WNID_N.JPEG` and `val/WNID/ILSVRC2012_val_N.JPEG`."""
    for index, wnid in enumerate(classes):
        tint, count = IMAGENET_CLASSES.index(wnid), MORE if wnid in REHEARSED else TRAIN
        named = {f"train/{wnid}/{wnid}_{number}.JPEG": number for number in range(count)}
        first = index * TEST + 1
        named |= {f"val/{wnid}/ILSVRC2012_val_{first + n:08d}.JPEG": count + n for n in range(TEST)}
        for split in ("train", "val"):
            (base / split / wnid).mkdir(parents=True)
        for name, number in named.items():
            kind = KINDS[(index + number) % len(KINDS)]
            (base / name).write_bytes(photograph(f"{base.name}/{name}", tint, kind))


def imagenet(base: Path) -> None:
    """ImageNet-1K as its users have it: validation images sorted by wnid, those for the contest flat."""
    class_folders(base, IMAGENET_CLASSES)
    (base / "test").mkdir()
    for number in range(2):
        name = f"ILSVRC2012_test_{number + 1:08d}.JPEG"
        (base / "test" / name).write_bytes(photograph(name, number))


def food(base: Path) -> None:
    """Food-101 as torchvision leaves it."""
    listed: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for index, name in enumerate(FOOD_CLASSES):
        (base / "images" / name).mkdir(parents=True)
        count = MORE if name in REHEARSED else TRAIN
        for split, numbers in (("train", range(count)), ("test", range(count, count + TEST))):
            listed[split][name] = [f"{name}/{1000 * index + number}" for number in numbers]
            for image in listed[split][name]:
                (base / "images" / f"{image}.jpg").write_bytes(photograph(image, index))
    (base / "meta").mkdir()
    for split, images in listed.items():
        (base / "meta" / f"{split}.json").write_text(json.dumps(images))
        lines = [image for own in images.values() for image in own]
        (base / "meta" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (base / "meta" / "classes.txt").write_text("\n".join(FOOD_CLASSES) + "\n")
    titles = (name.replace("_", " ").capitalize() for name in FOOD_CLASSES)
    (base / "meta" / "labels.txt").write_text("\n".join(titles) + "\n")


def cifar(data: Path, name: str, classes: int) -> None:
    """CIFAR's binary version, from its authors' archive.

    torchvision's files are read only where their md5 is the published one, so they cannot be faked; of these
    the published sum is compared where a split has the published number of images.
    """
    kind = CIFAR[name]
    folder = data / kind.folder
    folder.mkdir(parents=True)
    for names, count in ((kind.train, MORE + 2), (kind.test, TEST)):
        random = np.random.default_rng(len(names))
        labels = np.tile(np.arange(classes, dtype=np.uint8), count)
        tints = np.random.default_rng(classes).integers(0, 160, (classes, 3))
        noise = random.integers(0, 96, (len(labels), 3, PIXELS // 3))
        pixels = (noise + tints[labels][:, :, None]).astype(np.uint8).reshape(len(labels), -1)
        coarse = [np.zeros_like(labels)[:, None]] * (kind.label_bytes - 1)
        records = np.concatenate([*coarse, labels[:, None], pixels], axis=1)
        for file, part in zip(names, np.array_split(records, len(names)), strict=True):
            part.tofile(folder / file)
    known = DATASETS[name].classes
    (folder / kind.names).write_text("\n".join(known) + "\n")


# --- models


def _models(models: Path, extras: bool, cifar_px: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = autoencoder()
        published(models / "DiT-XL-2-256")
        vae.save_pretrained(models / "sd-vae-ft-mse")
        with_former_names(models / "sd-vae-ft-mse")
        for name, side in (("food-101", 256), ("cifar-10", cifar_px), ("cifar-100", cifar_px)):
            classes = DATASETS[name].classes
            fine_tuned(models / f"DiT-{name}", transformer(len(classes), side), vae, "finetune", classes)
        if extras:
            tiny_decoder().save_pretrained(models / "taesd")
            folder = models / SD_15[0].split("/")[-1]
            stable_diffusion(vae, latent_px=64, words=folder / "tokenizer").save_pretrained(folder)
            for name in ("imagenette", "imagewoof"):
                own = DATASETS[name].classes
                fine_tuned(models / f"Minimax-{name}", transformer(1000, 256), vae, "minimax", own)
            division = Shards(models / "Minimax-imagenet", IMAGENET_CLASSES, 2)
            for shard, labels in enumerate(division.labels):
                own = tuple(IMAGENET_CLASSES[label] for label in labels)
                fine_tuned(division.path(shard), transformer(1000, 256), vae, "minimax", own)


def transformer(classes: int, image_px: int) -> DiTTransformer2DModel:
    """A random DiT of two layers with a learned variance, as DiT's authors' have it."""
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=image_px // 8,
        patch_size=2,
        num_embeds_ada_norm=classes,
    ).eval()


def autoencoder() -> AutoencoderKL:
    """A random autoencoder of four blocks (factor 8), 4 latent channels and few others."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=0.18215,
    ).eval()


def tiny_decoder() -> AutoencoderTiny:
    """Random, in TAESD's format."""
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )


def stable_diffusion(vae: AutoencoderKL, latent_px: int, words: Path) -> Any:
    """A random img2img pipeline of a few channels, with SD-1.5's scheduler; it reads letter by letter.

    Its tokenizer's files are written into the folder `words`. Raises ImportError without transformers.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=latent_px,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        tokenizer = letters(words)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = CLIPTextConfig(
            vocab_size=60,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.eos_token_id,
            **ends,
        )
        encoder = CLIPTextModel(text)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def letters(folder: Path) -> Any:
    """A CLIP tokenizer that knows single letters, 30 of them at most."""
    from transformers import CLIPTokenizer

    known = "abcdefghijklmnopqrstuvwxyz,"
    vocabulary = [*known, *(f"{letter}</w>" for letter in known), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=30)


def published(folder: Path) -> None:
    """`facebook/DiT-XL-2-256`: torch files, and the class and options that diffusers 0.12 had for it."""
    names = {str(index): name for index, name in enumerate(DATASETS["imagenet"].names)}
    write_pipeline(folder, transformer(1000, 256), autoencoder(), dit_scheduler(), names)
    for part in ("transformer", "vae"):
        kind = DiTTransformer2DModel if part == "transformer" else AutoencoderKL
        kind.from_pretrained(folder / part).save_pretrained(folder / part, safe_serialization=False)
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    config, version = folder / "transformer" / "config.json", {"_diffusers_version": "0.12.0.dev0"}
    options = json.loads(config.read_text())
    del options["norm_eps"]
    former = dict(cross_attention_dim=None, num_vector_embeds=None, only_cross_attention=False)
    former |= dict(_class_name="Transformer2DModel", use_linear_projection=False)
    config.write_text(json.dumps(options | former | version, indent=2))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index | version, indent=2))


def with_former_names(folder: Path) -> None:
    """`stabilityai/sd-vae-ft-mse`: its attention as it was called before 2023, in two formats."""
    path = folder / "diffusion_pytorch_model.safetensors"
    pairs = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
    state = load_file(path)
    for present, former in pairs:
        state = {name.replace(present, former): value for name, value in state.items()}
    save_file(state, path)
    torch.save(state, path.with_suffix(".bin"))


def fine_tuned(
    folder: Path, model: DiTTransformer2DModel, vae: AutoencoderKL, kind: str, classes: Sequence[str]
) -> None:
    """A pipeline as `igd finetune` and `igd minimax` write it, with their note of what it was tuned on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    note: dict[str, Any] = {"kind": kind, "settings": {"classes": list(classes)}}
    note[TRANSFORMER] = files.digest(model.state_dict())
    if kind == "minimax":
        note["settings"]["recipe"] = {"steps": Minimax().steps}
    names = {str(label): name for label, name in enumerate(classes)} if kind == "finetune" else None
    write_pipeline(folder, model, vae, dit_scheduler(), names, {f"{kind}.json": json.dumps(note, indent=2)})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", action="store_true", help="also what a rehearsal can do without")
    parser.add_argument("--cifar-px", type=int, choices=(32, 256), default=32, help="of CIFAR's DiTs")
    given = parser.parse_args(arguments)
    found = make(given.folder, extras=given.extras, cifar_px=given.cifar_px)
    print("\n".join(f"export {name}={value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
