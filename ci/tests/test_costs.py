"""What the plan counts, against operations counted on real runs and the prices at the paper's shapes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from igd_lib.config import STANDARD, Guidance
from igd_lib.data.images import from_tensors
from igd_lib.evaluation import Cell, train_network
from igd_lib.experiment import costs
from igd_lib.experiment.methods import Method
from igd_lib.experiment.scales import paper_scale, short
from igd_lib.guidance import influence_loss
from igd_lib.guides import Shortcuts
from igd_lib.models.networks import network
from igd_lib.protocols import SMALL_HARD
from igd_lib.surrogate import Checkpoints, SurrogateTraining, run_training


@pytest.fixture(scope="module")
def scale():
    return paper_scale("imagewoof", fidelity=STANDARD, ipc=10, labels="hard", num_classes=10, image_size=256)


def images(count, side=16, classes=4):
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return from_tensors(
        "toy", "train", [str(i) for i in range(classes)], pixels, torch.arange(count) % classes
    )


def work(scale, **given):
    usual = dict(
        scale=scale, rows=[], ipc=10, seeds=1, networks=[], classes=10, images=(100, 50), image_size=256
    )
    return costs.Work(**{**usual, **given})


def test_a_sampled_image_at_the_paper_s_shapes(scale):
    """25 TFLOP without, 56 with guidance (counted on the real loop); shortcuts are cheaper."""
    vanilla, guided = Method(), Method(guidance=scale.guidance)

    def price(row):
        return costs.image_operations(row, scale, 10, 256) / 1e12

    assert price(vanilla) == pytest.approx(25, rel=0.03)
    assert price(guided) == pytest.approx(56, rel=0.04)
    assert price(Method(guidance=replace(scale.guidance, k=0.0))) == price(vanilla)
    quick = replace(guided, shortcuts=Shortcuts(every=4, jacobian="decoder"))
    assert price(vanilla) < price(quick) < 0.6 * price(guided)
    assert price(replace(guided, guidance=Guidance(5.0, 50.0, (0, 49)))) > 2 * price(guided)


def test_the_price_of_the_second_order():
    model = network("convnet3", num_classes=4, image_size=32)
    checkpoints = Checkpoints(model, [dict(model.state_dict())] * 2, [0.0, 1.0], [0.01, 0.01])
    parameters = sum(value.numel() for value in model.parameters())
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = influence_loss(pixels, torch.tensor([0]), checkpoints, torch.randn(2, 1, parameters))
        torch.autograd.grad(loss.sum(), pixels)
    expected = 2 * costs.SECOND_ORDER * costs.operations_of("convnet3", 32, 4)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_an_evaluation(scale):
    protocol = replace(short(SMALL_HARD), image_size=16, mixed_precision=False)
    train, test = images(12), images(40)
    cell = Cell.of(train, test, "convnet2", protocol, 0, device="cpu")
    with FlopCounterMode(display=False) as counter:
        train_network(cell)
    planned = work(scale, ipc=3, classes=4, images=(100, 40), image_size=16)
    assert counter.get_total_flops() == pytest.approx(
        costs.cell_operations(protocol, "convnet2", planned), rel=0.15
    )


def test_a_surrogate_s_training(scale, tmp_path):
    model = network("convnet2", num_classes=4, image_size=16)
    with FlopCounterMode(display=False) as counter:
        run_training(model, images(24), SurrogateTraining(epochs=2), None)
    short_scale = replace(scale, surrogate="convnet2", training=SurrogateTraining(epochs=2))
    stage, _ = costs.stages(work(short_scale, classes=4, images=(24, 10), image_size=16))
    assert stage.name == "surrogate convnet2"
    assert counter.get_total_flops() == pytest.approx(stage.operations, rel=0.15)


def test_speeds_are_positive_and_of_this_machine():
    assert 1e8 < costs.training_speed("cpu", batch=1) < 1e14


def test_stages_grow_with_rows_seeds_and_networks(scale):
    rows = [Method("random"), Method("rded"), Method(), Method(guidance=scale.guidance)]
    one = work(scale, rows=rows, networks=["resnet18"])
    names = [stage.name for stage in costs.stages(one)]
    assert names == [
        "surrogate convnet6",
        "class gradients",
        "sampling, no influence",
        "sampling, influence-guided",
        "RDED",
        "influence loss",
        "evaluation, resnet18",
    ]
    found = {stage.name: stage for stage in costs.stages(one)}
    twice = {stage.name: stage for stage in costs.stages(replace(one, seeds=2))}
    for name in names[2:]:
        assert twice[name].operations == pytest.approx(2 * found[name].operations)
    assert twice[names[0]].operations == found[names[0]].operations  # trained once
    assert [stage.samples for stage in found.values()] == [False, False, True, True, False, False, False]
    assert costs.stages(replace(one, has_teacher=False))[4].name == "teacher"
