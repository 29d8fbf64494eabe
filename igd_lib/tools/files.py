"""Files that are whole or absent: atomic writes and safetensors training states.

Every tensor the project stores is safetensors. A writer fills a temporary file beside the target,
flushes it to disk and renames it, so a crash, a full disk or a kill never leaves half a file.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load as _parse
from safetensors.torch import save as _serialise
from torch import Tensor, nn

from igd_lib.tools import locks


def write(path: str | Path, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write `content` (bytes, text, or a function that writes to the path it is given) atomically.

    Raises OSError with the path and the cause in plain words when the folder cannot be written or
    the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
    return path


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno, f"cannot write {path}: {error.strerror or error}. Free space or choose another folder"
    )


_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def text(path: str | Path) -> str:
    """A text file's content: UTF-8, or what its byte order mark says; no line end is changed.

    Raises ValueError naming the file and line of the first byte that is neither, as in Latin-1.
    """
    raw = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    remedy = "save the file as UTF-8"
    try:
        found = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(f"{path}, line {line} is not {encoding} ({error.reason}); {remedy}") from error
    if "\0" in found:
        line = found[: found.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line} has a NUL, as UTF-16 without a byte order mark has; {remedy}")
    return found


def sha256(path: str | Path) -> str:
    """A file's hash, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LOCK = ".lock"
PATIENCE = 0.5  # seconds of waiting for a lock before that is said


@contextmanager
def locked(folder: str | Path, what: str, *, wait: bool = False, name: str = LOCK) -> Iterator[None]:
    """Hold a folder's lock, which the system releases when the process ends, however it ends.

    Or the lock `name` in it, of a part of the work. Where another process holds it, wait for it, which is
    said, or raise BlockingIOError. On a file system without `flock` the lock is a file that names its process
    (`locks`), which is said once. Raises OSError where the folder cannot be written.
    """
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flock = locks.has_flock(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    with _flocked(path, what, wait) if flock else _named(path, what, wait):
        yield


@contextmanager
def _flocked(path: Path, what: str, wait: bool) -> Iterator[None]:
    lock = FileLock(path)
    try:
        _acquire(lock, path, what, wait)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with suppress(OSError):  # on a full disk the lock holds without a name in it
            path.write_text(locks.me())
        yield
    finally:
        path.unlink(missing_ok=True)  # a process that waits for it takes another file
        lock.release()


def _acquire(lock: FileLock, path: Path, what: str, wait: bool) -> None:
    try:
        lock.acquire(timeout=PATIENCE if wait else 0)
    except Timeout as error:
        with suppress(OSError, IndexError):
            what = f"{what} ({path.read_text().splitlines()[0]})"
        if not wait:
            raise BlockingIOError(
                errno.EAGAIN, f"{path.parent} is in use by {what}; wait for it, or choose another folder"
            ) from error
        locks.say_once(f"waiting for {what} in {path.parent}")
        lock.acquire(timeout=-1)


@contextmanager
def _named(path: Path, what: str, wait: bool) -> Iterator[None]:
    locks.say_once(
        "the cache's file system has no flock: a lock is a file that names its process, and one that was "
        f"killed on another machine leaves it behind ({path})"
    )
    lock = locks.NamedLock(path)
    try:
        taken = lock.acquire(wait=wait)
    except OSError as error:
        raise _cannot_write(path, error) from error
    if not taken:
        raise BlockingIOError(
            errno.EAGAIN,
            f"{path.parent} is in use by {what} ({lock.holder()}); wait for it, or choose another folder; "
            f"{lock.remedy}",
        )
    try:
        yield
    finally:
        lock.release()


def difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first difference of two JSON values in words ("a.b[0] = 1, wanted 2").

    Keys that only `old` has do not count at the top.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(new) if not where else list(dict.fromkeys([*new, *old]))
        pairs = [(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{where} = {old}, wanted {new}"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def digest(state: Mapping[str, Tensor]) -> str:
    """Twelve hex digits of a state dict's tensors in order, to tell sets and models by their weights."""
    found = hashlib.sha256()
    for value in state.values():
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


# of the names: safetensors sorts them by its own rules and gives them back in another order each time
_ORDER = "_order"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    """Write named tensors and JSON-able metadata as one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write(
        path,
        _serialise(plain, metadata={"igd": json.dumps(metadata | {_ORDER: list(plain)}, sort_keys=True)}),
    )


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors in their order, metadata).

    Raises ValueError naming a damaged file.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        tensors = _parse(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {}).get("igd", "{}"))
        tensors = {name: tensors[name] for name in metadata.pop(_ORDER, sorted(tensors))}
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    return tensors, metadata


def save_training(
    path: str | Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator | None = None,
    note: Mapping[str, Any] | None = None,
    **models: nn.Module,
) -> Path:
    """Write models, optimiser state, number of finished steps and, if given, generator state and note.

    The note is JSON-able.
    """
    tensors = {
        f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{index}/{key}": torch.as_tensor(value)
            for key, value in state.items()
            if value is not None
        }
    if generator is not None:
        tensors["generator"] = generator.get_state()
    # Shared storage cannot be written; copies can.
    return save_tensors(
        path, {name: tensor.clone() for name, tensor in tensors.items()}, step=step, **(note or {})
    )


def load_training(
    path: str | Path,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator | None = None,
    **models: nn.Module,
) -> dict[str, Any]:
    """Restore what `save_training` wrote, in place.

    Returns its note with the number of finished "step"s, 0 without a file.
    """
    if not Path(path).is_file():
        return {"step": 0}
    tensors, metadata = load_tensors(path)
    for name, model in models.items():
        model.load_state_dict(
            {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
    if generator is not None:
        generator.set_state(tensors["generator"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata
