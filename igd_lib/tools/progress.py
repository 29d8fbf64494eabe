"""Progress: a bar with the time left in JupyterLab or a terminal, plain lines in a headless run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item", covariant=True)


class Sized(Protocol[Item]):
    """What knows its length and can be iterated."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


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


def progress(items: Sized[Item], label: str, every: float = 10.0) -> Iterator[Item]:
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

        yield from tqdm(items, desc=label, leave=False)
        return
    started = said = time.monotonic()
    for index, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - said >= every and index + 1 < len(items):
            said = now
            done, spent = index + 1, now - started
            print(
                f"{label} {done}/{len(items)}, {spent:.0f} s, {spent / done * (len(items) - done):.0f} s "
                "left",
                flush=True,
            )
