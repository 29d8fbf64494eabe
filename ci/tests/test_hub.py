"""Sharing: what is pushed is what is pulled, to the byte; what was changed, or may not go out, is refused."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi
from PIL import Image

from igd_lib.__main__ import igd
from igd_lib.baselines import finetuning, minimax
from igd_lib.baselines.d4m import D4M
from igd_lib.config import Guidance
from igd_lib.data.datasets import CIFAR10_CLASSES, FASHION_CLASSES, IMAGENETTE_CLASSES, IMAGEWOOF_CLASSES
from igd_lib.data.images import from_tensors
from igd_lib.distillation import distill
from igd_lib.experiment import makers, registry
from igd_lib.experiment.any_set import evaluate_set, read_set
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.models.folder import write_pipeline
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.protocols import SMALL_HARD
from igd_lib.sets import cards, folder_hub, hub, learned, sharing, sums, terms
from igd_lib.sets.class_files import ClassFiles
from igd_lib.sets.hub import FolderHub, Hub
from igd_lib.sets.shareable import Declared
from igd_lib.sets.store import DistilledSet
from igd_lib.surrogate import ClassGradients, train_surrogate
from igd_lib.tools import files, keys
from igd_lib.tools.machine import work_dir


@pytest.fixture(scope="session")
def sampled(standin_pipe, tmp_path_factory) -> Path:
    """A set of the stand-in, two images a class."""
    classes = torch.arange(10)
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    return distill(
        standin_pipe,
        from_tensors("fashion-mnist", "train", FASHION_CLASSES, images, classes),
        ipc=2,
        guidance=Guidance(k=0, gamma=1.0, guided_range=(1, 2)),
        checkpoints=None,
        num_steps=3,
        label_ids=range(10),
        out_dir=tmp_path_factory.mktemp("sampled") / "set",
    ).path


@pytest.fixture
def own(sampled, tmp_path) -> DistilledSet:
    """A copy of it."""
    return DistilledSet(shutil.copytree(sampled, tmp_path / "set"))


@pytest.fixture
def repo(tmp_path) -> str:
    return f"file://{tmp_path}/shared/mine"


@pytest.fixture
def pushed(own, repo, tmp_path) -> Path:
    """The folder that it was pushed to."""
    own.push(repo)
    return tmp_path / "shared" / "mine"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {name: (folder / name).read_bytes() for name in sums.listed(folder)}


def one_line(error) -> str:
    """The message, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


class Remote(FolderHub):
    """A hub that keeps every commit, counts downloads, and may be cut off."""

    downloads, cut = 0, False

    def upload_folder(self, **given):
        done = super().upload_folder(**given)
        kept = self.root / "commits" / done.oid
        if not kept.exists():
            shutil.copytree(self._path(given["repo_id"]), kept)
        return done

    def repo_info(self, repo_id, *, repo_type, revision):
        if (self.root / "commits" / str(revision)).is_dir():
            return super().repo_info(f"commits/{revision}", repo_type=repo_type, revision=None)
        return super().repo_info(repo_id, repo_type=repo_type, revision=revision)

    def snapshot_download(self, repo_id, *, repo_type, revision, local_dir):
        self.downloads += 1
        names = sums.listed(self.root / "commits" / revision)
        for name in names[: len(names) // 2] if self.cut else names:
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / "commits" / revision / name, Path(local_dir) / name)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / ".gitattributes").write_text("* text\n")
        if self.cut:
            raise KeyboardInterrupt


# --- there and back


def test_what_is_pulled_is_what_was_pushed(own, repo, tmp_path, own_cache):
    before = tree(own.path)
    done = own.push(repo)
    assert tree(own.path) == before and not list(tmp_path.glob(".push-*"))
    found = DistilledSet.pull(repo, data="fashion-mnist")
    assert found.path == own_cache / "shared" / f"mine-{done.commit[:12]}"
    after = tree(found.path)
    assert {name: after[name] for name in before} == before and found.verify() == []
    assert set(after) - set(before) == {*sums.BESIDE}
    note = json.loads(after["pulled.json"])
    assert note["commit"] == done.commit and note["asked"] is None and note["repo"] == repo
    stat = (found.path / "manifest.json").stat()
    assert DistilledSet.pull(repo).path == found.path  # it is there
    assert (found.path / "manifest.json").stat().st_mtime_ns == stat.st_mtime_ns


def test_the_same_push_again_changes_nothing(own, repo, pushed):
    first, commit = tree(pushed), folder_hub.commit_of(pushed)
    assert own.push(repo).commit == commit and tree(pushed) == first
    pulled = DistilledSet.pull(repo)
    os.utime(pulled.path / "manifest.json", (0, 0))
    assert pulled.push(f"{repo.rpartition('/')[0]}/other/mine").commit == commit  # and from a pulled folder


def test_a_pulled_set_has_the_same_score(own, repo, pushed, tmp_path):
    for label, name in enumerate(FASHION_CLASSES):
        folder = tmp_path / "real" / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * label,) * 3).save(folder / "0.png")
    (tmp_path / "real" / "classes.txt").write_text("\n".join(FASHION_CLASSES))
    short = replace(SMALL_HARD, epochs=1, mixed_precision=False)
    options = dict(protocol=short, networks=["convnet1-w8"], seeds=[0], device="cpu")
    first, second = (
        evaluate_set(folder, tmp_path / "real", **options).scores[0]
        for folder in (own.path, DistilledSet.pull(repo).path)
    )
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_a_revision_may_be_asked(own, tmp_path):
    remote = Remote(tmp_path / "remote")
    first = own.push("me/set", hub=remote).commit
    manifest = own.manifest | {"seed": 7}
    files.write(own.path / "manifest.json", json.dumps(manifest))
    second = own.push("me/set", hub=remote).commit
    assert first != second
    pulls = [
        DistilledSet.pull("me/set", revision=revision, hub=remote).manifest["seed"]
        for revision in (None, first, second)
    ]
    assert pulls == [7, 0, 7]
    with pytest.raises(FileNotFoundError, match="has no revision f00d") as error:
        DistilledSet.pull("me/set", revision="f00d", hub=remote)
    one_line(error)


def test_a_pull_that_is_cut_off_leaves_nothing_in_its_place(own, tmp_path, monkeypatch):
    remote, into = Remote(tmp_path / "remote"), tmp_path / "into"
    own.push("me/set", hub=remote)
    remote.cut = True
    with pytest.raises(KeyboardInterrupt):
        hub.pull("me/set", into, hub=remote)
    assert not into.exists()
    remote.cut = False
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hub.pull("me/set", into, hub=remote)
    assert not into.exists()
    assert DistilledSet(hub.pull("me/set", into, hub=remote).folder).verify() == []
    assert {path.name for path in tmp_path.iterdir()} == {"into", "remote", "set"}  # nothing is left over


def test_a_folder_that_holds_something_else_is_left_alone(own, repo, pushed, tmp_path):
    with pytest.raises(FileExistsError, match="set is not empty: it holds something else") as error:
        hub.pull(repo, own.path)
    one_line(error)
    place = tmp_path / "precious"
    place.mkdir()
    (place / "thesis.md").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something that was not pushed there"):
        own.push(f"file://{place}")
    assert (place / "thesis.md").is_file()
    files.write(own.path / "manifest.json", json.dumps(own.manifest | {"seed": 7}))
    into = DistilledSet.pull(repo, into=tmp_path / "into").path
    own.push(repo)
    with pytest.raises(FileExistsError, match="it holds revision"):
        hub.pull(repo, into)


# --- what is refused of what was pushed


def _change(folder, first, second):
    raw = (folder / first).read_bytes()
    (folder / first).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def _remove(folder, first, second):
    (folder / first).unlink()


def _add(folder, first, second):
    shutil.copyfile(folder / first, folder / "images" / "00000" / "00002.png")


def _rename(folder, first, second):
    (folder / first).rename(folder / "images" / "00000" / "00009.png")


def _swap(folder, first, second):
    (folder / first).rename(folder / "kept.png")
    (folder / second).rename(folder / first)
    (folder / "kept.png").rename(folder / second)


def _link(folder, first, second):
    (folder / first).unlink()
    (folder / first).symlink_to(folder / second)


def _link_a_folder(folder, first, second):
    (folder / "images" / "00001").rename(folder / "elsewhere")
    (folder / "images" / "00001").symlink_to(folder / "elsewhere")


def _code(folder, first, second):
    (folder / "loader.py").write_text("print('run')")


def _pickle(folder, first, second):
    (folder / "weights.pt").write_bytes(pickle.dumps([1]))


def _disguise(folder, first, second):
    """With the right sum: the content itself is looked at."""
    (folder / first).write_bytes(pickle.dumps([1] * 100))
    found = json.loads((folder / "sums.json").read_text())
    (folder / "sums.json").write_text(json.dumps(found | {first: files.sha256(folder / first)}))


def _noted(name):
    def change(folder, first, second):
        found = json.loads((folder / "sums.json").read_text())
        (folder / "sums.json").write_text(json.dumps(found | {name: "0" * 64}))

    return change


def _no_sums(folder, first, second):
    (folder / "sums.json").unlink()


def _no_sha(folder, first, second):
    found = json.loads((folder / "sums.json").read_text())
    (folder / "sums.json").write_text(json.dumps(found | {first: "guess"}))


FIRST, SECOND = "images/00000/00000.png", "images/00001/00001.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change, f"{FIRST} was changed"),
        (_remove, f"{FIRST} is missing"),
        (_add, "images/00000/00002.png was added"),
        (_rename, f"{FIRST} is missing"),
        (_swap, f"{FIRST} was changed"),
        (_link, f"{FIRST} is a symbolic link"),
        (_link_a_folder, "images/00001 is a symbolic link"),
        (_code, "loader.py is refused"),
        (_pickle, "weights.pt is refused"),
        (_disguise, f"{FIRST} is no PNG"),
        (_noted("../../.bashrc.md"), "'../../.bashrc.md' is no plain path"),
        (_noted("/etc/passwd.json"), "'/etc/passwd.json' is no plain path"),
        (_noted("images\\x.png"), "no plain path"),
        (_noted("images/./x.png"), "no plain path"),
        (_noted(".ssh/config.json"), "no plain path"),
        (_noted("evil.pt"), "evil.pt is refused"),
        (_no_sums, "has no sums.json"),
        (_no_sha, f"no sha256 of {FIRST}"),
    ],
)
def test_a_tampered_folder_is_refused_by_name(pushed, repo, tmp_path, change, message):
    change(pushed, FIRST, SECOND)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        DistilledSet.pull(repo, into=tmp_path / "into")
    one_line(error)
    assert not (tmp_path / "into").exists() and not list(tmp_path.glob(".into*"))


def test_a_pulled_set_that_was_changed_since_is_named(pushed, repo, tmp_path):
    into = DistilledSet.pull(repo, into=tmp_path / "into").path
    _swap(into, FIRST, SECOND)
    with pytest.raises(ValueError, match=f"{FIRST} was changed"):
        DistilledSet.pull(repo, into=into)


def test_nothing_is_downloaded_of_a_repository_with_code(own, tmp_path):
    remote = Remote(tmp_path / "remote")
    commit = own.push("me/set", hub=remote).commit
    _code(tmp_path / "remote" / "commits" / commit, FIRST, SECOND)
    with pytest.raises(ValueError, match="loader.py is refused"):
        hub.pull("me/set", hub=remote, revision=commit)
    assert remote.downloads == 0


@pytest.mark.parametrize("suffix", ["safetensors", "png", "json"])
def test_a_pickle_in_disguise_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(pickle.dumps({"a": [1] * 100}))
    with pytest.raises(ValueError, match=f"x.{suffix} is (no|damaged).* it is refused") as error:
        sums.check_content(path)
    one_line(error)


def test_another_class_order_is_refused_by_name(pushed, repo, tmp_path):
    order = list(FASHION_CLASSES)
    order[2], order[3] = order[3], order[2]
    into = tmp_path / "into"
    with pytest.raises(ValueError, match="label 2 is 'Pullover' in what was shared and 'Dress' in") as error:
        DistilledSet.pull(repo, data=order, into=into)
    one_line(error)
    with pytest.raises(
        ValueError, match="label 0 is 'T-shirt' in what was shared and 'airplane' in cifar-10"
    ):
        DistilledSet.pull(repo, data="cifar-10", into=into)
    with pytest.raises(ValueError, match="label 9 is 'Ankle boot' in what was shared and none in"):
        DistilledSet.pull(repo, data=FASHION_CLASSES[:9], into=into)
    with pytest.raises(ValueError, match="unknown data set 'woof'"):
        DistilledSet.pull(repo, data="woof", into=into)
    assert not into.exists()
    assert DistilledSet.pull(repo, data=FASHION_CLASSES, into=into).classes == FASHION_CLASSES
    with pytest.raises(ValueError, match="label 2 is"):
        DistilledSet.pull(repo, data=order, into=into)  # of what is there, too


# --- what is refused of what is to be pushed


def method_set(kind="dm", dataset="cifar-10", classes=CIFAR10_CLASSES, **settings) -> Path:
    """What a method that makes sets in one piece leaves in the cache: a learned image a class."""
    count, about = len(classes), {"data": dataset, "split": "train", "images": 50, "ipc": 1, "seed": 0}
    about |= {"settings": {"iterations": 5} | settings}
    folder = keys.folder(kind, about)
    keys.claim(folder / "manifest.json", kind, about, "a set")
    base = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    images = from_tensors(dataset, kind, classes, base, torch.arange(count))
    learned.save(folder / learned.FILE, images)
    files.write(folder / "README.md", "what it is, for who finds it in the cache\n")
    return folder


def class_set(kind="d4m", dataset="cifar-10", classes=CIFAR10_CLASSES, model=None, **settings) -> Path:
    """The same of one that makes them class by class."""
    about = {"data": dataset, "split": "train", "images": 50, "ipc": 1, "seed": 0}
    about |= {"settings": asdict(D4M()) | settings, "model": model or STAND_IN}
    folder = keys.folder(kind, about)
    keys.claim(folder / "manifest.json", kind, about, "a set")
    kept = ClassFiles(folder, dataset, kind, classes, 1, 32)
    kept.keep(lambda label: torch.full((1, 3, 32, 32), label, dtype=torch.uint8), range(len(classes)), kind)
    return folder


SHAPES = {"stand-in": (6, 4, 48), "other": (2, 2, 8)}
ARCHITECTURES = {
    name: dict(zip(("num_layers", "num_attention_heads", "attention_head_dim"), shape, strict=True))
    for name, shape in SHAPES.items()
} | {"xl": {}}
STAND_IN = {
    "backbone": "dit",
    "model": ARCHITECTURES["stand-in"],
    "label_ids": list(range(10)),
    "transformer": "0123456789ab",
    "vae": "ba9876543210",
}
SD = {"backbone": "stable-diffusion", "names": [], "unet": "0123", "vae": "4567", "text_encoder": "89ab"}


def refused(folder: Path, **declared) -> str:
    with pytest.raises(ValueError) as error:
        sharing.push(folder, "file:///nowhere/x", declared=Declared(**declared))
    return one_line(error)


@pytest.mark.parametrize("kind", ["rded", "coreset"])
def test_sets_of_real_images_are_refused(kind):
    folder = work_dir() / kind / "abc"
    keys.claim(folder / "manifest.json", kind, {"data": "cifar-10", "images": 50}, "a set")
    assert "are real images, whole or in parts: they are not this project's to give" in refused(folder)
    assert "are real images" in refused(folder, derived_from_imagenet=True)


def test_a_method_that_took_no_step_has_real_images():
    assert "are real images" in refused(class_set(strength=0.01))
    assert "are real images" in refused(method_set(iterations=0))


def test_a_folder_of_images_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert "says how it was made" in refused(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sharing.find(tmp_path / "nowhere")


def test_a_set_that_is_not_whole_is_refused(own, repo):
    own.image_path(3, 1).write_bytes(own.image_path(3, 0).read_bytes())
    assert "class 3, image 1: another image than was sampled" in refused(own.path)
    own.image_path(3, 1).unlink()
    assert "class 3, image 1: no image" in refused(own.path)
    files.write(own.path / "manifest.json", json.dumps({**own.manifest, "kind": None}))
    assert "does not say how the set was made" in refused(own.path)


@pytest.mark.parametrize("name", ["notes.txt", "weights.pt", "images/00000/00009.png"])
def test_other_files_in_the_folder_are_refused(own, name):
    (own.path / name).write_bytes(b"x")
    assert name in refused(own.path)
    folder = method_set()
    (folder / "extra.pt").write_bytes(b"x")
    assert "extra.pt is no part of what is shared" in refused(folder)


def test_a_link_in_the_folder_is_refused(own, tmp_path):
    image = own.image_path(0, 0)
    image.rename(tmp_path / "0.png")
    image.symlink_to(tmp_path / "0.png")
    assert f"{FIRST} is a symbolic link" in refused(own.path)


def test_an_export_is_refused(own, tmp_path):
    assert "push the set that it was made from" in refused(own.export(tmp_path / "export"))


def test_imagenet_s_derivatives_need_a_yes(tmp_path):
    for folder in (
        method_set("dm", "imagenette", IMAGENETTE_CLASSES),
        method_set("sre2l", "imagenette", IMAGENETTE_CLASSES),
        class_set("d4m", "imagewoof", IMAGEWOOF_CLASSES, SD),
    ):
        assert "if you may share them, say so: --derived-from-imagenet-ok" in refused(folder)
        work = sharing.find(folder, Declared(derived_from_imagenet=True))
        assert re.search("derived from real images|recovered from networks", work.card.statements[0])


def test_unknown_licences_are_asked_for():
    folder = class_set(dataset="cifar-10", model=STAND_IN | {"model": ARCHITECTURES["other"]})
    assert "2 layers with 2 heads of 8 is not known here: name it, --licence" in refused(folder)
    assert sharing.find(folder, Declared(licence="mit")).card.ingredients[0].licence == terms.MIT
    folder = method_set(dataset="flowers", classes=("rose", "tulip"))
    assert "the licence of the images of flowers is not known here: name it, --data-licence" in refused(
        folder
    )
    card = sharing.find(folder, Declared(data_licence="CC BY 4.0")).card
    assert terms.front_matter(card.ingredients) == {"license": "other", "license_name": "cc-by-4.0"}


# --- the other kinds


def test_every_method_s_origin_is_known():
    """The one table of what may be shared agrees with the rows of notebooks."""
    for own in registry.BASELINES.values():
        if isinstance(own.make, makers.Whole | makers.ByClass):
            assert terms.ORIGIN_OF[own.make.kind] == own.origin
    assert terms.ORIGIN_OF["rded"] == registry.BASELINES["rded"].origin == "real"
    assert set(terms.ORIGIN_OF) <= set(keys.SCHEMA)


@pytest.mark.parametrize("make", [method_set, class_set])
def test_other_methods_sets_are_shared_and_evaluated(make, repo, tmp_path):
    folder = make()
    sharing.push(folder, repo)
    found = hub.pull(repo, tmp_path / "into", data="cifar-10", repo_type="dataset").folder
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names and all((found / name).read_bytes() == (folder / name).read_bytes() for name in names)
    first, second = read_set(folder), read_set(found)
    assert second.classes == CIFAR10_CLASSES and second.name == first.name == "cifar-10"
    assert torch.equal(first.fetch(torch.arange(10)), second.fetch(torch.arange(10)))
    check_croissant(found)
    with pytest.raises(FileNotFoundError, match="other methods' sets are read by igd evaluate"):
        DistilledSet(found)
    assert "**derived from real images** (50 of cifar-10, train)" in (found / "README.md").read_text()
    elsewhere = f"file://{tmp_path}/elsewhere/mine"
    assert sharing.push(found, elsewhere).commit == folder_hub.commit_of(Path(repo.removeprefix("file://")))


@pytest.mark.parametrize("family", ["datm", "dm", "tdsdm"])
def test_what_notebooks_leave_in_the_cache_is_shared_and_read(small_loads, family, repo, tmp_path):
    """The real thing: with soft labels, with float images, class by class with an adapter."""
    place = prepare("08", "fashion-mnist", "smoke", run=Run(ipc=1))
    made, maker = place.set(Method(family), 0, 1), registry.BASELINES[family].make
    folder = keys.folder(maker.kind, maker.about(place, 1, 0))
    sharing.push(folder, repo)
    found = read_set(hub.pull(repo, tmp_path / "into", data="fashion-mnist").folder)
    every = torch.arange(10)
    assert torch.equal(found.fetch(every), made.fetch(every)) and torch.equal(found.labels, made.labels)
    assert (found.targets is None) == (made.targets is None) and found.lr == made.lr
    if family == "tdsdm":
        [own] = (work_dir() / "adapter").iterdir()
        sharing.push(own, f"{repo}-adapter")
        hub.pull(f"{repo}-adapter", tmp_path / "adapter", data="fashion-mnist")


@pytest.fixture
def trained(fashion_train) -> tuple[ClassGradients, Path]:
    """A surrogate and its class gradients where the cache has them."""
    data = fashion_train.first(4)
    model = network("convnet1-w4", num_classes=10, image_size=32)
    folder = work_dir() / "surrogate" / "new"
    checkpoints = train_surrogate(model, data, epochs=1, batch_size=20, folder=folder)
    key = json.loads((folder / "trajectory.json").read_text())["key"]
    folder = folder.rename(folder.with_name(key))
    about = {"surrogate": key, "images": 2, "epochs": list(checkpoints.epochs)}
    gradients = ClassGradients(checkpoints, data, keys.folder("gradients", about), 2)
    gradients.keep(range(10))
    return gradients, folder


def test_a_surrogate_with_its_class_gradients(trained, repo, tmp_path, fashion_train):
    gradients, folder = trained
    other = work_dir() / "gradients" / "0123456789ab"  # of another surrogate
    shutil.copytree(gradients.folder, other)
    done = sharing.push(folder, repo)
    assert done.repo_type == "model"
    found = hub.pull(repo, tmp_path / "into", data="fashion-mnist").folder
    assert not (found / "croissant.json").exists()  # it is no data set
    assert [path.name for path in (found / "gradients").iterdir()] == [gradients.folder.name]
    model = network("convnet1-w4", num_classes=10, image_size=32)
    torch.manual_seed(0)
    again = train_surrogate(
        copy_of(gradients.checkpoints.model, gradients.checkpoints.states[0], model),
        fashion_train.first(4),
        epochs=1,
        batch_size=20,
        folder=found,
    )
    for first, second in zip(gradients.checkpoints.states, again.states, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    own = ClassGradients(again, gradients.data, found / "gradients" / gradients.folder.name, 2)
    assert own.is_kept(3) and torch.equal(own(3), gradients(3))
    text = (found / "README.md").read_text()
    assert "class gradients, each a mean over the first 2 images of a class, of 10 files" in text
    assert f"$IGD_CACHE/surrogate/{folder.name}" in text


def copy_of(model, state, other):
    """Another model with those weights."""
    other.load_state_dict(state)
    return other


SHORT = {"steps": 1, "batch_size": 2, "ema": 0.5}


def tune(pipe, folder: Path, kind: str) -> Path:
    """One step of fine-tuning on images of Fashion-MNIST's classes."""
    images, labels = torch.zeros(10, 3, 16, 16, dtype=torch.uint8), torch.arange(10)
    data = from_tensors("fashion-mnist", "train", FASHION_CLASSES, images, labels)
    first, second = (block.norm1.emb for block in pipe.transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())
    if kind == "minimax":
        return minimax.finetune(pipe, data, folder, recipe=minimax.Minimax(**SHORT))
    return finetuning.finetune(pipe, data, folder, recipe=finetuning.Finetuning(**SHORT))


def tuned(pipe, folder: Path, **note) -> Path:
    """A pipeline's folder, as if it had been fine-tuned."""
    settings = {"data": "fashion-mnist", "split": "train", "classes": list(FASHION_CLASSES), "model": "base"}
    own = keys.manifest("finetune", settings) | {"transformer": files.digest(pipe.transformer.state_dict())}
    notes = {"finetune.json": json.dumps(own | note)}
    return write_pipeline(folder, pipe.transformer, pipe.vae, pipe.scheduler, notes=notes)


@pytest.mark.parametrize(("kind", "said"), [("finetune", "its own loss"), ("minimax", "Minimax")])
def test_a_fine_tuned_dit(tiny_pipe, tmp_path, repo, kind, said):
    folder = tune(tiny_pipe, tmp_path / "tuned", kind)
    sharing.push(folder, repo, declared=Declared(licence="apache-2.0"))
    found = hub.pull(repo, tmp_path / "into").folder
    pipe = IGDPipeline.from_pretrained(found)
    state = IGDPipeline.from_pretrained(folder).transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
    text = (found / "README.md").read_text()
    assert f"The transformer was **changed** by fine-tuning on fashion-mnist ({said})" in text
    assert "| 9 | `Ankle boot` | Ankle boot | 9 |" in text


def test_others_weights_are_refused(tiny_pipe, tmp_path):
    folder = tuned(tiny_pipe, tmp_path / "tuned")
    (folder / "finetune.json").unlink()
    assert terms.DIT_LINK in refused(folder) and "others' weights are never pushed" in refused(folder)
    assert "not those that finetune.json says" in refused(tuned(tiny_pipe, tmp_path / "a", transformer="00"))
    digest = files.digest(tiny_pipe.transformer.state_dict())
    untouched = {"settings": {"data": "fashion-mnist", "classes": list(FASHION_CLASSES), "model": digest}}
    assert "not those that finetune.json says" in refused(tuned(tiny_pipe, tmp_path / "b", **untouched))


def adapter(model, dataset="cifar-10") -> Path:
    about = {"data": dataset, "split": "train", "images": 50, "settings": {"rank": 4}, "model": model}
    folder = keys.folder("adapter", about)
    keys.claim(folder / "manifest.json", "adapter", about, "an adapter")
    files.save_tensors(folder / "adapter.safetensors", {"a": torch.ones(1)}, step=1)
    return folder


def test_an_adapter(repo, tmp_path):
    sharing.push(adapter(SD), repo)
    found = hub.pull(repo, tmp_path / "into", data="cifar-10").folder
    text = (found / "README.md").read_text()
    assert "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5\n" in text
    assert (
        "CreativeML OpenRAIL-M" in text and "Attachment A" in text and "low-rank **change** of Stable" in text
    )
    assert sums.note(found / "adapter.safetensors")["step"] == 1


# --- licences


NO_LICENCE = "other"


@pytest.mark.parametrize(
    ("make", "licence"),
    [
        (lambda: class_set(model=STAND_IN), NO_LICENCE),  # CIFAR-10 names none
        (lambda: class_set(dataset="fashion-mnist", classes=FASHION_CLASSES), ["apache-2.0", "mit"]),
        (lambda: method_set(dataset="fashion-mnist", classes=FASHION_CLASSES), "mit"),
        (lambda: method_set("datm"), NO_LICENCE),
        (lambda: method_set("gvbsm", "imagenette", IMAGENETTE_CLASSES), NO_LICENCE),  # ImageNet's terms
        (lambda: class_set("tdsdm", "imagewoof", IMAGEWOOF_CLASSES, SD), NO_LICENCE),
        (lambda: adapter(SD), NO_LICENCE),
        (lambda: adapter(SD, "imagewoof"), "creativeml-openrail-m"),
        (lambda: adapter(STAND_IN | {"model": ARCHITECTURES["xl"]}, "imagenet"), "cc-by-nc-4.0"),
        (lambda: adapter(STAND_IN | {"model": ARCHITECTURES["xl"]}), NO_LICENCE),
    ],
)
def test_licences_by_kind_of_work(make, licence):
    card = sharing.find(make(), Declared(derived_from_imagenet=True)).card
    found = terms.front_matter(card.ingredients)
    assert found["license"] == licence
    assert (licence == NO_LICENCE) == ("license_name" in found)


@pytest.mark.parametrize(
    ("shape", "data", "origin", "licence"),
    [
        ("xl", ("imagewoof", IMAGEWOOF_CLASSES), "sampled", "cc-by-nc-4.0"),
        ("xl", ("imagewoof", IMAGEWOOF_CLASSES), None, "cc-by-nc-4.0"),  # fine-tuned on it
        ("xl", ("imagewoof", IMAGEWOOF_CLASSES), "derived", NO_LICENCE),
        ("xl", ("fashion-mnist", FASHION_CLASSES), None, ["cc-by-nc-4.0", "mit"]),
        ("stand-in", ("fashion-mnist", FASHION_CLASSES), "sampled", ["apache-2.0", "mit"]),
        ("stand-in", ("cifar-10", CIFAR10_CLASSES), "sampled", NO_LICENCE),
        ("stand-in", ("cifar-100", CIFAR10_CLASSES), None, NO_LICENCE),
    ],
)
def test_licences_of_dits_and_data(shape, data, origin, licence):
    """Whatever has DiT-XL/2's shape is under its terms; ImageNet's bind what is derived from its images."""
    models = terms.dit_of(ARCHITECTURES[shape], {"transformer": "01", "vae": "23"})
    own = (*models, terms.data_of(*data, origin))
    assert terms.front_matter(own)["license"] == licence
    if shape == "xl":
        assert models[0].link == terms.DIT_LINK and models[1].digests == {"vae": "23"}


# --- the card


def test_the_card_has_all_that_a_reader_needs(own, pushed):
    text = (pushed / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == ["apache-2.0", "mit"] and head["size_categories"] == ["n<1K"]
    assert {"dataset-distillation", "igd_lib", "fashion-mnist"} <= set(head["tags"])
    assert head["configs"][0]["data_files"][0]["path"] == "images/*/*.png"
    parts = [f"## {name}" for name in ("Licence", "Use", "Classes", "Models and data", "Settings", "Cite")]
    assert [line for line in body.splitlines() if line.startswith("## ")] == parts
    assert "| 9 | `Ankle boot` | Ankle boot | 9 |" in body
    assert "igd evaluate FOLDER fashion-mnist --protocol igd-cifar --network convnet3" in body
    assert "Protocol: igd-cifar at 32 px, convnet3, 5 training seeds, top-1 best." in body
    assert own.manifest["settings"]["transformer"] in body and own.manifest["settings"]["vae"] in body
    assert "3 steps (ddpm), cfg 4; influence guidance k 0, deviation guidance gamma 1, in the steps 1" in body
    assert '"timestep_spacing": "linspace"' in body  # fidelity
    assert own.revision in body and "igd_lib 0." in body and "seconds in all" in body
    assert str(pushed.parent) not in text  # where it lies is nobody's business
    card = json.loads((pushed / "card.json").read_text())
    assert card["seconds"] == pytest.approx(own.seconds, abs=0.1) and card["images"] == 20


@pytest.mark.parametrize(
    ("dataset", "size", "line"),
    [
        ("imagewoof", 256, "igd evaluate FOLDER imagewoof --protocol igd-hard --network convnet6"),
        (
            "tiny-flowers",
            64,
            "igd evaluate FOLDER REAL_FOLDER --protocol igd-hard --image-size 64 --network conv",
        ),
    ],
)
def test_the_line_that_evaluates(dataset, size, line):
    assert cards.evaluation(dataset, size)[0].startswith(line)


# --- Croissant


def check_croissant(folder: Path) -> dict:
    """The parts that the specification of version 1.0 requires, their references, and the sums."""
    found = json.loads((folder / "croissant.json").read_text())
    required = "@context @type name conformsTo description license url creator datePublished distribution"
    assert set(required.split()) <= set(found)
    assert found["@type"] == "sc:Dataset" and found["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert found["@context"]["@vocab"] == "https://schema.org/"
    assert found["@context"]["cr"] == "http://mlcommons.org/croissant/"
    assert found["@context"]["conformsTo"] == "dct:conformsTo"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["datePublished"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["version"]) and found["citeAs"].startswith("@inproceedings")
    nodes = found["distribution"] + found["recordSet"] + [f for r in found["recordSet"] for f in r["field"]]
    ids = [node["@id"] for node in nodes]
    assert len(set(ids)) == len(ids) and all(node["name"] and node["@type"][:3] == "cr:" for node in nodes)
    assert not [one for one in referred(found) if one not in ids]
    shared = json.loads((folder / "sums.json").read_text())
    objects = [node for node in found["distribution"] if node["@type"] == "cr:FileObject"]
    for node in objects:
        assert {"contentUrl", "encodingFormat", "sha256"} <= set(node)
        if node["@id"] != "repository":
            assert shared[node["contentUrl"]] == node["sha256"] == files.sha256(folder / node["contentUrl"])
            assert node["contentSize"] == f"{(folder / node['contentUrl']).stat().st_size} B"
    assert {node["@id"] for node in objects} == {*shared, "repository"} - {*sums.BESIDE}
    classes, records = found["recordSet"]
    assert classes["dataType"] == "sc:Enumeration" and len(classes["data"]) == 10
    assert {row["classes/label"]: row["classes/name"] for row in classes["data"]} == dict(
        enumerate(json.loads((folder / "card.json").read_text())["classes"])
    )
    kinds = {field["name"]: field["dataType"] for field in records["field"]}
    assert kinds["image"] == "sc:ImageObject" and kinds["label"] == ["sc:Integer", "cr:Label"]
    return found


def referred(node) -> list[str]:
    """What objects that have an @id alone refer to."""
    if isinstance(node, list):
        return [one for part in node for one in referred(part)]
    if not isinstance(node, dict):
        return []
    own = [node["@id"]] if set(node) == {"@id"} else []
    return own + [one for name, part in node.items() if name != "@context" for one in referred(part)]


def test_croissant(pushed):
    found = check_croissant(pushed)
    images = next(node for node in found["distribution"] if node["@type"] == "cr:FileSet")
    assert len(list(pushed.glob(images["includes"]))) == 20
    fields = {field["name"]: field for field in found["recordSet"][1]["field"]}
    pattern = fields["folder"]["source"]["transform"]["regex"]
    keys_there = {re.search(pattern, str(path))[1] for path in pushed.glob(images["includes"])}
    assert keys_there == {row["classes/folder"] for row in found["recordSet"][0]["data"]}
    assert fields["label"]["source"] == {"field": {"@id": "classes/label"}}


# --- the hub itself


def test_what_is_asked_of_the_hub_is_what_it_has():
    calls = [name for name in vars(Hub) if not name.startswith("_")]
    assert sorted(calls) == ["create_repo", "repo_info", "snapshot_download", "upload_folder"]
    for name in calls:
        theirs = inspect.signature(getattr(HfApi, name)).parameters
        asked = inspect.signature(getattr(Hub, name)).parameters
        assert set(asked) <= set(theirs), name
        needed = {
            one for one, p in theirs.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        assert needed <= set(asked), name
        assert set(inspect.signature(getattr(FolderHub, name)).parameters) == set(asked)


def test_without_a_network_the_error_is_a_line_that_names_the_other_way(own, tmp_path):
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=False)
    for call in (
        lambda: own.push("me/set", hub=nowhere),
        lambda: DistilledSet.pull("me/set", hub=nowhere),
        lambda: hub.pull("me/set", hub=nowhere, into=tmp_path / "into"),
    ):
        with pytest.raises(
            ConnectionError, match=r"does not answer.*push to a folder \(file:///PATH\)"
        ) as error:
            call()
        assert "me/set" in one_line(error)
    assert not list(tmp_path.glob(".push-*")) and not (tmp_path / "into").exists()


def test_a_download_that_breaks_off_is_a_line_too(own, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    class Broken(Remote):
        def snapshot_download(self, *given, **more):
            raise LocalEntryNotFoundError("Got: ConnectError\nplease check your connection")

    remote = Broken(tmp_path / "remote")
    own.push("me/set", hub=remote)
    with pytest.raises(ConnectionError, match="Got: ConnectError") as error:
        hub.pull("me/set", hub=remote)
    one_line(error)


@pytest.mark.parametrize("given", ["file://host/x", "file:relative", "a/b/c", "../x", ""])
def test_what_is_no_repository_is_named(own, given):
    with pytest.raises(ValueError, match=r"file:///PATH") as error:
        own.push(given)
    one_line(error)


def test_a_repository_has_a_type(own, repo, pushed):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        hub.pull(repo, repo_type="model")
    with pytest.raises(ValueError, match="is a model repository"):
        own.push("models/me/set", hub=FolderHub(pushed.parent))
    address = hub.Address.of("datasets/me/set", FolderHub(pushed))
    assert (address.repo_id, address.url) == ("me/set", "https://huggingface.co/datasets/me/set")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        hub.pull("me/other", hub=FolderHub(pushed.parent))


# --- the commands


def run(*words, code: int = 0):
    found = CliRunner().invoke(igd, [*map(str, words)])
    assert found.exit_code == code, found.output
    return found


def test_the_commands_push_and_pull(own, repo, tmp_path):
    said = run("push", own.path, repo).output
    assert re.fullmatch(rf"pushed 45 files, .* kB, to {repo}: revision [0-9a-f]{{40}}\n", said)
    again = json.loads(run("push", own.path, repo, "--json").stdout)
    assert again["commit"] in said and again["files"] == 45
    into = tmp_path / "into"
    found = json.loads(run("pull", repo, into, "--for", "fashion-mnist", "--json").stdout)
    assert found["folder"] == str(into) and found["commit"] == again["commit"]
    assert again["commit"] in run("pull", repo, into, "--revision", again["commit"]).output
    for name in ("push", "pull", "export", "distill"):
        assert f"Example: igd {name}" in run(name, "--help").output


def test_the_commands_errors_are_one_line(own, repo, pushed, tmp_path):
    for words in (
        ["push", tmp_path / "nowhere", repo],
        ["push", class_set("d4m", "imagewoof", IMAGEWOOF_CLASSES, SD), repo],
        ["pull", f"file://{tmp_path}/nowhere"],
        ["pull", repo, "--for", "cifar-10"],
        ["pull", repo, "--revision", "0" * 40],
        ["export", tmp_path, tmp_path / "out"],
    ):
        lines = run(*words, code=1).output.splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), lines
    derived = class_set("d4m", "imagewoof", IMAGEWOOF_CLASSES, SD)
    run("push", derived, f"{repo}-derived", "--derived-from-imagenet-ok")


def test_the_command_export(own, tmp_path):
    run("export", own.path, tmp_path / "a")
    assert (tmp_path / "a" / "T-shirt" / "00001.png").is_file()
    found = json.loads(run("export", own.path, tmp_path / "b", "--format", "safetensors", "--json").stdout)
    assert found["format"] == "safetensors" and (tmp_path / "b" / "data.safetensors").is_file()


def test_the_command_distill(small_loads, tmp_path, repo):
    words = ["fashion-mnist", tmp_path / "mine", "--ipc", "1", "--scale", "smoke", "-k", "0", "--gamma", "30"]
    found = json.loads(run("distill", *words, "--seed", "3", "--json").stdout)
    made = DistilledSet(tmp_path / "mine")
    assert found["images"] == 10 and made.manifest["seed"] == 3 and made.verify() == []
    guidance = made.manifest["settings"]["guidance"]
    assert guidance["k"] == 0 and guidance["gamma"] == pytest.approx(30 * 256 / 4096)
    assert "Scale: smoke" in run("distill", *words, "--seed", "3").output  # it is there
    assert (
        "holds a set of other settings" in run("distill", *words, "--seed", "3", "--cfg", "2", code=1).output
    )
    run("push", tmp_path / "mine", repo)
