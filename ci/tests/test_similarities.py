"""Algorithm 2's pass over all classes: kept as it is done, in parts that may be made anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from igd_lib import surrogate
from igd_lib.data.images import ImageData, from_tensors
from igd_lib.experiment import surrogates
from igd_lib.experiment.surrogates import PARTS, Surrogates, _Similarities
from igd_lib.surrogate import ClassGradients, class_gradients, similarity_matrices
from igd_lib.tools import progress
from igd_lib.tools.machine import work_dir


@pytest.fixture
def seven() -> ImageData:
    """Seven classes of four random images, of which the toy network knows three: labels are taken mod 3."""
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (28, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return from_tensors("seven", "train", tuple("abcdefg"), pixels, torch.arange(7).repeat(4))


@pytest.fixture
def made(monkeypatch):
    """A clock by which each class takes a minute, and what may be done before Ctrl-C; parts of three."""
    count = {"labels": [], "end": 10**6}

    def counted(checkpoints, images, label):
        if len(count["labels"]) == count["end"]:
            raise KeyboardInterrupt
        count["labels"].append(label)
        return class_gradients(checkpoints, images, label % 3)

    monkeypatch.setattr(surrogates, "class_gradients", counted)
    monkeypatch.setattr(surrogate, "PART", 3)
    monkeypatch.setattr(surrogate, "SAVE_SECONDS", 120.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 60.0 * len(count["labels"]))
    return count


def equal(found: dict, expected: dict) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in ("mean", "per_class"))


@pytest.mark.parametrize(("end", "kept"), [(1, 0), (2, 2), (3, 3), (5, 5), (6, 6), (7, 7)])
def test_an_interrupted_pass_ends_with_the_same_bits(seven, toy, tmp_path, made, end, kept):
    """Saved every two minutes and at a part's end: labels 0-2, 3-5 and 6."""
    checkpoints = toy().checkpoints
    whole = _Similarities(checkpoints, seven, None, tmp_path / "whole").made()
    assert made["labels"] == list(range(7))
    made["labels"].clear()
    made["end"] = end
    cut = _Similarities(checkpoints, seven, None, tmp_path / "cut")
    if end < 7:
        with pytest.raises(
            KeyboardInterrupt, match=f"the sums of {end // 3} of 3 parts .* in .*cut; run the"
        ):
            cut.made()
        made["labels"].clear()
        made["end"] = 10**6
        assert equal(cut.made(), whole) and made["labels"] == list(range(kept, 7))
    assert equal(cut.made(), whole)

    def gradients(label):
        return class_gradients(checkpoints, seven.of_class(label), label % 3)

    assert equal(similarity_matrices(gradients, 7), whole)


def test_parts_made_apart_give_the_same_bits(seven, toy, tmp_path, made):
    checkpoints = toy().checkpoints
    whole = _Similarities(checkpoints, seven, None, tmp_path / "whole").made()
    for number in (2, 0, 1):
        _Similarities(checkpoints, seven, None, tmp_path / "apart").run([number])
    made["end"] = len(made["labels"])  # nothing is left to be done
    assert equal(_Similarities(checkpoints, seven, None, tmp_path / "apart").made(), whole)


def test_sums_are_those_of_all_classes(seven, toy, made):
    """Against float64, by the definition."""
    checkpoints = toy().checkpoints
    own = [class_gradients(checkpoints, seven.of_class(label), label % 3).double() for label in range(7)]
    found = similarity_matrices(lambda label: own[label].float(), 7)
    unit = [torch.nn.functional.normalize(one, dim=1) for one in own]
    total = torch.nn.functional.normalize(sum(own), dim=1)
    torch.testing.assert_close(found["mean"].double(), total @ total.T, rtol=0, atol=1e-6)
    per_class = sum(one @ one.T for one in unit) / 7
    torch.testing.assert_close(found["per_class"].double(), per_class, rtol=0, atol=1e-6)


def test_matrices_replace_the_parts(small_loads, monkeypatch):
    from igd_lib.experiment.experiment import prepare

    own = prepare("02", "fashion-mnist", "smoke").surrogates
    first = own.similarity_matrices()
    assert first["mean"].shape == (3, 3)
    monkeypatch.setattr(surrogates, "class_gradients", None)
    assert equal(own.similarity_matrices(), first)
    assert not [path for path in work_dir().rglob(PARTS)]


def test_many_classes_are_never_on_the_device(small_loads, monkeypatch):
    """None is computed before it is asked for, and what is given is the function that reads one."""
    from igd_lib.experiment.experiment import prepare

    few = prepare("02", "fashion-mnist", "smoke").surrogates
    _, together = few.retained([0])
    many: Surrogates = replace(few, scale=replace(few.scale, many_classes=True))
    asked, call = [], ClassGradients.__call__
    monkeypatch.setattr(
        ClassGradients, "__call__", lambda self, label: asked.append(label) or call(self, label)
    )
    monkeypatch.setattr(torch, "stack", lambda *_, **__: pytest.fail("all classes at once"))
    _, found = many.retained([0])
    assert isinstance(found, ClassGradients) and asked == []
    assert torch.equal(found(3), together(3)) and asked == [3]
