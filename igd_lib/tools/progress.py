"""Progress: a bar with the time left in JupyterLab or a terminal, plain lines in a headless run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item", covariant=True)
LONGEST = 480.0  # seconds between two saves: with a slow step on top, less than ten minutes


class Sized(Protocol[Item]):
    """What knows its length and can be iterated."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Pace:
    """Says when to save: once in `seconds`, and in `times` the seconds that the last save took.

    However long that was, the next is due after `LONGEST`.
    """

    def __init__(self, seconds: float, times: float = 0.0):
        self.seconds, self.times = seconds, times
        self.saved, self.took = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for the next."""
        wanted = min(LONGEST, max(self.seconds, self.times * self.took))
        return time.monotonic() - self.saved >= wanted

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what saves."""
        began = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.took = self.saved - began


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button, with a line that says how to go on; a notebook shows it alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def resumable(kept: str | Callable[[], str]) -> Iterator[None]:
    """Work that is kept as it is done: an interruption says what is, and how to go on."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        done = kept() if callable(kept) else kept
        raise Interrupted(f"interrupted: {done}; run the same again to go on from there") from error


def in_jupyterlab() -> bool:
    """Whether this process is the kernel of a notebook that a Jupyter server opened, and no headless run."""
    return bool(os.environ.get("JPY_SESSION_NAME"))


def duration(seconds: float) -> str:
    """A time for people: "28 s", "45 min", "7.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def progress(
    items: Sized[Item],
    label: str,
    every: float = 10.0,
    *,
    done: int = 0,  # items that an earlier run has had
    delay: float = 0.0,  # seconds without a bar: what is done by then needs none
) -> Iterator[Item]:
    """Iterate, saying how far it is: `label 3/10, 12 s, 28 s left`, at most one line in `every` seconds.

    A terminal or JupyterLab gets a bar, which goes when all is done. `IGD_QUIET=1` silences it.
    """
    if os.environ.get("IGD_QUIET"):
        yield from items
        return
    if in_jupyterlab() or sys.stderr.isatty():
        if in_jupyterlab():
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm

        begun: dict[str, int] = {"initial": done, "total": done + len(items)} if done else {}
        late: dict[str, float] = {"delay": delay} if delay else {}
        yield from tqdm(items, desc=label, leave=False, **begun, **late)
        return
    started = said = time.monotonic()
    count = len(items)
    for had, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= every and had < count:
            said, spent = now, now - started
            left = duration(spent / had * (count - had))
            print(f"{label} {done + had}/{done + count}, {duration(spent)}, {left} left", flush=True)
