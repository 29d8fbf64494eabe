"""Influence-Guided Diffusion for Dataset Distillation (ICLR 2025), reproduced.

The public names are loaded when first used, so that `import igd_lib` is quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Guidance": "config", "Fidelity": "config", "Protocol": "config", "PAPER": "config", "RELEASED": "config", "preset": "config",
    "load": "data", "DataSpec": "datasets", "image_folder": "datasets", "network": "models",
    "Checkpoints": "surrogate", "train_surrogate": "surrogate", "class_gradients": "surrogate", "select_checkpoints": "surrogate",
    "influence_loss": "guidance", "deviation_loss": "guidance", "influence_scale": "guidance",
    "IGDPipeline": "sampler", "sample_igd": "sampler", "make_scheduler": "sampler",
    "DistilledSet": "distill", "Score": "evaluate", "Teacher": "evaluate",
}  # fmt: skip
# `distill` and `evaluate` are modules; their functions are `igd_lib.distill.distill` and `igd_lib.evaluate.evaluate`.
_MODULES = (
    "augment", "cluster", "config", "data", "datasets", "distill", "doctor", "evaluate", "experiment", "export", "files", "guidance",
    "methods", "metrics", "minimax", "models", "notebook", "plotting", "results", "sampler", "sources", "standin", "surrogate", "tables",
    "weights",
)  # fmt: skip
__all__ = ["__version__", *_PUBLIC, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"igd_lib.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return import_module(f"igd_lib.{name}")
    raise AttributeError(f"module 'igd_lib' has no attribute {name!r}")
