"""What of a sampled set is shared, what its card says, and what all kinds of work (`kinds`) share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from igd_lib.sets import sums, terms
from igd_lib.sets.cards import Card, evaluation
from igd_lib.sets.export import FinishedSet
from igd_lib.sets.hub import Shareable
from igd_lib.sets.terms import Ingredient
from igd_lib.tools import files

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Declared:
    """What the one who shares has to say where the work itself does not."""

    derived_from_imagenet: bool = False  # yes: I may share what is derived from ImageNet's images
    licence: str = ""  # of weights: the hub's identifier, or a name
    data_licence: str = ""  # of the images that it was made with


class SharedSet(FinishedSet, Protocol):
    """What is shared of a sampled set, beside what an export reads."""

    @property
    def seconds(self) -> float: ...

    def verify(self) -> list[str]: ...

    def latent_path(self, label: int, index: int) -> Path: ...


# --- sampled sets


def of_set(found: SharedSet, declared: Declared | None = None) -> Shareable:
    """A set that a diffusion model sampled: manifest, images, latents.

    Raises ValueError for one that is not whole or not as it was sampled (the first thing is named), or that
    does not say how it was made.
    """
    declared = declared or Declared()
    manifest, path = found.manifest, found.path
    if manifest.get("kind") != "set" or not isinstance(manifest.get("settings"), dict):
        raise ValueError(
            f"{path / MANIFEST} does not say how the set was made; only sets of igd_lib are shared"
        )
    if problems := found.verify():
        raise ValueError(f"{path} is not whole: {problems[0]}; igd verify --repair, then distil again")
    settings = manifest["settings"]
    digests = {part: settings[part] for part in ("transformer", "vae") if part in settings}
    models = terms.dit_of(settings["model"], digests, declared.licence)
    data = terms.data_of(manifest["dataset"], found.classes, "sampled", declared.data_licence)
    count, size = len(found.selected) * found.ipc, manifest["image_size"]
    line, protocol = evaluation(manifest["dataset"], size)
    card = Card(
        kind="set",
        of=f"{manifest['dataset']}, {found.ipc} images a class, seed {manifest['seed']}",
        dataset=manifest["dataset"],
        classes=found.classes,
        label_ids=tuple(manifest["label_ids"]),
        statements=(
            f"{count:,} images, {terms.ORIGINS['sampled']}: none of them is a real one.",
            *_some_classes(found),
        ),
        ingredients=(*models, *_surrogate_of(settings), data),
        settings=settings,
        use=f"```\n{line}\n```",
        made_by=made_by(manifest),
        created=created(path, MANIFEST),
        seconds=round(found.seconds, 1),
        images=count,
        image_size=size,
        png=True,
        protocol=protocol,
    )
    places = (
        place(label, i) for place in (found.image_path, found.latent_path) for label, i in _items(found)
    )
    return Shareable(card, _within(path, [path / MANIFEST, *places]))


def _items(found: SharedSet) -> Iterator[tuple[int, int]]:
    return ((label, index) for label in found.selected for index in range(found.ipc))


def _some_classes(found: SharedSet) -> tuple[str, ...]:
    lacking = len(found.classes) - len(found.selected)
    return (f"{lacking} of its classes have no images.",) if lacking else ()


def _surrogate_of(settings: Mapping[str, Any]) -> tuple[Ingredient, ...]:
    """The checkpoints that guided a set."""
    own = settings.get("checkpoints")
    if not own:
        return ()
    digests = {f"epoch {epoch:g}": value for epoch, value in zip(own["epochs"], own["weights"], strict=True)}
    note = "Its weights guided the images, and are no part of them"
    return (Ingredient("the surrogate's checkpoints", terms.APACHE, note, digests=digests, binds=False),)


# --- folders


def _within(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in paths}


def only(folder: Path, names: Sequence[str], *passed: str) -> dict[str, Path]:
    """These files of a folder. Raises ValueError naming any other that is there, locks and cards aside.

    passed: beginnings of names that are looked at elsewhere.
    """
    known = {*names, *sums.BESIDE}
    for name in sums.listed(folder):
        lock = Path(name).name.startswith(".") and name.endswith(files.LOCK)
        if name not in known and not lock and not name.startswith(passed):
            raise ValueError(f"{folder / name} is no part of what is shared: remove it first")
    return {name: folder / name for name in names}


def made_by(note: Mapping[str, Any]) -> str:
    """The package's version and revision, as far as a manifest or a file has them."""
    version = note.get("versions", {}).get("igd_lib")
    parts = [f"igd_lib {version}"] if version else []
    parts += [f"revision {note['revision']}"] if note.get("revision") else []
    return ", ".join(parts) or "a version that its files do not note"


def created(folder: Path, manifest: str) -> str:
    """The day, in UTC, of a pulled folder as its card has it, else when its manifest was last written."""
    if (folder / sums.CARD).is_file():
        known = sums.read_json(folder / sums.CARD)
        if isinstance(known, dict) and "created" in known:
            return str(known["created"])
    return datetime.fromtimestamp((folder / manifest).stat().st_mtime, UTC).strftime("%Y-%m-%d")
