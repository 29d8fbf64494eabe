"""Exports: the same pixels and labels in each format, whatever the class order; refusals and repairs."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.datasets import ImageFolder

from igd_lib.config import Guidance
from igd_lib.data.datasets import IMAGENETTE_CLASSES, IMAGEWOOF_CLASSES
from igd_lib.distillation import distill
from igd_lib.sets.export import FORMATS, load_image_folder, load_tensors_export
from igd_lib.sets.store import DistilledSet
from igd_lib.tools import files

ORDERS = {
    "sorted": IMAGENETTE_CLASSES[:4],
    "unsorted": IMAGEWOOF_CLASSES[
        :4
    ],  # n02096294, n02093754, n02111889, n02088364: labels 2, 1, 3, 0 when sorted
    "words": ("T-shirt", "Trouser", "Ankle boot", "Bag"),
}


def draw(classes: int, ipc: int, seed: int = 0) -> np.ndarray:
    """Random pixels (classes, ipc, 8, 8, 3): no two images alike."""
    return np.random.default_rng(seed).integers(0, 256, (classes, ipc, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def make(tmp_path):
    """Factory: a finished set on disk of three images a class, and its pixels."""

    def make(
        classes=ORDERS["unsorted"], *, folder="set", selected=None, pixels=None, seed=0
    ) -> tuple[DistilledSet, np.ndarray]:
        path, pixels = tmp_path / folder, draw(len(classes), 3) if pixels is None else pixels
        selected = list(range(len(classes))) if selected is None else selected
        manifest = {
            "dataset": "toy",
            "classes": list(classes),
            "selected": selected,
            "ipc": 3,
            "seed": seed,
            "settings": {"cfg_scale": 4.0},
        }
        files.write(path / "manifest.json", json.dumps(manifest))
        found = DistilledSet(path)
        for label in selected:
            for index in range(3):
                picture = Image.fromarray(pixels[label, index])
                files.write(
                    found.image_path(label, index),
                    lambda file, picture=picture: picture.save(file, format="PNG"),
                )
                files.save_tensors(found.latent_path(label, index), {"latent": torch.zeros(1)})
        return found, pixels

    return make


def read(path: Path, format: str) -> tuple[np.ndarray, list[int]]:
    """(N, 8, 8, 3) pixels and labels, as the library's own readers give them."""
    if format == "safetensors":
        data = load_tensors_export(path)
        return data.fetch(torch.arange(len(data))).permute(0, 2, 3, 1).numpy(), data.labels.tolist()
    pairs = list(load_image_folder(path))
    return np.stack([np.asarray(image) for image, _ in pairs]), [label for _, label in pairs]


def tree(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def manifest_of(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


# --- the same images with the same labels


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(make, tmp_path, format, order):
    found, pixels = make(ORDERS[order])
    assert found.export(tmp_path / "out", format) == tmp_path / "out"
    images, labels = read(tmp_path / "out", format)
    assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert np.array_equal(images, pixels.reshape(12, 8, 8, 3))


def test_a_set_that_distill_made(tiny_pipe, toy_data, toy, tmp_path):
    options = dict(
        ipc=2,
        guidance=Guidance(k=5.0, gamma=30.0, guided_range=(1, 2)),
        checkpoints=toy().checkpoints,
        num_steps=3,
        label_ids=(4, 0, 9),
    )
    found = distill(tiny_pipe, toy_data, out_dir=tmp_path / "set", **options)
    expected = found.data()
    for format in FORMATS:
        images, labels = read(found.export(tmp_path / format, format), format)
        assert labels == expected.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert np.array_equal(images, expected.fetch(torch.arange(6)).permute(0, 2, 3, 1).numpy())
        assert manifest_of(tmp_path / format)["set"] == found.manifest


def test_a_part_keeps_its_labels(make, tmp_path):
    """Two of four classes: labels 1 and 3 stay, and a plain ImageFolder is promised no more."""
    found, pixels = make(ORDERS["sorted"], selected=[3, 1])
    for format in FORMATS:
        images, labels = read(found.export(tmp_path / format, format), format)
        assert labels == [1, 1, 1, 3, 3, 3] and np.array_equal(images, pixels[[1, 3]].reshape(6, 8, 8, 3))
        assert manifest_of(tmp_path / format)["counts"] == [0, 3, 0, 3]
        assert manifest_of(tmp_path / format)["plain_imagefolder_agrees"] is (
            None if format == "safetensors" else False
        )


# --- what other tools see


@pytest.mark.parametrize(
    ("order", "plain"), [("sorted", [0, 1, 2, 3]), ("unsorted", [2, 1, 3, 0]), ("words", [2, 3, 0, 1])]
)
def test_a_plain_image_folder_is_not_silently_wrong(make, tmp_path, order, plain):
    """torchvision numbers sorted folders (`plain`, by hand); the export says where the order differs."""
    found, _ = make(ORDERS[order])
    out = found.export(tmp_path / "out")
    assert [ImageFolder(out).class_to_idx[name] for name in ORDERS[order]] == plain
    assert load_image_folder(out).class_to_idx == dict(zip(ORDERS[order], range(4), strict=True))
    agrees = plain == [0, 1, 2, 3]
    assert manifest_of(out)["plain_imagefolder_agrees"] is agrees
    note = (out / "README.txt").read_text()
    assert ("WARNING" in note) is not agrees
    if not agrees:
        wrong = next(label for label in range(4) if plain[label] != label)
        assert f"{ORDERS[order][wrong]!r} is label {wrong} here and would be {plain[wrong]} there" in note


def test_the_rded_layout_is_in_label_order_for_every_reader(make, tmp_path):
    """RDED lists ROOT/LABEL with labels in five digits, which sort in their order: ImageFolder agrees too."""
    found, pixels = make(ORDERS["unsorted"])
    out = found.export(tmp_path / "out", "rded")
    for label in range(4):
        listed = sorted(os.listdir(f"{out}/{str(label).zfill(5)}"))
        assert len(listed) == 3
        for index, name in enumerate(listed):
            assert np.array_equal(
                np.asarray(Image.open(f"{out}/{str(label).zfill(5)}/{name}")), pixels[label, index]
            )
    plain = ImageFolder(out)
    assert (
        plain.targets == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        and manifest_of(out)["plain_imagefolder_agrees"] is True
    )
    assert "WARNING" not in (out / "README.txt").read_text()


def test_eleven_and_more_classes_stay_in_order(make, tmp_path):
    """Unpadded numbers would sort 10 before 2."""
    classes = tuple(str(number) for number in range(12))
    found, _ = make(classes)
    assert ImageFolder(found.export(tmp_path / "rded", "rded")).targets == [
        label for label in range(12) for _ in range(3)
    ]
    out = found.export(tmp_path / "folders")
    assert (
        manifest_of(out)["plain_imagefolder_agrees"] is False
        and "'2' is label 2 here and would be 4 there" in (out / "README.txt").read_text()
    )


def test_tensors_can_be_read_without_the_library(make, tmp_path):
    found, pixels = make()
    with safe_open(found.export(tmp_path / "out", "safetensors") / "data.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["images", "labels"]
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
        assert json.loads(file.metadata()["igd"])["classes"] == list(ORDERS["unsorted"])
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 8, 8) and labels.dtype == torch.int64
    assert np.array_equal(images[7].numpy(), pixels[2, 1].transpose(2, 0, 1)) and labels[7] == 2


# --- what is on disk


@pytest.mark.parametrize("format", FORMATS)
def test_the_manifest_lists_every_file(make, tmp_path, format):
    found, _ = make()
    out = found.export(tmp_path / "out", format)
    manifest, content = manifest_of(out), tree(out)
    assert (
        manifest["format"] == format
        and manifest["classes"] == list(ORDERS["unsorted"])
        and manifest["counts"] == [3, 3, 3, 3]
    )
    assert manifest["set"] == found.manifest
    assert manifest["files"] == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in content.items() if name != "manifest.json"
    }
    assert len(content) == {"imagefolder": 12 + 3, "rded": 12 + 2, "safetensors": 3}[format]


def test_images_are_copied_byte_for_byte(make, tmp_path):
    found, _ = make()
    path = found.image_path(2, 1)
    Image.open(path).save(
        path, compress_level=0
    )  # the same pixels in other bytes than this library's writer gives
    folders, numbers = found.export(tmp_path / "a"), found.export(tmp_path / "b", "rded")
    assert (
        (folders / "n02111889" / "00001.png").read_bytes()
        == path.read_bytes()
        == (numbers / "00002" / "00001.png").read_bytes()
    )
    assert (folders / "classes.txt").read_text().split("\n") == [*ORDERS["unsorted"], ""]


@pytest.mark.parametrize("format", FORMATS)
def test_two_exports_are_the_same_bytes(make, tmp_path, format):
    found, _ = make()
    assert tree(found.export(tmp_path / "a", format)) == tree(found.export(tmp_path / "b", format))


# --- the same export again


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_export_again_writes_nothing(make, tmp_path, format, monkeypatch):
    found, _ = make()
    out = found.export(tmp_path / "out", format)
    monkeypatch.setattr(files, "write", lambda path, content: pytest.fail(f"wrote {path}"))
    assert found.export(out, format) == out


@pytest.mark.parametrize("format", FORMATS)
def test_missing_and_damaged_files_are_repaired(make, tmp_path, format):
    found, _ = make()
    out = found.export(tmp_path / "out", format)
    before = tree(out)
    for name in [name for name in before if name != "manifest.json"][::2]:
        (out / name).write_bytes(before[name][:-5])
    (out / "README.txt").unlink()
    written = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and path.read_bytes() == before[path.relative_to(out).as_posix()]
    }
    found.export(out, format)
    assert tree(out) == before
    assert all(
        path.stat().st_mtime_ns == time for path, time in written.items()
    )  # what was whole is left alone


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_is_named_and_completed(make, tmp_path, format, monkeypatch):
    found, _ = make()
    whole = tree(found.export(tmp_path / "whole", format))
    real, done = files.write, []

    def full(path, content):
        if len(done) == 2:
            raise OSError(errno.ENOSPC, "no space left")
        done.append(path)
        return real(path, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="no space left"):
        found.export(tmp_path / "out", format)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished export; export the set there again"):
        read(tmp_path / "out", format)
    (tmp_path / "out" / ".README.txt.abc_12d8.tmp").write_bytes(b"half")  # a killed writer's temporary file
    found.export(tmp_path / "out", format)
    assert tree(tmp_path / "out") == whole


# --- refusals


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        ".hidden",
        " padded",
        "padded ",
        "dot.",
        "what?",
        "a:b",
        "line\nbreak",
        "nul",
        "COM1.x",
        "x" * 256,
        "README.txt",
        "Classes.TXT",
    ],
)
def test_unsafe_class_names(make, tmp_path, name):
    found, pixels = make(("a", name, "b"))
    with pytest.raises(ValueError, match="class name") as error:
        found.export(tmp_path / "out")
    assert repr(name) in str(error.value) and not (tmp_path / "out").exists()
    images, labels = read(found.export(tmp_path / "out", "rded"), "rded")  # folders are numbers there
    assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2] and np.array_equal(images, pixels.reshape(9, 8, 8, 3))


@pytest.mark.parametrize(
    ("one", "other"), [("cat", "Cat"), ("cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße")]
)
def test_class_names_that_are_one_folder(make, tmp_path, one, other):
    found, _ = make((one, "dog", other))
    with pytest.raises(ValueError, match="one name on some file systems"):
        found.export(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["T-shirt", "Ankle boot", "n02096294", "apple_pie", "crème brûlée", "a.b", "console", "Class (1)"]
)
def test_readable_class_names_are_kept(make, tmp_path, name):
    found, _ = make((name, "dog"))
    assert (found.export(tmp_path / "out") / name / "00002.png").is_file()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "gone", ["images/00001/00002.png", "images/00003/00000.png", "latents/00001/00002.safetensors"]
)
def test_an_unfinished_set(make, tmp_path, format, gone):
    found, _ = make()
    (found.path / gone).unlink()
    with pytest.raises(
        ValueError, match=f"class {int(gone.split('/')[1])} has .* of 3 images; run distill again"
    ):
        found.export(tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_image(make, tmp_path, format):
    found, _ = make()
    path = found.image_path(3, 1)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read the image .*00003/00001\.png"):
        found.export(tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format(make, tmp_path):
    with pytest.raises(ValueError, match="format is one of imagefolder, rded, safetensors, got 'zip'"):
        make()[0].export(tmp_path / "out", "zip")


def test_another_export_is_not_overwritten(make, tmp_path):
    found, pixels = make()
    out = found.export(tmp_path / "out")
    before = tree(out)
    others = {
        "format = imagefolder, wanted rded": (found, "rded"),
        r"set\.seed = 0, wanted 1": (make(folder="seed", seed=1)[0], "imagefolder"),
        r"classes\[0\] = n02096294, wanted n02111889": (
            make(sorted(ORDERS["unsorted"], reverse=True), folder="order")[0],
            "imagefolder",
        ),
        "images_sha256 = .*, wanted ": (
            make(folder="pixels", pixels=255 - pixels)[0],
            "imagefolder",
        ),  # same settings, other images
    }
    for message, (other, format) in others.items():
        with pytest.raises(ValueError, match=f"holds another export: {message}"):
            other.export(out, format)
        assert tree(out) == before


def test_folders_that_hold_something_else(make, tmp_path):
    found, _ = make()
    before = tree(found.path)
    with pytest.raises(ValueError, match=r"manifest\.json that is not an export's"):
        found.export(found.path)
    assert tree(found.path) == before
    (tmp_path / "mine").mkdir()
    for name in ("thesis.txt", ".draft.tmp"):  # a stranger's temporary file is no leftover of ours
        (tmp_path / "mine" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds {name}, which is no part of this export"):
            found.export(tmp_path / "mine")
        assert tree(tmp_path / "mine") == {name: b"mine"}
        (tmp_path / "mine" / name).unlink()
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        found.export(found.path / "manifest.json")
    out = found.export(tmp_path / "out")
    (out / "n02096294" / "extra.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"extra\.png, which is no part"):
        found.export(out)


def test_an_export_is_not_a_set_to_go_on_with(make, tmp_path):
    """`distill` into an export's folder would mix the two; its manifest does not pass for a set's."""
    found, _ = make()
    with pytest.raises(FileNotFoundError, match="holds an export"):
        DistilledSet(found.export(tmp_path / "out"))


# --- reading


def test_readers_refuse_what_does_not_match(make, tmp_path):
    found, _ = make()
    folders, tensors = found.export(tmp_path / "a"), found.export(tmp_path / "b", "safetensors")
    with pytest.raises(ValueError, match="use load_tensors_export"):
        load_image_folder(tensors)
    with pytest.raises(ValueError, match="use load_image_folder"):
        load_tensors_export(folders)
    with pytest.raises(FileNotFoundError, match="holds no export"):
        load_tensors_export(tmp_path)
    with pytest.raises(ValueError, match="not an export's"):
        load_image_folder(found.path)
    raw = (tensors / "data.safetensors").read_bytes()
    (tensors / "data.safetensors").write_bytes(
        raw[:-1] + bytes([raw[-1] ^ 1])
    )  # one label's bit: safetensors itself would not notice
    with pytest.raises(ValueError, match="sha256; export it again"):
        load_tensors_export(tensors)
    (folders / "n02093754" / "00001.png").unlink()
    with pytest.raises(ValueError, match="'n02093754' has 2 images, its manifest says 3"):
        load_image_folder(folders)
    (folders / "n02093754" / "00001.png").write_bytes(found.image_path(1, 1).read_bytes())
    (folders / "n02093754" / "00009.png").write_bytes(found.image_path(1, 1).read_bytes())
    with pytest.raises(ValueError, match="'n02093754' has 4 images, its manifest says 3"):
        load_image_folder(folders)


def test_a_damaged_manifest(make, tmp_path):
    found, _ = make()
    out = found.export(tmp_path / "out")
    (out / "manifest.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="is damaged"):
        load_image_folder(out)
    with pytest.raises(ValueError, match="is damaged"):
        found.export(out)


def test_transforms_reach_the_loader(make, tmp_path):
    found, pixels = make()
    data = load_image_folder(
        found.export(tmp_path / "out"),
        transform=lambda image: np.asarray(image).sum(),
        target_transform=lambda label: 10 + label,
    )
    assert data[4] == (pixels[1, 1].sum(), 11) and data.imgs == data.samples
