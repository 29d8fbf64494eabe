"""Loads DiT weights in their authors' own layout: `DiT-XL-2-256x256.pt` and Minimax checkpoints.

DiT's weights are CC-BY-NC 4.0 (no commercial use). Files are read with `weights_only=True`.

diffusers' DiT embeds the timestep with frequencies 10000^(-i/127); the original, and so the weights, with
10000^(-i/128). `match_original` gives a diffusers model the original's; `from_original` calls it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

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


def from_original(state: dict[str, Tensor], *, num_attention_heads: int = 16) -> DiTTransformer2DModel:
    """A diffusers model, forward-equal to the original-layout `state` (plain or with Minimax's scales).

    Every size is read from the tensors except the number of heads, 16 in all XL and L models. The input
    is 2 x patches a side; `pos_embed` in the state must be DiT's fixed sine-cosine table.
    """
    converted = convert(state)
    width, in_channels, patch, _ = converted["pos_embed.proj.weight"].shape
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
    if "pos_embed" in state and not torch.allclose(state["pos_embed"].float(), table, atol=1e-4):
        raise ValueError(
            "pos_embed in the file is not DiT's sine-cosine table; this model was trained with another one"
        )
    model.load_state_dict(converted)
    return match_original(model).eval()


def match_original(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give a diffusers DiT the original's timestep frequencies, in place; for weights trained with them.

    The config records it (`timestep_frequencies`), so `IGDPipeline` does the same with a saved and loaded
    model.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    transformer.register_to_config(timestep_frequencies="original")
    return transformer


def read(path: str | Path) -> dict[str, Tensor]:
    """The original-layout state in a `.pt` file: plain, or a training checkpoint's averaged weights (`ema`).

    Read with `weights_only=True`: a file that asks for more than tensors is refused. Raises
    FileNotFoundError, or ValueError when the file holds no DiT.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        # Minimax's training checkpoints hold the command line's Namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{path} cannot be read as plain tensors; it is damaged, or holds code ({type(error).__name__})"
        ) from error
    for name in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
