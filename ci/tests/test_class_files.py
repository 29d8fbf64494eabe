"""Sets that are made class by class: each class once, whoever makes it, in memory or read when asked for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from igd_lib.data import images
from igd_lib.sets.class_files import ClassFiles, kept_by_class

CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def kept(tmp_path) -> ClassFiles:
    return ClassFiles(tmp_path, "toy", "made", CLASSES, 3, 4)


class Maker:
    """A class's images say which class and number they are; a class may be slow, or end the run."""

    def __init__(self, stop: int = -1):
        self.stop, self.made = stop, []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def to(self, device):
        return self

    def __call__(self, label):
        if label == self.stop:
            raise KeyboardInterrupt
        self.made.append(label)
        self.begun.set()
        assert self.go_on.wait(10)
        levels = 10 * label + torch.arange(3)
        return levels[:, None, None, None].expand(3, 3, 4, 4).to(torch.uint8)


def levels(data, indices) -> list[int]:
    return data.fetch(torch.tensor(indices))[:, 0, 0, 0].tolist()


EVERY = [10 * label + number for label in range(4) for number in range(3)]


def made_by(maker: Maker, kept: ClassFiles):
    return kept_by_class("rded", {"seed": 0}, kept, lambda: maker, "toy")


def test_an_interrupted_set_goes_on_with_the_classes_that_lack(kept):
    with pytest.raises(KeyboardInterrupt, match="2 of 4 classes are in .*; run the same again"):
        made_by(Maker(stop=2), kept)
    maker = Maker()
    found = made_by(maker, kept)
    assert maker.made == [2, 3] and levels(found, list(range(12))) == EVERY
    assert (found.name, found.split, found.classes, found.image_size) == ("toy", "made", CLASSES, 4)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    again = kept_by_class("rded", {"seed": 0}, kept, None, "toy")  # nobody is asked to make anything
    assert levels(again, list(range(12))) == EVERY
    with pytest.raises(ValueError, match="a set of other settings: seed = 0, wanted 1"):
        kept_by_class("rded", {"seed": 1}, kept, None, "toy")


def test_two_processes_share_the_classes(kept):
    """The second makes what the first is not at, and waits for that at the end."""
    first, second = Maker(), Maker()
    first.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(made_by, first, kept)
        assert first.begun.wait(10)
        quick = pool.submit(made_by, second, kept)
        while len(second.made) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        assert not quick.done()
        first.go_on.set()
        for done in (slow, quick):
            assert levels(done.result(), list(range(12))) == EVERY
    assert (first.made, second.made) == ([0], [1, 2, 3])
    assert not list(kept.folder.glob(".*lock"))


@pytest.mark.parametrize("limit", [0, 12 * 48 - 1, 12 * 48])
def test_a_set_is_in_memory_up_to_the_limit(kept, monkeypatch, limit):
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    found = made_by(Maker(), kept)
    assert found.slow == (limit < 12 * 48)
    wanted = [11, 0, 4, 4, 9, 3, 1]
    assert levels(found, wanted) == [EVERY[index] for index in wanted]
    assert levels(found.subset(torch.tensor([5, 2])), [1]) == [2]
    for path in kept.folder.glob("0*.safetensors"):
        path.unlink()
    if found.slow:
        with pytest.raises(ValueError, match="00001.safetensors is damaged .*; delete it and run again"):
            levels(found, [4])
    else:
        assert levels(found, wanted) == [EVERY[index] for index in wanted]
