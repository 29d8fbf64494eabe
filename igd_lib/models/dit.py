"""DiT's weights in their authors' own layout (`DiT-XL-2-256x256.pt`, Minimax checkpoints), and its classes.

DiT's weights are CC-BY-NC 4.0 (no commercial use). Files are read with `weights_only=True`.

diffusers' DiT embeds the timestep with frequencies 10000^(-i/127); the original, and so the weights, with
10000^(-i/128). `match_original` gives a diffusers model the original's; `from_original` calls it.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from igd_lib.tools import tensors

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # attention heads by width: DiT-S, B, L and XL

# diffusers' names by the original's, below `blocks.I.` and `transformer_blocks.I.`.
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
# diffusers keeps a copy of both embedders in every block.
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
_ENDS = {
    "x_embedder.proj.weight": "pos_embed.proj.weight",
    "x_embedder.proj.bias": "pos_embed.proj.bias",
    "final_layer.adaLN_modulation.1.weight": "proj_out_1.weight",
    "final_layer.adaLN_modulation.1.bias": "proj_out_1.bias",
    "final_layer.linear.weight": "proj_out_2.weight",
    "final_layer.linear.bias": "proj_out_2.bias",
}


def fold_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An original-layout state without Minimax's (DiffFit's) learned scales, multiplied into the weights.

    A block has scales on qkv (3D), on the attention's projection, on the attention branch and on the
    MLP branch (D each): `blocks.I.attn.gamma1`, `.attn.gamma2`, `.gamma1`, `.gamma2`. A state without
    any is returned as it is.
    """
    folded = {name: tensor for name, tensor in state.items() if ".gamma" not in name}
    for name, scale in state.items():
        if ".gamma" not in name:
            continue
        block, _, kind = name.partition(".gamma")
        target = {"1": "attn.proj", "2": "mlp.fc2"}[kind]
        if block.endswith(".attn"):
            block, target = block.removesuffix(".attn"), {"1": "attn.qkv", "2": "attn.proj"}[kind]
        for part, factor in (("weight", scale[:, None]), ("bias", scale)):
            key = f"{block}.{target}.{part}"
            folded[key] = folded[key] * factor.to(folded[key])
    return folded


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict of an original-layout one, key by key; scales folded, nothing left over.

    Raises ValueError naming keys that are missing or unknown.
    """
    state = fold_scales(state)
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    wanted = dict(_ENDS)
    known = {*wanted, *_EMBEDDERS, "pos_embed"}
    for index in range(depth):
        for old, new in _BLOCK.items():
            for part in ("weight", "bias"):
                wanted[f"blocks.{index}.{old}.{part}"] = f"transformer_blocks.{index}.{new}.{part}"
        known |= {f"blocks.{index}.attn.qkv.{part}" for part in ("weight", "bias")}
    known |= set(wanted)
    missing, unknown = sorted(known - {"pos_embed"} - set(state)), sorted(set(state) - known)
    if depth == 0 or missing or unknown:
        raise ValueError(
            f"not a DiT state dict: missing {missing[:5]}, unknown {unknown[:5]} ({len(missing)} and "
            f"{len(unknown)} in all)"
        )
    converted = {new: state[old] for old, new in wanted.items()}
    for index in range(depth):
        for part in ("weight", "bias"):
            pieces = state[f"blocks.{index}.attn.qkv.{part}"].chunk(3)
            converted |= {
                f"transformer_blocks.{index}.attn1.to_{name}.{part}": piece
                for name, piece in zip("qkv", pieces, strict=True)
            }
        converted |= {f"transformer_blocks.{index}.{new}": state[old] for old, new in _EMBEDDERS.items()}
    return converted


def heads_of(width: int) -> int:
    """How many attention heads a DiT of this width has. Raises ValueError for a width that is none of DiT's.

    No tensor's shape tells, and a model with another number would load and be another function.
    """
    if width not in HEADS:
        known = ", ".join(f"{own} ({heads})" for own, heads in HEADS.items())
        raise ValueError(
            f"a DiT of width {width} is not known (known widths and their heads: {known}); say how many "
            "attention heads it has: --heads N, or num_attention_heads=N"
        )
    return HEADS[width]


def from_original(
    state: dict[str, Tensor], *, num_attention_heads: int | None = None
) -> DiTTransformer2DModel:
    """A float32 diffusers model, forward-equal to the original-layout `state` with or without scales.

    Every size is read from the tensors except the number of heads, which goes with the known widths
    (`heads_of`). The input is patch x patches a side; `pos_embed` in the state must be DiT's fixed
    sine-cosine table, up to its precision. Raises ValueError for any other state, naming tensors that are not
    finite.
    """
    stored = state["pos_embed"].dtype if "pos_embed" in state else torch.float32
    state = {name: tensor.float() for name, tensor in state.items()}
    _check_finite(state)
    converted = convert(state)
    width, in_channels, patch, _ = converted["pos_embed.proj.weight"].shape
    num_attention_heads = num_attention_heads or heads_of(width)
    if width % num_attention_heads:
        raise ValueError(f"a width of {width} cannot be divided among {num_attention_heads} attention heads")
    depth = sum(name.endswith(".attn1.to_q.weight") for name in converted)
    patches = state["pos_embed"].shape[1] if "pos_embed" in state else 256
    model = DiTTransformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=width // num_attention_heads,
        in_channels=in_channels,
        out_channels=len(converted["proj_out_2.bias"]) // patch**2,
        num_layers=depth,
        sample_size=patch * math.isqrt(patches),
        patch_size=patch,
        num_embeds_ada_norm=len(state["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )
    table = model.pos_embed.pos_embed
    # Values up to 1, rounded to the file's precision.
    tolerance = max(1e-4, torch.finfo(stored).eps)
    if "pos_embed" in state and not torch.allclose(state["pos_embed"], table, rtol=0, atol=tolerance):
        raise ValueError(
            "pos_embed in the file is not DiT's sine-cosine table; this model was trained with another one"
        )
    model.load_state_dict(converted)
    return match_original(model).eval()


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"the tensor {name} holds NaN or infinity: the file is damaged, or its training diverged"
            )


def match_original(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give a diffusers DiT the original's timestep frequencies, in place; for weights trained with them.

    The config records it (`timestep_frequencies`), so `IGDPipeline` does the same with a saved and loaded
    model.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    transformer.register_to_config(timestep_frequencies="original")
    return transformer


def class_ids(
    transformer: DiTTransformer2DModel, classes: int, label_ids: Sequence[int] | None = None
) -> list[int]:
    """The transformer's id of each of the data's `classes` classes, in label order, checked.

    Without `label_ids` they are 0 ... C-1, which is only meant where the transformer has C classes as well.
    Raises ValueError where it has another number, and for ids that are too few, double, or none of its.
    """
    known = transformer.config.num_embeds_ada_norm
    if label_ids is None:
        if known != classes:
            raise ValueError(
                f"the DiT knows {known} classes and the data have {classes}: which of its classes are they? "
                "Pass label_ids, its id of every class in label order"
            )
        return list(range(classes))
    ids = [int(number) for number in label_ids]
    if len(ids) != classes:
        raise ValueError(f"label_ids has one id a class: {classes}, got {len(ids)}")
    if wrong := [number for number in ids if not 0 <= number < known]:
        raise ValueError(f"label_ids are ids 0 ... {known - 1} of the DiT's classes, got {wrong[0]}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"label_ids names a class of the DiT twice: {ids}")
    return ids


@torch.no_grad()
def for_classes(transformer: DiTTransformer2DModel, sources: Sequence[int | None]) -> DiTTransformer2DModel:
    """A copy that knows `len(sources)` classes: class i begins as class `sources[i]` of the given DiT.

    None: as the given DiT's unconditional embedding, so the copy begins by denoising that class as it does
    an image of which nothing is known. Its own unconditional embedding is the same.
    """
    made, null = copy.deepcopy(transformer), transformer.config.num_embeds_ada_norm
    rows = torch.tensor([null if source is None else source for source in sources] + [null])
    for block in made.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        table = embedder.embedding_table.weight
        embedder.embedding_table = nn.Embedding.from_pretrained(
            table[rows.to(table.device)].clone(), freeze=False
        )
        embedder.num_classes = len(sources)
    made.register_to_config(num_embeds_ada_norm=len(sources))
    return made


def image_size_of(transformer: DiTTransformer2DModel, vae: AutoencoderKL) -> int:
    """The side in px of the images that a DiT and its autoencoder are made for."""
    return transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)


# --- files


def read(path: str | Path) -> dict[str, Tensor]:
    """The original-layout state in a `.pt` or `.safetensors` file.

    Plain, or a training checkpoint's averaged weights ("ema"), else its "model". A `.pt` file is read with
    `weights_only=True`: one that asks for more than tensors is refused. Raises FileNotFoundError, or
    ValueError when the file holds no DiT, or is a git-lfs pointer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    tensors.refuse_pointer(path)
    content = _tensors(path)
    for name in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _tensors(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Minimax's training checkpoints hold the command line's Namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{path} cannot be read as plain tensors; it is damaged, or holds code ({type(error).__name__})"
        ) from error
