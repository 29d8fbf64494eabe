"""Files from the network: whole and checked, or not there at all."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path

from igd_lib.tools.progress import progress

TIMEOUT = 10.0  # seconds to wait for a connection, and for each piece
PIECE = 1 << 20  # bytes


def download(url: str, path: Path, *, md5: str | None = None) -> Path:
    """Fetch `url` into the new file `path`, with a bar or lines of progress; returns `path`.

    Raises OSError where the host does not answer within TIMEOUT, the transfer ends early, or the md5 is
    another. `path` is meant to be in a temporary folder: what an interruption leaves there is gone with it.
    """
    digest = hashlib.md5(usedforsecurity=False)  # the hash that the data's host publishes
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        pieces = range(-(-total // PIECE)) if total else range(1 << 20)
        for _ in progress(pieces, f"{path.name}, MiB") if total else pieces:
            content = response.read(PIECE)
            if not content:
                break
            digest.update(content)
            file.write(content)
        if total and file.tell() != total:
            raise OSError(f"{url} ended after {file.tell():,} of {total:,} bytes")
    if md5 is not None and digest.hexdigest() != md5:
        raise OSError(f"{url} is corrupted or has changed: its md5 is {digest.hexdigest()}, not {md5}")
    return path
