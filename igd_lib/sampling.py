"""How the images of a set are sampled, whatever their class and number, as one value."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from igd_lib.config import STANDARD, Fidelity, Guidance, Solver
from igd_lib.data.images import ImageData
from igd_lib.data.resizing import OutputResize
from igd_lib.guides import Deviation, Guide, GuideFactory, Influence, SecondChain, Shortcuts
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampler import Denoiser, check_range, sample
from igd_lib.surrogate import Checkpoints, class_gradients
from igd_lib.tools import files, machine

Precision = Literal["float32", "tf32", "bfloat16"]
Gradients = Tensor | Callable[[int], Tensor]  # (E, C, P) of all classes, or (E, P) of a label


@dataclass(frozen=True)
class Sampling:
    """The pipeline, its guides and its steps. Raises ValueError for what does not fit.

    The models are used as they are: what `fidelity` says of the autoencoder and of timestep frequencies is
    done where they are loaded.
    """

    pipe: IGDPipeline
    guidance: Guidance | None = None  # the paper's
    others: Sequence[GuideFactory] = ()  # other guides, beside it or alone
    checkpoints: Checkpoints | None = None  # for k > 0
    gradients: Gradients | None = None  # of the checkpoints; None: computed a batch of classes at a time
    cfg_scale: float = 4.0
    num_steps: int = 50
    fidelity: Fidelity = STANDARD
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    guidance_decoder: nn.Module | None = None  # decodes for G_I in the autoencoder's place
    resize: OutputResize | None = None  # of decoded images to the data's size, where it is another
    # float32: the models as they are, with torch's own choice of products (TF32 in a GPU's convolutions);
    # tf32: in all of them; bfloat16: transformer and autoencoders, the rest in float32
    precision: Precision = "float32"
    recompute: bool = False  # activations again in the backward pass instead of keeping them: the same bits

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is one of {get_args(Precision)}, got {self.precision!r}")
        if self.influences and self.checkpoints is None:
            raise ValueError("k > 0 needs checkpoints")
        if self.guidance is not None:
            check_range(self.guidance, self.num_steps, self.fidelity)

    @property
    def influences(self) -> bool:
        """Whether the paper's influence guidance takes part."""
        return self.guidance is not None and self.guidance.k > 0

    @property
    def remembers(self) -> bool:
        """Whether an image depends on the earlier ones of its class."""
        own = self.guidance is not None and self.guidance.gamma > 0
        return own or any(factory.remembers for factory in self.others)

    def for_set(self, ipc: int) -> Sampling:
        """The same with guides for a set of `ipc` images a class; itself where they do not depend on it."""
        if all(factory.for_set is None for factory in self.others):
            return self
        steps, last = self.num_steps, self.fidelity.range_counts_from
        own = [one if one.for_set is None else one.for_set(ipc, steps, last) for one in self.others]
        return replace(self, others=own)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its images depend on but data, seed and number: JSON-able, weights by their digests."""
        return {
            "guidance": self.guidance and asdict(self.guidance),
            "guides": [dict(factory.settings) for factory in self.others] or None,
            "cfg_scale": self.cfg_scale,
            "num_steps": self.num_steps,
            "precision": self.precision,
            "fidelity": asdict(self.fidelity),
            "shortcuts": asdict(self.shortcuts) | {"guidance_decoder": named(self.guidance_decoder)},
            "output_resize": self.resize and self.resize.filter,
            "scheduler": type(self.pipe.scheduler_for(self.fidelity)).__name__,
            "model": architecture(self.pipe.transformer),
            "transformer": files.digest(self.pipe.transformer.state_dict()),
            "vae": files.digest(self.pipe.vae.state_dict()),
            "checkpoints": self._guiding
            and {
                "epochs": list(self._guiding.epochs),
                "weights": [files.digest(state) for state in self._guiding.states],
            },
        }

    @property
    def _guiding(self) -> Checkpoints | None:
        """The checkpoints, where they guide."""
        return self.checkpoints if self.influences else None

    @property
    def networks(self) -> list[nn.Module]:
        """Transformer and autoencoders, which its precision is of."""
        found = (self.pipe.transformer, self.pipe.vae, self.guidance_decoder)
        return [model for model in found if model is not None]

    def to(self, device: str) -> Sampling:
        """The same with its models on a device; class gradients follow a batch at a time."""
        checkpoints = self.checkpoints and self.checkpoints.to(device)
        decoder = self.guidance_decoder and self.guidance_decoder.to(device)
        return replace(
            self,
            pipe=self.pipe.to(device),
            checkpoints=checkpoints,
            guidance_decoder=decoder,
        )

    def lowered(self) -> Sampling:
        """The same with transformer and autoencoders in its precision: copies, where they have another.

        Latents, the schedule, the surrogate, class gradients and what is summed of them stay in float32.
        """
        if self.precision != "bfloat16":
            return self
        pipe = IGDPipeline(
            _in_bfloat16(self.pipe.transformer), _in_bfloat16(self.pipe.vae), self.pipe.scheduler
        )
        decoder = self.guidance_decoder and _in_bfloat16(self.guidance_decoder)
        return replace(self, pipe=pipe, guidance_decoder=decoder)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Inside, sampling and decoding have its precision's products and, with `recompute`, keep less."""
        where = "all" if self.precision == "tf32" else "convolutions"
        models = self.networks if self.recompute else ()
        with machine.tf32(str(self.pipe._execution_device), where), _recomputing(*models):
            yield

    def class_gradients(self, data: ImageData, label: int) -> Tensor:
        """(E, P) of one class, with influence guidance: those given, or computed from its images."""
        assert self._guiding is not None  # asked with influence guidance alone
        if self.gradients is None:
            images = data.of_class(label, self.fidelity.gradient_images)
            return class_gradients(self._guiding, images, label)
        return self.gradients(label) if callable(self.gradients) else self.gradients[:, label]

    def guides(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        memory: Sequence[Tensor],
        gradients: Mapping[int, Tensor],
        generators: Sequence[torch.Generator],
    ) -> list[Guide]:
        """The guides of one batch: image `indices[b]` of the data set's class `labels[b]`."""
        device = self.pipe._execution_device
        targets = torch.tensor(list(labels), device=device)
        found: list[Guide] = []
        if self.guidance is not None and self._guiding is not None:
            own = torch.stack([gradients[label].to(device) for label in labels], dim=1)
            decoder = self.guidance_decoder or self.pipe.vae
            scheduler = self.pipe.scheduler_for(self.fidelity)
            chain = SecondChain(scheduler, generators) if self.fidelity.second_chain else None
            found.append(
                Influence(
                    self.guidance,
                    self._guiding,
                    own,
                    targets,
                    decoder,
                    self.fidelity,
                    self.shortcuts,
                    second_chain=chain,
                    resize=self.resize,
                )
            )
        if self.guidance is not None and self.guidance.gamma > 0:
            size, floor = self.fidelity.memory_size, self.fidelity.cosine_floor
            found.append(Deviation(self.guidance, memory, size, floor))
        return [*found, *(factory(targets, indices, memory, self) for factory in self.others)]

    def check_images_of(self, data: ImageData) -> None:
        """Raise ValueError unless its images, resized where that is declared, have the data's size."""
        if self.resize is None:
            self.pipe.check_images_of(data.name, data.image_size)
        elif self.resize.size != data.image_size:
            sizes = f"to {self.resize.size} px, those of {data.name} have {data.image_size}"
            raise ValueError(f"the declared resize brings images {sizes}")

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of final latents: the pipeline's, resized where declared."""
        images = self.pipe.decode(latents)
        return images if self.resize is None else self.resize(images)

    def sample(
        self,
        noise: Tensor,
        ids: Sequence[int],
        guides: Sequence[Guide],
        generators: Sequence[torch.Generator],
        **options: Any,
    ) -> Tensor:
        """Final latents (B, C, h, w) of the diffusion model's classes `ids`; options: start, callback."""
        labels = torch.tensor(list(ids), device=noise.device)
        return sample(
            Denoiser(self.pipe.transformer, labels, self.cfg_scale, self.fidelity.cfg_channels),
            self.pipe.scheduler_for(self.fidelity),
            noise,
            guides=guides,
            num_steps=self.num_steps,
            counts_from=self.fidelity.range_counts_from,
            generator=list(generators),
            **options,
        )


@dataclass(frozen=True)
class Quick:
    """A way to guided images for less: few steps of a fast solver, and cheap gradients in the guided ones.

    A small guidance decoder belongs to it (TAESD at the paper's scale): `distill(..., guidance_decoder=)`.
    """

    solver: Solver
    num_steps: int
    guided_range: tuple[int, int]
    shortcuts: Shortcuts
    # What of k and gamma is left: where no step adds noise, what guidance did is not washed out again.
    k_share: float = 1.0
    gamma_share: float = 1.0

    def weaker(self, guidance: Guidance) -> Guidance:
        """A guidance of the usual steps as it is here."""
        k, gamma = guidance.k * self.k_share, guidance.gamma * self.gamma_share
        return replace(guidance, k=k, gamma=gamma, guided_range=self.guided_range)

    def options(self, guidance: Guidance | None, fidelity: Fidelity = STANDARD) -> dict[str, Any]:
        """`distill`'s and `sample_igd`'s options for such a guidance; for `sample_igd` with the scheduler of
        these options' fidelity.
        """
        return {
            "guidance": guidance and self.weaker(guidance),
            "fidelity": replace(fidelity, solver=self.solver),
            "num_steps": self.num_steps,
            **asdict(self.shortcuts),
        }


# The solver, steps and range are Table 10's; the shares were chosen on CIFAR-10's validation images
# (`paper_figures/data/cifar-10_settings_fast.csv`); what it costs and brings is measured by `make bench` and
# `14_shortcuts`.
FAST = Quick("dpmsolver++", 20, (12, 18), Shortcuts(jacobian="decoder", every=2), 1 / 3, 1 / 4)


def copied(model: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a model whose parameters and buffers are what `tensor` makes of its own."""
    fresh: dict[int, Any] = {id(own): tensor(own) for own in model.buffers()}
    for own in model.parameters():
        fresh[id(own)] = nn.Parameter(tensor(own.detach()), requires_grad=own.requires_grad)
    return copy.deepcopy(model, fresh)


def _in_bfloat16(model: Any) -> Any:
    if all(own.dtype == torch.bfloat16 for own in model.parameters()):
        return model
    return copied(model, lambda own: own.to(torch.bfloat16) if own.is_floating_point() else own.clone())


@contextmanager
def _recomputing(*models: Any) -> Iterator[None]:
    """Inside, those of diffusers' models compute a block's activations again where a gradient needs them."""
    able = [model for model in models if getattr(model, "_supports_gradient_checkpointing", False)]
    chosen = [model for model in able if not model.is_gradient_checkpointing]
    for model in chosen:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for model in chosen:
            model.disable_gradient_checkpointing()


def named(decoder: nn.Module | None) -> str | None:
    """A decoder as a manifest has it: its kind, size and weights."""
    if decoder is None:
        return None
    size = sum(parameter.numel() for parameter in decoder.parameters())
    return f"{type(decoder).__name__}, {size} parameters, {files.digest(decoder.state_dict())}"


def architecture(model: Any) -> dict[str, Any]:
    """What a model's configuration says beyond its class's defaults, whichever diffusers saved it."""
    known = inspect.signature(type(model).__init__).parameters
    found = {
        name: model.config[name]
        for name, parameter in known.items()
        if name in model.config and model.config[name] != parameter.default
    }
    ours = model.config.get("timestep_frequencies")  # see `match_original`
    return found if ours is None else found | {"timestep_frequencies": ours}
