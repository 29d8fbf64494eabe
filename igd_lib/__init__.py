"""Influence-Guided Diffusion for Dataset Distillation (ICLR 2025), reproduced.

The public names are loaded when first used, so that `import igd_lib` is quick.
"""

from importlib import import_module

from igd_lib.tools.version import VERSION as __version__

_MODULE_OF = {
    "Guidance": "config",
    "Fidelity": "config",
    "PAPER": "config",
    "RELEASED": "config",
    "STANDARD": "config",
    "preset": "config",
    "load": "data.images",
    "DataSpec": "data.datasets",
    "image_folder": "data.datasets",
    "network": "models.networks",
    "Checkpoints": "surrogate",
    "train_surrogate": "surrogate",
    "class_gradients": "surrogate",
    "select_checkpoints": "surrogate",
    "influence_loss": "guidance",
    "deviation_loss": "guidance",
    "influence_scale": "guidance",
    "sample": "sampler",
    "sample_igd": "sampler",
    "make_scheduler": "schedulers",
    "IGDPipeline": "pipeline",
    "distill": "distillation",
    "FAST": "sampling",
    "DistilledSet": "sets.store",
    "Protocol": "protocols",
    "Score": "evaluation",
    "Teacher": "teachers",
    "teacher_from_file": "teachers",
    "train_teacher": "teacher_training",
    "evaluate": "evaluation",
}
__all__ = ["__version__", "standin", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str):
    if name == "standin":
        return import_module("igd_lib.models.standin")
    if name in _MODULE_OF:
        return getattr(import_module(f"igd_lib.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'igd_lib' has no attribute {name!r}")
