"""Under which terms work may be shared: where images come from, and the licences of data and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from igd_lib.data.datasets import IMAGENET_CLASSES

# What a set's images are, in words.
Origin = Literal["sampled", "real", "derived", "recovered"]
ORIGINS: dict[Origin, str] = {
    "sampled": "sampled by a diffusion model from noise",
    "real": "real images, whole or in parts",
    "derived": "derived from real images",
    "recovered": "recovered from networks that were trained on real images",
}
# By kind of work (`tools.keys`).
ORIGIN_OF: dict[str, Origin] = {
    "set": "sampled",
    "dm": "derived",
    "idc": "derived",
    "datm": "derived",
    "d4m": "derived",
    "tdsdm": "derived",
    "sre2l": "recovered",
    "gvbsm": "recovered",
    "rded": "real",
    "coreset": "real",
}


def origin_of(kind: str, settings: Mapping[str, Any]) -> Origin:
    """Where a set's images come from. A method that took no step has left real images as they were."""
    taken = settings.get("iterations", settings.get("outer", 1))
    if "strength" in settings:
        taken = int(settings["num_steps"] * settings["strength"])
    return ORIGIN_OF[kind] if taken else "real"


def refuse_real(what: str, origin: Origin) -> None:
    """Raise ValueError for real images."""
    if origin == "real":
        raise ValueError(
            f"{what} are {ORIGINS[origin]}: they are not this project's to give away, and are never pushed; "
            "whoever has the data set makes them anew from the same settings and seed"
        )


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether classes are ImageNet-1K's, by wnid: of the data set itself or of any part of it."""
    return bool(classes) and set(classes) <= set(IMAGENET_CLASSES)


# --- licences


@dataclass(frozen=True)
class Licence:
    """A licence by the hub's identifier ("other": none of its list), its name and where it can be read."""

    id: str
    name: str
    link: str


APACHE = Licence("apache-2.0", "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
MIT = Licence("mit", "MIT", "https://opensource.org/license/mit")
CC_BY_NC = Licence("cc-by-nc-4.0", "CC-BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/")
OPENRAIL_M = Licence(
    "creativeml-openrail-m",
    "CreativeML OpenRAIL-M",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
)
IMAGENET_TERMS = Licence("other", "ImageNet's terms of access", "https://www.image-net.org/download.php")
KNOWN = {licence.id: licence for licence in (APACHE, MIT, CC_BY_NC, OPENRAIL_M)}


def licence_named(text: str) -> Licence:
    """A licence by the hub's identifier, or any other by its name."""
    return KNOWN.get(text.lower()) or Licence("other", text, "")


@dataclass(frozen=True)
class Ingredient:
    """A model or a data set that shared work was made with, and its licence."""

    what: str
    licence: Licence | None  # None: it names none
    note: str = ""  # attribution, and what there is to say
    link: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)  # of weights, by part of the model
    binds: bool = True  # whether what is shared is under this licence too

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        own = self.licence
        return {
            "what": self.what,
            "licence": own and {"id": own.id, "name": own.name, "link": own.link},
            "note": self.note,
            "link": self.link,
            "digests": dict(self.digests),
            "binds": self.binds,
        }


def front_matter(ingredients: Sequence[Ingredient]) -> dict[str, Any]:
    """`license` as the hub has it: one identifier or several; "other", with a name, where one has none."""
    binding = [one for one in ingredients if one.binds]
    ids = list(dict.fromkeys(one.licence.id if one.licence else "other" for one in binding))
    if "other" not in ids:
        return {"license": ids[0] if len(ids) == 1 else ids}
    return {"license": "other", "license_name": "-and-".join(dict.fromkeys(map(_named, binding)))}


def _named(one: Ingredient) -> str:
    """An ingredient's licence as a word, as the hub wants names."""
    if one.licence is None:
        text = f"none named by {one.what}"
    else:
        text = one.licence.name if one.licence.id == "other" else one.licence.id
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("'", "")).strip("-")


_CIFAR = (
    "Cite A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images. "
    "Its images come from the withdrawn 80 Million Tiny Images"
)
DATA = {
    "cifar-10": Ingredient("CIFAR-10", None, _CIFAR, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar-100": Ingredient("CIFAR-100", None, _CIFAR, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "fashion-mnist": Ingredient(
        "Fashion-MNIST",
        MIT,
        "H. Xiao, K. Rasul, R. Vollgraf (2017), Zalando SE",
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
    "food-101": Ingredient(
        "Food-101",
        None,
        "Its images are from Foodspotting and not its authors' (Bossard, Guillaumin, "
        "Van Gool, 2014), for scientific fair use",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
}


def data_of(name: str, classes: Sequence[str], origin: Origin | None, declared: str = "") -> Ingredient:
    """The data set, and whether what was made with it is under its terms.

    ImageNet's bind what is derived from its images, or recovered from networks that saw them. Raises
    ValueError for data of an unknown licence, unless it is declared.
    """
    if is_imagenet(classes):
        note = "For non-commercial research and education; the images are their owners'"
        binds = origin in ("derived", "recovered")
        link = IMAGENET_TERMS.link
        return Ingredient(f"ImageNet ({name})", IMAGENET_TERMS, note, link, binds=binds)
    if name in DATA:
        return DATA[name]
    if not declared:
        raise ValueError(f"the licence of the images of {name} is not known here: name it, --data-licence")
    return Ingredient(name, licence_named(declared))


# --- diffusion models

DIT_LINK = "https://huggingface.co/facebook/DiT-XL-2-256"
DIT_NOTE = "DiT-XL/2 by W. Peebles and S. Xie (Meta), for non-commercial use"
VAE = Ingredient(
    "sd-vae-ft-mse", MIT, "Stability AI", "https://huggingface.co/stabilityai/sd-vae-ft-mse", binds=False
)
_XL = (28, 16, 72)  # layers, heads and their width: DiTTransformer2DModel's defaults too
_STAND_IN = (6, 4, 48)


def shape_of(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """A DiT's layers, heads and their width, from its configuration (or `sampling.architecture`)."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim")
    layers, heads, width = (architecture.get(name, usual) for name, usual in zip(names, _XL, strict=True))
    return layers, heads, width


def dit_of(
    architecture: Mapping[str, Any], digests: Mapping[str, str], declared: str = ""
) -> tuple[Ingredient, ...]:
    """A DiT and its autoencoder: known by shape, for what is fine-tuned from DiT-XL/2 keeps its terms.

    Raises ValueError for another one, unless its licence is declared.
    """
    shape = shape_of(architecture)
    own = {part: value for part, value in digests.items() if part != "vae"}
    vae = {part: value for part, value in digests.items() if part == "vae"}
    if shape == _XL:
        what = "facebook/DiT-XL-2-256, or what was fine-tuned from it"
        tuned = Ingredient(what, CC_BY_NC, DIT_NOTE, DIT_LINK, own)
        return tuned, Ingredient(VAE.what, VAE.licence, VAE.note, VAE.link, vae, binds=False)
    if shape == _STAND_IN:
        return (
            Ingredient(
                "a stand-in of igd_lib",
                APACHE,
                "Trained from scratch; nothing of others' weights is in it",
                digests=digests,
            ),
        )
    if not declared:
        raise ValueError(
            f"the licence of a DiT of {shape[0]} layers with {shape[1]} heads of {shape[2]} is not known "
            "here: name it, --licence"
        )
    return (Ingredient("a DiT", licence_named(declared), digests=digests),)


def stable_diffusion_of(digests: Mapping[str, str]) -> tuple[Ingredient, ...]:
    """Stable Diffusion 1.5, whose licence restricts what it, and what is made from it, is used for."""
    note = "Its use restrictions (Attachment A of the licence) go with everything that is made from it"
    link = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
    return (Ingredient("Stable Diffusion 1.5", OPENRAIL_M, note, link, digests),)


def backbone_of(about: Mapping[str, Any], declared: str = "") -> tuple[Ingredient, ...]:
    """What `baselines.img2img` says of its diffusion model."""
    digests = {part: about[part] for part in ("unet", "transformer", "vae", "text_encoder") if part in about}
    if about["backbone"] == "stable-diffusion":
        return stable_diffusion_of(digests)
    return dit_of(about["model"], digests, declared)
