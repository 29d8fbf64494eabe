"""What shared work says of itself: `card.json`, and for people `README.md` with front matter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCardData, ModelCardData

from igd_lib.data.datasets import DATASETS
from igd_lib.protocols import PROTOCOLS, usual_network, usual_protocol
from igd_lib.sets import sums
from igd_lib.sets.terms import Ingredient, front_matter
from igd_lib.tools.version import VERSION, git_revision

Kind = Literal["set", "surrogate", "backbone", "adapter"]
RepoType = Literal["dataset", "model"]
NOUNS: dict[Kind, str] = {
    "set": "Distilled set",
    "surrogate": "Surrogate",
    "backbone": "Fine-tuned DiT",
    "adapter": "Adapter",
}
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))  # images
BIBTEX = (
    "@inproceedings{chen2025influence,\n"
    "  title = {Influence-Guided Diffusion for Dataset Distillation},\n"
    "  author = {Chen, Mingyang and Du, Jiawei and Huang, Bo and Wang, Yi and Zhang, Xiaobo and Wang, Wei},\n"
    "  booktitle = {International Conference on Learning Representations (ICLR)},\n"
    "  year = {2025}\n"
    "}"
)


@dataclass(frozen=True)
class Card:
    """The facts about shared work."""

    kind: Kind
    of: str  # what it is in a line: "imagewoof, 10 images a class, seed 0"
    dataset: str
    classes: tuple[str, ...]  # in label order
    label_ids: tuple[int, ...]  # the diffusion model's, in label order; empty: it has none
    statements: tuple[str, ...]  # where it comes from and what was changed, a sentence or two each
    ingredients: tuple[Ingredient, ...]
    settings: Mapping[str, Any]
    use: str  # how it is used once it is pulled to FOLDER: Markdown
    made_by: str  # package version and revision, as the work notes them
    created: str  # YYYY-MM-DD
    seconds: float | None = None  # that sampling took; None: not noted
    images: int = 0
    image_size: int = 0  # px
    png: bool = False  # whether its images are PNG files
    protocol: str = ""  # that `use` evaluates under
    pushed_by: str = field(default_factory=lambda: f"igd_lib {VERSION}, revision {git_revision()}")

    @property
    def repo_type(self) -> RepoType:
        """What the hub calls it."""
        return "dataset" if self.kind == "set" else "model"

    @property
    def title(self) -> str:
        return f"{NOUNS[self.kind]}: {self.of}"

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names for people."""
        spec = DATASETS.get(self.dataset)
        known = dict(zip(spec.classes, spec.names, strict=True)) if spec else {}
        return tuple(known.get(name, name) for name in self.classes)

    def record(self) -> dict[str, Any]:
        """JSON-able: `card.json`."""
        return {
            "kind": self.kind,
            "of": self.of,
            "dataset": self.dataset,
            "classes": list(self.classes),
            "names": list(self.names),
            "label_ids": list(self.label_ids),
            "statements": list(self.statements),
            "licence": front_matter(self.ingredients),
            "ingredients": [one.record() for one in self.ingredients],
            "settings": dict(self.settings),
            "use": self.use,
            "protocol": self.protocol,
            "seconds": self.seconds,
            "images": self.images,
            "image_size": self.image_size,
            "made_by": self.made_by,
            "pushed_by": self.pushed_by,
            "created": self.created,
        }


def evaluation(dataset: str, image_size: int) -> tuple[str, str]:
    """The line that evaluates a set of images of that size (px) in FOLDER, and its protocol in words."""
    usual, network = usual_protocol(image_size, soft=False), usual_network(image_size)
    side = usual.image_size
    size = f" --image-size {side}" if side != PROTOCOLS[usual.name].image_size else ""
    real = dataset if dataset in DATASETS else "REAL_FOLDER"
    line = f"igd evaluate FOLDER {real} --protocol {usual.name}{size} --network {network}"
    words = f"{usual.name} at {side} px, {network}, {len(usual.seeds)} training seeds, top-1 {usual.reported}"
    return line, words


# --- for people


def text(card: Card, repo: str) -> str:
    """`README.md` of what is pushed to `repo`: the hub's front matter, then what a reader needs to know."""
    parts = [
        f"# {card.title}",
        " ".join(card.statements),
        *_terms(card),
        *_use(card, repo),
        *_classes(card),
        *_ingredients(card.ingredients),
        *_making(card),
        "## Cite",
        f"```bibtex\n{BIBTEX}\n```",
    ]
    return f"---\n{_front_matter(card)}---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    """YAML."""
    tags = ["dataset-distillation", "influence-guided-diffusion", "igd_lib", card.kind, card.dataset]
    common: dict[str, Any] = front_matter(card.ingredients) | {"tags": tags}
    base = card.ingredients[0].link.removeprefix("https://huggingface.co/")
    if card.kind in ("backbone", "adapter") and base != card.ingredients[0].link:
        common["base_model"] = base
    if card.repo_type == "model":
        return _block(ModelCardData(**common).to_yaml())
    size = next((name for most, name in SIZES if card.images < most), "1M<n<10M")
    common |= {"pretty_name": card.title, "size_categories": [size]}
    common |= {"task_categories": ["image-classification"]}
    if card.png:  # the hub's viewer shows these
        files = [{"split": "train", "path": "images/*/*.png"}]
        common["configs"] = [{"config_name": "default", "data_files": files}]
    return _block(DatasetCardData(**common).to_yaml())


def _block(yaml: str) -> str:
    return yaml.rstrip("\n") + "\n"


def _terms(card: Card) -> Iterator[str]:
    yield "## Licence"
    yield "\n".join(_term(one) for one in card.ingredients)


def _term(one: Ingredient) -> str:
    """What is to be known of one ingredient's licence, as an entry of a list."""
    own = one.licence
    name = "no licence is named" if own is None else f"[{own.name}]({own.link})" if own.link else own.name
    bound = "" if one.binds else " (of that part alone)"
    return f"- {_linked(one)}: {name}{bound}." + (f" {one.note}." if one.note else "")


def _linked(one: Ingredient) -> str:
    return f"[{one.what}]({one.link})" if one.link else one.what


def _use(card: Card, repo: str) -> Iterator[str]:
    yield "## Use"
    yield f"```\nigd pull {repo} FOLDER\n```"
    yield card.use
    if card.protocol:
        yield f"Protocol: {card.protocol}."


def _classes(card: Card) -> Iterator[str]:
    yield f"## Classes\n\n{len(card.classes)}, in label order. Labels mean nothing in another order."
    ids = card.label_ids or ("",) * len(card.classes)
    rows = zip(range(len(card.classes)), card.classes, card.names, ids, strict=True)
    lines = [f"| {label} | `{name}` | {shown} | {number} |" for label, name, shown, number in rows]
    yield "\n".join(["| label | class | name | the diffusion model's id |", "|---|---|---|---|", *lines])


def _ingredients(ingredients: Sequence[Ingredient]) -> Iterator[str]:
    yield "## Models and data"
    lines = [
        f"| {_linked(one)} | {one.licence.name if one.licence else 'none named'} | {_digests(one)} |"
        for one in ingredients
    ]
    yield "\n".join(["| | licence | sha256 of its tensors, first digits |", "|---|---|---|", *lines])


def _digests(one: Ingredient) -> str:
    return ", ".join(f"{part} `{value}`" for part, value in one.digests.items()) or "-"


def _guidance(settings: Mapping[str, Any]) -> Iterator[str]:
    """How a set was sampled, in a line."""
    if "num_steps" not in settings or "guidance" not in settings:
        return
    own = settings["guidance"]
    guided = "no guidance of the paper's"
    if own:
        first, last = own["guided_range"]
        guided = f"influence guidance k {own['k']:g}, deviation guidance gamma {own['gamma']:g}, "
        guided += f"in the steps {first} to {last}"
    solver = settings.get("fidelity", {}).get("solver", "")
    yield f"{settings['num_steps']} steps ({solver}), cfg {settings['cfg_scale']:g}; {guided}."


def _making(card: Card) -> Iterator[str]:
    yield "## Settings"
    yield from _guidance(card.settings)
    shown = {name: value for name, value in card.settings.items() if name not in ("classes", "label_ids")}
    yield "```json\n" + json.dumps(shown, indent=1, sort_keys=True, ensure_ascii=False) + "\n```"
    took = "not noted" if card.seconds is None else f"{card.seconds:,.0f} seconds in all"
    size = f"{card.images:,} images of {card.image_size} px. " if card.images else ""
    yield f"{size}Time that it took: {took}. Made by {card.made_by}; pushed by {card.pushed_by}."
    yield "`sums.json` has the sha256 of every file; `igd pull` checks them, and the class order by name."


def read(folder: Path) -> dict[str, Any]:
    """`card.json` of a shared folder. Raises ValueError without one, or for a damaged one."""
    path = folder / sums.CARD
    if not path.is_file():
        raise ValueError(f"{folder} has no {sums.CARD}: it was not shared by igd_lib")
    found = sums.read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("classes"), list):
        raise ValueError(f"{path} is damaged (no list of classes); it is refused")
    return found
