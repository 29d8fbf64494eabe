"""How the compared methods make their sets in an experiment: settings by scale, and what the cache keeps.

At the paper's scale the authors' settings, on a stand-in the shortened ones, else a few iterations that only
show that everything works.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from igd_lib.baselines import coresets, img2img, rded
from igd_lib.baselines.d4m import D4M, prototypes
from igd_lib.baselines.d4m import split_of as d4m_split
from igd_lib.baselines.datm import DATM, datm
from igd_lib.baselines.dm import DM, dm
from igd_lib.baselines.gvbsm import GVBSM, gvbsm
from igd_lib.baselines.idc import IDC, idc
from igd_lib.baselines.sre2l import SRe2L, sre2l
from igd_lib.baselines.tdsdm import TDSDM, Adapter, rerendering, tune_adapter
from igd_lib.baselines.tdsdm import split_of as tdsdm_split
from igd_lib.baselines.trajectories import Experts, Trajectories
from igd_lib.data.images import ImageData
from igd_lib.experiment.scales import Scale
from igd_lib.sets import learned
from igd_lib.sets.class_files import ClassFiles, ClassMaker, fill, kept_by_class
from igd_lib.sets.terms import ORIGINS, Origin
from igd_lib.teachers import Teacher
from igd_lib.tools import files, keys
from igd_lib.tools.machine import ray_cluster
from igd_lib.tools.progress import progress, resumable


class Workplace(Protocol):
    """What a method may use of an experiment."""

    @property
    def train(self) -> ImageData: ...

    @property
    def scale(self) -> Scale: ...

    @property
    def device(self) -> str: ...

    def any_teacher(self) -> Teacher: ...

    @property
    def early_networks(self) -> list[Teacher]: ...

    def recovery_networks(self, count: int) -> list[Teacher]:
        """The first `count` networks whose batch statistics images are recovered from."""
        ...

    def renderer(self) -> img2img.Backbone:
        """The diffusion model that makes new images of given ones."""
        ...


def settings_of(place: Workplace, method: Any, ipc: int, cut: Mapping[str, Any]) -> Any:
    """A method's settings at the experiment's scale; `cut`: what a run that means nothing changes of them."""
    scale = place.scale
    own = method.paper(scale.dataset, ipc) if scale.papers else method.small(ipc)
    return own if scale.figures_mean_something else replace(own, **cut)


def shortened(settings: Any, authors: Any, prefix: str = "") -> list[str]:
    """Which of a method's settings are not its authors', each with theirs: "iterations 500 (20000)"."""
    found: list[str] = []
    for one in fields(settings):
        own, theirs = getattr(settings, one.name), getattr(authors, one.name)
        if is_dataclass(own) and type(own) is type(theirs):
            found += shortened(own, theirs, f"{one.name}'{'s' * (one.name[-1] != 's')} ")
        elif own != theirs:
            found.append(f"{prefix}{one.name} {own} ({theirs})")
    return found


def about_data(train: ImageData) -> dict[str, Any]:
    """What every key has of the real images that something is made of."""
    return {"data": train.name, "split": train.split, "images": len(train)}


def about_set(place: Workplace, ipc: int, seed: int) -> dict[str, Any]:
    """What every set's key has."""
    return about_data(place.train) | {"ipc": ipc, "seed": seed}


def keep_card(folder: Path, name: str, origin: Origin, place: Workplace, ipc: int, seed: int) -> None:
    """Write beside a set that is in the cache what it is, for who finds it there."""
    files.write(
        folder / "README.md",
        f"# {name}: {place.train.name}, {ipc} images a class, seed {seed}\n\n"
        f"Its images are **{ORIGINS[origin]}**; what may be done with those ({place.train.split!r} of "
        f"{place.train.name}), their licence says. `manifest.json` has the settings, class order is the "
        f"data's: {', '.join(place.train.classes[:10])}{', ...' * (len(place.train.classes) > 10)}.\n",
    )


class _OfAuthors:
    """A method with its authors' settings, and those that it has in an experiment."""

    method: Any  # its settings' class, with `paper` and `small`

    def settings(self, place: Workplace, ipc: int) -> Any:
        raise NotImplementedError

    def shortened(self, place: Workplace, ipc: int) -> list[str]:
        """Which settings are not the authors' for the experiment's images."""
        return shortened(self.settings(place, ipc), self.method.paper(place.train.name, ipc))


# --- sets that are made in one piece

SET, STATE = learned.FILE, "state"


@dataclass(frozen=True)
class Whole(_OfAuthors):
    """A method that makes a set in one piece, in minutes to days: made once, resumably, then read."""

    kind: str  # in keys
    name: str
    method: Any  # its settings' class, with `paper` and `small`
    cut: Mapping[str, Any]  # of settings, where figures mean nothing
    # of IPC, seed, settings and the path, a file or a folder, from which an interrupted run goes on
    make: Callable[[Workplace, int, int, Any, Path], ImageData]
    networks: Callable[[Workplace], Sequence[Teacher]] = lambda place: ()  # that name the set too
    vary: Mapping[str, Any] = field(default_factory=dict)  # of settings, at every scale
    origin: Origin = "derived"

    def __call__(self, place: Workplace, ipc: int, seed: int) -> ImageData:
        """The set, from the cache or made for it."""
        about = self.about(place, ipc, seed)
        folder = keys.folder(self.kind, about)
        keys.claim(folder / "manifest.json", self.kind, about, "a set")
        if not (folder / SET).is_file():
            with files.locked(folder, f"a run of {self.name}", wait=True):
                if not (folder / SET).is_file():
                    self._make(place, ipc, seed, folder)
        return learned.load(folder / SET)

    def _make(self, place: Workplace, ipc: int, seed: int, folder: Path) -> None:
        state = folder / STATE
        with resumable(f"what {self.name} has is in {folder}"):
            learned.save(folder / SET, self.make(place, ipc, seed, self.settings(place, ipc), state))
        keep_card(folder, self.name, self.origin, place, ipc, seed)
        shutil.rmtree(state, ignore_errors=True)
        state.unlink(missing_ok=True)

    def settings(self, place: Workplace, ipc: int) -> Any:
        return replace(settings_of(place, self.method, ipc, self.cut), **self.vary)

    def is_made(self, place: Workplace, ipc: int, seed: int) -> bool:
        """Whether it is in the cache already. Networks that name it are not trained to be asked."""
        own = self._settled(place, ipc, seed)
        return any((folder / SET).is_file() for folder in keys.kept(self.kind, own))

    def about(self, place: Workplace, ipc: int, seed: int) -> dict[str, Any]:
        """What names the set."""
        own = self._settled(place, ipc, seed)
        if networks := self.networks(place):
            own["networks"] = [[one.architecture, one.weights] for one in networks]
        return own

    def _settled(self, place: Workplace, ipc: int, seed: int) -> dict[str, Any]:
        """What names it before anything is trained."""
        return about_set(place, ipc, seed) | {"settings": asdict(self.settings(place, ipc))}


def of_pixels(
    method: Callable[..., ImageData], name: str
) -> Callable[[Workplace, int, int, Any, Path], ImageData]:
    """Who makes the sets of `dm` or `idc`: all classes together, or one by one as Ray tasks: the same bytes.

    Together they share the networks; each task draws, and for IDC-1 trains, them again.
    """

    def make(place: Workplace, ipc: int, seed: int, settings: Any, state: Path) -> ImageData:
        train, options = place.train, {"seed": seed, "device": place.device}
        if not ray_cluster():
            return method(train, ipc, settings, state=state, **options)
        kept = ClassFiles(state, train.name, train.split, train.classes, ipc, train.image_size)
        fill(kept, OneClass(method, train, ipc, settings, options, state), kept.lacking(), name)
        return kept.data()

    return make


@dataclass(frozen=True)
class OneClass:
    """Makes the images of a label by a method that can make one class by itself."""

    method: Callable[..., ImageData]
    data: ImageData
    ipc: int
    settings: Any
    options: Mapping[str, Any]
    folder: Path

    def to(self, device: str) -> OneClass:
        return replace(self, options={**self.options, "device": device})

    def __call__(self, label: int) -> Tensor:
        state = self.folder / f"{STATE}-{label:05d}"
        found = self.method(self.data, self.ipc, self.settings, labels=[label], state=state, **self.options)
        state.unlink(missing_ok=True)
        return found.of_class(label)


def _recovered(place: Workplace, ipc: int, seed: int, settings: SRe2L, state: Path) -> ImageData:
    [network] = place.recovery_networks(1)
    return sre2l(place.train, network, ipc, settings, seed=seed, device=place.device, state=state)


def _recovered_by_several(place: Workplace, ipc: int, seed: int, settings: GVBSM, state: Path) -> ImageData:
    networks = place.recovery_networks(SEVERAL)
    return gvbsm(place.train, networks, ipc, settings, seed=seed, device=place.device, state=state)


def _matched(place: Workplace, ipc: int, seed: int, settings: DATM, state: Path) -> ImageData:
    """With experts, which sets of all seeds and sizes share: those that lack are trained first."""
    about = about_data(place.train) | {"settings": asdict(settings.experts)}
    folder = keys.folder("experts", about)
    keys.claim(folder / "manifest.json", "experts", about, "experts")
    if address := ray_cluster():
        Trajectories(place.train, settings.experts, folder, place.device).train(ray=address)
    return datm(place.train, ipc, settings, folder, seed=seed, device=place.device, state=state)


SEVERAL = 4  # networks of G-VBSM, at most

DM_SETS = Whole("dm", "DM", DM, {"iterations": 2, "batch_real": 8}, of_pixels(dm, "DM"))
IDC_SETS = Whole(
    "idc",
    "IDC-1",
    IDC,
    {"outer": 1, "inner": 2, "batch_real": 8, "net_images": 16, "early": 0},
    of_pixels(idc, "IDC-1"),
)
SRE2L_SETS = Whole(
    "sre2l",
    "SRe2L",
    SRe2L,
    {"iterations": 2},
    _recovered,
    lambda place: place.recovery_networks(1),
    origin="recovered",
)
GVBSM_SETS = Whole(
    "gvbsm",
    "G-VBSM",
    GVBSM,
    {"iterations": 2, "target_images": 10},
    _recovered_by_several,
    lambda place: place.recovery_networks(SEVERAL),
    origin="recovered",
)
DATM_CUT: dict[str, Any] = {
    "experts": Experts("convnet1-w4", count=2, epochs=2, images=8, whiten=False),
    "iterations": 2,
    "steps": 2,
    "expert_epochs": 1,
    "first_epoch": 0,
    "upper": 1,
    "last_upper": 2,
    "widened_by": 1,
    "threshold": 1e9,
    "lr_rate": 1e-9,
    "init": "real",
}
DATM_SETS = Whole("datm", "DATM", DATM, DATM_CUT, _matched)
# Of hard labels every loss is above DATM's threshold at `small`'s rate; this one is its authors'.
PLAIN: dict[str, Any] = {"labels": "hard", "images": "8-bit", "rate": 0.01}
PLAIN_DATM_SETS = Whole("datm", "DATM (hard labels, 8 bits)", DATM, DATM_CUT, _matched, vary=PLAIN)


# --- sets that are made class by class


@dataclass(frozen=True)
class ByClass(_OfAuthors):
    """A method that makes its set class by class, as Ray tasks where `IGD_RAY` names a cluster."""

    kind: str  # in keys
    name: str
    method: Any  # its settings' class, with `paper`, `small` and, for a DiT, `dit`
    cut: Mapping[str, Any]  # of settings, where figures mean nothing
    # of IPC, seed and settings: who makes a class's images
    prepare: Callable[[Workplace, int, int, Any], ClassMaker]
    split: Callable[[int, int], str]  # what the images call themselves, by IPC and seed
    origin: Origin = "derived"

    def __call__(self, place: Workplace, ipc: int, seed: int) -> ImageData:
        """The set, from the cache or made for it."""
        settings, kept = self.settings(place, ipc), self._kept(place, ipc, seed)
        if kept.lacking():
            keep_card(kept.folder, self.name, self.origin, place, ipc, seed)
        return kept_by_class(
            self.kind,
            self.about(place, ipc, seed),
            kept,
            lambda: self.prepare(place, ipc, seed, settings),
            self.name,
        )

    def settings(self, place: Workplace, ipc: int) -> Any:
        """The authors' are for Stable Diffusion; where the diffusion model is a DiT, the DiT's."""
        scale, on_dit = place.scale, isinstance(place.renderer(), img2img.DiT)
        if not (scale.papers and on_dit):
            return settings_of(place, self.method, ipc, self.cut)
        own = self.method.dit(scale.dataset, ipc)
        return own if scale.figures_mean_something else replace(own, **self.cut)

    def is_made(self, place: Workplace, ipc: int, seed: int) -> bool:
        """Whether it is in the cache already."""
        return not self._kept(place, ipc, seed).lacking()

    def about(self, place: Workplace, ipc: int, seed: int) -> dict[str, Any]:
        """What names the set."""
        own = {"settings": asdict(self.settings(place, ipc)), "model": place.renderer().about}
        return about_set(place, ipc, seed) | own

    def _kept(self, place: Workplace, ipc: int, seed: int) -> ClassFiles:
        train, size = place.train, self.settings(place, ipc).size or place.train.image_size
        folder = keys.folder(self.kind, self.about(place, ipc, seed))
        return ClassFiles(folder, train.name, self.split(ipc, seed), train.classes, ipc, size)


def _prototypes(place: Workplace, ipc: int, seed: int, settings: D4M) -> ClassMaker:
    return prototypes(place.train, place.renderer(), ipc, settings, seed=seed, device=place.device)


def _rerendering(place: Workplace, ipc: int, seed: int, settings: TDSDM) -> ClassMaker:
    """With the adapter, which all seeds share: trained once, then read."""
    backbone, about = place.renderer(), about_data(place.train)
    about |= {"settings": asdict(settings.adapter), "model": backbone.about}
    folder = keys.folder("adapter", about)
    keys.claim(folder / "manifest.json", "adapter", about, "an adapter")
    with files.locked(folder, "an adapter's training", wait=True):
        state = folder / "adapter.safetensors"
        adapter = tune_adapter(place.train, backbone, settings.adapter, state=state)
    return rerendering(place.train, backbone, adapter, ipc, settings, seed=seed, device=place.device)


D4M_SETS = ByClass("d4m", "D4M", D4M, {"num_steps": 4, "images": 40}, _prototypes, d4m_split)
TDSDM_SETS = ByClass(
    "tdsdm",
    "TDSDM",
    TDSDM,
    {"num_steps": 4, "adapter": Adapter(steps=2, images=10)},
    _rerendering,
    tdsdm_split,
)


def random_images(place: Workplace, ipc: int, seed: int) -> ImageData:
    """Real images drawn at random."""
    return place.train.per_class(ipc, seed)


def rded_images(place: Workplace, ipc: int, seed: int) -> ImageData:
    """RDED's images by the teacher of the soft-label protocol; selected once, then read from the cache."""
    train, teacher = place.train, place.any_teacher()
    grids = rded.grids_of(train.image_size, place.scale.candidates)
    settings = about_set(place, ipc, seed) | {"teacher": [teacher.architecture, teacher.weights]}
    settings |= asdict(grids)
    split = rded.split_of(ipc, grids.factor, seed)
    kept = ClassFiles(keys.folder("rded", settings), train.name, split, train.classes, ipc, grids.size)

    def prepare() -> rded.Selection:
        return rded.selection(train, teacher, ipc, grids, seed=seed, device=place.device)

    if kept.lacking():
        keep_card(kept.folder, "RDED", "real", place, ipc, seed)
    return kept_by_class("rded", settings, kept, prepare, "RDED")


# The rules of coresets by the networks that they look through: the soft-label teacher, or, as EL2N has it,
# several early in training. One look serves all of a group.
BY_TEACHER, BY_EARLY = ("herding", "k-centre", "medoid", "confidence"), ("el2n", "el2n-easiest")


def coreset_images(rule: str) -> Callable[[Workplace, int, int], ImageData]:
    """Who makes a coreset: the same for every generation seed, for nothing is drawn."""

    def make(place: Workplace, ipc: int, seed: int) -> ImageData:
        early = rule in BY_EARLY
        networks = place.early_networks if early else [place.any_teacher()]
        rules = BY_EARLY if early else BY_TEACHER
        found = _choices(_pool(place), networks, ipc, rules, place.device)
        return coresets.chosen(_pool(place), rule, ipc, [by_rule[rule] for by_rule in found])

    return make


def _pool(place: Workplace) -> ImageData:
    """The real images that coresets are chosen from: all, or a few where figures mean nothing."""
    return place.train if place.scale.figures_mean_something else place.train.first(place.scale.candidates)


def _choices(
    data: ImageData, networks: Sequence[Teacher], ipc: int, rules: Sequence[str], device: str
) -> list[dict[str, Tensor]]:
    """By class, what each rule chooses, as positions; made once, then read. An interrupted run goes on."""
    settings = about_data(data) | {
        "networks": [[one.architecture, one.weights] for one in networks],
        "ipc": ipc,
        "rules": list(rules),
    }
    folder, count = keys.folder("coreset", settings), len(data.classes)
    keys.claim(folder / "manifest.json", "coreset", settings, "coresets")
    paths = [folder / f"{label:05d}.safetensors" for label in range(count)]
    lacking = [label for label in range(count) if not paths[label].is_file()]
    if lacking:
        made = coresets.chooser(data, networks, ipc, rules, device=device)
        with resumable(lambda: f"{sum(path.is_file() for path in paths)} of {count} classes are in {folder}"):
            for label in progress(lacking, "coresets, class", done=count - len(lacking)):
                _keep_choice(paths[label], made, label)
    return [files.load_tensors(path)[0] for path in paths]


def _keep_choice(path: Path, made: coresets.Chooser, label: int) -> None:
    """Choose of a class, where no other process has, into a file."""
    what = f"a run that chooses of class {label}"
    with files.locked(path.parent, what, wait=True, name=f".{path.stem}.lock"):
        if not path.is_file():
            files.save_tensors(path, made(label))
