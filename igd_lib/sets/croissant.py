"""A set's metadata as MLCommons' Croissant 1.0 has them (http://mlcommons.org/croissant/1.0), JSON-LD.

`distribution` has a FileObject, with its sha256, for every file, and a FileSet of the images; `recordSet` the
classes, an enumeration, and one record an image with its label.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igd_lib.sets.cards import BIBTEX, Card

VERSION = "http://mlcommons.org/croissant/1.0"
TYPES = {
    ".safetensors": "application/x-safetensors",
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/markdown",
}
_OURS = (
    "citeAs column equivalentProperty examples extract field fileProperty fileObject fileSet format includes "
    "isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace separator "
    "source samplingRate subField transform"
)
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    **{name: f"cr:{name}" for name in _OURS.split()},
}
REPOSITORY, IMAGES = "repository", "image-files"


def metadata(card: Card, folder: Path, sums: Mapping[str, str], url: str, creator: str) -> dict[str, Any]:
    """`croissant.json` of a set whose files (sha256 by path) lie in `folder`, to be found at `url`."""
    licences = [one.licence for one in card.ingredients if one.binds]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", card.title).strip("-"),
        "description": " ".join(card.statements),
        "license": [one.link or one.name if one else "none named" for one in licences],
        "url": url,
        "creator": {"@type": "sc:Organization", "name": creator},
        "datePublished": card.created,
        "version": "1.0.0",
        "keywords": ["dataset distillation", "influence-guided diffusion", card.dataset],
        "isLiveDataset": False,
        "citeAs": BIBTEX,
        "distribution": [*_files(folder, sums, url), *_images(card)],
        "recordSet": [_classes(card), _records(card, sums)],
    }


def listing_sha256(sums: Mapping[str, str]) -> str:
    """sha256 of the files' own sums and paths, a line each, sorted: the identity of the whole."""
    return hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()).hexdigest()


def _files(folder: Path, sums: Mapping[str, str], url: str) -> list[dict[str, Any]]:
    whole = {
        "@type": "cr:FileObject",
        "@id": REPOSITORY,
        "name": REPOSITORY,
        "description": "The repository; sha256 is of the list of its files' sums and paths.",
        "contentUrl": url,
        "encodingFormat": "git+https",
        "sha256": listing_sha256(sums),
    }
    return [whole, *(_file(folder, name, value) for name, value in sorted(sums.items()))]


def _file(folder: Path, name: str, value: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name.replace("/", "_"),
        "contentUrl": name,
        "containedIn": {"@id": REPOSITORY},
        "contentSize": f"{(folder / name).stat().st_size} B",
        "encodingFormat": TYPES[Path(name).suffix],
        "sha256": value,
    }


def _images(card: Card) -> list[dict[str, Any]]:
    if not card.png:
        return []
    return [
        {
            "@type": "cr:FileSet",
            "@id": IMAGES,
            "name": IMAGES,
            "containedIn": {"@id": REPOSITORY},
            "encodingFormat": TYPES[".png"],
            "includes": "images/*/*.png",
        }
    ]


def _field(name: str, kind: str | list[str], about: str, **more: Any) -> dict[str, Any]:
    short = name.rpartition("/")[2]
    own = {"@type": "cr:Field", "@id": name, "name": short, "description": about, "dataType": kind}
    return own | more


def _classes(card: Card) -> dict[str, Any]:
    """The enumeration: a class's label and its names."""
    rows = enumerate(zip(card.classes, card.names, strict=True))
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "The classes in label order.",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/folder"},
        "field": [
            _field("classes/folder", "sc:Text", "The label as images' folders have it, five digits."),
            _field("classes/label", "sc:Integer", "The label."),
            _field("classes/name", "sc:Text", "The class, as the data set names it."),
            _field("classes/title", "sc:Text", "The same for people."),
        ],
        "data": [
            {
                "classes/folder": f"{label:05d}",
                "classes/label": label,
                "classes/name": name,
                "classes/title": title,
            }
            for label, (name, title) in rows
        ],
    }


def _records(card: Card, sums: Mapping[str, str]) -> dict[str, Any]:
    """An image and its label: of a PNG file, whose folder is the label, or of tensors."""
    return {
        "@type": "cr:RecordSet",
        "@id": "records",
        "name": "records",
        "description": f"{card.images} images of {card.image_size} px with their labels.",
        "field": _of_files() if card.png else _of_tensors(sums),
    }


def _of_files() -> list[dict[str, Any]]:
    """The label comes with the folder, which is the key of the classes."""
    folder = _extracted(fileProperty="fullpath") | {"transform": {"regex": r"images/([0-9]+)/[0-9]+\.png$"}}
    key = {"references": {"field": {"@id": "classes/folder"}}}
    label = {"field": {"@id": "classes/label"}}
    return [
        _field("records/image", "sc:ImageObject", "The image.", source=_extracted(fileProperty="content")),
        _field("records/folder", "sc:Text", "The folder that it is in.", source=folder, **key),
        _field("records/label", ["sc:Integer", "cr:Label"], "The label, by the folder.", source=label),
    ]


def _of_tensors(sums: Mapping[str, str]) -> list[dict[str, Any]]:
    """For want of a way to name a tensor: the first file, and in words what of it."""
    own = next(name for name in sorted(sums) if name.endswith(".safetensors"))
    source = {"fileObject": {"@id": own}, "extract": {"fileProperty": "content"}}
    image = "The image: of the tensor `images` (N, 3, H, H) of a file."
    label = "The label: of the tensor `labels` (N,) of the file; of a file a class, its number."
    return [
        _field("records/image", "sc:ImageObject", image, source=source),
        _field("records/label", ["sc:Integer", "cr:Label"], label, source=source),
    ]


def _extracted(**how: str) -> dict[str, Any]:
    return {"fileSet": {"@id": IMAGES}, "extract": how}


def dumped(record: Mapping[str, Any]) -> str:
    """JSON, the same for the same content."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
