"""`igd evaluate`: anybody's set of images, its classes found by name, trained on and tested as any other."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from igd_lib import evaluation
from igd_lib.__main__ import igd
from igd_lib.data.datasets import IMAGENETTE_CLASSES
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.distillation import distill
from igd_lib.evaluation import evaluate
from igd_lib.experiment import any_set
from igd_lib.experiment.any_set import evaluate_set, read_real, read_set, relabelled
from igd_lib.protocols import IGD_CIFAR, IGD_HARD, PROTOCOLS, RDED_SOFT, RDED_SOFT_64, SMALL_HARD
from igd_lib.tools import files

SHORT = replace(SMALL_HARD, image_size=16, epochs=2, mixed_precision=False)
SHADES = {"dark": 20, "light": 230, "mid": 120}  # sorted, as a plain folder numbers them


def write(base, shades=SHADES, count: int = 4, size: int = 16):
    """Class folders of single-coloured images."""
    for name, shade in shades.items():
        (base / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (size, size), (shade + number,) * 3).save(base / name / f"{number}.png")
    return base


@pytest.fixture
def folders(tmp_path):
    """A set, and real images with another number of them a class, in `val`."""
    write(tmp_path / "real" / "val", count=6)
    return write(tmp_path / "set"), tmp_path / "real"


@pytest.fixture
def distilled(tiny_pipe, tmp_path):
    """A set of 2 images of each shade, its classes in another order than the sorted one."""
    order = ("mid", "light", "dark")
    pixels = torch.tensor([SHADES[name] for name in order], dtype=torch.uint8)
    images = pixels.repeat_interleave(2).reshape(6, 1, 1, 1).expand(6, 3, 16, 16).contiguous()
    data = from_tensors("shades", "train", order, images, torch.arange(3).repeat_interleave(2))
    return distill(
        tiny_pipe,
        data,
        ipc=2,
        guidance=None,
        checkpoints=None,
        num_steps=3,
        label_ids=(4, 0, 9),
        out_dir=tmp_path / "distilled",
    )


def shade_of(data: ImageData, name: str) -> int:
    """The least red value of a class's images."""
    return int(data.of_class(data.classes.index(name))[:, 0].min())


# --- what is read


def test_every_form_of_a_set_is_the_same_images(distilled, tmp_path):
    """The set itself and its three exports: pixels, labels, class order, and so the evaluation's key."""
    forms = [read_set(distilled.path)]
    for form in ("imagefolder", "rded", "safetensors"):
        forms.append(read_set(distilled.export(tmp_path / form, form)))
    for found in forms:
        assert found.classes == ("mid", "light", "dark") and found.image_size == 16
        assert evaluation.fingerprint(found) == evaluation.fingerprint(distilled.data())
        assert (found.name, found.split) == (forms[0].name, forms[0].split)


def test_class_folders_are_known_by_their_names(folders):
    """A set's labels follow the real images' order, here that of their classes.txt."""
    own, real = folders
    (real / "classes.txt").write_text("mid\nlight\ndark\n")
    test = read_real(str(real), 16)
    assert test.classes == ("mid", "light", "dark") and shade_of(test, "light") == 230
    train = relabelled(read_set(own), test.classes, own)
    assert train.classes == test.classes and len(train) == 12
    assert {name: shade_of(train, name) for name in SHADES} == SHADES


def test_a_folder_without_a_list_takes_over_the_set_s_order(folders, distilled):
    test = read_real(str(folders[1]), 16, distilled.classes)
    assert test.classes == ("mid", "light", "dark") and shade_of(test, "mid") == 120
    (folders[1] / "classes.txt").write_text("mid\ndark\nlight\n")
    with pytest.raises(
        ValueError, match="label 1 is 'light' in the distilled set and 'dark' in the test set"
    ):
        evaluate_set(distilled.path, folders[1], protocol=SHORT, networks=["convnet1"])


@pytest.mark.parametrize("place", ["test", "val", "."])
def test_where_real_images_may_lie(tmp_path, place):
    write(tmp_path / "real" / place)
    if place == "val":
        (tmp_path / "real" / "test").mkdir()  # unsorted images
        Image.new("RGB", (8, 8)).save(tmp_path / "real" / "test" / "0.png")
    found = read_real(str(tmp_path / "real"), 16)
    assert found.classes == ("dark", "light", "mid") and len(found) == 12 and found.name.startswith("real-")


def test_a_set_s_class_folders_may_lie_in_train_and_a_class_may_be_a_train(tmp_path):
    assert read_set(write(tmp_path / "a" / "train").parent).classes == ("dark", "light", "mid")
    assert read_set(write(tmp_path / "b", {"train": 10, "truck": 30})).classes == ("train", "truck")
    assert read_real(str(write(tmp_path / "c", {"test": 10, "train": 30})), 8).classes == ("test", "train")


def test_names_are_compared_in_the_composed_form(tmp_path):
    for form in ("NFC", "NFD"):
        write(tmp_path / form, {unicodedata.normalize(form, "Bär"): 10, "Zobel": 99})
    test = read_real(str(tmp_path / "NFD"), 16)
    assert relabelled(read_set(tmp_path / "NFC"), test.classes, tmp_path).classes == test.classes


def test_real_images_of_other_files_have_another_name(folders):
    """Evaluations in the cache are found by it."""
    first = read_real(str(folders[1]), 16).name
    (folders[1] / "val" / "dark" / "0.png").unlink()
    assert read_real(str(folders[1]), 16).name != first


# --- what is refused


def test_other_classes_are_named(folders, tmp_path):
    own, real = folders
    (own / "mid").rename(own / "middle")
    message = r"classes differ: the real images has 'mid' and .*set has not \(3 and 3 classes, 2 names in one"
    with pytest.raises(ValueError, match=message):
        evaluate_set(own, real, protocol=SHORT)
    shutil.rmtree(own / "middle")
    with pytest.raises(ValueError, match=r"has 'mid' and .* has not \(2 and 3 classes, 1 names"):
        evaluate_set(own, real, protocol=SHORT)
    numbers = write(tmp_path / "numbers", {"00000": 1, "00001": 2, "00002": 3})
    with pytest.raises(
        ValueError, match="'00000'.*numbers do not say which classes they are: give the folders"
    ):
        evaluate_set(numbers, real, protocol=SHORT)


def test_what_is_no_set_or_no_data_is_named(folders, distilled, tmp_path):
    own, real = folders
    with pytest.raises(FileNotFoundError, match="SET is a folder of images; there is no folder .*nowhere"):
        evaluate_set(tmp_path / "nowhere", real)
    with pytest.raises(
        FileNotFoundError, match=r"REAL is a folder or a data set \(cifar-10, .*no folder .*woof"
    ):
        evaluate_set(own, "woof", protocol=SHORT)
    distilled.image_path(1, 0).unlink()
    with pytest.raises(ValueError, match="class 1 has 0 of 2 images"):
        evaluate_set(distilled.path, real)
    (distilled.path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        evaluate_set(distilled.path, real)
    with pytest.raises(ValueError, match="rded-soft-32 has soft labels: name the file of what gives them"):
        evaluate_set(own, real, protocol=PROTOCOLS["rded-soft-32"])


def test_a_set_of_some_classes_is_refused(distilled):
    manifest = json.loads((distilled.path / "manifest.json").read_text())
    (distilled.path / "manifest.json").write_text(json.dumps(manifest | {"selected": [0, 2]}))
    with pytest.raises(ValueError, match="no images of 1 of its 3 classes, the first is 'light'"):
        read_set(distilled.path)


# --- scores


def test_scores_are_evaluate_s_own_and_are_kept(folders, monkeypatch):
    """Each seed's score, read the second time."""
    own, real = folders
    found = evaluate_set(
        own, real, networks=["convnet1", "convnet2"], protocol=SHORT, seeds=[0, 1], device="cpu"
    )
    for score in found.scores:
        options = dict(network=score.network, protocol=SHORT, seed=score.seed, device="cpu")
        again = evaluate(found.train, found.test, **options)
        assert replace(again, seconds=0) == replace(score, seconds=0)
    assert [(one.network, one.seed) for one in found.scores] == [
        ("convnet1", 0),
        ("convnet1", 1),
        ("convnet2", 0),
        ("convnet2", 1),
    ]
    monkeypatch.setattr(evaluation, "train_network", lambda *_: pytest.fail("trained again"))
    assert evaluate_set(own, real, networks=["convnet1"], protocol=SHORT, seeds=[1], device="cpu").scores == [
        found.scores[1]
    ]


def test_usual_choices():
    assert any_set.usual_protocol(32, soft=False) is IGD_CIFAR
    assert any_set.usual_protocol(64, soft=False) == replace(IGD_HARD, image_size=64)
    assert any_set.usual_protocol(224, soft=False) is any_set.usual_protocol(256, soft=False) is IGD_HARD
    assert any_set.usual_protocol(64, soft=True) is RDED_SOFT_64
    assert any_set.usual_protocol(224, soft=True) is RDED_SOFT
    assert any_set.at_size(RDED_SOFT, 112).test_resize == 128
    sizes = (32, 64, 128, 224, 256, 512)
    assert [any_set.usual_network(size)[-1] for size in sizes] == ["3", "4", "5", "6", "6", "6"]


def test_a_teacher_s_file_gives_soft_labels(folders, tmp_path):
    """It is checked on the real images before it labels anything."""
    own, real = folders
    from igd_lib.models.networks import network

    model = network("resnet18_modified", num_classes=3, image_size=16)
    torch.nn.init.zeros_(model.get_submodule("fc").weight)  # every image is of one class: a third right
    file = files.save_tensors(tmp_path / "teacher.safetensors", model.state_dict())
    with pytest.raises(
        ValueError, match=r"teacher resnet18_modified \(teacher\.safetensors, .* real images of real"
    ):
        evaluate_set(own, real, teacher=file, image_size=16, epochs=1, networks=["convnet1"], device="cpu")


# --- the command


def told(*arguments):
    return CliRunner().invoke(igd, ["evaluate", *map(str, arguments)])


def test_the_command_prints_mean_and_spread(folders):
    own, real = folders
    options = ["--protocol", "small-hard", "--epochs", "2", "--network", "convnet1", "--image-size", "16"]
    found = told(own, real, *options, "--seeds", "2", "--device", "cpu")
    assert found.exit_code == 0, found.output
    scores = evaluate_set(
        own,
        real,
        networks=["convnet1"],
        protocol=SMALL_HARD,
        seeds=[0, 1],
        image_size=16,
        epochs=2,
        device="cpu",
    ).scores
    first, second = (score.last for score in scores)
    mean, sd = (first + second) / 2, abs(first - second) / 2**0.5
    lines = found.output.splitlines()
    assert lines[0] == "set: set, class folders: 12 images of 16 px, 4 in each of 3 classes"
    assert lines[1].startswith("tested on: real-") and lines[1].endswith("test: 18 images")
    assert lines[2].startswith("protocol: small-hard; 2 epochs, not its 50; 16 px, not its 32; ")
    assert lines[3].startswith(
        f"convnet1: top-1 {mean:.1f} ± {sd:.1f} % (last; n = 2, training seeds 0, 1); best"
    )
    one = told(own, real, *options, "--seeds", "1", "--device", "cpu")
    assert (
        f"convnet1: top-1 {first:.1f} % (last; n = 1, training seeds 0)" in one.output
        and "±" not in one.output
    )
    as_json = json.loads(told(own, real, *options, "--seeds", "2", "--device", "cpu", "--json").stdout)
    assert [score["last"] for score in as_json["scores"]] == [first, second]
    assert as_json["set"]["classes"] == ["dark", "light", "mid"]


def test_the_command_s_errors(folders, tmp_path, monkeypatch):
    own, real = folders
    found = told(own, real, "--protocol", "igd")
    assert found.exit_code == 2 and "one of minimax-hard, igd-hard" in found.output
    found = told(own, "imagenette", "--epochs", "1")
    assert found.exit_code == 1 and found.output.startswith("Error: imagenette: no folder")
    monkeypatch.setattr(any_set, "evaluate_all", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    found = told(own, real, "--epochs", "1")
    assert found.exit_code == 130 and "the same command goes on from what is on disk" in found.output
    assert "Example: igd evaluate" in told("--help").output


def test_a_data_set_by_name(own_cache, monkeypatch, tmp_path):
    """Class folders named by wnid are known to ImageNette."""
    monkeypatch.setenv("IGD_DATA", str(tmp_path))
    for number, wnid in enumerate(IMAGENETTE_CLASSES):
        shade = {wnid: 25 * number}
        for place, count in (("imagenet/val", 50), ("imagenet/train", 1), ("set", 1)):
            write(tmp_path / place, shade, count=count, size=8)
    found = told(tmp_path / "set", "imagenette", "--epochs", "1", "--image-size", "16", "--seeds", "1")
    assert found.exit_code == 0, found.output
    assert "tested on: imagenette, test: 500 images" in found.output and "convnet2: top-1" in found.output
