"""Builds and finds the embedded stand-ins: small latent diffusion models of real data.

A stand-in is an `AutoencoderKL`, a `DiTTransformer2DModel` and a scheduler in diffusers' folder
format, so that one code path loads it and `facebook/DiT-XL-2-256`. Training is by
`igd standin NAME --out FOLDER`, resumes after a crash and is deterministic in its seed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from igd_lib.data.datasets import DataSpec, spec_of
from igd_lib.data.images import ImageData, load, to_float
from igd_lib.tools import files
from igd_lib.tools.machine import has_bfloat16
from igd_lib.tools.version import PACKAGE

ASSETS = PACKAGE / "models" / "assets"


@dataclass(frozen=True)
class StandIn:
    """How one stand-in is built."""

    dataset: str
    # share of each class's training images kept out for validation; None: the data set's own
    holdout: float | None = None
    vae_channels: tuple[int, ...] = (16, 32, 64)  # one halving of the resolution between neighbours
    vae_steps: int = 2000
    vae_batch: int = 64
    kl_weight: float = 2e-3  # a latent value, against the mean squared error a pixel value
    centre_weight: float = 0.05  # on the squared batch mean of each latent position: latents near zero mean
    layers: int = 6
    heads: int = 4
    head_dim: int = 48
    patch: int = 2
    dit_steps: int = 9000
    dit_batch: int = 64
    ema: float = 0.999
    # loss weight min(SNR, cap) / SNR: the decoder forgives small noise, structure matters
    snr_cap: float = 1.0
    lr: float = 1e-3  # both models; a short warm-up, ...
    dit_constant: float = 0.0  # ... for the DiT this share of the steps at the full rate, then half a cosine
    # the DiT's products in bfloat16 where the processor has it (the autoencoder's always)
    dit_bfloat16: bool = False
    flip: bool = False  # horizontal flips: half of the images for the autoencoder, both of each for the DiT
    label_dropout: float = 0.1
    # of the guidance decoder; one doubling between neighbours
    decoder_channels: tuple[int, ...] = (16, 16, 16)
    decoder_steps: int = 1500
    teacher: bool = False  # whether a network that gives soft labels is shipped with it (`add_teacher`)
    seed: int = 0


STANDINS = {
    "fashion-mnist": StandIn("fashion-mnist"),
    "cifar-10": StandIn(
        "cifar-10",
        holdout=0.1,
        vae_channels=(32, 64, 64),
        vae_steps=3500,
        kl_weight=1e-3,
        dit_steps=22_000,
        dit_batch=128,
        dit_constant=0.6,
        dit_bfloat16=True,
        ema=0.9995,
        flip=True,
        teacher=True,
    ),
}


def path(name: str = "fashion-mnist") -> Path:
    """The shipped folder of a stand-in, for `IGDPipeline.from_pretrained`."""
    folder = ASSETS / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no stand-in {name!r} in {ASSETS}; build it: igd standin {name}")
    return folder


def tiny_decoder(name: str = "fashion-mnist") -> AutoencoderTiny:
    """The stand-in's guidance decoder: a small copy of its decoder, as TAESD is of Stable Diffusion's.

    It takes scaled latents (`sample_igd(guidance_decoder=...)`); its encoder is untrained.
    """
    return AutoencoderTiny.from_pretrained(path(name) / "guidance_decoder").float().eval()


def new_vae(recipe: StandIn, image_size: int) -> AutoencoderKL:
    """The untrained autoencoder: images (B, 3, H, H), latents (B, 4, h, h)."""
    blocks = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
    )


def new_transformer(recipe: StandIn, num_classes: int, latent_size: int) -> DiTTransformer2DModel:
    """The untrained DiT; it predicts noise only (no variance).

    Modulations and the output start at zero, as in the DiT paper; diffusers leaves them random, which
    learns far more slowly.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=recipe.layers,
        sample_size=latent_size,
        patch_size=recipe.patch,
        num_embeds_ada_norm=num_classes,
    )
    for layer in [
        *(block.norm1.linear for block in model.transformer_blocks),
        model.proj_out_1,
        model.proj_out_2,
    ]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def learning_rate(step: int, steps: int, peak: float, *, constant: float = 0.0, warmup: int = 200) -> float:
    """Linear warm-up, the peak for a share `constant` of the steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    falls = max(warmup, round(steps * constant))
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, step - falls) / max(1, steps - falls)))


def data_of(recipe: StandIn) -> DataSpec:
    """A stand-in's data set, with the validation split that nothing of the stand-in is trained on."""
    spec = spec_of(recipe.dataset)
    return spec if recipe.holdout is None else replace(spec, holdout=recipe.holdout)


def _spent(work: Path, since: float) -> float:
    """Add the seconds since `since` to those that the training has taken; returns the time now."""
    now, path = time.monotonic(), work / "seconds.json"
    before = json.loads(path.read_text()) if path.is_file() else 0.0
    files.write(path, json.dumps(before + now - since))
    return now


def train_vae(recipe: StandIn, data: ImageData, work: Path) -> AutoencoderKL:
    """Mean squared error + KL + a pull of each latent position's mean to zero; resumes from `work`."""
    torch.manual_seed(recipe.seed)
    vae = new_vae(recipe, data.image_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True)
    state = work / "vae.safetensors"
    start, since = files.load_training(state, optimizer, vae=vae)["step"], time.monotonic()
    for step in range(start, recipe.vae_steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.vae_steps, recipe.lr)
        images = to_float(data.fetch(torch.randint(len(data), (recipe.vae_batch,), generator=generator)))
        if recipe.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(output.float(), images)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        centre = posterior.mean.float().mean(0).square().mean()
        loss = error + recipe.kl_weight * kl + recipe.centre_weight * centre
        if not torch.isfinite(loss):
            raise FloatingPointError(f"autoencoder: loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == recipe.vae_steps:
            print(
                f"vae {step + 1}/{recipe.vae_steps} mse {error:.4f} kl {kl:.3f} centre {centre:.4f}",
                flush=True,
            )
            files.save_training(state, step + 1, optimizer, vae=vae)
            since = _spent(work, since)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, data: ImageData, *, mirrored: bool = False, batch: int = 250) -> Tensor:
    """Posterior means of a data set or of its mirror images, (N, 4, h, h), unscaled."""
    parts = (images.flip(-1) if mirrored else images for images, _ in data.batches(batch))
    return torch.cat([vae.encode(to_float(images)).latent_dist.mean for images in parts])


def noise_weights(scheduler: DDPMScheduler, recipe: StandIn) -> Tensor:
    """(T,): the weight of each timestep's noise error, min(SNR, cap) / SNR, 1 on average."""
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=recipe.snr_cap) / snr
    return weights / weights.mean()


def train_transformer(
    recipe: StandIn, latents: Tensor, labels: Tensor, scheduler: DDPMScheduler, work: Path
) -> tuple[DiTTransformer2DModel, float]:
    """Noise prediction on scaled latents (N, 4, h, h), label dropout, EMA; resumes from `work`.

    Returns the averaged model and the mean weighted loss of the last 500 steps.
    """
    torch.manual_seed(recipe.seed + 1)
    model = new_transformer(recipe, int(labels.max()) + 1, latents.shape[-1]).train()
    for module in model.modules():  # labels are dropped below, once a sample and not once a block
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True)
    state = work / "transformer.safetensors"
    weights = noise_weights(scheduler, recipe)
    losses: list[float] = []
    start = files.load_training(state, optimizer, model=model, average=average)["step"]
    began = since = time.monotonic()
    for step in range(start, recipe.dit_steps):
        generator = torch.Generator().manual_seed((recipe.seed + 1) * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.dit_steps, recipe.lr, constant=recipe.dit_constant)
        chosen = torch.randint(len(latents), (recipe.dit_batch,), generator=generator)
        noise = torch.randn((len(chosen), *latents.shape[1:]), generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(chosen),), generator=generator)
        dropped = torch.rand(len(chosen), generator=generator) < recipe.label_dropout
        classes = labels[chosen].masked_fill(dropped, model.config.num_embeds_ada_norm)
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dit_bfloat16 and has_bfloat16("cpu")):
            output = model(noisy, timestep=timesteps, class_labels=classes).sample.float()
        loss = (weights[timesteps] * (output - noise).square().mean((1, 2, 3))).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"transformer: loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == recipe.dit_steps:
            rate = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"dit {step + 1}/{recipe.dit_steps} loss {sum(losses[-250:]) / len(losses[-250:]):.4f} "
                f"{rate:.3f} s/step",
                flush=True,
            )
            files.save_training(state, step + 1, optimizer, model=model, average=average)
            since = _spent(work, since)
    return average.module.eval(), sum(losses[-500:]) / max(1, len(losses[-500:]))


def train_decoder(recipe: StandIn, vae: AutoencoderKL, latents: Tensor, work: Path) -> AutoencoderTiny:
    """A small decoder that learns the autoencoder's own output from scaled latents (N, 4, h, h).

    Resumes from `work`.
    """
    torch.manual_seed(recipe.seed + 2)
    blocks = (1,) * len(recipe.decoder_channels)
    model = AutoencoderTiny(
        decoder_block_out_channels=recipe.decoder_channels,
        num_decoder_blocks=blocks,
        encoder_block_out_channels=(4,) * len(blocks),
        num_encoder_blocks=blocks,
    )
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=recipe.lr, weight_decay=0.0)
    state = work / "decoder.safetensors"
    for step in range(files.load_training(state, optimizer, model=model)["step"], recipe.decoder_steps):
        generator = torch.Generator().manual_seed((recipe.seed + 2) * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.decoder_steps, 2 * recipe.lr)
        chosen = latents[torch.randint(len(latents), (recipe.vae_batch,), generator=generator)]
        # In guidance it decodes predicted clean latents, which are blurred and noisy: some of both.
        noisy = chosen + 0.3 * torch.rand(len(chosen), 1, 1, 1, generator=generator) * torch.randn(
            chosen.shape, generator=generator
        )
        with torch.no_grad():
            target = vae.decode(noisy / vae.config.scaling_factor).sample
        loss = F.mse_loss(model.decode(noisy).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == recipe.decoder_steps:
            print(f"decoder {step + 1}/{recipe.decoder_steps} mse {loss:.4f}", flush=True)
            files.save_training(state, step + 1, optimizer, model=model)
    return model.eval()


def add_decoder(
    name: str, out: str | Path, *, recipe: StandIn | None = None, root: str | Path | None = None
) -> Path:
    """Train the guidance decoder of `out`'s stand-in and write it beside, in half precision.

    Returns its folder.
    """
    recipe, out = recipe or STANDINS[name], Path(out)
    vae = AutoencoderKL.from_pretrained(out / "vae").float().eval()
    data = load(data_of(recipe), "train", root)
    few = data.per_class(min(2000, int(data.labels.bincount().min())), seed=0)
    latents = encode(vae, few) * vae.config.scaling_factor
    model = train_decoder(recipe, vae, latents, out / ".work")
    model.half().save_pretrained(out / "guidance_decoder")
    shutil.rmtree(out / ".work")
    return out / "guidance_decoder"


def build(
    name: str, out: str | Path, *, recipe: StandIn | None = None, root: str | Path | None = None
) -> Path:
    """Train a stand-in and write it to `out` as a diffusers pipeline folder in half precision.

    `recipe` replaces the named one (a short one in tests); `root` is the data set's folder. Work in
    progress lies in `out/.work` until the end. Returns `out`.
    """
    recipe = recipe or STANDINS[name]
    out = Path(out)
    data = load(data_of(recipe), "train", root)
    work = out / ".work"
    vae = train_vae(recipe, data, work)
    latents, labels = encode(vae, data), data.labels
    if recipe.flip:
        latents, labels = torch.cat([latents, encode(vae, data, mirrored=True)]), labels.repeat(2)
    # Stable Diffusion's convention: latents are scaled to unit variance by one factor.
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, variance_type="fixed_small"
    )
    share = latents.mean(0).norm() / latents.flatten(1).norm(dim=1).mean()
    print(
        f"latents: norm of the mean over mean norm {share:.3f}, scaling {vae.config.scaling_factor}",
        flush=True,
    )
    transformer, loss = train_transformer(
        recipe, latents * vae.config.scaling_factor, labels, scheduler, work
    )
    vae.half().save_pretrained(out / "vae")
    transformer.half().save_pretrained(out / "transformer")
    scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "id2label": {str(label): name for label, name in enumerate(data.classes)},
    }
    files.write(out / "model_index.json", json.dumps(index, indent=2) + "\n")
    about = {
        "recipe": asdict(recipe),
        "images": len(data),
        "last_loss": loss,
        "hours": round(json.loads((work / "seconds.json").read_text()) / 3600, 2),
        "threads": torch.get_num_threads(),
    }
    files.write(out / "training.json", json.dumps(about, indent=2) + "\n")
    shutil.rmtree(work)
    return out
