"""Whether models on disk can be loaded, told in seconds without loading their weights.

A folder that is there may be half a download, a repository's pointers, or a model of other classes. Each
function returns a line a problem, with what to do; none means that it can be loaded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, UNet2DConditionModel

from igd_lib.models.folder import INDEX
from igd_lib.tools import tensors

Part = Literal["transformer", "vae"]
_FILE = "diffusion_pytorch_model"
# The names that an autoencoder's attention had before 2023, as published files still have them.
_FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def problems(
    folder: str | Path,
    *,
    classes: int | None = None,  # how many its DiT has to know
    image_size: int | None = None,  # px a side of the images that it has to make
    parts: Sequence[Part] = ("transformer", "vae"),  # those that are read from this folder
    vae: str | Path | None = None,  # the folder of the autoencoder that is used, where it is another one
) -> list[str]:
    """What keeps a folder from being loaded as the pipeline that is wanted, a line a problem.

    Looked at are the files that `IGDPipeline.from_pretrained` (for the autoencoder alone,
    `AutoencoderKL.from_pretrained`, of a pipeline or of a folder of its own) reads, their lengths, their
    tensors' names and shapes, the number of classes, and whether transformer, autoencoder and images fit each
    other. Values are not looked at.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is no folder; download or copy the model's folder there"]
    if "transformer" not in parts:
        return _Stored(_autoencoder_in(folder), AutoencoderKL).lines
    if lines := _of_index(folder, "vae" in parts and vae is None):
        return lines
    transformer = _Stored(folder / "transformer", DiTTransformer2DModel)
    autoencoder = _Stored(_autoencoder_in(Path(vae) if vae is not None else folder), AutoencoderKL)
    lines = transformer.lines + (autoencoder.lines if "vae" in parts else [])
    return lines + _misfits(transformer, autoencoder, classes, image_size)


def problems_of_autoencoder(folder: str | Path) -> list[str]:
    """`problems` of an autoencoder alone, in a folder of its own or in a pipeline's."""
    return problems(folder, parts=("vae",))


def problems_of_decoder(folder: str | Path, *, latent_channels: int | None = None) -> list[str]:
    """What keeps a folder from being loaded as a small guidance decoder (TAESD's), a line a problem.

    latent_channels: those of the autoencoder in whose place it decodes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is no folder; download or copy the decoder's folder there"]
    decoder = _Stored(folder, AutoencoderTiny)
    own = decoder.value("latent_channels")
    if latent_channels is not None and own is not None and own != latent_channels:
        return [
            *decoder.lines,
            f"{folder} decodes latents of {own} channels, and the autoencoder has {latent_channels}; take "
            "the decoder that was made for this autoencoder",
        ]
    return decoder.lines


def problems_of_stable_diffusion(folder: str | Path) -> list[str]:
    """What keeps a folder from being loaded as Stable Diffusion, from safetensors alone, a line a problem.

    Its network's and autoencoder's tensors are compared with their configurations; of the text encoder and
    the tokenizer it is only looked whether their files are there.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return [f"{folder} is no finished pipeline, it has no {INDEX}; download or copy the whole folder"]
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    lines = [line for name, kind in parts.items() for line in _Stored(folder / name, kind).lines]
    needed = ["text_encoder/model.safetensors", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
    needed += [f"{name}/{_FILE}.safetensors" for name in parts]
    lacking = [name for name in needed if not (folder / name).is_file()]
    lines += [f"{folder} lacks {name}; download it into the folder" for name in lacking]
    return list(dict.fromkeys(lines))


def _autoencoder_in(folder: Path) -> Path:
    """A pipeline's autoencoder, or a folder that is one."""
    return folder / "vae" if (folder / INDEX).exists() or (folder / "vae").is_dir() else folder


def _of_index(folder: Path, own_vae: bool) -> list[str]:
    """What is wrong with a pipeline's index, and with the parts that are configured alone."""
    try:
        index = _json(folder / INDEX)
    except FileNotFoundError:
        whose = (
            "these are a model's own files, which belong into a subfolder; download the whole repository"
            if (folder / "config.json").is_file()
            else "download or copy the whole folder"
        )
        return [f"{folder} is no finished pipeline, it has no {INDEX}; {whose}"]
    except ValueError as error:
        return [str(error)]
    wanted = ("transformer", "scheduler", *(("vae",) if own_vae else ()))
    if lacking := [name for name in wanted if not isinstance(index.get(name), list)]:
        return [
            f"{folder / INDEX} names no {lacking[0]}, it is that of a {index.get('_class_name')}; a "
            "DiTPipeline's folder is needed"
        ]
    if not hasattr(diffusers, str(index["scheduler"][-1])):
        return [f"{folder / INDEX} names a scheduler that diffusers has not, {index['scheduler'][-1]}"]
    try:
        _json(folder / "scheduler" / "scheduler_config.json")
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    return []


def _misfits(
    transformer: _Stored, autoencoder: _Stored, classes: int | None, image_size: int | None
) -> list[str]:
    """Where the configurations do not fit what is wanted, or each other."""
    lines, known = [], transformer.value("num_embeds_ada_norm")
    if classes is not None and known is not None and known != classes:
        lines.append(
            f"{transformer.folder}: the DiT knows {known} classes, and {classes} are wanted; take one of "
            "these classes, or fine-tune one: igd finetune DATASET FOLDER"
        )
    channels, theirs = transformer.value("in_channels"), autoencoder.value("latent_channels")
    if channels is not None and theirs is not None and channels != theirs:
        lines.append(
            f"{transformer.folder} makes latents of {channels} channels, and the autoencoder in "
            f"{autoencoder.folder} has {theirs}; take the autoencoder that this DiT was trained with"
        )
    side, blocks = transformer.value("sample_size"), autoencoder.value("block_out_channels")
    if image_size is not None and side is not None and blocks is not None:
        factor = 2 ** (len(blocks) - 1)
        made = side * factor
        if made != image_size:
            lines.append(
                f"{transformer.folder} makes images of {side} x {factor} = {made} px, and the data's have "
                f"{image_size} px; take a DiT of {image_size} px, or load the data at {made} px"
            )
    return lines


# --- one model's folder


@dataclass(frozen=True)
class _Stored:
    """A model as `save_pretrained` writes it: config.json, and a file or several of weights."""

    folder: Path
    kind: Any  # the diffusers class it has to be

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration. Raises FileNotFoundError or ValueError that says what to do."""
        path = self.folder / "config.json"
        found = _json(path)
        name = found.get("_class_name", self.kind.__name__)
        former = name == "Transformer2DModel" and found.get("norm_type") == "ada_norm_zero"
        if name != self.kind.__name__ and not (former and self.kind is DiTTransformer2DModel):
            raise ValueError(f"{path} is of a {name}; {self.kind.__name__} is needed, take another model")
        return found

    def value(self, name: str) -> Any:
        """What the configuration says, or its class's default; None where it cannot be read."""
        try:
            config = self.config
        except (FileNotFoundError, ValueError):
            return None
        return config.get(name, inspect.signature(self.kind.__init__).parameters[name].default)

    @property
    def lines(self) -> list[str]:
        """What keeps it from being loaded."""
        try:
            wanted = self._wanted()
            files = self._weights()
            stored = {name: shape for path in files for name, shape in tensors.shapes(path).items()}
        except (FileNotFoundError, ValueError) as error:
            return [str(error)]
        if len(files) == 1:  # diffusers knows former names in a single file alone
            stored = {_present_name(name, wanted): shape for name, shape in stored.items()}
        line = tensors.difference(stored, wanted)
        remedy = "its weights are another model's than its config.json's; download both again"
        return [f"{self.folder}: {line}: {remedy}"] if line else []

    def _wanted(self) -> tensors.Shapes:
        """The tensors of the model that the configuration describes."""
        known = inspect.signature(self.kind.__init__).parameters
        options = {name: value for name, value in self.config.items() if name in known}
        try:
            return _tensors_of(self.kind, json.dumps(options, sort_keys=True))
        except Exception as error:  # whatever a wrong value leads to
            raise ValueError(
                f"{self.folder / 'config.json'} describes no {self.kind.__name__} ({error}); download it "
                "again"
            ) from error

    def _weights(self) -> list[Path]:
        """The files that are read: those of the index, else the safetensors file, else the torch file."""
        index = self.folder / f"{_FILE}.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} names no files of weights; download it again") from error
            lacking = [name for name in names if not (self.folder / name).is_file()]
            if lacking:
                raise FileNotFoundError(
                    f"{self.folder} lacks {len(lacking)} of the {len(names)} files that {index.name} names, "
                    f"the first is {lacking[0]}; download what is missing"
                )
            return [self.folder / name for name in names]
        for suffix in (".safetensors", ".bin"):
            if (self.folder / f"{_FILE}{suffix}").is_file():
                return [self.folder / f"{_FILE}{suffix}"]
        variants = sorted(path.name for path in self.folder.glob(f"{_FILE}.*.safetensors"))
        what = f"; there is {variants[0]}, which is another precision's" if variants else ""
        raise FileNotFoundError(
            f"{self.folder} holds no weights, neither {_FILE}.safetensors nor {_FILE}.bin{what}; download "
            "the file into it"
        )


@lru_cache(maxsize=8)
def _tensors_of(kind: Any, options: str) -> tensors.Shapes:
    """A model's tensors, of its options as JSON: it is built without memory, once for all shards."""
    with torch.device("meta"):
        model = kind(**json.loads(options))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _present_name(name: str, wanted: tensors.Shapes) -> str:
    """A tensor's name as the model has it, where it was saved under a former one."""
    for former, present in _FORMER.items():
        if former in name and (renamed := name.replace(former, present)) in wanted:
            return renamed
    return name


def _json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError or ValueError that says what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download or copy the whole folder")
    tensors.refuse_pointer(path)
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object; download it again")
    return found
