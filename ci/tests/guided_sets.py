"""What tests of guides ask of the sets that they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igd_lib import distillation


def latents(found) -> Tensor:
    """All latents of a set, (classes, ipc, C, h, w)."""
    return torch.stack([found.latents(label) for label in found.selected])


def check_a_killed_run(experiment, row, monkeypatch, tmp_path) -> None:
    """A run of two images a class that is killed after thirteen of twenty ends as one that was not."""
    monkeypatch.setenv("IGD_CACHE", str(tmp_path / "first"))
    store, stored = distillation._store, []

    def counted(out, item, *rest):
        if len(stored) == 13:  # every class has its first image, three the second
            raise KeyboardInterrupt
        store(out, item, *rest)
        stored.append(item)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "_store", counted)
        with pytest.raises(KeyboardInterrupt):
            experiment.set(row, 0, 2)
        assert len(stored) == 13
        before, stored[:] = list(stored), []
        resumed = experiment.set(row, 0, 2)
        assert len(stored) == 7 and not set(stored) & set(before)  # nothing is sampled twice

    monkeypatch.setenv("IGD_CACHE", str(tmp_path / "another"))
    whole = experiment.set(row, 0, 2)
    assert whole.path != resumed.path and whole.path.name == resumed.path.name
    assert torch.equal(latents(whole), latents(resumed)) and torch.isfinite(latents(whole)).all()
    assert all(torch.equal(whole.images(label), resumed.images(label)) for label in range(10))
