"""DiffFit (Xie et al., ICCV 2023) on a DiT: learned scales, and which parameters are trained."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn


class Scaled(nn.Module):
    """A linear layer whose output is multiplied by learned vectors, 1 at first (DiffFit)."""

    def __init__(self, linear: nn.Linear, scales: int):
        super().__init__()
        self.linear = linear
        self.gammas = nn.ParameterList(
            [nn.Parameter(linear.weight.new_ones(linear.out_features)) for _ in range(scales)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for gamma in self.gammas:
            x = x * gamma
        return x

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The linear layer with the scales in its weights."""
        for gamma in self.gammas:
            self.linear.weight.mul_(gamma[:, None])
            if self.linear.bias is not None:
                self.linear.bias.mul_(gamma)
        return self.linear


def add_scales(transformer: DiTTransformer2DModel) -> None:
    """Learned scales in the first half of the blocks.

    On q, k and v, on the attention's projection and its branch, on the MLP's branch.
    """
    for block in transformer.transformer_blocks[: len(transformer.transformer_blocks) // 2]:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, Scaled(getattr(block.attn1, name), 1))
        block.attn1.to_out[0] = Scaled(block.attn1.to_out[0], 2)
        block.ff.net[2] = Scaled(block.ff.net[2], 1)


def fold_scales(transformer: DiTTransformer2DModel) -> None:
    """Undo `add_scales`, the scales multiplied into the weights: the same function."""
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Scaled):
                setattr(module, name, child.folded())


def share_embedders(transformer: DiTTransformer2DModel) -> bool:
    """Let all blocks use the first's timestep and class embedders if equal, as in the original DiT.

    diffusers keeps a copy in every block, and copies would be trained apart. Returns whether they were equal.
    """
    first, *others = [block.norm1.emb for block in transformer.transformer_blocks]
    reference = first.state_dict()
    if any(
        not torch.equal(value, reference[name])
        for other in others
        for name, value in other.state_dict().items()
    ):
        return False
    for other in others:
        other.timestep_embedder, other.class_embedder = first.timestep_embedder, first.class_embedder
    return True


def is_trained(name: str, parameter: nn.Parameter) -> bool:
    """DiffFit's choice: biases, norms, learned scales and the class embedding."""
    affine_norm = parameter.ndim == 1 and ".norm" in name
    return name.endswith("bias") or ".gammas." in name or ".class_embedder." in name or affine_norm
