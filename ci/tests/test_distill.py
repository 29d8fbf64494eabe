"""The class x IPC loop: resume, memory, batches of classes, and refusals."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

from igd_lib import distillation as module
from igd_lib.config import PAPER, STANDARD, Guidance
from igd_lib.data.images import to_uint8
from igd_lib.distillation import distill, image_generator
from igd_lib.sampling import FAST, Sampling
from igd_lib.sets import store
from igd_lib.sets.store import DistilledSet
from igd_lib.surrogate import Checkpoints, class_gradients
from igd_lib.tools import files, keys, machine
from igd_lib.tools.version import git_revision

GUIDANCE = Guidance(k=5.0, gamma=30.0, guided_range=(1, 4))
IDS = (4, 0, 9)  # of the toy's classes, among the diffusion model's ten


@pytest.fixture
def run(tiny_pipe, toy, toy_data, tmp_path):
    """Factory: distil 3 images of each of the toy's 3 classes into a folder of `tmp_path`, in 6 steps."""

    def run(folder="set", **changes):
        options = dict(ipc=3, guidance=GUIDANCE, checkpoints=toy().checkpoints, num_steps=6, label_ids=IDS)
        return distill(tiny_pipe, toy_data, out_dir=tmp_path / folder, **(options | changes))

    return run


def test_shortcuts_reach_the_sampler_and_the_manifest(run, tiny):
    """A set made with one is another set, says so, and is not resumed without it."""
    plain, fast = run(), run("fast", every=2, jacobian="decoder")
    none = {"jacobian": "full", "every": 1, "checkpoints_per_step": None, "guidance_decoder": None}
    assert plain.manifest["settings"]["shortcuts"] == none
    assert fast.manifest["settings"]["shortcuts"] == none | {"every": 2, "jacobian": "decoder"}
    assert not torch.equal(latents(fast), latents(plain))
    assert torch.equal(latents(run("defaults", every=1, checkpoints_per_step=None)), latents(plain))
    with pytest.raises(ValueError, match="other settings"):
        run("fast", jacobian="decoder")
    other = run("decoder", guidance_decoder=tiny().vae)
    assert other.manifest["settings"]["shortcuts"]["guidance_decoder"].startswith("AutoencoderKL, ")
    with pytest.raises(TypeError, match=r"unknown options \['evry'\]; shortcuts are jacobian"):
        run("typo", evry=2)


def test_fast_is_its_options_by_name(run, tiny):
    """The set of `FAST`, and the same one asked for option by option."""
    weaker = replace(GUIDANCE, k=GUIDANCE.k * (1 / 3), gamma=GUIDANCE.gamma / 4, guided_range=(12, 18))
    short = dict(guidance=weaker, num_steps=20)
    named = FAST.options(GUIDANCE)
    assert named["guidance"] == weaker and named["num_steps"] == 20
    assert FAST.options(None)["guidance"] is None and FAST.options(None, PAPER)["fidelity"] == replace(
        PAPER, solver="dpmsolver++"
    )
    decoder = tiny().vae
    found = run("named", **named, guidance_decoder=decoder)
    solver = replace(STANDARD, solver="dpmsolver++")
    apart = run(
        "apart", **short, fidelity=solver, jacobian="decoder", every=2, guidance_decoder=decoder, ipc=3
    )
    assert found.manifest["settings"] == apart.manifest["settings"]
    assert torch.equal(latents(found), latents(apart))


def pixels(found: DistilledSet):
    return torch.stack([found.images(label) for label in found.selected])


def latents(found: DistilledSet):
    return torch.stack([found.latents(label) for label in found.selected])


def assert_same_pixels(a: DistilledSet, b: DistilledSet) -> None:
    """Equal but for the rounding of a few pixels, since sums in other batches end in other last bits."""
    difference = (pixels(a).int() - pixels(b).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


# --- what is on disk


def test_a_finished_set(run, tiny_pipe, tmp_path):
    found = run()
    assert [found.finished(label) for label in range(3)] == [3, 3, 3]
    data = found.data()
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and data.classes == ("a", "b", "c")
    images = data.fetch(torch.arange(9))
    assert images.shape == (9, 3, 16, 16) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 9
    # Pixels are the decoded latents; PNG keeps them exactly.
    torch.testing.assert_close(
        images[3:6].int(), to_uint8(tiny_pipe.decode(found.latents(1))).int(), rtol=0, atol=1
    )
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "set/images/00001/00002.png")), images[5].permute(1, 2, 0).numpy()
    )
    assert not temporary_files(tmp_path)


def test_the_manifest_says_how_it_was_made(run):
    manifest = run(seed=3).manifest
    assert (
        manifest["classes"] == ["a", "b", "c"]
        and manifest["label_ids"] == [4, 0, 9]
        and manifest["seed"] == 3
    )
    assert manifest["settings"]["guidance"] == {"k": 5.0, "gamma": 30.0, "guided_range": [1, 4]}
    assert manifest["settings"]["fidelity"]["rho_factor"] == STANDARD.rho_factor
    assert manifest["versions"].keys() == {"igd_lib", "torch", "diffusers", "python"}
    assert manifest["revision"] == git_revision()


def test_each_image_has_its_own_generator():
    draws = {
        tuple(torch.randn(3, generator=image_generator(seed, label, index)).tolist())
        for seed in range(3)
        for label in range(3)
        for index in range(3)
    }
    assert len(draws) == 27
    assert torch.equal(*(torch.randn(3, generator=image_generator(1, 2, 3)) for _ in range(2)))


def test_each_image_starts_from_its_own_generator(run, tiny_pipe):
    """An image is what the pipeline makes of its own generator and the diffusion model's class id."""
    found = run(guidance=None, checkpoints=None, seed=5)
    for label, index in ((0, 0), (1, 2), (2, 1)):
        options = dict(
            num_inference_steps=6,
            output_type="latent",
            generator=[image_generator(5, (4, 0, 9)[label], index)],
        )
        expected = tiny_pipe([(4, 0, 9)[label]], **options).images
        torch.testing.assert_close(found.latents(label)[index], expected[0], rtol=1e-3, atol=1e-4)


def test_each_class_is_guided_by_its_own_gradients_and_label(run, tiny_pipe, toy, toy_data):
    """The first image of a class is the guided pipeline's, with that class's target and class gradients."""
    found, checkpoints = run(), toy().checkpoints
    for label in range(3):
        expected = tiny_pipe(
            [(4, 0, 9)[label]],
            num_inference_steps=6,
            output_type="latent",
            generator=[image_generator(0, (4, 0, 9)[label], 0)],
            guidance=GUIDANCE,
            checkpoints=checkpoints,
            targets=torch.tensor([label]),
            memory=[torch.empty(0, 4, 8, 8)],
            gradients=class_gradients(checkpoints, toy_data.of_class(label), label)[:, None],
        ).images
        torch.testing.assert_close(found.latents(label)[0], expected[0], rtol=1e-3, atol=2e-4)


def test_noise_is_the_same_for_every_method(run):
    """Vanilla, guided and deviation-only sets start from the same noise: k = gamma = 0 is vanilla."""
    vanilla, zero = (
        run("vanilla", guidance=None, checkpoints=None),
        run("zero", guidance=Guidance(0.0, 0.0, (1, 4))),
    )
    torch.testing.assert_close(latents(zero), latents(vanilla), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(latents(run("guided")), latents(vanilla), rtol=1e-3)


# --- resume


@pytest.mark.parametrize("guidance", [GUIDANCE, None], ids=["guided", "vanilla"])
@pytest.mark.parametrize("batch_classes", [1, 2, None])
def test_a_run_cut_short_resumes_to_the_same_images(run, monkeypatch, tmp_path, batch_classes, guidance):
    options = dict(batch_classes=batch_classes, guidance=guidance)
    whole = run("whole", **options)
    real, written = module.files.write, []

    def write_until_the_power_fails(path, content):
        if path.suffix == ".png":
            written.append(path)
            if len(written) == 5:
                raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(module.files, "write", write_until_the_power_fails)
    with pytest.raises(KeyboardInterrupt):
        run("cut", **options)
    cut = DistilledSet(tmp_path / "cut")
    assert sum(cut.finished(label) for label in range(3)) == 4
    monkeypatch.setattr(module.files, "write", real)
    resumed = run("cut", **options)
    assert torch.equal(pixels(resumed), pixels(whole)) and torch.equal(
        latents(resumed), latents(whole)
    )  # to the last bit
    assert resumed.verify() == []


def test_only_missing_images_are_sampled_again(run, monkeypatch, tmp_path):
    whole = pixels(run(batch_classes=1))
    folder = tmp_path / "set" / "images"
    (folder / "00001" / "00001.png").unlink()  # the first gap: images 1 and 2 follow from image 0
    (folder / "00002" / "00002.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    sampled, real = [], module._sample

    def spy(pipe, out, items, *rest):
        sampled.extend(items)
        return real(pipe, out, items, *rest)

    monkeypatch.setattr(module, "_sample", spy)
    assert torch.equal(pixels(run(batch_classes=1)), whole)
    assert sorted(sampled) == [(1, 1), (1, 2), (2, 2)]
    changed = {
        path.parent.name + "/" + path.name for path, time in kept.items() if path.stat().st_mtime_ns != time
    }
    assert changed <= {"00001/00002.png"}
    sampled.clear()
    run()
    assert not sampled


def test_more_classes_together_give_the_same_latents(run):
    one, two, three = (run(f"{n}", batch_classes=n) for n in (1, 2, 3))
    for other in (two, three):
        assert (latents(other) - latents(one)).norm() < 1e-3 * latents(one).norm()


# --- batches


@pytest.fixture
def sizes(monkeypatch):
    """How many images each call of the sampler had."""
    found, real = [], module._sample

    def spy(wanted, out, items, *rest):
        found.append(len(items))
        return real(wanted, out, items, *rest)

    monkeypatch.setattr(module, "_sample", spy)
    return found


@pytest.mark.parametrize("guidance", [GUIDANCE, None], ids=["guided", "vanilla"])
def test_images_do_not_depend_on_how_many_go_through_the_models_at_once(run, sizes, guidance):
    whole = run("whole", guidance=guidance)
    assert sizes == ([3, 3, 3] if guidance else [9])  # without a memory, images of a class too
    for batch, expected in ((1, [1] * 9), (2, [2, 1] * 3), (7, [3] * 3 if guidance else [6, 3])):
        sizes.clear()
        part = run(f"{batch}", guidance=guidance, batch=batch)
        assert sizes == expected and part.manifest["batch"] == batch
        assert (latents(part) - latents(whole)).norm() < 1e-3 * latents(whole).norm()


def test_a_set_goes_on_in_the_batch_it_was_begun_with(run, sizes, monkeypatch):
    """To the same bits; another one is used where it is asked for, or where the first no longer fits."""
    whole, cut = run("whole", batch=2), run(batch=2)
    for fitting, asked, expected in ((100, 0, [2, 1]), (1, 0, [1, 1, 1]), (100, 3, [3])):
        cut.image_path(0, 2).unlink()
        cut.image_path(2, 2).unlink()
        sizes.clear()
        monkeypatch.setattr(module, "_room", lambda _, fitting=fitting: fitting)
        again = run(batch=asked)
        # Where neither of the two is lacking, a batch is not sampled again.
        assert sizes == [size for size, own in zip(expected, _parts(expected), strict=True) if own & {0, 2}]
        assert again.manifest["batch"] == 2
        if expected == [2, 1]:
            assert torch.equal(latents(again), latents(whole)) and torch.equal(pixels(again), pixels(whole))


def _parts(sizes: list[int]) -> list[set[int]]:
    """Three classes in batches of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [set(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def test_the_batch_is_what_the_memory_has_room_for(run, sizes, monkeypatch):
    """With models of a size that is worth a look; a stand-in's are not."""
    asked = []
    monkeypatch.setattr(module.memory, "fitting", lambda sampling: asked.append(sampling) or 2)
    assert run("small").manifest["batch"] == 50 and not asked
    assert run("vanilla", guidance=None).manifest["batch"] == 100 and not asked
    monkeypatch.setattr(module.memory, "SMALL", 0)
    sizes.clear()
    assert run().manifest["batch"] == 2 and sizes == [2, 1] * 3 and len(asked) == 1


def test_activations_are_recomputed_where_not_one_image_fits(run, sizes, monkeypatch, capsys):
    whole, seen = run("whole", batch=1), []
    real = Sampling.sample

    def sample(self, *given, **options):
        seen.append(all(model.is_gradient_checkpointing for model in self.networks))
        return real(self, *given, **options)

    monkeypatch.setattr(Sampling, "sample", sample)
    monkeypatch.setattr(module, "_room", lambda sampling: int(sampling.recompute))
    sizes.clear()
    found = run()
    assert sizes == [1] * 9 and all(seen) and found.manifest["batch"] == 1
    assert capsys.readouterr().out.count("not even one image fits") == 1
    assert torch.equal(latents(found), latents(whole))
    assert found.manifest["settings"] == whole.manifest["settings"]


class OutOfMemory:
    """A transformer's forward that a device of room for `images` images would run."""

    def __init__(self, forward, images: int, error: Exception):
        self.forward, self.images, self.error = forward, images, error

    def __call__(self, inputs, **options):
        if len(inputs) > 2 * self.images:  # CFG doubles them
            raise self.error
        return self.forward(inputs, **options)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you ...")


@pytest.mark.parametrize(("error", "guidance"), [(CUDA, GUIDANCE), (CPU, None)], ids=["GPU", "RAM"])
def test_a_batch_that_runs_out_of_memory_is_halved(
    run, tiny_pipe, sizes, monkeypatch, capsys, error, guidance
):
    """What was done is kept, and the images are those of a smaller batch."""
    whole = run("whole", guidance=guidance)
    monkeypatch.setattr(
        tiny_pipe.transformer, "forward", OutOfMemory(tiny_pipe.transformer.forward, 2, error)
    )
    sizes.clear()
    found = run(guidance=guidance)
    if guidance:
        assert sizes == [3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    else:
        assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert (latents(found) - latents(whole)).norm() < 1e-3 * latents(whole).norm()
    assert found.verify() == []
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert said[0] == (
        f"out of memory with {sizes[0]} images side by side: going on with {sizes[1]} at a time; what is "
        "done is kept"
    )
    assert len(said) == (1 if guidance else 2)


def test_memory_that_shrinks_on_the_way_loses_nothing(run, tiny_pipe, sizes, monkeypatch):
    real = OutOfMemory(tiny_pipe.transformer.forward, 3, CUDA)
    monkeypatch.setattr(tiny_pipe.transformer, "forward", real)
    stored = module._store

    def store(out, item, *rest):
        stored(out, item, *rest)
        if item == (1, 0):
            real.images = 1

    monkeypatch.setattr(module, "_store", store)
    found = run(batch_classes=3)
    assert sizes == [3, 3] + [1] * 6 and found.verify() == []


def test_an_image_that_is_too_much_ends_with_what_helps(run, tiny_pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_pipe.transformer, "forward", OutOfMemory(tiny_pipe.transformer.forward, 0, CUDA))
    said = (
        r"one image is more than the memory holds\. What helps: precision='bfloat16', recompute=True, "
        r"jacobian='decoder', a smaller surrogate .*\(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\)"
    )
    with pytest.raises(torch.OutOfMemoryError, match=said):
        run()
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob(".lock"))


def test_another_error_of_the_models_is_not_taken_for_memory(run, tiny_pipe, sizes, monkeypatch):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(
        tiny_pipe.transformer, "forward", OutOfMemory(tiny_pipe.transformer.forward, 0, error)
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()
    assert sizes == [3]


# --- precision


def test_bfloat16_gives_other_images_of_the_same_kind(run, tiny_pipe):
    """Near float32's; and what guidance adds to vanilla sampling has its direction."""
    guided = replace(GUIDANCE, k=200.0)
    single = {k: run(f"{k}", guidance=replace(guided, k=k)) for k in (0.0, 200.0)}
    low = {k: run(f"low{k}", guidance=replace(guided, k=k), precision="bfloat16") for k in (0.0, 200.0)}
    apart = (latents(low[200.0]) - latents(single[200.0])).norm() / latents(single[200.0]).norm()
    assert 1e-4 < apart < 0.05
    added, again = (latents(sets[200.0])[:, 0] - latents(sets[0.0])[:, 0] for sets in (single, low))
    cosine = torch.nn.functional.cosine_similarity(added.flatten(1), again.flatten(1))
    assert added.norm() > 10 * apart and (cosine > 0.9).all(), (apart, cosine)
    assert low[0.0].manifest["settings"]["precision"] == "bfloat16" and low[200.0].verify() == []
    assert {model.dtype for model in (tiny_pipe.transformer, tiny_pipe.vae)} == {torch.float32}
    with pytest.raises(ValueError, match="other settings: precision = float32, wanted bfloat16"):
        run("0.0", guidance=replace(guided, k=0.0), precision="bfloat16")


def test_recomputing_is_no_setting_and_changes_no_bit(run):
    kept = run("kept")
    again = run("again", recompute=True)
    assert torch.equal(latents(again), latents(kept)) and torch.equal(pixels(again), pixels(kept))
    assert again.manifest["key"] == kept.manifest["key"]
    kept.image_path(1, 2).unlink()
    assert run("kept", recompute=True).verify() == []


def test_latents_that_are_not_finite_in_bfloat16_raise_too(run, tiny_pipe):
    with torch.no_grad():
        tiny_pipe.transformer.proj_out_2.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="latents are not finite"):
        run(precision="bfloat16", guidance=None)


# --- a part of the classes


def test_a_part_of_the_classes_gives_the_same_images(run):
    whole, part = run("whole"), run("part", classes=[2, 0])
    for label in (2, 0):
        torch.testing.assert_close(part.latents(label), whole.latents(label), rtol=1e-3, atol=1e-4)
    assert part.data().labels.tolist() == [2, 2, 2, 0, 0, 0]


def test_given_gradients_equal_computed_ones(run, toy, toy_data):
    gradients = torch.stack(
        [class_gradients(toy().checkpoints, toy_data.of_class(label), label) for label in range(3)], dim=1
    )
    given = run("given", gradients=gradients)
    torch.testing.assert_close(latents(given), latents(run("computed")), rtol=1e-3, atol=1e-4)


# --- memory


def test_later_images_depend_on_earlier_ones(run):
    """Image 0 of a class equals the memoryless run's; images 1, 2 do not, and lie further from it."""
    alone, remembered = (
        latents(run(name, guidance=Guidance(0.0, gamma, (1, 4))))
        for name, gamma in (("alone", 0.0), ("memory", 30.0))
    )
    torch.testing.assert_close(remembered[:, 0], alone[:, 0], rtol=1e-3, atol=1e-4)
    for j in (1, 2):
        assert ((remembered[:, j] - alone[:, j]).flatten(1).norm(dim=1) > 1e-2).all()

    def nearest(z):  # mean over classes of image 1's cosine to image 0
        return torch.nn.functional.cosine_similarity(z[:, 1].flatten(1), z[:, 0].flatten(1)).mean()

    assert nearest(remembered) < nearest(alone)


def test_classes_do_not_share_their_memory(run, tiny_pipe, toy_data):
    """Class b alone equals class b beside the others."""
    torch.testing.assert_close(
        run("alone", classes=[1]).latents(1), run("beside").latents(1), rtol=1e-3, atol=1e-4
    )


# --- refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(ipc=4), "ipc = 3, wanted 4"),
        (dict(seed=1), "seed = 0, wanted 1"),
        (dict(guidance=replace(GUIDANCE, gamma=31.0)), r"guidance\.gamma = 30, wanted 31"),
        (dict(guidance=None), r"guidance = \{.*\}, wanted None"),
        (dict(fidelity=replace(STANDARD, memory_size=None)), r"fidelity\.memory_size = 64, wanted None"),
        (dict(cfg_scale=1.5), r"cfg_scale = 4, wanted 1\.5"),
        (dict(num_steps=7), "num_steps = 6, wanted 7"),
        (dict(jacobian="decoder"), r"shortcuts\.jacobian = full, wanted decoder"),
        (dict(label_ids=(4, 0, 8)), r"label_ids\[2\] = 9, wanted 8"),
        (dict(classes=[0]), r"selected = \[0, 1, 2\], wanted \[0\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_into_the_same_folder_are_refused(run, tmp_path, changes, named):
    run(classes=None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"holds a set of other settings: {named}; choose another out_dir"):
        run(**changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_checkpoints_into_the_same_folder_are_refused(run, toy):
    run()
    with pytest.raises(ValueError, match=r"settings: checkpoints\.epochs = \[0, 1, 2\], wanted \[0, 2\]"):
        run(checkpoints=toy().checkpoints.keep([0, 2]))


@pytest.mark.parametrize("part", ["transformer", "vae", "checkpoints"])
def test_other_weights_of_the_same_architecture_are_refused(run, tmp_path, toy, tiny_pipe, part):
    """A set never mixes the images of two models, such as DiT and its Minimax fine-tuning."""
    found = run()
    assert {"transformer", "vae", "checkpoints"} <= found.manifest["settings"].keys()
    found.image_path(2, 2).unlink()
    if part == "checkpoints":
        own = toy().checkpoints
        own.states[0] = {
            name: value + (0.01 if value.is_floating_point() else 0) for name, value in own.states[0].items()
        }
        with pytest.raises(ValueError, match=r"other settings: checkpoints\.weights\[0\] = "):
            run(checkpoints=own)
        return
    parameter = next(getattr(tiny_pipe, part).parameters())
    before = parameter.detach().clone()
    try:
        parameter.data += 0.01
        with pytest.raises(ValueError, match=rf"other settings: {part} = "):
            run()
    finally:
        parameter.data.copy_(before)
    assert run().verify() == []


def test_the_key_is_that_of_the_settings(run):
    """Whatever the seed and the selection, which the manifest has beside them; nothing else is left out."""
    one, same, other = run(), run("same"), run("other", cfg_scale=1.5)
    seed, part = run("seed", seed=1), run("part", classes=[1])
    assert one.manifest["key"] == same.manifest["key"] != other.manifest["key"]
    assert seed.manifest["key"] == part.manifest["key"] == one.manifest["key"]
    for found in (one, other):
        manifest = found.manifest
        assert (manifest["kind"], manifest["schema"]) == ("set", keys.SCHEMA["set"])
        assert manifest["key"] == keys.key("set", manifest["settings"])
        beside = {"kind", "schema", "key", "settings", "seed", "selected", "revision", "versions", "batch"}
        assert manifest["batch"] == 50  # images side by side at most, as in every earlier version
        assert manifest.keys() - beside == manifest["settings"].keys() & manifest.keys()
        assert all(manifest[name] == manifest["settings"][name] for name in manifest.keys() - beside)


def test_another_schema_s_set_is_refused(run, monkeypatch):
    run()
    now = keys.SCHEMA["set"] + 1
    monkeypatch.setitem(keys.SCHEMA, "set", now)
    said = f"it was made under schema {now - 1} of 'set', results now are of schema {now}"
    with pytest.raises(ValueError, match=said):
        run()


def test_a_set_keeps_the_revision_that_began_it(run, monkeypatch):
    """A resumed one too: another revision with the same key is no other set."""
    monkeypatch.setattr(module, "git_revision", lambda: "0123456789ab+")
    found = run()
    assert found.revision == found.manifest["revision"] == "0123456789ab+"
    found.image_path(1, 2).unlink()
    monkeypatch.setattr(module, "git_revision", lambda: "ba9876543210")
    assert run().revision == "0123456789ab+" and found.verify() == []


def test_checkpoints_do_not_matter_without_influence_guidance(run):
    """Deviation guidance alone uses none, so the set is the same with and without a surrogate at hand."""
    only_deviation = replace(GUIDANCE, k=0.0)
    run(guidance=only_deviation)
    run(guidance=only_deviation, checkpoints=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ipc=0), "ipc is at least 1, got 0"),
        (dict(classes=[0, 3]), r"labels 0 \.\.\. 2, got \[0, 3\]"),
        (dict(classes=[-1]), r"labels 0 \.\.\. 2"),
        (dict(classes=[]), r"labels 0 \.\.\. 2"),
        (dict(classes=[1, 1]), "twice"),
        (dict(label_ids=(1, 2)), "one id a class: 3, got 2"),
        (dict(checkpoints=None), "needs checkpoints"),
        (dict(guidance=Guidance(5.0, 30.0, (30, 45))), "not within the 6 steps"),
    ],
)
def test_bad_arguments_raise_before_anything_is_written(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"classes": 3, "selected": [], "ipc": 1}'])
def test_a_damaged_manifest_is_named(run, tmp_path, damage):
    run()
    (tmp_path / "set" / "manifest.json").write_text(damage)
    for attempt in (run, lambda: DistilledSet(tmp_path / "set")):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            attempt()


@pytest.mark.parametrize(
    ("kind", "damage"), [("latents", b"x"), ("latents", None), ("images", b"garbage"), ("images", None)]
)
def test_a_run_goes_on_from_the_last_image_before_a_damaged_one(run, kind, damage, capsys):
    """Replaced by garbage, or cut in half; in the class that is not finished and in one that is."""
    whole, cut = run("whole"), run()
    cut.image_path(0, 2).unlink()
    for label in (0, 1):
        path = cut.image_path(label, 1) if kind == "images" else cut.latent_path(label, 1)
        path.write_bytes(damage or path.read_bytes()[: path.stat().st_size // 2])
    found = run()
    assert (
        found.verify() == []
        and torch.equal(pixels(found), pixels(whole))
        and torch.equal(latents(found), latents(whole))
    )
    said = capsys.readouterr().out
    assert "class 0, image 1: cannot be read" in said and "class 1, image 1: cannot be read" in said


def test_a_damaged_image_of_a_finished_set_is_named_with_what_to_do(run):
    found = run()
    found.image_path(1, 0).write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"00001/00000\.png cannot be read .*verify --repair"):
        found.data()


def test_a_folder_without_a_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        DistilledSet(tmp_path)


def test_an_unfinished_class_is_named(run, tmp_path):
    found = run()
    (tmp_path / "set" / "images" / "00001" / "00002.png").unlink()
    with pytest.raises(ValueError, match="class 1 has 2 of 3 images; run distill again"):
        found.data()


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file/set.*choose another folder"):
        run("file/set")


@pytest.mark.parametrize("where", ["fsync", "write_bytes"])
def test_a_full_disk_leaves_only_whole_files_and_can_be_resumed(run, monkeypatch, tmp_path, where):
    whole = run("whole")
    owner, name = (os, "fsync") if where == "fsync" else (Path, "write_bytes")
    real, calls = getattr(owner, name), []

    def fills_up(*arguments):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(owner, name, fills_up)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device\. Free space"):
        run("full")
    monkeypatch.setattr(owner, name, real)
    assert not temporary_files(tmp_path / "full")
    for path in (tmp_path / "full").rglob("*.png"):
        Image.open(path).load()
    assert json.loads((tmp_path / "full" / "manifest.json").read_text())["ipc"] == 3
    assert torch.equal(pixels(run("full")), pixels(whole))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, too small for the set; a function that makes it large enough. Needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full(run, small_disk):
    disk, enlarge = small_disk
    whole = run("whole")
    with pytest.raises(
        OSError, match=r"cannot write .*disk.*No space left on device\. Free space or choose another folder"
    ):
        run("disk/set")
    assert not temporary_files(disk) and 0 < len(list(disk.rglob("*.png"))) < 9
    for path in disk.rglob("*.png"):
        Image.open(path).load()
    enlarge()
    found = run("disk/set")
    assert (
        torch.equal(pixels(found), pixels(whole))
        and torch.equal(latents(found), latents(whole))
        and found.verify() == []
    )


def test_a_set_can_be_moved(run, tmp_path):
    before = pixels(run())
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    assert torch.equal(pixels(DistilledSet(tmp_path / "elsewhere")), before)


# --- verification and the lock


def damage_all(folder: Path) -> dict[str, str]:
    """One image of each kind of damage; the lines that `verify` should begin with, by kind."""
    image = lambda label, index: folder / "images" / f"{label:05d}" / f"{index:05d}.png"  # noqa: E731
    latent = lambda label, index: folder / "latents" / f"{label:05d}" / f"{index:05d}.safetensors"  # noqa: E731
    image(0, 1).write_bytes(b"garbage")
    latent(0, 2).write_bytes(latent(0, 2).read_bytes()[:-7])
    Image.open(image(1, 0)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image(1, 0))
    latent(1, 1).write_bytes(latent(2, 2).read_bytes())  # whole, of another image: its picture's hash tells
    image(1, 2).unlink()
    image(2, 0).unlink()
    latent(2, 0).unlink()
    Image.new("RGB", (8, 8)).save(image(2, 1))
    (folder / "images" / "00000" / ".00001.png.abc.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    return {
        "garbage": "class 0, image 1: cannot be read",
        "truncated": "class 0, image 2: cannot be read",
        "changed": "class 1, image 0: another image",
        "exchanged": "class 1, image 1: another image",
        "no image": "class 1, image 2: no image",
        "gone": "class 2, image 0: missing",
        "small": "class 2, image 1: 8 x 8 px",
        "leftover": "images/00000/.00001.png.abc.tmp: no part",
        "foreign": "notes.txt: no part",
    }


def test_verify_finds_every_damage_and_distill_makes_it_good(run, tmp_path):
    whole = run("whole")
    found = run()
    assert found.verify() == []
    expected = damage_all(tmp_path / "set")
    said = found.verify()
    assert len(said) == len(expected) and all(
        line.startswith(start) for line, start in zip(said, expected.values(), strict=True)
    )
    assert found.verify(repair=True) == said
    assert [found.finished(label) for label in range(3)] == [1, 0, 0]
    again = run()
    assert torch.equal(pixels(again), pixels(whole)) and torch.equal(latents(again), latents(whole))
    assert again.verify() == ["notes.txt: no part of the set"]  # a stranger's file is named and left alone


def test_verify_reads_sets_without_hashes(run, tmp_path):
    """Sets of earlier versions: what can be decoded passes."""
    found = run()
    for path in (tmp_path / "set" / "latents").rglob("*.safetensors"):
        tensors, _ = module.files.load_tensors(path)
        module.files.save_tensors(path, tensors, seconds=1.0)
    assert found.verify() == []


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path, monkeypatch):
    real = module._sample

    def meddle(*arguments):
        monkeypatch.setattr(module, "_sample", real)
        with pytest.raises(
            BlockingIOError,
            match=rf"in use by a run that samples into it \(process {os.getpid()} on .*\); wait",
        ):
            run()
        return real(*arguments)

    monkeypatch.setattr(module, "_sample", meddle)
    found = run()
    assert found.verify() == [] and not (tmp_path / "set" / ".lock").exists()
    (tmp_path / "set" / ".lock").write_text("process 1 on a machine that crashed")  # held by nobody
    (tmp_path / "set" / "images" / "00001" / "00002.png").unlink()
    assert run().verify() == [] and not (tmp_path / "set" / ".lock").exists()


def test_a_set_is_begun_under_the_lock_too(run, tmp_path):
    """The run that holds it removes temporary files, and would remove a manifest that another is writing."""
    found = []
    other = threading.Thread(target=lambda: found.append(run()))
    with files.locked(tmp_path / "set", "another run"):
        other.start()
        time.sleep(0.5)
        assert not (tmp_path / "set" / "manifest.json").exists()
    other.join(60)
    assert len(found[0].images(0)) == 3


def test_a_second_run_can_wait_for_the_first(run, tmp_path, monkeypatch):
    """Both end with the whole set, the second having sampled nothing."""
    real, sampled, ended = module._sample, [], []

    def spy(*arguments):
        sampled.append(threading.current_thread().name)
        if len(sampled) == 1:
            other.start()
            time.sleep(0.3)
            assert other.is_alive()
        return real(*arguments)

    other = threading.Thread(target=lambda: ended.append(run(wait=True).verify()), name="second")
    monkeypatch.setattr(module, "_sample", spy)
    found = run()
    other.join(60)
    assert (
        ended == [[]]
        and found.verify() == []
        and "second" not in sampled
        and not (tmp_path / "set" / ".lock").exists()
    )


def test_a_finished_set_needs_no_lock(run, tmp_path):
    run()
    with module.files.locked(tmp_path / "set", "a test"):
        run()


# --- several runs into one folder


def test_runs_on_disjoint_classes_never_wait_for_each_other(run, monkeypatch):
    """One samples in the midst of another one's work; both refuse the other's classes, or all of them."""
    real, others = module._sample, []

    def meddle(*arguments):
        monkeypatch.setattr(module, "_sample", real)
        others.append(run(only=[1]))
        for classes in ([0], [2, 1], None):
            with pytest.raises(BlockingIOError, match="0000[02] is in use by a run that samples into it"):
                run(only=classes)
        return real(*arguments)

    monkeypatch.setattr(module, "_sample", meddle)
    first = run(only=[2, 0])
    assert others[0].lacking([1]) == 0 and others[0].finished(1) == 3
    assert first.lacking() == 0 and first.verify() == [] and not list(first.path.rglob(".lock"))


def test_only_is_what_a_run_works_on_and_no_part_of_the_set(run):
    whole, part = run("whole"), run(only=[2])
    assert part.manifest["key"] == whole.manifest["key"] and part.selected == [0, 1, 2]
    assert (part.lacking(), part.lacking([2]), part.lacking([1, 2])) == (6, 0, 3)
    part.image_path(2, 1).unlink()
    assert (part.lacking([2]), part.lacking()) == (2, 8)  # the third follows from the second
    assert run(only=[0, 2]).lacking() == 3
    ended = run()
    assert ended.lacking() == 0 and ended.verify() == []
    assert (latents(ended) - latents(whole)).norm() < 1e-3 * latents(whole).norm()
    with pytest.raises(ValueError, match="only names labels of the set's 2, 1 is none of them"):
        run("two", classes=[0, 2], only=[0, 1])
    assert not (ended.path.parent / "two").exists()


def test_a_class_that_another_run_has_is_left_for_the_end(run, monkeypatch):
    """And is sampled then, where that run ended without it."""
    held, sampled, real = (
        [files.locked(run(only=[]).path / "images" / "00001", "another run")],
        [],
        module._sample,
    )
    held[0].__enter__()

    def spy(wanted, out, items, *rest):
        sampled.append({label for label, _ in items})
        return real(wanted, out, items, *rest)

    def waits(self, label):
        assert label == 1 and sampled == [{0}] * 3 + [{2}] * 3
        held.pop().__exit__(None, None, None)

    monkeypatch.setattr(module, "_sample", spy)
    monkeypatch.setattr(DistilledSet, "wait_for", waits)
    found = run(batch_classes=1, wait=True)
    assert sampled == [{0}] * 3 + [{2}] * 3 + [{1}] * 3 and found.lacking() == 0 and not held


def test_a_lock_is_no_part_of_a_set_or_of_its_export(run, tmp_path):
    found = run()
    with found.claimed([0, 1]) as mine, found.claimed([1, 2]) as other:
        assert (mine, other) == ([0, 1], [2])
        assert found.verify() == [] and len(list(found.path.rglob(".lock"))) == 3
        out = found.export(tmp_path / "out")
    assert not list(out.rglob(".lock")) and not list(found.path.rglob(".lock"))


def test_a_set_opens_as_many_files_as_it_has_classes_in_work(monkeypatch):
    limits = {"soft": 256, "hard": 4096}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(machine.resource, "setrlimit", lambda _, given: limits.update(soft=given[0]))
    for count, expected in ((1000, 1512), (10, 1512), (10_000, 4096)):
        machine.allow_open_files(count)
        assert limits["soft"] == expected


def test_a_diffusion_model_of_more_classes_needs_to_be_told_which(run, tmp_path):
    with pytest.raises(
        ValueError, match="knows 10 classes and the data have 3: which of its classes are they"
    ):
        run(label_ids=None)
    with pytest.raises(ValueError, match=r"ids 0 \.\.\. 9 of the DiT's classes, got 10"):
        run(label_ids=(4, 0, 10))
    assert not (tmp_path / "set").exists()


def test_leftovers_of_a_killed_run_are_removed(run, tmp_path):
    run()
    leftover = tmp_path / "set" / "latents" / "00000" / ".00002.safetensors.xyz.tmp"
    leftover.write_bytes(b"half")
    (tmp_path / "set" / "images" / "00000" / "00002.png").unlink()
    run()
    assert not temporary_files(tmp_path)


def test_a_clock_that_jumps_changes_nothing(run, monkeypatch):
    """Neither by its readings nor by the times of files found: some in the future, some in 1970."""
    whole, cut = run("whole"), run()
    for position, path in enumerate(sorted(path for path in cut.path.rglob("*") if path.is_file())):
        os.utime(path, (4e9, 4e9) if position % 2 else (0, 0))
    cut.image_path(1, cut.ipc - 1).unlink()
    jumps = itertools.cycle([1e9, -1e9, 5.0])
    monkeypatch.setattr("time.time", lambda: next(jumps))
    assert torch.equal(pixels(run()), pixels(whole))
    assert 0 < cut.seconds < 600 and cut.verify() == []


VICTIM = """
import sys, torch
torch.set_num_threads(1)
from ci.tests.test_distill import victim
print("imported", flush=True)
victim(sys.argv[1])
"""


def victim(folder, ipc: int = 4, **options) -> DistilledSet:
    """Distils 10 classes of random models, slowly enough to be killed on the way."""
    from ci.bench.shapes import tiny_models
    from igd_lib.data.images import from_tensors
    from igd_lib.models.networks import ConvNet
    from igd_lib.pipeline import IGDPipeline
    from igd_lib.surrogate import Checkpoints

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, model = IGDPipeline(*tiny_models(10)), ConvNet(2, 10, 16, width=8).eval()
    pipe.set_progress_bar_config(disable=True)
    images = torch.randint(
        0, 256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    dataset = from_tensors(
        "victim", "train", [str(label) for label in range(10)], images, torch.arange(10).repeat_interleave(2)
    )
    checkpoints = Checkpoints(model, [model.state_dict()], [0.0], [0.01])
    guided = dict(guidance=Guidance(5.0, 7.5, (1, 2)), checkpoints=checkpoints, num_steps=4)
    return distill(pipe, dataset, ipc=ipc, out_dir=folder, **(guided | dict(batch_classes=5) | options))


def killed_at_random(folder: Path, times: int, ipc: int = 4, seed: int = 0) -> int:
    """Start `victim` and kill -9 it `times` over, then let it end. Returns how often it was killed at work.

    In turn soon after it starts (manifest, lock, clean-up, reading what is there) and once a random number of
    images is there.
    """
    import random

    environment = {
        **os.environ,
        "IGD_QUIET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", "ci/tests"]),
    }
    draw, killed, last = random.Random(seed), 0, 0
    command = [
        sys.executable,
        "-c",
        VICTIM.replace("victim(sys.argv[1])", f"victim(sys.argv[1], ipc={ipc})"),
        str(folder),
    ]
    for number in range(times):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()  # its imports are done
        if number % 2:
            target = draw.randint(last, last + 20 * ipc // times)
            while process.poll() is None and len(list(folder.rglob("*.png"))) <= target:
                time.sleep(0.002)
        time.sleep(draw.random() * (0.02 if number % 2 else 0.3))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        last = len(list(folder.rglob("*.png")))
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return killed


def test_runs_killed_at_random_moments_end_with_the_same_images(tmp_path):
    """Two kills of 20 images; ten of 200 with `make soak`."""
    times, ipc = (10, 20) if os.environ.get("IGD_SOAK") else (2, 2)
    whole, threads = victim(tmp_path / "whole", ipc=ipc), torch.get_num_threads()
    assert killed_at_random(tmp_path / "cut", times=times, ipc=ipc) >= times - 1
    found = DistilledSet(tmp_path / "cut")
    assert found.verify() == [] and not temporary_files(tmp_path)
    if threads == 1:  # as the killed ones had
        assert torch.equal(pixels(found), pixels(whole)) and torch.equal(latents(found), latents(whole))
    assert_same_pixels(found, whole)


def shared(folder: Path, name: str) -> DistilledSet:
    """`victim` by one of two processes, which begin together; notes what it samples."""
    real = module._sample

    def spy(wanted, out, items, *rest):
        with open(folder / f"{name}.txt", "a") as log:
            log.write("".join(f"{label} {index}\n" for label, index in items))
        return real(wanted, out, items, *rest)

    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_sample", spy)
        return victim(folder / "set", ipc=6, batch_classes=2, wait=True)


SHARING = VICTIM.replace("victim(sys.argv[1])", 'shared(Path(sys.argv[1]), "two")').replace(
    "import victim", "import Path, shared"
)


def test_two_processes_divide_a_set_s_classes(tmp_path):
    """Both begin it at once; neither samples what the other does, and both end with the whole set."""
    paths = os.pathsep.join([".", "ci/tests"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    other = subprocess.Popen(
        [sys.executable, "-c", SHARING, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    found = shared(tmp_path, "one")
    assert found.lacking() == 0, other.stderr.read()
    assert other.wait(60) == 0, other.stderr.read()
    own = [(tmp_path / f"{name}.txt").read_text().splitlines() for name in ("one", "two")]
    assert set(own[0]).isdisjoint(own[1]) and len(own[0]) + len(own[1]) == 60
    assert found.verify() == [] and not list(found.path.rglob(".lock"))
    if torch.get_num_threads() == 1:  # as the other had
        assert torch.equal(latents(found), latents(victim(tmp_path / "alone", ipc=6, batch_classes=2)))


# --- what is not finite, of another size or on another device


@pytest.mark.parametrize("broken", ["decoder", "latents"])
def test_what_is_not_finite_is_never_stored(run, tiny_pipe, tmp_path, monkeypatch, broken):
    """As uint8 it would be a finished set of black images."""
    if broken == "decoder":
        tiny_pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    else:
        nan = torch.full((3, 4, 8, 8), float("inf"))
        monkeypatch.setattr(Sampling, "sample", lambda *_, **__: nan)
    what = {"decoder": "decoded pixels are", "latents": "latents are"}[broken]
    with pytest.raises(FloatingPointError, match=f"{what} not finite"):
        run(guidance=None, ipc=1)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(FloatingPointError, match="not finite"):
        tiny_pipe.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_verify_names_a_stored_latent_that_is_not_finite(run):
    """Of a version that did not look: its sums are right."""
    whole = run()
    path, image = whole.latent_path(1, 2), whole.image_path(1, 2)
    latent = files.load_tensors(path)[0]["latent"]
    latent[0, 0, 0] = float("nan")
    note = {"latent_sha256": store.tensor_sha256(latent), "image_sha256": files.sha256(image)}
    files.save_tensors(path, {"latent": latent}, **note)
    assert whole.verify() == ["class 1, image 2: its latent is not finite"]
    assert whole.verify(repair=True) and run().verify() == []


def test_images_of_another_size_are_refused_before_anything_is_sampled(run, toy_data, tiny_pipe, tmp_path):
    other = toy_data.at(32)
    message = "diffusion model makes images of 16 px, those of toy have 32"
    with pytest.raises(ValueError, match=message):
        distill(
            tiny_pipe, other, ipc=1, guidance=None, checkpoints=None, out_dir=tmp_path / "x", label_ids=IDS
        )
    assert not (tmp_path / "x").exists()
    found = run(guidance=None, checkpoints=None)
    found.image_path(0, 2).unlink()
    with pytest.raises(ValueError, match=message):  # nor is a set of the right size gone on with
        distill(tiny_pipe, other, ipc=3, guidance=None, checkpoints=None, out_dir=found.path, label_ids=IDS)


def test_a_model_s_image_size_is_that_of_what_it_decodes(tiny_pipe, standin_pipe):
    for pipe in (tiny_pipe, standin_pipe):
        noise = pipe.latent_noise([torch.Generator().manual_seed(0)])
        assert pipe.decode(noise).shape[-1] == pipe.image_size


def test_everything_follows_the_pipeline_to_its_device(run, monkeypatch):
    """A trajectory that was trained or read on another device, and the memory of a resumed class."""
    moved, real = [], Checkpoints.to
    monkeypatch.setattr(Checkpoints, "to", lambda self, device: moved.append(device) or real(self, device))
    whole = run()
    assert set(moved) == {"cpu"}
    whole.image_path(0, 2).unlink()
    monkeypatch.setattr(DiTPipeline, "_execution_device", property(lambda _: torch.device("meta")))
    with pytest.raises((NotImplementedError, RuntimeError)):  # nothing can be sampled there
        run()
    assert moved[-1] == "meta"


def test_class_gradients_of_mixed_devices_are_stacked_on_the_pipeline_s(tiny_pipe, toy, monkeypatch):
    sampling = Sampling(tiny_pipe, GUIDANCE, checkpoints=toy().checkpoints, num_steps=6)
    monkeypatch.setattr(DiTPipeline, "_execution_device", property(lambda _: torch.device("meta")))
    own = toy().gradients
    mixed = {0: own[:, 0], 1: own[:, 1].to("meta")}
    influence, _ = sampling.guides([0, 1], [0, 0], [torch.zeros(0, 4, 8, 8)] * 2, mixed, [])
    assert influence.gradients.device.type == "meta" and influence.gradients.shape == own[:, :2].shape


def test_an_interrupted_run_says_what_is_there_and_how_to_go_on(run, monkeypatch, tmp_path):
    real, count = module._sample, itertools.count()

    def stop(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_sample", stop)
    with pytest.raises(KeyboardInterrupt, match="6 of 9 images are in .*set; run the same again to go on"):
        run()
    assert len(run().images(0)) == 3 and not (tmp_path / "set" / ".lock").exists()
