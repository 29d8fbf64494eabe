"""Minimax fine-tuning of a DiT (Gu et al., CVPR 2024) into a folder for `IGDPipeline`.

Few parameters are trained, against two memories.

`accelerate launch -m igd_lib minimax DATASET OUT` trains on one GPU, several or a CPU, a batch of 8 divided
among them; an interrupted run goes on where it was. DiT-XL/2's weights, and what is fine-tuned from them, are
under CC-BY-NC 4.0 (no commercial use).
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from igd_lib.data.datasets import Resize
from igd_lib.data.images import ImageData, to_float
from igd_lib.guidance import predicted_clean
from igd_lib.models.difffit import add_scales, fold_scales, is_trained, share_embedders
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools import files, keys
from igd_lib.tools.progress import progress

SAVE_SECONDS = 60.0  # at most one training state is written in so much time


@dataclass(frozen=True)
class Minimax:
    """How a DiT is fine-tuned; the defaults are those of the released training script and its `run.sh`.

    The script is given eight epochs and writes its one checkpoint after 12,000 steps, which is sampled: for
    ten classes of ImageNet a little before the epochs end (12,448 steps for ImageWoof, 12,888 for
    ImageNette), for more classes long before. With fewer than 12,000 images it writes none; here it is then
    all epochs.
    """

    epochs: int = 8
    steps: int | None = 12_000  # of the optimiser, at most; None: all epochs
    batch_size: int = 8  # images a step, of all processes and accumulated parts together
    lr: float = 1e-3  # AdamW without weight decay, constant
    ema: float = 0.9999  # the averaged weights are what is kept
    real_weight: float = 0.002  # of 1 - the lowest cosine to the class's real latents
    generated_weight: float = 0.008  # of the highest cosine to the class's earlier predictions
    memory_size: int = 64  # latents a class, first in, first out, of either kind
    label_dropout: float = 0.1
    flip: bool = True
    # what stands for an image's latents; the mean for a DiT that was trained on means
    posterior: Literal["sample", "mean"] = "sample"
    resize: Resize = "bicubic-halving"  # DiT's way, not the one of the sets' evaluation; for image files
    images: int | None = None  # a class, the first in file order; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.posterior not in ("sample", "mean"):
            raise ValueError(f"posterior is 'sample' or 'mean', got {self.posterior!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is at least 1, or None for all epochs, got {self.steps}")

    def latents(self, vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents, float32 (B, C, h, w), of uint8 images (B, 3, H, W)."""
        found = vae.encode(to_float(images).to(vae.device, vae.dtype)).latent_dist
        return (
            found.sample(generator) if self.posterior == "sample" else found.mean
        ).float() * vae.config.scaling_factor


# --- the losses


class Memory(nn.Module):
    """The last `size` vectors of each class, first in, first out; buffers, so saved with the training."""

    entries: Tensor  # (classes, size, dimension)
    count: Tensor  # (classes,): ever pushed

    def __init__(self, classes: int, size: int, dimension: int):
        super().__init__()
        self.register_buffer("entries", torch.zeros(classes, size, dimension))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.long))  # ever pushed

    def of(self, label: int) -> Tensor:
        """(m, D), in no particular order; m = 0 at first."""
        return self.entries[label, : min(int(self.count[label]), self.entries.shape[1])]

    @torch.no_grad()
    def push(self, vectors: Tensor, labels: Tensor) -> None:
        """Add (B, D) in order."""
        for vector, label in zip(vectors, labels.tolist(), strict=True):
            self.entries[label, int(self.count[label]) % self.entries.shape[1]] = vector
            self.count[label] += 1


def minimax_losses(clean: Tensor, labels: Tensor, real: Memory, generated: Memory) -> tuple[Tensor, Tensor]:
    """Representativeness and diversity losses, scalars (Minimax's Eqs. 3 and 5, as its code has them).

    clean: predicted clean latents (B, ...); labels (B,). For every class of the batch the lowest cosine of
    its predictions to the real memory, subtracted from 1, and the highest to the generated memory; each is
    averaged over the batch's classes, to which a class with empty memories adds nothing.
    """
    vectors = F.normalize(clean.flatten(1).float(), dim=1)
    representativeness, diversity = vectors.new_zeros(()), vectors.new_zeros(())
    present = labels.unique().tolist()
    for label in present:
        if len(generated.of(label)) and len(real.of(label)):
            own = vectors[labels == label]
            representativeness = representativeness + 1 - (own @ F.normalize(real.of(label), dim=1).T).min()
            diversity = diversity + (own @ F.normalize(generated.of(label), dim=1).T).max()
    return representativeness / len(present), diversity / len(present)


def diffusion_loss(
    output: Tensor, noise: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> Tensor:
    """DiT's training loss, (B,): squared error of the noise, and the variational bound.

    The bound is there for a model that learns its variance.

    output: (B, C, h, w), or (B, 2C, h, w) with the variance's interpolation coefficient in [-1, 1] behind;
    noise, clean and noisy: (B, C, h, w). The bound is the divergence (bits a value) of the true posterior of
    z_{t-1} from the model's, whose mean it does not train; at t = 0 minus the log-likelihood of the latents,
    taken for pixels of 8 bits, as in DiT's code.
    """
    channels = noise.shape[1]
    eps, rest = output[:, :channels], output[:, channels:]
    loss = (eps - noise).square().flatten(1).mean(1)
    if rest.shape[1] == 0:
        return loss
    product = scheduler.alphas_cumprod.to(noise)
    before = torch.cat([product.new_ones(1), product[:-1]])
    beta = 1 - product / before
    variance = beta * (1 - before) / (1 - product)
    variance = torch.cat([variance[1:2], variance[1:]])  # at t = 0 it is 0; DiT's code takes t = 1's
    a, a_before, b, low = (
        values[timesteps].reshape(-1, 1, 1, 1) for values in (product, before, beta, variance.log())
    )
    high = b.log()
    model_log_variance = (rest + 1) / 2 * high + (1 - rest) / 2 * low

    def mean(x_0: Tensor) -> Tensor:
        return (a_before.sqrt() * b * x_0 + (1 - b).sqrt() * (1 - a_before) * noisy) / (1 - a)

    predicted = predicted_clean(noisy, eps.detach(), a)
    difference = (mean(clean) - mean(predicted)).square()
    divergence = 0.5 * (
        model_log_variance
        - low
        - 1
        + (low - model_log_variance).exp()
        + difference * (-model_log_variance).exp()
    )
    at_zero = -eight_bit_log_likelihood(clean, predicted, model_log_variance / 2)
    bound = torch.where((timesteps == 0).reshape(-1, 1, 1, 1), at_zero, divergence)
    return loss + bound.flatten(1).mean(1) / math.log(2)


def eight_bit_log_likelihood(values: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Of each value in [-1, 1] under a normal distribution, in nats: its mass on the value's 2 / 255.

    The first and the last value have all that is beyond them; the distribution function is the tanh
    approximation that DiT's code has, its mass at least 1e-12.
    """

    def below(x: Tensor) -> Tensor:
        x = (x - mean) * (-log_deviation).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    upper, lower = below(values + 1 / 255), below(values - 1 / 255)
    mass = torch.where(values < -0.999, upper, torch.where(values > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


# --- training


def settings(
    pipe: IGDPipeline,
    data: ImageData,
    recipe: Minimax,
    classes: Sequence[int],
    label_ids: Sequence[int],
    accumulate: int = 1,
    mixed_precision: str = "no",
) -> dict[str, Any]:
    """What names a fine-tuned model on disk."""
    return {
        "label_ids": list(label_ids),
        "mixed_precision": mixed_precision,
        "recipe": asdict(recipe),
        "data": data.name,
        "split": data.split,
        "classes": [data.classes[label] for label in classes],
        "accumulate": accumulate,
        "model": files.digest(pipe.transformer.state_dict()),
    }


def finetune(
    pipe: IGDPipeline,
    data: ImageData,
    out: str | Path,
    *,
    recipe: Minimax | None = None,
    classes: Sequence[int] | None = None,  # the labels to train on, e.g. one of `shards`; None: all
    label_ids: Sequence[int] | None = None,  # the transformer's id of every class; None: 0 ... C-1
    mixed_precision: str = "no",  # "no", "bf16" or "fp16"
    accumulate: int = 1,  # parts of a batch, one after the other in each process
) -> Path:
    """Fine-tune `pipe`'s transformer on `data`; write a pipeline folder, the scales folded into its weights.

    Returns the folder, and says how much of the untuned model is left in its averaged weights. `pipe` itself
    stays as it is. Images are resized as the recipe has it. A step's batch is divided among processes and
    accumulated parts. Each part's losses see its own predictions alone, as each process's do in the released
    script; but the memories are common to all, where that has one a process. Work in progress lies in
    `out/.work`; a folder of other settings is refused. Raises ValueError where a batch cannot be divided
    evenly or is larger than the data, FloatingPointError on a non-finite loss.
    """
    recipe, out = recipe or Minimax(), Path(out)
    selected = list(range(len(data.classes))) if classes is None else list(classes)
    ids = list(label_ids) if label_ids is not None else list(range(len(data.classes)))
    about = settings(pipe, data, recipe, selected, ids, accumulate, mixed_precision)
    finished = (out / "model_index.json").is_file()
    if not finished:
        accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
        batches = _Batches(data.at(data.image_size, recipe.resize), selected, recipe, accelerator)
    keys.claim(out / "minimax.json", "minimax", about, "a fine-tuned model")
    if finished:
        return out
    training, state = _Training(pipe, recipe, accelerator, torch.tensor(ids)), out / _STATE
    batches.done = training.load(state)
    saved, said = time.monotonic(), deque[Tensor](maxlen=500)
    for number, images, labels, generator in progress(batches, "minimax, step"):
        said.append(training.step(number, images, labels, generator))
        main = accelerator.sync_gradients and accelerator.is_main_process
        if main and time.monotonic() - saved >= SAVE_SECONDS:
            training.save(state, number + 1)
            saved = time.monotonic()
    if accelerator.is_main_process:
        if said:
            means = torch.stack(list(said)).mean(0).tolist()
            parts = ("diffusion {:.4f}", "representativeness {:.4f}", "diversity {:.4f}")
            print(f"minimax: mean of the last {len(said)} steps: {', '.join(parts).format(*means)}")
        print(_untuned(recipe.ema, batches.steps), flush=True)
        _write(training.model.finished(), pipe, out)
    accelerator.wait_for_everyone()
    return out


def _untuned(ema: float, steps: int) -> str:
    """How much of the averaged weights is still the model as it was."""
    return f"minimax: {100 * ema**steps:.1f} % of the kept average is the untuned model ({ema} ** {steps:,})"


_STATE = Path(".work") / "training.safetensors"  # below the folder that is written


def _write(transformer: DiTTransformer2DModel, pipe: IGDPipeline, out: Path) -> None:
    """The pipeline folder with another transformer; work in progress is removed."""
    IGDPipeline(transformer, pipe.vae, pipe.scheduler).save_pretrained(out)
    names = {str(label): name for name, label in pipe.labels.items()}  # diffusers does not save them
    index = json.loads((out / "model_index.json").read_text()) | {"id2label": names}
    files.write(out / "model_index.json", json.dumps(index, indent=2) + "\n")
    shutil.rmtree(out / ".work", ignore_errors=True)


class _Training:
    """A transformer in fine-tuning on one process: its memories, optimiser and losses."""

    def __init__(self, pipe: IGDPipeline, recipe: Minimax, accelerator: Accelerator, ids: Tensor):
        self.recipe, self.accelerator, self.ids = recipe, accelerator, ids
        device = accelerator.device
        self.vae = pipe.vae.to(device)
        transformer = copy.deepcopy(pipe.transformer).to(device).float()
        self.model = _Trained(transformer, recipe)
        optimizer = torch.optim.AdamW(self.model.chosen.parameters(), lr=recipe.lr, weight_decay=0.0)
        dimension = transformer.config.in_channels * transformer.config.sample_size**2
        self.real, self.generated = (
            Memory(len(ids), recipe.memory_size, dimension).to(device) for _ in range(2)
        )
        self.optimizer: Any = optimizer
        self.wrapped: Any = transformer
        self.null = transformer.config.num_embeds_ada_norm
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)

    @property
    def _kept(self) -> dict[str, Any]:
        model = self.model
        return {
            "chosen": model.chosen,
            "average": model.average,
            "real": self.real,
            "generated": self.generated,
        }

    def load(self, path: Path) -> int:
        """Go on where an interrupted run was saved; how many parts of batches are done."""
        done = files.load_training(path, self.optimizer, **self._kept)["step"]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.wrapped, self.optimizer)
        return done

    def save(self, path: Path, step: int) -> None:
        files.save_training(path, step, self.optimizer.optimizer, **self._kept)

    def step(self, number: int, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One batch; its diffusion, representativeness and diversity losses, (3,)."""
        latents = self.recipe.latents(self.vae, images, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(1000, (len(labels),), generator=generator)
        dropped = torch.rand(len(labels), generator=generator) < self.recipe.label_dropout
        given = self.ids[labels].masked_fill(dropped, self.null).to(latents.device)
        timesteps, labels = timesteps.to(latents.device), labels.to(latents.device)
        alpha_bar = self.scheduler.alphas_cumprod.to(latents.device)[timesteps].reshape(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        with self.accelerator.accumulate(self.wrapped):
            with self.accelerator.autocast():
                output = self.wrapped(noisy, timestep=timesteps, class_labels=given).sample
            output = output.float()
            clean = predicted_clean(noisy, output[:, : noise.shape[1]], alpha_bar)
            diffusion = diffusion_loss(output, noise, latents, noisy, timesteps, self.scheduler).mean()
            losses = torch.stack([diffusion, *minimax_losses(clean, labels, self.real, self.generated)])
            self._update(number, losses)
        everyones = [
            self.accelerator.gather(value)
            for value in (labels, latents.flatten(1), clean.detach().flatten(1))
        ]
        self.real.push(everyones[1], everyones[0])
        self.generated.push(everyones[2], everyones[0])
        return losses.detach()

    def _update(self, number: int, losses: Tensor) -> None:
        """A step of the optimiser on the weighted losses, and of the running average."""
        recipe = self.recipe
        loss = losses[0] + recipe.real_weight * losses[1] + recipe.generated_weight * losses[2]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"minimax: the loss is {loss.item()} at step {number}; lower lr ({recipe.lr})"
            )
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.model.average.update_parameters(self.model.chosen)


class _Trained:
    """A transformer with scales, its chosen parameters under one roof, and their running average."""

    def __init__(self, transformer: DiTTransformer2DModel, recipe: Minimax):
        self.transformer = transformer.train()
        self.shared = share_embedders(transformer)
        # Labels are dropped once a sample by the training loop, not once a block.
        for module in transformer.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        add_scales(transformer)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(is_trained(name, parameter))
        self.chosen = nn.ParameterDict(
            {name.replace(".", ":"): p for name, p in transformer.named_parameters() if p.requires_grad}
        )
        self.average = AveragedModel(self.chosen, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        # The first update copies: it begins with the weights as they were.
        self.average.update_parameters(self.chosen)

    @torch.no_grad()
    def finished(self) -> DiTTransformer2DModel:
        """The transformer with averaged parameters, no scales, every block with its own embedders again."""
        for own, averaged in zip(self.chosen.parameters(), self.average.module.parameters(), strict=True):
            own.copy_(averaged)
        fold_scales(self.transformer)
        if self.shared:
            for block in self.transformer.transformer_blocks[1:]:
                block.norm1.emb = copy.deepcopy(block.norm1.emb)
        for module in self.transformer.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = self.transformer.config.get("class_dropout_prob", 0.1)
        return self.transformer.requires_grad_(False).eval()


class _Batches:
    """(number, uint8 images, labels, generator): a process's parts of the batches of every epoch.

    `number` counts parts, `accumulate` to a step. A step has the same images however it is divided.
    """

    done = 0  # parts that an interrupted run has had

    def __init__(self, data: ImageData, classes: Sequence[int], recipe: Minimax, accelerator: Accelerator):
        self.data, self.recipe = data, recipe
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.parts = accelerator.gradient_accumulation_steps
        self.size, rest = divmod(recipe.batch_size, self.world * self.parts)
        if rest:
            raise ValueError(
                f"a batch of {recipe.batch_size} images cannot be divided among {self.world} processes x "
                f"{self.parts} accumulated parts; choose numbers that divide it"
            )
        self.indices = torch.cat([data.class_indices(label)[: recipe.images] for label in classes])
        self.per_epoch = len(self.indices) // recipe.batch_size
        if self.per_epoch == 0:
            raise ValueError(f"{len(self.indices)} images are fewer than a batch of {recipe.batch_size}")

    @property
    def steps(self) -> int:
        """Of the whole training."""
        every = self.per_epoch * self.recipe.epochs
        return every if self.recipe.steps is None else min(every, self.recipe.steps)

    def __len__(self) -> int:
        return self.steps * self.parts - self.done

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor, torch.Generator]]:
        size, seed = self.size, self.recipe.seed
        epoch, order = -1, self.indices
        for number in range(self.done, self.steps * self.parts):
            step, part = divmod(number, self.parts)
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                order = self._order(epoch)
            first = step % self.per_epoch * self.recipe.batch_size + (part * self.world + self.rank) * size
            own = order[first : first + size]
            generator = torch.Generator().manual_seed(((seed + 1) * 1_000_003 + number) * 1_009 + self.rank)
            images = self.data.fetch(own)
            if self.recipe.flip:
                flipped = torch.rand(size, generator=generator) < 0.5
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield number, images, self.data.labels[own], generator

    def _order(self, epoch: int) -> Tensor:
        """Where an epoch's images lie in the data."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


def shards(classes: int, count: int) -> list[list[int]]:
    """`classes` labels in `count` consecutive shards of nearly equal size.

    ImageNet-1K is fine-tuned a shard at a time.
    """
    if not 1 <= count <= classes:
        raise ValueError(f"count is 1 ... {classes}, got {count}")
    edges = [classes * i // count for i in range(count + 1)]
    return [list(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
