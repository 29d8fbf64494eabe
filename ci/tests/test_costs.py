"""What the plan counts, against operations counted on real runs and the prices at the paper's shapes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from igd_lib.baselines.dm import DM, dm
from igd_lib.baselines.idc import IDC, idc
from igd_lib.config import STANDARD, Guidance
from igd_lib.data.images import from_tensors
from igd_lib.evaluation import Cell, train_network
from igd_lib.experiment import costs
from igd_lib.experiment.counting import SECOND_ORDER, TO_PIXELS, TRAINING
from igd_lib.experiment.method_costs import METHODS, Asked, sd_operations
from igd_lib.experiment.methods import Method
from igd_lib.experiment.scales import paper_scale, short
from igd_lib.guidance import influence_loss
from igd_lib.guides import Shortcuts
from igd_lib.models.networks import network
from igd_lib.protocols import SMALL_HARD, labellings
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


def test_coresets_take_one_look_at_every_image(scale):
    """By the teacher, and for EL2N by the surrogates of the first tenth; whatever the rules and seeds."""

    def looked(*families, **given):
        found = costs.stages(work(scale, rows=[Method(family) for family in families], **given))
        return next((stage.operations for stage in found if stage.name == "coresets"), 0.0)

    teacher = 100 * costs.operations_of("torchvision/resnet18", 224, 10)
    early = 100 * scale.training.epochs / 10 * costs.operations_of("convnet6", 256, 10)
    assert looked("random") == 0 and looked("herding", seeds=3) == looked("herding", "medoid") == teacher
    assert looked("el2n") == pytest.approx(early) and looked("el2n", "k-centre") == pytest.approx(
        early + teacher
    )


def test_evaluations_with_labels_of_every_kind_and_on_validation_images(scale):
    rows, ways = [Method("random"), Method()], tuple(labellings(scale.protocol).values())
    one = work(scale, rows=rows, networks=["resnet18"])

    def evaluated(**given):
        return costs.stages(replace(one, **given))[-1]

    hard, fixed, every = (evaluated(protocols=(protocol,)).operations for protocol in ways)
    assert hard == fixed == evaluated().operations < every
    whole = evaluated(protocols=ways)
    assert whole.operations == pytest.approx(hard + fixed + every) and whole.what.startswith("6 sets")
    assert evaluated(validated=rows[:1]).operations == pytest.approx(1.5 * hard)


# --- the compared methods: operations counted on real runs, scaled to theirs


def counted_run(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def per_pass(name, side=16, classes=4):
    return costs.operations_of(name, side, classes)


def test_dm_s_iteration():
    """Real images once, synthetic ones there and back to the pixels."""
    own = DM("convnet2-w8", iterations=2, batch_real=6, augmentation="")
    found = counted_run(lambda: dm(images(40), 3, own))
    assert found == pytest.approx(2 * 4 * (6 + TO_PIXELS * 3) * per_pass("convnet2-w8"), rel=0.15)


def test_idc_s_step():
    own = IDC(
        network="convnet2-w8", outer=1, inner=2, batch_real=8, net_images=8, augmentation="color", mix=0
    )
    found = counted_run(lambda: idc(images(40), 3, own))
    steps = 4 * (TRAINING * 8 + SECOND_ORDER * 3) + TRAINING * 8
    assert found == pytest.approx(2 * steps * per_pass("convnet2-w8"), rel=0.3)


def test_experts_are_counted_once_and_sets_by_seed():
    def of(family, seeds):
        return METHODS[family](Asked("cifar-10", 10, seeds, 50_000))[1]

    forward, experts = costs.operations_of("convnet3", 32, 10), 2 * TRAINING * 100 * 100 * 50_000
    assert of("datm", 0) == pytest.approx(experts * forward)
    assert of("datm", 3) - of("datm", 0) == pytest.approx(3 * (of("datm", 1) - of("datm", 0)))
    assert of("tdsdm", 2) - of("tdsdm", 1) == pytest.approx(of("tdsdm", 1) - of("tdsdm", 0))
    for family in ("dm", "idc", "sre2l", "d4m"):
        assert of(family, 0) == 0 and of(family, 4) == pytest.approx(2 * of(family, 2))


def test_stable_diffusion_at_its_shapes():
    """Published: about 0.68 TFLOP, 340 GMAC, for a pass of SD-1.5's network at 512 px (often rounded up)."""
    unet, encode, decode = sd_operations()
    assert 0.6e12 < unet < 0.9e12 and encode < decode < 3e12


def test_a_plan_has_a_stage_for_each_method(scale):
    found = costs.stages(work(scale, rows=[Method("dm"), Method("d4m"), Method("random")]))
    assert [(stage.name, stage.samples) for stage in found] == [("DM", False), ("D4M", True)]
    assert found[0].what == "1 seeds x 5,000 iterations x 10 classes"
