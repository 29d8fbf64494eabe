"""One's own folder as an experiment: with a stand-in, with ImageNet's ids, with a fine-tuned DiT."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from torchvision.datasets import ImageFolder

from igd_lib.__main__ import igd
from igd_lib.config import Guidance
from igd_lib.data import images
from igd_lib.data.datasets import FASHION_CLASSES, IMAGENET_CLASSES
from igd_lib.experiment import measures, your_data
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.experiment.your_data import hand_over, methods, prepare, real_images, write_folder
from igd_lib.models.dit import for_classes
from igd_lib.models.folder import write_pipeline
from igd_lib.pipeline import IGDPipeline
from igd_lib.sets.store import DistilledSet
from igd_lib.tools.machine import cache_dir

WNIDS = {"beagle": "n02088364", "dingo": "n02115641", "Samoyed": "n02111889"}


@pytest.fixture
def lesson(small_loads, monkeypatch, fashion_train, fashion_test):
    """Fashion-MNIST read once; folders are read as they are."""
    splits = {"train": fashion_train, "test": fashion_test}
    monkeypatch.setattr(
        your_data,
        "load",
        lambda data, split: splits[split] if isinstance(data, str) else images.load(data, split),
    )


@pytest.fixture
def smoke(lesson):
    return prepare("17", "", "smoke")


@pytest.fixture
def dogs(tmp_path, only_fashion, monkeypatch):
    """A folder of three classes on a machine where a CPU may do."""
    monkeypatch.setenv("IGD_ALLOW_CPU", "1")
    for split, count in (("train", 6), ("val", 2)):
        for shade, name in enumerate(WNIDS):
            (tmp_path / "dogs" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (24, 20), (80 * shade, 30 * number, 7))
                image.save(tmp_path / "dogs" / split / name / f"{number}.jpg")
    return tmp_path / "dogs"


def write_ids(folder) -> None:
    rows = "".join(f"{name},{wnid}\n" for name, wnid in WNIDS.items())
    (folder / "imagenet_ids.csv").write_text("folder,wnid\n" + rows)


def save_dit(tiny) -> None:
    """A tiny DiT of 1,000 classes, for 16 px, under the name of DiT-XL/2."""
    models = tiny(num_classes=1000)
    IGDPipeline(models.transformer, models.vae, models.ddpm).save_pretrained(
        cache_dir() / "models" / "DiT-XL-2-256"
    )
    models.vae.save_pretrained(cache_dir() / "models" / "sd-vae-ft-mse")


def save_own_dit(tiny, names) -> None:
    """What `igd finetune` would leave for the folder `dogs`."""
    models = tiny(num_classes=1000)
    own = for_classes(models.transformer, [None] * len(names))
    by_id = {str(label): name for label, name in enumerate(names)}
    write_pipeline(cache_dir() / "models" / "DiT-dogs", own, models.vae, models.ddpm, by_id)


# --- without a folder


def test_an_ordinary_folder_of_the_stand_in_s_images_is_written(smoke, fashion_train, fashion_test):
    """What torchvision's ImageFolder finds in it: the first 40 images of three classes, pixel by pixel."""
    folder = cache_dir() / "folders" / "fashion-mnist-40"
    for split, source in (("train", fashion_train), ("test", fashion_test)):
        plain = ImageFolder(str(folder / split))
        assert plain.classes == ["Pullover", "T-shirt", "Trouser"] and len(plain) == 120
        for number in (0, 39, 40, 119):
            picture, label = plain[number]
            own = source.of_class(FASHION_CLASSES.index(plain.classes[label]), 40)[number % 40]
            assert np.array_equal(np.asarray(picture), own.permute(1, 2, 0).numpy())
    assert re.fullmatch(r"fashion-mnist-40-[0-9a-f]{6}", smoke.train.name)
    assert "**Scale: smoke.**" in smoke.banner and "numbers mean nothing" in smoke.banner


def test_the_dit_is_asked_for_the_class_of_a_folder_s_name(smoke):
    """Labels go by sorted names here, and by the stand-in's own order in its DiT."""
    assert smoke.train.classes == ("Pullover", "T-shirt", "Trouser") and smoke.label_ids == (2, 0, 1)
    assert [FASHION_CLASSES[number] for number in smoke.label_ids] == list(smoke.train.classes)
    found = smoke.set(Method(), 0, 1)
    assert isinstance(found, DistilledSet) and found.manifest["label_ids"] == list(smoke.label_ids)


def test_it_is_written_once(smoke, monkeypatch):
    folder = cache_dir() / "folders" / "fashion-mnist-40"
    before = (folder / "train" / "Trouser" / "00000.png").stat().st_mtime_ns
    monkeypatch.setattr(your_data, "write_folder", lambda *_: pytest.fail("written again"))
    again = prepare("17", "", "smoke")
    assert (folder / "train" / "Trouser" / "00000.png").stat().st_mtime_ns == before
    assert again.train.name == smoke.train.name


def test_an_interrupted_folder_is_not_taken_for_one(toy_data, tmp_path, monkeypatch):
    out, real, done = tmp_path / "toy", your_data.TF.to_pil_image, []

    def stop(image):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(image)
        return real(image)

    with monkeypatch.context() as patch:
        patch.setattr(your_data.TF, "to_pil_image", stop)
        with pytest.raises(KeyboardInterrupt):
            write_folder({"train": toy_data}, out)
    assert not out.exists()
    assert write_folder({"train": toy_data}, out) == out and len(ImageFolder(str(out / "train"))) == 18
    (out / "train" / "a" / "00000.png").unlink()  # a user's folder from then on
    write_folder({"train": toy_data}, out)
    assert not (out / "train" / "a" / "00000.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    with pytest.raises(ValueError, match="class name 'a/b' cannot be a folder's name"):
        write_folder({"train": replace(toy_data, classes=("a/b", "b", "c"))}, tmp_path / "other")


def test_a_folder_of_the_stand_in_s_classes_is_taken(smoke, lesson, tmp_path):
    """Few images, some of the classes."""
    source = cache_dir() / "folders" / "fashion-mnist-40"
    for split in ("train", "test"):
        for name in ("Trouser", "Pullover"):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for path in sorted((source / split / name).iterdir())[:3]:
                (tmp_path / "own" / split / name / path.name).write_bytes(path.read_bytes())
    found = prepare("17", str(tmp_path / "own"), "small")
    assert found.label_ids == (2, 1) and found.scale.train_images == 3 and found.scale.name == "small"
    assert len(found.train) == len(found.test) == 6


def test_other_classes_and_no_folder_are_refused(dogs, lesson):
    message = r"dogs: the stand-in's DiT, .*scale='small'.* the class 'Samoyed' but T-shirt, .*scale='paper'"
    with pytest.raises(ValueError, match=message):
        prepare("17", str(dogs), "small")
    with pytest.raises(ValueError, match="scale='paper' is for a folder of yours"):
        prepare("17", "", "paper")


# --- a folder with DiT


def test_what_a_folder_lacks_is_named(dogs, monkeypatch):
    for scale in ("auto", "paper"):
        with pytest.raises(FileNotFoundError) as caught:
            prepare("17", str(dogs), scale)
        (first, line) = str(caught.value).splitlines()
        assert "dogs lacks; or leave `folder` empty" in first
        assert f"write {dogs}/imagenet_ids.csv, columns folder,wnid" in line
        assert f"accelerate launch -m igd_lib finetune {dogs} {cache_dir() / 'models' / 'DiT-dogs'}" in line
    write_ids(dogs)
    monkeypatch.delenv("IGD_ALLOW_CPU")
    with pytest.raises(FileNotFoundError) as caught:
        prepare("17", str(dogs))
    pieces = ("facebook/DiT-XL-2-256: hf download", "stabilityai/sd-vae-ft-mse: hf", "a CUDA GPU")
    for line, piece in zip(str(caught.value).splitlines()[1:], pieces, strict=True):
        assert piece in line


def test_half_a_fine_tuned_model_is_none(dogs):
    (cache_dir() / "models" / "DiT-dogs").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a DiT that knows its classes"):
        prepare("17", str(dogs))


def test_a_folder_with_imagenet_s_ids(dogs, tiny):
    """DiT is asked for its own ids of the classes; k and gamma are Table 12's, or those given."""
    save_dit(tiny)
    write_ids(dogs)
    found = prepare("17", str(dogs), "auto", run=Run(ipc=50))
    assert found.scale.name == "paper" and found.scale.protocol.name == "igd-cifar"
    assert found.train.classes == ("Samoyed", "beagle", "dingo") and found.train.image_size == 16
    assert [IMAGENET_CLASSES[number] for number in found.label_ids] == [
        WNIDS[name] for name in found.train.classes
    ]
    assert found.scale.guidance == Guidance(5.0, 120.0) and not found.scale.from_table_12
    assert "Table 12's for imagewoof: nobody chose them" in found.banner
    assert found.models.pipe.transformer.config.timestep_frequencies == "original"
    assert prepare("17", str(dogs), run=Run(ipc=10)).scale.guidance.gamma == 50
    changed = prepare("17", str(dogs), k="2.5", gamma="30").scale.guidance
    assert changed == Guidance(2.5, 30.0, (30, 45))
    with pytest.raises(ValueError, match='gamma is a number, or "auto" for 50, got .strong.'):
        prepare("17", str(dogs), gamma="strong")
    labels = [method.label for method in methods(found)]
    assert labels == ["Random", "DiT", "DiT + G_D", "DiT-IGD"]  # no best cfg: none was chosen on these


def test_a_set_of_a_folder_with_imagenet_s_ids(dogs, tiny):
    save_dit(tiny)
    write_ids(dogs)
    found = prepare("17", str(dogs))
    made = found.set(Method(), 0, 1)
    assert made.data().labels.tolist() == [0, 1, 2] and made.manifest["label_ids"] == [258, 162, 273]
    shown = real_images(found)
    assert list(shown.rows) == ["Samoyed", "beagle", "dingo"] and shown.rows["dingo"].shape == (6, 3, 16, 16)


def test_a_folder_with_a_dit_of_its_own(dogs, tiny):
    save_own_dit(tiny, ["Samoyed", "beagle", "dingo"])
    found = prepare("17", str(dogs))
    assert found.label_ids == (0, 1, 2) and str(cache_dir() / "models" / "DiT-dogs") in found.banner
    for split in ("train", "val"):
        (dogs / split / "dingo").rename(dogs / split / "Akita")
    message = "DiT-dogs was fine-tuned for other classes: 'Akita', label 0, is none of its classes; fine-tune"
    with pytest.raises(ValueError, match=message):
        prepare("17", str(dogs))
    (dogs / "classes.txt").write_text("beagle\nSamoyed\nAkita\n")
    with pytest.raises(ValueError, match="'beagle', label 0, has its id 1"):
        prepare("17", str(dogs))


# --- what the notebook hands over


def test_the_line_that_it_prints_evaluates_the_exported_set(smoke, tmp_path):
    """To the very score of the notebook's row of seed 0."""
    sets = smoke.sets([Method()], 1, 1)
    out, text = hand_over(smoke, sets, Method(), ["convnet1", "convnet2"], str(tmp_path))
    assert out.parent == tmp_path and ImageFolder(str(out)).classes == sorted(FASHION_CLASSES[:3])
    command = shlex.split(re.search(r"`(igd evaluate .*)`", text)[1])
    assert command[-2:] == ["--epochs", "2"]
    told = CliRunner().invoke(igd, [*command[1:], "--json", "--seeds", "1", "--device", smoke.device])
    assert told.exit_code == 0, told.output
    scores = json.loads(told.stdout)["scores"]
    rows = measures.accuracy_rows(smoke, sets, ["convnet1", "convnet2"])
    own = rows[rows.metric == "top1_last"]
    assert [score["last"] for score in scores] == own.value.tolist()
