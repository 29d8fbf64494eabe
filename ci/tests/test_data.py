"""Real images: splits, class order, checksums, and every way an image folder can be wrong."""

import gzip
import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from igd_lib.data import images as data
from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import load, read_image, read_images, to_float, to_uint8
from igd_lib.data.sources import fashion

# --- Fashion-MNIST


def sums(images) -> Counter:
    pixels = images.fetch(torch.arange(len(images)))[:, 0].contiguous().numpy()
    return Counter(
        (int(label), hashlib.md5(image.tobytes()).digest())
        for label, image in zip(images.labels, pixels, strict=True)
    )


def test_splits_partition_the_training_images(fashion_train, fashion_test):
    validation = load("fashion-mnist", "validation")
    assert (len(fashion_train), len(validation), len(fashion_test)) == (50_000, 10_000, 10_000)
    for split, count in ((fashion_train, 5000), (validation, 1000), (fashion_test, 1000)):
        assert split.labels.bincount().tolist() == [count] * 10
    # As multisets of (label, image): together exactly the 60,000 training images, none twice.
    everything = load(replace(DATASETS["fashion-mnist"], holdout=0.0), "train")
    assert len(everything) == 60_000
    assert sums(fashion_train) + sums(validation) == sums(everything)


def test_labels_and_pixels_are_fashion_mnist(fashion_test):
    assert fashion_test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert fashion_test.classes[9] == "Ankle boot"
    images = fashion_test.fetch(torch.arange(100))
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    inner = images[:, :, 2:30, 2:30]
    assert inner.sum() == images.sum() and images.sum() > 0  # 28 px and two black pixels on each side


def test_a_flipped_byte_is_named(tmp_path, fashion_folder):
    changed = "t10k-images-idx3-ubyte"
    for name in fashion.FASHION_FILES:
        path = fashion._idx_file(fashion_folder, name)
        if name == changed:
            raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            raw[5000] ^= 1
            (tmp_path / name).write_bytes(raw)
        else:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=f"{changed}.*checksum"):
        load("fashion-mnist", "test", tmp_path)


def test_a_cut_archive_is_named(tmp_path, fashion_folder):
    for name in fashion.FASHION_FILES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"x" * 1000)[:-5])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        load("fashion-mnist", "test", tmp_path)


def test_a_folder_without_fashion_mnist_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "FASHION_SYSTEM", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"empty.*train-images-idx3-ubyte\.gz"):
        load("fashion-mnist", "train", tmp_path / "empty")


def test_no_source_at_all_says_what_to_do(tmp_path, monkeypatch):
    """With no copy and no network the message lists each try and how to help."""

    def fails(scratch):
        raise OSError("no network")

    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    monkeypatch.setattr(fashion, "FASHION_SYSTEM", tmp_path / "none")
    monkeypatch.setattr(fashion, "_from_debian", fails)
    monkeypatch.setattr(fashion, "_from_torchvision", fails)
    with pytest.raises(FileNotFoundError, match="could not be fetched.*no network.*dataset-fashion-mnist"):
        load("fashion-mnist")
    assert not list(tmp_path.iterdir())


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="unknown data set 'fashion'.*fashion-mnist"):
        load("fashion")
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        load("fashion-mnist", "val")


# --- draws


def test_per_class_draws(fashion_train):
    a, b, c = (fashion_train.per_class(3, seed) for seed in (0, 0, 1))
    assert a.labels.tolist() == [label for label in range(10) for _ in range(3)]
    first, again, other = (d.fetch(torch.arange(30)) for d in (a, b, c))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) == 30  # without replacement


def test_per_class_takes_a_whole_class_but_not_more(toy_data):
    whole = toy_data.per_class(6, seed=0)
    assert sorted(sums(whole)) == sorted(sums(toy_data))
    for count, message in ((0, "at least 1"), (-1, "at least 1"), (7, "ipc=7.*'a'.*6 images")):
        with pytest.raises(ValueError, match=message):
            toy_data.per_class(count, seed=0)


def test_of_class_and_subset_keep_file_order(toy_data):
    everything = toy_data.fetch(torch.arange(18))
    assert torch.equal(toy_data.of_class(1), everything[1::3])
    assert torch.equal(toy_data.of_class(1, 2), everything[[1, 4]])
    twice = toy_data.subset(torch.tensor([5, 3, 17])).subset(torch.tensor([2, 0]))
    assert torch.equal(twice.fetch(torch.arange(2)), everything[[17, 5]]) and twice.labels.tolist() == [2, 2]


def test_batches_visit_every_image_once(toy_data):
    for generator in (None, torch.Generator().manual_seed(0)):
        parts = list(toy_data.batches(4, generator))
        assert [len(labels) for _, labels in parts] == [4, 4, 4, 4, 2]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        shuffled = data.from_tensors("toy", "train", toy_data.classes, images, labels)
        assert sums(shuffled) == sums(toy_data)
        assert torch.equal(labels, toy_data.labels) == (generator is None)


def test_uint8_round_trip():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(every)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_from_tensors_rejects_other_images():
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\)"):
        data.from_tensors("x", "train", ("a",), torch.zeros(1, 3, 4, 4), torch.zeros(1))


# --- ImageFolder

COLOURS = {"cat": (200, 30, 30), "ant": (30, 200, 30), "bee": (30, 30, 200)}
SPEC = DataSpec("animals", ("cat", "ant", "bee"), (5, 7, 9), 16)


@pytest.fixture
def animals(tmp_path):
    """Two flat-coloured images of each of three classes, for training and testing."""
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 16), colour).save(folder / "0.png")
            Image.new("RGB", (16, 24), colour).save(folder / "1.jpg", quality=95)
    return tmp_path


def colour_of(images, label):
    return images.of_class(label).float().mean((0, 2, 3))


def test_labels_follow_the_given_class_order(animals):
    images = load(SPEC, "train", animals)
    assert images.classes == ("cat", "ant", "bee") and len(images) == 6
    for label, name in enumerate(images.classes):
        torch.testing.assert_close(
            colour_of(images, label), torch.tensor(COLOURS[name]).float(), atol=3, rtol=0
        )
    assert len(load(SPEC, "test", animals)) == 6  # from val/


def test_without_a_given_order_class_folders_are_sorted(animals):
    images = load(replace(SPEC, classes=()), "train", animals)
    assert images.classes == ("ant", "bee", "cat")
    torch.testing.assert_close(colour_of(images, 0), torch.tensor(COLOURS["ant"]).float(), atol=3, rtol=0)


def test_the_folder_is_found_below_igd_data(animals, monkeypatch):
    monkeypatch.setenv("IGD_DATA", str(animals.parent))
    assert len(load(replace(SPEC, folder=animals.name))) == 6


def test_decoding_when_asked_equals_in_memory(animals, monkeypatch):
    in_memory = load(SPEC, "train", animals)
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(data, "from_tensors", None)  # must not be called
    lazy = load(SPEC, "train", animals)
    order = torch.tensor([4, 0, 5, 1])
    assert torch.equal(lazy.fetch(order), in_memory.fetch(order)) and torch.equal(
        lazy.labels, in_memory.labels
    )


def test_holdout_of_an_image_folder(animals):
    spec = replace(SPEC, holdout=0.5)
    train, validation = load(spec, "train", animals), load(spec, "validation", animals)
    assert train.labels.tolist() == validation.labels.tolist() == [0, 1, 2]
    whole = load(SPEC, "train", animals)
    assert torch.equal(train.of_class(0), whole.of_class(0)[:1]) and torch.equal(
        validation.of_class(0), whole.of_class(0)[1:]
    )
    with pytest.raises(ValueError, match="no held-out validation split"):
        load(SPEC, "validation", animals)


def test_missing_class_folder(animals):
    (animals / "train" / "bee").rename(animals / "elsewhere")
    with pytest.raises(ValueError, match=r"missing: \['bee'\], unexpected: none"):
        load(SPEC, "train", animals)


def test_extra_class_folder(animals):
    (animals / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"missing: none, unexpected: \['dog'\]"):
        load(SPEC, "train", animals)


def test_empty_class_folder(animals):
    for path in (animals / "train" / "ant").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"ant: no images"):
        load(SPEC, "train", animals)


def test_missing_split_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="animals: no folder .*train.*IGD_DATA"):
        load(SPEC, "train", tmp_path / "none")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="class folders do not match"):
        load(replace(SPEC, classes=()), "train", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "last bytes", "header", "text", "empty"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_damaged_image_is_named(animals, damage, suffix):
    path = animals / "train" / "ant" / f"1.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    raw = path.read_bytes()
    path.write_bytes(
        {
            "cut": raw[: len(raw) // 2],
            "last bytes": raw[:-200],
            "header": raw[:30],
            "text": b"not an image",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"cannot read the image .*ant.1\.{suffix}"):
        load(SPEC, "train", animals)


def test_a_bomb_is_named_and_not_decoded(animals, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read the image .*cat.0\.png: .*decompression bomb"):
        load(SPEC, "train", animals)


# --- several images


@pytest.mark.parametrize("threads", [1, 4])
def test_images_are_read_in_order_whatever_the_threads(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(data, "THREADS", threads)
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        Image.new("RGB", (9 + i * 7 % 60, 12), (i, 2 * i, 255 - i)).save(path)  # of different costs
    images = read_images(paths, 8)
    assert images.shape == (40, 3, 8, 8) and read_images([], 8).shape == (0, 3, 8, 8)
    for i, image in enumerate(images):
        assert torch.equal(
            image, torch.tensor([i, 2 * i, 255 - i], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 8, 8)
        )
    for i in (30, 7):
        paths[i].write_bytes(b"not an image")
    # the first, not the first to fail
    with pytest.raises(ValueError, match=r"cannot read the image .*7\.png"):
        read_images(paths, 8)


# --- one image


def rgb(path) -> list[int]:
    return read_image(path, 8).float().mean((1, 2)).round().int().tolist()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "16-bit"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour = Image.new("RGB", (8, 8), (220, 40, 90))
    grey = [93, 93, 93]
    if mode == "CMYK":
        colour.convert("CMYK").save(tmp_path / "x.jpg", quality=100)
        assert rgb(tmp_path / "x.jpg") == pytest.approx([220, 40, 90], abs=4)
    elif mode == "16-bit":
        Image.fromarray(np.full((8, 8), 93 * 257, dtype=np.uint16)).save(tmp_path / "x.png")
        assert rgb(tmp_path / "x.png") == pytest.approx(grey, abs=1)
    elif mode == "1":
        Image.new("1", (8, 8), 1).save(tmp_path / "x.png")
        assert rgb(tmp_path / "x.png") == [255, 255, 255]
    elif mode in ("L", "LA"):
        Image.new(mode, (8, 8), 93 if mode == "L" else (93, 255)).save(tmp_path / "x.png")
        assert rgb(tmp_path / "x.png") == grey
    else:
        (colour.quantize(4) if mode == "P" else colour.convert(mode)).save(tmp_path / "x.png")
        assert rgb(tmp_path / "x.png") == pytest.approx([220, 40, 90], abs=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_the_upper_8(tmp_path, suffix):
    values = np.array([[0, 255, 256], [257, 0x1234, 0xFFFF], [0x7FFF, 0x8000, 0xFF00]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}", 3)
    assert image[0].tolist() == [[0, 0, 1], [1, 0x12, 0xFF], [0x7F, 0x80, 0xFF]]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 93, dtype=dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif: it has 32 bits a pixel; store it with 8 or 16"):
        read_image(tmp_path / "x.tif", 8)


@pytest.mark.parametrize("case", ["palette, one colour", "palette, bytes", "RGBA", "LA"])
def test_transparency_is_dropped_without_a_warning(tmp_path, case, recwarn):
    """A transparent pixel keeps its stored colour; it is not laid over black or white."""
    path, colour = tmp_path / "x.png", [220, 40, 90]
    if case.startswith("palette"):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([1, 2, 3, 220, 40, 90])
        image.save(path, transparency=1 if case.endswith("colour") else bytes([200, 100]))
    elif case == "RGBA":
        Image.new("RGBA", (8, 8), (220, 40, 90, 0)).save(path)
    else:
        Image.new("LA", (8, 8), (93, 0)).save(path)
        colour = [93, 93, 93]
    assert rgb(path) == colour
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exif_orientation_is_not_applied(tmp_path, mode):
    """As ImageFolder has it: its loader is the reference."""
    from torchvision.datasets.folder import default_loader

    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(halves).convert(mode).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "x.jpg", 16)
    # the light half is still on top
    assert image[:, :6].float().mean() > 150 and image[:, 10:].float().mean() < 50
    assert torch.equal(
        image, torch.from_numpy(np.array(default_loader(str(tmp_path / "x.jpg")))).permute(2, 0, 1)
    )


def test_resize_keeps_proportions_and_crops_the_centre(tmp_path):
    """Four vertical stripes, 64 x 16 px: at size 8 only the inner two are left, and their border is in
    the middle.
    """
    stripes = np.zeros((16, 64, 3), np.uint8)
    stripes[:, :24], stripes[:, 24:32], stripes[:, 32:40], stripes[:, 40:] = (
        255,
        (200, 0, 0),
        (0, 200, 0),
        255,
    )
    Image.fromarray(stripes).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", 8)
    assert image.shape == (3, 8, 8)
    assert image[:, 4, 1].tolist() == pytest.approx([200, 0, 0], abs=30)
    assert image[:, 4, 6].tolist() == pytest.approx([0, 200, 0], abs=30)
    assert read_image(tmp_path / "x.png", 32).shape == (3, 32, 32)  # also upwards
