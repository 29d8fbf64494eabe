"""Teachers that are trained here on a data set's real images, where none is given, and the stand-ins'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from igd_lib import evaluation
from igd_lib.data.images import ImageData, load
from igd_lib.evaluation import Cell
from igd_lib.models import standin
from igd_lib.models.networks import network as make_network
from igd_lib.protocols import Protocol
from igd_lib.teachers import Teacher
from igd_lib.tools import files, keys

# torchvision's reference code for classification with its default settings, after which RDED's teachers were
# trained: SGD 0.1 (x 0.1 every 30 of 90 epochs), batch 256, crops of 8 to 100 % of the area, flips. RDED's
# README names the code, not the settings; and here crops are taken of the central square, at 256 px.
TEACHER = Protocol(
    "teacher",
    224,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    "sgd",
    0.1,
    1e-4,
    batch_size=256,
    epochs=90,
    milestones=(1 / 3, 2 / 3),
    lr_decay=0.1,
    train_resize=256,
    crop_scale=(0.08, 1.0),
    jitter=0.0,
    lighting=0.0,
    cutmix=0.0,
    test_resize=256,
    evaluations=1,
    reported="last",
    seeds=(0,),
)


def teacher_recipe(image_size: int) -> tuple[str, Protocol]:
    """The network and training of a teacher for images of that size, as RDED has them.

    Its ResNet-18 at 224 px, up to 64 px the "modified" one at the images' own. There crops are of at least
    half the area, which is ours: 8 % of 32 px are nine pixels a side.
    """
    if image_size > 64:
        return "torchvision/resnet18", TEACHER
    small = replace(TEACHER, name="teacher-small", image_size=image_size, crop_scale=(0.5, 1.0))
    return "resnet18_modified", replace(small, train_resize=None, test_resize=None)


# A stand-in's: torchvision's reference code as for other small images, shorter.
STAND_IN_TEACHER = replace(
    teacher_recipe(32)[1],
    name="stand-in-teacher",
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    lr=0.05,
    weight_decay=5e-4,
    batch_size=128,
    epochs=20,
    milestones=(0.6, 0.85),
    mixed_precision=True,
)
SHIPPED = "teacher/teacher.safetensors"  # in a stand-in's folder


def train_teacher(
    train: ImageData,
    test: ImageData,
    folder: str | Path | None = None,  # None: of the cache, named by the settings
    *,
    network: str | None = None,  # None and None: `teacher_recipe`'s
    recipe: Protocol | None = None,  # of hard labels
    least: float = Teacher.least,
    seed: int = 0,
    device: str | None = None,
) -> Teacher:
    """Train a network on all real images of `train`; one that is finished in `folder` is read instead.

    An interrupted run goes on after its last state; a folder of other settings is refused. Says what it is
    and its top-1 on `test`. Raises ValueError for soft labels or other class orders, FloatingPointError on
    a non-finite loss.
    """
    usual = teacher_recipe(train.image_size)
    name, recipe = network or usual[0], recipe or usual[1]
    cell = Cell.of(train, test, name, recipe, seed, device=device)
    folder = keys.folder("teacher", cell.about) if folder is None else Path(folder)
    keys.claim(folder / "manifest.json", "teacher", cell.about, "a teacher")
    path = folder / "teacher.safetensors"
    if not path.is_file():
        with files.locked(folder, "a teacher's training", wait=True):
            if not path.is_file():
                _train(cell, folder / "training.safetensors", path)
    state, note = files.load_tensors(path)
    model = make_network(name, num_classes=len(train.classes), image_size=recipe.image_size)
    model.load_state_dict(state)
    weights = f"trained here on {len(train):,} images of {train.name}, {train.split}; {files.digest(state)}"
    teacher = Teacher(model, name, weights, train.classes, recipe.mean, recipe.std, least, note["top1"])
    print(teacher, flush=True)
    return teacher


def _train(cell: Cell, training: Path, path: Path) -> None:
    """The network as its training ends, and its top-1, into the file `path`."""
    model, score = evaluation.train_network(cell, training)
    files.save_tensors(path, model.state_dict(), top1=score.last)
    training.unlink(missing_ok=True)


def add_teacher(name: str, out: str | Path) -> Path:
    """Train a stand-in's teacher and write it beside its models in `out`, in half precision.

    A ConvNet-3 on all images that the stand-in may see; an interrupted training goes on. Returns its file.
    """
    data, path = standin.data_of(standin.STANDINS[name]), Path(out) / SHIPPED
    train, test = load(data, "train"), load(data, "test")
    teacher = train_teacher(train, test, network="convnet3", recipe=STAND_IN_TEACHER)
    state = {key: value.half() for key, value in teacher.model.state_dict().items()}
    files.save_tensors(path, state, network=teacher.architecture, images=len(train), top1=teacher.top1)
    return path


def stand_in_teacher(name: str) -> Teacher | None:
    """The teacher that a stand-in is shipped with, None where it has none."""
    path, recipe = standin.path(name) / SHIPPED, STAND_IN_TEACHER
    if not path.is_file():
        return None
    state, about = files.load_tensors(path)
    classes = standin.data_of(standin.STANDINS[name]).classes
    model = make_network(about["network"], num_classes=len(classes), image_size=recipe.image_size)
    model.load_state_dict(state)
    weights = f"the stand-in's, of {about['images']:,} real images; {files.digest(state)}"
    return Teacher(
        model.eval(), about["network"], weights, classes, recipe.mean, recipe.std, top1=about["top1"]
    )
