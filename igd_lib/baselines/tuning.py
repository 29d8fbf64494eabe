"""Fine-tuning of a DiT: the loop that `minimax` and `finetuning` share.

It runs under accelerate, on one GPU, several or a CPU, a batch divided among them; an interrupted run goes on
where it was. A finished one is a whole pipeline folder; work in progress lies beside it, so that a folder
that is there is never a half-finished model.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from igd_lib.data.datasets import Resize
from igd_lib.data.images import ImageData, ahead, to_float
from igd_lib.guidance import predicted_clean
from igd_lib.models.difffit import add_scales, fold_scales, is_trained, share_embedders
from igd_lib.models.dit import image_size_of
from igd_lib.models.folder import is_whole, refuse_taken, write_pipeline
from igd_lib.pipeline import IGDPipeline
from igd_lib.tools import files, keys
from igd_lib.tools.progress import Pace, progress, resumable

SAVE_SECONDS = 60.0  # at most one training state is written in so much time, ...
SAVE_TIMES = 20.0  # ... and in so many times the seconds that the last one took
TRANSFORMER = "transformer"  # the finished weights' digest, in the file that has the settings
Parameters = Literal["all", "difffit"]
Posterior = Literal["sample", "mean"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What every fine-tuning has to say; `Minimax` and `Finetuning` give the values."""

    epochs: int  # at most
    steps: int | None  # of the optimiser, at most; None: all epochs
    batch_size: int  # images a step, of all processes and accumulated parts together
    lr: float  # AdamW without weight decay, constant
    ema: float  # the averaged weights are what is kept
    label_dropout: float
    flip: bool
    # what stands for an image's latents; the mean for a DiT that was trained on means
    posterior: Posterior
    resize: Resize  # for image files, and where the data's images have another size than the DiT's
    images: int | None  # a class, the first in file order; None: all
    seed: int

    def __post_init__(self) -> None:
        if self.posterior not in ("sample", "mean"):
            raise ValueError(f"posterior is 'sample' or 'mean', got {self.posterior!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is at least 1, or None for all epochs, got {self.steps}")

    def latents(self, vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents, float32 (B, C, h, w), of uint8 images (B, 3, H, W)."""
        return encoded(vae, images, self.posterior, generator)


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor, posterior: Posterior, generator: torch.Generator) -> Tensor:
    """Scaled latents, float32 (B, C, h, w), of uint8 images (B, 3, H, W)."""
    found = vae.encode(to_float(images).to(vae.device, vae.dtype)).latent_dist
    latents = found.sample(generator) if posterior == "sample" else found.mean
    return latents.float() * vae.config.scaling_factor


class MoreLosses(Protocol):
    """What a method adds to the diffusion loss; `memories` are saved with the training."""

    weights: dict[str, float]  # of each loss, by its name
    memories: dict[str, nn.Module]

    def losses(self, clean: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """Scalars, in the order of `weights`: clean are a part's predicted clean latents (B, C, h, w)."""
        ...

    def after(self, latents: Tensor, clean: Tensor, labels: Tensor) -> None:
        """Told of a part of all processes: real and predicted latents (B, D), labels (B,)."""
        ...


@dataclass(frozen=True)
class Work:
    """A fine-tuning to be done."""

    kind: str  # of the work on disk (`keys.SCHEMA`), and its name in what is said
    settings: dict[str, Any]
    recipe: Tuning
    parameters: Parameters
    classes: Sequence[int]  # the labels to train on
    ids: Sequence[int]  # the transformer's id of every class
    names: Mapping[str, str]  # `id2label` of the pipeline that is written
    more: Callable[[torch.device], MoreLosses] | None = None
    mixed_precision: str = "no"
    accumulate: int = 1

    @property
    def note(self) -> str:
        """The file that has the settings."""
        return f"{self.kind}.json"


# --- the loss


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


def settings_of(
    pipe: IGDPipeline, data: ImageData, classes: Sequence[int], accumulate: int, mixed_precision: str
) -> dict[str, Any]:
    """What every fine-tuned model's settings on disk hold."""
    size = image_size_of(pipe.transformer, pipe.vae)
    return {
        "mixed_precision": mixed_precision,
        "data": data.name,
        "split": data.split,
        "classes": [data.classes[label] for label in classes],
        "image_size": None if size == data.image_size else size,
        "accumulate": accumulate,
        "model": files.digest(pipe.transformer.state_dict()),
    }


def work_folder(out: str | Path) -> Path:
    """Where an unfinished fine-tuning lies."""
    place = Path(out).resolve()
    return place.with_name(f".{place.name}.work")


def tune(
    pipe: IGDPipeline, transformer: DiTTransformer2DModel, data: ImageData, out: str | Path, work: Work
) -> Path:
    """Fine-tune a copy of `transformer` on `data`; write the new pipeline folder `out` and return it.

    The other models are `pipe`'s. The data's images are made at the transformer's size, as the recipe
    resizes. A finished folder is left as it is. Raises ValueError where a batch cannot be divided evenly or
    is larger than the data, and where `out` or the work in progress has other settings; FileExistsError where
    `out` is something else; FloatingPointError on a non-finite loss.
    """
    out, unfinished = Path(out), work_folder(out)
    if is_whole(out) and (out / work.note).is_file():
        keys.claim(out / work.note, work.kind, work.settings, "a fine-tuned model")
        return out
    refuse_taken(out)
    recipe = work.recipe
    accelerator = Accelerator(
        mixed_precision=work.mixed_precision, gradient_accumulation_steps=work.accumulate
    )
    size = image_size_of(transformer, pipe.vae)
    if size != data.image_size and accelerator.is_main_process:
        print(f"{work.kind}: images of {data.image_size} px are resized to the DiT's {size} px", flush=True)
    batches = Batches(data.at(size, recipe.resize), work.classes, recipe, accelerator)
    keys.claim(unfinished / work.note, work.kind, work.settings, "a fine-tuned model")
    training, state = Training(pipe, transformer, work, accelerator), unfinished / "training.safetensors"
    batches.done = training.load(state)
    said = train(training, batches, state)
    if accelerator.is_main_process:
        if said:
            means = torch.stack(list(said)).mean(0).tolist()
            parts = (f"{name} {mean:.4f}" for name, mean in zip(training.names, means, strict=True))
            print(f"{work.kind}: mean of the last {len(said)} steps: {', '.join(parts)}")
        print(untuned(work.kind, recipe.ema, batches.steps), flush=True)
        finished = training.model.finished()
        note = keys.manifest(work.kind, work.settings) | {TRANSFORMER: files.digest(finished.state_dict())}
        notes = {work.note: json.dumps(note, indent=2) + "\n"}
        write_pipeline(out, finished, pipe.vae, pipe.scheduler, work.names, notes)
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    return out


class Trainer(Protocol):
    """What `train` trains: one part of a batch at a time."""

    kind: str  # in what is said
    accelerator: Accelerator

    def step(self, number: int, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The losses of a part."""
        ...

    def save(self, path: Path, step: int) -> None: ...


def train(training: Trainer, batches: Batches, state: Path | None) -> deque[Tensor]:
    """Train on all batches that are left, saving in the file `state`; the last steps' losses."""
    accelerator, pace, kept = training.accelerator, Pace(SAVE_SECONDS, SAVE_TIMES), batches.done
    said, label = deque[Tensor](maxlen=500), f"{training.kind}, step"
    where = state.parent if state else "no file"
    with resumable(lambda: f"{kept // batches.parts} of {batches.steps} steps are in {where}"):
        for number, images, labels, generator in progress(batches, label, done=batches.done):
            said.append(training.step(number, images, labels, generator))
            if state and accelerator.sync_gradients and accelerator.is_main_process and pace.due:
                with pace.saving():
                    training.save(state, number + 1)
                kept = number + 1
    return said


def untuned(kind: str, ema: float, steps: int) -> str:
    """How much of the averaged weights is still the model as it was."""
    return f"{kind}: {100 * ema**steps:.1f} % of the kept average is the untuned model ({ema} ** {steps:,})"


class Training:
    """A transformer in fine-tuning on one process: its optimiser, its losses and what they remember."""

    def __init__(
        self, pipe: IGDPipeline, transformer: DiTTransformer2DModel, work: Work, accelerator: Accelerator
    ):
        self.work, self.recipe, self.accelerator, self.kind = work, work.recipe, accelerator, work.kind
        self.ids = torch.tensor(list(work.ids))
        device = accelerator.device
        self.vae = pipe.vae.to(device)
        transformer = copy.deepcopy(transformer).to(device).float()
        self.model = Trained(transformer, self.recipe.ema, work.parameters)
        optimizer = torch.optim.AdamW(self.model.chosen.parameters(), lr=self.recipe.lr, weight_decay=0.0)
        self.more = work.more(device) if work.more else None
        self.weights = self.more.weights if self.more else {}
        self.names = ["diffusion", *self.weights]
        self.optimizer: Any = optimizer
        self.wrapped: Any = transformer
        self.null = transformer.config.num_embeds_ada_norm
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)

    @property
    def _kept(self) -> dict[str, Any]:
        memories = self.more.memories if self.more else {}
        return {"chosen": self.model.chosen, "average": self.model.average} | memories

    def load(self, path: Path) -> int:
        """Go on where an interrupted run was saved; how many parts of batches are done."""
        done = files.load_training(path, self.optimizer, **self._kept)["step"]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.wrapped, self.optimizer)
        return done

    def save(self, path: Path, step: int) -> None:
        files.save_training(path, step, self.optimizer.optimizer, **self._kept)

    def step(self, number: int, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One part of a batch; its losses, the diffusion loss first."""
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
            losses = [diffusion_loss(output, noise, latents, noisy, timesteps, self.scheduler).mean()]
            if self.more:
                clean = predicted_clean(noisy, output[:, : noise.shape[1]], alpha_bar)
                losses += self.more.losses(clean, labels)
            self._update(number, losses)
        if self.more:
            gathered = [
                self.accelerator.gather(value)
                for value in (latents.flatten(1), clean.detach().flatten(1), labels)
            ]
            self.more.after(*gathered)
        return torch.stack(losses).detach()

    def _update(self, number: int, losses: Sequence[Tensor]) -> None:
        """A step of the optimiser on the weighted losses, and of the running average."""
        loss = losses[0]
        for weight, other in zip(self.weights.values(), losses[1:], strict=True):
            loss = loss + weight * other
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{self.work.kind}: the loss is {loss.item()} at step {number}; lower lr ({self.recipe.lr})"
            )
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.model.average.update_parameters(self.model.chosen)


class Trained:
    """A transformer, its trained parameters under one roof, and their running average."""

    def __init__(self, transformer: DiTTransformer2DModel, ema: float, parameters: Parameters):
        self.transformer = transformer.train()
        self.shared = share_embedders(transformer)
        # Labels are dropped once a sample by the training loop, not once a block.
        for module in transformer.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        if parameters == "difffit":
            add_scales(transformer)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(parameters == "all" or is_trained(name, parameter))
        self.chosen = nn.ParameterDict(
            {name.replace(".", ":"): p for name, p in transformer.named_parameters() if p.requires_grad}
        )
        self.average = AveragedModel(self.chosen, multi_avg_fn=get_ema_multi_avg_fn(ema))
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


class Batches:
    """(number, uint8 images, labels, generator): a process's parts of the batches of every epoch.

    `number` counts parts, `accumulate` to a step. A step has the same images however it is divided.
    """

    done = 0  # parts that an interrupted run has had

    def __init__(self, data: ImageData, classes: Sequence[int], recipe: Tuning, accelerator: Accelerator):
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
        made = ahead(self._images, self._parts()) if self.data.slow else map(self._images, self._parts())
        for number, own, images in made:
            first = (self.recipe.seed + 1) * 1_000_003 + number
            generator = torch.Generator().manual_seed(first * 1_009 + self.rank)
            if self.recipe.flip:
                flipped = torch.rand(self.size, generator=generator) < 0.5
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield number, images, self.data.labels[own], generator

    def _images(self, part: tuple[int, Tensor]) -> tuple[int, Tensor, Tensor]:
        number, own = part
        return number, own, self.data.fetch(own)

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """The number of every part that is left, and where its images lie in the data."""
        epoch, order = -1, self.indices
        for number in range(self.done, self.steps * self.parts):
            step, part = divmod(number, self.parts)
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                order = self._order(epoch)
            first = step % self.per_epoch * self.recipe.batch_size
            first += (part * self.world + self.rank) * self.size
            yield number, order[first : first + self.size]

    def _order(self, epoch: int) -> Tensor:
        """Where an epoch's images lie in the data."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        return self.indices[torch.randperm(len(self.indices), generator=generator)]
