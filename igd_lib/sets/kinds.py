"""What may be shared of other kinds of work than sampled sets, and what their cards say.

Other methods' sets, surrogates with their class gradients, fine-tuned DiTs, adapters. Real images, and the
weights of others, are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel

from igd_lib.data.datasets import DATASETS
from igd_lib.sets import learned, sums, terms
from igd_lib.sets.cards import Card, evaluation
from igd_lib.sets.hub import Shareable
from igd_lib.sets.shareable import MANIFEST, Declared, created, made_by, only
from igd_lib.sets.terms import Ingredient
from igd_lib.tools import files, keys

TRAJECTORY, INDEX = "trajectory.json", "model_index.json"
ADAPTER = "adapter.safetensors"
GRADIENTS = "gradients"  # the folder of a surrogate's class gradients
# By the notes, KIND.json, of fine-tuned pipelines.
TUNINGS = {"minimax": "Minimax", "finetune": "its own loss"}
PARTS = ("transformer", "vae", "scheduler")  # of a pipeline's folder
METHODS = {
    "dm": "DM",
    "idc": "IDC-1",
    "datm": "DATM",
    "sre2l": "SRe2L",
    "gvbsm": "G-VBSM",
    "d4m": "D4M",
    "tdsdm": "TDSDM",
    "rded": "RDED",
    "coreset": "a coreset",
}


# --- other methods' sets


def of_method(folder: Path, manifest: Mapping[str, Any], declared: Declared) -> Shareable:
    """A set that one of the compared methods made, from its folder in the cache.

    Raises ValueError for real images, and without a yes for what is derived from ImageNet's.
    """
    kind, about = manifest["kind"], manifest["settings"]
    name, dataset, settings = METHODS[kind], about["data"], about.get("settings", {})
    origin = terms.origin_of(kind, settings)
    terms.refuse_real(f"the images of {name} in {folder}", origin)
    names, classes, size = images_of(folder, dataset)
    if terms.is_imagenet(classes) and not declared.derived_from_imagenet:
        raise ValueError(
            f"{folder}: the images are {terms.ORIGINS[origin]}, ImageNet's, whose terms say who may "
            "have them; if you may share them, say so: --derived-from-imagenet-ok"
        )
    models = terms.backbone_of(about["model"], declared.licence) if "model" in about else ()
    line, protocol = evaluation(dataset, size)
    data = terms.data_of(dataset, classes, origin, declared.data_licence)
    card = Card(
        kind="set",
        of=f"{name}: {dataset}, {about['ipc']} images a class, seed {about['seed']}",
        dataset=dataset,
        classes=classes,
        label_ids=tuple(about["model"].get("label_ids", ())) if models else (),
        statements=(f"Its images are **{terms.ORIGINS[origin]}** ({_split(about)}).",),
        ingredients=(*models, data),
        settings=dict(about),
        use=f"```\n{line}\n```",
        made_by=made_by(sums.note(folder / names[0])),
        created=created(folder, MANIFEST),
        images=len(classes) * about["ipc"],
        image_size=size,
        protocol=protocol,
    )
    return Shareable(card, only(folder, [MANIFEST, *names]))


def _split(about: Mapping[str, Any]) -> str:
    return f"{about['images']:,} of {about['data']}, {about['split']}"


def images_of(folder: Path, dataset: str) -> tuple[list[str], tuple[str, ...], int]:
    """The files of a method's set, its classes in label order, and its images' side in px."""
    whole = folder / learned.FILE
    if whole.is_file():
        classes = tuple(sums.note(whole).get("classes", ()))
        return [learned.FILE], classes, _side(whole)
    classes = classes_of(folder, dataset)
    names = [f"{label:05d}.safetensors" for label in range(len(classes))]
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not whole: it lacks {len(lacking)} classes, the first is {lacking[0]}")
    return names, classes, _side(folder / names[0])


def classes_of(folder: Path, dataset: str) -> tuple[str, ...]:
    """The classes of a set whose files do not name them: its card's, else the data set's.

    Raises ValueError for a data set that is not known here.
    """
    if (folder / sums.CARD).is_file():
        return tuple(sums.read_json(folder / sums.CARD)["classes"])
    if dataset not in DATASETS or not DATASETS[dataset].classes:
        raise ValueError(f"{folder}: the classes of {dataset}, in order, are not known here")
    return DATASETS[dataset].classes


def _side(path: Path) -> int:
    """Of the images of a file, in px."""
    try:
        return int(sums.header(path)["images"]["shape"][-1])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} holds no images") from error


# --- surrogates


def of_surrogate(folder: Path, declared: Declared) -> Shareable:
    """A surrogate's trajectory, with the class gradients that are beside it or in the cache.

    Raises ValueError for a folder without a trajectory's files.
    """
    manifest = sums.read_json(folder / TRAJECTORY)
    settings = manifest["settings"]
    states = sorted(path.name for path in folder.glob("[0-9]*.safetensors"))
    if not states or not (folder / "training.safetensors").is_file():
        raise ValueError(f"{folder} has no checkpoints, or no training state: train the surrogate to its end")
    gradients = _gradients(folder, manifest["key"])
    own = only(folder, [TRAJECTORY, "training.safetensors", *states], f"{GRADIENTS}/")
    dataset, classes = settings["data"], tuple(settings["classes"])
    licence = terms.licence_named(declared.licence) if declared.licence else terms.APACHE
    weights = Ingredient(f"the weights ({settings['network']})", licence, "Trained from scratch")
    epochs = [sums.note(folder / name)["epoch"] for name in states]
    about = f"{len(states)} checkpoints of a training of {epochs[-1]:g} epochs on {_split(settings)}."
    card = Card(
        kind="surrogate",
        of=f"{settings['network']}, {dataset}",
        dataset=dataset,
        classes=classes,
        label_ids=(),
        statements=(about, *_about_gradients(gradients)),
        ingredients=(weights, terms.data_of(dataset, classes, None, declared.data_licence)),
        settings=settings | {"saved_epochs": epochs},
        use=_use_of_surrogate(manifest["key"], gradients),
        made_by="a version that its files do not note",
        created=created(folder, TRAJECTORY),
    )
    return Shareable(card, own | gradients)


def _gradients(folder: Path, key: str) -> dict[str, Path]:
    """Class gradients of a surrogate: in its folder, else in the cache where it lies itself, by their key."""
    beside = folder / GRADIENTS
    every = beside if beside.is_dir() else folder.parent.parent / GRADIENTS
    found: dict[str, Path] = {}
    for place in sorted(every.glob("*")):
        paths = sorted(place.glob("[0-9]*.safetensors"))
        if paths and _is_of(sums.note(paths[0]), key, place.name):
            found |= {f"{GRADIENTS}/{place.name}/{path.name}": path for path in paths}
    return found


def _is_of(note: Mapping[str, Any], surrogate: str, key: str) -> bool:
    """Whether class gradients in a folder of that key are of that surrogate."""
    own = {"surrogate": surrogate, "images": note.get("images"), "epochs": note.get("epochs")}
    return keys.key("gradients", own) == key


def _about_gradients(gradients: Mapping[str, Path]) -> tuple[str, ...]:
    if not gradients:
        return ()
    number = next(iter(map(sums.note, gradients.values())))["images"]
    images = "all images" if number is None else f"the first {number} images"
    return (f"With class gradients, each a mean over {images} of a class, of {len(gradients)} files.",)


def _use_of_surrogate(key: str, gradients: Mapping[str, Path]) -> str:
    lines = ["`train_surrogate(..., folder=FOLDER)` with the same settings reads it instead of training."]
    lines.append(f"Notebooks find it where it is pulled to `$IGD_CACHE/surrogate/{key}`")
    lines[-1] += f", and its class gradients where `{GRADIENTS}/*` are copied to `$IGD_CACHE/{GRADIENTS}/`."
    return " ".join(lines) if gradients else f"{lines[0]} {lines[1].split(', and its')[0]}."


# --- fine-tuned DiTs


def of_backbone(folder: Path, declared: Declared) -> Shareable:
    """A pipeline that igd_lib fine-tuned. Raises ValueError for any other: its weights are its authors'."""
    kind = next((kind for kind in TUNINGS if (folder / f"{kind}.json").is_file()), None)
    if kind is None:
        raise ValueError(
            f"{folder} does not say that it was fine-tuned here: others' weights are never pushed, a card "
            f"links to them ({terms.DIT_LINK})"
        )
    note = sums.read_json(folder / f"{kind}.json")
    settings, digest = note["settings"], note["transformer"]
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    if files.digest(model.state_dict()) != digest or digest == settings["model"]:
        raise ValueError(
            f"{folder}: its weights are not those that {kind}.json says were fine-tuned; they are not pushed"
        )
    dataset, classes = settings["data"], tuple(settings["classes"])
    names = [f"{kind}.json", INDEX, *_parts(folder)]
    data = terms.data_of(dataset, classes, None, declared.data_licence)
    changed = (
        f"The transformer was **changed** by fine-tuning on {dataset} ({TUNINGS[kind]}); the autoencoder "
        "and the scheduler are as they were."
    )
    card = Card(
        kind="backbone",
        of=f"{TUNINGS[kind]}, {dataset}",
        dataset=dataset,
        classes=classes,
        label_ids=_ids(kind, settings),
        statements=(f"A diffusers pipeline. {changed}",),
        ingredients=(*terms.dit_of(model.config, {"transformer": digest}, declared.licence), data),
        settings=settings,
        use=_use_of_backbone(kind, dataset),
        made_by="a version that its files do not note",
        created=created(folder, f"{kind}.json"),
    )
    return Shareable(card, only(folder, names))


def _parts(folder: Path) -> list[str]:
    """A pipeline's files but for those at its top."""
    return [name for name in sums.listed(folder) if name.partition("/")[0] in PARTS and "/" in name]


def _ids(kind: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The transformer's id of every class; none where the model is of a shard of them."""
    count = len(settings["classes"])
    known = range(count) if kind == "finetune" else settings["label_ids"]
    return tuple(known) if len(known) == count else ()


def _use_of_backbone(kind: str, dataset: str) -> str:
    name = f"Minimax-{dataset}" if kind == "minimax" else f"DiT-{dataset}"
    return (
        f"Notebooks find it where it is pulled to `$IGD_CACHE/models/{name}`; "
        "`IGDPipeline.from_pretrained(FOLDER)` loads it."
    )


# --- adapters


def of_adapter(folder: Path, manifest: Mapping[str, Any], declared: Declared) -> Shareable:
    """TDSDM's low-rank adapter: under the terms of the diffusion model that it is for."""
    about, path = manifest["settings"], folder / ADAPTER
    if not path.is_file():
        raise ValueError(f"{folder} has no {ADAPTER}: train it to its end")
    dataset = about["data"]
    classes = classes_of(folder, dataset)
    models = terms.backbone_of(about["model"], declared.licence)
    data = terms.data_of(dataset, classes, None, declared.data_licence)
    what = models[0].what
    card = Card(
        kind="adapter",
        of=f"TDSDM on {what}, {dataset}",
        dataset=dataset,
        classes=classes,
        label_ids=tuple(about["model"].get("label_ids", ())),
        statements=(
            f"A low-rank **change** of {what}, trained on {_split(about)}; it has none of its own weights.",
        ),
        ingredients=(*models, data),
        settings=about,
        use=f"Notebooks find it where it is pulled to `$IGD_CACHE/adapter/{manifest['key']}`.",
        made_by="a version that its files do not note",
        created=created(folder, MANIFEST),
    )
    return Shareable(card, only(folder, [MANIFEST, ADAPTER]))
