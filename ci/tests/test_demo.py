"""The demo's choice of images."""

import pytest

from igd_lib.data import images
from igd_lib.experiment import demo, scales


def test_the_demo_is_in_colour_where_the_images_are(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "load", lambda name, split: asked.append((name, split)))
    assert demo.usable_stand_in("small") == "cifar-10" and demo.usable_stand_in("smoke") == "fashion-mnist"
    assert asked == [("cifar-10", "test"), ("fashion-mnist", "test")] and not capsys.readouterr().out


def test_else_it_is_grey_and_says_why_in_one_bold_line(monkeypatch, capsys):
    def absent(*_):
        raise FileNotFoundError("cifar-10: not in nowhere")

    monkeypatch.setattr(demo, "load", absent)
    assert demo.usable_stand_in("small") == "fashion-mnist"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("\033[1m") and line.endswith("\033[0m") and "cifar-10: not in nowhere" in line


def test_a_table_notebook_stops_with_the_remedy(only_fashion, monkeypatch):
    """CIFAR-10 cannot be had: the error has the ways to get it, and the other stand-in."""
    from igd_lib.data.sources import cifar
    from igd_lib.experiment.experiment import prepare
    from igd_lib.experiment.run import Run

    def absent(*_):
        raise FileNotFoundError("cifar-10: downloading failed")

    monkeypatch.setattr(cifar, "fetch", absent)
    with pytest.raises(FileNotFoundError, match="downloading failed; or .*`-p stand_in fashion-mnist`"):
        prepare("05", "imagenette", "small", run=Run(stand_in="cifar-10"))
    assert images.missing("cifar-10") and scales.STAND_INS.keys() == {"fashion-mnist", "cifar-10"}
