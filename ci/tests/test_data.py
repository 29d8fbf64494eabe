"""Real images: splits, class order, checksums, and every way an image folder can be wrong."""

import gzip
import hashlib
import itertools
import json
import shutil
import threading
import time
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from igd_lib.data import images as data
from igd_lib.data.datasets import DATASETS, DataSpec
from igd_lib.data.images import ImageData, Pass, load, missing, read_image, read_images, to_float, to_uint8
from igd_lib.data.sources import fashion
from igd_lib.tools import locks

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


# --- batches that are fetched ahead


def slowly(memory: ImageData, seconds: float = 0.0, wrong: int = -1) -> ImageData:
    """The same read as files are: each fetch takes a while, and the one with image `wrong` fails."""

    def fetch(indices):
        time.sleep(seconds)
        if wrong in indices.tolist():
            raise ValueError(f"cannot read {wrong}")
        return memory.fetch(indices)

    return replace(memory, fetch=fetch, slow=True)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_fetching_overlaps_with_what_is_done_with_a_batch(toy_data):
    """Nine batches, 50 ms to fetch and 50 ms to use each: 0.9 s one after the other."""
    began = time.monotonic()
    for _ in slowly(toy_data, 0.05).batches(2):
        time.sleep(0.05)
    assert time.monotonic() - began < 0.75 * 0.9
    assert not readers()


@pytest.mark.parametrize("done", [0, 2])
def test_batches_fetched_ahead_are_the_same(toy_data, done):
    for generators in ((None, None), tuple(torch.Generator().manual_seed(5) for _ in range(2))):
        here, there = (
            list(own.batches(4, generator, done))
            for own, generator in zip((toy_data, slowly(toy_data)), generators, strict=True)
        )
        assert len(here) == len(there) == 5 - done
        for (images, labels), (others, numbers) in zip(here, there, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, numbers)


def test_an_error_is_raised_where_its_batch_is_asked_for(toy_data):
    found = slowly(toy_data, wrong=5).batches(2)
    assert [len(next(found)[1]) for _ in range(2)] == [2, 2]
    with pytest.raises(ValueError, match="cannot read 5"):
        next(found)
    assert not readers()


def test_the_thread_ends_with_a_consumer_that_stops(toy_data):
    found = slowly(toy_data, 0.01).batches(2)
    next(found)
    assert readers()
    found.close()
    assert not readers()
    for _ in slowly(toy_data, 0.01).batches(2):
        break
    assert not readers()
    unused = slowly(toy_data).batches(2)
    assert not readers() and unused


def test_files_are_read_ahead_and_memory_is_not(animals, monkeypatch):
    held = load(SPEC, "train", animals)
    assert not held.slow and not held.at(5).slow
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    lazy = load(SPEC, "train", animals)
    assert lazy.slow and lazy.subset(torch.tensor([1, 0])).slow and lazy.at(5).slow and held.at(5).slow


def test_a_pass_is_taken_up_in_its_middle(toy_data):
    """After whoever uses the batches has drawn from the same generator, as augmentation does."""

    def drawn(found, generator):
        return [(labels.tolist(), torch.rand((), generator=generator).item()) for _, labels in found]

    whole, first, second = (torch.Generator().manual_seed(1) for _ in range(3))
    expected = drawn(Pass.begin(whole).batches(toy_data, 4, whole), whole)
    place = Pass.begin(first)
    begun = drawn(itertools.islice(place.batches(toy_data, 4, first), 2), first)
    note = json.loads(json.dumps(place.note))
    second.set_state(first.get_state())
    rest = drawn(Pass.of(note).batches(toy_data, 4, second), second)
    assert begun + rest == expected and len(rest) == 3 and Pass.of({"step": 4}) is None
    assert torch.equal(second.get_state(), whole.get_state())


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


# --- resizing

SHAPES = [(333, 500), (500, 375), (127, 301), (64, 65), (40, 31), (257, 256), (33, 700)]  # height, width


def noise(shape, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 101])
def test_images_are_resized_by_torchvision(tmp_path, shape, size):
    """Its classes of a data loader are the reference, bit for bit, down and up."""
    noise(shape).save(tmp_path / "x.png")
    expected = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    assert torch.equal(read_image(tmp_path / "x.png", size), expected(default_loader(tmp_path / "x.png")))


def weights(before: int, after: int, kernel, support: float) -> np.ndarray:
    """(after, before): a resampling kernel stretched to the source's pixels when it shrinks, normalised."""
    stretch = max(1.0, before / after)
    centres = (np.arange(after) + 0.5) * before / after
    low = np.floor(centres - support * stretch + 0.5).clip(0)
    high = np.floor(centres + support * stretch + 0.5).clip(max=before)
    source = np.arange(before)
    inside = (source >= low[:, None]) & (source < high[:, None])
    found = inside * kernel((source + 0.5 - centres[:, None]) / stretch)
    return found / found.sum(1, keepdims=True)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x, a=-0.5):
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def halved(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's way in float64: (H, W, 3) in 0 ... 255."""

    def resample(pixels, sides, kernel, support):
        for axis in (1, 0):  # as PIL: along rows first, eight bits in between, halves up
            along = weights(pixels.shape[axis], sides[axis], kernel, support)
            pixels = np.moveaxis(np.tensordot(along, pixels, (1, axis)), 0, axis).clip(0, 255)
            pixels = np.floor(pixels + 0.5)
        return pixels

    image = image.astype(float)
    while min(image.shape[:2]) >= 2 * size:
        image = resample(image, [side // 2 for side in image.shape[:2]], box, 0.5)
    scale = size / min(image.shape[:2])
    image = resample(image, [round(side * scale) for side in image.shape[:2]], cubic, 2.0)
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_of_adm_halves_first(tmp_path, shape):
    """Against resampling in float64; torchvision's way is tens of levels away."""
    noise(shape).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", 64, "bicubic-halving").permute(1, 2, 0).double()
    expected = torch.from_numpy(halved(np.asarray(noise(shape)), 64))
    assert (found - expected).abs().max() <= 2 and (found - expected).abs().mean() < 0.2
    other = read_image(tmp_path / "x.png", 64).permute(1, 2, 0).double()
    assert shape == (64, 65) or (other - expected).abs().mean() > 3


# --- at another size


@pytest.fixture
def photographs(tmp_path):
    """Six noisy photographs of different shapes in each of three classes."""
    for split in ("train", "val"):
        for label, name in enumerate(COLOURS):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                noise((50 + 7 * i, 61 - 3 * label), seed=10 * label + i).save(
                    tmp_path / split / name / f"{i}.png"
                )
    return tmp_path


@pytest.mark.parametrize("limit", [0, data.MEMORY_LIMIT])
def test_another_size_is_made_from_the_files(photographs, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    every = torch.arange(18)
    stored, direct = (load(replace(SPEC, image_size=size), "train", photographs) for size in (16, 24))
    found = stored.at(24)
    assert stored.at(16) is stored and found.at(24) is found
    assert found.image_size == 24 and (found.name, found.split) == (stored.name, stored.split)
    assert torch.equal(found.fetch(every), direct.fetch(every)) and torch.equal(found.labels, direct.labels)
    # Never twice: by way of a smaller size it is the same.
    assert torch.equal(stored.at(4).at(24).fetch(every), direct.fetch(every))
    # Views are taken before or after.
    for view in (
        lambda images: images.subset(torch.tensor([17, 3, 3, 0])),
        lambda images: images.per_class(2, seed=1),
        lambda images: images.first(3).per_class(2, seed=1).subset(torch.tensor([5, 0])),
    ):
        before, after = view(stored).at(24), view(direct)
        assert torch.equal(before.fetch(torch.arange(len(before))), after.fetch(torch.arange(len(after))))
    chosen = stored.subset(torch.tensor([17, 3])).subset(torch.tensor([1])).photograph(0)
    assert chosen.tobytes() == Image.open(photographs / "train" / "cat" / "3.png").tobytes()
    with pytest.raises(ValueError, match="at least 1 px, got 0"):
        stored.at(0)


def test_another_size_is_made_from_the_stored_tensor(toy_data):
    """Through PIL, as files are: the stored 16 px, whatever sizes lie between."""
    every = torch.arange(18)
    stored = [Image.fromarray(image.numpy()) for image in toy_data.fetch(every).permute(0, 2, 3, 1)]
    to_tensor = transforms.PILToTensor()
    expected = torch.stack([to_tensor(transforms.Resize(24)(image)) for image in stored])
    assert toy_data.at(16) is toy_data and toy_data.at(16, "bicubic-halving") is toy_data
    assert torch.equal(toy_data.at(24).fetch(every), expected)
    assert torch.equal(toy_data.at(5).at(24).fetch(every), expected)
    assert toy_data.photograph(4).tobytes() == stored[4].tobytes()


def test_images_of_another_resize_are_another_split(photographs):
    """What names data on disk is the split: another resize is another piece of work."""
    usual = load(SPEC, "train", photographs)
    spec = replace(SPEC, resize="bicubic-halving")
    other, every = load(spec, "train", photographs), torch.arange(18)
    assert (usual.split, other.split) == ("train", "train, bicubic-halving")
    assert load(replace(spec, holdout=0.5), "validation", photographs).split == "validation, bicubic-halving"
    again = usual.at(16, "bicubic-halving")
    assert again.split == other.split and torch.equal(again.fetch(every), other.fetch(every))
    assert (again.fetch(every).float() - usual.fetch(every).float()).abs().mean() > 3
    assert again.at(16).split == again.split and again.at(24).resize == "bicubic-halving"
    assert "train, bicubic-halving" in other.per_class(2, seed=0).split
    with pytest.raises(ValueError, match="resize is one of bilinear, bicubic-halving, got 'bicubic'"):
        replace(SPEC, resize="bicubic")


# --- folders as desktops, file servers and archives leave them


@pytest.mark.parametrize("inside", ["nothing", "flat", "hidden", "one folder"])
@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, classes=(), label_ids=())], ids=["named", "unnamed"])
def test_unsorted_test_images_beside_a_sorted_val(animals, inside, spec, capsys, monkeypatch):
    """As ImageNet comes: its test images have no labels."""
    monkeypatch.setattr(locks, "_said", set())
    where = animals / "test" / {"hidden": ".cat", "one folder": "images"}.get(inside, "")
    where.mkdir(parents=True)
    if inside != "nothing":
        shutil.copy(animals / "val" / "cat" / "0.png", where / "0.png")
    assert len(load(spec, "test", animals)) == 6 and missing(spec, animals) == []
    load(spec, "test", animals)
    said = capsys.readouterr().out
    assert said.count("holds no class folders: the test images are those of") == 1 and "val" in said


def test_a_sorted_test_comes_before_val(animals):
    shutil.copytree(animals / "val", animals / "test")
    (animals / "test" / "cat" / "0.png").unlink()
    assert len(load(SPEC, "test", animals)) == 5


def test_a_test_folder_that_lacks_a_class_does_not_shift_the_labels(animals):
    shutil.rmtree(animals / "val" / "bee")
    with pytest.raises(ValueError, match=r"val: class folders do not match; missing: \['bee'\]"):
        load(replace(SPEC, classes=(), label_ids=()), "test", animals)


def test_what_systems_leave_behind_is_left_out_and_said_once(animals, capsys, monkeypatch):
    monkeypatch.setattr(locks, "_said", set())
    spec, train = replace(SPEC, classes=(), label_ids=()), animals / "train"
    before = load(spec, "train", animals)
    assert capsys.readouterr().out == ""
    for where in (train, train / "cat"):
        for name in ("@eaDir", "__MACOSX", ".hidden"):
            (where / name).mkdir()
            shutil.copy(train / "bee" / "0.png", where / name / "SYNOPHOTO_THUMB_M.jpg")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "._x.jpg"):
        (train / "cat" / name).write_bytes(b"\0\5\26\7")
    (train / "cat" / "loop").symlink_to(train / "cat")
    (train / "cat" / "above").symlink_to(animals)
    (train / "bee" / "self.png").symlink_to(train / "bee")
    (train / "itself").symlink_to("itself")
    images = load(spec, "train", animals)
    load(spec, "train", animals)
    assert images.classes == before.classes and torch.equal(images.labels, before.labels)
    assert torch.equal(images.fetch(torch.arange(6)), before.fetch(torch.arange(6)))
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{train}: 13 files and folders that systems leave behind" in line and "the first is" in line


@pytest.mark.parametrize("target", ["train/cat", "train", "."])
def test_a_link_back_is_not_followed(animals, target):
    """The system ends such a loop after 40 links, each with all images again."""
    (animals / "train" / "cat" / "again").symlink_to(animals / target)
    assert load(SPEC, "train", animals).labels.bincount().tolist() == [2, 2, 2]


def test_a_link_to_itself_is_no_folder(animals):
    for where in (animals / "train", animals / "train" / "cat"):
        (where / "itself").symlink_to("itself")
    assert load(SPEC, "train", animals).labels.bincount().tolist() == [2, 2, 2]


def test_links_to_images_elsewhere_are_followed(animals):
    (animals / "train" / "cat").rename(animals / "cats")
    (animals / "train" / "cat").symlink_to(animals / "cats")
    assert len(load(SPEC, "train", animals)) == 6


ACCENTED = ("bébé", "chat", "dé")


@pytest.fixture(params=["NFC", "NFD"])
def accented(tmp_path, request):
    """Class folders with accents in a normal form; the list is in the other one."""
    for split in ("train", "val"):
        for name in ACCENTED:
            folder = tmp_path / split / unicodedata.normalize(request.param, name)
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16), COLOURS["cat"]).save(folder / "0.png")
    listed = [unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[request.param], name) for name in ACCENTED]
    return tmp_path, listed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_classes_txt_of_another_system(accented, encoding):
    folder, listed = accented
    order = listed[::-1]
    (folder / "classes.txt").write_bytes("\r\n".join(order).encode(encoding))
    for spec in (DataSpec("x", (), (), 16), DataSpec("x", tuple(order), (), 16)):
        images = load(spec, "train", folder)
        assert [unicodedata.normalize("NFC", name) for name in images.classes] == list(ACCENTED)[::-1]
    (folder / "classes.txt").unlink()
    assert load(DataSpec("x", (), (), 16), "test", folder).classes == ACCENTED


def test_classes_txt_in_latin_1_is_refused_with_its_line(accented):
    folder, _ = accented
    (folder / "classes.txt").write_bytes("chat\nbébé\ndé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes.txt, line 2 is not utf-8"):
        load(DataSpec("x", (), (), 16), "train", folder)


def test_two_folders_of_one_name_are_refused(accented):
    folder, listed = accented
    (folder / "train" / listed[0]).mkdir()
    with pytest.raises(ValueError, match="are one name in two Unicode forms"):
        load(DataSpec("x", (), (), 16), "train", folder)
