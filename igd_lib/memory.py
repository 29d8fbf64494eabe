"""How much memory sampling takes, by a dry run of its own code on tensors without values.

Under torch's FakeTensorMode transformer, decoder, surrogate and both derivatives hand shapes along, and a
dispatch mode counts the bytes of the tensors that live at once. No weights are needed, and what is counted
cannot drift from what is run. Not seen: what kernels use inside, and how an allocator rounds.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igd_lib.config import STANDARD, Fidelity, Guidance
from igd_lib.guides import Guide, GuideFactory, Shortcuts, Step, Update
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.sampling import Precision, Sampling, copied
from igd_lib.surrogate import Checkpoints

HEADROOM = 0.85  # of what is free: kernels' workspaces and gaps between an allocator's blocks take the rest
SMALL = 2**27  # bytes of weights: a stand-in's size, whose batches are not worth a dry run
ANY = sys.maxsize  # images: as many as one likes


@dataclass(frozen=True)
class Footprint:
    """The most memory that a piece of work takes at once, in bytes: `fixed` and `image` for each image."""

    fixed: int  # weights, and what does not grow with the batch
    image: int
    together: int | None = None  # images in memory at once, whatever the batch; None: all of it

    def peak(self, batch: int) -> int:
        """Of `batch` images side by side."""
        return self.fixed + self.image * (batch if self.together is None else min(batch, self.together))

    def batch(self, free: int) -> int:
        """How many images fit into `free` bytes; 0: not even one."""
        fitting = max(0, free - self.fixed) // max(1, self.image)
        return ANY if self.together is not None and fitting >= self.together else fitting


@dataclass(frozen=True)
class Surrogate:
    """The surrogate's checkpoints, by configuration."""

    network: str = "convnet6"
    classes: int = 10
    checkpoints: int = 4


@dataclass(frozen=True)
class Models:
    """What sampling is done with, by configuration (a model's `config`, or its JSON)."""

    transformer: Mapping[str, Any]  # of a DiTTransformer2DModel
    vae: Mapping[str, Any]  # of an AutoencoderKL
    guidance_decoder: Mapping[str, Any] | None = None  # of an AutoencoderTiny that decodes for G_I

    def sampling(self, surrogate: Surrogate | None = None, **options: Any) -> Sampling:
        """A sampling of one step with fresh models; guided where there is a surrogate."""
        transformer = DiTTransformer2DModel.from_config(dict(self.transformer)).eval()
        vae = AutoencoderKL.from_config(dict(self.vae)).eval()
        pipe = _DryPipeline(transformer, vae, DDPMScheduler())
        if self.guidance_decoder is not None:
            decoder = AutoencoderTiny.from_config(dict(self.guidance_decoder)).eval()
            options = options | {"guidance_decoder": decoder}
        if surrogate is not None:
            net = network(surrogate.network, num_classes=surrogate.classes, image_size=pipe.image_size)
            guided = {"guidance": GUIDED, "checkpoints": _checkpoints(net, surrogate.checkpoints)}
            options = options | guided
        return Sampling(pipe, num_steps=1, **options)


class _DryScheduler(DDPMScheduler):
    """One that is its own copy: tensors without values cannot be copied, and a step needs no second one."""

    def __deepcopy__(self, memo: Any) -> _DryScheduler:
        return self


class _DryPipeline(IGDPipeline):
    def scheduler_for(self, fidelity: Fidelity) -> Any:
        return _DryScheduler.from_config(super().scheduler_for(fidelity).config)


GUIDED = Guidance(k=1.0, gamma=0.0, guided_range=(0, 0))  # the one step of a dry run


def guided_step(
    models: Models,
    surrogate: Surrogate,
    *,
    jacobian: Literal["full", "decoder"] = "full",
    precision: Precision = "float32",
    recompute: bool = False,
    fidelity: Fidelity = STANDARD,
    cfg_scale: float = 4.0,
) -> Footprint:
    """Of a step with influence guidance, weights and class gradients included."""
    options = {
        "shortcuts": Shortcuts(jacobian),
        "precision": precision,
        "recompute": recompute,
        "fidelity": _plain(fidelity),
        "cfg_scale": cfg_scale,
    }
    return _footprints(lambda: models.sampling(surrogate, **options), one_step)[0]


def vanilla_step(models: Models, *, precision: Precision = "float32", cfg_scale: float = 4.0) -> Footprint:
    """Of a step without guidance, weights included."""
    return _footprints(lambda: models.sampling(precision=precision, cfg_scale=cfg_scale), one_step)[0]


def decoding(models: Models, *, precision: Precision = "float32") -> Footprint:
    """Of final latents to images, the weights of all models included."""
    return _footprints(lambda: models.sampling(precision=precision), _decoding)[0]


def of(sampling: Sampling) -> list[Footprint]:
    """What a batch goes through with these models, whose weights are not touched: a step, and decoding.

    Guides other than the paper's count as one that goes through transformer and decoder.
    """
    known = _description(sampling)
    if known not in _known:
        _known[known] = _footprints(lambda: _copied(sampling), one_step, _decoding)
    return _known[known]


_known: dict[str, list[Footprint]] = {}


def by_image(sampling: Sampling) -> int:
    """The bytes that each image more takes while images are sampled by these models: two runs are counted.

    Of one image and of two, of the first classes, on real tensors and with all guides, where `of` counts
    other guides as one of a kind.
    """
    ready = sampling.lowered()
    noise = ready.pipe.latent_noise([torch.Generator()] * 2)
    for factory in ready.others:  # which may read what they need once
        factory(torch.arange(2, device=noise.device), [0, 0], [noise[:0]] * 2, ready)
    one, two = (peak(ready, batch, one_step, Live()) for batch in (1, 2))
    return two - one


def fitting(sampling: Sampling) -> int:
    """How many images fit side by side into what its device has left; 0: not even one."""
    room = int(HEADROOM * free(sampling.pipe._execution_device)) + weights(sampling)
    return min(footprint.batch(room) for footprint in of(sampling))


def weights(sampling: Sampling) -> int:
    """The bytes of its models' weights."""
    return sum(storage.nbytes() for storage in _storages(_tensors(sampling)).values())


# --- what a machine has


def free(device: torch.device | str) -> int:
    """The bytes that a device has left for this process: of a GPU, or of RAM."""
    device = torch.device(device)
    return _free_on_gpu(device) if device.type == "cuda" else _free_ram()


def _free_on_gpu(device: torch.device) -> int:
    """With what torch holds for reuse, within the share that this process is allowed."""
    left, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(left + torch.cuda.memory_reserved(device) - allocated, int(share * total) - allocated)


def _free_ram(root: Path = Path("/")) -> int:
    """What the system says is available, or a control group's limit leaves where that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # where nothing else is said
    with suppress(OSError, LookupError, ValueError):
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group (version 2) of this process leaves it; cached files count as free."""
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        parts = Path(next((line[3:] for line in lines if line.startswith("0::")), "/")).parts[1:]
        for depth in range(len(parts) + 1):
            folder = root.joinpath("sys/fs/cgroup", *parts[:depth])
            with suppress(OSError, LookupError, ValueError):  # "max": no limit
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat["inactive_file"])


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, its libraries', or RAM."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


# --- counting


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: those it is told of, and all that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._counted: set[int] = set()

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors, once however many share it, until it is released."""
        for key, storage in _storages(tensors).items():
            if key not in self._counted:
                self._counted.add(key)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._released, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.bytes)

    def _released(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count(value for value in tree_leaves(made) if isinstance(value, Tensor))
        return made


class _Dry(Live):
    """The same where tensors have no values: whoever asks for one, such as "all finite", is told 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.nonzero.default:  # the first of them, as of a listed timestep
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.long)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Their memory, each piece once."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _tensors(sampling: Sampling) -> Iterable[Tensor]:
    """All weights of a sampling's models."""
    checkpoints = sampling.checkpoints if sampling.influences else None
    models = [sampling.pipe.transformer, sampling.pipe.vae, sampling.guidance_decoder]
    for model in [*models, checkpoints and checkpoints.model]:
        if model is not None:
            yield from (*model.parameters(), *model.buffers())
    for state in checkpoints.states if checkpoints else ():
        yield from state.values()


# --- dry runs


def peak(sampling: Sampling, batch: int, work: Callable[[Sampling, int], object], live: Live) -> int:
    """The most bytes alive, weights included, while `work` is done with `batch` images, counted by `live`."""
    live.count(_tensors(sampling))
    live.peak = live.bytes
    with live, sampling.arithmetic():
        work(sampling, batch)
    return live.peak


def _footprints(make: Callable[[], Sampling], *works: Callable[[Sampling, int], object]) -> list[Footprint]:
    """Of each work, from one and two images: all that grows with the batch grows linearly."""
    found = []
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # as copy.deepcopy does
        sampling = make().lowered()
        for work in works:
            one, two = (peak(sampling, batch, work, _Dry()) for batch in (1, 2))
            together = sampling.pipe.decoded_together if work is _decoding else None
            found.append(Footprint(2 * one - two, two - one, together))
    return found


def one_step(sampling: Sampling, batch: int) -> object:
    """One step of Algorithm 1, each image of a class of its own."""
    labels = list(range(batch))
    generators = [torch.Generator() for _ in labels]
    noise = sampling.pipe.latent_noise(generators)
    gradients: dict[int, Tensor] = {}
    if sampling.influences and sampling.checkpoints is not None:
        size = sum(parameter.numel() for parameter in sampling.checkpoints.model.parameters())
        gradients = {label: torch.zeros(len(sampling.checkpoints), size) for label in labels}
    guides = sampling.guides(labels, [0] * batch, [noise[:0]] * batch, gradients, generators)
    return sampling.sample(noise, [0] * batch, guides, generators)


def _decoding(sampling: Sampling, batch: int) -> object:
    config = sampling.pipe.transformer.config
    return sampling.pipe.decode(torch.zeros(batch, config.in_channels, *[config.sample_size] * 2))


def _plain(fidelity: Fidelity) -> Fidelity:
    """What a dry run needs of it: any solver's step takes next to nothing."""
    return replace(fidelity, solver="ddpm", range_counts_from=0)


def _checkpoints(model: nn.Module, count: int) -> Checkpoints:
    states = [{name: value.clone() for name, value in model.state_dict().items()} for _ in range(count)]
    return Checkpoints(model.eval(), states, [float(number) for number in range(count)], [0.01] * count)


def _copied(sampling: Sampling) -> Sampling:
    """A sampling of one step with models like these on the CPU: of tensors without values in a dry run."""
    pipe = _DryPipeline(_like(sampling.pipe.transformer), _like(sampling.pipe.vae), DDPMScheduler())
    checkpoints = sampling.checkpoints if sampling.influences else None
    return replace(
        sampling,
        pipe=pipe,
        guidance=GUIDED if checkpoints else None,
        others=[GuideFactory(lambda *_: _Through(pipe.vae), {})] if sampling.others else (),
        checkpoints=checkpoints and _checkpoints(_like(checkpoints.model), len(checkpoints)),
        guidance_decoder=sampling.guidance_decoder and _like(sampling.guidance_decoder),
        num_steps=1,
        fidelity=_plain(sampling.fidelity),
    )


def _like(model: Any) -> Any:
    return copied(model, lambda own: torch.empty(own.shape, dtype=own.dtype))


@dataclass
class _Through(Guide):
    """Any guide that differentiates a function of the decoded image through the transformer."""

    decoder: Any

    @property
    def through_model(self) -> bool:
        return True

    def __call__(self, step: Step) -> Update:
        with torch.enable_grad():
            image = self.decoder.decode(step.clean.to(self.decoder.dtype)).sample.to(step.clean.dtype)
            loss = image.square().flatten(1).sum(1)
        return Update(step.gradient(loss))


def _description(sampling: Sampling) -> str:
    """All that a footprint depends on."""
    checkpoints = sampling.checkpoints if sampling.influences else None
    models = (sampling.pipe.transformer, sampling.pipe.vae, sampling.guidance_decoder)
    shapes = [{name: list(value.shape) for name, value in own.state_dict().items()} for own in models if own]
    surrogate = checkpoints and {name: list(value.shape) for name, value in checkpoints.states[0].items()}
    types = [str(own.dtype) for own in models if own]
    names = [type(own).__name__ for own in (*models, checkpoints and checkpoints.model)]
    own = [sampling.precision, sampling.recompute, sampling.cfg_scale > 1, bool(sampling.others)]
    ways = [asdict(sampling.shortcuts), asdict(_plain(sampling.fidelity)), len(checkpoints or ())]
    return json.dumps([names, types, shapes, surrogate, own, ways])
