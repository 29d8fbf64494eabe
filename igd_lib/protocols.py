"""How networks are trained on a distilled set and tested on real data, as values.

Each follows the code that it names: Minimax's evaluation code, IGD's variant of it, RDED's validation, and
G-VBSM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from igd_lib.data.dsa import Strategy, diffaug, dsa


@dataclass(frozen=True)
class Training:
    """What a protocol comes to for one cell: a network, a number of classes and images a class."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Protocol:
    """How a network is trained from scratch on a distilled set and tested on real data.

    Where a field has a default, it is the hard-label protocols' value or "off".
    """

    name: str
    image_size: int  # px; what the network sees
    mean: tuple[float, float, float]  # of [0, 1] images
    std: tuple[float, float, float]
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    # soft: a teacher's, made on the mixed batch as it is trained on; own: the set's, learned with its images
    labels: Literal["hard", "soft", "own"] = "hard"
    # optimiser
    # The first that begins the network's name (its library's left out), else lr.
    lr_by_network: tuple[tuple[str, float], ...] = ()
    own_lr: bool = False  # the set's learned rate, where it has one, in place of lr
    momentum: float = 0.9  # sgd only
    betas: tuple[float, float] = (0.9, 0.999)  # adamw only
    decay: Literal["all", "matrices"] = "all"  # matrices: only weights of more than one dimension decay
    over_100_classes: tuple[float, float, int] | None = None  # lr, weight decay, least batch size there
    # The network is made for so many classes and keeps the outputs of the data's; None: for these alone.
    made_for: int | None = None
    # batches and epochs
    batch_size: int = 64
    batch_by_ipc: tuple[tuple[float, int], ...] = ()  # batch sizes up to an IPC, instead of batch_size
    batch_doubled_for: tuple[int, ...] = ()  # numbers of classes
    epochs: int | None = None  # None: by IPC
    epochs_by_ipc: tuple[tuple[float, int], ...] = (
        (1, 3000),
        (10, 2000),
        (50, 1500),
        (200, 1000),
        (500, 500),
        (float("inf"), 300),
    )
    # schedule
    # cosine: 0.5 (1 + cos(pi e / E)), from 1 to 0; half-cosine: 0.5 (1 + cos(pi e / 2E)), from 1 to 0.5
    schedule: Literal["multistep", "half-cosine", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)  # multistep: shares of the epochs after which lr falls
    lr_decay: float = 0.2
    # augmentation, in this order
    train_resize: int | None = None  # px before the random crop; None: image_size. 0: as stored
    patch_factor: int = 1  # strips a side that are shuffled (RDED's images are grids of patches); 1 = off
    crop_scale: tuple[float, float] = (0.5, 1.0)  # RandomResizedCrop
    flip: bool = True
    jitter: float = 0.4  # brightness, contrast, saturation
    lighting: float = 0.1  # sd of the PCA lighting noise
    cutmix: float = 1.0  # Beta(a, a); 0 = off
    cutmix_probability: float = 1.0  # of a batch
    mixup: float = 0.0  # Beta(a, a) every batch, instead of CutMix; 0 = off
    # Changes of what the network sees, an image's own, before any CutMix; not for a teacher's labels.
    dsa: str = ""  # DSA's families, of which a batch gets one; "": none
    diffaug: str = ""  # IDC's (`data.dsa.diffaug`)
    # soft labels
    # kl: of softmaxes at `temperature`. mse+ce: mean squared error of logits, and `hard_weight` times the
    # cross-entropy to the images' own labels, as if they were not mixed (G-VBSM).
    soft_loss: Literal["kl", "mse+ce"] = "kl"
    temperature: float = 20.0  # of teacher and student, without a factor T^2
    hard_weight: float = 0.1
    # Every batch passes through the network once more before its step, in training mode and without gradient:
    # running statistics move twice.
    double_pass: bool = False
    # precision
    mixed_precision: bool = False  # bfloat16 where the processor multiplies it natively
    # On GPUs that have it; the sources leave torch's default as it is.
    tf32: Literal["off", "convolutions", "all"] = "convolutions"
    # tests
    # px of the shorter side before the centre crop to image_size; None: image_size
    test_resize: int | None = None
    evaluations: int = 100  # about so many tests, evenly spread ...
    test_every: int | None = None  # ... or one every so many epochs
    test_after: float = 0.0  # and none in this first share of the epochs
    reported: Literal["best", "last"] = "best"  # which top-1 the protocol's tables show
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the authors' own runs

    def epochs_for(self, ipc: int, num_classes: int) -> int:
        """Training epochs: `epochs`, or by IPC; at 100 classes two thirds, rounded down to hundreds."""
        if self.epochs is not None:
            return self.epochs
        epochs = next(count for limit, count in self.epochs_by_ipc if ipc <= limit)
        if num_classes != 100:
            return epochs
        return epochs * 2 // 3 // 100 * 100 or epochs * 2 // 3

    @property
    def changes(self) -> Strategy | None:
        """What is done to images as the network sees them, each by itself; None: nothing.

        Raises ValueError where a teacher would label what it has not seen.
        """
        if not (self.dsa or self.diffaug):
            return None
        if self.labels == "soft" or (self.dsa and self.diffaug):
            raise ValueError(
                f"protocol {self.name!r}: dsa or diffaug, not both, and neither with a teacher's labels"
            )
        return dsa(self.dsa) if self.dsa else diffaug(self.diffaug)

    def training(self, network: str, ipc: int, num_classes: int) -> Training:
        """Epochs, batch size, rate and decay of one cell."""
        lr, weight_decay, batch = self.lr, self.weight_decay, self.batch_size
        if self.batch_by_ipc:
            batch = next(size for limit, size in self.batch_by_ipc if ipc <= limit)
        if num_classes in self.batch_doubled_for:
            batch *= 2
        if self.over_100_classes is not None and num_classes > 100:
            lr, weight_decay, least = self.over_100_classes
            batch = max(batch, least)
        own = network.rpartition("/")[2]
        lr = next((rate for prefix, rate in self.lr_by_network if own.startswith(prefix)), lr)
        return Training(self.epochs_for(ipc, num_classes), min(batch, ipc * num_classes), lr, weight_decay)

    def tests(self, epochs: int) -> list[int]:
        """After which epochs (counted from 1) the network is tested; the last is always one."""
        if self.test_every is not None:
            found = set(range(self.test_every, epochs + 1, self.test_every))
        else:
            count = min(self.evaluations, epochs)
            found = {round(epochs * (i + 1) / count) for i in range(count)}
        return sorted(
            {epoch for epoch in found if epoch - 1 > self.test_after * epochs or self.test_after == 0}
            | {epochs}
        )


_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Minimax's evaluation code, and what IGD's released code changes in it: AdamW, whose rate and decay do not
# follow the number of classes as SGD's do.
MINIMAX_HARD = Protocol(
    "minimax-hard",
    224,
    _IMAGENET_MEAN,
    _IMAGENET_STD,
    "sgd",
    0.01,
    5e-4,
    over_100_classes=(0.1, 1e-4, 128),
    seeds=(0,),
)
IGD_HARD = Protocol("igd-hard", 256, _HALF, _HALF, "adamw", 1e-3, 0.01, over_100_classes=(1e-3, 0.01, 128))
# The same code's settings for CIFAR-10 and -100. As released it can only train on the whole data set there:
# that Table 8's sets were tested under them is our reading.
IGD_CIFAR = replace(
    IGD_HARD,
    name="igd-cifar",
    image_size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    over_100_classes=None,
    epochs=1000,
    crop_scale=(1.0, 1.0),
    flip=False,
    jitter=0.0,
    lighting=0.0,
    cutmix_probability=0.5,
    evaluations=1,
)
# RDED's validation, for Tables 2 and 3. Its images are factor x factor grids, its crops take 1 / factor of
# the area at least; images that are no grids have factor 1 and so are never cropped (`rded_soft`). IPC 100 is
# unset there: ours is IPC 50's batch. The rates' two last names are timm's for the same networks.
RDED_SOFT = Protocol(
    "rded-soft",
    224,
    _IMAGENET_MEAN,
    _IMAGENET_STD,
    "adamw",
    1e-3,
    0.01,
    labels="soft",
    decay="matrices",
    lr_by_network=(
        ("efficientnet_b0", 2e-3),
        ("mobilenet_v2", 2.5e-3),
        ("swin_v2_t", 1e-4),
        ("vgg11", 5e-4),
        ("alexnet", 1e-4),
        ("vit_b_16", 1e-4),
        ("mobilenetv2", 2.5e-3),
        ("swinv2_tiny", 1e-4),
    ),
    made_for=1000,
    batch_by_ipc=((1, 10), (10, 50), (float("inf"), 100)),
    batch_doubled_for=(100, 1000),
    epochs=300,
    schedule="half-cosine",
    train_resize=0,
    patch_factor=2,
    crop_scale=(0.5, 1.0),
    jitter=0.0,
    lighting=0.0,
    double_pass=True,
    test_resize=256,
    test_every=10,
    test_after=0.8,
    seeds=(42,),
)
RDED_MIXUP = replace(RDED_SOFT, name="rded-mixup", cutmix=0.0, mixup=0.8, temperature=4.0)
# Where teacher or student is a ConvNet, on parts of ImageNet.
RDED_SOFT_128 = replace(RDED_SOFT, name="rded-soft-128", image_size=128, test_resize=144)
# Tiny-ImageNet and CIFAR, whose images are no grids there. (Its CIFAR-100 by a ConvNet-3's labels and for one
# has batches of 25 and a rate of 2e-3.)
RDED_SOFT_64 = replace(
    RDED_SOFT,
    name="rded-soft-64",
    image_size=64,
    test_resize=72,
    patch_factor=1,
    crop_scale=(1.0, 1.0),
    batch_size=100,
    batch_by_ipc=(),
    batch_doubled_for=(),
)
RDED_SOFT_32 = replace(
    RDED_SOFT, name="rded-soft-32", image_size=32, test_resize=32, patch_factor=1, crop_scale=(1.0, 1.0)
)
# G-VBSM's own, for the labels of its ensemble: SRe2L's training with another loss. The authors store the
# labels of 300 or 1,000 epochs of crops; here they are made as they are needed.
GVBSM_SOFT = Protocol(
    "gvbsm-soft",
    224,
    _IMAGENET_MEAN,
    _IMAGENET_STD,
    "adamw",
    1e-3,
    0.01,
    labels="soft",
    decay="matrices",
    batch_size=1024,
    epochs=300,
    schedule="cosine",
    crop_scale=(0.08, 1.0),
    jitter=0.0,
    lighting=0.0,
    soft_loss="mse+ce",
    test_resize=256,
    test_every=10,
    reported="last",
    seeds=(0, 1, 2),
)
# Its script for CIFAR-10; that for CIFAR-100 has SGD, 0.1 and 5e-4 on a ConvNet-3, and batches of 64.
GVBSM_SOFT_32 = replace(
    GVBSM_SOFT,
    name="gvbsm-soft-32",
    image_size=32,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    weight_decay=0.0,
    batch_size=100,
    epochs=1000,
    hard_weight=0.15,
    test_resize=None,
)
# For the stand-ins: IGD_HARD's and RDED_SOFT's training, shorter and without changes of colour, which grey
# images do not have.
SMALL_HARD = replace(
    IGD_HARD,
    name="small-hard",
    image_size=32,
    over_100_classes=None,
    epochs_by_ipc=((10, 50), (float("inf"), 30)),
    jitter=0.0,
    lighting=0.0,
    mixed_precision=True,
    evaluations=1,
    reported="last",
)
# On colour images, which are harder: in as many images seen a network gets further with milder changes and a
# rate that falls by half a cosine (chosen on Random sets and validation images).
SMALL_HARD_COLOUR = replace(
    SMALL_HARD,
    name="small-hard-colour",
    epochs_by_ipc=((10, 60), (float("inf"), 30)),
    schedule="half-cosine",
    crop_scale=(0.7, 1.0),
    cutmix_probability=0.5,
)
SMALL_SOFT = replace(
    RDED_SOFT,
    name="small-soft",
    image_size=32,
    mean=_HALF,
    std=_HALF,
    epochs=None,
    epochs_by_ipc=((10, 50), (float("inf"), 30)),
    mixed_precision=True,
    test_resize=None,
    test_every=None,
    evaluations=1,
    reported="last",
)
SMALL_GVBSM = replace(
    SMALL_SOFT,
    name="small-gvbsm",
    soft_loss="mse+ce",
    hard_weight=0.15,
    schedule="cosine",
    patch_factor=1,
    crop_scale=(0.08, 1.0),
    double_pass=False,
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        MINIMAX_HARD,
        IGD_HARD,
        IGD_CIFAR,
        RDED_SOFT,
        RDED_MIXUP,
        RDED_SOFT_128,
        RDED_SOFT_64,
        RDED_SOFT_32,
        GVBSM_SOFT,
        GVBSM_SOFT_32,
        SMALL_HARD,
        SMALL_HARD_COLOUR,
        SMALL_SOFT,
        SMALL_GVBSM,
    )
}
# How DM and IDC-1 were evaluated by their authors on CIFAR-10: what their published figures are of. (DM's
# code trains for an epoch more, and remakes its optimiser where the rate falls.)
DM_OWN = replace(
    IGD_CIFAR,
    name="dm-own",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    optimizer="sgd",
    lr=0.01,
    weight_decay=5e-4,
    batch_size=256,
    epochs=1000,
    milestones=(0.501,),
    lr_decay=0.1,
    cutmix=0.0,
    dsa="color_crop_cutout_flip_scale_rotate",
    reported="last",
)
IDC_OWN = replace(
    DM_OWN,
    name="idc-own",
    batch_size=64,
    milestones=(2 / 3, 5 / 6),
    lr_decay=0.2,
    cutmix=1.0,
    cutmix_probability=0.5,
    dsa="",
    diffaug="color_crop_flip_scale_rotate",
)
# Not for every set, and so not among PROTOCOLS: DATM's own evaluation, by a set's soft labels and rate, with
# DSA on whitened images. (Of its code the same is true.)
DATM_OWN = replace(
    IGD_CIFAR,
    name="datm-own",
    optimizer="sgd",
    lr=0.01,
    weight_decay=5e-4,
    labels="own",
    own_lr=True,
    batch_size=128,
    milestones=(0.501,),
    lr_decay=0.1,
    cutmix=0.0,
    dsa="color_crop_cutout_flip_scale_rotate",
    reported="last",
)
SMALL_DATM = replace(DATM_OWN, name="small-datm", epochs=300, mixed_precision=True)


def labellings(protocol: Protocol) -> dict[str, Protocol]:
    """A protocol by how its images are labelled; nothing else differs, so steps and rates are the same.

    One of them is the protocol itself.

    "hard": by class; "fixed": a teacher's label of each image as it is, once for good (`teachers.labelled`,
    cross-entropy); "every batch": a teacher's of each batch as it is trained on, with RDED's loss.
    """
    ways = {
        "hard": replace(protocol, name=f"{protocol.name}, hard labels", labels="hard"),
        "fixed": replace(protocol, name=f"{protocol.name}, fixed soft labels", labels="own"),
        "every batch": replace(protocol, name=f"{protocol.name}, soft labels of every batch", labels="soft"),
    }
    return {kind: protocol if way.labels == protocol.labels else way for kind, way in ways.items()}


def rded_soft(protocol: Protocol, factor: int) -> Protocol:
    """A soft-label protocol for images of `factor` x `factor` patches.

    It sets the strips to shuffle, and the least share of a crop.
    """
    if factor < 1:
        raise ValueError(f"factor is at least 1, got {factor}")
    return replace(protocol, patch_factor=factor, crop_scale=(1 / factor, 1.0))


# --- what is usual for images of a size


def usual_protocol(image_size: int, *, soft: bool) -> Protocol:
    """The published protocol for images of that size; IGD's hard-label one at their own up to 128 px."""
    if soft:
        sizes = ((32, RDED_SOFT_32), (64, RDED_SOFT_64), (128, RDED_SOFT_128))
        return next((protocol for size, protocol in sizes if image_size <= size), RDED_SOFT)
    if image_size <= IGD_CIFAR.image_size:
        return IGD_CIFAR
    return at_size(IGD_HARD, image_size) if image_size <= 128 else IGD_HARD


def at_size(protocol: Protocol, image_size: int) -> Protocol:
    """The protocol with networks that see images of that size; the test's resize goes with it."""
    resize = protocol.test_resize and round(protocol.test_resize * image_size / protocol.image_size)
    return replace(protocol, image_size=image_size, test_resize=resize)


def usual_network(image_size: int) -> str:
    """A ConvNet that halves images to 4 px a side: of depth 3 at 32 px, 6 at 256."""
    return f"convnet{min(6, max(1, round(math.log2(image_size / 4))))}"
