"""The paper's scale and its rehearsal, on fakes in the real layouts: what is found, refused, cut."""

import shutil
from dataclasses import replace

import pytest
import torch

from ci import fakes
from igd_lib.analysis import results
from igd_lib.config import preset
from igd_lib.data.datasets import DATASETS
from igd_lib.experiment import comparisons, experiment, measures, pieces
from igd_lib.experiment.artefacts import artefact
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.tools import keys
from igd_lib.tools.machine import cache_dir, data_dir, work_dir, work_in

KINDS = ["Random", "RDED", "DiT", "DiT", "DiT + G_D", "DiT-IGD"]
TUNED = ["Minimax", "Minimax-IGD"]


@pytest.fixture(autouse=True)
def work_where_it_was():
    yield
    work_in("")


def kinds(rows):
    return [row.kind for row in rows]


# --- what is there


def test_every_missing_piece_is_named(only_fashion):
    with pytest.raises(FileNotFoundError) as caught:
        prepare("01", "imagenet", "paper")
    lines = str(caught.value).splitlines()
    named = ("the images of imagenet", "facebook/DiT-XL-2-256", "stabilityai/sd-vae-ft-mse", "a CUDA GPU")
    assert len(lines) == 1 + len(named)
    for line, piece in zip(lines[1:], named, strict=True):
        assert piece in line
    assert "IGD_DATA" in lines[1] and "--revision" in lines[2]
    with pytest.raises(FileNotFoundError, match="scale='rehearsal' lacks") as caught:
        prepare("01", "imagenet", "rehearsal")
    assert "a CUDA GPU" not in str(caught.value)  # slow without one, but it shows what it is for


def test_only_what_is_missing_is_named(complete):
    (complete / "sd-vae-ft-mse").unlink()
    (line,) = pieces.missing_for_paper("imagewoof", artefact("01"))
    assert "stabilityai/sd-vae-ft-mse" in line


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no finished pipeline"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "config.json"),
        (
            lambda folder: (folder / "model_index.json").write_text(
                "version https://git-lfs.github.com/spec/v1\n"
            ),
            "git-lfs pointer",
        ),
    ],
)
def test_found_means_loadable(complete, damage, said):
    real = (complete / "DiT-XL-2-256").resolve()
    (complete / "DiT-XL-2-256").unlink()
    shutil.copytree(real, complete / "DiT-XL-2-256")
    damage(complete / "DiT-XL-2-256")
    assert prepare("01", "imagewoof", "auto").scale.name == "small"
    with pytest.raises(FileNotFoundError, match=said):
        prepare("01", "imagewoof", "paper")


def test_a_dit_of_other_classes_is_not_loaded_for_hours(complete):
    (complete / "DiT-XL-2-256").unlink()
    (complete / "DiT-XL-2-256").symlink_to((complete / "DiT-cifar-10").resolve())
    lines = pieces.missing_for_paper("imagewoof", artefact("01"))
    assert any("knows 10 classes, and 1000 are wanted" in line for line in lines)


@pytest.mark.parametrize("scale", ["auto", "paper"])
def test_where_everything_is_there(complete, scale):
    found = prepare("01", "imagewoof", scale)
    assert found.scale.name == "paper" and found.label_ids == DATASETS["imagewoof"].label_ids
    assert found.scale.guidance == preset("imagewoof", "dit", 10)
    assert found.scale.on_minimax() == preset("imagewoof", "minimax", 10)
    assert found.seeds == tuple(range(5)) and found.scale.num_steps == 50
    assert found.networks == ["convnet6", "resnetap10", "resnet18"]
    assert "**Scale: paper.**" in found.banner and "k and gamma Table 12" in found.banner
    assert "**Plan of `01`**" in found.banner and "GPU-hours" in found.banner
    assert found.models.pipe.transformer.config.timestep_frequencies == "original"
    with pytest.raises(FileNotFoundError, match=r"no guidance decoder in .*taesd"):
        _ = found.models.tiny_decoder


def test_auto_is_small_where_images_are_missing_and_says_so(rehearsing, small_images):
    found = prepare("01", "imagewoof", "auto")
    assert found.scale.name == "small"
    assert "These are not imagewoof results, for which this machine lacks:\n" in found.banner
    assert "- imagewoof, train: " in found.banner and "images instead of 12,454" in found.banner


@pytest.fixture
def small_images(monkeypatch, fashion_train, fashion_test):
    """Fashion-MNIST, which the fakes' machine has not."""
    real = experiment.load
    splits = {"train": fashion_train, "test": fashion_test}

    def load(spec, split, **given):
        return splits[split] if getattr(spec, "name", spec) == "fashion-mnist" else real(spec, split, **given)

    monkeypatch.setattr(experiment, "load", load)


# --- the Minimax backbone


def test_without_a_minimax_model_its_rows_are_left_out(complete):
    paper = prepare("01", "imagewoof", "paper")
    assert kinds(comparisons.baselines(paper)) == KINDS
    assert len(comparisons.ablation(paper)) == 5 and len(comparisons.solvers(paper)) == 4
    assert "accelerate launch -m igd_lib minimax imagewoof" in paper.models.minimax_missing
    assert "Without the rows on the Minimax backbone: no Minimax model in" in paper.banner
    for make in (
        lambda: paper.models.minimax,
        lambda: comparisons.selections(paper, [0.7], "minimax"),
        lambda: comparisons.plain_and_guided(paper, "minimax"),
    ):
        with pytest.raises(FileNotFoundError, match="no Minimax model in"):
            make()


def test_the_minimax_model_of_a_folder(complete):
    shutil.copytree((complete / "DiT-XL-2-256").resolve(), complete / "Minimax-imagewoof")
    paper = prepare("01", "imagewoof", "paper")
    assert paper.models.minimax_missing == "" and "Without the rows on the Minimax" not in paper.banner
    assert kinds(comparisons.baselines(paper)) == KINDS + TUNED
    assert comparisons.baselines(paper)[-1].guidance == preset("imagewoof", "minimax", 10)
    assert paper.models.minimax.vae is paper.models.pipe.vae and paper.models.minimax_shards is None
    assert paper.sampling(Method(backbone="minimax")).pipe is paper.models.minimax is not paper.models.pipe


# --- a rehearsal


def test_a_rehearsal_is_the_paper_s_code_cut_down(rehearsing):
    found = prepare("01", "imagewoof", "rehearsal", run=Run(ipc=50))
    scale = found.scale
    assert scale.name == "rehearsal" and scale.papers and not scale.figures_mean_something
    assert found.train.classes == DATASETS["imagewoof"].classes[:2]
    assert found.label_ids == DATASETS["imagewoof"].label_ids[:2]
    assert len(found.train) == 16 and len(found.test) == 4 and found.ipc == 2 and len(found.seeds) == 2
    assert scale.num_steps == 4 and scale.training.epochs == 1 and scale.protocol.epochs == 2
    assert scale.protocol.name == "igd-hard" and found.networks == ["convnet6", "resnetap10", "resnet18"]
    assert replace(scale.guidance, guided_range=(30, 45)) == preset("imagewoof", "dit", 50)
    assert "**and its numbers mean nothing.**" in found.banner and "**Plan of `01`**" in found.ending
    assert work_dir() == cache_dir() / "rehearsal"
    assert keys.folder("set", {}).parent.parent == cache_dir() / "rehearsal"
    assert "**Not all is there of the images of imagewoof**" in found.banner
    assert "**In place of the Minimax model: the DiT itself.**" in found.banner


def test_another_scale_after_a_rehearsal_works_in_the_cache_itself(rehearsing, small_images):
    prepare("01", "imagewoof", "rehearsal")
    prepare("01", "imagewoof", "small")
    assert work_dir() == cache_dir()


def test_what_a_rehearsal_has_not_is_random_and_the_same_every_time(rehearsing):
    found = prepare("14", "imagewoof", "rehearsal")
    assert (
        "**In place of the guidance decoder TAESD: a random network of the same interface.**" in found.banner
    )
    again = prepare("14", "imagewoof", "rehearsal")
    for one, other in zip(
        found.models.tiny_decoder.parameters(), again.models.tiny_decoder.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert found.models.minimax is found.models.pipe
    teacher = found.any_teacher()
    assert teacher.weights == "random" and teacher.least == 0 and teacher.classes == found.train.classes
    assert "random" in found.models.extractor().name


def test_fastai_s_images_are_cut_like_the_others(rehearsing, tmp_path, monkeypatch):
    """The same classes in the same order, which is not that of fastai's folders."""
    own = tmp_path / "data"
    own.mkdir()
    for folder in data_dir().iterdir():
        (own / folder.name).symlink_to(folder)
    monkeypatch.setenv("IGD_DATA", str(own))
    found = prepare("13", "imagewoof", "rehearsal")
    assert found.on_fastai() == []
    fakes.class_folders(own / "imagewoof2", DATASETS["fastai-imagewoof2"].classes)
    (other,) = found.on_fastai()
    assert other.test.classes == found.test.classes == DATASETS["imagewoof"].classes[:2]
    assert other.test.labels.tolist() == found.test.labels.tolist() == [0, 0, 1, 1]
    tints = [test.fetch(torch.arange(4)).float().mean((2, 3)) for test in (found.test, other.test)]
    coloured = tints[0].std(1).minimum(tints[1].std(1)) > 1
    assert coloured.sum() == 2  # one of each class, and ...
    assert 0 < (tints[0] - tints[1])[coloured].abs().max() < 6  # ... other noise of the same tints


def test_rehearsed_rows_are_no_results(rehearsing, tmp_path):
    found = prepare("08", "cifar-10", "rehearsal", run=Run(ipc=1, seeds="1", methods="Random"))
    rows = measures.accuracy_rows(found, found.sets(comparisons.baselines(found)))
    assert set(rows.scale) == {"rehearsal"} and rows.value.between(0, 100).all()
    with pytest.raises(ValueError, match="rehearsal"):
        results.consolidate(rows, tmp_path / "rows.csv")


def test_a_dit_of_another_resolution_is_used_through_a_declared_resize(rehearsing):
    (rehearsing / "DiT-cifar-10").unlink()
    models, names = (fakes.transformer(10, 256), fakes.autoencoder()), DATASETS["cifar-10"].classes
    fakes.fine_tuned(rehearsing / "DiT-cifar-10", *models, "finetune", names)
    found = prepare("08", "cifar-10", "rehearsal", run=Run(ipc=1, seeds="1", methods="DiT,DiT-IGD"))
    assert (
        found.scale.output_resize == "bilinear" and "images of 256 px are resized (bilinear)" in found.banner
    )
    sets = found.sets(comparisons.baselines(found))
    assert {images.data().image_size for _, _, images in sets} == {32}


# --- a job array over classes


def test_a_run_over_some_classes_ends_before_the_evaluation(rehearsing, capsys):
    def run(classes):
        made = prepare("08", "cifar-10", "rehearsal", run=Run(1, "1", methods="DiT", classes=classes))
        return made.sets(comparisons.baselines(made))

    with pytest.raises(SystemExit) as ended:
        run("0:1")
    assert ended.value.code == 0
    assert "2 of 4 images of these 2 sets are not there yet" in capsys.readouterr().out
    sets = run("1:2")  # the last one finds all there and goes on
    assert len(sets) == 2 and not any(images.lacking() for _, _, images in sets.sampled())
    assert {images.path for _, _, images in run("").sampled()} == {one.path for _, _, one in sets.sampled()}
