"""Loading DiT's and Minimax's own files: forward-equal to a model of the original layout written here."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from igd_lib.__main__ import igd
from igd_lib.experiment import pieces
from igd_lib.models import dit as weights
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools.machine import cache_dir

WIDTH, DEPTH, HEADS, CLASSES, SIDE = 32, 3, 2, 7, 8
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Peebles and Xie: ADM's linear schedule


class Original(nn.Module):
    """DiT (Peebles and Xie, 2023) with its authors' parameter names; `scales` adds Minimax's to the
    first blocks.
    """

    def __init__(self, scales: int = 0):
        super().__init__()
        named = {
            "x_embedder.proj": nn.Conv2d(4, WIDTH, 2, 2),
            "y_embedder.embedding_table": nn.Embedding(CLASSES + 1, WIDTH),
        }
        named |= {"t_embedder.mlp.0": nn.Linear(256, WIDTH), "t_embedder.mlp.2": nn.Linear(WIDTH, WIDTH)}
        for i in range(DEPTH):
            named |= {
                f"blocks.{i}.attn.qkv": nn.Linear(WIDTH, 3 * WIDTH),
                f"blocks.{i}.attn.proj": nn.Linear(WIDTH, WIDTH),
                f"blocks.{i}.mlp.fc1": nn.Linear(WIDTH, 4 * WIDTH),
                f"blocks.{i}.mlp.fc2": nn.Linear(4 * WIDTH, WIDTH),
                f"blocks.{i}.adaLN_modulation.1": nn.Linear(WIDTH, 6 * WIDTH),
            }
        named |= {
            "final_layer.adaLN_modulation.1": nn.Linear(WIDTH, 2 * WIDTH),
            "final_layer.linear": nn.Linear(WIDTH, 4 * 8),
        }
        self.tensors = {
            f"{name}.{part}": tensor.detach()
            for name, module in named.items()
            for part, tensor in module.named_parameters()
        }
        self.scales = scales
        for i in range(scales):
            for name, size in (
                ("attn.gamma1", 3 * WIDTH),
                ("attn.gamma2", WIDTH),
                ("gamma1", WIDTH),
                ("gamma2", WIDTH),
            ):
                self.tensors[f"blocks.{i}.{name}"] = 1 + 0.3 * torch.randn(size)
        # The fixed table: half of the channels for the column, half for the row, sines before cosines.
        quarter = WIDTH // 4
        frequencies = 1 / 10000 ** (np.arange(quarter) / quarter)
        table = [
            [
                np.concatenate([f(p * frequencies) for p in (x, y) for f in (np.sin, np.cos)])
                for x in range(SIDE // 2)
            ]
            for y in range(SIDE // 2)
        ]
        self.tensors["pos_embed"] = torch.tensor(np.array(table), dtype=torch.float32).reshape(1, -1, WIDTH)

    def linear(self, name: str, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def forward(self, x, t, y):
        w = self.tensors
        tokens = (
            F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
            .flatten(2)
            .transpose(1, 2)
            + w["pos_embed"]
        )
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.linear(
            "t_embedder.mlp.2",
            F.silu(self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))),
        )
        c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
        for i in range(DEPTH):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.linear(
                f"blocks.{i}.adaLN_modulation.1", c
            )[:, None].chunk(6, 2)
            g = [
                w.get(f"blocks.{i}.{n}", torch.ones(()))
                for n in ("attn.gamma1", "attn.gamma2", "gamma1", "gamma2")
            ]
            h = F.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale_a) + shift_a
            q, k, v = (
                (g[0] * self.linear(f"blocks.{i}.attn.qkv", h))
                .unflatten(2, (3, HEADS, -1))
                .permute(2, 0, 3, 1, 4)
            )
            mixed = ((q @ k.transpose(2, 3)) / math.sqrt(WIDTH / HEADS)).softmax(3) @ v
            tokens = tokens + g[2] * gate_a * (
                g[1] * self.linear(f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2))
            )
            h = F.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale_m) + shift_m
            h = F.gelu(self.linear(f"blocks.{i}.mlp.fc1", h), approximate="tanh")
            tokens = tokens + g[3] * gate_m * self.linear(f"blocks.{i}.mlp.fc2", h)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, 2)
        out = self.linear(
            "final_layer.linear", F.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        )
        n = SIDE // 2
        return out.reshape(-1, n, n, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, SIDE, SIDE)


@pytest.fixture(params=[0, 2], ids=["dit", "minimax"])
def original(request) -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Original(request.param)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(5, 4, SIDE, SIDE, generator=generator),
        torch.tensor([0, 20, 333, 640, 999]),
        torch.tensor([0, 3, 6, CLASSES, 1]),
    )


def forward(model, x, t, y):
    with torch.no_grad():
        return model(x, timestep=t, class_labels=y).sample


def test_converted_model_is_forward_equal(original, inputs):
    model = weights.from_original(original.tensors, num_attention_heads=HEADS)
    assert not model.training
    torch.testing.assert_close(forward(model, *inputs), original(*inputs), rtol=1e-4, atol=1e-5)


def test_diffusers_own_timestep_frequencies_are_not_the_originals(original, inputs):
    model = weights.from_original(original.tensors, num_attention_heads=HEADS)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1  # as diffusers builds it
    wanted, found = original(*inputs), forward(model, *inputs)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)  # at t = 0 all frequencies agree
    assert ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1))[2:].min() > 0.01


def test_a_forgotten_scale_would_show(inputs):
    torch.manual_seed(3)
    scaled = Original(2)
    for name in ("attn.gamma1", "attn.gamma2", "gamma1", "gamma2"):
        state = dict(scaled.tensors)
        state[f"blocks.1.{name}"] = torch.ones_like(state[f"blocks.1.{name}"])
        model = weights.from_original(state, num_attention_heads=HEADS)
        assert (forward(model, *inputs) - scaled(*inputs)).abs().max() > 1e-3, name


def test_a_saved_model_keeps_the_original_frequencies(original, inputs, tiny, tmp_path):
    IGDPipeline(
        weights.from_original(original.tensors, num_attention_heads=HEADS), tiny().vae, tiny().ddpm
    ).save_pretrained(tmp_path)
    loaded = IGDPipeline.from_pretrained(tmp_path).transformer
    torch.testing.assert_close(forward(loaded, *inputs), original(*inputs), rtol=1e-4, atol=1e-5)


def test_files_plain_and_training_checkpoints(original, inputs, tmp_path):
    torch.save(original.tensors, tmp_path / "plain.pt")
    shifted = {name: tensor + 1 for name, tensor in original.tensors.items()}
    torch.save(
        {
            "model": shifted,
            "ema": original.tensors,
            "opt": {"state": {}},
            "args": argparse.Namespace(lr=1e-3),
        },
        tmp_path / "training.pt",
    )
    for name in ("plain.pt", "training.pt"):
        state = weights.read(tmp_path / name)
        assert state.keys() == original.tensors.keys()
        assert all(torch.equal(state[key], original.tensors[key]) for key in state)


def test_bad_files(tmp_path, original):
    with pytest.raises(FileNotFoundError, match="no.pt"):
        weights.read(tmp_path / "no.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt cannot be read"):
        weights.read(tmp_path / "text.pt")
    torch.save({"hook": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="code.pt cannot be read as plain tensors"):
        weights.read(tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        weights.read(tmp_path / "list.pt")
    state = dict(original.tensors)
    state["extra.weight"] = state.pop("blocks.1.mlp.fc1.bias")
    with pytest.raises(ValueError, match=r"missing \['blocks.1.mlp.fc1.bias'\], unknown \['extra.weight'\]"):
        weights.convert(state)
    with pytest.raises(ValueError, match="sine-cosine"):
        weights.from_original(
            {**original.tensors, "pos_embed": original.tensors["pos_embed"].flip(1)},
            num_attention_heads=HEADS,
        )


# --- the command: a whole pipeline or nothing


@pytest.fixture
def vae_folder(tiny, tmp_path):
    tiny().vae.save_pretrained(tmp_path / "vae-of-mine")
    return tmp_path / "vae-of-mine"


def convert(*words):
    return CliRunner().invoke(igd, ["convert", *map(str, words)])


@pytest.mark.parametrize("name", ["plain.pt", "plain.safetensors"])
def test_a_converted_file_is_a_pipeline_that_is_looked_up(original, inputs, tmp_path, vae_folder, name):
    """It samples what the file's own model predicts, and has the schedule that DiT was trained with."""
    save = save_file if name.endswith("safetensors") else torch.save
    save(original.tensors, tmp_path / name)
    out = cache_dir() / "models" / "DiT-food-101"
    told = convert(tmp_path / name, out, "--vae", vae_folder, "--heads", HEADS)
    assert told.exit_code == 0 and told.output.strip().endswith(str(out)), told.output
    assert pieces.model_folder(*pieces.dit_of("food-101")) == out
    pipe = IGDPipeline.from_pretrained(out)
    torch.testing.assert_close(forward(pipe.transformer, *inputs), original(*inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        pipe.scheduler.alphas_cumprod.double(), torch.cumprod(1 - BETAS, 0), rtol=1e-5, atol=0
    )
    assert pipe.vae.config.scaling_factor == 0.7 and pipe.labels == {}
    assert type(DiTPipeline.from_pretrained(out)) is DiTPipeline
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    again = convert(tmp_path / name, out, "--vae", vae_folder, "--heads", HEADS)
    assert again.exit_code == 1 and "is there already and not empty" in again.output


def test_a_model_of_imagenet_knows_its_names(original, tmp_path, vae_folder):
    table = torch.randn(1001, WIDTH)
    torch.save(original.tensors | {"y_embedder.embedding_table.weight": table}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "out", "--vae", vae_folder, "--heads", 2).exit_code == 0
    labels = IGDPipeline.from_pretrained(tmp_path / "out").labels
    assert labels["tench"] == 0 and labels["Samoyed"] == 258 and labels["toilet tissue"] == 999


def test_an_interrupted_conversion_leaves_no_folder(original, tmp_path, vae_folder, monkeypatch):
    torch.save(original.tensors, tmp_path / "a.pt")
    words = (tmp_path / "a.pt", tmp_path / "models" / "out", "--vae", vae_folder, "--heads", HEADS)

    def full(self, folder, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.AutoencoderKL.save_pretrained", full)
        told = convert(*words)
    assert told.exit_code == 1 and "No space left" in told.output
    assert list((tmp_path / "models").iterdir()) == []
    assert convert(*words).exit_code == 0
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["out"]


def test_what_is_lacking_is_said_before_anything_is_written(original, tmp_path, monkeypatch, vae_folder):
    torch.save(original.tensors, tmp_path / "a.pt")
    out = tmp_path / "models" / "out"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pieces, "model_folder", lambda *_: None)
    for words, message in (
        ((), "sd-vae-ft-mse is not on this machine: hf download stabilityai/sd-vae-ft-mse"),
        (("--vae", tmp_path), "--vae FOLDER"),
        (("--vae", vae_folder), "a DiT of width 32 is not known"),
        (("--vae", vae_folder, "--heads", "3"), "cannot be divided among 3 attention heads"),
    ):
        told = convert(tmp_path / "a.pt", out, *words)
        assert told.exit_code == 1 and message in told.output.replace("\n", " "), told.output
        assert not out.parent.exists()
    monkeypatch.setattr(pieces, "model_folder", lambda *_: vae_folder)  # where the pinned one is found
    assert convert(tmp_path / "a.pt", out, "--heads", HEADS).exit_code == 0


def test_heads_of_the_published_sizes():
    """Table 1 of Peebles and Xie."""
    published = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
    assert all(weights.heads_of(width) == heads for width, heads in published.values())
    with pytest.raises(ValueError, match=r"width 1280 is not known .*1152 \(16\).*--heads N"):
        weights.heads_of(1280)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(original, inputs, tmp_path, dtype):
    """As if its tensors, the scales too, had been rounded and computed with in single precision."""
    torch.save({name: tensor.to(dtype) for name, tensor in original.tensors.items()}, tmp_path / "half.pt")
    model = weights.from_original(weights.read(tmp_path / "half.pt"), num_attention_heads=HEADS)
    table = original.tensors["pos_embed"]
    original.tensors = {name: tensor.to(dtype).float() for name, tensor in original.tensors.items()}
    original.tensors["pos_embed"] = table
    torch.testing.assert_close(forward(model, *inputs), original(*inputs), rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_named(original, value):
    state = {name: tensor.clone() for name, tensor in original.tensors.items()}
    state["blocks.1.mlp.fc2.weight"][3, 5] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2\.weight holds NaN or infinity"):
        weights.from_original(state, num_attention_heads=HEADS)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_pointer_is_not_the_file(tmp_path, name):
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2700611775\n"
    )
    with pytest.raises(ValueError, match="is a git-lfs pointer, .* in place of the file; run git lfs"):
        weights.read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        weights.read(tmp_path / name)


# --- classes


def test_ids_are_only_guessed_where_they_can_be_meant(tiny):
    ten = tiny(num_classes=10).transformer
    assert weights.class_ids(ten, 10) == list(range(10)) and weights.class_ids(ten, 2, [7, 3]) == [7, 3]
    for classes, ids, message in (
        (3, None, "knows 10 classes and the data have 3: .*Pass label_ids"),
        (11, None, "knows 10 classes and the data have 11"),
        (3, [1, 2], "one id a class: 3, got 2"),
        (2, [1, 10], "ids 0 ... 9 of the DiT's classes, got 10"),
        (2, [4, 4], "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.class_ids(ten, classes, ids)


def test_a_copy_for_other_classes_begins_as_what_is_known(tiny, inputs):
    """A class that the DiT knows as itself, another one as an image without a label; no label as before."""
    ten = tiny(num_classes=10).transformer
    before = {name: value.clone() for name, value in ten.state_dict().items()}
    made = weights.for_classes(ten, [None, 7, None])
    x, t, _ = inputs
    found = forward(made, x[:4], t[:4], torch.tensor([0, 1, 2, 3]))
    assert torch.equal(found, forward(ten, x[:4], t[:4], torch.tensor([10, 7, 10, 10])))
    assert not torch.equal(found, forward(ten, x[:4], t[:4], torch.tensor([10, 6, 10, 10])))
    assert made.config.num_embeds_ada_norm == 3 and ten.config.num_embeds_ada_norm == 10
    assert all(torch.equal(before[name], value) for name, value in ten.state_dict().items())
