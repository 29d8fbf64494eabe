"""Found means loadable: what is said of a model's folder agrees with what loading it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from ci.bench.shapes import dit_xl_2
from ci.fakes import with_former_names
from igd_lib.models import standin
from igd_lib.models.folder import dit_scheduler, write_pipeline
from igd_lib.models.loadable import problems, problems_of_decoder
from igd_lib.pipeline import IGDPipeline

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2700611775\n"
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def whole(tiny, tmp_path) -> Path:
    """A pipeline as `igd convert` and fine-tuning write it: 10 classes, 8 x 2 = 16 px."""
    models = tiny(num_classes=10, out_channels=8)
    return write_pipeline(tmp_path / "whole", models.transformer, models.vae, dit_scheduler())


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_authors_have_it(folder: Path) -> None:
    """`facebook/DiT-XL-2-256`: a class of before diffusers divided it, torch files, fewer options."""
    for part in ("transformer", "vae"):
        path = folder / part / NAME
        torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
        path.unlink()
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    del config["norm_eps"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    change(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])


# --- what is whole


def test_what_conversion_writes(whole):
    assert problems(whole, classes=10, image_size=16) == []
    assert problems(whole / "vae", parts=("vae",)) == problems(whole, parts=("vae",)) == []
    assert problems(standin.path("fashion-mnist"), classes=10, image_size=32) == []


def test_the_authors_folder_loads_as_a_dit_and_nothing_is_said(whole):
    before = load_file(whole / "transformer" / NAME)
    as_authors_have_it(whole)
    assert problems(whole, classes=10, image_size=16) == []
    pipe = IGDPipeline.from_pretrained(whole)
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    state = pipe.transformer.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def test_an_autoencoder_of_former_names(whole):
    state = load_file(whole / "vae" / NAME)
    with_former_names(whole / "vae")
    assert any(".proj_attn." in name for name in load_file(whole / "vae" / NAME))
    assert problems(whole / "vae", parts=("vae",)) == []
    loaded = AutoencoderKL.from_pretrained(whole / "vae").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_the_autoencoder_may_lie_elsewhere(whole, tmp_path):
    vae = shutil.move(whole / "vae", tmp_path / "vae")
    assert problems(whole, parts=("transformer",), vae=vae, classes=10, image_size=16) == []
    assert len(problems(whole, classes=10, image_size=16)) == 1
    [line] = problems(whole, parts=("transformer",), vae=vae, image_size=32)
    assert "8 x 2 = 16 px, and the data's have 32 px" in line


def test_files_in_pieces(whole, tiny):
    tiny(num_classes=10, out_channels=8).transformer.save_pretrained(
        whole / "transformer", max_shard_size="20KB"
    )
    (whole / "transformer" / NAME).unlink(missing_ok=True)
    pieces = sorted((whole / "transformer").glob("*.safetensors"))
    assert len(pieces) > 2 and problems(whole) == []
    IGDPipeline.from_pretrained(whole)
    pieces[1].unlink()
    [line] = problems(whole)
    assert f"lacks 1 of the {len(pieces)} files" in line and pieces[1].name in line
    with pytest.raises(OSError):
        IGDPipeline.from_pretrained(whole)


# --- what is not: each is refused by loading too, or is worse, for nothing is said then


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def drop(path: Path) -> None:
    """diffusers only warns of a tensor that is missing, and leaves it on no device."""
    state = load_file(path)
    del state["proj_out_2.weight"]
    save_file(state, path)


def half_of_the_layers(folder: Path) -> None:
    """diffusers only warns of layers that nobody asked for."""
    change(folder / "transformer" / "config.json", num_layers=1)


BROKEN = {
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        "no finished pipeline, it has no model_index.json",
    ),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing; download"),
    "no weights": (lambda f: (f / "transformer" / NAME).unlink(), "transformer holds no weights, neither"),
    "another precision": (
        lambda f: (f / "transformer" / NAME).rename(f / "transformer" / NAME.replace(".s", ".fp16.s")),
        "there is diffusion_pytorch_model.fp16.safetensors, which is another precision's",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing; download"),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), "config.json is missing; download"),
    "pointer": (
        lambda f: (f / "vae" / NAME).write_text(POINTER),
        "vae/.* is a git-lfs pointer, .* git lfs pull",
    ),
    "pointer for JSON": (
        lambda f: (f / "transformer" / "config.json").write_text(POINTER),
        "config.json is a git-lfs pointer",
    ),
    "no JSON": (lambda f: (f / "transformer" / "config.json").write_text("{"), "is damaged, it is no JSON"),
    "cut short": (
        lambda f: cut(f / "transformer" / NAME),
        r"is cut short: [\d,]+ bytes, and its header asks",
    ),
    "cut to nothing": (lambda f: os.truncate(f / "vae" / NAME, 0), "no safetensors file, or its beginning"),
    "no tensor": (
        lambda f: drop(f / "transformer" / NAME),
        "1 of the model's .* are missing.*proj_out_2.weight",
    ),
    "other shapes": (
        lambda f: change(f / "transformer" / "config.json", num_embeds_ada_norm=12),
        r"embedding_table.weight has the shape \(11, 16\), and the model's has \(13, 16\)",
    ),
    "more layers": (half_of_the_layers, "tensors of layers that the model has not, .*transformer_blocks.1"),
    "another model": (
        lambda f: change(f / "transformer" / "config.json", _class_name="SiTTransformer2DModel"),
        "is of a SiTTransformer2DModel; DiTTransformer2DModel is needed",
    ),
    "another pipeline": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
        "names no transformer, it is that of a StableDiffusionPipeline",
    ),
    "no model": (
        lambda f: change(f / "transformer" / "config.json", num_layers="two"),
        "config.json describes no DiTTransformer2DModel",
    ),
}
SILENT = ("no tensor", "more layers", "another model")  # loads with a warning at most


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_loaded_is_said_in_a_line(whole, name):
    damage, wanted = BROKEN[name]
    assert problems(whole) == []
    damage(whole)
    lines = problems(whole)
    assert len(lines) == 1, lines
    assert re.search(wanted, lines[0]), lines
    assert str(whole) in lines[0] and "\n" not in lines[0]
    if name not in SILENT:
        with pytest.raises(Exception):  # noqa: B017 - diffusers' own, of any kind
            IGDPipeline.from_pretrained(whole)


def test_a_torch_file_that_is_cut_short_or_holds_code(whole, capsys):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    as_authors_have_it(whole)
    path = whole / "transformer" / "diffusion_pytorch_model.bin"
    content = path.read_bytes()
    cut(path)
    [line] = problems(whole)
    assert "diffusion_pytorch_model.bin is cut short" in line and "delete it" in line
    torch.save({"a": Harmful()}, path)
    [line] = problems(whole)
    assert "cannot be read as plain tensors" in line
    with pytest.raises(OSError):
        IGDPipeline.from_pretrained(whole)
    assert "run" not in capsys.readouterr().out
    path.write_bytes(content)
    assert problems(whole) == []


def test_what_does_not_fit_is_said_with_both_numbers(whole):
    [line] = problems(whole, classes=1000)
    assert "knows 10 classes, and 1000 are wanted" in line and "igd finetune" in line
    [line] = problems(whole, image_size=256)
    assert "makes images of 8 x 2 = 16 px, and the data's have 256 px" in line
    change(whole / "vae" / "config.json", latent_channels=16)
    lines = problems(whole)
    assert any("latents of 4 channels" in line and "has 16" in line for line in lines)


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "DiT").write_bytes(b"")
    [line] = problems(tmp_path / "DiT")
    assert "is no folder" in line
    assert "is no folder" in problems(tmp_path / "none")[0]


def test_a_link_to_a_download_that_was_removed(whole):
    """The hub's cache has links; what they lead to may have been deleted, or never have come."""
    path = whole / "vae" / NAME
    path.unlink()
    path.symlink_to(whole / "blobs" / "0123")
    [line] = problems(whole)
    assert "vae holds no weights" in line


# --- the guidance decoder


def test_a_guidance_decoder(tmp_path):
    folder = tmp_path / "taesd"
    assert "is no folder" in problems_of_decoder(folder)[0]
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)  # fmt: skip
    assert problems_of_decoder(folder) == problems_of_decoder(folder, latent_channels=4) == []
    [line] = problems_of_decoder(folder, latent_channels=16)
    assert "latents of 4 channels, and the autoencoder has 16" in line
    cut(folder / NAME)
    [line] = problems_of_decoder(folder)
    assert "is cut short" in line
    assert problems_of_decoder(standin.path("fashion-mnist") / "guidance_decoder") == []


# --- what it costs


def test_no_weights_are_loaded(tmp_path):
    """DiT-XL/2's shapes: a file of 2.9 GB of holes is looked at in seconds, without memory for it."""
    with torch.device("meta"):
        model = dit_xl_2()
    header, end = {}, 0
    for name, value in model.state_dict().items():
        size = 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    folder = tmp_path / "transformer"
    model.save_config(folder)
    with open(folder / NAME, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    dit_scheduler().save_pretrained(tmp_path / "scheduler")
    index = {"transformer": ["diffusers", "Transformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    before, began = _resident(), time.monotonic()
    assert problems(tmp_path, parts=("transformer",), vae=tmp_path, classes=1000) == []
    assert time.monotonic() - began < 5 and _resident() - before < 300 << 20


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
