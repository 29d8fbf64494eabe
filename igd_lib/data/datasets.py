"""Data sets by name: class order, diffusion model's class ids, sizes, layout on disk. No image is read here.

The class order is part of a data set: a distilled set and its test data must agree on it. Two orders of
ImageWoof are in use: the protocol's own (`imagewoof`) and sorted wnids, as ImageFolder has it
(`fastai-imagewoof2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

Layout = Literal["image-folder", "fashion-mnist", "cifar-10", "cifar-100", "food-101"]
Resize = Literal["bilinear", "bicubic-halving"]
Triple = tuple[float, float, float]
Counts = tuple[int | None, int | None]


@dataclass(frozen=True)
class DataSpec:
    """What has to be known about a data set before any image is read; checked when made (ValueError).

    Where `label_ids` is empty, the pretrained DiT does not know the classes: a DiT must be fine-tuned for
    them first, with ids 0 ... C-1 in label order.
    """

    name: str
    # in label order: class i has label i; empty: the order of `classes.txt`, else sorted class folders
    classes: tuple[str, ...]
    label_ids: tuple[int, ...]  # the diffusion model's class ids, in the same order
    image_size: int  # px a side
    holdout: float = 0.0  # share of each class's training images kept out as the validation split
    folder: str = ""  # below `$IGD_DATA`, or absolute; empty means `name`
    layout: Layout = "image-folder"
    subset: bool = False  # folders of other classes may lie beside these
    titles: tuple[str, ...] = ()  # class names for figures; empty means `classes`
    sizes: Counts = (None, None)  # images for training (held-out ones too) and testing; None: not known
    per_class: Counts = (None, None)  # the same for each class, where all have the same number
    mean: Triple = IMAGENET_DEFAULT_MEAN  # of [0, 1] images, as the field normalises them
    std: Triple = IMAGENET_DEFAULT_STD
    # How images come to `image_size`: torchvision's way, or ADM's and DiT's (`images.square`).
    resize: Resize = "bilinear"

    def __post_init__(self) -> None:
        for what, given, known in (("layout", self.layout, Layout), ("resize", self.resize, Resize)):
            if given not in get_args(known):
                raise ValueError(f"{self.name}: {what} is one of {', '.join(get_args(known))}, got {given!r}")
        if not 0 <= self.holdout < 1 or self.image_size < 1:
            raise ValueError(
                f"{self.name}: 0 <= holdout < 1 and image_size >= 1, got {self.holdout} and {self.image_size}"
            )
        for what, values in (("classes", self.classes), ("label_ids", self.label_ids)):
            twice = (
                [value for index, value in enumerate(values) if value in values[:index]]
                if len(set(values)) < len(values)
                else []
            )
            if twice:
                raise ValueError(f"{self.name}: {twice[0]!r} is twice among its {what}")
        for what, values in (("label_ids", self.label_ids), ("titles", self.titles)):
            if self.classes and values and len(values) != len(self.classes):
                raise ValueError(f"{self.name}: {len(self.classes)} classes, but {len(values)} {what}")
        if (self.subset or self.layout != "image-folder") and not self.classes:
            raise ValueError(
                f"{self.name}: a subset, and a data set with the layout {self.layout!r}, need their "
                "classes named in order"
            )
        for total, each in zip(self.sizes, self.per_class, strict=True):
            if not self.classes or total is None or each is None:
                continue
            if total != each * len(self.classes):
                raise ValueError(
                    f"{self.name}: {each} images in each of {len(self.classes)} classes are not {total}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Class names for figures, in label order; empty where the classes are only known from the folder."""
        return self.titles or self.classes


def image_folder(
    path: str | Path,
    *,
    image_size: int,
    name: str | None = None,
    classes: tuple[str, ...] = (),
    label_ids: tuple[int, ...] = (),
    holdout: float = 0.0,
) -> DataSpec:
    """Your data set: `path` holds `train` and `test` (else `val`), each with one folder of images a class.

    Without `classes` the label order is that of `path/classes.txt` (a class folder a line), else sorted
    folder names. `label_ids` are ImageNet-1K's, where DiT knows the classes: `your_folder.imagenet_ids` reads
    them from a file.
    """
    path = Path(path).expanduser().resolve()
    return DataSpec(name or path.name, tuple(classes), tuple(label_ids), image_size, holdout, str(path))


# --- ImageNet-1K and its parts

_INFO = ImageNetInfo("imagenet-1k")
IMAGENET_CLASSES = tuple(_INFO.label_names())  # wnids; DiT's class ids are their positions
if len(set(IMAGENET_CLASSES)) != 1000 or list(IMAGENET_CLASSES) != sorted(IMAGENET_CLASSES):
    raise ValueError(
        "timm's ImageNet-1K class list is not 1,000 sorted wnids; install a release that pyproject.toml "
        "allows"
    )

# The first WordNet name of each.
IMAGENET_TITLES = tuple(_INFO.label_name_to_description(wnid).split(",")[0] for wnid in IMAGENET_CLASSES)

# In the order of the hard-label protocol's class files. ImageNette's is sorted, ImageWoof's is not.
IMAGENETTE_CLASSES = (
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
)
IMAGEWOOF_CLASSES = (
    "n02096294",
    "n02093754",
    "n02111889",
    "n02088364",
    "n02086240",
    "n02089973",
    "n02087394",
    "n02115641",
    "n02099601",
    "n02105641",
)


def _imagenet(name: str, classes: tuple[str, ...], sizes: Counts, **options) -> DataSpec:
    """Classes of ImageNet-1K by wnid: DiT's ids and the first WordNet name of each are looked up."""
    ids = tuple(IMAGENET_CLASSES.index(wnid) for wnid in classes)
    titles = tuple(IMAGENET_TITLES[number] for number in ids)
    return DataSpec(name, classes, ids, 256, titles=titles, sizes=sizes, **options)


# --- other data sets


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _plain(classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in classes)


FASHION_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = _words(  # the fine labels
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm
    """
)
# Sorted by their bytes, as torchvision sorts them: cheese_plate is before cheesecake, which lists made
# elsewhere have the other way round.
FOOD_CLASSES = _words(
    """
    apple_pie baby_back_ribs baklava beef_carpaccio beef_tartare beet_salad beignets bibimbap bread_pudding
    breakfast_burrito bruschetta caesar_salad cannoli caprese_salad carrot_cake ceviche cheese_plate
    cheesecake chicken_curry chicken_quesadilla chicken_wings chocolate_cake chocolate_mousse churros
    clam_chowder club_sandwich crab_cakes creme_brulee croque_madame cup_cakes deviled_eggs donuts dumplings
    edamame eggs_benedict escargots falafel filet_mignon fish_and_chips foie_gras french_fries
    french_onion_soup french_toast fried_calamari fried_rice frozen_yogurt garlic_bread gnocchi greek_salad
    grilled_cheese_sandwich grilled_salmon guacamole gyoza hamburger hot_and_sour_soup hot_dog
    huevos_rancheros hummus ice_cream lasagna lobster_bisque lobster_roll_sandwich macaroni_and_cheese
    macarons miso_soup mussels nachos omelette onion_rings oysters pad_thai paella pancakes panna_cotta
    peking_duck pho pizza pork_chop poutine prime_rib pulled_pork_sandwich ramen ravioli red_velvet_cake
    risotto samosa sashimi scallops seaweed_salad shrimp_and_grits spaghetti_bolognese spaghetti_carbonara
    spring_rolls steak strawberry_shortcake sushi tacos takoyaki tiramisu tuna_tartare waffles
    """
)

_CIFAR10_STD = (0.2023, 0.1994, 0.2010)  # customary; over all pixels it would be (0.2470, 0.2435, 0.2616)
DATASETS = {
    spec.name: spec
    for spec in (
        _imagenet("imagenet", IMAGENET_CLASSES, (1_281_167, 50_000), per_class=(None, 50)),
        # The paper's ImageNette and ImageWoof: class folders of ImageNet-1K, tested on its validation images.
        _imagenet(
            "imagenette",
            IMAGENETTE_CLASSES,
            (12_894, 500),
            per_class=(None, 50),
            folder="imagenet",
            subset=True,
        ),
        _imagenet(
            "imagewoof",
            IMAGEWOOF_CLASSES,
            (12_454, 500),
            per_class=(None, 50),
            folder="imagenet",
            subset=True,
        ),
        # fastai's: the same images divided anew, in ImageFolder's sorted order (another one for ImageWoof).
        _imagenet(
            "fastai-imagenette2", tuple(sorted(IMAGENETTE_CLASSES)), (9_469, 3_925), folder="imagenette2"
        ),
        _imagenet("fastai-imagewoof2", tuple(sorted(IMAGEWOOF_CLASSES)), (9_025, 3_929), folder="imagewoof2"),
        # The ids are those of the stand-in's DiT.
        DataSpec(
            "fashion-mnist",
            FASHION_CLASSES,
            tuple(range(10)),
            32,
            holdout=1 / 6,
            layout="fashion-mnist",
            sizes=(60_000, 10_000),
            per_class=(6_000, 1_000),
            mean=(0.2861,) * 3,
            std=(0.3530,) * 3,
        ),
        DataSpec(
            "cifar-10",
            CIFAR10_CLASSES,
            (),
            32,
            layout="cifar-10",
            sizes=(50_000, 10_000),
            per_class=(5_000, 1_000),
            mean=(0.4914, 0.4822, 0.4465),
            std=_CIFAR10_STD,
        ),
        DataSpec(
            "cifar-100",
            CIFAR100_CLASSES,
            (),
            32,
            layout="cifar-100",
            titles=_plain(CIFAR100_CLASSES),
            sizes=(50_000, 10_000),
            per_class=(500, 100),
            mean=(0.5071, 0.4866, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
        ),
        DataSpec(
            "food-101",
            FOOD_CLASSES,
            (),
            256,
            layout="food-101",
            titles=_plain(FOOD_CLASSES),
            sizes=(75_750, 25_250),
            per_class=(750, 250),
        ),
    )
}


def spec_of(name: str | DataSpec) -> DataSpec:
    """The data set of that name, or the DataSpec itself. Raises ValueError for an unknown name."""
    if isinstance(name, str) and name not in DATASETS:
        raise ValueError(
            f"unknown data set {name!r}; known: {', '.join(sorted(DATASETS))}, or pass a DataSpec"
        )
    return DATASETS[name] if isinstance(name, str) else name
