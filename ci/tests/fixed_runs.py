"""Small runs whose results are fixed: everything that makes a result, on tiny models, in seconds.

`python ci/tests/fixed_runs.py values` writes their rounded values and the schema numbers beside this file,
for `test_fixed_runs.py`. Before code is moved, `record FILE` writes every result's bytes (as SHA-256), and
after it `compare FILE` says which differ on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor

# The one place that knows where the code is.
from igd_lib.baselines.minimax import Minimax, finetune
from igd_lib.baselines.rded import rded
from igd_lib.config import AUGMENTATION, PAPER, RELEASED, STANDARD, Guidance
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.distillation import distill
from igd_lib.evaluation import evaluate
from igd_lib.models.networks import network
from igd_lib.pipeline import IGDPipeline
from igd_lib.protocols import PROTOCOLS
from igd_lib.sampler import sample_igd
from igd_lib.surrogate import Checkpoints, class_gradients, select_checkpoints, train_surrogate
from igd_lib.teachers import Teacher
from igd_lib.tools.keys import SCHEMA

STEPS, RANGE = 6, (2, 4)
GUIDED = Guidance(60.0, 60.0, RANGE)


def images(count: int, seed: int, size: int = 16) -> ImageData:
    """`count` images a class of three classes: noise on a colour of the class's own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count)
    colours = torch.eye(3)[labels].mul(90)[:, :, None, None]
    pixels = torch.randint(0, 160, (3 * count, 3, size, size), generator=generator) + colours
    return from_tensors("fixed", "train", ("a", "b", "c"), pixels.to(torch.uint8), labels)


def models() -> SimpleNamespace:
    """A random pipeline of three classes at 16 px, checkpoints of a small network, and class gradients."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    tiny = AutoencoderTiny(
        decoder_block_out_channels=(4, 4),
        num_decoder_blocks=(1, 1),
        encoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
    )
    scheduler = DDPMScheduler(beta_schedule="linear", beta_end=0.005, clip_sample=False)
    pipe = IGDPipeline(transformer.eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    model = network("convnet2", num_classes=3, image_size=16)
    data = images(8, seed=2)
    checkpoints = train_surrogate(model, data, epochs=3, batch_size=6, saves_in_first_epoch=2)
    gradients = torch.stack(
        [class_gradients(checkpoints, data.of_class(label), label) for label in range(3)], dim=1
    )
    return SimpleNamespace(
        pipe=pipe, tiny=tiny.eval(), data=data, checkpoints=checkpoints, gradients=gradients
    )


def latents(made: SimpleNamespace, *, guidance=None, fidelity=STANDARD, cfg_scale=4.0, **shortcuts) -> Tensor:
    """Two images of each class at once, with earlier latents of unequal number."""
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    earlier = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([0, 1, 2])
    return sample_igd(
        made.pipe.transformer,
        made.pipe.vae,
        made.pipe.scheduler_for(fidelity),
        noise,
        labels,
        targets=labels,
        guidance=guidance,
        checkpoints=made.checkpoints,
        gradients=made.gradients,
        memory=[earlier[:0], earlier[:1], earlier],
        num_steps=STEPS,
        cfg_scale=cfg_scale,
        fidelity=fidelity,
        generator=[torch.Generator().manual_seed(10 + i) for i in range(3)],
        **shortcuts,
    )


def distilled(made: SimpleNamespace, *, resumed: bool, **options) -> Tensor:
    """Final latents of a set on disk, whole or from the middle on."""
    settings = dict(ipc=3, guidance=GUIDED, checkpoints=made.checkpoints, num_steps=STEPS, seed=5, **options)
    with tempfile.TemporaryDirectory() as folder:
        found = distill(made.pipe, made.data, out_dir=folder, **settings)
        if resumed:
            for label, index in ((0, 1), (0, 2), (2, 2)):
                found.image_path(label, index).unlink()
            found = distill(made.pipe, made.data, out_dir=folder, **settings)
        return torch.cat([found.latents(label) for label in range(3)])


def score(made: SimpleNamespace, protocol) -> Tensor:
    """What an evaluation says: last and best accuracies of a network of the protocol's kind."""
    small = replace(
        protocol,
        image_size=32,
        epochs=4,
        test_resize=None if protocol.test_resize is None else 36,
        test_every=None,
    )
    teacher = None
    if protocol.labels == "soft":
        torch.manual_seed(6)
        model = network("convnet2", num_classes=3, image_size=32)
        teacher = Teacher(model, "convnet2", "random", made.data.classes, (0.5,) * 3, (0.5,) * 3, 0.0)
    found = evaluate(
        images(4, 7),
        images(20, 8),
        network="convnet3",
        protocol=small,
        seed=0,
        teacher=teacher,
        mixed_precision=False,
    )
    return torch.tensor([found.last, found.best, found.last_top5, found.best_top5], dtype=torch.float64)


def selected(made: SimpleNamespace) -> Tensor:
    """RDED's images by a random teacher."""
    torch.manual_seed(9)
    model = network("convnet2", num_classes=3, image_size=16)
    teacher = Teacher(model, "convnet2", "random", made.data.classes, (0.5,) * 3, (0.5,) * 3, 0.0)
    found = rded(made.data, teacher, 2, candidates=8, seed=0)
    return found.fetch(torch.arange(len(found))).double()


def tuned(made: SimpleNamespace) -> Tensor:
    """The fine-tuned transformer's parameters, one norm each."""
    with tempfile.TemporaryDirectory() as folder:
        finetune(made.pipe, made.data, folder, recipe=Minimax(epochs=2, batch_size=6, ema=0.9))
        transformer = IGDPipeline.from_pretrained(folder).transformer
        return torch.stack(
            [parameter.detach().double().norm() for _, parameter in sorted(transformer.named_parameters())]
        )


def _flag(name: str, value: object):
    return replace(STANDARD, **{name: value})


SAMPLES: dict[str, dict] = {
    "vanilla": {},
    "vanilla, cfg 1": {"cfg_scale": 1.0},
    "vanilla, paper": {"fidelity": PAPER},
    "G_I": {"guidance": replace(GUIDED, gamma=0.0)},
    "G_D": {"guidance": replace(GUIDED, k=0.0)},
    "both": {"guidance": GUIDED},
    "both, cfg 1": {"guidance": GUIDED, "cfg_scale": 1.0},
    "both, paper": {"guidance": replace(GUIDED, k=0.09), "fidelity": PAPER},
    **{
        f"both, {solver}": {"guidance": GUIDED, "fidelity": _flag("solver", solver)}
        for solver in ("ddim", "dpmsolver++", "unipc", "configured")
    },
    "both, decoder Jacobian": {"guidance": GUIDED, "jacobian": "decoder"},
    "both, every 2": {"guidance": GUIDED, "every": 2},
    "both, one checkpoint": {"guidance": GUIDED, "checkpoints_per_step": 1},
    "both, released": {"guidance": GUIDED, "fidelity": RELEASED},
    "both, second chain, DDIM": {
        "guidance": GUIDED,
        "fidelity": replace(STANDARD, second_chain=True, solver="ddim"),
    },
    "both, per checkpoint": {"guidance": GUIDED, "fidelity": _flag("backward", "per_checkpoint")},
    "both, clamped": {"guidance": GUIDED, "fidelity": _flag("clamp_images", True)},
    "both, memory of 2": {"guidance": GUIDED, "fidelity": _flag("memory_size", 2)},
}


def norms(checkpoints: Checkpoints) -> Tensor:
    """The norm of all parameters at each checkpoint."""
    flat = [torch.cat([value.flatten() for value in state.values()]) for state in checkpoints.states]
    return torch.stack([one.double().norm() for one in flat])


def augmented(made: SimpleNamespace) -> Tensor:
    """A trajectory on augmented images."""
    torch.manual_seed(1)
    model = network("convnet2", num_classes=3, image_size=16)
    return norms(train_surrogate(model, made.data, epochs=3, batch_size=6, augment=AUGMENTATION))


def runs() -> dict[str, Callable[[SimpleNamespace], Tensor]]:
    """Every fixed run by its name, "KIND: what": from the models to a tensor."""
    found: dict[str, Callable[[SimpleNamespace], Tensor]] = {
        "surrogate: trajectory": lambda made: norms(made.checkpoints),
        "surrogate: augmented": augmented,
        "gradients: norms": lambda made: made.gradients.double().norm(dim=2),
        "gradients: kept, mean": lambda made: torch.tensor(
            select_checkpoints(made.gradients, threshold=0.1, similarity="mean")
        ),
        "gradients: kept, per class": lambda made: torch.tensor(
            select_checkpoints(made.gradients, threshold=0.1, similarity="per_class")
        ),
        "set: whole": lambda made: distilled(made, resumed=False),
        "set: resumed": lambda made: distilled(made, resumed=True),
        "set: tiny decoder": lambda made: distilled(made, resumed=False, guidance_decoder=made.tiny),
        "rded: images": selected,
        "minimax: parameters": tuned,
    }
    found |= {
        f"sample: {name}": lambda made, options=options: latents(made, **options)
        for name, options in SAMPLES.items()
    }
    return found | {
        f"evaluation: {protocol.name}": lambda made, protocol=protocol: score(made, protocol)
        for protocol in PROTOCOLS.values()
    }


def results() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        made = models()
        return {name: run(made).detach().cpu() for name, run in runs().items()}


def summary(tensor: Tensor) -> list[float]:
    """At most twelve values spread over a result, and its norm, rounded."""
    flat = tensor.double().flatten()
    few = flat[torch.linspace(0, len(flat) - 1, min(12, len(flat))).round().long()]
    return [round(value, 4) for value in [*few.tolist(), flat.norm().item()]]


RECORDED = Path(__file__).with_suffix(".json")


def kind_of(name: str) -> str:
    """The kind of work on disk that a run is one of (`keys.SCHEMA`)."""
    kind = name.split(":")[0]
    return "set" if kind == "sample" else kind


def main(action: str, path: str = "") -> int:
    found = results()
    if action == "values":
        values = {name: summary(tensor) for name, tensor in found.items()}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
        schema = json.dumps({kind: SCHEMA[kind] for kind in dict.fromkeys(map(kind_of, values))})
        runs_text = ",\n".join(lines)
        RECORDED.write_text(f'{{"schema": {schema}, "runs": {{\n{runs_text}\n}}}}\n')
        return 0
    content = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in found.items()
    }
    if action == "record":
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        return 0
    before = json.loads(Path(path).read_text())
    differ = [name for name in sorted(before | content) if before.get(name) != content.get(name)]
    print(f"{len(content) - len(differ)} of {len(before)} results have equal bytes", *differ, sep="\n")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
