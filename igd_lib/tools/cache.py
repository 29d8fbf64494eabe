"""Work on disk: what lies in the cache, by kind, size and last use, and its removal by choice."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from igd_lib.tools import files
from igd_lib.tools.keys import SCHEMA
from igd_lib.tools.machine import cache_dir

# What earlier versions called sets, evaluations and surrogates; nothing looks there any more.
OLD = ("runs", "scores", "surrogates")
MODELS = "models"  # weights, some of them put there by hand
SHARED = "shared"  # what was pulled, and can be pulled again
KINDS = (*SCHEMA, *OLD, SHARED, MODELS)
ALL = "all"  # of what is made anew when asked for
DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Work:
    """A piece of work: a folder, or a file, `$IGD_CACHE/KIND/KEY`."""

    kind: str
    path: Path
    bytes: int
    last_used: float  # seconds since 1970: when the last of its files was read or written

    @property
    def key(self) -> str:
        return self.path.name

    def record(self) -> dict[str, object]:
        """What a script may want of it."""
        return {
            "kind": self.kind,
            "key": self.key,
            "path": str(self.path),
            "bytes": self.bytes,
            "last_used": self.last_used,
        }

    def is_named(self, name: str) -> bool:
        """Whether a kind, a key, with or without seed and suffix, or "all" means it."""
        key = self.key.partition("-seed")[0].removesuffix(".safetensors")
        return name in (self.kind, self.key, key) or (name == ALL and self.kind != MODELS)


def work(older_than: float = 0.0) -> list[Work]:
    """All work on disk whose last use is at least `older_than` days ago, by kind and from the oldest on.

    Results' rows and data sets are no work of this kind: neither is listed.
    """
    latest = time.time() - older_than * DAY
    found = [_measured(kind, path) for kind in KINDS for path in _entries(cache_dir() / kind)]
    order = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(
        (one for one in found if one.last_used <= latest or not older_than),
        key=lambda one: (order[one.kind], one.last_used, one.key),
    )


def chosen(found: Sequence[Work], names: Sequence[str]) -> list[Work]:
    """The work that kinds, keys or "all" name. Raises ValueError for a name that means none of it."""
    for name in names:
        if name not in (*KINDS, ALL) and not any(one.is_named(name) for one in found):
            raise ValueError(f"no such work: {name!r} is no kind ({', '.join(KINDS)}, {ALL}) and no key")
    return [one for one in found if any(one.is_named(name) for name in names)]


def remove(one: Work) -> None:
    """Delete a piece of work.

    Raises BlockingIOError where a run holds its lock, OSError where it cannot be deleted.
    """
    if one.path.is_symlink() or not one.path.is_dir():
        one.path.unlink()  # of a link, the link
        return
    # A set's own lock keeps new runs from beginning, those of its classes say whether one is at work.
    with ExitStack() as locks:
        for lock in dict.fromkeys([one.path / files.LOCK, *one.path.rglob(f"*{files.LOCK}")]):
            locks.enter_context(files.locked(lock.parent, "a run", name=lock.name))
        shutil.rmtree(one.path)


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"


def table(found: Sequence[Work]) -> str:
    """A line a piece, and their sum."""
    lines = [
        f"{one.kind:<13} {one.key:<24} {size(one.bytes):>8}   "
        f"{time.strftime('%Y-%m-%d', time.localtime(one.last_used))}"
        for one in found
    ]
    total = f"{len(found)} pieces of work in {cache_dir()}, {size(sum(one.bytes for one in found))}"
    return "\n".join(
        [f"{'kind':<13} {'key':<24} {'size':>8}   last use", *lines, total] if found else [total]
    )


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _measured(kind: str, path: Path) -> Work:
    """Nothing is opened, so that looking is no use; links are not followed."""
    stats = [os.lstat(one) for one in (_files(path) if path.is_dir() and not path.is_symlink() else [path])]
    stats = stats or [os.lstat(path)]  # an empty folder
    used = max(max(one.st_atime, one.st_mtime) for one in stats)
    return Work(kind, path, sum(one.st_size for one in stats), used)


def _files(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        yield from (os.path.join(where, name) for name in names)
