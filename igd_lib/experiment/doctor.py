"""`igd doctor`: what this machine has, and what each notebook would do on it.

Only the standard library is imported at once, so that it still says what it can where a package is missing or
broken.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from igd_lib.tools.version import PROJECT

# What notebooks without a paper scale run on, where that is no stand-in alone.
WITHOUT_PAPER = {
    "17_your_data": "a stand-in; paper for a folder of yours",
    "18_lesson": "points in the plane",
}


def versions() -> list[str]:
    """Every package whose version is not the lock's, a line each."""
    lock, lines = PROJECT / "requirements.lock", []
    if not lock.is_file():
        return ["no requirements.lock beside the package: versions were not compared"]
    for line in lock.read_text().splitlines():
        found = re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line)
        if found is None or "platform_machine" in line or found[1].startswith(("nvidia", "cuda", "triton")):
            continue
        try:
            own = version(found[1]).split("+")[0]
        except PackageNotFoundError:
            own = "not installed"
        if own != found[2]:
            lines.append(f"{found[1]}: {own}, locked {found[2]}")
    return lines


def machine() -> list[str]:
    """Processor, memory, GPU and disk, a line each."""
    import torch

    from igd_lib.tools.machine import cache_dir, data_dir, free_disk, has_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    fast = (
        "bfloat16"
        if has_bfloat16("cpu")
        else "no bfloat16: training runs in float32, two to three times as slow"
    )
    lines = [f"{cores} cores ({torch.backends.cpu.get_cpu_capability()}, {fast}), {memory:.0f} GiB of memory"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {found.name}, {found.total_memory / 2**30:.0f} GiB")
    lines += ["no CUDA GPU"] if not torch.cuda.is_available() else []
    for name, folder in (("IGD_CACHE", cache_dir()), ("IGD_DATA", data_dir())):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        state = "" if os.access(there, os.W_OK) else ", NOT WRITABLE"
        lines.append(f"{name}: {folder}, {free_disk(folder) / 2**30:.0f} GiB free{state}")
    return lines


def data_sets() -> list[str]:
    """Which data sets are here; what the others lack."""
    from igd_lib.data.datasets import DATASETS
    from igd_lib.data.images import missing

    lines = []
    for name in DATASETS:
        lacking = missing(name)
        lines.append(f"{name}: {'found' if not lacking else '; '.join(lacking)}")
    return lines


def models() -> list[str]:
    """The stand-ins, and every weight that some notebook needs at the paper's scale."""
    from igd_lib.experiment.artefacts import ARTEFACTS
    from igd_lib.experiment.pieces import Piece, pieces
    from igd_lib.models import standin

    lines = [
        f"stand-in {name}: "
        f"{'found' if (standin.ASSETS / name / 'model_index.json').is_file() else 'NOT FOUND'}"
        for name in standin.STANDINS
    ]
    named: dict[str, Piece] = {}
    for artefact in ARTEFACTS.values():
        if artefact.paper:
            named |= {one.name: one for one in pieces(artefact.dataset, artefact) if one.kind != "machine"}
    weights = [one for name, one in named.items() if not name.startswith("the images of")]
    return lines + [f"{one.name}: {'; '.join(one.problems) or one.where}" for one in weights]


def notebooks() -> list[str]:
    """What each notebook does with scale "auto", for its own data set."""
    from igd_lib.experiment.artefacts import ARTEFACTS
    from igd_lib.experiment.pieces import missing_for_paper

    lines = []
    for name, artefact in ARTEFACTS.items():
        if not artefact.paper:
            lines.append(f"{name}: small ({WITHOUT_PAPER.get(name, 'a stand-in')})")
            continue
        lacking = missing_for_paper(artefact.dataset, artefact)
        note = f"; {len(lacking)} of the paper's pieces are missing" if lacking else ""
        lines.append(f"{name}: {'small' if lacking else 'paper'} ({artefact.dataset}{note})")
    return lines


def looked_at(part: Callable[[], list[str]]) -> list[str]:
    """A part's lines, or why it could not be looked at."""
    try:
        return part()
    except Exception as error:  # whatever is broken is what is to be reported
        return [f"NOT LOOKED AT, {type(error).__name__}: {error}"]


def found() -> dict[str, list[str]]:
    """All of it: every part's lines by its title."""
    import igd_lib

    here = f"igd_lib {igd_lib.__version__}, Python {platform.python_version()}, {platform.platform()}"
    parts = {
        here: lambda: versions() or ["all packages are the locked versions"],
        "Machine": machine,
        "Data sets": data_sets,
        "Models": models,
        'Notebooks at scale "auto"': notebooks,
    }
    return {title: looked_at(part) for title, part in parts.items()}


def text(parts: Mapping[str, list[str]]) -> str:
    """Titles with indented lines."""
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in own)]) for title, own in parts.items())
