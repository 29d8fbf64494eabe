"""Locks on file systems without `flock`: a file that names the process which holds it.

Some network and user-space file systems answer ENOSYS, EOPNOTSUPP or ENOLCK. There a lock is a file that
one process can create; a process that was killed leaves it behind. So it says whose it is, and is taken over
where that process has ended on this machine; of another machine's nothing can be known here, and an error
says what to delete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

try:
    import fcntl
except ImportError:  # not on this system: filelock locks by other means
    fcntl = None  # type: ignore[assignment]

WITHOUT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
POLL = 0.2  # seconds between looks at a lock that is waited for
_said: set[str] = set()


def say_once(line: str) -> None:
    """Print a line that has not been printed by this process yet."""
    if line not in _said:
        _said.add(line)
        print(line, flush=True)


def has_flock(folder: Path) -> bool:
    """Whether its file system has locks that end with their process. Raises OSError as writing does."""
    if fcntl is None:
        return True
    with tempfile.TemporaryFile(dir=folder, prefix=".lock.", suffix=".tmp") as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT:
                return False
            raise
    return True


def me() -> str:
    """This process in words, and in a second line what tells it from a later one of its number."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{_started(os.getpid())} {_processes()}\n"


def _started(process: int) -> str:
    """When a process started, in the system's ticks; "-" where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return "-"


def _processes() -> str:
    """Which processes this one can see: containers of one host name number their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "-"


def has_ended(holder: str) -> bool:
    """Whether the process that wrote `me` has surely ended: False for another machine's, and for none."""
    try:
        first, second = holder.splitlines()
        _, number, _, host = first.split(" ", 3)
        started, processes = second.split(" ")
        process = int(number)
    except ValueError:
        return False
    if host != socket.gethostname() or processes != _processes():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return started != _started(process)


class NamedLock:
    """A lock that is the file `path`, created by the process that it names."""

    def __init__(self, path: Path):
        self.path = path

    def acquire(self, *, wait: bool) -> bool:
        """Take it; False where another process has it, unless waited for. Raises OSError as writing does."""
        while not self._create():
            if self._take_over():
                continue
            if not wait:
                return False
            say_once(f"waiting for {self.holder()}; {self.remedy}")
            time.sleep(POLL)
        return True

    def release(self) -> None:
        with suppress(OSError):
            if self.path.read_text() == me():
                self.path.unlink()

    def holder(self) -> str:
        """The process that has it, in words."""
        with suppress(OSError):
            return next(iter(self.path.read_text().splitlines()), "a process that it does not name")
        return "a process that has just ended"

    @property
    def remedy(self) -> str:
        return f"if that has ended, delete {self.path} (its file system has no flock)"

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(handle, me().encode())
        except OSError:  # a full disk: nobody could tell whose it is
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return True

    def _take_over(self) -> bool:
        """Remove the file of a process that has ended on this machine, one contender at a time."""
        try:
            if not has_ended(self.path.read_text()):
                return False
        except FileNotFoundError:
            return True
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        # Contenders for such a file are on this machine, and so is this lock.
        with FileLock(Path(tempfile.gettempdir()) / f"igd-{name}.lock"), suppress(FileNotFoundError):
            if has_ended(self.path.read_text()):
                self.path.unlink()
        return True
